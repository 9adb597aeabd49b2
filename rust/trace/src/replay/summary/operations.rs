//! The longest operations: of a test program where marks name them, else zaps, notifier calls and faults.

use serde::Serialize;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Most operations that are listed.
pub const TOP_OPERATIONS: usize = 20;
/// Longest detail in bytes.
const DETAIL: usize = 160;

/// An operation.
#[derive(Clone, Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Operation {
    /// Duration in ns.
    pub duration_ns: u64,
    /// Begin, ns of the recording's clock.
    pub t0_ns: u64,
    /// Kind of the mark; or `zap:CAUSE`, `notifier`, `fault`.
    pub name: String,
    /// Its parameters, shortened.
    pub detail: String,
    /// Thread id.
    pub pid: u32,
    /// Thread name.
    pub comm: String,
}

#[derive(Default)]
struct Longest(BinaryHeap<Reverse<Operation>>);

impl Longest {
    fn offer(&mut self, duration_ns: u64, t0_ns: u64, make: impl FnOnce() -> (String, String, u32, String)) {
        let full = self.0.len() >= TOP_OPERATIONS;
        if full && self.0.peek().is_some_and(|least| least.0.duration_ns >= duration_ns) {
            return;
        }
        if full {
            self.0.pop();
        }
        let (name, mut detail, pid, comm) = make();
        if detail.len() > DETAIL {
            let end = (0..=DETAIL).rev().find(|&n| detail.is_char_boundary(n)).unwrap_or(0);
            detail.truncate(end);
            detail.push('…');
        }
        self.0.push(Reverse(Operation { duration_ns, t0_ns, name, detail, pid, comm }));
    }

    fn into_sorted(self) -> Vec<Operation> {
        let mut all: Vec<Operation> = self.0.into_iter().map(|r| r.0).collect();
        all.sort_by(|a, b| b.duration_ns.cmp(&a.duration_ns).then(a.t0_ns.cmp(&b.t0_ns)));
        all
    }
}

#[derive(Default)]
pub(crate) struct Operations {
    marked: Longest,
    others: Longest,
}

impl Operations {
    /// An operation that marks bracket.
    pub(crate) fn marked(
        &mut self,
        duration_ns: u64,
        t0_ns: u64,
        make: impl FnOnce() -> (String, String, u32, String),
    ) {
        self.marked.offer(duration_ns, t0_ns, make);
    }

    /// Anything else.
    pub(crate) fn other(
        &mut self,
        duration_ns: u64,
        t0_ns: u64,
        make: impl FnOnce() -> (String, String, u32, String),
    ) {
        self.others.offer(duration_ns, t0_ns, make);
    }

    /// Longest first.
    pub(crate) fn finish(self) -> Vec<Operation> {
        let marked = self.marked.into_sorted();
        if marked.is_empty() { self.others.into_sorted() } else { marked }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_are_kept_in_order_and_marks_come_before_the_rest() {
        let mut all = Operations::default();
        let make = |n: u64| move || (format!("op{n}"), "ü".repeat(200), 1, "vmm".to_owned());
        (0..1000u64).for_each(|n| all.other((n * 7919) % 1000, n, make(n)));
        let listed = Operations { others: std::mem::take(&mut all.others), ..Operations::default() }.finish();
        assert_eq!(
            listed.iter().map(|o| o.duration_ns).collect::<Vec<_>>(),
            (980..1000).rev().collect::<Vec<_>>()
        );
        assert!(listed[0].detail.len() <= DETAIL + '…'.len_utf8());
        all.other(10, 0, make(1));
        all.marked(1, 0, make(2));
        assert_eq!(all.finish().iter().map(|o| o.name.as_str()).collect::<Vec<_>>(), ["op2"]);
    }
}
