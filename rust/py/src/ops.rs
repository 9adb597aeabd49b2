//! The operations of a machine beyond map and zap: memslot updates, dirty logging, aging, NX, prefaulting.
//!
//! As in `machine.rs`: plain values in, plain values and JSON out, every operation through the gate. What takes gfns and concerns the host takes those of address space 0 or
//! 1 and finds the host's own addresses by the memslots, as a person would who knows the guest and not the VMM.

use std::ops::Range;

use serde_json::json;
use tdpmmu_vm::{Paging, Region, RingEntry, SlotFlags, SlotUpdate, VmError};

use crate::error::Fault;
use crate::machine::{Machine, Slot, times_json, wrong};

/// How the host backs a new memslot.
#[derive(Clone, Copy)]
pub struct Backing {
    /// Largest page of the host there, as a level; `None` is the machine's.
    pub level: Option<u8>,
    /// May the host's pages be written?
    pub writable: bool,
    /// The slot (address space, id) whose host memory it shares.
    pub share: Option<(u8, u16)>,
}

impl Machine {
    pub fn add_memslot(&self, slot: Slot, backing: Backing) -> Result<(), Fault> {
        let _inside = self.enter("add_memslot")?;
        let (id, as_id, base, pages, readonly, log_dirty) = slot;
        let primary = &self.vm.side().primary;
        let set = self.vm.slots();
        if set.by_id(as_id, id).is_some() {
            // KVM would change or move the slot; adding one means that it is not there.
            let message = format!("slot={id}: address space {as_id} has a memslot with this id already");
            return Err(Fault::Invalid(message));
        }
        let hva = match backing.share {
            None => {
                let level = backing.level.unwrap_or(self.level);
                primary.region(pages, base, level, backing.writable).map_err(wrong)?
            }
            Some((space, other)) => {
                let no_slot =
                    || Fault::Invalid(format!("shares: address space {space} has no memslot {other}"));
                let shared = set.by_id(space, other).ok_or_else(no_slot)?;
                if pages > shared.pages {
                    let most = shared.pages;
                    return Err(Fault::Invalid(format!(
                        "npages={pages:#x}: the memslot that it shares has {most:#x}"
                    )));
                }
                shared.hva
            }
        };
        let region = Region { id, as_id, base, pages, hva, flags: SlotFlags { log_dirty, readonly } };
        let made = self.vm.set_memslot(&self.task("add_memslot"), &region).map(drop).map_err(wrong);
        if made.is_err() && backing.share.is_none() {
            primary.unregion(hva).map_err(wrong)?;
        }
        made
    }

    pub fn delete_memslot(&self, as_id: u8, id: u16) -> Result<String, Fault> {
        let _inside = self.enter("delete_memslot")?;
        self.zapping(|task| {
            let hva = self.vm.slots().by_id(as_id, id).map(|slot| slot.hva);
            let times = self.vm.delete_memslot(task, as_id, id).map_err(wrong)?;
            if let Some(hva) = hva
                && !self.vm.slots().iter().any(|slot| slot.hva == hva)
            {
                self.vm.side().primary.unregion(hva).map_err(wrong)?;
            }
            Ok(times_json(&times))
        })
    }

    /// Moves the slot, or changes its flags; what is `None` stays. `"update"` says what it came to.
    pub fn update_memslot(
        &self,
        (as_id, id): (u8, u16),
        base: Option<u64>,
        log_dirty: Option<bool>,
        readonly: Option<bool>,
    ) -> Result<String, Fault> {
        let _inside = self.enter("update_memslot")?;
        self.zapping(|task| {
            let set = self.vm.slots();
            let old = set.by_id(as_id, id).ok_or_else(|| wrong(VmError::NoSlot { as_id, id }))?;
            let flags = SlotFlags {
                log_dirty: log_dirty.unwrap_or(old.flags.log_dirty),
                readonly: readonly.unwrap_or(old.flags.readonly),
            };
            let base = base.unwrap_or(old.base);
            let region = Region { id, as_id, base, pages: old.pages, hva: old.hva, flags };
            let (update, times) = match self.vm.set_memslot(task, &region).map_err(wrong)? {
                SlotUpdate::Nothing => ("nothing", None),
                SlotUpdate::Created => ("created", None),
                SlotUpdate::Flags => ("flags", None),
                SlotUpdate::Deleted(times) => ("deleted", Some(times)),
                SlotUpdate::Moved(times) => ("moved", Some(times)),
            };
            let mut report = times.as_ref().map_or_else(|| json!({}), times_json);
            report["update"] = json!(update);
            Ok(report)
        })
    }

    pub fn share_memory_with_smm(&self) -> Result<Vec<u16>, Fault> {
        let _inside = self.enter("share_memory_with_smm")?;
        self.vm.share_memory_with_smm(&self.task("share_memory_with_smm")).map_err(wrong)
    }

    pub fn generation(&self, as_id: u8) -> Result<u64, Fault> {
        let _inside = self.enter("memslot_generation")?;
        let generations = self.vm.slots().generations;
        let found = generations.get(usize::from(as_id)).copied();
        found.ok_or_else(|| Fault::Invalid(format!("as_id={as_id}: there are two address spaces, 0 and 1")))
    }

    pub fn set_smm(&self, vcpu: usize, on: bool) -> Result<(), Fault> {
        let _inside = self.enter("set_smm")?;
        let mut vcpu = self.vm.vcpu(vcpu).map_err(wrong)?;
        if on {
            vcpu.enter_smm()
        } else {
            vcpu.exit_smm()
        }
        Ok(())
    }

    pub fn in_smm(&self, vcpu: usize) -> Result<bool, Fault> {
        let _inside = self.enter("in_smm")?;
        Ok(self.vm.vcpu(vcpu).map_err(wrong)?.in_smm())
    }

    /// The host's addresses behind gfns of one address space, slot by slot.
    fn hvas(&self, as_id: u8, gfns: &Range<u64>) -> Result<Vec<Range<u64>>, Fault> {
        let set = self.vm.slots();
        let (mut found, mut at) = (Vec::new(), gfns.start);
        while at < gfns.end {
            let Some(slot) = set.find(as_id, at) else {
                let (start, end) = (at, gfns.end);
                return Err(wrong(VmError::BadRange { as_id, start, end, rule: "no memslot covers it" }));
            };
            let end = slot.gfns().end.min(gfns.end);
            found.push(slot.hva_of(at)..slot.hva_of(at) + (end - at));
            at = end;
        }
        Ok(found)
    }

    pub fn promote(&self, gfns: Range<u64>, level: u8) -> Result<u64, Fault> {
        let _inside = self.enter("promote")?;
        if gfns.is_empty() {
            return Ok(0);
        }
        self.vm.promote_gfns(&self.task("promote"), gfns, level).map_err(wrong)
    }

    /// Another host page behind one gfn; its frame.
    pub fn replace_page(&self, as_id: u8, gfn: u64, writable: bool) -> Result<u64, Fault> {
        let _inside = self.enter("replace_page")?;
        let hvas = self.hvas(as_id, &(gfn..gfn + 1))?;
        self.vm.set_host_page(&self.task("replace_page"), hvas[0].start, writable).map_err(wrong)
    }

    /// Takes Accessed away; whether some leaf had it.
    pub fn age(&self, as_id: u8, gfns: Range<u64>, flush: bool) -> Result<bool, Fault> {
        let _inside = self.enter("age")?;
        let task = self.task("age");
        let mut young = false;
        for hvas in self.hvas(as_id, &gfns)? {
            let found = if flush {
                self.vm.notifier_age_flush(&task, hvas)
            } else {
                self.vm.notifier_age(&task, hvas)
            };
            young |= found.map_err(wrong)?;
        }
        Ok(young)
    }

    pub fn test_age(&self, as_id: u8, gfns: Range<u64>) -> Result<bool, Fault> {
        let _inside = self.enter("test_age")?;
        let task = self.task("test_age");
        let mut young = false;
        for hvas in self.hvas(as_id, &gfns)? {
            young |= self.vm.notifier_test_age(&task, hvas).map_err(wrong)?;
        }
        Ok(young)
    }

    /// One answer a gfn, as a byte.
    pub fn age_batch(&self, as_id: u8, gfns: &[u64], clear: bool) -> Result<Vec<u8>, Fault> {
        let _inside = self.enter("age_batch")?;
        let task = self.task("age");
        let set = self.vm.slots();
        let mut young = Vec::with_capacity(gfns.len());
        for &gfn in gfns {
            let Some(slot) = set.find(as_id, gfn) else {
                let (start, end) = (gfn, gfn + 1);
                return Err(wrong(VmError::BadRange { as_id, start, end, rule: "no memslot covers it" }));
            };
            let hvas = slot.hva_of(gfn)..slot.hva_of(gfn) + 1;
            let found = if clear {
                self.vm.notifier_age(&task, hvas)
            } else {
                self.vm.notifier_test_age(&task, hvas)
            };
            young.push(u8::from(found.map_err(wrong)?));
        }
        Ok(young)
    }

    /// The host tells that the page behind `gfn` of address space 0 is what it is, mapped writable or not.
    pub fn change_pte(&self, gfn: u64, writable: bool) -> Result<bool, Fault> {
        let _inside = self.enter("change_pte")?;
        let profile = self.vm.mmu().profile();
        if !profile.set_spte_gfn {
            return Err(wrong(VmError::Unsupported { what: "change_pte", kernel: profile.name }));
        }
        let mut changed = false;
        for hvas in self.hvas(0, &(gfn..gfn + 1))? {
            // Without a page there is nothing that the host could put in the place of another one.
            if let Some(page) = self.vm.side().primary.lookup(hvas.start) {
                let task = self.task("change_pte");
                let done =
                    self.vm.notifier_change_pte(&task, hvas.start, page.pfn, writable && page.writable);
                changed |= done.map_err(wrong)?;
            }
        }
        Ok(changed)
    }

    pub fn enable_dirty_log_protect(&self, manual: bool, initially_set: bool) -> Result<(), Fault> {
        let _inside = self.enter("enable_dirty_log_protect")?;
        let task = self.task("enable_dirty_log_protect");
        self.vm.enable_dirty_log_protect(&task, manual, initially_set).map_err(wrong)
    }

    pub fn set_eager_page_split(&self, on: bool) -> Result<(), Fault> {
        let _inside = self.enter("set_eager_page_split")?;
        self.vm.set_eager_page_split(on);
        Ok(())
    }

    /// First gfn, pages, and the bitmap's words.
    pub fn get_dirty_log(&self, as_id: u8, id: u16) -> Result<(u64, u64, Vec<u64>), Fault> {
        let _inside = self.enter("get_dirty_log")?;
        let log = self.vm.get_dirty_log(&self.task("get_dirty_log"), as_id, id).map_err(wrong)?;
        Ok((log.base, log.pages, log.words))
    }

    pub fn clear_dirty_log(
        &self,
        (as_id, id): (u8, u16),
        first: u64,
        pages: u64,
        words: &[u64],
    ) -> Result<u64, Fault> {
        let _inside = self.enter("clear_dirty_log")?;
        let task = self.task("clear_dirty_log");
        self.vm.clear_dirty_log(&task, as_id, id, first, pages, words).map_err(wrong)
    }

    pub fn dirty_ring(&self, vcpu: usize) -> Result<Vec<[u64; 3]>, Fault> {
        let _inside = self.enter("dirty_ring")?;
        let row = |entry: RingEntry| [u64::from(entry.slot), u64::from(entry.as_id), entry.offset];
        Ok(self.vm.dirty_ring(vcpu).map_err(wrong)?.into_iter().map(row).collect())
    }

    pub fn reset_dirty_rings(&self) -> Result<u64, Fault> {
        let _inside = self.enter("reset_dirty_rings")?;
        self.vm.reset_dirty_rings(&self.task("reset_dirty_rings")).map_err(wrong)
    }

    /// `"changed"` false: it was so already.
    pub fn set_nx_huge_pages(&self, on: bool) -> Result<String, Fault> {
        let _inside = self.enter("set_nx_huge_pages")?;
        self.zapping(|task| {
            let times = self.vm.set_nx_huge_pages(task, on).map_err(wrong)?;
            let mut report = times.as_ref().map_or_else(|| json!({}), times_json);
            report["changed"] = json!(times.is_some());
            Ok(report)
        })
    }

    pub fn nx_huge_pages(&self) -> Result<bool, Fault> {
        let _inside = self.enter("nx_huge_pages")?;
        Ok(self.vm.mmu().nx_huge_pages())
    }

    pub fn recover_nx(&self, ratio: u32) -> Result<u64, Fault> {
        let _inside = self.enter("recover_nx")?;
        if self.vm.paging() != Paging::Tdp {
            // The kernel's recovery of shadow pages is not modelled: a zap of what the mitigation has split.
            return Err(wrong(VmError::NeedsTdp { what: "NX huge page recovery" }));
        }
        self.vm.recover_nx(&self.task("recover_nx"), ratio).map_err(wrong)
    }

    pub fn set_slot_zap_all(&self, on: bool) -> Result<(), Fault> {
        let _inside = self.enter("set_slot_zap_all")?;
        self.vm.set_slot_zap_all(on).map_err(wrong)
    }

    pub fn zap_gfn_range(&self, gfns: Range<u64>) -> Result<String, Fault> {
        let _inside = self.enter("zap_gfn_range")?;
        self.zapping(|task| {
            self.vm.zap_gfn_range(task, gfns).map_err(wrong)?;
            Ok(json!({}))
        })
    }

    pub fn write_protect_gfn(&self, as_id: u8, gfn: u64) -> Result<bool, Fault> {
        let _inside = self.enter("write_protect_gfn")?;
        self.vm.write_protect_gfn(&self.task("write_protect_gfn"), as_id, gfn).map_err(wrong)
    }

    pub fn pre_fault(&self, vcpu: usize, gfns: Range<u64>) -> Result<u64, Fault> {
        let _inside = self.enter("pre_fault")?;
        self.vm.vcpu(vcpu).map_err(wrong)?.pre_fault(gfns).map_err(wrong)
    }
}
