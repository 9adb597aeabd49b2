//! Who decides at the points.
//!
//! A chooser is asked whenever there is a choice, and for nothing else. It sees numbers of tasks and sites, never an address, a clock or a hash map, so that
//! the same seed makes the same run.

mod dfs;
mod pct;
mod random;
mod replay;
mod targeted;

use random::Rng;

pub use self::{
    dfs::DfsState,
    pct::{pct_bound, pct_runs},
};
use self::{pct::Pct, random::Random, replay::Replay, targeted::Targeted};
use super::{
    config::{Memory, Strategy},
    schedule::Choice,
};
use crate::site::Site;

/// A place where somebody must be chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment<'a> {
    /// The task that is at a point or cannot go on.
    pub task: u32,
    /// It can go on.
    pub able: bool,
    /// Its own count of points.
    pub at: u32,
    /// Where it is.
    pub site: Site,
    /// Who can go on, ascending; with `task` if it is able.
    pub ready: &'a [u32],
    /// Whose buffers hold stores, ascending.
    pub buffers: &'a [u32],
}

impl Moment<'_> {
    /// What happens without a schedule: the task goes on; if it cannot, the next by number, round robin.
    pub fn default_task(&self) -> u32 {
        if self.able {
            return self.task;
        }
        let after = self.ready.partition_point(|task| *task <= self.task);
        self.ready[if after < self.ready.len() { after } else { 0 }]
    }

    fn choices(&self) -> usize {
        self.ready.len() + self.buffers.len()
    }

    /// The choices in a fixed order, the default first.
    fn nth(&self, n: usize) -> Choice {
        if n >= self.ready.len() {
            return Choice::Drain(self.buffers[n - self.ready.len()]);
        }
        let first = self.default_task();
        if n == 0 {
            return Choice::Run(first);
        }
        let place = self.ready.partition_point(|task| *task < first);
        Choice::Run(self.ready[if n <= place { n - 1 } else { n }])
    }
}

/// A strategy at work.
#[derive(Debug)]
pub(super) enum Chooser {
    Random(Random),
    Pct(Pct),
    Dfs(DfsState),
    Replay(Replay),
    Targeted(Targeted),
}

impl Chooser {
    pub fn new(strategy: Strategy, memory: Memory) -> Self {
        match strategy {
            Strategy::Random { seed } => Chooser::Random(Random::new(seed)),
            Strategy::Pct { seed, depth, steps } => Chooser::Pct(Pct::new(seed, depth, steps, memory)),
            Strategy::Dfs(mut state) => {
                state.begin();
                Chooser::Dfs(state)
            }
            Strategy::Replay(schedule) => Chooser::Replay(Replay::new(&schedule)),
            Strategy::Targeted { first, then, seed } => Chooser::Targeted(Targeted::new(first, then, seed)),
        }
    }

    /// Chooses among `ready` and `buffers`; there are at least two choices.
    #[inline]
    pub fn pick(&mut self, at: &Moment<'_>) -> Choice {
        match self {
            Chooser::Random(random) => random.pick(at),
            Chooser::Pct(pct) => pct.pick(at),
            Chooser::Dfs(dfs) => dfs.pick(at),
            Chooser::Replay(replay) => replay.pick(at),
            Chooser::Targeted(targeted) => targeted.pick(at),
        }
    }

    /// Whether the store that `task` is about to make stays in its buffer.
    pub fn holds(&mut self, task: u32, at: u32) -> bool {
        match self {
            Chooser::Random(random) => random.holds(),
            Chooser::Pct(pct) => pct.holds(task),
            Chooser::Dfs(dfs) => dfs.flip(),
            Chooser::Replay(replay) => replay.holds(task, at),
            Chooser::Targeted(targeted) => targeted.random.holds(),
        }
    }

    /// Whether the check that `task` is at yields.
    pub fn yields(&mut self, task: u32, at: u32, percent: u8) -> bool {
        match self {
            Chooser::Dfs(dfs) => percent != 0 && dfs.flip(),
            Chooser::Replay(replay) => replay.yields(task, at),
            _ => percent != 0 && self.dice().is_some_and(|dice| dice.below(100) < u32::from(percent)),
        }
    }

    /// The answer to a question for a fault, if the schedule has them all.
    pub fn fault(&mut self, task: u32, at: u32) -> Option<u32> {
        match self {
            Chooser::Replay(replay) => Some(replay.fault(task, at)),
            _ => None,
        }
    }

    /// The generator of whoever draws.
    fn dice(&mut self) -> Option<&mut Rng> {
        match self {
            Chooser::Random(random) => Some(&mut random.rng),
            Chooser::Pct(pct) => Some(&mut pct.rng),
            Chooser::Targeted(targeted) => Some(&mut targeted.random.rng),
            Chooser::Dfs(_) | Chooser::Replay(_) => None,
        }
    }

    /// Draws from `0..below`; 0 where nothing is drawn.
    pub fn draw(&mut self, below: u32) -> u32 {
        self.dice().map_or(0, |dice| dice.below(below))
    }

    /// `task` says that it is not making progress.
    pub fn relaxed(&mut self, task: u32) {
        if let Chooser::Pct(pct) = self {
            pct.relaxed(task);
        }
    }

    /// The seed, if there is one.
    pub fn seed(&self) -> Option<u64> {
        match self {
            Chooser::Random(random) => Some(random.seed),
            Chooser::Pct(pct) => Some(pct.seed),
            Chooser::Targeted(targeted) => Some(targeted.random.seed),
            Chooser::Replay(replay) => replay.seed,
            Chooser::Dfs(_) => None,
        }
    }

    /// The search after this run.
    pub fn into_dfs(self) -> Option<DfsState> {
        match self {
            Chooser::Dfs(mut state) => {
                state.end();
                Some(state)
            }
            _ => None,
        }
    }
}
