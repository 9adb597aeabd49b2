//! The NX huge-page mitigation, kernel by kernel: what a fetch builds, which tables become candidates, how recovery takes them back.

mod common;
#[path = "common/heard.rs"]
mod heard;
#[path = "common/staged.rs"]
mod staged;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use common::{Cpu, Setup, end, fast_zap};
use heard::{Ear, Heard, bare};
use proptest::prelude::*;
use staged::{Staged, stage, unstage};
use tdpmmu_mmu::{MapFault, MapOutcome, TdpMmu};
use tdpmmu_platform::{Platform, Real, Role, Site};
use tdpmmu_spte::{Format, FormatKind, KernelProfile, LockMode, Spte};

const NX: u64 = 1 << 63;
const HUGE: u64 = 512;
const PROFILES: [&str; 9] = ["5.15", "5.18", "6.1-async", "6.1", "6.6", "6.9", "6.12", "6.18", "7.2"];

/// An MMU whose mitigation is on, and who listens.
fn mitigated<P: Platform>(profile: &'static str, force_yield: Option<u32>) -> (Arc<TdpMmu<P>>, Arc<Ear>) {
    let ear = Ear::new();
    let setup = Setup { profile, force_yield, batch: 1, observer: Some(ear.clone()), ..Setup::default() };
    let mmu = setup.build_on(ear.clone()).expect("a small pool");
    mmu.set_nx_huge_pages(true);
    (mmu, ear)
}

fn frozen(profile: &str) -> u64 {
    KernelProfile::named(profile).expect("known").format_frozen
}

fn nonpresent(profile: &str) -> u64 {
    KernelProfile::named(profile).expect("known").format_nonpresent
}

/// A fetch that slot and host would let a page of `req_level` serve.
fn fetch(gfn: u64, req_level: u8) -> MapFault {
    MapFault {
        write: false,
        exec: true,
        goal_level: 1,
        req_level,
        huge_page_disallowed: true,
        ..MapFault::page(gfn, 0x10_0000 + gfn, 1)
    }
}

fn done<P: Platform>(cpu: Cpu<P>) {
    let mut cpu = cpu;
    let task = cpu.mmu.task("caller", Role::Caller);
    fast_zap(&cpu.mmu, &task);
    assert_eq!(cpu.mmu.nx_candidates(), [], "a zapped table is no candidate");
    assert_eq!(cpu.mmu.nx_splits(), 0);
    cpu.drop_root();
    drop(task);
    let mmu = cpu.close();
    end(&mmu);
}

#[test]
fn a_huge_leaf_under_the_mitigation_is_not_executable_and_a_small_one_is() {
    for profile in PROFILES {
        let (mmu, ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        assert!(matches!(cpu.fault(0, 2), MapOutcome::Fixed { level: 2, .. }));
        assert_eq!(ear.sptes().last(), Some(&(0, 2, nonpresent(profile), NX | 0xee7)), "{profile}");
        assert!(matches!(cpu.fault(HUGE, 1), MapOutcome::Fixed { level: 1, .. }));
        assert_eq!(ear.sptes().last(), Some(&(HUGE, 1, nonpresent(profile), 0xe67)), "{profile}");
        mmu.set_nx_huge_pages(false);
        assert!(matches!(cpu.fault(2 * HUGE, 2), MapOutcome::Fixed { level: 2, .. }));
        assert_eq!(ear.sptes().last(), Some(&(2 * HUGE, 2, nonpresent(profile), 0xee7)), "{profile}: off");
        done(cpu);
    }
}

#[test]
fn on_ept_a_huge_leaf_under_the_mitigation_lacks_x_and_its_split_children_have_it() {
    for profile in ["6.1", "6.12", "7.2"] {
        let format = KernelProfile::named(profile).expect("known").format(FormatKind::Ept);
        let mmu = Setup { profile, format: Some(format), ..Setup::default() }.build();
        mmu.set_nx_huge_pages(true);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(0, 2);
        let (huge, level) = mmu.lookup(&cpu.task, cpu.root, 0).expect("mapped");
        assert!(level == 2 && !format.is_executable(huge) && format.allows(huge, true, false), "{profile}");
        cpu.map(&fetch(3, 2));
        let (small, level) = mmu.lookup(&cpu.task, cpu.root, 3).expect("mapped");
        assert!(level == 1 && format.is_executable(small), "{profile}");
        done(cpu);
    }
}

#[test]
fn a_fetch_on_an_nx_huge_leaf_zaps_and_relinks_up_to_6_1_and_splits_since() {
    for profile in PROFILES {
        let (mmu, ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(0, 2);
        ear.take();
        let outcome = cpu.map(&fetch(3, 2));
        let expected: &[(u64, u8, u64, u64)] = match profile {
            "5.15" | "5.18" | "6.1-async" | "6.1" => {
                &[(0, 2, NX | 0xee7, 0x5a0), (0, 2, 0, 0x827), (3, 1, 0, 0xe67)]
            }
            // The silent child is writable already, so the re-make drops D.
            "6.6" | "6.9" | "6.12" => &[(0, 2, NX | 0xee7, 0x827), (3, 1, 0xe67, 0xe27)],
            // What allows the fetch is left as it is.
            _ => &[(0, 2, NX | 0xee7, 0x827)],
        };
        assert_eq!(ear.sptes(), expected, "{profile}");
        assert_eq!(outcome == MapOutcome::Spurious, matches!(profile, "6.18" | "7.2"), "{profile}");
        assert_eq!(mmu.leaf_pages()[1], 0, "{profile}");
        let small = if expected.len() == 3 { 1 } else { 512 };
        assert_eq!(
            mmu.leaf_pages()[0],
            small,
            "{profile}: children of a split are counted, zapped ones are gone"
        );
        assert_eq!(mmu.nx_candidates(), [(0, 1)], "{profile}");
        done(cpu);
    }
}

#[test]
fn candidates_are_the_tables_that_a_huge_page_could_have_replaced() {
    for profile in PROFILES {
        for (req_level, expected) in [(1, vec![]), (2, vec![(0, 1)]), (3, vec![(0, 2), (0, 1)])] {
            let (mmu, _ear) = mitigated::<Real>(profile, None);
            let mut cpu = Cpu::new(&mmu);
            assert!(matches!(cpu.map(&fetch(5, req_level)), MapOutcome::Fixed { level: 1, .. }));
            assert_eq!(mmu.nx_candidates(), expected, "{profile}, {req_level}");
            assert_eq!(mmu.nx_splits(), expected.len() as u64);
            // A table that is there already is not made a candidate by a later fetch.
            cpu.map(&fetch(6, 3));
            assert_eq!(mmu.nx_candidates(), expected, "{profile}, {req_level}");
            done(cpu);
        }
    }
}

#[test]
fn data_faults_and_the_mitigation_off_make_no_candidates() {
    let (mmu, _ear) = mitigated::<Real>("6.12", None);
    let mut cpu = Cpu::new(&mmu);
    cpu.fault(0, 1);
    let data = MapFault { req_level: 2, ..MapFault::page(HUGE, 0x10_0000 + HUGE, 1) };
    cpu.map(&data);
    mmu.set_nx_huge_pages(false);
    let fetch = MapFault { huge_page_disallowed: false, ..fetch(2 * HUGE, 2) };
    cpu.map(&fetch);
    assert_eq!(mmu.nx_candidates(), []);
    done(cpu);
}

#[test]
fn candidates_stand_in_the_order_of_their_links() {
    for profile in PROFILES {
        let (mmu, _ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        for region in [5, 2, 9, 1] {
            cpu.map(&fetch(region * HUGE, 2));
        }
        let gfns = |regions: &[u64]| regions.iter().map(|r| (r * HUGE, 1)).collect::<Vec<_>>();
        assert_eq!(mmu.nx_candidates(), gfns(&[5, 2, 9, 1]), "{profile}");
        assert_eq!(mmu.recover_nx(&cpu.task, 2, &|_, _| false), 2);
        assert_eq!(mmu.nx_candidates(), gfns(&[9, 1]), "{profile}: the oldest went first");
        cpu.map(&fetch(5 * HUGE, 2));
        assert_eq!(mmu.nx_candidates(), gfns(&[9, 1, 5]), "{profile}");
        done(cpu);
    }
}

#[test]
fn a_huge_mapping_steps_down_to_the_table_that_a_fetch_made() {
    for profile in PROFILES {
        let (mmu, ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.map(&fetch(3, 2));
        ear.take();
        let guard_level = {
            mmu.top_up(&cpu.task, &mut cpu.cache).expect("tables");
            let mut guard = mmu.lock.read(&cpu.task);
            mmu.map_at(&mut guard, &mut cpu.cache, cpu.root, &MapFault::page(7, 0x10_0007, 2)).1
        };
        assert_eq!(guard_level, 1, "{profile}: the level reached is told");
        assert_eq!(ear.sptes(), [(7, 1, nonpresent(profile), 0xe67)], "{profile}");
        let (leaf, _) = mmu.lookup(&cpu.task, cpu.root, 7).expect("mapped");
        assert_eq!(leaf.pfn(), 0x10_0007, "the frame of the gfn itself");
        done(cpu);
    }
}

#[test]
fn a_goal_of_1g_steps_down_twice() {
    let (mmu, _ear) = mitigated::<Real>("6.12", None);
    let mut cpu = Cpu::new(&mmu);
    cpu.map(&fetch(3, 3));
    assert!(matches!(cpu.fault(9, 3), MapOutcome::Fixed { level: 1, .. }));
    // In another 2 MiB of that GiB the table of 2 MiB leaves is all that stands in the way.
    assert!(matches!(cpu.fault(HUGE + 9, 3), MapOutcome::Fixed { level: 2, .. }));
    let (leaf, level) = mmu.lookup(&cpu.task, cpu.root, HUGE + 9).expect("mapped");
    assert_eq!((leaf.pfn(), level), (0x10_0000 + HUGE, 2));
    done(cpu);
}

#[test]
fn a_table_that_no_fetch_made_blocks_huge_pages_up_to_6_1_only() {
    // Bug-history 42: the step down did not ask whose table it was.
    for profile in PROFILES {
        for on in [true, false] {
            let (mmu, _ear) = mitigated::<Real>(profile, None);
            mmu.set_nx_huge_pages(on);
            let mut cpu = Cpu::new(&mmu);
            cpu.fault(3, 1);
            let blocks = on && matches!(profile, "5.15" | "5.18" | "6.1-async" | "6.1");
            let level = if blocks { 1 } else { 2 };
            assert!(
                matches!(cpu.fault(7, 2), MapOutcome::Fixed { level: l, .. } if l == level),
                "{profile}, {on}"
            );
            done(cpu);
        }
    }
}

#[test]
fn a_run_of_huge_leaves_stops_before_a_table_that_is_kept() {
    let (mmu, _ear) = mitigated::<Real>("6.12", None);
    let mut cpu = Cpu::new(&mmu);
    cpu.map(&fetch(3, 2));
    mmu.top_up(&cpu.task, &mut cpu.cache).expect("tables");
    let first = MapFault::page(0, 0x10_0000, 2);
    {
        let mut guard = mmu.lock.read(&cpu.task);
        assert_eq!(mmu.map_range(&mut guard, &mut cpu.cache, cpu.root, &first, 4), Ok(0));
    }
    assert_eq!(mmu.leaf_pages(), [1, 0, 0]);
    done(cpu);
}

/// The changes that the recovery of one table with leaves at gfns 3 and 4 makes.
fn recovery_of_two(profile: &str) -> Vec<Heard> {
    let (n, f) = (nonpresent(profile), frozen(profile));
    let kernel = KernelProfile::named(profile).expect("known");
    let shared = kernel.nx_recovery_lock == LockMode::Shared;
    let parent = Heard::Spte(0, 2, 0x827, n, shared);
    let children = (0..512).filter_map(|gfn| match gfn {
        3 | 4 => Some(Heard::Spte(gfn, 1, 0xe67, f, shared)),
        _ => shared.then_some(Heard::Spte(gfn, 1, n, f, true)),
    });
    let mut all: Vec<Heard> = children.collect();
    all.insert(if kernel.children_before_parent_events { all.len() } else { 0 }, parent);
    all
}

#[test]
fn recovery_removes_present_children_under_the_exclusive_lock_and_all_of_them_under_the_shared_one() {
    for profile in PROFILES {
        let (mmu, ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.map(&fetch(3, 2));
        cpu.map(&fetch(4, 2));
        ear.take();
        let task = mmu.task("kvm-nx-lpage-re", Role::Worker);
        assert_eq!(mmu.recover_nx(&task, 1, &|_, _| false), 1);
        let heard = ear.take();
        let changes: Vec<_> = heard.iter().filter(|h| matches!(h, Heard::Spte(..))).cloned().collect();
        assert_eq!(changes, recovery_of_two(profile), "{profile}");
        let flushes = heard.iter().filter(|h| matches!(h, Heard::Flush(_))).count();
        assert_eq!(flushes, 1, "{profile}: one for the batch");
        assert_eq!((mmu.leaf_pages(), mmu.nx_splits()), ([0; 3], 0), "{profile}");
        // The guest may have it huge again, without X.
        assert!(matches!(cpu.fault(7, 2), MapOutcome::Fixed { level: 2, .. }), "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn recovery_of_several_tables_owes_one_flush_and_none_without_candidates() {
    for profile in PROFILES {
        let (mmu, ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        for region in 0..4 {
            cpu.map(&fetch(region * HUGE, 2));
        }
        ear.take();
        let task = mmu.task("kvm-nx-lpage-re", Role::Worker);
        assert_eq!(mmu.recover_nx(&task, 10, &|_, _| false), 4, "{profile}: no more than there are");
        assert!(matches!(ear.take().last(), Some(Heard::Flush(None))), "{profile}");
        assert_eq!(mmu.recover_nx(&task, 10, &|_, _| false), 0);
        assert_eq!(ear.take(), [], "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn recovery_flushes_before_each_yield() {
    // Bug-history 2 and 3: the flush was owed over the yield, or overwritten by the next table's answer.
    for profile in PROFILES {
        let (mmu, ear) = mitigated::<Real>(profile, Some(1));
        let mut cpu = Cpu::new(&mmu);
        for region in 0..3 {
            cpu.map(&fetch(region * HUGE, 2));
        }
        ear.take();
        let task = mmu.task("kvm-nx-lpage-re", Role::Worker);
        assert_eq!(mmu.recover_nx(&task, 3, &|_, _| false), 3);
        assert_eq!(task.meter().yields.get(), 3, "{profile}");
        let flushes = ear.take().iter().filter(|h| matches!(h, Heard::Flush(_))).count();
        assert_eq!(flushes, 3, "{profile}: one before each");
        drop(task);
        done(cpu);
    }
}

#[test]
fn tables_of_logged_slots_are_struck_off_from_6_6_on_and_zapped_before() {
    for profile in PROFILES {
        let (mmu, ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.map(&fetch(3, 2));
        cpu.map(&fetch(HUGE + 3, 2));
        ear.take();
        let task = mmu.task("kvm-nx-lpage-re", Role::Worker);
        let zapped = mmu.recover_nx(&task, 2, &|as_id, gfn| as_id == 0 && gfn == 0);
        let looks = !matches!(profile, "5.15" | "5.18" | "6.1-async" | "6.1");
        assert_eq!(zapped, if looks { 1 } else { 2 }, "{profile}");
        assert_eq!(mmu.nx_candidates(), [], "{profile}");
        assert_eq!(mmu.lookup(&task, cpu.root, 3).is_some(), looks, "{profile}: still mapped");
        // Its flag is gone with it: a table like any other does not stop a huge page, where kernels ask.
        assert!(matches!(cpu.fault(7, 2), MapOutcome::Fixed { level: 2, .. }), "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn recovery_names_the_address_space_of_the_table() {
    // Bug-history 34: the slot was looked up in the address space of whoever came by.
    for profile in PROFILES {
        let (mmu, _ear) = mitigated::<Real>(profile, None);
        let mut smm = Cpu::of_space(&mmu, 1);
        smm.map(&MapFault { as_id: 1, ..fetch(3, 2) });
        let mut cpu = Cpu::new(&mmu);
        cpu.map(&fetch(3, 2));
        let task = mmu.task("kvm-nx-lpage-re", Role::Worker);
        let asked = RefCell::new(Vec::new());
        mmu.recover_nx(&task, 2, &|as_id, gfn| {
            asked.borrow_mut().push((as_id, gfn));
            as_id == 1
        });
        if mmu.profile().nx_skips_dirty_slots {
            assert_eq!(*asked.borrow(), [(1, 0), (0, 0)], "{profile}");
            assert!(mmu.lookup(&task, smm.root, 3).is_some() && mmu.lookup(&task, cpu.root, 3).is_none());
        } else {
            assert!(asked.borrow().is_empty(), "{profile}: nobody asks");
        }
        drop(task);
        smm.drop_root();
        smm.close();
        done(cpu);
    }
}

#[test]
fn up_to_5_17_recovery_zaps_the_gfns_under_every_root_and_since_5_18_one_entry() {
    for profile in ["5.15", "5.18", "6.1"] {
        let (mmu, _ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        let task = mmu.task("caller", Role::Caller);
        cpu.map(&fetch(3, 2));
        // A second root of the same space: the first is invalidated, and its tables are still there.
        mmu.invalidate_root(&task, cpu.root);
        let mut other = Cpu::new(&mmu);
        assert_ne!(cpu.root, other.root);
        other.fault(4, 1);
        mmu.recover_nx(&task, 1, &|_, _| false);
        assert_eq!(mmu.lookup(&task, cpu.root, 3), None, "{profile}");
        assert_eq!(mmu.lookup(&task, other.root, 4).is_none(), profile == "5.15", "{profile}");
        {
            let mut guard = mmu.lock.write(&task);
            mmu.zap_all(&mut guard);
        }
        drop((task, other, cpu));
    }
}

#[test]
fn the_removal_of_a_table_takes_its_candidates_along_in_every_way_it_can_happen() {
    for profile in PROFILES {
        let (mmu, _ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.map(&fetch(3, 3));
        assert_eq!(mmu.nx_splits(), 2);
        // A removed table takes the candidates below it along.
        assert_eq!(mmu.recover_nx(&cpu.task, 1, &|_, _| false), 1);
        assert_eq!((mmu.nx_candidates(), mmu.nx_splits()), (vec![], 0), "{profile}");
        // A huge leaf that replaces a table, where nobody keeps it any more.
        cpu.map(&fetch(3, 2));
        mmu.set_nx_huge_pages(false);
        assert!(matches!(cpu.fault(3, 2), MapOutcome::Fixed { level: 2, .. }));
        assert_eq!((mmu.nx_candidates(), mmu.nx_splits()), (vec![], 0), "{profile}");
        mmu.set_nx_huge_pages(true);
        cpu.map(&fetch(HUGE, 2));
        assert_eq!(mmu.nx_splits(), 1);
        done(cpu);
    }
}

type Other = Rc<RefCell<Cpu<Staged>>>;

/// Another vCPU maps the first 2 MiB huge when this thread comes to `site`: only what nobody keeps for the mitigation is replaced.
fn another_maps_huge(mmu: &Arc<TdpMmu<Staged>>, site: Site) -> Other {
    let other = Rc::new(RefCell::new(Cpu::new(mmu)));
    let vcpu = Rc::clone(&other);
    stage(0, site, move || {
        let mut vcpu = vcpu.borrow_mut();
        vcpu.mmu.set_nx_huge_pages(false);
        assert!(matches!(vcpu.fault(3, 2), MapOutcome::Fixed { level: 2, .. }));
        vcpu.mmu.set_nx_huge_pages(true);
    });
    other
}

fn leave(other: Other) {
    let mut vcpu = Rc::into_inner(other).expect("it has come").into_inner();
    vcpu.drop_root();
    vcpu.close();
}

/// A fetch links a table, and somebody else replaces it by a huge leaf before the table can be put on the list.
fn removed_between_link_and_list(profile: &'static str) -> (Arc<TdpMmu<Staged>>, Cpu<Staged>) {
    let (mmu, _ear) = mitigated::<Staged>(profile, None);
    let mut cpu = Cpu::new(&mmu);
    // The tables above are there; so the lock is next taken after the link of the one that matters.
    cpu.fault(HUGE, 2);
    let other = another_maps_huge(&mmu, Site::Mutex);
    let fetched = cpu.map(&fetch(3, 2));
    assert!(!unstage(Site::Mutex), "{profile}: the other came in between");
    assert_eq!(fetched, MapOutcome::Retry, "{profile}: the table is dead, its entries frozen");
    leave(other);
    (mmu, cpu)
}

#[test]
fn a_table_that_died_before_it_was_listed_is_no_candidate_where_the_flag_came_first() {
    for profile in ["6.6", "6.9", "6.12", "6.18", "7.2"] {
        let (mmu, cpu) = removed_between_link_and_list(profile);
        assert_eq!((mmu.nx_candidates(), mmu.nx_splits()), (vec![], 0), "{profile}");
        done(cpu);
    }
}

#[test]
fn up_to_6_1_accounting_of_a_dead_table_is_told_instead_of_corrupting_the_list() {
    // Bug-history 9 and 26: link, then flag and list without a second look.
    for profile in ["5.18", "6.1-async", "6.1"] {
        let (mmu, cpu) = removed_between_link_and_list(profile);
        assert_eq!((mmu.nx_candidates(), mmu.nx_splits()), (vec![], 0), "{profile}");
        let told = mmu.violations();
        assert!(told.len() == 1 && told[0].contains("bug-history 9, 26"), "{profile}: {told:?}");
        drop(cpu);
    }
}

#[test]
fn a_candidate_that_was_replaced_meanwhile_is_not_zapped_under_the_shared_lock() {
    for profile in ["6.18", "7.2"] {
        let (mmu, _ear) = mitigated::<Staged>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.map(&fetch(3, 2));
        let other = another_maps_huge(&mmu, Site::SpteZap);
        let zapped = mmu.recover_nx(&cpu.task, 1, &|_, _| false);
        assert!(!unstage(Site::SpteZap));
        assert_eq!(zapped, 0, "{profile}");
        assert_eq!(mmu.lookup(&cpu.task, cpu.root, 3).map(|(_, level)| level), Some(2), "{profile}");
        leave(other);
        done(cpu);
    }
}

#[test]
fn a_candidate_is_zapped_under_the_shared_lock_only_if_its_entry_still_links_it() {
    // Present is not enough: a huge leaf has taken its place between the list and the look at the entry.
    for profile in ["6.18", "7.2"] {
        let (mmu, _ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.map(&fetch(3, 2));
        let other = RefCell::new(Cpu::new(&mmu));
        let zapped = mmu.recover_nx(&cpu.task, 1, &|_, _| {
            mmu.set_nx_huge_pages(false);
            assert!(matches!(other.borrow_mut().fault(3, 2), MapOutcome::Fixed { level: 2, .. }));
            mmu.set_nx_huge_pages(true);
            false
        });
        assert_eq!(zapped, 0, "{profile}");
        assert_eq!(mmu.lookup(&cpu.task, cpu.root, 3).map(|(_, level)| level), Some(2), "{profile}");
        let mut other = other.into_inner();
        other.drop_root();
        other.close();
        done(cpu);
    }
}

/// What the model knows of 2 MiB of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Region {
    Nothing,
    Huge,
    /// A table: made by a fetch and still flagged?
    Table(bool),
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Fetch(usize),
    Data(usize),
    Small(usize),
    Recover(u64),
    Unmap(usize),
    Toggle,
    FastZap,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (0..6usize).prop_map(Op::Fetch),
        4 => (0..6usize).prop_map(Op::Data),
        2 => (0..6usize).prop_map(Op::Small),
        3 => (0..4u64).prop_map(Op::Recover),
        1 => (0..6usize).prop_map(Op::Unmap),
        1 => Just(Op::Toggle),
        1 => Just(Op::FastZap),
    ]
}

/// Candidates and levels, as a person would keep them on paper.
struct Paper {
    flag_test: bool,
    /// Is a table that a fetch made flagged even where it is no candidate any more?
    on: bool,
    regions: [Region; 6],
    list: Vec<usize>,
}

impl Paper {
    fn new(profile: &KernelProfile) -> Self {
        Self { flag_test: profile.nx_adjust_flag_test, on: true, regions: [Region::Nothing; 6], list: vec![] }
    }

    fn fetch(&mut self, r: usize) {
        if !self.on {
            return self.data(r);
        }
        if let Region::Table(_) = self.regions[r] {
            return;
        }
        self.regions[r] = Region::Table(true);
        self.list.push(r);
    }

    fn data(&mut self, r: usize) {
        match self.regions[r] {
            Region::Table(flagged) if self.on && (flagged || !self.flag_test) => {}
            _ => {
                self.regions[r] = Region::Huge;
                self.list.retain(|&other| other != r);
            }
        }
    }

    fn small(&mut self, r: usize) {
        if !matches!(self.regions[r], Region::Table(_)) {
            self.regions[r] = Region::Table(false);
        }
    }

    fn recover(&mut self, n: u64) -> u64 {
        let n = self.list.len().min(n as usize);
        for r in self.list.drain(..n) {
            self.regions[r] = Region::Nothing;
        }
        n as u64
    }

    fn zap(&mut self) {
        self.regions = [Region::Nothing; 6];
        self.list.clear();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn candidates_agree_with_a_list_on_paper(
        profile in proptest::sample::select(PROFILES.to_vec()),
        ops in proptest::collection::vec(op(), 1..60),
    ) {
        let (mmu, _ear) = mitigated::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        let task = mmu.task("others", Role::Caller);
        let mut paper = Paper::new(mmu.profile());
        for op in ops {
            match op {
                Op::Fetch(r) => {
                    let gfn = r as u64 * HUGE + 3;
                    if paper.on {
                        cpu.map(&fetch(gfn, 2));
                    } else {
                        let fault = MapFault { write: false, exec: true, ..MapFault::page(gfn, 0x10_0000 + gfn, 2) };
                        cpu.map(&fault);
                    }
                    paper.fetch(r);
                }
                Op::Data(r) => {
                    cpu.fault(r as u64 * HUGE + 9, 2);
                    paper.data(r);
                }
                Op::Small(r) => {
                    cpu.fault(r as u64 * HUGE + 5, 1);
                    paper.small(r);
                }
                Op::Recover(n) => prop_assert_eq!(mmu.recover_nx(&task, n, &|_, _| false), paper.recover(n)),
                Op::Unmap(r) => {
                    // All but a page: up to 5.17 an unmap removes a table that lies inside its range.
                    let gfns = r as u64 * HUGE..(r as u64 + 1) * HUGE - 1;
                    let mut guard = mmu.lock.write(&task);
                    let mut debt = mmu.unmap(&mut guard, 0, gfns, true);
                    mmu.pay(&task, &mut debt);
                    // Tables stay; a huge leaf goes.
                    if paper.regions[r] == Region::Huge {
                        paper.regions[r] = Region::Nothing;
                    }
                }
                Op::Toggle => {
                    paper.on = !paper.on;
                    mmu.set_nx_huge_pages(paper.on);
                    paper.zap();
                    fast_zap(&mmu, &task);
                    cpu.drop_root();
                    cpu.root = mmu.load_root(&cpu.task, &mut cpu.cache, mmu.root_role(false)).expect("a root");
                }
                Op::FastZap => {
                    paper.zap();
                    fast_zap(&mmu, &task);
                    cpu.drop_root();
                    cpu.root = mmu.load_root(&cpu.task, &mut cpu.cache, mmu.root_role(false)).expect("a root");
                }
            }
            let expected: Vec<_> = paper.list.iter().map(|&r| (r as u64 * HUGE, 1)).collect();
            prop_assert_eq!(mmu.nx_candidates(), expected, "{:?}", op);
            prop_assert_eq!(mmu.nx_splits(), paper.list.len() as u64);
            let huge = paper.regions.iter().filter(|&&r| r == Region::Huge).count() as i64;
            prop_assert_eq!(mmu.leaf_pages()[1], huge, "{:?}", op);
        }
        drop(task);
        done(cpu);
    }
}

#[test]
fn the_values_here_are_those_of_npt() {
    let format = Format::npt(0, 0x5a0);
    assert!(!format.is_executable(Spte(NX | 0xee7)) && format.is_executable(Spte(0xe67)));
    assert_eq!(bare(0x8000_0001_2345_6ee7), NX | 0xee7);
}
