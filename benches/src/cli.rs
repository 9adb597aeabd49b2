//! What the programs of this crate share: arguments, where the answer goes, and exit codes.
//!
//! stdout is data, stderr is talk. 0: ok; 1: an implementation did not do its work, or a check that was asked for failed;
//! 2: usage; 4: no memory, threads or room for the answer.

use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;
use tdpmmu_lab::host::HostInfo;

use crate::harness::BenchError;
use crate::limits::Limits;

/// A program.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// The text of `--help`.
    pub usage: &'static str,
    /// Guest memory where none is asked for, in bytes.
    pub memory_bytes: u64,
    /// Arguments without a value, beside `--json`.
    pub flags: &'static [&'static str],
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Guest memory in bytes: a power of two.
    pub memory_bytes: u64,
    /// Repetitions.
    pub reps: u32,
    /// JSON instead of a table.
    pub json: bool,
    /// A file instead of standard output.
    pub output: Option<String>,
    /// Which of [`Command::flags`] were given.
    pub flags: Vec<&'static str>,
}

impl Options {
    /// Was `flag` given?
    pub fn has(&self, flag: &str) -> bool {
        self.flags.contains(&flag)
    }
}

/// The answer as JSON: the same frame for all programs.
#[derive(Debug, Serialize)]
pub struct Report<R: Serialize> {
    pub schema: &'static str,
    pub host: HostInfo,
    pub config: Config,
    pub limits: Limits,
    pub rows: Vec<R>,
    /// A check that was asked for failed: exit code 1.
    #[serde(skip)]
    pub failed: Option<String>,
}

/// What the rows were taken with.
#[derive(Debug, Serialize)]
pub struct Config {
    pub memory_bytes: u64,
    pub pages: u64,
    pub reps: u32,
}

impl<R: Serialize> Report<R> {
    /// A report without failures on this host.
    pub fn new(schema: &'static str, options: &Options, limits: Limits, rows: Vec<R>) -> Self {
        let Options { memory_bytes, reps, .. } = *options;
        let config = Config { memory_bytes, pages: memory_bytes >> 12, reps };
        Self { schema, host: HostInfo::collect(), config, limits, rows, failed: None }
    }

    /// The remark that follows a table whose limits cannot be trusted; empty if they can.
    fn warning(&self) -> &'static str {
        match self.limits.stable {
            Some(true) => "",
            _ => {
                "unstable: the limits before and after differ by more than 10 %; repeat on a quiet machine\n"
            }
        }
    }
}

/// Runs a program: `body` measures, `table` draws what it found.
pub fn main<R: Serialize>(
    command: &Command,
    body: impl Fn(&Options) -> Result<Report<R>, BenchError>,
    table: impl Fn(&[R], &Limits) -> String,
) -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let name = command.name;
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("{}", command.usage);
        return ExitCode::SUCCESS;
    }
    let options = match parse(command, &args) {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{name}: {why}\n{}", command.usage);
            return ExitCode::from(2);
        }
    };
    let report = match body(&options) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{name}: {error}");
            return ExitCode::from(error.exit_code());
        }
    };
    if let Err(error) = write(&options, &report, table) {
        eprintln!("{name}: {}: {error}", options.output.as_deref().unwrap_or("standard output"));
        return ExitCode::from(4);
    }
    match &report.failed {
        None => ExitCode::SUCCESS,
        Some(why) => {
            eprintln!("{name}: {why}");
            ExitCode::from(1)
        }
    }
}

fn write<R: Serialize>(
    options: &Options,
    report: &Report<R>,
    table: impl Fn(&[R], &Limits) -> String,
) -> std::io::Result<()> {
    let text = if options.json {
        serde_json::to_string_pretty(report)? + "\n"
    } else {
        table(&report.rows, &report.limits) + report.warning()
    };
    match &options.output {
        Some(path) => std::fs::write(path, text),
        None => std::io::stdout().write_all(text.as_bytes()),
    }
}

fn parse(command: &Command, args: &[String]) -> Result<Options, String> {
    let mut options =
        Options { memory_bytes: command.memory_bytes, reps: 5, json: false, output: None, flags: Vec::new() };
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
            _ => match command.flags.iter().find(|flag| *flag == arg) {
                Some(flag) => options.flags.push(flag),
                None => return Err(format!("unknown argument {arg}")),
            },
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

    const COMMAND: Command = Command { name: "x", usage: "", memory_bytes: 4096, flags: &["--check"] };

    fn parsed(line: &str) -> Result<Options, String> {
        parse(&COMMAND, &line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
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

    #[test]
    fn a_flag_is_known_to_the_program_that_has_it() {
        assert!(parsed("--check").unwrap().has("--check"));
        assert!(!parsed("").unwrap().has("--check"));
    }
}
