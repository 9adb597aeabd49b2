//! The dirty log's protocols: GET, CLEAR, manual protection, initially all set, D bits, and the end of logging, as each kernel has them.

#[path = "common/small.rs"]
mod common;

use std::sync::Arc;

use common::{Heard, assert_clean, flags, leaf, slot, small};
use tdpmmu_platform::{Real, Role as TaskRole, Task};
use tdpmmu_vm::{AccessOutcome, DirtyMode, GuestAccess, Region, Vm, VmError};

const KERNELS: [&str; 3] = ["6.1", "6.12", "7.2"];

/// A VM with one slot of `pages` from `base` on, every page written, at `level`; logging off. (VM, what listens, task, the slot without flags.)
fn written(
    kernel: &str,
    base: u64,
    pages: u64,
    level: u8,
    eager: bool,
) -> (Vm<Real>, Arc<Heard>, Task<Real>, Region) {
    let (vm, heard) = small(kernel, |config| config.eager_page_split = eager);
    let task = vm.task("vmm", TaskRole::Caller);
    let region = slot(&vm, &task, 0, base, pages, level);
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in base..base + pages {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    drop(vcpu);
    heard.take();
    (vm, heard, task, region)
}

fn log(vm: &Vm<Real>, task: &Task<Real>, region: &Region) {
    vm.set_memslot(task, &Region { flags: flags(true, false), ..*region }).expect("flags");
}

/// Entries that lost W, by gfn and level.
fn protected(heard: &Heard) -> Vec<(u64, u8)> {
    let lost = |&(_, _, old, new): &(u64, u8, u64, u64)| old & 2 != 0 && new & 2 == 0 && new & 1 != 0;
    heard.take().iter().filter(|event| lost(event)).map(|&(gfn, level, ..)| (gfn, level)).collect()
}

#[test]
fn with_manual_protection_get_reads_and_clear_takes_what_is_named_and_set() {
    for kernel in KERNELS {
        let (vm, heard, task, region) = written(kernel, 0, 200, 1, true);
        vm.enable_dirty_log_protect(&task, true, false).expect("manual");
        log(&vm, &task, &region);
        let mut vcpu = vm.vcpu(0).expect("free");
        for gfn in [3, 5, 70, 199] {
            assert_eq!(vcpu.access(GuestAccess::write(gfn)), Ok(AccessOutcome::FastFault), "{kernel}");
        }
        vcpu.leave();
        heard.take();
        for _ in 0..2 {
            assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![3, 5, 70, 199]), "{kernel}: GET only reads");
        }
        assert_eq!(heard.take(), []);
        // Pages 3 and 4 are named: 4 is not dirty, 5 not named.
        assert_eq!(vm.clear_dirty_log(&task, 0, 0, 0, 64, &[0b11000]), Ok(1));
        assert_eq!(protected(&heard), [(3, 1)], "{kernel}");
        assert_eq!(vm.clear_dirty_log(&task, 0, 0, 0, 64, &[0b11000]), Ok(0), "once");
        // The last piece reaches the slot's end and has bits beyond it.
        assert_eq!(vm.clear_dirty_log(&task, 0, 0, 64, 136, &[u64::MAX; 3]), Ok(2));
        assert_eq!(protected(&heard), [(70, 1), (199, 1)], "{kernel}");
        assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![5]));
        // What was not cleared is still writable: no fault, and reported all the same.
        assert!(vcpu.access(GuestAccess::write(5)).expect("memory") <= AccessOutcome::Walk);
        assert_eq!(vcpu.access(GuestAccess::write(3)), Ok(AccessOutcome::FastFault));
        assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![3, 5]));
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn clear_refuses_what_kvm_refuses_and_changes_nothing() {
    let (vm, heard, task, region) = written("6.12", 0, 200, 1, true);
    assert_eq!(vm.get_dirty_log(&task, 0, 0), Err(VmError::NotLogging { as_id: 0, id: 0 }));
    assert_eq!(vm.clear_dirty_log(&task, 0, 0, 0, 64, &[1]), Err(VmError::NotLogging { as_id: 0, id: 0 }));
    log(&vm, &task, &region);
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.access(GuestAccess::write(3)).expect("memory");
    drop(vcpu);
    heard.take();
    let flushes = vm.stats().remote_tlb_flush_requests;
    for (first, pages, words) in [
        (1, 64, 1),
        (64, 200, 4),
        (256, 0, 0),
        (u64::MAX - 63, 64, 1),
        (0, 100, 2),
        (0, 64, 2),
        (0, 128, 1),
        (128, 71, 2),
    ] {
        let error =
            vm.clear_dirty_log(&task, 0, 0, first, pages, &vec![u64::MAX; words]).expect_err("EINVAL");
        assert!(
            matches!(error, VmError::DirtyLog { as_id: 0, id: 0, .. }),
            "{first} {pages} {words}: {error}"
        );
    }
    assert_eq!(vm.clear_dirty_log(&task, 0, 1, 0, 64, &[1]), Err(VmError::NoSlot { as_id: 0, id: 1 }));
    assert_eq!(vm.get_dirty_log(&task, 7, 0), Err(VmError::NoSlot { as_id: 7, id: 0 }));
    assert_eq!((heard.take(), vm.stats().remote_tlb_flush_requests), (vec![], flushes));
    assert_eq!(vm.clear_dirty_log(&task, 0, 0, 192, 0, &[]), Ok(0), "nothing of something");
    assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![3]), "it is all there");
    assert_clean(&vm);
}

#[test]
fn an_initially_all_set_log_protects_nothing_until_its_pages_are_cleared() {
    for kernel in KERNELS {
        let (vm, heard, task, region) = written(kernel, 0, 1024, 2, false);
        vm.enable_dirty_log_protect(&task, true, true).expect("both");
        log(&vm, &task, &region);
        assert_eq!(heard.take(), [], "{kernel}: every page counts as dirty");
        assert_eq!(vm.get_dirty_log(&task, 0, 0).expect("logs").count(), 1024);
        assert_eq!(vm.clear_dirty_log(&task, 0, 0, 64, 64, &[1 << 9]), Ok(1));
        let events = heard.take();
        // W and MMU-writable go, so that the write is not fixed without the lock but splits.
        assert_eq!(events.len(), 1, "{kernel}: {events:x?}");
        let (gfn, level, old, new) = events[0];
        assert_eq!((gfn, level, old & 0xfff, new & 0xfff), (0, 2, 0xee7, 0xae5), "{kernel}");
        let mut vcpu = vm.vcpu(0).expect("free");
        assert_eq!(vcpu.access(GuestAccess::write(73)), Ok(AccessOutcome::SlowFault), "{kernel}");
        vcpu.leave();
        assert_eq!(leaf(&vcpu, 73).expect("mapped").1, 1);
        assert!(vm.get_dirty_log(&task, 0, 0).expect("logs").gfns().any(|gfn| gfn == 73));
        assert_eq!(leaf(&vcpu, 600).expect("mapped").1, 2, "{kernel}: untouched");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn clearing_splits_the_huge_leaves_around_its_pages_up_to_the_kernels_end_of_the_range() {
    // Pages of the word at 0x200 - 0x20: (bits, 2M pages split in 6.1, in 6.12 and later). The slot begins 0x20 pages before a 2M boundary.
    let cases: [(u64, &[u64], &[u64]); 4] = [
        (1 << 31 | 1 << 33, &[0x200, 0x400], &[0x200, 0x400]),
        // The last page begins a huge page: 6.1's range ends before it.
        (1 << 31 | 1 << 32, &[0x200], &[0x200, 0x400]),
        (1 << 32, &[], &[0x400]),
        (1 << 31, &[0x200], &[0x200]),
    ];
    for (kernel, old) in [("6.1", true), ("6.12", false), ("7.2", false)] {
        for (bits, split_61, split_612) in cases {
            let base = 0x200 - 0x20;
            let (vm, heard, task, region) = written(kernel, base, 0x20 + 3 * 512, 2, true);
            vm.enable_dirty_log_protect(&task, true, true).expect("both");
            log(&vm, &task, &region);
            // Of the slot's words, the one whose pages lie around the boundary between the first and the second huge page.
            let first = 512;
            assert_eq!(base + first + 32, 0x400);
            heard.take();
            let wanted = u64::from(bits.count_ones());
            assert_eq!(vm.clear_dirty_log(&task, 0, 0, first, 64, &[bits]), Ok(wanted), "{kernel}");
            let events = heard.take();
            let split: Vec<_> = events.iter().filter(|e| e.1 == 2 && e.3 & 0x80 == 0).map(|e| e.0).collect();
            assert_eq!(split, if old { split_61 } else { split_612 }, "{kernel} {bits:#x}: {events:x?}");
            // What could not be split is protected instead, unless the kernel overlooks it: of two huge pages it compares the ends rounded up.
            let huge: Vec<_> =
                events.iter().filter(|e| e.1 == 2 && e.3 & 0x82 == 0x80).map(|e| e.0).collect();
            let expected: &[u64] = if old && bits == 1 << 32 { &[0x400] } else { &[] };
            assert_eq!(huge, expected, "{kernel} {bits:#x}: {events:x?}");
            assert_clean(&vm);
        }
    }
}

#[test]
fn without_eager_splitting_huge_leaves_are_protected_and_their_write_splits() {
    for kernel in KERNELS {
        let (vm, heard, task, region) = written(kernel, 0, 512, 2, false);
        log(&vm, &task, &region);
        let events = heard.take();
        assert_eq!(events.len(), 1);
        assert_eq!(
            (events[0].2 & 0xfff, events[0].3 & 0xfff),
            (0xee7, 0xee5),
            "{kernel}: MMU-writable stays"
        );
        let mut vcpu = vm.vcpu(0).expect("free");
        assert_eq!(
            vcpu.access(GuestAccess::write(9)),
            Ok(AccessOutcome::SlowFault),
            "{kernel}: not fast, it is huge"
        );
        drop(vcpu);
        assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![9]));
        assert_clean(&vm);
    }
}

#[test]
fn turning_the_parameter_off_takes_effect_with_the_next_slot_that_logs() {
    let (vm, heard, task, region) = written("6.12", 0, 512, 2, true);
    vm.set_eager_page_split(false);
    log(&vm, &task, &region);
    assert_eq!(protected(&heard), [(0, 2)]);
    vm.set_memslot(&task, &region).expect("flags");
    vm.set_eager_page_split(true);
    log(&vm, &task, &region);
    assert_eq!(vm.stats().pages_4k, 512);
    assert_clean(&vm);
}

#[test]
fn what_the_host_maps_huge_becomes_huge_again_when_logging_ends() {
    for kernel in ["5.18", "6.1", "6.12", "7.2"] {
        let (vm, _, task, region) = written(kernel, 0, 1024, 2, true);
        log(&vm, &task, &region);
        assert_eq!((vm.stats().pages_4k, vm.stats().pages_2m), (1024, 0), "{kernel}");
        // The host breaks one of its huge pages meanwhile.
        vm.set_host_page(&task, region.hva + 700, true).expect("mapped");
        let mut vcpu = vm.vcpu(0).expect("free");
        for gfn in [3, 700, 701] {
            vcpu.access(GuestAccess::write(gfn)).expect("memory");
        }
        vcpu.leave();
        vm.set_memslot(&task, &region).expect("flags");
        for gfn in [3, 700, 701] {
            vcpu.access(GuestAccess::write(gfn)).expect("memory");
        }
        vcpu.leave();
        assert_eq!(leaf(&vcpu, 3).expect("mapped").1, 2, "{kernel}");
        assert_eq!(leaf(&vcpu, 701).expect("mapped").1, 1, "{kernel}: the host's is small");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn the_callers_host_is_asked_for_its_levels_when_logging_ends() {
    for (host, huge) in [(1, 0), (2, 1)] {
        let (vm, _) = small("7.2", |config| {
            config.host_level = Some(Arc::new(move |hva| if hva >> 9 == 1 << 20 { host } else { 1 }));
        });
        let task = vm.task("vmm", TaskRole::Caller);
        let region =
            Region { id: 0, as_id: 0, base: 0, pages: 1024, hva: 1 << 29, flags: flags(false, false) };
        vm.set_memslot(&task, &region).expect("free");
        let mut vcpu = vm.vcpu(0).expect("free");
        for gfn in 0..1024 {
            let page = tdpmmu_vm::HostAnswer { pfn: 0x8000 + gfn, level: 2, host_level: 2, writable: true };
            vcpu.map_page(GuestAccess::write(gfn), page, false).expect("memory");
        }
        drop(vcpu);
        log(&vm, &task, &region);
        assert_eq!(vm.stats().pages_4k, 1024);
        vm.set_memslot(&task, &region).expect("flags");
        assert_eq!(vm.stats().pages_2m, huge, "the first huge page of the host, and no other");
        vm.close().expect("no handle is left");
    }
}

#[test]
fn in_d_bit_mode_nothing_small_is_protected_and_hardware_tells() {
    for kernel in KERNELS {
        let (vm, heard) = small(kernel, |config| config.dirty_mode = DirtyMode::DBits);
        let task = vm.task("vmm", TaskRole::Caller);
        let region = slot(&vm, &task, 0, 0, 512, 2);
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.access(GuestAccess::write(3)).expect("memory");
        heard.take();
        vcpu.leave();
        log(&vm, &task, &region);
        assert_eq!(vm.stats().pages_4k, 512);
        assert_eq!(protected(&heard), [], "{kernel}: W stays");
        for round in 0..2 {
            // No fault: the walker sets D and logs.
            for gfn in [3, 4, 3, 500] {
                assert!(
                    vcpu.access(GuestAccess::write(gfn)).expect("memory") <= AccessOutcome::Walk,
                    "{kernel}"
                );
            }
            assert_eq!(vcpu.access(GuestAccess::read(9)), Ok(AccessOutcome::Walk));
            vcpu.leave();
            assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![3, 4, 500]), "{kernel} {round}");
        }
        assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![]), "{kernel}: reads are no writes");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_hardware_log_that_fills_up_loses_nothing() {
    let (vm, _) = small("6.12", |config| config.dirty_mode = DirtyMode::DBits);
    let task = vm.task("vmm", TaskRole::Caller);
    let region = slot(&vm, &task, 0, 0, 2048, 1);
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in 0..2048 {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    vcpu.leave();
    log(&vm, &task, &region);
    for gfn in 0..2048 {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    drop(vcpu);
    assert_eq!(vm.get_dirty_log(&task, 0, 0).expect("logs").count(), 2048);
    assert_clean(&vm);
}

#[test]
fn linux_5_10_protects_the_huge_leaves_of_an_initially_all_set_log_at_once() {
    let (vm, heard, task, region) = written("5.10", 0, 512 + 3, 2, true);
    vm.enable_dirty_log_protect(&task, true, true).expect("both");
    log(&vm, &task, &region);
    assert_eq!(protected(&heard), [(0, 2)], "not the three small ones");
    assert_eq!(vm.clear_dirty_log(&task, 0, 0, 0, 64, &[1]), Ok(1));
    assert_eq!(heard.take(), [], "CLEAR looks at small ones only");
    assert_clean(&vm);
}
