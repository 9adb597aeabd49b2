//! `peers`: the table of ratios, as text or as JSON `tdpmmu.peers/1`.

use std::io::Write as _;
use std::process::ExitCode;

use tdpmmu_benches::harness::{BenchError, Row, rows, table};
use tdpmmu_benches::limits::{LimitOptions, Limits, measure};
use tdpmmu_benches::{engine, host, locks, paging, reclaim};

const USAGE: &str = "\
usage: peers [--memory SIZE] [--reps N] [--json] [-o FILE]

  --memory SIZE  guest memory that is mapped in 4K pages; a power of two, 2M to 1T (default 16G)
  --reps N       repetitions; each row is the least of them, 1 to 1000 (default 5)
  --json         print tdpmmu.peers/1 instead of the table
  -o FILE        write there instead of to standard output";

#[derive(Debug, Clone, PartialEq)]
struct Options {
    memory_bytes: u64,
    reps: u32,
    json: bool,
    output: Option<String>,
}

#[derive(serde::Serialize)]
struct Report {
    schema: &'static str,
    host: Host,
    config: Config,
    limits: Limits,
    rows: Vec<Row>,
}

#[derive(serde::Serialize)]
struct Host {
    cpu: Option<String>,
    cpus: usize,
    kernel: Option<String>,
}

#[derive(serde::Serialize)]
struct Config {
    memory_bytes: u64,
    pages: u64,
    reps: u32,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let options = match parse(&args) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("peers: {why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let report = match run(&options) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("peers: {error}");
            return ExitCode::from(match error {
                BenchError::WorkNotDone { .. } | BenchError::Engine { .. } => 1,
                BenchError::NoMemory { .. } | BenchError::Spawn { .. } | BenchError::Limits(_) => 4,
            });
        }
    };
    match write(&options, &report) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {}: {error}", options.output.as_deref().unwrap_or("standard output"));
            ExitCode::from(4)
        }
    }
}

fn run(options: &Options) -> Result<Report, BenchError> {
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
    let line = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        let value = text.lines().find_map(|line| line.strip_prefix(key))?;
        Some(value.trim_start_matches([' ', '\t', ':']).trim().to_owned())
    };
    let host = Host {
        cpu: line("/proc/cpuinfo", "model name"),
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
        kernel: line("/proc/sys/kernel/osrelease", ""),
    };
    let config = Config { memory_bytes: options.memory_bytes, pages, reps };
    let rows = rows(&samples, &limits);
    Ok(Report { schema: "tdpmmu.peers/1", host, config, limits, rows })
}

fn write(options: &Options, report: &Report) -> std::io::Result<()> {
    let text = if options.json {
        serde_json::to_string_pretty(report)? + "\n"
    } else {
        let stable = match report.limits.stable {
            Some(true) => "",
            _ => {
                "unstable: the limits before and after differ by more than 10 %; repeat on a quiet machine\n"
            }
        };
        table(&report.rows, &report.limits) + stable
    };
    match &options.output {
        Some(path) => std::fs::write(path, text),
        None => std::io::stdout().write_all(text.as_bytes()),
    }
}

fn parse(args: &[String]) -> Result<Options, String> {
    let mut options = Options { memory_bytes: 16 << 30, reps: 5, json: false, output: None };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--json" => options.json = true,
            "-o" => options.output = Some(value()?.clone()),
            "--memory" => {
                let text = value()?;
                options.memory_bytes = size(text)
                    .filter(|bytes| bytes.is_power_of_two() && (2 << 20..=1 << 40).contains(bytes))
                    .ok_or_else(|| format!("--memory {text}: not a power of two from 2M to 1T"))?;
            }
            "--reps" => {
                let text = value()?;
                options.reps = text
                    .parse()
                    .ok()
                    .filter(|reps| (1..=1000).contains(reps))
                    .ok_or_else(|| format!("--reps {text}: not a number from 1 to 1000"))?;
            }
            _ => return Err(format!("unknown argument {arg}")),
        }
    }
    Ok(options)
}

fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn sizes_have_binary_suffixes() {
        let read = |text| parsed(&format!("--memory {text}")).map(|options| options.memory_bytes);
        assert_eq!(read("2M"), Ok(2 << 20));
        assert_eq!(read("64G"), Ok(64 << 30));
        assert_eq!(read("4194304"), Ok(4 << 20));
        for bad in ["3G", "1M", "2T", "G", "4GG", "-2G", "99999999999999T"] {
            assert!(read(bad).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        assert_eq!(parsed("--reps 0").unwrap_err(), "--reps 0: not a number from 1 to 1000");
        assert_eq!(parsed("-o").unwrap_err(), "-o needs a value");
        assert_eq!(parsed("--fast").unwrap_err(), "unknown argument --fast");
        assert_eq!(parsed("--json --reps 7 -o f").map(|o| (o.json, o.reps)), Ok((true, 7)));
    }
}
