//! Small VMs on the simulated platform, with a judge that looks at everything.

use std::sync::Arc;

use tdpmmu_oracle::{Judge, Rule, RuleSet, Rules};
use tdpmmu_platform::sim::{self, Memory, Run, SimConfig, Strategy};
use tdpmmu_platform::{Bug, Platform, Role as TaskRole, Sim};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{DirtyMode, GuestAccess, Region, SlotFlags, Vm, VmConfig, VmError};

const GIG: u64 = 512 * 512;

pub type Body = fn(&Vm<Sim>);
pub type Threads = &'static [(&'static str, Body)];

#[derive(Clone, Copy, Debug)]
pub struct Scene {
    pub profile: &'static str,
    pub design: Option<&'static str>,
    pub dirty: DirtyMode,
    pub ring: Option<u32>,
    pub level: u8,
    /// What a vCPU has done before.
    pub before: Body,
    pub threads: Threads,
    pub silenced: RuleSet,
}

impl Scene {
    /// The profile in which no historical defect disturbs. (5.10 and 5.15 had some of their own.)
    pub fn of(design: &'static str, threads: Threads) -> Self {
        let profile = if design == "sync" { "6.12" } else { "6.1-async" };
        Self { design: Some(design), ..Self::profile(profile, threads) }
    }

    pub fn profile(profile: &'static str, threads: Threads) -> Self {
        Self {
            profile,
            design: None,
            dirty: DirtyMode::WriteProtect,
            ring: None,
            level: 2,
            before: |_| (),
            threads,
            silenced: RuleSet::default(),
        }
    }
}

/// Runs the scene once; `seed` decides the schedule and, by turns, the memory model.
pub fn run(scene: &Scene, seed: u64, bug: Option<Bug>) -> (Arc<Judge>, Run) {
    let profile = KernelProfile::named(scene.profile).expect("known");
    let mut config = VmConfig {
        design: scene.design.map(str::to_owned),
        vcpus: 2,
        max_tables: 160,
        hugepages: false,
        quarantine: true,
        batch: 1,
        host_pages: GIG,
        check_frames: true,
        dirty_mode: scene.dirty,
        dirty_ring: scene.ring,
        ..VmConfig::new(profile)
    };
    let mut rules = Rules::of(&config.profile, config.format, config.design_name()).on::<Sim>();
    rules.silenced = scene.silenced;
    let judge = Judge::new(rules);
    judge.on_violation(|violation| {
        sim::violation(violation.rule.name(), violation.to_string());
    });
    config.observer = Some(judge.clone());
    let sim_config = SimConfig {
        strategy: Strategy::Random { seed },
        memory: if seed.is_multiple_of(2) { Memory::Sc } else { Memory::Tso },
        yield_percent: 20,
        bug,
        ..SimConfig::default()
    };
    let (before, threads, level, heard) = (scene.before, scene.threads, scene.level, judge.clone());
    let main = move || {
        let vm = Arc::new(Vm::<Sim>::new(config).expect("a small VM"));
        sim::quiet(|| {
            let task = vm.task("setup", TaskRole::Caller);
            vm.add_memory(&task, 0, 1024, level).expect("memory");
            before(&vm);
        });
        let handles: Vec<_> = threads
            .iter()
            .map(|&(name, body)| {
                let vm = vm.clone();
                Sim::spawn(name, Box::new(move || body(&vm))).expect("a task")
            })
            .collect();
        for handle in handles {
            handle.join().expect("no panic");
        }
        if let Some(queue) = vm.mmu().design().queue() {
            queue.flush();
        }
        sim::quiet(|| heard.check_vm(&vm, &vm.task("judge", TaskRole::Observer)));
        vm.close().expect("no handle is left");
        sim::quiet(|| heard.finish(vm.mmu(), &vm.task("judge", TaskRole::Observer)));
    };
    let run = sim::run(sim_config, Box::new(main));
    (judge, run)
}

/// The rules that `bug` is seen to break first, over at most `seeds` schedules, until one is broken.
pub fn broken_by(scene: &Scene, bug: Bug, seeds: u64) -> Vec<Rule> {
    for seed in 0..seeds {
        let (judge, _) = run(scene, seed, Some(bug));
        if judge.count() != 0 {
            return judge.violations().iter().map(|violation| violation.rule).collect();
        }
    }
    Vec::new()
}

fn ignore_gone(result: Result<impl Sized, VmError>) {
    if let Err(error) = result {
        assert!(
            matches!(error, VmError::Closed | VmError::NoSlot { .. } | VmError::RingFull { .. }),
            "{error}"
        );
    }
}

fn writer(vm: &Vm<Sim>) {
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in [0, 1, 512] {
        ignore_gone(vcpu.access(GuestAccess::write(gfn)));
    }
    ignore_gone(vcpu.drop_root());
    ignore_gone(vcpu.access(GuestAccess::read(0)));
    vcpu.leave();
    vcpu.unload();
}

fn reader(vm: &Vm<Sim>) {
    let mut vcpu = vm.vcpu(1).expect("free");
    for gfn in [512, 0, 1, 0] {
        ignore_gone(vcpu.access(GuestAccess::read(gfn)));
        vcpu.speculate(1);
    }
    vcpu.leave();
}

fn deleter(vm: &Vm<Sim>) {
    ignore_gone(vm.delete_memslot(&vm.task("deleter", TaskRole::Caller), 0, 0));
}

fn zapper(vm: &Vm<Sim>) {
    ignore_gone(vm.fast_zap(&vm.task("zapper", TaskRole::Caller)));
}

fn host(vm: &Vm<Sim>) {
    let task = vm.task("host", TaskRole::Caller);
    let slot = vm.slots().by_id(0, 0).map(|slot| slot.hva);
    if let Some(hva) = slot {
        ignore_gone(vm.unmap_hva(&task, hva..hva + 2, true));
    }
}

fn logger(vm: &Vm<Sim>) {
    let task = vm.task("logger", TaskRole::Caller);
    let slot = vm.slots().by_id(0, 0).cloned().expect("nobody deletes it");
    let flags = |log_dirty| SlotFlags { log_dirty, readonly: false };
    let region = |log| Region {
        id: 0,
        as_id: 0,
        base: slot.base,
        pages: slot.pages,
        hva: slot.hva,
        flags: flags(log),
    };
    vm.set_memslot(&task, &region(true)).expect("the same slot");
    if vm.get_dirty_log(&task, 0, 0).is_ok() {
        vm.clear_dirty_log(&task, 0, 0, 0, 64, &[3]).expect("inside");
        vm.get_dirty_log(&task, 0, 0).expect("it logs");
    } else {
        vm.dirty_ring(0).expect("rings");
        vm.reset_dirty_rings(&task).expect("rings");
    }
}

fn log_stopper(vm: &Vm<Sim>) {
    logger(vm);
    let task = vm.task("stopper", TaskRole::Caller);
    let slot = vm.slots().by_id(0, 0).cloned().expect("nobody deletes it");
    let flags = SlotFlags { log_dirty: false, readonly: false };
    let region = Region { id: 0, as_id: 0, base: slot.base, pages: slot.pages, hva: slot.hva, flags };
    vm.set_memslot(&task, &region).expect("the same slot");
}

/// Pages are written, and their D is harvested.
fn harvested(vm: &Vm<Sim>) {
    rewriter(vm);
    logger(vm);
}

fn rewriter(vm: &Vm<Sim>) {
    let mut vcpu = vm.vcpu(1).expect("free");
    for gfn in [1, 0, 1, 512, 1] {
        ignore_gone(vcpu.access(GuestAccess::write(gfn)));
    }
    vcpu.leave();
}

fn fetcher(vm: &Vm<Sim>) {
    let mut vcpu = vm.vcpu(1).expect("free");
    for gfn in [513, 1, 513] {
        vcpu.access(GuestAccess::fetch(gfn)).expect("memory");
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    vcpu.leave();
}

fn toggler(vm: &Vm<Sim>) {
    let task = vm.task("toggler", TaskRole::Caller);
    for on in [true, false] {
        vm.set_nx_huge_pages(&task, on).expect("open");
        vm.recover_nx(&task, 1).expect("open");
    }
}

fn ager(vm: &Vm<Sim>) {
    let task = vm.task("ager", TaskRole::Caller);
    vm.age_gfns(&task, 0..2).expect("memory");
    vm.write_protect_gfn(&task, 0, 1).expect("memory");
    vm.zap_gfn_range(&task, 0..2).expect("a range");
    vm.promote_gfns(&task, 0..1024, 2).expect("memory");
}

/// A guest that toggles CR0.WP: a second root of the same address space.
fn other_role(vm: &Vm<Sim>) {
    let mut vcpu = vm.vcpu(1).expect("free");
    ignore_gone(vcpu.access(GuestAccess::write(1)));
    let layout = vm.mmu().profile().role_layout;
    let mut fields = layout.unpack(vcpu.role());
    fields.cr0_wp = !fields.cr0_wp;
    vcpu.switch_role(layout.pack(&fields));
    ignore_gone(vcpu.access(GuestAccess::write(1)));
    ignore_gone(vcpu.access(GuestAccess::write(0)));
    vcpu.leave();
}

fn smi(vm: &Vm<Sim>) {
    let mut vcpu = vm.vcpu(1).expect("free");
    vcpu.access(GuestAccess::write(1)).expect("memory");
    vcpu.enter_smm();
    vcpu.access(GuestAccess::write(1)).expect("memory, or none");
    vcpu.exit_smm();
    vcpu.access(GuestAccess::read(1)).expect("memory");
    vcpu.leave();
}

pub const DELETION: Threads = &[("writer", writer), ("reader", reader), ("deleter", deleter), ("host", host)];
pub const TWO_ZAPS: Threads = &[("writer", writer), ("reader", reader), ("zapper", zapper), ("host", host)];
pub const LOGGED: Threads = &[("writer", writer), ("rewriter", rewriter), ("logger", logger)];
pub const LOG_ENDS: Threads = &[("writer", writer), ("rewriter", rewriter), ("logger", log_stopper)];
pub const MIXTURE: Threads =
    &[("writer", writer), ("fetcher", fetcher), ("toggler", toggler), ("ager", ager)];
pub const BESIDE: Threads = &[("reader", reader), ("host", host), ("host-again", host)];
pub const WRITES: Threads = &[("rewriter", rewriter), ("host", host)];
pub const SMM: Threads = &[("writer", writer), ("smi", smi), ("host", host)];

pub fn logging() -> Vec<Scene> {
    let mut scenes = Vec::new();
    for profile in ["6.1", "6.12", "7.2"] {
        for threads in [LOGGED, LOG_ENDS] {
            for level in [1, 2] {
                let scene = Scene { level, ..Scene::profile(profile, threads) };
                scenes.push(scene);
                scenes.push(Scene { dirty: DirtyMode::DBits, ..scene });
                scenes.push(Scene { ring: Some(1024), ..scene });
            }
        }
    }
    scenes
}

/// Two roots of one address space, which the host takes a page from.
pub fn two_roots(profile: &'static str) -> Scene {
    Scene { before: other_role, level: 1, ..Scene::profile(profile, BESIDE) }
}

/// Leaves with W and without D are written while the host takes them away.
fn clean_pages() -> Scene {
    let scene = Scene { before: harvested, level: 1, ..Scene::profile("6.12", WRITES) };
    Scene { dirty: DirtyMode::DBits, ..scene }
}

/// A defect, where it shows, and the rules of which one must be broken.
pub fn defects() -> Vec<(Bug, Scene, &'static [Rule])> {
    let deletion = Scene::of("sync", DELETION);
    let mixture = Scene::profile("6.12", MIXTURE);
    vec![
        (Bug::B01, two_roots("6.12"), &[Rule::FlushMissing, Rule::FlushOwed]),
        (Bug::B02, mixture, &[Rule::FlushMissing, Rule::FlushLate]),
        (Bug::B06, deletion, &[Rule::ReadUnprotected]),
        (Bug::B14, clean_pages(), &[Rule::DirtyLost]),
        (Bug::C01, deletion, &[Rule::FlushUndelivered, Rule::ReleasedWhileCached, Rule::StaleAccess]),
        (Bug::C02, deletion, &[Rule::FlushUndelivered, Rule::ReleasedWhileCached, Rule::StaleAccess]),
        (Bug::C03, deletion, &[Rule::FlushMissing]),
        (Bug::C04, mixture, &[Rule::FreedUnderReader]),
        (Bug::C07, deletion, &[Rule::StaleLookUp]),
        (Bug::C13, mixture, &[Rule::LockOrder, Rule::SleptAtomic]),
    ]
}
