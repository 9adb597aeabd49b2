//! What a run tells.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{schedule::Schedule, strategy::DfsState};
use crate::site::Site;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Every task has ended.
    Finished,
    /// A rule was broken ([`Run::violations`]) and the rest was not run.
    Stopped,
    /// Nobody could go on: who waited for what.
    Deadlock(String),
    /// [`super::SimConfig::max_steps`] were not enough: a livelock, or a bound too small.
    StepLimit,
    /// A task panicked: the message and where.
    Panicked(String),
}

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimViolation {
    /// The rule's name.
    pub rule: &'static str,
    /// What was found.
    pub what: String,
    /// Who found it: index into [`Run::tasks`].
    pub task: Option<u32>,
    /// At which step.
    pub at: u64,
}

/// A word, by the region that holds it. (Words outside of all regions have no name: their addresses differ from run to run.)
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CellName {
    /// The region's own name for the word.
    pub region: String,
    /// The word's index in its 4 KiB page.
    pub index: usize,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Kind {
    Load,
    Store,
    Swap,
    Cmpxchg {
        ok: bool,
    },
    Rmw,
    Fence,
    Point,
    /// A buffered store reached memory.
    Drain,
    Lock,
    Unlock,
    Block,
    Wake,
    /// A fault struck.
    Fault,
    /// The schedule takes the CPU from a task that could go on.
    Switch,
    Note,
}

impl Kind {
    /// As written in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Load => "load",
            Kind::Store => "store",
            Kind::Swap => "swap",
            Kind::Cmpxchg { ok: true } => "cmpxchg",
            Kind::Cmpxchg { ok: false } => "cmpxchg-lost",
            Kind::Rmw => "rmw",
            Kind::Fence => "fence",
            Kind::Point => "point",
            Kind::Drain => "drain",
            Kind::Lock => "lock",
            Kind::Unlock => "unlock",
            Kind::Block => "block",
            Kind::Wake => "wake",
            Kind::Fault => "fault",
            Kind::Switch => "switch",
            Kind::Note => "note",
        }
    }
}

/// One step of a recorded run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The run's step counter.
    pub at: u64,
    /// Who: index into [`Run::tasks`].
    pub task: u32,
    /// Where.
    pub site: Site,
    /// What.
    pub kind: Kind,
    /// Which word, if it has a name.
    pub cell: Option<CellName>,
    /// What the word held.
    pub old: u64,
    /// What it holds now.
    pub new: u64,
    /// Words for people.
    pub text: String,
}

/// What happened at one site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteCount {
    /// Points passed.
    pub passed: u64,
    /// Points at which the schedule took the CPU from a task that could have gone on.
    pub forced: u64,
}

/// What happened at each site.
#[derive(Clone, PartialEq, Eq)]
pub struct SiteCounts(Vec<SiteCount>);

impl Default for SiteCounts {
    fn default() -> Self {
        SiteCounts(vec![SiteCount::default(); Site::ALL.len()])
    }
}

impl SiteCounts {
    /// The counts of a site.
    pub fn of(&self, site: Site) -> SiteCount {
        self.0[site as usize]
    }

    /// Every site with its counts.
    pub fn iter(&self) -> impl Iterator<Item = (Site, SiteCount)> + '_ {
        Site::ALL.iter().map(|site| (*site, self.of(*site)))
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &SiteCounts) {
        for (sum, more) in self.0.iter_mut().zip(&other.0) {
            sum.passed += more.passed;
            sum.forced += more.forced;
        }
    }

    /// Sites passed and never forced.
    pub fn never_forced(&self) -> Vec<Site> {
        self.iter()
            .filter(|(_, count)| count.passed != 0 && count.forced == 0)
            .map(|(site, _)| site)
            .collect()
    }

    #[inline(always)]
    pub(super) fn pass(&mut self, site: Site) {
        self.0[site as usize].passed += 1;
    }

    #[inline(always)]
    pub(super) fn force(&mut self, site: Site) {
        self.0[site as usize].forced += 1;
    }
}

impl fmt::Debug for SiteCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let met = self.iter().filter(|(_, count)| count.passed != 0);
        f.debug_map().entries(met.map(|(site, count)| (site, (count.passed, count.forced)))).finish()
    }
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Run {
    /// How it ended.
    pub end: End,
    /// What was chosen against the default at each point: [`super::Strategy::Replay`] of it is the same run.
    pub schedule: Schedule,
    /// Points passed.
    pub steps: u64,
    /// Points at which there was a choice: the k of [`super::pct_bound`].
    pub choices: u64,
    /// Most tasks alive at once: its n.
    pub width: u32,
    /// Of every step in order: equal runs have equal hashes.
    pub hash: u64,
    /// How often the schedule took the CPU from a task that could have gone on.
    pub preemptions: u32,
    /// What happened at each site.
    pub sites: SiteCounts,
    /// The rules that were broken.
    pub violations: Vec<SimViolation>,
    /// The steps, if they were to be recorded.
    pub log: Vec<Step>,
    /// The longest stretch of an RCU read section up to its end or a reschedule check, in accesses.
    pub longest_rcu: u64,
    /// The longest stretch between two reschedule checks with mmu_lock held, in accesses.
    pub longest_step: u64,
    /// The tasks' names; 0 is main.
    pub tasks: Vec<String>,
    /// Where a depth-first search goes on.
    pub dfs: Option<DfsState>,
    /// Tasks that could not be unwound and were leaked: 0 unless a destructor waits for what never comes.
    pub leaked_tasks: u32,
}

impl Run {
    /// It did not end well.
    pub fn failed(&self) -> bool {
        self.end != End::Finished || !self.violations.is_empty()
    }
}
