//! Canaries of the audit: a small VM on shadow pages, read whole, and the copy damaged; or the tables themselves.

use std::collections::BTreeSet;
use std::sync::Arc;

use tdpmmu_oracle::{Check, Judge, Order, Rule, Rules, ShadowView, Verdict};
use tdpmmu_platform::{Platform, Real, Role, Site};
use tdpmmu_spte::{KernelProfile, Spte};
use tdpmmu_vm::{GuestAccess, GuestOs, Paging, Vm, VmConfig};

use super::super::common::silenced;
use super::super::{Canary, format};

const TABLES: u64 = 0x80000;

/// A VM whose guest's own tables are shadowed, with the pages at 5 and 0x201 mapped; and its judge.
fn machine() -> (Vm<Real>, Arc<Judge>) {
    let profile = KernelProfile::named("6.12").expect("known");
    let mut config =
        VmConfig { max_tables: 256, hugepages: false, host_pages: 1 << 18, ..VmConfig::new(profile) };
    config.design = Some("shadow-gen".into());
    config.shadow.paging = Paging::Guest;
    let rules = Rules::of(&profile, config.format.with_maxphyaddr(config.maxphyaddr), "shadow-gen");
    let rules = Rules { silenced: silenced(), order: Order::True, check: Check::Full, ..rules };
    let judge = Judge::new(rules.virtual_gfns(true));
    config.observer = Some(judge.clone());
    let vm = Vm::new(config).expect("a small VM");
    let task = vm.task("setup", Role::Caller);
    vm.add_memory(&task, 0, 1024, 1).expect("memory");
    vm.add_memory(&task, TABLES, 64, 1).expect("memory");
    drop(task);
    let os = GuestOs::new(0, TABLES..TABLES + 64);
    let cr3 = os.new_process(&vm).expect("a process");
    os.build_linear(&vm, cr3, 0..1024, 0, 1).expect("mapped");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_cr3(cr3).expect("shadowed");
    vcpu.access(GuestAccess::write(5)).expect("mapped");
    vcpu.access(GuestAccess::write(0x201)).expect("mapped");
    drop(vcpu);
    (vm, judge)
}

/// What a copy of everything shows after `damage`; nothing before.
fn copied(damage: impl FnOnce(&mut ShadowView)) -> BTreeSet<Rule> {
    let (vm, judge) = machine();
    let task = vm.task("judge", Role::Observer);
    let guard = vm.mmu().lock.write(&task);
    let mut view = ShadowView::read(vm.shadow().expect("a shadow design"), &guard);
    drop(guard);
    let found = |view: &ShadowView| {
        let mut verdict = Verdict::silencing(silenced());
        view.judge(judge.rules(), None, &mut verdict);
        verdict.violations().iter().map(|v| v.rule).collect::<BTreeSet<_>>()
    };
    assert_eq!(found(&view), BTreeSet::new(), "before the damage");
    damage(&mut view);
    found(&view)
}

/// What the check of the whole VM shows when the leaf of gfn 5 holds something else.
fn poked(value: impl FnOnce(u64) -> u64) -> BTreeSet<Rule> {
    let (vm, judge) = machine();
    let task = vm.task("judge", Role::Observer);
    judge.check_vm(&vm, &task);
    assert_eq!(judge.violations(), [], "before the damage");
    let shadow = vm.shadow().expect("a shadow design");
    let at = {
        let guard = vm.mmu().lock.write(&task);
        shadow.rmap_of(&guard, 0, 5, 1)[0]
    };
    let cell = &shadow.pool().entries(at.0)[usize::from(at.1)];
    Real::store(cell, value(Real::load(cell, Site::SpteRead)), Site::SpteZap);
    judge.check_vm(&vm, &task);
    judge.violations().into_iter().map(|v| v.rule).collect()
}

/// A page that is no root, and shadows a guest's lowest table.
fn lowest(view: &ShadowView) -> u32 {
    let page = view.pages.values().find(|page| page.role.level() == 1).expect("leaves are mapped");
    page.table
}

pub const TOLD: &[Canary] = &[
    ("a leaf that its reverse map does not name", Rule::RmapDiffers, || {
        copied(|view| drop(view.rmaps.pop_first()))
    }),
    ("a leaf disappears from a shadow page", Rule::RmapDiffers, || poked(|_| format().empty().raw())),
    ("a leaf of a shadow page was told otherwise", Rule::TreeDiffers, || poked(|_| format().empty().raw())),
    ("a shadow leaf maps another frame than the host", Rule::HostDiffers, || poked(|leaf| leaf + (64 << 12))),
    ("a page that does not know its parent", Rule::ParentsDiffer, || {
        copied(|view| {
            let page = lowest(view);
            view.pages.get_mut(&page).expect("there").parents.clear();
        })
    }),
    ("an entry that names no page", Rule::ParentsDiffer, || {
        copied(|view| {
            let page = lowest(view);
            view.pages.remove(&page);
        })
    }),
    ("a page that is not on the active list", Rule::PagesDiffer, || {
        copied(|view| {
            view.active.pop();
        })
    }),
    ("an invalid page on the active list", Rule::PagesDiffer, || {
        copied(|view| {
            let page = lowest(view);
            view.pages.get_mut(&page).expect("there").invalid = true;
        })
    }),
    ("a leaf in an invalid page", Rule::CreatedUnderInvalid, || {
        copied(|view| {
            let page = lowest(view);
            view.pages.get_mut(&page).expect("there").invalid = true;
        })
    }),
    ("an unsync page that its parents do not know of", Rule::UnsyncDiffers, || {
        copied(|view| {
            let page = lowest(view);
            view.pages.get_mut(&page).expect("there").unsync = true;
        })
    }),
    ("a shadowed table that can be written", Rule::TrackedWritable, || {
        copied(|view| {
            let (_, table) = view.tracked().next().expect("the guest's tables are shadowed");
            let writable = |spte: &Spte| format().is_writable(*spte);
            let at = view.gfns.keys().find(|at| view.entries.get(*at).is_some_and(writable)).copied();
            view.gfns.insert(at.expect("a page was written"), table);
        })
    }),
    ("a huge frame with a reason too many", Rule::LpageDiffers, || {
        copied(|view| *view.slots[0].reasons.entry((2, 0)).or_default() += 1)
    }),
    ("a memslot that went before what refers to it", Rule::SlotBooksGone, || {
        copied(|view| view.slots.clear())
    }),
    ("an obsolete page below a root in use", Rule::ObsoleteReachable, || {
        copied(|view| {
            let page = lowest(view);
            view.pages.get_mut(&page).expect("there").obsolete = true;
        })
    }),
    ("shadow pages that are counted twice", Rule::StatsDiffer, || copied(|view| view.counts.pages += 1)),
];
