//! What a run is given.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{schedule::Schedule, strategy::DfsState};
use crate::{bug::Bug, fault::Faults, site::Site};

/// How memory behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// Sequentially consistent: a store is seen at once.
    #[default]
    Sc,
    /// x86: each task has a buffer of stores, first in, first out, that only it can see.
    Tso,
}

/// Who decides at the points.
#[derive(Clone, Debug)]
pub enum Strategy {
    /// Each point switches with a chance that is drawn once a run.
    Random {
        /// Of the generator.
        seed: u64,
    },
    /// Probabilistic concurrency testing: random priorities, `depth - 1` places where the running task falls behind all others.
    Pct {
        /// Of the generator.
        seed: u64,
        /// Depth of the bugs that are looked for: how many orderings a schedule must get right.
        depth: u32,
        /// Points with a choice that a run is expected to have ([`super::Run::choices`] of an earlier one).
        steps: u64,
    },
    /// Every schedule in turn, those of few preemptions first.
    Dfs(DfsState),
    /// What a schedule says.
    Replay(Schedule),
    /// Whoever comes to `then` waits until another task has passed `first`; else as [`Strategy::Random`].
    Targeted {
        /// To happen first.
        first: Site,
        /// To happen right after it, in another task.
        then: Site,
        /// Of the generator.
        seed: u64,
    },
}

/// Bounds whose crossing is a violation. Units are accesses to shared words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// In an RCU read section, up to its end or to a reschedule check, where it could have been left.
    pub rcu_units: u64,
    /// Between two reschedule checks with mmu_lock held.
    pub step_units: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { rcu_units: u64::MAX, step_units: u64::MAX }
    }
}

/// What a run is given.
#[derive(Clone)]
pub struct SimConfig {
    /// Who decides.
    pub strategy: Strategy,
    /// How memory behaves; a replay takes it from its schedule.
    pub memory: Memory,
    /// Points after which a run is given up.
    pub max_steps: u64,
    /// Entries of a table page whose accesses are points even while they are zero.
    pub hot: Vec<u16>,
    /// The defect that is switched on.
    pub bug: Option<Bug>,
    /// The faults that strike; a replay takes them from its schedule.
    pub faults: Option<Arc<dyn Faults>>,
    /// Of a hundred reschedule checks so many yield by the schedule's own choice.
    pub yield_percent: u8,
    /// The run ends at the first point after a violation.
    pub stop_at_violation: bool,
    /// Keep a log of all steps.
    pub record: bool,
    /// Bounds whose crossing is a violation.
    pub limits: Limits,
}

impl Default for SimConfig {
    fn default() -> Self {
        SimConfig {
            strategy: Strategy::Random { seed: 0 },
            memory: Memory::Sc,
            max_steps: 200_000,
            hot: vec![0, 1, 2],
            bug: None,
            faults: None,
            yield_percent: 0,
            stop_at_violation: true,
            record: false,
            limits: Limits::default(),
        }
    }
}

impl fmt::Debug for SimConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimConfig")
            .field("strategy", &self.strategy)
            .field("memory", &self.memory)
            .field("max_steps", &self.max_steps)
            .field("bug", &self.bug)
            .field("faults", &self.faults.is_some())
            .field("yield_percent", &self.yield_percent)
            .finish_non_exhaustive()
    }
}
