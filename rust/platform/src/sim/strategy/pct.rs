//! Probabilistic concurrency testing (Burckhardt, Kothari, Musuvathi, Nagarakatte, ASPLOS 2010).
//!
//! **Guarantee.** A bug of depth d (d orderings of steps suffice to make it show) in a program of n tasks and k points is found by one run with a
//! chance of at least 1/(n k^(d-1)).
//!
//! **Mechanism.** Tasks have random priorities; the highest that can go on runs. At d - 1 points, drawn in advance from 1..=k, the running task falls below all
//! others. Under TSO each store buffer is one more agent with a priority of its own: it empties itself when it is the highest, and n counts it.
//! A task that spins falls below all others too, or the one it waits for would never run.

use super::{Moment, random::Rng};
use crate::sim::{config::Memory, schedule::Choice};

/// The least chance of one run to find a bug of `depth` among `tasks` tasks in `points` points with a choice.
pub fn pct_bound(tasks: u32, points: u64, depth: u32) -> f64 {
    let changes = i32::try_from(depth.max(1) - 1).unwrap_or(i32::MAX);
    1.0 / (f64::from(tasks.max(1)) * (points.max(1) as f64).powi(changes))
}

/// Runs after which a bug of `depth` has been found with the chance `confidence` (0..1) or better.
pub fn pct_runs(tasks: u32, points: u64, depth: u32, confidence: f64) -> u64 {
    let bound = pct_bound(tasks, points, depth);
    if bound >= 1.0 {
        return 1;
    }
    ((1.0 - confidence).ln() / (-bound).ln_1p()).ceil() as u64
}

#[derive(Debug)]
pub(in crate::sim) struct Pct {
    pub seed: u64,
    pub rng: Rng,
    /// Of each task and of its buffer; higher runs first.
    priorities: Vec<[u64; 2]>,
    /// Points with a choice at which the running task falls behind, descending.
    changes: Vec<u64>,
    /// Points with a choice so far.
    passed: u64,
    /// The next task to fall behind all others gets this; counts down.
    lowest: u64,
    tso: bool,
}

impl Pct {
    pub fn new(seed: u64, depth: u32, steps: u64, memory: Memory) -> Self {
        let mut rng = Rng::new(seed);
        let range = u32::try_from(steps.max(1)).unwrap_or(u32::MAX);
        let mut changes: Vec<u64> = (1..depth).map(|_| 1 + u64::from(rng.below(range))).collect();
        changes.sort_unstable_by(|a, b| b.cmp(a));
        Pct {
            seed,
            rng,
            priorities: Vec::new(),
            changes,
            passed: 0,
            lowest: 1 << 62,
            tso: memory == Memory::Tso,
        }
    }

    fn priority(&mut self, task: u32) -> [u64; 2] {
        while self.priorities.len() <= task as usize {
            let above = |rng: &mut Rng| (1 << 63) | rng.next() >> 1;
            let pair = [above(&mut self.rng), if self.tso { above(&mut self.rng) } else { 0 }];
            self.priorities.push(pair);
        }
        self.priorities[task as usize]
    }

    fn falls_behind(&mut self, task: u32) {
        self.priority(task);
        self.lowest -= 1;
        self.priorities[task as usize][0] = self.lowest;
    }

    pub fn relaxed(&mut self, task: u32) {
        self.falls_behind(task);
    }

    pub fn holds(&mut self, task: u32) -> bool {
        let [task, buffer] = self.priority(task);
        buffer < task
    }

    pub(in crate::sim) fn pick(&mut self, at: &Moment<'_>) -> Choice {
        self.passed += 1;
        while self.changes.last().is_some_and(|change| *change <= self.passed) {
            self.changes.pop();
            self.falls_behind(at.task);
        }
        let mut best = (0, Choice::Run(at.default_task()));
        for &task in at.ready {
            let priority = self.priority(task)[0];
            if priority > best.0 {
                best = (priority, Choice::Run(task));
            }
        }
        for &task in at.buffers {
            let priority = self.priority(task)[1];
            if priority > best.0 {
                best = (priority, Choice::Drain(task));
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_that_of_the_paper() {
        assert_eq!(pct_bound(3, 200, 1), 1.0 / 3.0);
        assert_eq!(pct_bound(3, 200, 2), 1.0 / 600.0);
        assert_eq!(pct_bound(4, 1000, 3), 1.0 / 4_000_000.0);
        // Runs for 99.9 %, as computed by hand: ln(0.001) / ln(1 - 1/(n k^(d-1))).
        assert_eq!(pct_runs(3, 200, 2, 0.999), 4_142);
        assert_eq!(pct_runs(3, 200, 3, 0.999), 828_928);
        assert_eq!(pct_runs(4, 1000, 2, 0.999), 27_628);
        assert_eq!(pct_runs(1, 50, 1, 0.999), 1);
    }
}
