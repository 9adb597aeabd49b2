//! Dirty logging as each kernel does it: what is written, in which order, under which roots, and what the host hears of it.

mod common;
#[path = "common/heard.rs"]
mod heard;

use std::sync::Arc;

use common::{Cpu, Setup};
use heard::{Ear, Heard, bare};
use tdpmmu_mmu::{MapFault, MapOutcome, TdpMmu};
use tdpmmu_platform::{Real, Role, Task};
use tdpmmu_spte::geometry::index;
use tdpmmu_spte::{Format, KernelProfile, MakeLeaf, Spte};

type Mmu = TdpMmu<Real>;

/// Every kernel that shares mmu_lock and logs.
const PROFILES: [&str; 8] = ["5.15", "5.18", "6.1", "6.6", "6.9", "6.12", "6.18", "7.2"];

/// An MMU that checks at each entry, as the kernel does, and what it tells.
fn world(setup: Setup) -> (Arc<Mmu>, Arc<Ear>) {
    let ear = Ear::new();
    let setup = Setup { batch: 1, observer: Some(ear.clone()), ..setup };
    (setup.build_on::<Real>(ear.clone()).expect("a small pool"), ear)
}

fn of(profile: &'static str) -> (Arc<Mmu>, Arc<Ear>) {
    world(Setup { profile, ..Setup::default() })
}

fn caller(mmu: &Mmu) -> Task<Real> {
    mmu.task("caller", Role::Caller)
}

fn map(cpu: &mut Cpu, gfns: impl IntoIterator<Item = u64>, level: u8) {
    for gfn in gfns {
        let outcome = cpu.fault(gfn, level);
        assert!(matches!(outcome, MapOutcome::Fixed { .. }), "gfn {gfn:#x}: {outcome:?}");
    }
}

/// The value that a look-up of `gfn` finds, whole.
fn value(cpu: &Cpu, gfn: u64) -> Spte {
    cpu.mmu.lookup(&cpu.task, cpu.root, gfn).map_or(Spte(0), |(spte, _)| spte)
}

/// Writes an entry as nobody in the engine would: bits that only other guests or CPUs make.
fn poke(cpu: &Cpu, gfn: u64, change: impl FnOnce(Spte) -> u64) {
    let walk = cpu.mmu.walk_lockless(&cpu.task, cpu.root, gfn);
    let cell = &cpu.mmu.pool().entries(walk.table)[index(gfn, walk.level)];
    cell.store(change(walk.last()), std::sync::atomic::Ordering::SeqCst);
}

fn close(cpus: impl IntoIterator<Item = Cpu>, mmu: &Arc<Mmu>) {
    for mut cpu in cpus {
        cpu.drop_root();
        cpu.close();
    }
    let task = caller(mmu);
    common::fast_zap(mmu, &task);
    drop(task);
    common::end(mmu);
}

/// A vCPU on a root that is invalid, and one on its valid successor, each with the gfns 0 to 3; the second's root is the newer.
fn an_invalid_root_and_its_successor(mmu: &Arc<Mmu>) -> (Cpu, Cpu) {
    let mut old = Cpu::new(mmu);
    map(&mut old, 0..4, 1);
    mmu.fast_zap_invalidate(&mut mmu.lock.write(&old.task));
    let mut new = Cpu::new(mmu);
    map(&mut new, 0..4, 1);
    assert!(mmu.is_obsolete(old.root) && !mmu.is_obsolete(new.root));
    (old, new)
}

fn end_with_an_invalid_root(mmu: &Arc<Mmu>, old: Cpu, new: Cpu) {
    mmu.fast_zap_finish(&old.task);
    close([old, new], mmu);
}

/// Four entries lose W, at 4K.
fn four_protected(format: &Format, shared: bool) -> Vec<Heard> {
    let (e67, e65) = (leaf(format), leaf(format) & !format.write);
    (0..4).map(|gfn| Heard::Spte(gfn, 1, e67, e65, shared)).collect()
}

/// A writable 4 KiB leaf without its frame.
fn leaf(format: &Format) -> u64 {
    bare(format.make_leaf(&MakeLeaf::default()).spte.raw())
}

#[test]
fn the_start_of_logging_protects_valid_roots_and_harvesting_those_of_its_kernel() {
    for profile in PROFILES {
        let (mmu, ear) = of(profile);
        let (old, new) = an_invalid_root_and_its_successor(&mmu);
        let task = caller(&mmu);
        let format = *mmu.format();
        ear.take();
        assert_eq!(mmu.write_protect(&task, 0, 0..512, 1), 4, "{profile}");
        assert_eq!(ear.take(), four_protected(&format, true), "{profile}: under the newer root, in order");
        assert_eq!(value(&old, 0).raw() & format.write, format.write);
        for gfn in 0..4 {
            mmu.fast_page_fault(&new.task, new.root, 0, gfn, true, false, false);
        }
        ear.take();
        let changed = mmu.clear_dirty_masked(&mut mmu.lock.write(&task), 0, 0, 0b1111, true);
        let mut expected = four_protected(&format, false);
        // Up to 6.8 invalid roots are walked too, the older one after the newer.
        if ["5.15", "5.18", "6.1", "6.6"].contains(&profile) {
            expected.extend(four_protected(&format, false));
        }
        let heard: Vec<_> = ear.take().into_iter().filter(|h| matches!(h, Heard::Spte(..))).collect();
        assert_eq!((changed, heard), (expected.len() as u64, expected), "{profile}");
        drop(task);
        end_with_an_invalid_root(&mmu, old, new);
    }
}

#[test]
fn harvesting_touches_the_masked_small_leaves_and_no_others() {
    for profile in PROFILES {
        let (mmu, ear) = of(profile);
        let (mut cpu, mut smm) = (Cpu::new(&mmu), Cpu::of_space(&mmu, 1));
        // Around the border of two leaf tables, and a huge leaf after them.
        map(&mut cpu, 480..560, 1);
        map(&mut cpu, [1024], 2);
        map(&mut smm, 480..560, 1);
        let task = caller(&mmu);
        ear.take();
        let mut guard = mmu.lock.write(&task);
        assert_eq!(mmu.clear_dirty_masked(&mut guard, 0, 496, 1 | 1 << 15 | 1 << 16 | 1 << 63, true), 4);
        let gfns: Vec<_> = ear.sptes().iter().map(|&(gfn, level, ..)| (gfn, level)).collect();
        assert_eq!(gfns, [496, 511, 512, 559].map(|gfn| (gfn, 1)), "{profile}: ascending, over the border");
        assert_eq!(mmu.clear_dirty_masked(&mut guard, 0, 496, 1, true), 0, "{profile}: protected already");
        assert_eq!(mmu.clear_dirty_masked(&mut guard, 0, 1024, u64::MAX, true), 0, "{profile}: a huge leaf");
        assert_eq!(mmu.clear_dirty_masked(&mut guard, 0, 4096, u64::MAX, true), 0, "{profile}: no table");
        assert_eq!(mmu.clear_dirty_masked(&mut guard, 0, 496, 0, true), 0, "{profile}: no bit");
        assert_eq!(ear.take(), []);
        drop(guard);
        drop(task);
        close([cpu, smm], &mmu);
    }
}

#[test]
fn what_the_host_page_hears_of_harvesting_is_as_in_its_kernel() {
    // (W goes, D goes): 6.1 books what was lost, 6.12 says "dirty" whichever bit went, 6.13 on said it when the leaf was made.
    let told = [("6.1", false, true), ("6.6", true, true), ("6.12", true, true), ("6.18", false, false)];
    for (profile, by_w, by_d) in told {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [5, 6], 1);
        let task = caller(&mmu);
        for (gfn, wrprot, expected) in [(5, true, by_w), (6, false, by_d)] {
            ear.take();
            let pfn = value(&cpu, gfn).pfn();
            assert_eq!(mmu.clear_dirty_masked(&mut mmu.lock.write(&task), 0, gfn, 1, wrprot), 1);
            let dirty = ear.take().contains(&Heard::Dirty(pfn, 1));
            assert_eq!(dirty, expected, "{profile}, wrprot {wrprot}");
        }
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn harvesting_by_dirty_bits_clears_d_and_leaves_w() {
    for profile in PROFILES {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, 0..2, 1);
        poke(&cpu, 1, |spte| spte.raw() & !mmu.format().dirty);
        let (task, format) = (caller(&mmu), *mmu.format());
        ear.take();
        assert_eq!(
            mmu.clear_dirty_masked(&mut mmu.lock.write(&task), 0, 0, 0b11, false),
            1,
            "{profile}: a clean one stays"
        );
        let made = leaf(&format);
        assert_eq!(ear.sptes(), [(0, 1, made, made & !format.dirty)], "{profile}");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn a_slot_wide_clearing_takes_d_of_every_size_and_tells_the_host() {
    for profile in PROFILES {
        for batch in [1, 512] {
            let ear = Ear::new();
            let setup = Setup { profile, batch, observer: Some(ear.clone()), ..Setup::default() };
            let mmu = setup.build_on::<Real>(ear.clone()).expect("a small pool");
            let mut cpu = Cpu::new(&mmu);
            map(&mut cpu, 500..520, 1);
            map(&mut cpu, [1024], 2);
            let (task, format) = (caller(&mmu), *mmu.format());
            ear.take();
            assert_eq!(mmu.clear_dirty(&task, 0, 510..2048), 11, "{profile}: ten small, one huge");
            let heard = ear.take();
            let gfns: Vec<_> = heard
                .iter()
                .filter_map(|h| match *h {
                    Heard::Spte(gfn, _, old, new, shared) => {
                        assert_eq!((old & !new, new & !old, shared), (format.dirty, 0, true), "{profile}");
                        Some(gfn)
                    }
                    _ => None,
                })
                .collect();
            assert_eq!(gfns, (510..520).chain([1024]).collect::<Vec<_>>(), "{profile}");
            let dirty: u64 =
                heard.iter().map(|h| if let Heard::Dirty(_, count) = h { *count } else { 0 }).sum();
            let at_zap = ["6.18", "7.2"].iter().all(|new| *new != profile);
            assert_eq!(dirty, if at_zap { 11 } else { 0 }, "{profile}, batch {batch}");
            assert_eq!(mmu.clear_dirty(&task, 0, 0..2048), 10, "{profile}: those before the range");
            drop(task);
            close([cpu], &mmu);
        }
    }
}

#[test]
fn without_hardware_ad_w_goes_in_the_place_of_d() {
    for profile in PROFILES {
        let kernel = KernelProfile::named(profile).expect("known");
        let format = Format::ept(kernel.format_nonpresent, kernel.format_frozen, true, false);
        let (mmu, ear) = world(Setup { profile, format: Some(format), ..Setup::default() });
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, 0..2, 1);
        let task = caller(&mmu);
        ear.take();
        assert_eq!(mmu.clear_dirty_masked(&mut mmu.lock.write(&task), 0, 0, 1, false), 1);
        assert_eq!(mmu.clear_dirty(&task, 0, 0..512), 1, "{profile}: the other one");
        for (_, _, old, new) in ear.sptes() {
            assert_eq!(old ^ new, format.write, "{profile}");
        }
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn an_entry_that_pml_does_not_log_is_protected_by_itself_up_to_6_8_and_is_a_bug_since() {
    for profile in ["6.1", "6.6", "6.9", "6.12"] {
        let kernel = KernelProfile::named(profile).expect("known");
        let format = Format::ept(kernel.format_nonpresent, kernel.format_frozen, true, true);
        let (mmu, ear) = world(Setup { profile, format: Some(format), ..Setup::default() });
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, 0..2, 1);
        poke(&cpu, 1, |spte| spte.raw() | Format::AD_WRITE_PROTECT);
        let task = caller(&mmu);
        ear.take();
        assert_eq!(mmu.clear_dirty(&task, 0, 0..512), 2);
        let gone: Vec<_> = ear.sptes().iter().map(|&(_, _, old, new)| old ^ new).collect();
        let by_entry = ["6.1", "6.6"].contains(&profile);
        let second = if by_entry { format.write } else { format.dirty };
        assert_eq!(gone, [format.dirty, second], "{profile}");
        assert_eq!(mmu.violations().is_empty(), by_entry, "{profile}: {:?}", mmu.violations());
        drop(task);
        if by_entry {
            close([cpu], &mmu);
        } else {
            cpu.drop_root();
            cpu.close();
        }
    }
}

#[test]
fn under_the_root_of_an_l2_w_goes_since_6_9() {
    for profile in ["6.9", "6.12", "7.2"] {
        let kernel = KernelProfile::named(profile).expect("known");
        let format = Format::ept(kernel.format_nonpresent, kernel.format_frozen, true, true);
        let (mmu, ear) = world(Setup { profile, format: Some(format), ..Setup::default() });
        let mut cpu = Cpu::new(&mmu);
        mmu.put_roots(&cpu.task, &[cpu.root]);
        let role = mmu.profile().role_layout.tdp_root(4, false, false, true);
        cpu.root = mmu.load_root(&cpu.task, &mut cpu.cache, role).expect("room");
        map(&mut cpu, 0..2, 1);
        let task = caller(&mmu);
        ear.take();
        assert_eq!(mmu.clear_dirty_masked(&mut mmu.lock.write(&task), 0, 0, 1, false), 1);
        assert_eq!(mmu.clear_dirty(&task, 0, 0..512), 1);
        assert!(ear.sptes().iter().all(|&(_, _, old, new)| old ^ new == format.write), "{profile}");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn protecting_one_gfn_takes_mmu_writable_too_and_owes_a_flush_though_w_was_gone() {
    for profile in PROFILES {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, 0..2, 1);
        map(&mut cpu, [512, 1024], 2);
        let (task, format) = (caller(&mmu), *mmu.format());
        assert_eq!(mmu.write_protect(&task, 0, 1..2, 1), 1);
        ear.take();
        let both = format.write | format.mmu_writable;
        let mut guard = mmu.lock.write(&task);
        let protect = |guard: &mut _, gfn, min_level| {
            let owed = mmu.write_protect_gfn(guard, 0, gfn, min_level);
            let gone: Vec<_> =
                ear.sptes().iter().map(|&(gfn, level, old, new)| (gfn, level, old ^ new)).collect();
            (owed, gone)
        };
        assert_eq!(protect(&mut guard, 0, 1), (true, vec![(0, 1, both)]), "{profile}");
        let late =
            if profile == "5.15" { (false, vec![]) } else { (true, vec![(1, 1, format.mmu_writable)]) };
        assert_eq!(protect(&mut guard, 1, 1), late, "{profile}: W was clear (7c8a4742c4ab)");
        assert_eq!(protect(&mut guard, 0, 1), (false, vec![]), "{profile}: nothing left to take");
        assert_eq!(protect(&mut guard, 1, 2), (false, vec![]), "{profile}: below the level asked for");
        assert_eq!(
            protect(&mut guard, 700, 2),
            (true, vec![(512, 2, both)]),
            "{profile}: the leaf over the gfn"
        );
        assert_eq!(protect(&mut guard, 1024, 1), (true, vec![(1024, 2, both)]), "{profile}");
        assert_eq!(protect(&mut guard, 5000, 1), (false, vec![]), "{profile}: nothing mapped");
        assert!(!mmu.write_protect_gfn(&mut guard, 1, 0, 1), "{profile}: another address space");
        drop(guard);
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn protecting_one_gfn_visits_the_roots_of_its_kernel() {
    for (profile, changes) in [("6.1", 2), ("6.6", 2), ("6.9", 1), ("6.12", 1), ("7.2", 1)] {
        let (mmu, ear) = of(profile);
        let (old, new) = an_invalid_root_and_its_successor(&mmu);
        let task = caller(&mmu);
        ear.take();
        assert!(mmu.write_protect_gfn(&mut mmu.lock.write(&task), 0, 2, 1));
        assert_eq!(ear.sptes().len(), changes, "{profile}");
        drop(task);
        end_with_an_invalid_root(&mmu, old, new);
    }
}

#[test]
fn a_range_zap_visits_the_roots_of_its_kernel_in_its_order() {
    for profile in PROFILES {
        let (mmu, ear) = of(profile);
        // On the list, newest first: a valid one of SMM, a valid one, an invalid one of SMM, an invalid one.
        let mut cpus = Vec::new();
        for (round, as_id) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let mut cpu = Cpu::of_space(&mmu, as_id);
            // A gfn of its own says whose leaf it was.
            let gfn = cpus.len() as u64;
            let fault = MapFault { as_id, ..MapFault::page(gfn, 0x1000 + gfn, 1) };
            assert!(matches!(cpu.map(&fault), MapOutcome::Fixed { .. }));
            cpus.push(cpu);
            if (round, as_id) == (0, 1) {
                let task = caller(&mmu);
                mmu.fast_zap_invalidate(&mut mmu.lock.write(&task));
            }
        }
        let expected: &[u64] = match profile {
            "5.15" | "5.18" | "6.1" => &[2, 0, 3, 1],
            "6.6" => &[3, 2, 1, 0],
            _ => &[3, 2],
        };
        let task = caller(&mmu);
        ear.take();
        {
            let mut guard = mmu.lock.write(&task);
            let mut debt = mmu.zap_gfn_range(&mut guard, 0..4);
            let heard = ear.take();
            let zapped: Vec<_> = heard
                .iter()
                .filter_map(|h| if let Heard::Spte(gfn, ..) = h { Some(*gfn) } else { None })
                .collect();
            assert_eq!(zapped, expected, "{profile}");
            assert!(
                !heard.iter().any(|h| matches!(h, Heard::Flush(_))),
                "{profile}: one flush for all, the caller's"
            );
            assert!(debt.is_owed());
            mmu.pay(&task, &mut debt);
        }
        mmu.fast_zap_finish(&task);
        drop(task);
        close(cpus, &mmu);
    }
}
