//! Linearizability, gfn by gfn (reliability viii): could the answers have come from one page after the other?
//!
//! **Guarantee.** For each gfn the calls and their answers fit some order in which each call takes effect at one moment between its begin and its end, on a register that is absent or holds a
//! frame: a *fault* that succeeds finds or makes a mapping to the frame it answers; a *look-up* answers what is there; a *zap* makes it absent. A zap of a range is judged for each gfn by itself: as a
//! whole it is not atomic, in no kernel. So a mapping that is seen after a zap has returned comes from a fault that had not ended when the zap began, or began later.
//!
//! **Mechanism.** The search of Wing, Gong and Lowe: take any call that began before every other pending call ended, apply it, go on; remember the states that led nowhere. Histories per gfn are short; a
//! search that takes more than [`STEPS`] steps is given up and counted, not judged.
//!
//! **What it cannot see.** Which frame the host had: `notifier.rs` and the check against the host do. Calls that never end (their thread was stopped) may or may not have taken effect: both are tried.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

/// Steps of one search.
pub const STEPS: u32 = 10_000;

/// What was called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// An access that completes: the gfn is mapped at some moment of it.
    Fault(u64),
    /// A look-up without effect.
    LookUp(u64),
    /// A range becomes absent, each gfn at its own moment.
    Zap(Range<u64>),
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Answer {
    /// The gfn is mapped to this frame.
    Mapped(u64),
    /// It is not mapped.
    Absent,
    /// Done, nothing to tell; a fault that had to give up.
    Done,
}

/// One call of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The caller.
    pub task: u32,
    /// What was called.
    pub call: Call,
    /// When it began.
    pub began: u64,
    /// When it ended, and the answer; `None`: it never did.
    pub ended: Option<(u64, Answer)>,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "task {} {:?} [{}..", self.task, self.call, self.began)?;
        match self.ended {
            Some((at, answer)) => write!(f, "{at}] {answer:?}"),
            None => write!(f, "] never ended"),
        }
    }
}

/// A gfn whose answers fit no order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counterexample {
    /// The gfn.
    pub gfn: u64,
    /// Its history, in order of begin.
    pub history: Vec<Operation>,
}

/// Calls and answers as they come.
#[derive(Clone, Debug, Default)]
pub struct History {
    operations: Vec<Operation>,
    clock: u64,
    given_up: u64,
}

#[derive(Clone, Copy)]
enum Effect {
    /// Finds or makes this frame.
    Maps(u64),
    /// Sees this.
    Sees(Option<u64>),
    Clears,
    Nothing,
}

impl History {
    /// A call begins; the answer goes to [`History::end`] with the number returned.
    pub fn begin(&mut self, task: u32, call: Call) -> usize {
        self.clock += 1;
        self.operations.push(Operation { task, call, began: self.clock, ended: None });
        self.operations.len() - 1
    }

    /// The call has been answered. A number that was never given out is ignored.
    pub fn end(&mut self, call: usize, answer: Answer) {
        self.clock += 1;
        if let Some(operation) = self.operations.get_mut(call) {
            operation.ended = Some((self.clock, answer));
        }
    }

    /// Calls so far.
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    /// No calls yet?
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// Searches that were too long to judge.
    pub fn given_up(&self) -> u64 {
        self.given_up
    }

    /// Every gfn whose answers fit no order.
    pub fn check(&mut self) -> Vec<Counterexample> {
        let mut gfns: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (i, operation) in self.operations.iter().enumerate() {
            if let Call::Fault(gfn) | Call::LookUp(gfn) = operation.call {
                gfns.entry(gfn).or_default().push(i);
            }
        }
        let zaps: Vec<usize> =
            (0..self.operations.len()).filter(|&i| matches!(self.operations[i].call, Call::Zap(_))).collect();
        let mut found = Vec::new();
        for (gfn, mut own) in gfns {
            own.extend(
                zaps.iter()
                    .filter(|&&i| matches!(&self.operations[i].call, Call::Zap(r) if r.contains(&gfn))),
            );
            own.sort_unstable();
            let history: Vec<Operation> = own.iter().map(|&i| self.operations[i].clone()).collect();
            match fits(&history) {
                Some(true) => {}
                Some(false) => found.push(Counterexample { gfn, history }),
                None => self.given_up += 1,
            }
        }
        found
    }
}

fn effect(operation: &Operation) -> Effect {
    match (&operation.call, operation.ended) {
        (Call::Zap(_), _) => Effect::Clears,
        (Call::Fault(_), Some((_, Answer::Mapped(pfn)))) => Effect::Maps(pfn),
        (Call::LookUp(_), Some((_, Answer::Mapped(pfn)))) => Effect::Sees(Some(pfn)),
        (Call::LookUp(_), Some((_, Answer::Absent))) => Effect::Sees(None),
        _ => Effect::Nothing,
    }
}

/// The state after the effect, or `None` where it cannot be.
fn apply(state: Option<u64>, effect: Effect) -> Option<Option<u64>> {
    match (effect, state) {
        (Effect::Maps(pfn), None) => Some(Some(pfn)),
        (Effect::Maps(pfn), Some(there)) | (Effect::Sees(Some(pfn)), Some(there)) => {
            (pfn == there).then_some(state)
        }
        (Effect::Sees(None), None) | (Effect::Nothing, _) => Some(state),
        (Effect::Sees(_), _) => None,
        (Effect::Clears, _) => Some(None),
    }
}

/// Does some order fit? `None`: the search was too long.
fn fits(history: &[Operation]) -> Option<bool> {
    // A fault without an answer may have mapped any frame that somebody saw: it is tried with each, and with none.
    let seen: BTreeSet<u64> = history
        .iter()
        .filter_map(|o| match o.ended {
            Some((_, Answer::Mapped(pfn))) => Some(pfn),
            _ => None,
        })
        .collect();
    let mut search = Search { history, seen, steps: 0, dead: HashSet::new() };
    let found = search.from(&mut vec![false; history.len()], None);
    if found { Some(true) } else { (search.steps < STEPS).then_some(false) }
}

struct Search<'h> {
    history: &'h [Operation],
    seen: BTreeSet<u64>,
    steps: u32,
    dead: HashSet<(Vec<bool>, Option<u64>)>,
}

impl Search<'_> {
    fn from(&mut self, done: &mut Vec<bool>, state: Option<u64>) -> bool {
        let open = |i: &usize| !done[*i];
        let deadline =
            (0..done.len()).filter(open).filter_map(|i| self.history[i].ended).map(|(at, _)| at).min();
        let Some(deadline) = deadline else { return true };
        if self.steps >= STEPS || !self.dead.insert((done.clone(), state)) {
            return false;
        }
        let next: Vec<usize> =
            (0..done.len()).filter(open).filter(|&i| self.history[i].began < deadline).collect();
        for i in next {
            self.steps += 1;
            done[i] = true;
            let operation = &self.history[i];
            let mut states: Vec<Option<u64>> = apply(state, effect(operation)).into_iter().collect();
            let unknown = !matches!(operation.ended, Some((_, Answer::Mapped(_) | Answer::Absent)));
            if matches!(operation.call, Call::Fault(_)) && unknown && state.is_none() {
                states.extend(self.seen.iter().map(|&pfn| Some(pfn)));
            }
            for after in states {
                if self.from(done, after) {
                    return true;
                }
            }
            done[i] = false;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (task, call, begin, end, answer)
    fn judged(calls: &[(u32, Call, u64, u64, Answer)]) -> Vec<u64> {
        let operations = calls
            .iter()
            .map(|(task, call, began, ended, answer)| Operation {
                task: *task,
                call: call.clone(),
                began: *began,
                ended: (*ended != 0).then_some((*ended, *answer)),
            })
            .collect();
        let mut history = History { operations, ..History::default() };
        history.check().into_iter().map(|c| c.gfn).collect()
    }

    use Answer::{Absent, Done, Mapped};
    use Call::{Fault, LookUp, Zap};

    #[test]
    fn answers_in_order_fit() {
        let calls = [
            (1, LookUp(5), 1, 2, Absent),
            (1, Fault(5), 3, 4, Mapped(9)),
            (1, LookUp(5), 5, 6, Mapped(9)),
            (1, Zap(0..10), 7, 8, Done),
            (1, LookUp(5), 9, 10, Absent),
            (1, Fault(5), 11, 12, Mapped(11)),
        ];
        assert_eq!(judged(&calls), []);
    }

    #[test]
    fn a_stale_leaf_after_a_zap_has_returned_fits_no_order() {
        let calls =
            [(1, Fault(5), 1, 2, Mapped(9)), (2, Zap(0..10), 3, 4, Done), (1, LookUp(5), 5, 6, Mapped(9))];
        assert_eq!(judged(&calls), [5]);
    }

    #[test]
    fn a_fault_beside_the_zap_may_come_after_it() {
        let calls =
            [(1, Fault(5), 1, 6, Mapped(9)), (2, Zap(0..10), 3, 4, Done), (1, LookUp(5), 7, 8, Mapped(9))];
        assert_eq!(judged(&calls), []);
    }

    #[test]
    fn a_range_need_not_go_at_once_but_each_gfn_goes_once() {
        // gfn 6 is seen gone while 5 is still there: allowed. Seen back without a fault: not.
        let calls = [
            (1, Fault(5), 1, 2, Mapped(9)),
            (1, Fault(6), 3, 4, Mapped(10)),
            (2, Zap(0..10), 5, 20, Done),
            (1, LookUp(6), 6, 7, Absent),
            (1, LookUp(5), 8, 9, Mapped(9)),
            (1, LookUp(6), 10, 11, Mapped(10)),
        ];
        assert_eq!(judged(&calls), [6]);
    }

    #[test]
    fn a_call_that_never_ended_may_have_taken_effect_or_not() {
        let open = (3, Fault(5), 1, 0, Done);
        assert_eq!(judged(&[open.clone(), (1, LookUp(5), 2, 3, Mapped(9))]), []);
        assert_eq!(judged(&[open, (1, LookUp(5), 2, 3, Absent)]), []);
    }

    #[test]
    fn a_frame_that_nobody_mapped_fits_no_order() {
        assert_eq!(judged(&[(1, LookUp(5), 1, 2, Mapped(9))]), [5]);
    }
}
