//! O-MODEL at a quiet point, against the operations: every leaf is what memslots and host, in the state that all operations have left them in, make of it.
//!
//! **Guarantee.** After [`Judge::check_vm`] without a finding: each leaf lies in one memslot that is not going, is no larger than the slot's alignment and the host's page allow, maps each of its gfns to the
//! frame that the host maps there now, and is writable only where both allow it. Each guest write to a page of a slot that logs, which no returned log covers, is marked in the log.
//!
//! **Mechanism.** Memslots and the host's page tables are changed under their own locks and hold no trace of the MMU: their state *is* what the operations, in the order in which they took effect, come
//! to. So the comparison needs no replay of a log of operations, and none of the reports.
//!
//! **What it cannot see.** What is missing from the tree: a mapping that is not there is faulted in again. That a zap has removed what it promised is O-FZ's and `history.rs`' to say.

use tdpmmu_mmu::TdpMmu;
use tdpmmu_platform::{NO_TASK, Platform, Task};
use tdpmmu_shadow::ShadowMmu;
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::span;
use tdpmmu_vm::Vm;

use crate::judge::Judge;
use crate::model::Key;
use crate::rule::Rule;
use crate::tree::Tree;
use crate::verdict::{Verdict, Violation};

impl Judge {
    /// A quiet point of a whole VM: [`Judge::check_quiet`], then its tree against memslots and host, and the log against what guests wrote. No vCPU may be in the guest. Not for a VM whose faults
    /// were given the answers of a recorded host.
    pub fn check_vm<P: Platform>(&self, vm: &Vm<P>, task: &Task<P>) {
        self.check_quiet(vm.mmu(), task);
        let tree = {
            let guard = vm.mmu().lock.write(task);
            // What is wrong with the tree itself has been told.
            Tree::read(vm.mmu(), &guard, &mut Verdict::default())
        };
        for (key, spte) in &tree.entries {
            if spte.is_leaf(key.level)
                && let Some((rule, what)) = wrong_leaf(vm, vm.mmu(), key, *spte)
            {
                self.found(rule, Some(key.root), key.gfn, what, NO_TASK, None);
            }
        }
        if let Some(shadow) = vm.shadow() {
            self.check_shadow_of(vm, shadow, task, &tree);
        }
        let slots = vm.slots();
        for write in self.pending_writes() {
            let slot = slots.find(write.as_id, write.gfn);
            if slot.and_then(|slot| slot.dirty.as_ref()).is_some_and(|log| log.is_marked(write.gfn)) {
                continue;
            }
            let what =
                format!("a write to gfn {:#x} of address space {} is in no log", write.gfn, write.as_id);
            let owed = "a mark in the log, or a report that ended after the write";
            self.found(Rule::WriteLost, None, write.gfn, what, write.task, Some(owed));
        }
    }

    /// The shadow MMU; its leaves against memslots and host; and that L1's TDP tables do not let it write to what is shadowed for its L2.
    fn check_shadow_of<P: Platform>(&self, vm: &Vm<P>, shadow: &ShadowMmu<P>, task: &Task<P>, tdp: &Tree) {
        let view = {
            let guard = vm.mmu().lock.write(task);
            self.check_shadow(shadow, &guard)
        };
        for (at, page, leaf, gfn) in view.leaves() {
            let key = Key { as_id: page.as_id, root: at.0, gfn, level: page.role.level() };
            if let Some((rule, what)) = wrong_leaf(vm, vm.mmu(), &key, leaf) {
                self.found(rule, Some(at.0), gfn, what, NO_TASK, None);
            }
        }
        for (as_id, gfn) in view.tracked() {
            let format = vm.mmu().format();
            let writes = |leaf: Spte| format.is_writable(leaf) || format.is_mmu_writable(leaf);
            let leaf = tdp.entries.iter().find(|(key, spte)| {
                key.as_id == as_id && key.covers(gfn) && spte.is_leaf(key.level) && writes(**spte)
            });
            if let Some((key, spte)) = leaf {
                let what =
                    format!("{:#x} at level {} may write a table that is shadowed", spte.raw(), key.level);
                self.found(Rule::TrackedWritable, Some(key.root), gfn, what, NO_TASK, None);
            }
        }
    }

    fn found(
        &self,
        rule: Rule,
        root: Option<u32>,
        gfn: u64,
        what: String,
        task: u32,
        obligation: Option<&str>,
    ) {
        let obligation = obligation.map(str::to_owned);
        self.note(Violation { rule, what, task, made_by: None, obligation, root, gfn: Some(gfn) });
    }
}

fn wrong_leaf<P: Platform>(vm: &Vm<P>, mmu: &TdpMmu<P>, key: &Key, leaf: Spte) -> Option<(Rule, String)> {
    let (format, gfns) = (mmu.format(), key.gfn..key.gfn + span(key.level));
    let text = format!("{:#x} at level {}", leaf.raw(), key.level);
    let slots = vm.slots();
    let slot = match slots.find(key.as_id, key.gfn) {
        Some(slot) if !slot.invalid && gfns.end <= slot.base + slot.pages => slot,
        Some(slot) if slot.invalid => {
            return Some((Rule::SlotDiffers, format!("{text} in a slot that is going")));
        }
        Some(_) => return Some((Rule::SlotDiffers, format!("{text} reaches beyond its slot"))),
        None => return Some((Rule::SlotDiffers, format!("{text} where no slot is"))),
    };
    // Huge leaves of the time before logging may stay, until somebody writes; those of the time before a table below was shadowed are write-protected, and stay.
    if key.level > slot.max_level(key.gfn) && !slot.flags.log_dirty && vm.shadow().is_none() {
        return Some((Rule::SlotDiffers, format!("{text} is larger than its slot allows")));
    }
    let step = (span(key.level) / 8).max(1);
    for gfn in gfns.step_by(step as usize) {
        let Some(page) = vm.side().primary.lookup(slot.hva_of(gfn)) else {
            return Some((Rule::HostDiffers, format!("{text} maps gfn {gfn:#x}, which the host does not")));
        };
        let maps = (leaf.pfn() & !(span(key.level) - 1)) + (gfn - key.gfn);
        if maps != page.pfn {
            let what = format!("{text} maps gfn {gfn:#x} to frame {maps:#x}, the host to {:#x}", page.pfn);
            return Some((Rule::HostDiffers, what));
        }
        if key.level > page.level {
            return Some((Rule::HostDiffers, format!("{text} is larger than the host's page")));
        }
        if format.is_writable(leaf) && (slot.flags.readonly || !page.writable) {
            return Some((Rule::HostDiffers, format!("{text} is writable, slot or host are not")));
        }
    }
    None
}
