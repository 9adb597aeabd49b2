//! A pair of sites in a given order.
//!
//! Whoever arrives at `then` is held there until another task has passed `first`; then it goes on at once, before anybody else makes a step. When nobody else can
//! go on, or nobody has passed `first` for long, the hold is lifted: the pair cannot be had in that order here. All else is random.

use super::{Moment, random::Random};
use crate::{sim::schedule::Choice, site::Site};

/// Choices after which a hold is lifted for good: who holds a lock must not be held back for ever, or the others retry for ever.
const PATIENCE: u32 = 400;

#[derive(Debug)]
pub(in crate::sim) struct Targeted {
    pub random: Random,
    first: Site,
    then: Site,
    /// Tasks held at `then`.
    held: Vec<u32>,
    /// The task that is passing `first`: what it does there is done at its next point.
    passing: Option<u32>,
    /// Choices made while somebody was held.
    waited: u32,
}

impl Targeted {
    pub fn new(first: Site, then: Site, seed: u64) -> Self {
        Targeted { random: Random::new(seed), first, then, held: Vec::new(), passing: None, waited: 0 }
    }

    pub(in crate::sim) fn pick(&mut self, at: &Moment<'_>) -> Choice {
        if self.passing == Some(at.task) {
            self.passing = None;
            if let Some(next) = self.held.iter().position(|task| at.ready.contains(task) && *task != at.task)
            {
                return Choice::Run(self.held.remove(next));
            }
        }
        if !self.held.is_empty() {
            self.waited += 1;
        }
        if self.waited > PATIENCE {
            self.held.clear();
            return self.random.pick(at);
        }
        if at.able && at.site == self.then && self.passing.is_none() && !self.held.contains(&at.task) {
            self.held.push(at.task);
        }
        let chosen = self.random.pick(at);
        let Choice::Run(mut task) = chosen else { return chosen };
        if self.held.contains(&task) {
            // Somebody who is not held, if there is one.
            let free = at.ready.iter().filter(|task| !self.held.contains(task)).count() as u32;
            if free == 0 {
                self.held.retain(|held| *held != task);
            } else {
                let which = self.random.rng.below(free) as usize;
                task = at
                    .ready
                    .iter()
                    .copied()
                    .filter(|task| !self.held.contains(task))
                    .nth(which)
                    .unwrap_or(task);
            }
        }
        if task == at.task && at.site == self.first {
            self.passing = Some(task);
        }
        Choice::Run(task)
    }
}
