//! The fault pipeline: from a gfn that hardware could not translate to an SPTE.
//!
//! **Guarantee.** An SPTE is installed only under a root that is valid, from a memslot that is not about to go, with a frame that the host has not taken back; each of the three
//! is tested *after* mmu_lock was taken shared, by tests that the other side changes only under mmu_lock exclusive. Everything that can
//! sleep or fail (memory for tables, the host's page) happens before the lock.
//!
//! **Mechanism**, in the order of `direct_page_fault`:
//!
//! 1. fast page fault: no lock, for leaves that prove what they may become
//! 2. table cache topped up
//! 3. `mmu_invalidate_seq` sampled; read barrier
//! 4. memslot looked up under SRCU: none is MMIO, INVALID means retry
//! 5. (6.12) the notifier asked without the lock: saves the work, decides nothing
//! 6. the host's page, its mapping level; the smallest of what slot, host and dirty logging allow
//! 7. mmu_lock shared
//! 8. stale? root obsolete (5.16 and later), notifier in progress over the gfn, or sequence moved
//! 9. map; unlock

use tdpmmu_mmu::{FastOutcome, Frame, MapFault, MapOutcome};
use tdpmmu_platform::Platform;
use tdpmmu_spte::mmio::GENERATION_MASK;
use tdpmmu_spte::{LEVEL_4K, Spte};

use crate::slots::UPDATE_IN_PROGRESS;
use crate::walker::{GuestAccess, HardwareFault};
use crate::{Vcpu, VmError};

/// What became of one pass through the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// Fixed without mmu_lock.
    Fast(Spte),
    /// A leaf was installed.
    Fixed {
        /// Its level.
        level: u8,
        /// Its value.
        spte: Spte,
    },
    /// The access was allowed already.
    Spurious,
    /// Something moved: the guest faults again.
    Retry,
    /// No memory there, or a write to read-only memory: emulate.
    Emulate,
}

impl<P: Platform> Vcpu<'_, P> {
    /// Handles the exit that `hardware` caused.
    ///
    /// # Errors
    /// As [`Vcpu::fault`].
    pub(crate) fn page_fault(
        &mut self,
        access: GuestAccess,
        hardware: HardwareFault,
    ) -> Result<FaultOutcome, VmError> {
        match hardware {
            HardwareFault::Mmio(spte) if self.mmio_is_current(spte) => Ok(FaultOutcome::Emulate),
            // A stale MMIO entry is never zapped; the slow path replaces it (I16).
            HardwareFault::Mmio(_) | HardwareFault::NotPresent => self.fault(access, false),
            HardwareFault::Protection => self.fault(access, true),
        }
    }

    fn mmio_is_current(&self, spte: Spte) -> bool {
        let generation = self.core.slots.generation();
        generation & UPDATE_IN_PROGRESS == 0 && self.vm.mmu().format().mmio_is_current(spte, generation)
    }

    /// One pass through the pipeline for `access`; `present`: hardware found a leaf that does not allow it.
    /// Leaves the guest first, as an exit does: a fast zap that holds mmu_lock waits until no vCPU is in the guest.
    ///
    /// # Errors
    /// [`VmError::Pool`] out of tables; [`VmError::HostFull`] and [`VmError::BadHva`] when the host has no page to give.
    #[inline]
    pub fn fault(&mut self, access: GuestAccess, present: bool) -> Result<FaultOutcome, VmError> {
        let GuestAccess { gfn, write, exec } = access;
        self.leave();
        let root = self.root()?;
        let vm = self.vm;
        let (mmu, side, rules) = (vm.mmu(), vm.side(), vm.rules());
        let (core, task) = (&mut *self.core, &self.task);
        let as_id = core.role.as_id();
        let slots = core.slots.enter();
        let slot = slots.find(as_id, gfn);
        let tracked = slot.is_some_and(|slot| slot.dirty.is_some());

        if rules.fast_page_fault && (present && write || !rules.ad_bits) {
            match mmu.fast_page_fault(task, root, as_id, gfn, write, exec, tracked) {
                FastOutcome::Fixed(spte) => return Ok(FaultOutcome::Fast(spte)),
                FastOutcome::Spurious => return Ok(FaultOutcome::Spurious),
                FastOutcome::Declined => {}
            }
        }

        mmu.top_up(task, &mut core.cache)?;
        let seq = side.invalidation.sample::<P>();
        let (frame, goal_level) = match slot {
            None => {
                let generation = core.slots.generation() & GENERATION_MASK;
                (Frame::Mmio { generation }, LEVEL_4K)
            }
            Some(slot) if slot.invalid => return Ok(FaultOutcome::Retry),
            Some(slot) if slot.flags.readonly && write => return Ok(FaultOutcome::Emulate),
            Some(slot) => {
                if rules.early_check && side.invalidation.looks_stale::<P>(gfn, seq) {
                    return Ok(FaultOutcome::Retry);
                }
                let page = side.primary.fault_in(slot.hva_of(gfn), write)?;
                let level =
                    if tracked { LEVEL_4K } else { slot.max_level(gfn).min(page.level).min(rules.max_level) };
                (Frame::Page { pfn: page.pfn, writable: page.writable && !slot.flags.readonly }, level)
            }
        };

        let mut guard = mmu.lock.read(task);
        if rules.stale_root_check && mmu.is_obsolete(root)
            || slot.is_some() && side.invalidation.must_retry(&guard, gfn, seq)
        {
            return Ok(FaultOutcome::Retry);
        }
        let fault =
            MapFault { gfn, as_id, frame, goal_level, write, exec, prefetch: false, dirty_tracked: tracked };
        let mapped = mmu.map(&mut guard, &mut core.cache, root, &fault);
        drop(guard);
        Ok(match mapped {
            MapOutcome::Fixed { level, spte } => FaultOutcome::Fixed { level, spte },
            MapOutcome::Spurious => FaultOutcome::Spurious,
            MapOutcome::Retry => FaultOutcome::Retry,
            MapOutcome::Emulate | MapOutcome::WriteProtected => FaultOutcome::Emulate,
        })
    }
}
