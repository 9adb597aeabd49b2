//! Where vCPUs race: which of them links a table or installs a leaf is nobody's to say, but what happens to each entry is.

use std::collections::HashMap;

use super::ad::agrees;
use super::{Entry, Verdict};

/// Compares two multisets. Exact partners first, then those that hardware made differ.
pub fn judge(recorded: &[Entry], predicted: &[Entry]) -> Verdict {
    let place = |entry: &Entry| (entry.change.as_id, entry.change.level, entry.change.gfn);
    let mut at: HashMap<_, Vec<usize>> = HashMap::new();
    for (p, entry) in predicted.iter().enumerate() {
        at.entry(place(entry)).or_default().push(p);
    }
    let mut verdict = Verdict::default();
    let mut unmatched = Vec::new();
    let mut take = |r: usize, exact: bool| {
        let Some(here) = at.get_mut(&place(&recorded[r])) else { return false };
        let found = here.iter().position(|&p| {
            let (ours, theirs) = (&predicted[p].change, &recorded[r].change);
            if exact {
                (ours.old, ours.new) == (theirs.old, theirs.new) && agrees(theirs, ours)
            } else {
                agrees(theirs, ours)
            }
        });
        found.map(|n| here.remove(n)).is_some()
    };
    for r in 0..recorded.len() {
        if take(r, true) {
            verdict.matched += 1;
        } else {
            unmatched.push(r);
        }
    }
    let mut first_missing = None;
    for r in unmatched {
        if take(r, false) {
            verdict.matched += 1;
        } else {
            verdict.missing += 1;
            first_missing.get_or_insert(r);
        }
    }
    let left: Vec<usize> = at.into_values().flatten().collect();
    verdict.extra = left.len() as u64;
    if verdict.missing + verdict.extra > 0 {
        let r = first_missing.unwrap_or(recorded.len());
        // The left-over at the same place, if there is one, tells more than the first.
        let near = left
            .iter()
            .copied()
            .filter(|&p| recorded.get(r).is_some_and(|e| place(e) == place(&predicted[p])));
        let p = near.min().or_else(|| left.iter().copied().min()).unwrap_or(predicted.len());
        verdict.first = Some((r, p));
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conform::names::Change;

    fn entry(gfn: u64, old: u64, new: u64) -> Entry {
        Entry { change: Change { root: 0, as_id: 0, level: 1, gfn, old, new }, line: 0, optional: false }
    }

    #[test]
    fn order_does_not_matter_and_numbers_do() {
        let (a, b) = (entry(1, 0, 0x5e67), entry(1, 0x5e67, 0x5e27));
        let verdict = judge(&[b, a], &[a, b]);
        assert_eq!((verdict.matched, verdict.missing, verdict.extra), (2, 0, 0));
        let verdict = judge(&[a, b, b], &[a, b]);
        assert_eq!((verdict.matched, verdict.missing, verdict.extra), (2, 1, 0));
        let verdict = judge(&[a], &[a, b]);
        assert_eq!((verdict.matched, verdict.missing, verdict.extra), (1, 0, 1));
    }

    #[test]
    fn an_exact_partner_is_not_given_to_another() {
        let (plain, dirty) = (entry(1, 0x5e27, 0), entry(1, 0x5e67, 0));
        let verdict = judge(&[dirty, dirty], &[plain, dirty]);
        assert_eq!((verdict.matched, verdict.missing, verdict.extra), (2, 0, 0));
    }
}
