//! `goals`: every figure beside its limit, and whether it meets its goal; as text or as JSON `tdpmmu.goals/1`.

use std::process::ExitCode;

use tdpmmu_benches::cli::{self, Command};
use tdpmmu_benches::goals::{self, memory::Counting};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const COMMAND: Command = Command {
    name: "goals",
    usage: "\
usage: goals [--memory SIZE] [--reps N] [--check] [--json] [-o FILE]

  --memory SIZE  guest memory that is zapped and populated; a power of two, 2M to 1T (default 64G)
  --reps N       repetitions; each figure is the least of them, 1 to 1000 (default 5)
  --check        exit code 1 if a goal is missed
  --json         print tdpmmu.goals/1 instead of the table
  -o FILE        write there instead of to standard output",
    memory_bytes: 64 << 30,
    flags: &["--check"],
};

fn main() -> ExitCode {
    cli::main(&COMMAND, goals::run, goals::table)
}
