//! A fault's map step, kernel by kernel: Dirty and Accessed of what it makes, what it replaces and in which steps, whom it tells.

mod common;
#[path = "common/heard.rs"]
mod heard;

use std::sync::Arc;

use common::{Cpu, Mmu, Setup, end, fast_zap};
use heard::{Ear, Heard};
use tdpmmu_mmu::{FastOutcome, Frame, MapFault, MapOutcome};
use tdpmmu_platform::{Real, Role};
use tdpmmu_spte::{Format, FormatKind, KernelProfile};

const ALL: [&str; 9] = ["5.15", "5.18", "6.1-async", "6.1", "6.6", "6.9", "6.12", "6.18", "7.2"];
/// Kernels whose fault splits a huge leaf in its way.
const SPLITTERS: [&str; 5] = ["6.6", "6.9", "6.12", "6.18", "7.2"];
/// Kernels that set Dirty whenever they grant W, and leave what allows the access alone.
const NEWEST: [&str; 2] = ["6.18", "7.2"];
const PFN: u64 = 0x10_0000;
const NX: u64 = 1 << 63;

fn kernel(profile: &str) -> KernelProfile {
    KernelProfile::named(profile).expect("known")
}

fn empty(profile: &str) -> u64 {
    kernel(profile).format_nonpresent
}

fn listened(profile: &'static str) -> (Arc<Mmu>, Arc<Ear>, Cpu) {
    with_format(profile, None)
}

fn with_format(profile: &'static str, format: Option<Format>) -> (Arc<Mmu>, Arc<Ear>, Cpu) {
    let ear = Ear::new();
    let setup = Setup { profile, format, batch: 1, observer: Some(ear.clone()), ..Setup::default() };
    let mmu = setup.build_on::<Real>(ear.clone()).expect("a small pool");
    let cpu = Cpu::new(&mmu);
    (mmu, ear, cpu)
}

fn done(mut cpu: Cpu) {
    let task = cpu.mmu.task("caller", Role::Caller);
    fast_zap(&cpu.mmu, &task);
    assert_eq!(cpu.mmu.leaf_pages(), [0; 3], "statistics");
    cpu.drop_root();
    drop(task);
    let mmu = cpu.close();
    end(&mmu);
}

fn write(gfn: u64) -> MapFault {
    MapFault::page(gfn, PFN + gfn, 1)
}

fn tracked(gfn: u64) -> MapFault {
    MapFault { dirty_tracked: true, ..write(gfn) }
}

fn mmio(gfn: u64, generation: u64) -> MapFault {
    MapFault { frame: Frame::Mmio { generation }, write: false, ..write(gfn) }
}

#[test]
fn the_loser_of_two_write_faults_drops_dirty_up_to_6_12_and_is_spurious_since() {
    for profile in ALL {
        let (_mmu, ear, mut cpu) = listened(profile);
        cpu.map(&write(7));
        ear.take();
        let second = cpu.map(&write(7));
        if NEWEST.contains(&profile) {
            assert_eq!((second, ear.sptes()), (MapOutcome::Spurious, vec![]), "{profile}");
        } else {
            assert_eq!(ear.sptes(), [(7, 1, 0xe67, 0xe27)], "{profile}");
            // The third finds just what it would make.
            assert_eq!((cpu.map(&write(7)), ear.sptes()), (MapOutcome::Spurious, vec![]), "{profile}");
        }
        done(cpu);
    }
}

#[test]
fn a_page_that_replaces_mmio_lacks_dirty_up_to_6_12() {
    for profile in ALL {
        let (_mmu, ear, mut cpu) = listened(profile);
        assert_eq!(cpu.map(&mmio(7, 10)), MapOutcome::Emulate);
        let made = ear.sptes().pop().expect("told").3;
        cpu.map(&write(7));
        let expected = if NEWEST.contains(&profile) { 0xe67 } else { 0xe27 };
        assert_eq!(ear.sptes(), [(7, 1, made, expected)], "{profile}");
        done(cpu);
    }
}

#[test]
fn mmio_of_an_older_generation_is_replaced_and_of_the_same_one_left() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.map(&mmio(0x28, 10));
        assert_eq!(cpu.map(&mmio(0x28, 10)), MapOutcome::Emulate, "{profile}: emulated all the same");
        assert_eq!(
            ear.take().iter().filter(|h| matches!(h, Heard::Spte(0x28, 1, ..))).count(),
            1,
            "{profile}"
        );
        assert_eq!(cpu.map(&mmio(0x28, 12)), MapOutcome::Emulate);
        let told = ear.sptes();
        assert!(
            matches!(told[..], [(0x28, 1, old, new)] if old >> 3 & 0xff == 10 && new >> 3 & 0xff == 12),
            "{profile}: {told:x?}"
        );
        assert_eq!(mmu.leaf_pages(), [0; 3], "{profile}: MMIO is never counted");
        done(cpu);
    }
}

#[test]
fn a_huge_leaf_over_a_table_is_dirty_in_every_kernel() {
    // The entry it replaces has W too, but is no leaf (recorded: 827 -> ee7).
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        for gfn in [3, 4] {
            cpu.map(&write(gfn));
        }
        ear.take();
        assert!(matches!(cpu.fault(9, 2), MapOutcome::Fixed { level: 2, .. }));
        let (heard, kernel) = (ear.take(), kernel(profile));
        let frozen = kernel.format_frozen;
        let parent = Heard::Spte(0, 2, 0x827, 0xee7, true);
        let children = (0..512).map(|gfn| {
            let old = if gfn == 3 || gfn == 4 { 0xe67 } else { empty(profile) };
            Heard::Spte(gfn, 1, old, frozen, true)
        });
        let mut expected: Vec<Heard> = children.collect();
        expected.insert(if kernel.children_before_parent_events { 512 } else { 0 }, parent);
        let changes: Vec<_> = heard.iter().filter(|h| matches!(h, Heard::Spte(..))).cloned().collect();
        assert_eq!(changes, expected, "{profile}: all 512, empty ones too");
        // 6.1 flushes the containing table's span, 512 times too much.
        let wide = matches!(profile, "5.15" | "5.18" | "6.1-async" | "6.1");
        let span = if wide { 0..512 * 512 } else { 0..512 };
        let flushes: Vec<_> = heard.iter().filter(|h| matches!(h, Heard::Flush(_))).collect();
        assert_eq!(flushes, [&Heard::Flush(Some(span))], "{profile}");
        assert_eq!(mmu.leaf_pages(), [0, 1, 0], "{profile}");
        done(cpu);
    }
}

#[test]
fn a_huge_leaf_in_the_way_is_zapped_in_two_told_steps_up_to_6_1() {
    for profile in ["5.15", "5.18", "6.1-async", "6.1"] {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.fault(0, 2);
        ear.take();
        assert!(matches!(cpu.map(&write(7)), MapOutcome::Fixed { level: 1, .. }));
        let expected = [
            Heard::Spte(0, 2, 0xee7, 0x5a0, true),
            Heard::Dirty(PFN, 1),
            Heard::Accessed(PFN, 1),
            Heard::Flush(Some(0..512)),
            Heard::Spte(0, 2, 0, 0x827, true),
            Heard::Spte(7, 1, 0, 0xe67, true),
        ];
        assert_eq!(ear.take(), expected, "{profile}: the empty store between them is silent");
        assert_eq!(mmu.leaf_pages(), [1, 0, 0], "{profile}");
        done(cpu);
    }
}

#[test]
fn bookkeeping_after_the_flush_tells_the_empty_value() {
    let (_mmu, ear, mut cpu) = listened("6.1,atomic-zap=after-flush");
    cpu.fault(0, 2);
    ear.take();
    cpu.map(&write(7));
    let heard = ear.take();
    assert_eq!(heard[0], Heard::Flush(Some(0..512)));
    assert_eq!(heard[1], Heard::Spte(0, 2, 0xee7, 0, true));
    done(cpu);
}

#[test]
fn a_huge_leaf_in_the_way_is_split_from_6_6_on_and_the_gfn_made_again_where_it_must() {
    for profile in SPLITTERS {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.fault(0, 2);
        ear.take();
        cpu.map(&write(7));
        let mut expected = vec![(0, 2, 0xee7, 0x827)];
        if !NEWEST.contains(&profile) {
            expected.push((7, 1, 0xe67, 0xe27));
        }
        assert_eq!(ear.sptes(), expected, "{profile}: 512 silent children");
        assert_eq!(mmu.leaf_pages(), [512, 0, 0], "{profile}");
        done(cpu);
    }
}

#[test]
fn a_write_to_a_protected_huge_leaf_ends_at_one_writable_dirty_page() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.fault(0, 2);
        let task = mmu.task("caller", Role::Caller);
        mmu.write_protect(&task, 0, 0..512, 2);
        ear.take();
        cpu.map(&tracked(7));
        let heard = ear.take();
        let changes: Vec<_> = heard
            .iter()
            .filter_map(|h| {
                if let Heard::Spte(gfn, level, old, new, _) = h {
                    Some((*gfn, *level, *old, *new))
                } else {
                    None
                }
            })
            .collect();
        let expected: &[(u64, u8, u64, u64)] = if SPLITTERS.contains(&profile) {
            &[(0, 2, 0xee5, 0x827), (7, 1, 0xe65, 0xe67)]
        } else {
            &[(0, 2, 0xee5, 0x5a0), (0, 2, 0, 0x827), (7, 1, 0, 0xe67)]
        };
        assert_eq!(changes, expected, "{profile}");
        assert_eq!(
            heard.iter().filter(|h| matches!(h, Heard::Marked(0, 7))).count(),
            1,
            "{profile}: marked once"
        );
        drop(task);
        done(cpu);
    }
}

#[test]
fn a_prefetched_page_lacks_accessed_and_a_mapped_one_is_made_again_up_to_6_12_only() {
    let ahead = |fault: MapFault| MapFault { prefetch: true, write: false, ..fault };
    for profile in ALL {
        let (_mmu, ear, mut cpu) = listened(profile);
        let zero = Frame::Page { pfn: 5, writable: false };
        cpu.map(&MapFault { frame: zero, ..ahead(write(3)) });
        assert_eq!(ear.sptes().last(), Some(&(3, 1, empty(profile), 0x805)), "{profile}: the zero page");
        cpu.map(&ahead(write(7)));
        assert_eq!(ear.sptes(), [(7, 1, empty(profile), 0xe47)], "{profile}");
        cpu.map(&write(8));
        ear.take();
        let again = cpu.map(&ahead(write(8)));
        if NEWEST.contains(&profile) {
            assert_eq!((again, ear.sptes()), (MapOutcome::Spurious, vec![]), "{profile}");
        } else {
            assert_eq!(ear.sptes(), [(8, 1, 0xe67, 0xe07)], "{profile}: Accessed and Dirty dropped");
        }
        done(cpu);
    }
}

#[test]
fn a_prefetch_leaves_a_leaf_that_allows_nothing_as_it_is_in_the_newest_kernels() {
    // Tracked and read-only, and the host maps it writable by now: only the prefetch itself can be the reason to leave it.
    for profile in ALL {
        let (mmu, ear, mut cpu) = with_format(profile, Some(kernel(profile).ept(true, false)));
        let frame = Frame::Page { pfn: PFN + 7, writable: false };
        cpu.map(&MapFault { write: false, frame, ..write(7) });
        let task = mmu.task("mn_clear_young", Role::Caller);
        assert!(mmu.age(&task, 0, 7..8));
        let before = mmu.lookup(&task, cpu.root, 7);
        ear.take();
        let outcome = cpu.map(&MapFault { prefetch: true, write: false, ..write(7) });
        let newest = NEWEST.contains(&profile);
        assert_eq!(outcome == MapOutcome::Spurious, newest, "{profile}");
        assert_eq!(ear.sptes().is_empty(), newest, "{profile}");
        assert_eq!(mmu.lookup(&task, cpu.root, 7) == before, newest, "{profile}");
        let touched = cpu.map(&MapFault { write: false, ..write(7) });
        assert!(matches!(touched, MapOutcome::Fixed { .. }), "{profile}: an access does restore it");
        drop(task);
        done(cpu);
    }
}

#[test]
fn a_prefetch_over_a_protected_page_makes_it_writable_and_dirty_up_to_6_12() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.map(&write(7));
        let task = mmu.task("caller", Role::Caller);
        mmu.write_protect(&task, 0, 0..512, 1);
        ear.take();
        let ahead = MapFault { prefetch: true, write: false, ..tracked(7) };
        cpu.map(&ahead);
        let marks = |heard: &[Heard]| heard.contains(&Heard::Marked(0, 7));
        let heard = ear.take();
        if NEWEST.contains(&profile) {
            assert_eq!(heard, [], "{profile}: nothing is made for a guest that has not asked");
        } else {
            assert!(
                heard.contains(&Heard::Spte(7, 1, 0xe65, 0xe47, true)) && marks(&heard),
                "{profile}: {heard:x?}"
            );
        }
        drop(task);
        done(cpu);
    }
}

#[test]
fn what_is_protected_for_logging_is_dirty_again_when_a_fault_makes_it_writable() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.map(&write(7));
        let task = mmu.task("caller", Role::Caller);
        mmu.write_protect(&task, 0, 0..512, 1);
        ear.take();
        cpu.map(&tracked(7));
        let heard = ear.take();
        assert!(heard.contains(&Heard::Spte(7, 1, 0xe65, 0xe67, true)), "{profile}: {heard:x?}");
        assert!(heard.contains(&Heard::Marked(0, 7)), "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn the_maker_marks_before_the_write_and_the_bookkeeping_after_it() {
    // mark-dirty: whoever reads the bitmap sees the same; only the order tells.
    for (profile, marked_first) in
        [("5.15", false), ("5.18", false), ("6.1", true), ("6.12", true), ("7.2", true)]
    {
        let (_mmu, ear, mut cpu) = listened(profile);
        cpu.map(&write(3));
        ear.take();
        cpu.map(&tracked(7));
        let heard = ear.take();
        let (mark, leaf) = (Heard::Marked(0, 7), Heard::Spte(7, 1, empty(profile), 0xe67, true));
        let place = |what: &Heard| heard.iter().position(|h| h == what).expect("told");
        // Either way the mark is there before the guest can write through the entry and leave a trace nowhere: the fault has not returned.
        assert_eq!(heard.iter().filter(|h| **h == mark).count(), 1, "{profile}");
        assert_eq!(place(&mark) < place(&leaf), marked_first, "{profile}");
        done(cpu);
    }
}

#[test]
fn a_page_of_a_logged_slot_that_replaces_mmio_is_marked_in_every_kernel() {
    // The MMIO entry's W bit is part of its access mask, no permission that was granted and marked before.
    for profile in ALL {
        let (_mmu, ear, mut cpu) = listened(profile);
        cpu.map(&mmio(7, 10));
        ear.take();
        cpu.map(&tracked(7));
        let marks = ear.take().iter().filter(|h| matches!(h, Heard::Marked(0, 7))).count();
        assert_eq!(marks, 1, "{profile}");
        done(cpu);
    }
}

#[test]
fn a_write_that_is_refused_by_nobody_and_allowed_already_is_spurious_to_the_lockless_path() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.map(&write(7));
        ear.take();
        let fast = mmu.fast_page_fault(&cpu.task, cpu.root, 0, 7, true, false, false);
        assert_eq!((fast, ear.take()), (FastOutcome::Spurious, vec![]), "{profile}");
        done(cpu);
    }
}

#[test]
fn the_lockless_fix_adds_w_and_leaves_dirty_as_it_is_and_is_not_told() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.map(&write(7));
        // e67 -> e27 -> e25: protected without Dirty, where kernels get there.
        cpu.map(&write(7));
        let task = mmu.task("caller", Role::Caller);
        mmu.write_protect(&task, 0, 0..512, 1);
        let protected = mmu.lookup(&task, cpu.root, 7).expect("mapped").0;
        ear.take();
        let fast = mmu.fast_page_fault(&cpu.task, cpu.root, 0, 7, true, false, true);
        let FastOutcome::Fixed(spte) = fast else { panic!("{profile}: {fast:?}") };
        assert_eq!(spte.raw(), protected.raw() | 2, "{profile}");
        assert_eq!(spte.raw() & 0x40 == 0, !NEWEST.contains(&profile), "{profile}");
        assert_eq!(ear.take(), [Heard::Marked(0, 7)], "{profile}");
        drop(task);
        done(cpu);
    }
}

#[test]
fn the_lockless_fix_refuses_a_huge_leaf_of_a_logged_slot_and_serves_one_of_another() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.fault(0, 2);
        let task = mmu.task("caller", Role::Caller);
        mmu.write_protect(&task, 0, 0..512, 2);
        ear.take();
        assert_eq!(
            mmu.fast_page_fault(&task, cpu.root, 0, 7, true, false, true),
            FastOutcome::Declined,
            "{profile}"
        );
        let fast = mmu.fast_page_fault(&task, cpu.root, 0, 7, true, false, false);
        assert!(
            matches!(fast, FastOutcome::Fixed(spte) if spte.raw() & 0xfff == 0xee7),
            "{profile}: {fast:?}"
        );
        drop(task);
        done(cpu);
    }
}

#[test]
fn read_only_host_memory_has_neither_w_nor_what_allows_it_at_any_level() {
    for profile in ALL {
        let (_mmu, ear, mut cpu) = listened(profile);
        for (gfn, level, expected) in [(7, 1, 0x825), (512, 2, 0x8a5), (1 << 18, 3, 0x8a5)] {
            let frame = Frame::Page { pfn: PFN + gfn, writable: false };
            cpu.map(&MapFault { write: false, frame, ..MapFault::page(gfn, 0, level) });
            assert_eq!(ear.sptes().last(), Some(&(gfn, level, empty(profile), expected)), "{profile}");
        }
        // hugetlb: the same frame, writable now, in place.
        cpu.fault(512, 2);
        assert_eq!(ear.sptes(), [(512, 2, 0x8a5, 0xee7)], "{profile}");
        done(cpu);
    }
}

#[test]
fn an_l2_roots_leaves_ask_to_be_write_protected_for_logging_and_those_of_others_not() {
    for profile in ["6.1", "6.12", "7.2"] {
        let format = kernel(profile).format(FormatKind::Ept);
        let (mmu, _ear, mut cpu) = with_format(profile, Some(format));
        cpu.map(&write(7));
        assert!(
            !format.needs_write_protect(mmu.lookup(&cpu.task, cpu.root, 7).expect("mapped").0),
            "{profile}"
        );
        cpu.drop_root();
        let l1 = cpu.root;
        let layout = mmu.profile().role_layout;
        cpu.root =
            mmu.load_root(&cpu.task, &mut cpu.cache, layout.tdp_root(4, false, false, true)).expect("a root");
        assert_ne!(cpu.root, l1);
        cpu.map(&write(7));
        let leaf = mmu.lookup(&cpu.task, cpu.root, 7).expect("mapped").0;
        assert!(format.needs_write_protect(leaf) && format.ad_enabled(leaf), "{profile}");
        done(cpu);
    }
}

#[test]
fn the_children_of_a_split_under_the_mitigation_may_be_executed() {
    for profile in SPLITTERS {
        let (mmu, ear, mut cpu) = listened(profile);
        mmu.set_nx_huge_pages(true);
        cpu.fault(0, 3);
        ear.take();
        cpu.map(&write(7));
        let told = ear.sptes();
        assert_eq!(told[..2], [(0, 3, NX | 0xee7, 0x827), (0, 2, NX | 0xee7, 0x827)], "{profile}");
        let mut seen = [0; 4];
        mmu.leaves(&cpu.task, cpu.root, 0..1 << 18, &mut |_, level, spte| {
            // 2 MiB ones stay closed, 4 KiB ones are open.
            assert_eq!(spte.raw() & NX != 0, level == 2, "{profile}");
            seen[level as usize] += 1;
        });
        assert_eq!(seen, [0, 512, 511, 0], "{profile}");
        done(cpu);
    }
}

#[test]
fn a_fault_never_writes_over_a_frozen_entry() {
    for profile in ALL {
        let (mmu, ear, mut cpu) = listened(profile);
        cpu.map(&write(7));
        let walk = mmu.walk_lockless(&cpu.task, cpu.root, 7);
        let cell = &mmu.pool().entries(walk.table)[7];
        let leaf = cell.swap(mmu.format().frozen().raw(), std::sync::atomic::Ordering::SeqCst);
        ear.take();
        for fault in [write(7), mmio(7, 3), MapFault { prefetch: true, ..write(7) }] {
            assert_eq!((cpu.map(&fault), ear.take()), (MapOutcome::Retry, vec![]), "{profile}");
        }
        cell.store(leaf, std::sync::atomic::Ordering::SeqCst);
        done(cpu);
    }
}
