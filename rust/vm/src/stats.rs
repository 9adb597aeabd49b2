//! KVM's own statistics of a VM, counted by KVM's rules (`/sys/kernel/debug/kvm/<vm>/`).
//!
//! **Guarantee.** At a quiet point the numbers are those that the kernel of the profile would show after the same operations.
//!
//! **Mechanism.** What a vCPU counts it counts alone, on its own line, without a locked instruction; whoever asks adds the lines up. The rules that are not in the names:
//!
//! | counter | counts |
//! | --- | --- |
//! | `pf_fixed` | faults that gave the guest its access, the fast ones among them; no prefetch (recorded: 6.12) |
//! | `pf_fast` | faults that the lockless path settled: fixed, or found allowed already |
//! | `pf_emulate`, `pf_spurious` | results of guest faults, never of prefetches |
//! | `pf_mmio_spte_created` | MMIO entries installed, also over an equal one |
//! | `remote_tlb_flush` | flushes that met a vCPU in the guest: without one, nobody had to be kicked |
//! | `remote_tlb_flush_requests` | flushes asked for |
//! | `pages_*` | leaves of all roots of both MMUs, invalid ones included, until they are zapped |

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tdpmmu_platform::Platform;

use crate::{FaultOutcome, Vm};

/// The statistics of a VM. Counts since its creation, but for `pages_*` and `nx_lpage_splits`, which say how many there are now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmStats {
    /// 4 KiB leaves mapped now.
    pub pages_4k: i64,
    /// 2 MiB leaves mapped now.
    pub pages_2m: i64,
    /// 1 GiB leaves mapped now.
    pub pages_1g: i64,
    /// Guest faults that were handled.
    pub pf_taken: u64,
    /// Faults that made the access possible.
    pub pf_fixed: u64,
    /// Accesses that must be emulated.
    pub pf_emulate: u64,
    /// Faults that found the access allowed.
    pub pf_spurious: u64,
    /// Faults settled without mmu_lock.
    pub pf_fast: u64,
    /// MMIO entries installed.
    pub pf_mmio_spte_created: u64,
    /// Tables that stand where a huge leaf would, for the NX mitigation.
    pub nx_lpage_splits: u64,
    /// Remote flushes that kicked somebody.
    pub remote_tlb_flush: u64,
    /// Remote flushes.
    pub remote_tlb_flush_requests: u64,
}

/// What one vCPU counts. Written by its thread alone.
#[repr(align(128))]
#[derive(Debug, Default)]
pub(crate) struct FaultCounts {
    fixed: AtomicU64,
    retry: AtomicU64,
    emulate: AtomicU64,
    spurious: AtomicU64,
    fast: AtomicU64,
    mmio: AtomicU64,
}

/// One more, by the only writer.
#[inline]
fn add(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

impl FaultCounts {
    /// A guest fault came to `outcome`.
    #[inline(always)]
    pub(crate) fn fault(&self, outcome: FaultOutcome) {
        // Each fault ends in one of these: how many were taken is their sum.
        match outcome {
            FaultOutcome::Fast(_) => {
                add(&self.fast);
                add(&self.fixed);
            }
            FaultOutcome::Fixed { .. } => add(&self.fixed),
            FaultOutcome::Spurious => add(&self.spurious),
            FaultOutcome::Emulate => add(&self.emulate),
            FaultOutcome::Retry => add(&self.retry),
        }
    }

    /// As [`FaultCounts::fault`], but for prefetches; gives the outcome back.
    #[inline(always)]
    pub(crate) fn settled(&self, outcome: FaultOutcome, prefetch: bool) -> FaultOutcome {
        if !prefetch {
            self.fault(outcome);
        }
        outcome
    }

    /// The lockless path found the access allowed.
    #[inline]
    pub(crate) fn fast_spurious(&self) {
        add(&self.fast);
    }

    /// An MMIO entry was installed.
    pub(crate) fn mmio_created(&self) {
        add(&self.mmio);
    }
}

impl<P: Platform> Vm<P> {
    /// KVM's statistics now. Exact at quiet points.
    pub fn stats(&self) -> VmStats {
        let (tdp, shadow) = (self.mmu().leaf_pages(), self.shadow_leaf_pages());
        let [pages_4k, pages_2m, pages_1g] = std::array::from_fn(|size| tdp[size] + shadow[size]);
        let side = self.side();
        let mut stats = VmStats {
            pages_4k,
            pages_2m,
            pages_1g,
            nx_lpage_splits: self.mmu().nx_splits(),
            remote_tlb_flush: side.flushes_that_kicked(),
            remote_tlb_flush_requests: side.flushes(),
            ..VmStats::default()
        };
        for counts in &self.counts {
            stats.pf_taken += counts.retry.load(Relaxed);
            stats.pf_fixed += counts.fixed.load(Relaxed);
            stats.pf_emulate += counts.emulate.load(Relaxed);
            stats.pf_spurious += counts.spurious.load(Relaxed);
            stats.pf_fast += counts.fast.load(Relaxed);
            stats.pf_mmio_spte_created += counts.mmio.load(Relaxed);
        }
        stats.pf_taken += stats.pf_fixed + stats.pf_emulate + stats.pf_spurious;
        stats
    }
}
