//! Everything at once, on shadow pages: racing faults beside zaps, host unmaps and slots that come and go.

#[path = "common/stress.rs"]
mod stress;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use stress::{Random, rounds};
use tdpmmu_platform::{Real, Role};
use tdpmmu_shadow::{ReclaimKind, SHADOW_DESIGNS};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{
    AccessOutcome, GuestAccess, GuestOs, Paging, Region, ShadowSpec, SlotFlags, SlotUpdate, Vm, VmConfig,
    VmError,
};

/// Pages of the memory that stays.
const PAGES: u64 = 2048;
/// The slot that comes and goes.
const CHURNED: std::ops::Range<u64> = 0x4_0000..0x4_0200;
/// The guest's tables.
const TABLES: std::ops::Range<u64> = 0x10_0000..0x10_0800;
const VCPUS: usize = 3;

fn config(design: &str, paging: Paging) -> VmConfig {
    VmConfig {
        design: Some(design.into()),
        shadow: ShadowSpec { paging, ..ShadowSpec::default() },
        vcpus: VCPUS,
        max_tables: 20_000,
        hugepages: false,
        quarantine: true,
        host_pages: 1 << 21,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    }
}

fn region(vm: &Vm<Real>, id: u16, gfns: &std::ops::Range<u64>) -> Region {
    let pages = gfns.end - gfns.start;
    let hva = vm.side().primary.region(pages, gfns.start, 1, true).expect("room");
    Region { id, as_id: 0, base: gfns.start, pages, hva, flags: SlotFlags::default() }
}

/// Memory, tables, and a process a vCPU that maps everything one to one.
fn machine(config: VmConfig) -> (Vm<Real>, GuestOs<Real>, Region) {
    let vm = Vm::<Real>::new(config).expect("a small VM");
    let task = vm.task("setup", Role::Caller);
    vm.set_memslot(&task, &region(&vm, 0, &(0..PAGES))).expect("free");
    vm.set_memslot(&task, &region(&vm, 1, &TABLES)).expect("free");
    let churned = region(&vm, 2, &CHURNED);
    vm.set_memslot(&task, &churned).expect("free");
    let os = GuestOs::new(0, TABLES);
    if vm.paging() == Paging::Guest {
        for id in 0..vm.vcpu_count() {
            let cr3 = os.new_process(&vm).expect("tables");
            os.build_linear(&vm, cr3, 0..PAGES, 0, 1).expect("tables");
            os.build_linear(&vm, cr3, CHURNED, CHURNED.start, 1).expect("tables");
            vm.vcpu(id).expect("free").set_cr3(cr3).expect("shadowed");
        }
    }
    (vm, os, churned)
}

/// One vCPU: faults until told to stop; what a guest may see is accepted, anything else is a bug.
fn run(vm: &Vm<Real>, id: usize, stop: &AtomicBool, accesses: &AtomicU64) {
    let mut random = Random(0x9e37_79b9 + id as u64);
    let mut vcpu = vm.vcpu(id).expect("free");
    while !stop.load(Relaxed) {
        let gfn = match random.below(8) {
            0 => CHURNED.start + random.below(CHURNED.end - CHURNED.start),
            _ => random.below(PAGES),
        };
        let access = GuestAccess { gfn, write: random.below(2) == 0, exec: false };
        match vcpu.access(access) {
            Ok(AccessOutcome::Stopped) => return,
            // A slot that is away at the moment is a device; the tables are never written here.
            Ok(AccessOutcome::Emulate) => assert!(CHURNED.contains(&gfn), "gfn {gfn:#x}"),
            Ok(_) => {}
            Err(VmError::Pool(_)) => vcpu.leave(),
            Err(error) => panic!("vCPU {id}, gfn {gfn:#x}: {error}"),
        }
        match random.below(64) {
            0 => vcpu.unload(),
            1 => {
                vcpu.walk_shadow(gfn);
            }
            2 => vcpu.invlpg(gfn),
            3 => vcpu.flush_guest_tlb(),
            4 => vcpu.leave(),
            _ => {}
        }
        accesses.fetch_add(1, Relaxed);
    }
}

fn churn(vm: &Vm<Real>, churned: &Region, times: u64) {
    let task = vm.task("churner", Role::Caller);
    for round in 0..times {
        assert!(vm.delete_memslot(&task, 0, 2).is_ok(), "round {round}");
        if round % 3 == 0 {
            vm.fast_zap(&task).expect("open");
        }
        assert_eq!(vm.set_memslot(&task, churned), Ok(SlotUpdate::Created));
        thread::yield_now();
    }
}

fn unmap(vm: &Vm<Real>, stop: &AtomicBool) {
    let mut random = Random(77);
    let task = vm.task("host", Role::Caller);
    while !stop.load(Relaxed) {
        let gfn = random.below(PAGES - 64);
        match random.below(4) {
            0 => drop(vm.age_gfns(&task, gfn..gfn + 16)),
            _ => drop(vm.unmap_gfns(&task, gfn..gfn + 1 + random.below(32), true)),
        }
        thread::yield_now();
    }
}

fn together(config: VmConfig, churns: u64) -> u64 {
    let (vm, _os, churned) = machine(config);
    let (stop, accesses) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let vm = &vm;
        let (stop, accesses) = (&stop, &accesses);
        for id in 0..VCPUS {
            scope.spawn(move || run(vm, id, stop, accesses));
        }
        scope.spawn(move || unmap(vm, stop));
        churn(vm, &churned, churns);
        stop.store(true, Relaxed);
    });
    let shadow = vm.shadow().expect("a shadow design");
    assert_eq!(shadow.violations(), Vec::<String>::new());
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
    accesses.into_inner()
}

#[test]
fn a_hundred_churns_beside_racing_faults_and_host_unmaps_leave_nothing_behind() {
    for info in SHADOW_DESIGNS {
        for paging in [Paging::Direct, Paging::Guest] {
            let accesses = together(config(info.name, paging), rounds(100));
            assert!(accesses > 100, "{} {paging:?}: {accesses} accesses", info.name);
        }
    }
}

#[test]
fn every_reclamation_holds_beside_walkers_and_churns() {
    for reclaim in ReclaimKind::ALL {
        let mut config = config("shadow-gen", Paging::Direct);
        config.shadow.reclaim = reclaim;
        together(config, rounds(40));
    }
}

#[test]
fn a_small_quota_holds_beside_churns() {
    for paging in [Paging::Direct, Paging::Guest] {
        for design in ["shadow-gen", "shadow-gen-kept"] {
            let mut config = config(design, paging);
            config.shadow.quota = Some(40);
            together(config, rounds(40));
        }
    }
}

#[test]
fn a_zap_ends_while_vcpus_keep_making_pages() {
    // Not shadow-walk-break, nor shadow-slot where no slot goes: they start over after each yield, and no end is promised.
    for design in ["shadow-gen", "shadow-gen-kept", "shadow-walk"] {
        for paging in [Paging::Direct, Paging::Guest] {
            let (vm, _os, _) = machine(config(design, paging));
            let (stop, accesses) = (AtomicBool::new(false), AtomicU64::new(0));
            thread::scope(|scope| {
                let (vm, stop, accesses) = (&vm, &stop, &accesses);
                for id in 0..VCPUS {
                    scope.spawn(move || run(vm, id, stop, accesses));
                }
                let task = vm.task("zapper", Role::Caller);
                let shadow = vm.shadow().expect("a shadow design");
                for _ in 0..rounds(15) {
                    let before = shadow.counts();
                    vm.fast_zap(&task).expect("open");
                    let after = shadow.counts();
                    assert!(
                        after.zapped + after.toggles > before.zapped + before.toggles || before.pages == 0
                    );
                    while accesses.load(Relaxed) < 300 {
                        thread::yield_now();
                    }
                    accesses.store(0, Relaxed);
                }
                stop.store(true, Relaxed);
            });
            let report = vm.close().expect("no handle is left");
            assert!(report.is_clean(), "{design} {paging:?}: {report:?}");
        }
    }
}

/// A guest process: maps, uses, moves, unmaps and flushes its own pages, and switches between two address spaces.
fn process(vm: &Vm<Real>, os: &GuestOs<Real>, id: usize, stop: &AtomicBool) -> [u64; 2] {
    let mut random = Random(0xabcd + id as u64);
    let spaces = [(); 2].map(|()| os.new_process(vm).expect("tables"));
    let mut vcpu = vm.vcpu(id).expect("free");
    let mut turns = 0;
    while !stop.load(Relaxed) || turns < 500 {
        turns += 1;
        let cr3 = spaces[random.below(2) as usize];
        vcpu.set_cr3(cr3).expect("shadowed");
        for _ in 0..8 {
            let gva = random.below(64) << random.below(3);
            match random.below(4) {
                0 => {
                    os.unmap(&mut vcpu, cr3, gva).expect("the guest unmaps");
                    vcpu.invlpg(gva);
                    let gone = vcpu.access(GuestAccess::read(gva));
                    assert!(
                        matches!(gone, Err(VmError::GuestFault { .. })),
                        "{gva:#x} is unmapped: {gone:?}"
                    );
                }
                1 => {
                    let writable = random.below(2) == 0;
                    os.map(&mut vcpu, cr3, gva, random.below(PAGES), 1, writable).expect("the guest maps");
                    vcpu.invlpg(gva);
                    let wrote = vcpu.access(GuestAccess::write(gva));
                    assert_eq!(wrote.is_ok(), writable, "{gva:#x}: {wrote:?}");
                }
                _ => match vcpu.access(GuestAccess { gfn: gva, write: random.below(2) == 0, exec: false }) {
                    Ok(_) | Err(VmError::GuestFault { .. }) => {}
                    Err(error) => panic!("vCPU {id}, page {gva:#x}: {error}"),
                },
            }
        }
    }
    spaces
}

#[test]
fn guests_that_change_their_tables_reach_what_these_say_beside_zaps_churns_and_host_unmaps() {
    for (design, quota) in [("shadow-gen", None), ("shadow-gen", Some(48)), ("shadow-slot", None)] {
        let mut config = config(design, Paging::Guest);
        config.shadow.quota = quota;
        let (vm, os, churned) = machine(config);
        let stop = AtomicBool::new(false);
        let spaces: Vec<[u64; 2]> = thread::scope(|scope| {
            let (vm, os, stop) = (&vm, &os, &stop);
            let guests: Vec<_> =
                (0..VCPUS).map(|id| scope.spawn(move || process(vm, os, id, stop))).collect();
            scope.spawn(move || unmap(vm, stop));
            let task = vm.task("churner", Role::Caller);
            for _ in 0..rounds(40) {
                vm.delete_memslot(&task, 0, 2).expect("there");
                assert_eq!(vm.set_memslot(&task, &churned), Ok(SlotUpdate::Created));
                thread::yield_now();
            }
            stop.store(true, Relaxed);
            guests.into_iter().map(|guest| guest.join().expect("no panic")).collect()
        });
        // Nobody else runs now: each space is what its tables say.
        let mut mapped = 0;
        for (id, space) in spaces.iter().enumerate() {
            let mut vcpu = vm.vcpu(id).expect("free");
            for &cr3 in space {
                vcpu.set_cr3(cr3).expect("shadowed");
                for gva in 0..256 {
                    let walk = os.translate(&vm, cr3, gva);
                    let found = vcpu.access(GuestAccess::read(gva));
                    assert_eq!(found.is_ok(), walk.is_some(), "{gva:#x}: {found:?}");
                    let Some(walk) = walk else { continue };
                    let host = vm.slots().find(0, walk.gfn).map(|slot| slot.hva_of(walk.gfn));
                    let frame = host.and_then(|hva| vm.side().primary.lookup(hva)).map(|page| page.pfn);
                    assert_eq!(vcpu.lookup(gva).map(|(spte, _)| spte.pfn()), frame, "{gva:#x}");
                    mapped += 1;
                }
            }
        }
        assert!(mapped > 50, "{mapped} pages were mapped at the end");
        assert_eq!(vm.shadow().expect("a shadow design").violations(), Vec::<String>::new());
        let report = vm.close().expect("no handle is left");
        assert!(report.is_clean(), "{report:?}");
    }
}
