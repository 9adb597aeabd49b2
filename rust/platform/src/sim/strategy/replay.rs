//! What a schedule says, and the defaults where it says nothing.
//!
//! A turn that cannot be taken (its task has ended or is blocked) is passed over: schedules with turns taken out of them are how failures are minimised.

use std::collections::HashMap;

use super::Moment;
use crate::sim::schedule::{Choice, Schedule};

/// Looked up by place only, never iterated: the order of a hash map decides nothing.
#[derive(Debug)]
pub(in crate::sim) struct Replay {
    pub seed: Option<u64>,
    points: HashMap<(u32, u32), Choice>,
    holds: HashMap<(u32, u32), ()>,
    yields: HashMap<(u32, u32), ()>,
    faults: HashMap<(u32, u32), u32>,
}

impl Replay {
    pub fn new(schedule: &Schedule) -> Self {
        let mut replay = Replay {
            seed: schedule.seed,
            points: HashMap::new(),
            holds: HashMap::new(),
            yields: HashMap::new(),
            faults: HashMap::new(),
        };
        for turn in &schedule.turns {
            let place = (turn.task, turn.at);
            match turn.choice {
                Choice::Run(_) | Choice::Drain(_) => {
                    replay.points.insert(place, turn.choice);
                }
                Choice::Hold => {
                    replay.holds.insert(place, ());
                }
                Choice::Yield => {
                    replay.yields.insert(place, ());
                }
                Choice::Fault(answer) => {
                    replay.faults.insert(place, answer);
                }
            }
        }
        replay
    }

    pub(in crate::sim) fn pick(&mut self, at: &Moment<'_>) -> Choice {
        match self.points.get(&(at.task, at.at)) {
            Some(&Choice::Run(task)) if at.ready.binary_search(&task).is_ok() => Choice::Run(task),
            Some(&Choice::Drain(task)) if at.buffers.binary_search(&task).is_ok() => Choice::Drain(task),
            _ => Choice::Run(at.default_task()),
        }
    }

    pub fn holds(&self, task: u32, at: u32) -> bool {
        self.holds.contains_key(&(task, at))
    }

    pub fn yields(&self, task: u32, at: u32) -> bool {
        self.yields.contains_key(&(task, at))
    }

    pub fn fault(&self, task: u32, at: u32) -> u32 {
        self.faults.get(&(task, at)).copied().unwrap_or(0)
    }
}
