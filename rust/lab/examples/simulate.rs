//! A simulation without Python: `cargo run --release -p tdpmmu-lab --example simulate -- '{"vcpus": 416, "memory_bytes": 13194139533312}'`.
//! The result's JSON goes to stdout, progress to stderr.
use tdpmmu_lab::{Control, simulate};

fn main() {
    let config = std::env::args().nth(1).unwrap_or_else(|| "{}".into());
    let control =
        Control::new(Default::default(), |phase, fraction| eprintln!("{phase} {:.0} %", fraction * 100.0));
    match simulate::command(&config, &control) {
        Ok(json) => println!("{json}"),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    }
}
