//! Every schedule in turn.
//!
//! **Guarantee.** When [`DfsState::is_done`], every schedule with at most the bound's deviations has been run once: deviations are preemptions, stores held back and
//! yields. If no schedule was cut off by the bound ([`DfsState::is_exhausted`]), that was every schedule there is.
//!
//! **Mechanism.** The choices of a run are a path in a tree. The next run repeats the path up to the last choice that has an untried alternative, takes that, and
//! the defaults from there on. The bound grows by one when its tree is done (iterative context bounding, Musuvathi and Qadeer, PLDI 2007), so that
//! a failure is met with the fewest deviations; smaller trees are walked again with each larger bound.

use super::Moment;
use crate::sim::schedule::Choice;

/// One choice on the path.
#[derive(Clone, Copy, Debug)]
struct Fork {
    chosen: u16,
    choices: u16,
    /// Choices beyond the first cost a deviation.
    costs: bool,
}

/// Where a depth-first search stands.
#[derive(Clone, Debug)]
pub struct DfsState {
    path: Vec<Fork>,
    /// How far the current run has come on `path`.
    depth: usize,
    /// Deviations spent on the way.
    spent: u32,
    bound: u32,
    max_bound: u32,
    /// The bound of this tree left something out.
    cut: bool,
    done: bool,
    runs: u64,
}

impl DfsState {
    /// The beginning of a search with at most `max_bound` deviations, those with the fewest first.
    pub fn new(max_bound: u32) -> Self {
        DfsState {
            path: Vec::new(),
            depth: 0,
            spent: 0,
            bound: 0,
            max_bound,
            cut: false,
            done: false,
            runs: 0,
        }
    }

    /// Nothing is left to run within the bound.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Done, and a larger bound would have nothing to add.
    pub fn is_exhausted(&self) -> bool {
        self.done && !self.cut
    }

    /// Deviations allowed now.
    pub fn bound(&self) -> u32 {
        self.bound
    }

    /// Runs so far.
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// The next run's state; `None` when done.
    #[allow(clippy::should_implement_trait)]
    pub fn next(self) -> Option<Self> {
        (!self.done).then_some(self)
    }

    pub(crate) fn begin(&mut self) {
        self.depth = 0;
        self.spent = 0;
    }

    /// The run is over: on to the next path.
    pub(crate) fn end(&mut self) {
        self.runs += 1;
        // A run may end before its path does only if it is not deterministic.
        self.path.truncate(self.depth);
        while let Some(last) = self.path.last_mut() {
            if last.chosen + 1 < last.choices {
                last.chosen += 1;
                return;
            }
            self.path.pop();
        }
        if self.cut && self.bound < self.max_bound {
            self.bound += 1;
            self.cut = false;
        } else {
            self.done = true;
        }
    }

    fn fork(&mut self, choices: usize, costs: bool) -> usize {
        if self.depth == self.path.len() {
            let mut choices = choices.min(u16::MAX as usize) as u16;
            if costs && self.spent >= self.bound {
                self.cut |= choices > 1;
                choices = 1;
            }
            self.path.push(Fork { chosen: 0, choices, costs });
        }
        let fork = self.path[self.depth];
        self.depth += 1;
        if fork.costs && fork.chosen != 0 {
            self.spent += 1;
        }
        usize::from(fork.chosen)
    }

    pub(in crate::sim) fn pick(&mut self, at: &Moment<'_>) -> Choice {
        // A held store costs when it is held; that it must go some time costs nothing.
        if !at.buffers.is_empty() {
            let which = self.fork(1 + at.buffers.len(), false);
            if which != 0 {
                return Choice::Drain(at.buffers[which - 1]);
            }
        }
        if at.ready.len() < 2 {
            return at.nth(0);
        }
        let which = self.fork(at.ready.len(), at.able);
        at.nth(which.min(at.choices() - 1))
    }

    pub(crate) fn flip(&mut self) -> bool {
        self.fork(2, true) != 0
    }
}
