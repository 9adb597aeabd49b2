//! An experiment without Python: `cargo run --release -p tdpmmu-lab --example bench -- drop '{"memory_bytes": 1073741824}'`.
//! The result's JSON goes to stdout, progress to stderr.
use tdpmmu_lab::{Control, LabError, bench};

fn main() {
    let mut args = std::env::args().skip(1);
    let kind = args.next().unwrap_or_else(|| "zap".into());
    let config = args.next().unwrap_or_else(|| "{}".into());
    let control = Control::new(Default::default(), |phase, fraction| {
        if fraction == 0.0 {
            eprintln!("{phase}");
        }
    });
    match bench::run(&kind, &config, &serde_json::json!({"profile": "example"}), &control) {
        Ok(json) => println!("{json}"),
        Err(LabError::Check { message, partial }) => {
            println!("{partial}");
            eprintln!("check failed: {message}");
            std::process::exit(1);
        }
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    }
}
