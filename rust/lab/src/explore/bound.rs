//! What the number of schedules buys.
//!
//! Probabilistic concurrency testing (Burckhardt and others, ASPLOS 2010): with n threads and k points at which there is a choice, one schedule of depth d hits a given bug of that depth, one that needs
//! d ordering constraints, with probability at least 1 / (n k^(d-1)). That is a lower bound for the worst bug; most are met much earlier.

use serde::Serialize;
use tdpmmu_platform::sim::{pct_bound, pct_runs};

/// The bound for one depth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Depth {
    /// Ordering constraints that the bug needs.
    pub depth: u32,
    /// Schedules that were run for this depth.
    pub schedules: u64,
    /// Least chance of one such schedule.
    pub probability: f64,
    /// Least chance that all of them together hit it.
    pub found_with: f64,
    /// Schedules after which that chance is 99.9 %.
    pub needed: u64,
}

/// What was bought.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bound {
    /// Threads, with workers and RCU.
    pub threads: u32,
    /// Points at which there was a choice, at most.
    pub points: u64,
    /// The depth that `probability` and `found_with` are about: the largest that was run.
    pub depth: u32,
    /// Least chance of one schedule.
    pub probability: f64,
    /// Least chance of all.
    pub found_with: f64,
    /// Depth by depth.
    pub depths: Vec<Depth>,
    /// Schedules of the depth-first search, and the preemptions up to which it was complete; `None`: not even without any.
    pub systematic: u64,
    /// See `systematic`.
    pub complete_to: Option<u32>,
    /// In words.
    pub text: String,
}

impl Bound {
    /// For `threads` threads and `points` points; `run` says how many schedules were run for which depth.
    pub fn new(threads: u32, points: u64, run: &[(u32, u64)], systematic: (u64, Option<u32>)) -> Self {
        let depths: Vec<Depth> = run
            .iter()
            .map(|&(depth, schedules)| {
                let probability = pct_bound(threads, points, depth);
                // 1 - (1 - p)^n, without losing a small p.
                let found_with = -((schedules as f64) * (-probability).ln_1p()).exp_m1();
                let needed = pct_runs(threads, points, depth, 0.999);
                Depth { depth, schedules, probability, found_with, needed }
            })
            .collect();
        let mut text = format!("{threads} threads, {points} points");
        for d in &depths {
            text += &format!(
                "; a bug of depth {}: >= {:.2e} a schedule, {} schedules give >= {:.1} % ({} for 99.9 %)",
                d.depth,
                d.probability,
                d.schedules,
                100.0 * d.found_with,
                d.needed
            );
        }
        let (systematic, complete_to) = systematic;
        if systematic != 0 {
            text += &match complete_to {
                Some(bound) => {
                    format!("; depth-first: {systematic} schedules, all with up to {bound} preemptions")
                }
                None => format!("; depth-first: {systematic} schedules"),
            };
        }
        let last = depths.last();
        Self {
            threads,
            points,
            depth: last.map_or(0, |d| d.depth),
            probability: last.map_or(0.0, |d| d.probability),
            found_with: last.map_or(0.0, |d| d.found_with),
            depths,
            systematic,
            complete_to,
            text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_schedules_buy_more_and_depth_costs_a_factor_of_the_points() {
        let few = Bound::new(3, 200, &[(1, 100), (2, 100)], (0, None));
        let many = Bound::new(3, 200, &[(1, 100), (2, 4_142)], (0, None));
        assert_eq!(few.depths[1].probability, 1.0 / 600.0);
        assert!(few.found_with < 0.16 && many.found_with > 0.99899, "{few:?} {many:?}");
        assert!((few.depths[0].probability / few.depths[1].probability - 200.0).abs() < 1e-9);
        assert!(many.text.contains("4142 for 99.9 %"), "{}", many.text);
    }
}
