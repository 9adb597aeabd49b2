//! `native`: one JSON object, `tdpmmu.native/1`: ns an operation of what `benches/python` does in batches.

use std::process::ExitCode;

fn main() -> ExitCode {
    match tdpmmu_benches::goals::native::run(5) {
        Ok(native) => {
            println!("{}", serde_json::json!(native));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("native: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
