//! Aging, test-age and change_pte, kernel by kernel: what changes, under which lock, what the host hears, and what a race may leave.

mod common;
#[path = "common/heard.rs"]
mod heard;
#[path = "common/staged.rs"]
mod staged;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Cpu, Setup, end, fast_zap};
use heard::{Ear, Heard};
use proptest::prelude::*;
use staged::{Staged, stage, unstage};
use tdpmmu_mmu::{FastOutcome, Frame, MapFault, MapOutcome, TdpMmu};
use tdpmmu_platform::{Platform, Real, Role, Site};
use tdpmmu_spte::geometry::index;
use tdpmmu_spte::{Aging, AgingWrite, Format, KernelProfile, RootSet, Spte};

const ALL: [&str; 9] = ["5.15", "5.18", "6.1-async", "6.1", "6.6", "6.9", "6.12", "6.18", "7.2"];
const PFN: u64 = 0x10_0000;

fn kernel(profile: &str) -> KernelProfile {
    KernelProfile::named(profile).expect("known")
}

fn lockless(profile: &str) -> bool {
    kernel(profile).aging == Aging::LocklessRcu
}

fn listened<P: Platform>(profile: &'static str, format: Option<Format>) -> (Arc<TdpMmu<P>>, Arc<Ear>) {
    let ear = Ear::new();
    let setup = Setup { profile, format, batch: 1, observer: Some(ear.clone()), ..Setup::default() };
    (setup.build_on(ear.clone()).expect("a small pool"), ear)
}

/// An EPT without Accessed and Dirty bits.
fn tracking(profile: &str) -> Format {
    kernel(profile).ept(true, false)
}

fn done<P: Platform>(mut cpu: Cpu<P>) {
    let task = cpu.mmu.task("caller", Role::Caller);
    fast_zap(&cpu.mmu, &task);
    cpu.drop_root();
    drop(task);
    let mmu = cpu.close();
    end(&mmu);
}

/// The entry of a gfn that is mapped at 4 KiB.
fn poke<P: Platform>(mmu: &TdpMmu<P>, cpu_root: u32, task: &tdpmmu_platform::Task<P>, gfn: u64, spte: u64) {
    let walk = mmu.walk_lockless(task, cpu_root, gfn);
    assert_eq!(walk.level, 1);
    mmu.pool().entries(walk.table)[index(gfn, 1)].store(spte, Ordering::SeqCst);
}

#[test]
fn aging_takes_the_accessed_bit_once_and_tells_of_it() {
    for profile in ALL {
        let (mmu, ear) = listened::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(7, 1);
        cpu.fault(512, 2);
        ear.take();
        let task = mmu.task("mn_clear_young", Role::Caller);
        let shared = lockless(profile);
        assert!(mmu.age(&task, 0, 0..1024), "{profile}");
        let told = [Heard::Spte(7, 1, 0xe67, 0xe47, shared), Heard::Spte(512, 2, 0xee7, 0xec7, shared)];
        assert_eq!(ear.take(), told, "{profile}: in order, and no flush of ours");
        assert!(!mmu.age(&task, 0, 0..1024), "{profile}: nobody has touched it since");
        assert_eq!(ear.take(), [], "{profile}");
        assert_eq!(mmu.leaf_pages(), [1, 1, 0], "{profile}: all is still mapped");
        drop(task);
        done(cpu);
    }
}

#[test]
fn test_age_looks_and_changes_nothing() {
    for profile in ALL {
        let (mmu, ear) = listened::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(7, 1);
        ear.take();
        let task = mmu.task("mn_test_young", Role::Caller);
        assert!(mmu.test_age(&task, 0, 7..8) && mmu.test_age(&task, 0, 0..512), "{profile}");
        assert!(
            !mmu.test_age(&task, 0, 8..512) && !mmu.test_age(&task, 0, 0..7),
            "{profile}: only the range"
        );
        assert!(!mmu.test_age(&task, 1, 7..8), "{profile}: only the address space");
        assert_eq!(ear.take(), [], "{profile}");
        assert!(mmu.age(&task, 0, 7..8));
        assert!(!mmu.test_age(&task, 0, 7..8), "{profile}: old since");
        drop(task);
        done(cpu);
    }
}

#[test]
fn a_huge_leaf_that_a_range_touches_is_aged_as_a_whole() {
    for profile in ["6.1", "6.12", "7.2"] {
        let (mmu, ear) = listened::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(512, 2);
        ear.take();
        let task = mmu.task("mn_clear_young", Role::Caller);
        assert!(mmu.age(&task, 0, 700..701));
        assert_eq!(ear.sptes(), [(512, 2, 0xee7, 0xec7)], "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn up_to_6_14_invalid_roots_are_aged_too_and_not_since() {
    for profile in ALL {
        let (mmu, ear) = listened::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(7, 1);
        let task = mmu.task("caller", Role::Caller);
        mmu.invalidate_root(&task, cpu.root);
        ear.take();
        let all = kernel(profile).aging_roots == RootSet::All;
        assert_eq!(all, !lockless(profile));
        assert_eq!(mmu.age(&task, 0, 7..8), all, "{profile}");
        assert_eq!(ear.sptes().len(), usize::from(all), "{profile}");
        {
            let mut guard = mmu.lock.write(&task);
            mmu.zap_all(&mut guard);
        }
        drop((task, cpu));
    }
}

#[test]
fn both_roots_of_one_space_are_aged_newest_first() {
    for profile in ["6.1", "6.12"] {
        let (mmu, ear) = listened::<Real>(profile, None);
        let mut old = Cpu::new(&mmu);
        old.fault(7, 1);
        let task = mmu.task("caller", Role::Caller);
        mmu.invalidate_root(&task, old.root);
        let mut new = Cpu::new(&mmu);
        new.fault_as(7, 1, false);
        // The older root's leaf differs, so that the order shows.
        poke(&mmu, old.root, &task, 7, Spte(0xe65).with_pfn(PFN + 7).raw());
        ear.take();
        assert!(mmu.age(&task, 0, 7..8));
        assert_eq!(ear.sptes(), [(7, 1, 0xe67, 0xe47), (7, 1, 0xe65, 0xe45)], "{profile}");
        {
            let mut guard = mmu.lock.write(&task);
            mmu.zap_all(&mut guard);
        }
        drop((task, old, new));
    }
}

#[test]
fn aging_gives_no_accessed_to_the_host_and_loses_no_dirty() {
    for profile in ALL {
        let (mmu, ear) = listened::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(7, 1);
        let task = mmu.task("mn_clear_young", Role::Caller);
        ear.take();
        mmu.age(&task, 0, 7..8);
        let heard = ear.take();
        assert!(
            !heard.iter().any(|h| matches!(h, Heard::Accessed(..) | Heard::Dirty(..))),
            "{profile}: {heard:?}"
        );
        let (leaf, _) = mmu.lookup(&task, cpu.root, 7).expect("mapped");
        assert!(mmu.format().is_dirty(leaf), "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn without_hardware_bits_aging_tracks_and_the_next_access_restores_without_the_lock() {
    for profile in ALL {
        let format = tracking(profile);
        let (mmu, ear) = listened::<Real>(profile, Some(format));
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(7, 1);
        let before = mmu.lookup(&cpu.task, cpu.root, 7).expect("mapped").0;
        let task = mmu.task("mn_clear_young", Role::Caller);
        ear.take();
        assert!(mmu.age(&task, 0, 7..8), "{profile}");
        let heard = ear.take();
        let after = mmu.lookup(&task, cpu.root, 7).expect("still there").0;
        assert!(format.is_access_tracked(after) && !format.hardware_present(after), "{profile}");
        // W is the dirty bit here, and it has gone: up to 6.12 the host hears of it now, later kernels have told at creation.
        let told = heard.contains(&Heard::Dirty(PFN + 7, 1));
        assert_eq!(told, !matches!(profile, "6.18" | "7.2"), "{profile}: {heard:?}");
        assert!(!mmu.age(&task, 0, 7..8), "{profile}: tracked already");
        let fixed = mmu.fast_page_fault(&cpu.task, cpu.root, 0, 7, true, false, false);
        assert_eq!(fixed, FastOutcome::Fixed(before), "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn from_6_13_on_software_keeps_the_bits_that_an_ept_lacks() {
    for (profile, keeps) in [("6.1", false), ("6.12", false), ("6.18", true), ("7.2", true)] {
        let format = tracking(profile);
        let (mmu, _ear) = listened::<Real>(profile, Some(format));
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(7, 1);
        let bits = |leaf: Option<(Spte, u8)>| leaf.expect("mapped").0.raw() & 0x300;
        // Accessed is bit 8 and Dirty bit 9 of an EPT entry, whoever sets them.
        assert_eq!(bits(mmu.lookup(&cpu.task, cpu.root, 7)), if keeps { 0x300 } else { 0 }, "{profile}");
        let task = mmu.task("mn_clear_young", Role::Caller);
        assert!(mmu.age(&task, 0, 7..8));
        assert_eq!(bits(mmu.lookup(&task, cpu.root, 7)), if keeps { 0x200 } else { 0 }, "{profile}");
        mmu.fast_page_fault(&cpu.task, cpu.root, 0, 7, false, false, false);
        assert_eq!(bits(mmu.lookup(&task, cpu.root, 7)), if keeps { 0x300 } else { 0 }, "{profile}");
        assert!(mmu.test_age(&task, 0, 7..8), "{profile}: touched again");
        drop(task);
        done(cpu);
    }
}

#[test]
fn a_read_only_tracked_page_comes_back_read_only() {
    for profile in ["6.1", "6.12", "7.2"] {
        let format = tracking(profile);
        let (mmu, _ear) = listened::<Real>(profile, Some(format));
        let mut cpu = Cpu::new(&mmu);
        let frame = Frame::Page { pfn: PFN + 7, writable: false };
        cpu.map(&MapFault { write: false, frame, ..MapFault::page(7, PFN + 7, 1) });
        let before = mmu.lookup(&cpu.task, cpu.root, 7).expect("mapped").0;
        let task = mmu.task("mn_clear_young", Role::Caller);
        assert!(mmu.age(&task, 0, 7..8));
        let refused = mmu.fast_page_fault(&cpu.task, cpu.root, 0, 7, true, false, false);
        assert_eq!(refused, FastOutcome::Declined, "{profile}: a write needs the host first");
        let fixed = mmu.fast_page_fault(&cpu.task, cpu.root, 0, 7, false, false, false);
        assert_eq!(fixed, FastOutcome::Fixed(before), "{profile}");
        drop(task);
        done(cpu);
    }
}

/// Hardware sets Dirty on the clean writable leaf of gfn 7 just as aging writes it.
fn dirtied_in_between(profile: &'static str, site: Site) -> (Spte, Vec<Heard>) {
    let (mmu, ear) = listened::<Staged>(profile, None);
    let mut cpu = Cpu::new(&mmu);
    cpu.fault(7, 1);
    poke(&mmu, cpu.root, &cpu.task, 7, Spte(0xe27).with_pfn(PFN + 7).raw());
    ear.take();
    let task = mmu.task("mn_clear_young", Role::Caller);
    let walk = mmu.walk_lockless(&task, cpu.root, 7);
    let other = Arc::clone(&mmu);
    stage(0, site, move || {
        other.pool().entries(walk.table)[index(7, 1)].fetch_or(0x40, Ordering::SeqCst);
    });
    assert!(mmu.age(&task, 0, 7..8));
    assert!(!unstage(site), "{profile}: aging came by");
    let heard = ear.take();
    let leaf = mmu.lookup(&task, cpu.root, 7).expect("mapped").0;
    drop(task);
    done(cpu);
    (leaf, heard)
}

#[test]
fn dirty_that_hardware_sets_under_aging_is_kept_by_the_and_and_handed_over_by_the_set_path() {
    for profile in ["6.1", "5.18"] {
        let (leaf, heard) = dirtied_in_between(profile, Site::SpteZap);
        // The new value was made from the snapshot: the bit is gone from the entry, and has reached the host.
        assert_eq!(leaf.raw() & 0xfff, 0xe07, "{profile}");
        assert_eq!(heard, [Heard::Spte(7, 1, 0xe67, 0xe07, false), Heard::Dirty(PFN + 7, 1)], "{profile}");
    }
    for profile in ["6.6", "6.12", "6.18", "7.2"] {
        let (leaf, heard) = dirtied_in_between(profile, Site::SpteAd);
        assert_eq!(leaf.raw() & 0xfff, 0xe47, "{profile}");
        assert_eq!(heard, [Heard::Spte(7, 1, 0xe67, 0xe47, lockless(profile))], "{profile}");
    }
}

/// A shared zap freezes the leaf of gfn 7 just as aging without the lock writes it; what the entry holds afterwards.
fn frozen_in_between(profile: &'static str) -> (Spte, Spte, Vec<Heard>) {
    let (mmu, ear) = listened::<Staged>(profile, None);
    let mut cpu = Cpu::new(&mmu);
    cpu.fault(7, 1);
    ear.take();
    let task = mmu.task("mn_clear_young", Role::Caller);
    let walk = mmu.walk_lockless(&task, cpu.root, 7);
    let (other, frozen) = (Arc::clone(&mmu), mmu.format().frozen());
    stage(0, Site::SpteAd, move || {
        other.pool().entries(walk.table)[index(7, 1)].store(frozen.raw(), Ordering::SeqCst);
    });
    mmu.age(&task, 0, 7..8);
    assert!(!unstage(Site::SpteAd));
    let cell = &mmu.pool().entries(walk.table)[index(7, 1)];
    let left = Spte(cell.swap(walk.last().raw(), Ordering::SeqCst));
    let heard = ear.take();
    drop(task);
    done(cpu);
    (left, frozen, heard)
}

#[test]
fn aging_without_the_lock_leaves_a_frozen_entry_frozen() {
    for profile in ["6.18", "7.2", "6.1,aging=lockless-rcu"] {
        let (left, frozen, heard) = frozen_in_between(profile);
        assert_eq!((left, heard), (frozen, vec![]), "{profile}");
    }
}

#[test]
fn a_blind_and_thaws_a_frozen_value_that_has_the_accessed_bit_and_only_such_a_one() {
    // Bug-history 31, with the values of 6.18 and of 7.2, and with the one that was proposed against it.
    for profile in ["6.18,aging-write=and", "7.2,aging-write=and"] {
        let (left, frozen, _) = frozen_in_between(profile);
        assert_eq!(left.raw(), frozen.raw() & !0x20, "{profile}: nobody's any more");
    }
    let (left, frozen, _) = frozen_in_between("7.2,aging-write=and,frozen=0x8000000000000498");
    assert_eq!(left, frozen);
}

#[test]
fn without_hardware_bits_and_lock_a_lost_exchange_leaves_the_page_young() {
    for profile in ["6.18", "7.2"] {
        let (mmu, ear) = listened::<Staged>(profile, Some(tracking(profile)));
        let mut cpu = Cpu::new(&mmu);
        let frame = Frame::Page { pfn: PFN + 7, writable: true };
        cpu.map(&MapFault { frame, ..MapFault::page(7, PFN + 7, 1) });
        let task = mmu.task("mn_clear_young", Role::Caller);
        let walk = mmu.walk_lockless(&task, cpu.root, 7);
        let protected = mmu.format().without_write(walk.last());
        ear.take();
        let other = Arc::clone(&mmu);
        stage(0, Site::SpteAd, move || {
            other.pool().entries(walk.table)[index(7, 1)].store(protected.raw(), Ordering::SeqCst);
        });
        assert!(mmu.age(&task, 0, 7..8), "{profile}: it was young when it was read");
        assert_eq!(ear.take(), [], "{profile}");
        assert_eq!(mmu.lookup(&task, cpu.root, 7).map(|(leaf, _)| leaf), Some(protected), "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn aging_under_the_lock_waits_for_who_holds_it_and_without_it_for_nobody() {
    for profile in ["6.18", "7.2"] {
        let (mmu, _ear) = listened::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(7, 1);
        let (holder, task) = (mmu.task("holder", Role::Caller), mmu.task("mn_clear_young", Role::Caller));
        {
            // It would never come back if it took the lock.
            let _held = mmu.lock.write(&holder);
            assert!(mmu.age(&task, 0, 0..512) && !mmu.test_age(&task, 0, 0..512), "{profile}");
        }
        assert_eq!(task.meter().acquisitions.get(), 0, "{profile}");
        drop((holder, task));
        done(cpu);
    }
    for profile in ["5.15", "6.1", "6.12"] {
        let (mmu, _ear) = listened::<Real>(profile, None);
        let cpu = Cpu::new(&mmu);
        let task = mmu.task("mn_clear_young", Role::Caller);
        mmu.age(&task, 0, 0..512);
        mmu.test_age(&task, 0, 0..512);
        assert_eq!(task.meter().acquisitions.get(), 2, "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn the_profiles_never_pair_a_blind_and_with_no_lock() {
    for kernel in KernelProfile::ALL {
        assert!(
            kernel.aging == Aging::WriteLock || kernel.aging_write == AgingWrite::CompareExchange,
            "{kernel}"
        );
    }
}

#[test]
fn change_pte_installs_a_read_only_mapping_and_only_empties_for_a_writable_one() {
    for profile in ["5.15", "6.1", "6.6", "6.9"] {
        for writable in [false, true] {
            let (mmu, ear) = listened::<Real>(profile, None);
            let mut cpu = Cpu::new(&mmu);
            cpu.fault(7, 1);
            ear.take();
            let task = mmu.task("mn_change_pte", Role::Caller);
            {
                let mut guard = mmu.lock.write(&task);
                assert!(
                    mmu.set_spte_gfn(&mut guard, 0, 7, 0x20_0000, writable),
                    "{profile}: a flush is owed"
                );
            }
            let heard = ear.sptes();
            let mut expected = vec![(7, 1, 0xe67, 0)];
            if !writable {
                // Neither W nor the two software bits that allow it, nor Accessed.
                expected.push((7, 1, 0, 0x845));
            }
            assert_eq!(heard, expected, "{profile}");
            let leaf = mmu.lookup(&task, cpu.root, 7);
            assert_eq!(leaf.map(|(leaf, _)| leaf.pfn()), (!writable).then_some(0x20_0000), "{profile}");
            drop(task);
            done(cpu);
        }
    }
}

#[test]
fn change_pte_leaves_huge_leaves_and_what_is_not_mapped_alone_and_does_not_exist_from_6_10_on() {
    for profile in ["6.1", "6.12", "7.2"] {
        let (mmu, ear) = listened::<Real>(profile, None);
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(512, 2);
        cpu.fault(7, 1);
        ear.take();
        let task = mmu.task("mn_change_pte", Role::Caller);
        {
            let mut guard = mmu.lock.write(&task);
            assert!(!mmu.set_spte_gfn(&mut guard, 0, 600, 0x20_0000, false), "{profile}: 2 MiB");
            assert!(!mmu.set_spte_gfn(&mut guard, 0, 8, 0x20_0000, false), "{profile}: nothing there");
            assert!(!mmu.set_spte_gfn(&mut guard, 1, 7, 0x20_0000, false), "{profile}: another space");
            assert_eq!(mmu.set_spte_gfn(&mut guard, 0, 7, 0x20_0000, false), profile == "6.1", "{profile}");
        }
        assert_eq!(ear.sptes().is_empty(), profile != "6.1", "{profile}");
        drop(task);
        done(cpu);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Touch(u64),
    Huge(u64),
    Age(u64, u64),
    Test(u64, u64),
    Unmap(u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let gfn = 0..2048u64;
    let range = (gfn.clone(), 1..700u64);
    prop_oneof![
        4 => gfn.clone().prop_map(Op::Touch),
        1 => (0..4u64).prop_map(|n| Op::Huge(n * 512)),
        3 => range.clone().prop_map(|(at, n)| Op::Age(at, at + n)),
        2 => range.clone().prop_map(|(at, n)| Op::Test(at, at + n)),
        1 => range.prop_map(|(at, n)| Op::Unmap(at, at + n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn young_pages_are_those_touched_since_they_were_last_aged(
        profile in proptest::sample::select(ALL.to_vec()),
        tracked: bool,
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let (mmu, _ear) = listened::<Real>(profile, tracked.then(|| tracking(profile)));
        let mut cpu = Cpu::new(&mmu);
        let task = mmu.task("notifier", Role::Caller);
        // First gfn -> (gfns, young).
        let mut leaves: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
        let inside = |leaves: &BTreeMap<u64, (u64, bool)>, from: u64, to: u64| -> Vec<u64> {
            leaves.iter().filter(|(at, (n, _))| **at < to && *at + n > from).map(|(at, _)| *at).collect()
        };
        for op in ops {
            match op {
                Op::Touch(gfn) => {
                    let huge = leaves.range(..=gfn).next_back().is_some_and(|(at, (n, _))| at + n > gfn && *n > 1);
                    if !huge {
                        // Faulting again on what is tracked is an access, on what is present without A it is none.
                        let again = leaves.contains_key(&gfn);
                        if !again {
                            cpu.fault(gfn, 1);
                            leaves.insert(gfn, (1, true));
                        }
                    }
                }
                Op::Huge(gfn) => {
                    if inside(&leaves, gfn, gfn + 512).is_empty() {
                        prop_assert!(matches!(cpu.fault(gfn, 2), MapOutcome::Fixed { level: 2, .. }), "huge");
                        leaves.insert(gfn, (512, true));
                    }
                }
                Op::Age(from, to) => {
                    let hit = inside(&leaves, from, to);
                    let young = hit.iter().any(|at| leaves[at].1);
                    prop_assert_eq!(mmu.test_age(&task, 0, from..to), young);
                    prop_assert_eq!(mmu.age(&task, 0, from..to), young);
                    for at in hit {
                        leaves.get_mut(&at).expect("there").1 = false;
                    }
                }
                Op::Test(from, to) => {
                    let young = inside(&leaves, from, to).iter().any(|at| leaves[at].1);
                    prop_assert_eq!(mmu.test_age(&task, 0, from..to), young);
                }
                Op::Unmap(from, to) => {
                    let mut guard = mmu.lock.write(&task);
                    let mut debt = mmu.unmap(&mut guard, 0, from..to, true);
                    mmu.pay(&task, &mut debt);
                    for at in inside(&leaves, from, to) {
                        leaves.remove(&at);
                    }
                }
            }
        }
        let found = RefCell::new(BTreeMap::new());
        mmu.leaves(&task, cpu.root, 0..4096, &mut |gfn, level, spte| {
            let gfns = if level == 2 { 512 } else { 1 };
            found.borrow_mut().insert(gfn, (gfns, mmu.format().is_accessed(spte)));
        });
        prop_assert_eq!(found.into_inner(), leaves);
        drop(task);
        done(cpu);
    }
}
