//! Memslot updates: create, delete, move, flags.
//!
//! **Guarantee.** An update that KVM refuses changes nothing. When a deletion or a move returns, nothing of the old slot is mapped and no fault can bring it back; when logging was turned on,
//! each later write is seen. Identical parameters do nothing, and cost no generation.
//!
//! **Mechanism.** slots_lock throughout. A slot that goes is published as INVALID first (faults on it retry), then zapped, then taken out: two publications, two
//! steps of its address space's generation; create and flags are one. MMIO entries carry 19 bits of the generation; each publication whose generation begins anew in these
//! bits zaps everything before it counts, the INVALID one too.

use std::sync::atomic::Ordering;

use tdpmmu_platform::{Event, Fault, Phase, Platform, Site, Task};
use tdpmmu_shadow::SlotPages;

use crate::slot::{MemSlot, SlotFlags};
use crate::slots::{Change, MAX_SLOT_PAGES, Region, SlotWriter, Swapped, plan};
use crate::vm::FastZapTimes;
use crate::{Vm, VmError};

/// What a memslot update came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotUpdate {
    /// Identical parameters: nothing, not even a generation.
    Nothing,
    /// A new slot.
    Created,
    /// Only flags changed.
    Flags,
    /// The slot is gone.
    Deleted(FastZapTimes),
    /// The slot is elsewhere.
    Moved(FastZapTimes),
}

fn tell_going<P: Platform>(task: &Task<P>, slot: &MemSlot, going: bool) {
    let (as_id, start, end) = (slot.as_id, slot.base, slot.base + slot.pages);
    task.observe(|| Event::SlotPublish { as_id, start, end, going });
}

/// What was written and not collected yet is nobody's any more.
fn tell_log_end<P: Platform>(task: &Task<P>, slot: &MemSlot) {
    if slot.flags.log_dirty {
        task.observe(|| Event::LogEnd { as_id: slot.as_id, start: slot.base, end: slot.base + slot.pages });
    }
}

impl<P: Platform> Vm<P> {
    /// KVM_SET_USER_MEMORY_REGION.
    ///
    /// # Errors
    /// The rules of [`plan`]; [`VmError::Closed`].
    pub fn set_memslot(&self, task: &Task<P>, region: &Region) -> Result<SlotUpdate, VmError> {
        let mut slots = self.lock_slots(task);
        self.open()?;
        P::point(Site::AllocSlot);
        if region.pages != 0 && P::inject(Fault::Alloc, Site::AllocSlot) {
            return Err(VmError::Host { what: "a memslot's arrays", reason: "out of memory".into() });
        }
        let mut change = plan(&slots.set(), region, self.mmu().max_gfn(), self.logs())?;
        if let (Some(_), Change::Create(slot) | Change::Move(_, slot)) = (self.shadow(), &mut change) {
            slot.keep_books()?;
        }
        Ok(match change {
            Change::Nothing => SlotUpdate::Nothing,
            Change::Create(slot) => {
                let (as_id, start, end, logs) =
                    (slot.as_id, slot.base, slot.base + slot.pages, slot.flags.log_dirty);
                self.publish(task, &mut slots, |slots| slots.install(slot));
                if logs {
                    task.observe(|| Event::LogBegin { as_id, start, end, all_set: false });
                }
                SlotUpdate::Created
            }
            Change::Flags(old, new) => {
                if !new.flags.log_dirty {
                    tell_log_end(task, &old);
                }
                self.publish(task, &mut slots, |slots| slots.install(new.clone()));
                self.apply_flags(task, &old, &new);
                SlotUpdate::Flags
            }
            Change::Delete(old) => {
                tell_log_end(task, &old);
                tell_going(task, &old, true);
                self.publish(task, &mut slots, |slots| slots.invalidate(&old));
                let times = self.zap_slot(task, &old);
                self.publish(task, &mut slots, |slots| slots.remove(old.as_id, old.id));
                tell_going(task, &old, false);
                SlotUpdate::Deleted(times)
            }
            Change::Move(old, new) => {
                tell_log_end(task, &old);
                tell_going(task, &old, true);
                self.publish(task, &mut slots, |slots| slots.invalidate(&old));
                let times = self.zap_slot(task, &old);
                self.publish(task, &mut slots, |slots| slots.install(new));
                tell_going(task, &old, false);
                SlotUpdate::Moved(times)
            }
        })
    }

    /// One publication: the new set is seen by all who begin to read, and who reads the old one is waited for (synchronize_srcu); then the generation counts.
    fn publish(
        &self,
        task: &Task<P>,
        slots: &mut SlotWriter<P>,
        change: impl FnOnce(&mut SlotWriter<P>) -> Swapped,
    ) {
        let swapped = {
            let _waiting = task.phase(Phase::GracePeriod);
            change(slots)
        };
        if swapped.wrapped() {
            // Before it counts: entries of the last time round would look current again.
            self.fast_zap_locked(task, None);
        }
        slots.settle(swapped);
    }

    /// kvm_arch_flush_shadow_memslot: nothing of an INVALID slot is mapped when it returns, and no shadow page refers to its books. A fast zap of everything; with the quirk off (6.12 on) only the slot's leaves and
    /// what shadows tables in it, under one exclusive hold that yields, and the roots stay valid. Design `shadow-slot` has no other way.
    fn zap_slot(&self, task: &Task<P>, slot: &MemSlot) -> FastZapTimes {
        if self.slot_zap_all.load(Ordering::Relaxed) && self.zaps_all() {
            return self.fast_zap_locked(task, slot.books.as_ref());
        }
        let ns = |from: u64, to: u64| P::ticks_to_ns(to.saturating_sub(from));
        task.meter().reset_exclusive_holds();
        let t0 = P::ticks();
        let before = task.meter().phase_ticks(t0);
        let taken = {
            let mut guard = self.mmu().lock.write(task);
            let taken = P::ticks();
            if let (Some(shadow), Some(books)) = (self.shadow(), &slot.books) {
                // 5.1 took every page of a gfn; the quirk of 6.12 takes those whose accounting lies in the slot.
                let pages = if self.zaps_all() { SlotPages::Shadowing } else { SlotPages::All };
                shadow.zap_slot(&mut guard, books, pages);
            }
            let mut debt = self.mmu().unmap(&mut guard, slot.as_id, slot.gfns(), true);
            self.mmu().pay(task, &mut debt);
            taken
        };
        let done = P::ticks();
        let after = task.meter().phase_ticks(done);
        let holds = task.meter().exclusive_holds();
        FastZapTimes {
            t0,
            lock_wait_ns: ns(t0, taken),
            exclusive_hold_ns: P::ticks_to_ns(holds.first_ticks),
            exclusive_total_ns: P::ticks_to_ns(holds.total_ticks),
            exclusive_longest_ns: P::ticks_to_ns(holds.longest_ticks),
            exclusive_holds: holds.count,
            zap_ns: ns(taken, done),
            total_ns: ns(t0, done),
            phase_ticks: std::array::from_fn(|phase| after[phase] - before[phase]),
            ..FastZapTimes::default()
        }
    }

    /// KVM_X86_QUIRK_SLOT_ZAP_ALL, from the next deletion or move on: zap everything (as every kernel does by default), or the slot's leaves alone.
    ///
    /// # Errors
    /// [`VmError::Unsupported`] where the kernel has no such quirk: it always zaps all.
    pub fn set_slot_zap_all(&self, on: bool) -> Result<(), VmError> {
        let profile = self.mmu().profile();
        if !profile.slot_zap_quirk {
            return Err(VmError::Unsupported { what: "KVM_X86_QUIRK_SLOT_ZAP_ALL", kernel: profile.name });
        }
        self.slot_zap_all.store(on, Ordering::Relaxed);
        Ok(())
    }

    /// Adds guest memory `[base, base + pages)` in as many slots as KVM's limit on a slot's size asks for, backed by new anonymous
    /// host memory with mappings up to `level`. Returns the slot ids.
    ///
    /// # Errors
    /// As [`Vm::set_memslot`]; [`VmError::HostFull`]. Slots made before the error stay.
    pub fn add_memory(&self, task: &Task<P>, base: u64, pages: u64, level: u8) -> Result<Vec<u16>, VmError> {
        // A multiple of 1 GiB below the limit, so that no slot begins in the middle of a huge page.
        const CHUNK: u64 = MAX_SLOT_PAGES / (512 * 512) * (512 * 512);
        let end = base.checked_add(pages).filter(|_| pages != 0).ok_or(VmError::BadRange {
            as_id: 0,
            start: base,
            end: base.saturating_add(pages),
            rule: "a region has at least one page and does not wrap",
        })?;
        let mut ids = Vec::new();
        let mut at = base;
        while at < end {
            let len = CHUNK.min(end - at);
            let hva = self.side().primary.region(len, at, level, true)?;
            let id = {
                let set = self.slots();
                (0..).find(|&id| set.by_id(0, id).is_none()).unwrap_or(u16::MAX)
            };
            let region = Region { id, as_id: 0, base: at, pages: len, hva, flags: SlotFlags::default() };
            self.set_memslot(task, &region)?;
            ids.push(id);
            at += len;
        }
        Ok(ids)
    }

    /// Gives address space 1 (system management mode) the memslots of address space 0: the same gfns, backed by the same host memory, as VMMs
    /// do it (SMRAM apart, which has no contents here). Slots that space 1 has already stay. Returns the ids of the new ones.
    ///
    /// # Errors
    /// As [`Vm::set_memslot`]; slots made before the error stay.
    pub fn share_memory_with_smm(&self, task: &Task<P>) -> Result<Vec<u16>, VmError> {
        let set = self.slots();
        let mut ids = Vec::new();
        for slot in set.space(0).iter().filter(|slot| set.by_id(1, slot.id).is_none()) {
            let &MemSlot { id, base, pages, hva, flags, .. } = &**slot;
            self.set_memslot(task, &Region { id, as_id: 1, base, pages, hva, flags })?;
            ids.push(id);
        }
        Ok(ids)
    }

    /// Deletes a memslot: INVALID, fast zap, gone.
    ///
    /// # Errors
    /// [`VmError::NoSlot`], [`VmError::Closed`].
    pub fn delete_memslot(&self, task: &Task<P>, as_id: u8, id: u16) -> Result<FastZapTimes, VmError> {
        let region = Region { id, as_id, base: 0, pages: 0, hva: 0, flags: SlotFlags::default() };
        match self.set_memslot(task, &region)? {
            SlotUpdate::Deleted(times) => Ok(times),
            _ => Err(VmError::NoSlot { as_id, id }),
        }
    }
}
