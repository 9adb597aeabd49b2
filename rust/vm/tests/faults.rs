//! The fault pipeline in stages, with a host whose answers are given; prefaults; the NX mitigation; what is counted.

#[path = "common/small.rs"]
mod common;

use common::{assert_clean, flags, leaf, slot, small};
use tdpmmu_platform::Role as TaskRole;
use tdpmmu_vm::{FaultOutcome, GuestAccess, HostAnswer, Region, Vm, VmError};

const KERNELS: [&str; 3] = ["6.1", "6.12", "7.2"];

const fn answer(pfn: u64, level: u8, writable: bool) -> HostAnswer {
    HostAnswer { pfn, level, host_level: level, writable }
}

#[test]
fn a_page_is_mapped_as_the_host_answers_and_no_larger_than_the_slot_allows() {
    for kernel in KERNELS {
        let (vm, _) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        // The frames come from the caller: nothing of the modelled host is behind these addresses.
        let region = Region {
            id: 0,
            as_id: 0,
            base: 512,
            pages: 1024 + 8,
            hva: (1 << 40) + 512,
            flags: flags(false, false),
        };
        vm.set_memslot(&task, &region).expect("free");
        let mut vcpu = vm.vcpu(0).expect("free");
        let huge = vcpu.map_page(GuestAccess::write(512 + 7), answer(0x4_0007, 2, true), false);
        assert!(matches!(huge, Ok(FaultOutcome::Fixed { level: 2, .. })), "{kernel}: {huge:?}");
        let (spte, level) = leaf(&vcpu, 512).expect("mapped");
        assert_eq!((spte.pfn(), level), (0x4_0000, 2), "aligned down by the mapping, not by the caller");
        let tail = vcpu.map_page(GuestAccess::read(1536 + 3), answer(0x5_0003, 2, false), false);
        assert!(
            matches!(tail, Ok(FaultOutcome::Fixed { level: 1, .. })),
            "{kernel}: the slot's end is not aligned"
        );
        let (spte, _) = leaf(&vcpu, 1536 + 3).expect("mapped");
        assert!(!vm.mmu().format().is_writable(spte), "{kernel}: as the host maps it");
        // Refused, and nothing is mapped.
        for (level, host_level, pfn) in [(0, 1, 1), (4, 4, 1), (1, 0, 1), (1, 1, 1 << 40)] {
            let wrong = HostAnswer { pfn, level, host_level, writable: true };
            let error = vcpu.map_page(GuestAccess::read(1024), wrong, false).expect_err("cannot be");
            assert_eq!(error, VmError::BadAnswer { answer: wrong, rule: error_rule(&error) });
        }
        assert!(leaf(&vcpu, 1024).is_none());
        drop(vcpu);
        assert_clean(&vm);
    }
}

fn error_rule(error: &VmError) -> &'static str {
    match error {
        VmError::BadAnswer { rule, .. } => rule,
        other => panic!("{other}"),
    }
}

#[test]
fn a_present_leaf_is_fixed_by_the_first_stage_only_where_it_proves_it() {
    for kernel in KERNELS {
        let (vm, heard) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        let plain = slot(&vm, &task, 0, 0, 512, 1);
        let mut vcpu = vm.vcpu(0).expect("free");
        assert_eq!(vcpu.fast_fault(GuestAccess::write(5), true), None, "no root yet");
        vcpu.fault(GuestAccess::write(5), false).expect("memory");
        assert_eq!(vcpu.fast_fault(GuestAccess::write(5), false), None, "not present: the slow path's");
        assert_eq!(vcpu.fast_fault(GuestAccess::write(5), true), Some(FaultOutcome::Spurious));
        vm.set_memslot(&task, &Region { flags: flags(true, false), ..plain }).expect("flags");
        heard.take();
        assert!(matches!(vcpu.fast_fault(GuestAccess::write(5), true), Some(FaultOutcome::Fast(_))));
        assert_eq!(heard.take(), [], "{kernel}: a fast fix is not reported");
        assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![5]));
        // Write-protected by the shadow MMU's rule, MMU-writable gone: never fast again.
        assert_eq!(vm.write_protect_gfn(&task, 0, 5), Ok(true));
        assert_eq!(vcpu.fast_fault(GuestAccess::write(5), true), None);
        let stats = vm.stats();
        assert_eq!((stats.pf_fixed, stats.pf_fast, stats.pf_spurious), (2, 2, 1), "{kernel}: {stats:?}");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_gfn_without_memslot_gets_an_mmio_entry_that_counts_as_created_and_not_as_fixed() {
    for kernel in KERNELS {
        let (vm, _) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 512, 1);
        let mut vcpu = vm.vcpu(0).expect("free");
        assert_eq!(vcpu.map_mmio(GuestAccess::read(0x9000), false), Ok(FaultOutcome::Emulate));
        assert_eq!(vcpu.fault(GuestAccess::read(0x9001), false), Ok(FaultOutcome::Emulate));
        assert_eq!(vcpu.fault(GuestAccess::read(0x9001), false), Ok(FaultOutcome::Emulate), "the same again");
        assert_eq!(
            vcpu.fault(GuestAccess::read(1 << 40), false),
            Ok(FaultOutcome::Emulate),
            "beyond the table"
        );
        let stats = vm.stats();
        assert_eq!((stats.pf_mmio_spte_created, stats.pf_fixed, stats.pf_emulate), (3, 0, 4), "{kernel}");
        assert_eq!(stats.pages_4k, 0, "an MMIO entry is no page");
        assert!(matches!(vcpu.map_mmio(GuestAccess::read(3), false), Err(VmError::BadRange { .. })));
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_read_only_slot_is_mapped_without_w_and_writes_to_it_are_emulated() {
    let (vm, heard) = small("6.12", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    let hva = vm.side().primary.region(512, 0, 2, true).expect("room");
    let rom = Region { id: 0, as_id: 0, base: 0, pages: 512, hva, flags: flags(false, true) };
    vm.set_memslot(&task, &rom).expect("free");
    let mut vcpu = vm.vcpu(0).expect("free");
    assert!(matches!(vcpu.fault(GuestAccess::read(5), false), Ok(FaultOutcome::Fixed { .. })));
    let (spte, _) = leaf(&vcpu, 5).expect("mapped");
    assert!(!vm.mmu().format().is_writable(spte) && !vm.mmu().format().is_host_writable(spte));
    assert_eq!(vcpu.fault(GuestAccess::write(5), true), Ok(FaultOutcome::Emulate));
    heard.take();
    // Logging a slot that nobody can dirty changes no SPTE, on and off.
    for logs in [true, false] {
        vm.set_memslot(&task, &Region { flags: flags(logs, true), ..rom }).expect("flags");
    }
    assert_eq!(heard.take(), []);
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn a_prefault_maps_its_range_without_accessed_and_says_what_is_left() {
    for (kernel, level) in [("6.12", 1), ("6.12", 2), ("7.2", 2)] {
        let (vm, _) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 1024, level);
        let mut vcpu = vm.vcpu(0).expect("free");
        assert_eq!(vcpu.pre_fault(3..700), Ok(0));
        let stats = vm.stats();
        let expected = if level == 1 { (697, 0) } else { (0, 2) };
        assert_eq!((stats.pages_4k, stats.pages_2m), expected, "{kernel}");
        assert_eq!((stats.pf_fixed, stats.pf_taken), (0, 0), "a prefault is no guest's fault");
        let (spte, _) = leaf(&vcpu, 600).expect("mapped");
        assert!(!vm.mmu().format().is_accessed(spte), "{kernel}: {spte:?}");
        // Half inside: the ioctl succeeds and tells the rest. Outside: ENOENT, an MMIO entry stays.
        assert_eq!(vcpu.pre_fault(1000..1100), Ok(76));
        let error = vcpu.pre_fault(5000..5001).expect_err("no slot");
        assert!(matches!(error, VmError::BadRange { start: 5000, .. }), "{error}");
        assert_eq!(vm.stats().pf_mmio_spte_created, 2, "{kernel}");
        assert!(matches!(vcpu.pre_fault(7..7), Err(VmError::BadRange { .. })));
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn turning_the_nx_mitigation_on_zaps_everything_and_a_fetch_splits_from_then_on() {
    for kernel in KERNELS {
        let (vm, _) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 1024, 2);
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.fault(GuestAccess::read(5), false).expect("memory");
        assert_eq!(vm.set_nx_huge_pages(&task, false), Ok(None), "as it was: nothing");
        assert!(matches!(vm.set_nx_huge_pages(&task, true), Ok(Some(_))));
        assert_eq!(vm.stats().pages_2m, 0, "{kernel}");
        assert_eq!(vcpu.reload(), Ok(true));
        for gfn in [5, 517] {
            assert!(matches!(
                vcpu.fault(GuestAccess::read(gfn), false),
                Ok(FaultOutcome::Fixed { level: 2, .. })
            ));
            let (spte, _) = leaf(&vcpu, gfn).expect("mapped");
            assert!(!vm.mmu().format().is_executable(spte), "{kernel}");
            let fetched = vcpu.fault(GuestAccess::fetch(gfn), true).expect("memory");
            // Where children of a split are executable already, 7.2 says so; 6.12 makes the leaf once more.
            let spurious = fetched == FaultOutcome::Spurious;
            assert_eq!(spurious, kernel == "7.2", "{kernel}: {fetched:?}");
            let (spte, level) = leaf(&vcpu, gfn).expect("mapped");
            assert!(level == 1 && vm.mmu().format().is_executable(spte), "{kernel}");
        }
        assert_eq!(vm.stats().nx_lpage_splits, 2, "{kernel}");
        assert_eq!(vm.recover_nx(&task, 0), Ok(0), "ratio 0 is off");
        assert_eq!(vm.recover_nx(&task, 2), Ok(1), "one in two");
        assert_eq!(vm.stats().nx_lpage_splits, 1);
        assert!(leaf(&vcpu, 5).is_none() && leaf(&vcpu, 517).is_some(), "{kernel}: the oldest first");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn the_recovery_leaves_what_is_logged_alone_where_the_kernel_looks() {
    for (kernel, zapped) in [("6.1", 1), ("6.12", 0), ("7.2", 0)] {
        let (vm, _) = small(kernel, |config| config.nx_huge_pages = true);
        let task = vm.task("vmm", TaskRole::Caller);
        let plain = slot(&vm, &task, 0, 0, 512, 2);
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.fault(GuestAccess::fetch(5), false).expect("memory");
        assert_eq!(vm.stats().nx_lpage_splits, 1, "{kernel}");
        vm.set_memslot(&task, &Region { flags: flags(true, false), ..plain }).expect("flags");
        assert_eq!(vm.recover_nx(&task, 1), Ok(zapped), "{kernel}");
        assert_eq!(vm.stats().nx_lpage_splits, 0, "{kernel}: off the list in any case");
        assert_eq!(leaf(&vcpu, 5).is_none(), zapped == 1, "{kernel}");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_zap_of_a_range_takes_both_address_spaces_and_leaves_the_roots() {
    for kernel in KERNELS {
        let (vm, _) = small(kernel, |config| config.vcpus = 2);
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 512, 1);
        vm.share_memory_with_smm(&task).expect("free");
        let (mut a, mut b) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
        b.enter_smm();
        for gfn in 0..20 {
            a.fault(GuestAccess::write(gfn), false).expect("memory");
            b.fault(GuestAccess::write(gfn), false).expect("memory");
        }
        let flushes = vm.stats().remote_tlb_flush_requests;
        vm.zap_gfn_range(&task, 5..15).expect("open");
        assert_eq!(vm.stats().pages_4k, 20, "{kernel}");
        assert_eq!(vm.stats().remote_tlb_flush_requests, flushes + 1);
        assert!(
            leaf(&a, 4).is_some()
                && leaf(&a, 5).is_none()
                && leaf(&b, 14).is_none()
                && leaf(&b, 15).is_some()
        );
        vm.zap_gfn_range(&task, 5..15).expect("open");
        let again = vm.stats().remote_tlb_flush_requests - flushes;
        assert_eq!(again, 1, "{kernel}: nothing there, nothing to flush");
        assert!(matches!(vm.zap_gfn_range(&task, 5..5), Err(VmError::BadRange { .. })));
        drop((a, b));
        assert_clean(&vm);
    }
}

#[test]
fn a_flush_counts_as_one_that_kicked_only_if_somebody_was_in_the_guest() {
    let (vm, _) = small("6.12", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    let plain = slot(&vm, &task, 0, 0, 512, 1);
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.fault(GuestAccess::write(1), false).expect("memory");
    vm.unmap_gfns(&task, 1..2, true).expect("open");
    let stats = vm.stats();
    assert_eq!((stats.remote_tlb_flush, stats.remote_tlb_flush_requests), (0, 1));
    drop(vcpu);
    std::thread::scope(|scope| {
        let vm: &Vm<_> = &vm;
        let guest = scope.spawn(move || {
            let mut vcpu = vm.vcpu(0).expect("free");
            while vcpu.access(GuestAccess::write(3)).expect("memory") != tdpmmu_vm::AccessOutcome::Stopped {}
        });
        while !vm.vcpu_state(0).expect("there").in_guest::<tdpmmu_platform::Real>() {
            std::thread::yield_now();
        }
        let kicked = loop {
            vm.unmap_hva(&task, plain.hva + 3..plain.hva + 4, true).expect("open");
            let stats = vm.stats();
            if stats.remote_tlb_flush != 0 {
                break stats;
            }
        };
        assert!(kicked.remote_tlb_flush <= kicked.remote_tlb_flush_requests);
        vm.stop_vcpus(&task);
        guest.join().expect("no panic");
    });
    vm.resume();
    assert_clean(&vm);
}

#[test]
fn an_access_that_writes_and_fetches_is_none() {
    let (vm, _) = small("6.12", |config| config.nx_huge_pages = true);
    let task = vm.task("vmm", TaskRole::Caller);
    vm.add_memory(&task, 0, 1024, 2).expect("memory");
    let mut vcpu = vm.vcpu(0).expect("free");
    let both = GuestAccess { gfn: 3, write: true, exec: true };
    assert!(matches!(vcpu.access(both), Err(VmError::BadAccess { gfn: 3 })));
    vcpu.access(GuestAccess::write(3)).expect("memory");
    vcpu.access(GuestAccess::fetch(3)).expect("memory");
    drop(vcpu);
    assert_clean(&vm);
}
