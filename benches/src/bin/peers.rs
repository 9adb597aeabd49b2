//! `peers`: the table of ratios, as text or as JSON `tdpmmu.peers/1`.

use std::process::ExitCode;

use tdpmmu_benches::cli::{self, Command, Options, Report};
use tdpmmu_benches::harness::{BenchError, Row, rows, table};
use tdpmmu_benches::limits::{LimitOptions, measure};
use tdpmmu_benches::{engine, host, locks, paging, reclaim};

const COMMAND: Command = Command {
    name: "peers",
    usage: "\
usage: peers [--memory SIZE] [--reps N] [--json] [-o FILE]

  --memory SIZE  guest memory that is mapped in 4K pages; a power of two, 2M to 1T (default 16G)
  --reps N       repetitions; each row is the least of them, 1 to 1000 (default 5)
  --json         print tdpmmu.peers/1 instead of the table
  -o FILE        write there instead of to standard output",
    memory_bytes: 16 << 30,
    flags: &[],
};

fn main() -> ExitCode {
    cli::main(&COMMAND, run, table)
}

fn run(options: &Options) -> Result<Report<Row>, BenchError> {
    let pages = options.memory_bytes >> 12;
    let reps = options.reps;
    eprintln!("peers: limits");
    let before = measure(&LimitOptions::default())?;
    eprintln!("peers: page tables, {pages} pages");
    let mut samples = host::samples(&before);
    samples.extend(paging::samples::<paging::x86_64_crate::Tree>(pages, reps)?);
    samples.extend(paging::samples::<paging::multiarch::Tree>(pages, reps)?);
    eprintln!("peers: reclamation");
    samples.extend(reclaim::samples(reps)?);
    eprintln!("peers: locks");
    samples.extend(locks::samples(reps)?);
    eprintln!("peers: tdpmmu");
    samples.extend(engine::samples(pages, reps)?);
    eprintln!("peers: limits again");
    let limits = before.bracket(&measure(&LimitOptions::default())?);
    let rows = rows(&samples, &limits);
    Ok(Report::new("tdpmmu.peers/1", options, limits, rows))
}
