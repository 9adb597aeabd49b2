//! # Operations as data: programs for the searcher, the museum and torture
//!
//! **Guarantee.** A [`Program`] says everything about an experiment but the schedule: the VM, what was done before, what each thread does in which order. The same value runs on the simulated platform,
//! where a schedule decides every step ([`run_once`]), and on real threads ([`run_real`]). A program that makes no sense is refused before anything runs, with the thread, the act and the rule.
//!
//! **Mechanism.** A thread is a list of [`Act`]s. [`perform`] carries one out, generic over the platform. Errors that KVM would return (a slot that is gone, a full ring) are results, not failures: two threads may race
//! for the same slot. What must never happen is the judges' business.
//!
//! | file | idea |
//! | --- | --- |
//! | `act.rs` | what a thread can do |
//! | `machine.rs` | the VM and its memory |
//! | `guests.rs` | the guest's own page tables |
//! | `check.rs` | the rules of a program |
//! | `perform.rs` | one act on a VM of any platform |
//! | `expect.rs` | what an act of this one program must come to |
//! | `drive.rs` | set-up, threads, the quiet point, the end: on any platform |
//! | `once.rs` | one simulated run under one schedule |
//!
//! Machines are small: few slots, gfns that differ in few indices (0, 1, 512, 0x40000), one entry between two reschedule checks. Each scheduling point costs the search a factor.

mod act;
mod check;
mod drive;
mod expect;
mod guests;
mod machine;
mod once;
mod perform;

use serde::{Deserialize, Serialize};

pub use act::Act;
pub use check::ProgramError;
pub use drive::{Ended, Performed, run_on, run_real};
pub use expect::{Expect, Want};
pub use guests::{Guests, Process, TABLES_AT, TABLES_SLOT};
pub use machine::{MachineSpec, ProcessSpec, SlotSpec};
pub use once::{Finding, JudgeSet, Line, Outcome, Told, run_once, run_with};
pub use perform::{Done, Flags, Hands, perform};

pub use crate::scenario::Who;

/// What is done by whom to which VM; the schedule is not part of it. See the module text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// What a KVM engineer would call it.
    pub name: String,
    /// The VM.
    #[serde(default)]
    pub machine: MachineSpec,
    /// What is done before the threads start, one after the other; never part of the search.
    #[serde(default)]
    pub setup: Vec<(Who, Act)>,
    /// What runs together.
    pub threads: Vec<ThreadSpec>,
    /// Indices in a table at which each access is a scheduling point even if the entry is empty, beside the simulation's own (0, 1, 2).
    #[serde(default)]
    pub hot: Vec<u16>,
    /// The end of the VM is part of the search too: workers still run when it begins.
    #[serde(default)]
    pub end_races: bool,
    /// What acts must come to, beside what judges ask of every program.
    #[serde(default)]
    pub expect: Vec<Expect>,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThreadSpec {
    /// Its name in stories.
    pub name: String,
    /// Who it is.
    pub who: Who,
    /// What it does, in order.
    pub acts: Vec<Act>,
}

impl ThreadSpec {
    /// The thread of a vCPU.
    pub fn vcpu(id: usize, acts: impl Into<Vec<Act>>) -> Self {
        Self { name: format!("vcpu-{id}"), who: Who::Vcpu(id), acts: acts.into() }
    }

    /// A thread of the VMM: ioctls.
    pub fn caller(acts: impl Into<Vec<Act>>) -> Self {
        Self { name: "caller".into(), who: Who::Caller, acts: acts.into() }
    }

    /// Another thread of the VMM, or of the host.
    pub fn other(n: usize, name: &str, acts: impl Into<Vec<Act>>) -> Self {
        Self { name: name.into(), who: Who::Other(n), acts: acts.into() }
    }
}

impl Program {
    /// A program of the default machine.
    pub fn new(name: &str, threads: Vec<ThreadSpec>) -> Self {
        let machine = MachineSpec::default();
        Self {
            name: name.into(),
            machine,
            setup: Vec::new(),
            threads,
            hot: Vec::new(),
            end_races: false,
            expect: Vec::new(),
        }
    }

    /// From JSON, checked.
    ///
    /// # Errors
    /// [`ProgramError::Json`], and the rules of [`Program::check`].
    pub fn parse(json: &str) -> Result<Self, ProgramError> {
        let program: Self =
            serde_json::from_str(json).map_err(|error| ProgramError::Json(error.to_string()))?;
        program.check()?;
        Ok(program)
    }

    /// Acts of all threads, with the set-up.
    pub fn acts(&self) -> impl Iterator<Item = &Act> {
        self.setup.iter().map(|(_, act)| act).chain(self.threads.iter().flat_map(|thread| &thread.acts))
    }
}
