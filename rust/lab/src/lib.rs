//! # The laboratory: experiments on the engine
//!
//! **Guarantee.** What a result says was measured in this run, on real threads, with every entry present; what could not be measured is `null`. The physical limits of the host stand beside it, taken
//! before and after. A run that cannot be true (a long zap that never yielded beside running vCPUs, a leak, a violated rule) is an error.
//!
//! **Mechanism.** A [`Scenario`] is an experiment as data; [`run`] executes it; [`scene`] builds those of `bench zap|drop`, [`experiment`] turns outcomes into results.
//!
//! | file | idea |
//! | --- | --- |
//! | `bench.rs` | the entry: JSON in, JSON out; repetitions, checks |
//! | `config/` | the request; its rules, and what follows from it |
//! | `scenario.rs` | experiments as data |
//! | `scene/` | the scenes: which scenario a name stands for |
//! | `run/`, `outcome.rs` | the runner; what a run came to |
//! | `guest.rs` | guest threads: open-loop accesses |
//! | `experiment/`, `attribution.rs` | outcomes become results; where each thread's time went |
//! | `timeline.rs`, `export.rs` | what each thread did when; Perfetto traces and HdrHistogram logs |
//! | `micro/` | populate, fault, walk, rcu, dirty: one operation against its limit |
//! | `conform/` | the engine against recordings of real KVM, transition by transition |
//! | `what_if/` | the zaps of a recording through another design |
//! | `program/` | operations as data, for search, museum and torture |
//! | `explore/` | protocols, and the search for a schedule that breaks one |
//! | `explain/` | a failing run as a story |
//! | `museum/` | bugs that were really there, found again |
//! | `faults/` | what goes wrong on purpose |
//! | `torture/` | random operations on real threads, under every judge that can listen |
//! | `simulate/` | hosts that nobody has here, in virtual time |
//! | `versus/` | the TDP MMU against the shadow MMU, for the same guest |
//! | `proof.rs` | one door to explore, museum, torture, explain, simulate |
//! | `limits/` | the host's physical limits |
//! | `fit.rs` | a line through measurements, and its errors |
//! | `result.rs` | the schema |
//! | `memory.rs`, `host.rs`, `units.rs` | estimates and refusals; the machine; bytes for people |
//! | `control.rs`, `error.rs` | progress and cancellation; errors by exit code |

pub mod attribution;
pub mod bench;
pub mod config;
pub mod conform;
mod control;
mod error;
pub mod experiment;
pub mod explain;
pub mod explore;
pub mod export;
pub mod faults;
pub mod fit;
pub mod guest;
pub mod host;
pub mod limits;
pub mod memory;
mod micro;
pub mod museum;
pub mod outcome;
pub mod program;
pub mod proof;
pub mod result;
pub mod run;
pub mod scenario;
pub mod scene;
pub mod simulate;
pub mod timeline;
pub mod torture;
mod units;
pub mod versus;
pub mod what_if;

pub use control::Control;
pub use error::LabError;
pub use scenario::Scenario;
