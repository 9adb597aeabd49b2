//! mmu_notifier's callbacks without the modelled host, and what the host does with it.

#[path = "common/small.rs"]
mod common;

use common::{assert_clean, flags, leaf, slot, small};
use tdpmmu_platform::Role as TaskRole;
use tdpmmu_vm::{AccessOutcome, FaultOutcome, GuestAccess, HostAnswer, Region, VmError};

const KERNELS: [&str; 3] = ["6.1", "6.12", "7.2"];

#[test]
fn an_unmap_goes_by_address_space_and_host_address_and_empties_every_slot_of_a_page() {
    for kernel in KERNELS {
        let (vm, heard) = small(kernel, |config| config.vcpus = 2);
        let task = vm.task("vmm", TaskRole::Caller);
        let hva = 0x7f00_0000;
        // The first slot by gfn is the last by host address; the third is the second's page again, published later.
        for (id, as_id, base, hva) in
            [(0, 0, 0x1000, hva + 8), (1, 0, 0x2000, hva), (2, 0, 0x3000, hva), (0, 1, 0x9000, hva)]
        {
            let region = Region { id, as_id, base, pages: 8, hva, flags: flags(false, false) };
            vm.set_memslot(&task, &region).expect("free");
        }
        let (mut a, mut b) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
        b.enter_smm();
        let page = |pfn| HostAnswer { pfn, level: 1, host_level: 1, writable: true };
        for (vcpu, gfn) in [(&mut a, 0x3001), (&mut b, 0x9001)] {
            vcpu.map_page(GuestAccess::write(gfn), page(0x51), false).expect("memory");
        }
        for gfn in [0x1000, 0x2001] {
            a.map_page(GuestAccess::write(gfn), page(gfn), false).expect("memory");
        }
        heard.take();
        vm.notifier_unmap(&task, hva..hva + 16).expect("open");
        let order: Vec<_> = heard.take().into_iter().map(|(gfn, ..)| gfn).collect();
        assert_eq!(order, [0x2001, 0x3001, 0x1000, 0x9001], "{kernel}");
        let flushes = vm.stats().remote_tlb_flush_requests;
        assert_eq!(flushes, 1, "{kernel}: one for all");
        vm.notifier_unmap(&task, hva..hva + 16).expect("open");
        vm.notifier_unmap(&task, 1..2).expect("no slot there");
        assert_eq!(vm.stats().remote_tlb_flush_requests, flushes, "{kernel}: nothing was there");
        for hvas in [5..5, (1 << 52) - 1..(1 << 52) + 1] {
            assert!(
                matches!(vm.notifier_unmap(&task, hvas.clone()), Err(VmError::BadHva { .. })),
                "{hvas:?}"
            );
        }
        drop((a, b));
        assert_clean(&vm);
    }
}

#[test]
fn aging_takes_accessed_once_and_a_test_changes_nothing() {
    for kernel in KERNELS {
        let (vm, heard) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        let region = slot(&vm, &task, 0, 0, 1024, 1);
        let hvas = region.hva..region.hva + 1024;
        let mut vcpu = vm.vcpu(0).expect("free");
        assert_eq!(vm.notifier_test_age(&task, hvas.clone()), Ok(false), "nothing is mapped");
        for gfn in [3, 600] {
            vcpu.fault(GuestAccess::write(gfn), false).expect("memory");
        }
        heard.take();
        assert_eq!(vm.notifier_test_age(&task, hvas.clone()), Ok(true));
        assert_eq!(heard.take(), []);
        let flushes = vm.stats().remote_tlb_flush_requests;
        assert_eq!(vm.age_gfns(&task, 0..1024), Ok(true), "{kernel}");
        let aged: Vec<_> = heard.take().into_iter().map(|(gfn, ..)| gfn).collect();
        assert_eq!(aged, [3, 600], "{kernel}");
        assert_eq!(vm.stats().remote_tlb_flush_requests, flushes, "no flush for clear_young");
        assert_eq!(vm.notifier_age_flush(&task, hvas.clone()), Ok(false), "{kernel}: old already");
        assert_eq!(vm.stats().remote_tlb_flush_requests, flushes, "and none where nothing was young");
        // The guest touches it again: hardware sets the bit, no fault.
        vcpu.fault(GuestAccess::read(3), false).expect("memory");
        drop(vcpu);
        let mut vcpu = vm.vcpu(0).expect("free");
        assert_eq!(vcpu.access(GuestAccess::write(3)), Ok(AccessOutcome::Walk));
        vcpu.leave();
        assert_eq!(vm.test_age_gfns(&task, 3..4), Ok(true), "{kernel}");
        assert_eq!(vm.notifier_age_flush(&task, hvas.clone()), Ok(true));
        let flushed = vm.stats().remote_tlb_flush_requests - flushes;
        assert_eq!(flushed, u64::from(kernel != "7.2"), "{kernel}: none from 6.13 on");
        assert!(matches!(vm.age_gfns(&task, 1000..2000), Err(VmError::BadRange { .. })));
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn change_pte_puts_a_read_only_page_in_and_takes_a_writable_one_out_where_the_kernel_has_it() {
    let (vm, heard) = small("6.1", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    let hva = 0x1_0000;
    vm.set_memslot(&task, &Region { id: 0, as_id: 0, base: 0, pages: 512, hva, flags: flags(false, false) })
        .expect("free");
    let mut vcpu = vm.vcpu(0).expect("free");
    assert_eq!(
        vm.notifier_change_pte(&task, hva + 3, 0x77, false),
        Ok(false),
        "nothing mapped: nothing to change"
    );
    for gfn in [3, 4] {
        let page = HostAnswer { pfn: 0x100 + gfn, level: 1, host_level: 1, writable: true };
        vcpu.map_page(GuestAccess::write(gfn), page, false).expect("memory");
    }
    heard.take();
    assert_eq!(vm.notifier_change_pte(&task, hva + 3, 0x77, false), Ok(true));
    let (spte, _) = leaf(&vcpu, 3).expect("the new page is there");
    assert_eq!((spte.pfn(), vm.mmu().format().is_writable(spte)), (0x77, false));
    assert_eq!(heard.take().len(), 2, "out, then in: no present leaf changes its frame");
    assert_eq!(vm.notifier_change_pte(&task, hva + 4, 0x78, true), Ok(true));
    assert!(leaf(&vcpu, 4).is_none(), "a writable page comes back by a fault");
    drop(vcpu);
    assert_clean(&vm);
    let (vm, _) = small("6.12", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    let error = vm.notifier_change_pte(&task, hva, 1, true).expect_err("gone in 6.10");
    assert_eq!(error, VmError::Unsupported { what: "change_pte", kernel: "6.12" });
}

#[test]
fn a_page_that_the_host_shares_is_mapped_read_only_and_copied_by_the_first_write() {
    for kernel in KERNELS {
        let (vm, heard) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        let region = slot(&vm, &task, 0, 0, 512, 2);
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.fault(GuestAccess::write(3), false).expect("memory");
        let shared = vm.set_host_page(&task, region.hva + 3, false).expect("mapped");
        assert!(leaf(&vcpu, 3).is_none(), "{kernel}: the host split its huge page: all of it was announced");
        vcpu.fault(GuestAccess::read(3), false).expect("memory");
        let (spte, level) = leaf(&vcpu, 3).expect("mapped");
        assert_eq!((spte.pfn(), level, vm.mmu().format().is_writable(spte)), (shared, 1, false), "{kernel}");
        heard.take();
        assert_eq!(
            vcpu.fault(GuestAccess::write(3), true),
            Ok(FaultOutcome::Retry),
            "its own copy moved the sequence"
        );
        assert_eq!(heard.take().len(), 1, "{kernel}: the shared page is out");
        assert!(matches!(vcpu.fault(GuestAccess::write(3), false), Ok(FaultOutcome::Fixed { .. })));
        let (spte, _) = leaf(&vcpu, 3).expect("mapped");
        assert!(spte.pfn() != shared && vm.mmu().format().is_writable(spte), "{kernel}");
        assert!(matches!(vm.set_host_page(&task, 1, true), Err(VmError::BadHva { .. })));
        assert!(matches!(vm.set_host_page(&task, u64::MAX, true), Err(VmError::BadHva { .. })));
        drop(vcpu);
        assert_clean(&vm);
    }
}
