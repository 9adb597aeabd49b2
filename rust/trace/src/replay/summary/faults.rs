//! Faults by kind.
//!
//! `kvm_page_fault` prints NPT's error code on AMD (bit 1 write, bit 4 fetch, bit 33 a guest page table) and VT-x's exit
//! qualification on Intel (bit 0 read, bit 1 write, bit 2 fetch). Which of the two a recording holds is known for sure only
//! when its first present SPTE was seen, so both are counted and one is given out.

use serde::Serialize;
use std::collections::BTreeMap;

/// Guest faults and what became of them.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct FaultCounts {
    /// `kvm_page_fault` events.
    pub total: u64,
    /// Of these, reads.
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Instruction fetches.
    pub exec: u64,
    /// Faults of the CPU's own walk of the guest's page tables (NPT only); each is also a read or a write.
    pub guest_page_table: u64,
    /// Pages that were to be mapped without a guest's fault: pre-fault, asynchronous page faults.
    pub prefetch: u64,
    /// Fixed by the lockless fast path.
    pub fast_fixed: u64,
    /// Found fixed already by the fast path.
    pub fast_spurious: u64,
    /// The fast path tried and left it to the slow one.
    pub fast_failed: u64,
    /// Leafs installed or found in place (`kvm_mmu_set_spte`), by level.
    pub mapped: BTreeMap<u8, u64>,
    /// Served from an MMIO SPTE, without a walk of memslots.
    pub mmio: u64,
    /// MMIO SPTEs made.
    pub mmio_made: u64,
    /// Faults that had their page and installed nothing: the notifier or another vCPU came first.
    pub retried: u64,
    /// From the fault to its end, where both are recorded.
    pub handled_ns: Option<Handled>,
}

/// Durations.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Handled {
    /// How many.
    pub count: u64,
    /// Their sum in ns.
    pub total: u64,
    /// The longest in ns.
    pub max: u64,
}

#[derive(Default)]
pub(crate) struct FaultBook {
    counts: FaultCounts,
    npt: [u64; 3],
    ept: [u64; 3],
    handled: Handled,
    /// `kvm_mmu_set_spte` is in the recording.
    finishes: bool,
    /// Without it: leafs made by threads that serve faults.
    leafs: BTreeMap<u8, u64>,
    retried: u64,
}

impl FaultBook {
    pub(crate) fn fault(&mut self, error_code: u64) {
        let bit = |n: u32| error_code >> n & 1 != 0;
        let kind = |fetch: bool| if fetch { 2 } else { usize::from(bit(1)) };
        self.counts.total += 1;
        self.npt[kind(bit(4))] += 1;
        self.ept[kind(bit(2))] += 1;
        self.counts.guest_page_table += u64::from(bit(33));
    }

    /// `kvm_mmu_spte_requested`, in a thread that serves no fault.
    pub(crate) fn prefetched(&mut self) {
        self.counts.prefetch += 1;
    }

    /// The page was there, and the thread went on without installing anything.
    pub(crate) fn gave_up(&mut self) {
        self.retried += 1;
    }

    pub(crate) fn fast(&mut self, fixed: bool, spurious: bool) {
        let counter = match (fixed, spurious) {
            (true, _) => &mut self.counts.fast_fixed,
            (false, true) => &mut self.counts.fast_spurious,
            (false, false) => &mut self.counts.fast_failed,
        };
        *counter += 1;
    }

    pub(crate) fn mapped(&mut self, level: u8) {
        self.finishes = true;
        *self.counts.mapped.entry(level).or_default() += 1;
    }

    /// A leaf came into being by a thread that serves a fault.
    pub(crate) fn leaf(&mut self, level: u8) {
        *self.leafs.entry(level).or_default() += 1;
    }

    pub(crate) fn mmio(&mut self) {
        self.counts.mmio += 1;
    }

    pub(crate) fn mmio_made(&mut self) {
        self.counts.mmio_made += 1;
    }

    pub(crate) fn handled(&mut self, ns: u64) {
        self.handled.count += 1;
        self.handled.total = self.handled.total.saturating_add(ns);
        self.handled.max = self.handled.max.max(ns);
    }

    pub(crate) fn finish(mut self, ept: bool) -> FaultCounts {
        let [read, write, exec] = if ept { self.ept } else { self.npt };
        (self.counts.read, self.counts.write, self.counts.exec) = (read, write, exec);
        if ept {
            self.counts.guest_page_table = 0;
        }
        if self.finishes {
            self.counts.retried = self.retried;
        } else {
            self.counts.mapped = self.leafs;
        }
        self.counts.handled_ns = (self.handled.count > 0).then_some(self.handled);
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_are_read_from_the_code_that_the_vendor_prints() {
        let mut npt = FaultBook::default();
        [0x1_0000_0004, 0x1_0000_0006, 0x1_0000_0014, 0x2_0000_0006].into_iter().for_each(|e| npt.fault(e));
        let got = npt.finish(false);
        assert_eq!((got.total, got.read, got.write, got.exec, got.guest_page_table), (4, 1, 2, 1, 1));
        let mut ept = FaultBook::default();
        [0x181, 0x182, 0x184].into_iter().for_each(|e| ept.fault(e));
        let got = ept.finish(true);
        assert_eq!((got.read, got.write, got.exec), (1, 1, 1));
    }
}
