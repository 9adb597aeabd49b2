//! Throughput of the reader: `cargo run --release --example read_speed -- FILE`. Prints MB/s of text.

use std::path::PathBuf;
use std::time::Instant;
use tdpmmu_trace::{Input, Item, TraceReader};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: read_speed FILE")?;
    for _ in 0..3 {
        let start = Instant::now();
        let mut reader = TraceReader::open(Input::File(path.clone()), false)?;
        let mut events = 0u64;
        while let Some(item) = reader.next()? {
            events += u64::from(matches!(item, Item::Record(_, event) if event.is_kvm()));
        }
        let stats = reader.finish()?;
        let seconds = start.elapsed().as_secs_f64();
        let rate = stats.bytes as f64 / 1e6 / seconds;
        println!(
            "{events} events, {} lines, {} bad, {} bytes, {rate:.0} MB/s",
            stats.lines, stats.bad_lines, stats.bytes
        );
        for (name, count) in &stats.foreign {
            println!("  foreign: {name} {count}");
        }
        for bad in &stats.bad {
            println!("  bad: {bad:?}");
        }
    }
    Ok(())
}
