//! Dirty rings: what is pushed, harvested, reset, and when a vCPU must stop.

#[path = "common/small.rs"]
mod common;

use common::{Heard, assert_clean, flags, slot, small};
use tdpmmu_platform::{Real, Role as TaskRole, Task};
use tdpmmu_vm::{AccessOutcome, DirtyMode, GuestAccess, Region, RingEntry, Vm, VmConfig, VmError};

const KERNELS: [&str; 3] = ["6.1", "6.12", "7.2"];

fn ringed(kernel: &str, entries: u32) -> (Vm<Real>, std::sync::Arc<Heard>, Task<Real>, Region) {
    let (vm, heard) = small(kernel, |config: &mut VmConfig| {
        config.dirty_ring = Some(entries);
        config.vcpus = 2;
    });
    let task = vm.task("vmm", TaskRole::Caller);
    let plain = slot(&vm, &task, 3, 0x1000, 1024, 1);
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in 0x1000..0x1400 {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    drop(vcpu);
    vm.set_memslot(&task, &Region { flags: flags(true, false), ..plain }).expect("flags");
    heard.take();
    (vm, heard, task, plain)
}

fn at(offset: u64) -> RingEntry {
    RingEntry { slot: 3, as_id: 0, offset }
}

#[test]
fn writes_are_pushed_in_order_to_their_vcpus_ring_and_protected_again_by_the_reset() {
    for kernel in KERNELS {
        let (vm, heard, task, _) = ringed(kernel, 1024);
        let (mut a, mut b) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
        for gfn in [0x1007, 0x1003, 0x1200] {
            assert_eq!(a.access(GuestAccess::write(gfn)), Ok(AccessOutcome::FastFault), "{kernel}");
        }
        b.access(GuestAccess::write(0x1005)).expect("memory");
        a.leave();
        b.leave();
        assert_eq!(vm.reset_dirty_rings(&task), Ok(0), "nothing is harvested yet");
        assert_eq!(vm.dirty_ring(0), Ok(vec![at(7), at(3), at(0x200)]), "{kernel}");
        assert_eq!(vm.dirty_ring(0), Ok(vec![]), "once");
        heard.take();
        let flushes = vm.stats().remote_tlb_flush_requests;
        assert_eq!(vm.reset_dirty_rings(&task), Ok(3), "{kernel}: the other ring is not harvested");
        let order: Vec<_> = heard.take().iter().map(|event| event.0).collect();
        assert_eq!(order, [0x1003, 0x1007, 0x1200], "{kernel}: neighbours by one mask, ascending");
        assert_eq!(vm.stats().remote_tlb_flush_requests, flushes + 1, "one flush for all");
        assert_eq!(vm.reset_dirty_rings(&task), Ok(0));
        assert_eq!(vm.stats().remote_tlb_flush_requests, flushes + 1, "and none for nothing");
        // Seen again; what the other vCPU has made writable faults nobody.
        assert_eq!(a.access(GuestAccess::write(0x1003)), Ok(AccessOutcome::FastFault));
        assert!(a.access(GuestAccess::write(0x1005)).expect("memory") <= AccessOutcome::Walk);
        a.leave();
        assert_eq!((vm.dirty_ring(0), vm.dirty_ring(1)), (Ok(vec![at(3)]), Ok(vec![at(5)])));
        drop((a, b));
        assert_clean(&vm);
    }
}

#[test]
fn a_vcpu_whose_ring_is_soft_full_enters_no_more_until_it_is_reset() {
    let (vm, _, task, _) = ringed("6.12", 256);
    let mut vcpu = vm.vcpu(0).expect("free");
    let full = (0x1000..0x1400).find_map(|gfn| match vcpu.access(GuestAccess::write(gfn)) {
        Ok(_) => None,
        Err(error) => Some((gfn - 0x1000, error)),
    });
    // 64 of 256 are kept back. The 192nd is in the ring, and its write waits for the next entry.
    assert_eq!(full, Some((191, VmError::RingFull { vcpu: 0 })));
    assert_eq!(vcpu.reload(), Err(VmError::RingFull { vcpu: 0 }));
    assert_eq!(vm.reset_dirty_rings(&task), Ok(0), "nothing was harvested");
    assert_eq!(vcpu.reload(), Err(VmError::RingFull { vcpu: 0 }));
    // The other vCPU runs on.
    let mut other = vm.vcpu(1).expect("free");
    assert_eq!(other.reload(), Ok(true));
    assert_eq!(vm.dirty_ring(0).map(|ring| ring.len()), Ok(192));
    assert_eq!(vm.reset_dirty_rings(&task), Ok(192));
    assert_eq!(vcpu.access(GuestAccess::write(0x1000)), Ok(AccessOutcome::FastFault));
    vcpu.leave();
    // Who faults without entering the guest meets the end of the ring itself, and nothing is lost.
    for gfn in 0x1100.. {
        match vcpu.fault(GuestAccess::write(gfn), true) {
            Ok(_) => continue,
            Err(error) => assert_eq!(error, VmError::RingFull { vcpu: 0 }),
        }
        assert_eq!(gfn - 0x1100, 255);
        break;
    }
    drop((vcpu, other));
    assert_clean(&vm);
}

#[test]
fn a_page_whose_slot_has_gone_is_reset_without_a_trace() {
    let (vm, heard, task, plain) = ringed("6.12", 1024);
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in [0x1001, 0x13ff] {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    vcpu.leave();
    assert_eq!(vm.dirty_ring(0).map(|ring| ring.len()), Ok(2));
    vm.delete_memslot(&task, 0, 3).expect("there");
    heard.take();
    // A shorter slot of the same id, with memory in it.
    vm.set_memslot(&task, &Region { pages: 512, flags: flags(true, false), ..plain }).expect("free");
    for gfn in [0x1001, 0x11ff] {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    vcpu.leave();
    heard.take();
    assert_eq!(vm.reset_dirty_rings(&task), Ok(2));
    let order: Vec<_> = heard.take().iter().map(|event| event.0).collect();
    assert_eq!(order, [0x1001], "the second lies beyond the new slot's end");
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn a_vm_has_rings_or_bitmaps_and_says_which() {
    let (vm, _, task, _) = ringed("6.12", 1024);
    for error in [
        vm.get_dirty_log(&task, 0, 3).expect_err("ENXIO"),
        vm.clear_dirty_log(&task, 0, 3, 0, 64, &[1]).expect_err("ENXIO"),
    ] {
        assert_eq!(error, VmError::OtherLog { what: "a dirty bitmap", has: "rings" });
    }
    assert_eq!(vm.dirty_ring(2), Err(VmError::NoVcpu { vcpu: 2, count: 2 }));
    let (vm, _) = small("6.12", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    assert!(matches!(vm.dirty_ring(0), Err(VmError::OtherLog { has: "bitmaps", .. })));
    assert!(matches!(vm.reset_dirty_rings(&task), Err(VmError::OtherLog { has: "bitmaps", .. })));
    for entries in [0, 100, 128, 1 << 17] {
        let config =
            VmConfig { dirty_ring: Some(entries), ..VmConfig::new(tdpmmu_spte::KernelProfile::default()) };
        let error = Vm::<Real>::new(config).err().expect("refused");
        assert!(matches!(error, VmError::Config { what: "dirty_ring", .. }), "{error}");
    }
}

#[test]
fn what_smm_writes_names_its_address_space() {
    let (vm, _, task, _) = ringed("6.12", 1024);
    vm.share_memory_with_smm(&task).expect("free");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.enter_smm();
    vcpu.access(GuestAccess::write(0x1009)).expect("memory");
    vcpu.exit_smm();
    assert_eq!(vm.dirty_ring(0), Ok(vec![RingEntry { slot: 3, as_id: 1, offset: 9 }]));
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn pages_that_hardware_logs_get_into_the_ring_before_they_are_harvested() {
    let (vm, _) = small("6.12", |config| {
        config.dirty_ring = Some(1024);
        config.dirty_mode = DirtyMode::DBits;
    });
    let task = vm.task("vmm", TaskRole::Caller);
    let plain = slot(&vm, &task, 3, 0x1000, 512, 1);
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in 0x1000..0x1010 {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    vcpu.leave();
    vm.set_memslot(&task, &Region { flags: flags(true, false), ..plain }).expect("flags");
    for _ in 0..2 {
        for gfn in [0x1009, 0x1002] {
            assert_eq!(vcpu.access(GuestAccess::write(gfn)), Ok(AccessOutcome::Walk));
        }
        vcpu.leave();
        assert_eq!(vm.dirty_ring(0), Ok(vec![at(9), at(2)]));
        assert_eq!(vm.reset_dirty_rings(&task), Ok(2));
    }
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn bulk_population_is_refused_where_a_ring_would_have_to_tell() {
    let (vm, _, _, _) = ringed("6.12", 1024);
    let options = tdpmmu_vm::BulkOptions::default();
    vm.unmap_gfns(&vm.task("host", TaskRole::Caller), 0x1000..0x1400, true).expect("open");
    let mut vcpu = vm.vcpu(0).expect("free");
    let progress = tdpmmu_vm::Progress::default();
    let error = vm.populate_bulk(&mut vcpu, 0x1000..0x1400, &options, &progress).expect_err("no ring");
    drop(vcpu);
    assert!(matches!(error, VmError::BadRange { .. }), "{error}");
    assert_clean(&vm);
}
