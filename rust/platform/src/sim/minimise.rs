//! Making a failing schedule small.
//!
//! Delta debugging over the turns of a schedule: halves, quarters, ... single turns are taken out as long as the rest still fails. What comes out is 1-minimal: no
//! single preemption, held store, yield or fault can be left out any more.

use super::schedule::{Schedule, Turn};

/// The smallest part of `schedule` found that still fails. `still_fails` runs a candidate; a schedule that does not fail itself comes back unchanged.
pub fn minimise(schedule: &Schedule, still_fails: &mut dyn FnMut(&Schedule) -> bool) -> Schedule {
    let with = |turns: Vec<Turn>| Schedule { seed: schedule.seed, memory: schedule.memory, turns };
    if !still_fails(schedule) {
        return schedule.clone();
    }
    let mut turns = schedule.turns.clone();
    let mut piece = turns.len().div_ceil(2);
    while piece != 0 && !turns.is_empty() {
        let mut smaller = false;
        // From the end: what comes after the failure's last turn goes first.
        let mut end = turns.len();
        while end != 0 {
            let begin = end.saturating_sub(piece);
            let mut rest = turns.clone();
            rest.drain(begin..end);
            if still_fails(&with(rest.clone())) {
                turns = rest;
                smaller = true;
            }
            end = begin;
        }
        if piece > 1 {
            piece = piece.div_ceil(2);
        } else if !smaller {
            break;
        }
    }
    with(turns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Choice;

    #[test]
    fn what_matters_stays_and_nothing_else() {
        let turns = (0..100).map(|at| Turn { task: 0, at, choice: Choice::Yield }).collect();
        let schedule = Schedule { turns, ..Schedule::default() };
        let mut tried = 0;
        let small = minimise(&schedule, &mut |candidate| {
            tried += 1;
            [3, 50, 51, 99].iter().all(|at| candidate.turns.iter().any(|turn| turn.at == *at))
        });
        assert_eq!(small.turns.iter().map(|turn| turn.at).collect::<Vec<_>>(), [3, 50, 51, 99]);
        assert!(tried < 100, "{tried}");
        let sound = minimise(&schedule, &mut |_| false);
        assert_eq!(sound, schedule);
    }
}
