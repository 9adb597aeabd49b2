//! Replays recordings with checks: `cargo run --release --example replay_all -- FILE...`. One line each, mismatches below.

use std::path::PathBuf;
use tdpmmu_trace::{Input, ReplayOptions, replay};

fn main() {
    let verbose = std::env::var_os("VERBOSE").is_some();
    for file in std::env::args_os().skip(1).map(PathBuf::from) {
        let start = std::time::Instant::now();
        let name = file.display().to_string();
        match replay(Input::File(file), &ReplayOptions { check: true, ..Default::default() }) {
            Err(error) => println!("{name}: {error}"),
            Ok(r) => {
                let rate = r.bytes as f64 / 1e6 / start.elapsed().as_secs_f64();
                println!(
                    "{name}: {} {} transitions {:?} {:?} roots {:?} peak {} end {} {:?} {:?} {:?} obs {} zaps {} {rate:.0} MB/s {:?}",
                    r.kernel,
                    r.transitions,
                    r.checked,
                    r.mismatch_kinds,
                    r.roots,
                    r.tables_peak,
                    r.tables_at_end,
                    r.births,
                    r.deaths,
                    r.stat_checks,
                    r.observations,
                    r.zaps.len(),
                    r.notes
                );
                for m in r.mismatches.iter().take(if verbose { 100 } else { 5 }) {
                    println!("    {m:?}");
                }
                if verbose {
                    for z in &r.zaps {
                        println!("    {z:?}");
                    }
                }
            }
        }
    }
}
