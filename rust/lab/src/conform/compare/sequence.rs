//! In order: the transitions of one input, or of one root's worker.

use super::ad::agrees;
use super::{Entry, Verdict};

/// Compares two sequences. Equal heads and tails are matched; what lies between differs. `aging`: predicted ones that only hardware could have caused may be absent.
pub fn judge(recorded: &[Entry], predicted: &[Entry], aging: bool) -> Verdict {
    if aging {
        return judge_aging(recorded, predicted);
    }
    let same = |r: usize, p: usize| agrees(&recorded[r].change, &predicted[p].change);
    let shorter = recorded.len().min(predicted.len());
    let head = (0..shorter).take_while(|&i| same(i, i)).count();
    if head == recorded.len() && head == predicted.len() {
        return Verdict { matched: head as u64, ..Verdict::default() };
    }
    let tail = (1..=shorter - head).take_while(|&i| same(recorded.len() - i, predicted.len() - i)).count();
    Verdict {
        matched: (head + tail) as u64,
        missing: (recorded.len() - head - tail) as u64,
        extra: (predicted.len() - head - tail) as u64,
        first: Some((head, head)),
        ..Verdict::default()
    }
}

fn judge_aging(recorded: &[Entry], predicted: &[Entry]) -> Verdict {
    let mut verdict = Verdict::default();
    let mut next = 0;
    for (at, one) in recorded.iter().enumerate() {
        let found = (next..predicted.len()).find(|&p| agrees(&one.change, &predicted[p].change));
        match found {
            Some(p) => {
                verdict.extra += skipped(&predicted[next..p]);
                if predicted[p].optional {
                    verdict.undetermined += 1;
                } else {
                    verdict.matched += 1;
                }
                next = p + 1;
            }
            None => {
                verdict.missing += 1;
                verdict.first.get_or_insert((at, next));
            }
        }
    }
    verdict.extra += skipped(&predicted[next..]);
    if verdict.extra > 0 {
        let at = predicted.iter().position(|entry| !entry.optional).unwrap_or(0);
        verdict.first.get_or_insert((recorded.len().min(at), at));
    }
    verdict
}

/// Predicted aging events that hardware had no part in.
fn skipped(predicted: &[Entry]) -> u64 {
    predicted.iter().filter(|entry| !entry.optional).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conform::names::Change;

    fn entries(gfns: &[u64]) -> Vec<Entry> {
        let change = |&gfn: &u64| Change { root: 0, as_id: 0, level: 1, gfn, old: 0x5e67, new: 0x5e47 };
        gfns.iter().map(|gfn| Entry { change: change(gfn), line: *gfn, optional: *gfn >= 100 }).collect()
    }

    #[test]
    fn order_matters_and_what_is_left_over_is_told() {
        let verdict = judge(&entries(&[1, 2, 3]), &entries(&[1, 2, 3]), false);
        assert_eq!((verdict.matched, verdict.missing, verdict.extra), (3, 0, 0));
        let verdict = judge(&entries(&[1, 2, 3]), &entries(&[2, 1, 3]), false);
        assert_eq!((verdict.matched, verdict.missing, verdict.extra), (1, 2, 2));
        assert_eq!(verdict.first, Some((0, 0)));
        let verdict = judge(&entries(&[1]), &entries(&[1, 9]), false);
        assert_eq!((verdict.matched, verdict.missing, verdict.extra), (1, 0, 1));
    }

    #[test]
    fn an_aging_event_that_hardware_decides_may_be_absent_and_no_other_may_appear() {
        let verdict = judge(&entries(&[1, 101]), &entries(&[1, 100, 101, 102]), true);
        assert_eq!((verdict.matched, verdict.undetermined, verdict.missing, verdict.extra), (1, 1, 0, 0));
        let verdict = judge(&entries(&[101]), &entries(&[1, 101]), true);
        assert_eq!((verdict.undetermined, verdict.extra), (1, 1), "KVM had set that Accessed itself");
        let verdict = judge(&entries(&[101, 100]), &entries(&[100, 101]), true);
        assert_eq!((verdict.undetermined, verdict.missing), (1, 1), "in order");
    }
}
