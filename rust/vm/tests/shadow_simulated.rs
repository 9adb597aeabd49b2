//! VMs on shadow pages on the simulated platform: random schedules of faults, walks without the lock, deletions, zaps and the host, under both memory models.

use std::sync::Arc;

use tdpmmu_platform::sim::{self, End, Memory, Run, SimConfig, Strategy};
use tdpmmu_platform::{Platform, Role as TaskRole, Sim};
use tdpmmu_shadow::{ReclaimKind, SHADOW_DESIGNS};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{GuestAccess, GuestOs, Paging, ShadowSpec, Vm, VmConfig, VmError};

const TABLES: std::ops::Range<u64> = 0x800..0x820;
/// The slot that may go; its pages are at the same virtual addresses.
const GOES: u64 = 0x400;

type Body = fn(&Vm<Sim>, &GuestOs<Sim>);

fn config(design: &str, shadow: ShadowSpec) -> VmConfig {
    VmConfig {
        design: Some(design.into()),
        shadow,
        vcpus: 2,
        max_tables: 160,
        hugepages: false,
        quarantine: true,
        batch: 1,
        host_pages: 1 << 20,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    }
}

fn run(config: VmConfig, seed: u64, threads: Vec<(&'static str, Body)>) -> Run {
    let sim_config = SimConfig {
        strategy: Strategy::Random { seed },
        memory: if seed.is_multiple_of(2) { Memory::Sc } else { Memory::Tso },
        yield_percent: 20,
        ..SimConfig::default()
    };
    sim::run(
        sim_config,
        Box::new(move || {
            let vm = Arc::new(Vm::<Sim>::new(config).expect("a small VM"));
            let os = Arc::new(GuestOs::new(0, TABLES));
            sim::quiet(|| {
                let task = vm.task("setup", TaskRole::Caller);
                vm.add_memory(&task, 0, 64, 1).expect("memory");
                vm.add_memory(&task, GOES, 64, 1).expect("memory");
                vm.add_memory(&task, TABLES.start, TABLES.end - TABLES.start, 1).expect("memory");
                if vm.paging() == Paging::Guest {
                    let cr3 = os.new_process(&vm).expect("tables");
                    os.build_linear(&vm, cr3, 0..64, 0, 1).expect("tables");
                    os.build_linear(&vm, cr3, GOES..GOES + 64, GOES, 1).expect("tables");
                    for id in 0..2 {
                        vm.vcpu(id).expect("free").set_cr3(cr3).expect("shadowed");
                    }
                }
            });
            let handles: Vec<_> = threads
                .into_iter()
                .map(|(name, body)| {
                    let (vm, os) = (vm.clone(), os.clone());
                    Sim::spawn(name, Box::new(move || body(&vm, &os))).expect("a task")
                })
                .collect();
            for handle in handles {
                handle.join().expect("no panic");
            }
            let report = vm.close().expect("no handle is left");
            if !report.is_clean() {
                sim::violation("unclean", format!("{report:?}"));
            }
        }),
    )
}

fn assert_fine(run: &Run, what: &str) {
    assert!(
        matches!(run.end, End::Finished) && run.violations.is_empty(),
        "{what}: {:?} {:?} after {} steps",
        run.end,
        run.violations,
        run.steps,
    );
}

fn writer(vm: &Vm<Sim>, _os: &GuestOs<Sim>) {
    let mut vcpu = vm.vcpu(0).expect("free");
    for page in [0, GOES, 1] {
        vcpu.access(GuestAccess::write(page)).expect("memory, or none");
        vcpu.walk_shadow(page);
    }
    vcpu.drop_root().expect("a page for a root");
    vcpu.access(GuestAccess::read(0)).expect("memory, or none");
    vcpu.leave();
    vcpu.unload();
}

fn walker(vm: &Vm<Sim>, _os: &GuestOs<Sim>) {
    let mut vcpu = vm.vcpu(1).expect("free");
    for page in [GOES, 0] {
        vcpu.access(GuestAccess::read(page)).expect("memory, or none");
        vcpu.walk_shadow(page);
        vcpu.walk_shadow(page ^ 1);
    }
}

fn deleter(vm: &Vm<Sim>, _os: &GuestOs<Sim>) {
    let task = vm.task("deleter", TaskRole::Caller);
    let id = vm.slots().find(0, GOES).map(|slot| slot.id).expect("there");
    vm.delete_memslot(&task, 0, id).expect("there");
}

fn host(vm: &Vm<Sim>, _os: &GuestOs<Sim>) {
    let task = vm.task("host", TaskRole::Caller);
    vm.unmap_gfns(&task, 0..2, true).expect("there");
}

fn zapper(vm: &Vm<Sim>, _os: &GuestOs<Sim>) {
    vm.fast_zap(&vm.task("zapper", TaskRole::Caller)).expect("open");
}

/// Moves page 5 of the guest behind another frame and back, and looks each time after its flush.
fn mover(vm: &Vm<Sim>, os: &GuestOs<Sim>) {
    let mut vcpu = vm.vcpu(0).expect("free");
    let cr3 = vcpu.cr3().expect("set");
    for gfn in [20, 5] {
        os.map(&mut vcpu, cr3, 5, gfn, 1, true).expect("tables");
        vcpu.invlpg(5);
        vcpu.access(GuestAccess::write(5)).expect("mapped");
        let set = vm.slots();
        let hva = set.find(0, gfn).map(|slot| slot.hva_of(gfn)).expect("memory");
        let wanted = vm.side().primary.lookup(hva).map(|page| page.pfn);
        let found = vcpu.lookup(5).map(|(spte, _)| spte.pfn());
        if found.is_some() && found != wanted {
            sim::violation("stale", format!("page 5 reaches {found:x?} after its flush, not {wanted:x?}"));
        }
    }
}

fn user(vm: &Vm<Sim>, _os: &GuestOs<Sim>) {
    let mut vcpu = vm.vcpu(1).expect("free");
    for _ in 0..3 {
        match vcpu.access(GuestAccess::read(5)) {
            Ok(_) | Err(VmError::GuestFault { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        vcpu.leave();
    }
}

#[test]
fn every_shadow_design_survives_random_schedules_of_faults_walks_a_deletion_and_the_host() {
    for info in SHADOW_DESIGNS {
        for paging in [Paging::Direct, Paging::Guest] {
            for seed in 0..150 {
                let config = config(info.name, ShadowSpec { paging, ..ShadowSpec::default() });
                let threads: Vec<(&'static str, Body)> =
                    vec![("writer", writer), ("walker", walker), ("deleter", deleter), ("host", host)];
                assert_fine(&run(config, seed, threads), &format!("{} {paging:?} seed {seed}", info.name));
            }
        }
    }
}

#[test]
fn every_reclamation_survives_random_schedules_of_walks_and_a_zap() {
    for reclaim in ReclaimKind::ALL {
        for seed in 0..200 {
            let config = config("shadow-gen", ShadowSpec { reclaim, ..ShadowSpec::default() });
            let threads: Vec<(&'static str, Body)> =
                vec![("writer", writer), ("walker", walker), ("zapper", zapper)];
            assert_fine(&run(config, seed, threads), &format!("{reclaim} seed {seed}"));
        }
    }
}

#[test]
fn a_guest_that_moves_a_page_finds_it_moved_after_its_flush() {
    for seed in 0..600 {
        let shadow = ShadowSpec { paging: Paging::Guest, ..ShadowSpec::default() };
        let threads: Vec<(&'static str, Body)> = vec![("mover", mover), ("user", user), ("zapper", zapper)];
        assert_fine(&run(config("shadow-gen", shadow), seed, threads), &format!("seed {seed}"));
    }
}

#[test]
fn the_same_seed_makes_the_same_run() {
    let shadow = ShadowSpec { paging: Paging::Guest, quota: Some(12), ..ShadowSpec::default() };
    let threads: Vec<(&'static str, Body)> = vec![("mover", mover), ("walker", walker), ("zapper", zapper)];
    let [one, two] = [0, 1].map(|_| run(config("shadow-gen", shadow), 7, threads.clone()));
    assert_fine(&one, "seed 7");
    assert_eq!((one.steps, one.schedule.to_string()), (two.steps, two.schedule.to_string()));
}
