//! The history of one word, put together from reports in any order.
//!
//! **Guarantee.** If the reports `from -> to` are those of a real history that began at the known value, then however they arrive, once
//! all are there the chain stands at the true last value. If they are not, it says so.
//!
//! **Mechanism.** A history is a trail through a graph whose edges are the reports. Which value it ends at does not depend on the order:
//! it is where one edge more goes in than out. So a report that fits is taken at once, one that does not waits. Taking greedily may
//! leave out a round trip (`A -> B -> A` of which the chain passed `A` earlier); such leftovers are balanced at every value and do not move the
//! end. Anything unbalanced is a broken history.

use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    pub from: u64,
    pub to: u64,
    /// mmu_lock was held shared.
    pub shared: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Chain {
    at: u64,
    early: Vec<Edge>,
    /// Since the last comparison edges may have been taken in another order than they happened: one had to wait, or did not join
    /// exactly. The core is right all the same, the silent bits need not be.
    pub reordered: bool,
}

impl Chain {
    pub(crate) fn new(at: u64) -> Self {
        Self { at, early: Vec::new(), reordered: false }
    }

    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn early(&self) -> &[Edge] {
        &self.early
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.early.is_empty()
    }

    pub(crate) fn push(&mut self, edge: Edge) {
        self.early.push(edge);
    }

    /// Takes one report that fits; `core` maps values that count as one to one.
    pub(crate) fn step(&mut self, core: impl Fn(u64) -> u64) -> Option<Edge> {
        let here = core(self.at);
        let i = self.early.iter().position(|e| core(e.from) == here)?;
        let edge = self.early.remove(i);
        // Left as something else than it was entered as: another edge of the same core came in between, and comes later.
        let other = edge.from != self.at;
        self.at = edge.to;
        if other || !self.early.is_empty() {
            self.reordered = true;
        }
        Some(edge)
    }

    /// All reports are in: what was left out, and whether it is balanced (a round trip) or not (no history).
    pub(crate) fn quiet(&mut self, core: impl Fn(u64) -> u64) -> (Vec<Edge>, bool) {
        let balanced = self.is_balanced(core);
        (std::mem::take(&mut self.early), balanced)
    }

    /// Nothing waits, or round trips only: the chain stands where it would with all of them taken.
    pub(crate) fn is_balanced(&self, core: impl Fn(u64) -> u64) -> bool {
        let mut balance: BTreeMap<u64, i64> = BTreeMap::new();
        for edge in &self.early {
            *balance.entry(core(edge.from)).or_default() -= 1;
            *balance.entry(core(edge.to)).or_default() += 1;
        }
        balance.values().all(|&b| b == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replay(edges: &[(u64, u64)]) -> Chain {
        let mut chain = Chain::new(0);
        for &(from, to) in edges {
            chain.push(Edge { from, to, shared: true });
            while chain.step(|v| v).is_some() {}
        }
        chain
    }

    #[test]
    fn every_order_of_arrival_ends_at_the_same_value() {
        let history = [(0, 1), (1, 0), (0, 2), (2, 3), (3, 0)];
        let mut order = [0, 1, 2, 3, 4];
        // Heap's algorithm, iteratively.
        let mut c = [0; 5];
        let mut i = 0;
        let mut seen = 0;
        loop {
            let mut chain = replay(&order.map(|i| history[i]));
            assert!(chain.quiet(|v| v).1, "{order:?}");
            assert_eq!(chain.at(), 0, "{order:?}");
            seen += 1;
            while i < 5 && c[i] >= i {
                c[i] = 0;
                i += 1;
            }
            if i == 5 {
                break;
            }
            order.swap(if i % 2 == 0 { 0 } else { c[i] }, i);
            c[i] += 1;
            i = 0;
        }
        assert_eq!(seen, 120);
    }

    #[test]
    fn edges_that_join_only_by_their_core_are_marked() {
        // 0 -> 11 -> 0 -> 12 where 11 and 12 have one core; heard as 0 -> 12, 11 -> 0, 0 -> 11.
        let core = |v: u64| v / 10;
        let mut chain = Chain::new(0);
        for (from, to) in [(0, 12), (11, 0), (0, 11)] {
            chain.push(Edge { from, to, shared: true });
            while chain.step(core).is_some() {}
        }
        assert_eq!((core(chain.at()), chain.reordered), (1, true));
    }

    #[test]
    fn a_missing_report_is_seen() {
        let mut chain = replay(&[(0, 1), (2, 3)]);
        assert_eq!(chain.at(), 1);
        assert_eq!(chain.quiet(|v| v), (vec![Edge { from: 2, to: 3, shared: true }], false));
    }
}
