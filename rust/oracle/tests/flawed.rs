//! The two designs that are wrong on purpose, each in the schedule that shows it; and every sound design in the same schedules, where nothing shows.

mod common;

use std::sync::Arc;

use common::{Cpu, Setup, World};
use tdpmmu_mmu::design::InPlace;
use tdpmmu_mmu::{DESIGNS, Held, Leftovers, TdpMmu, ZapDesign};
use tdpmmu_oracle::Rule;
use tdpmmu_platform::{Exclusive, Guard, Real, Task};

/// A root is created and lost between the two phases of one fast zap, and its worker, if it has one, is late. Both vCPUs keep what they have.
fn lose_a_root_between_the_phases(world: &World, task: &Task<Real>, lost: &mut Cpu) {
    let mmu = &world.mmu;
    {
        let mut guard = mmu.lock.write(task);
        mmu.fast_zap_invalidate(&mut guard);
        mmu.fast_zap_in_lock(&mut guard);
    }
    if let Some(queue) = mmu.design().queue() {
        // The fast zap's own roots first: only what comes now is late.
        queue.flush();
        queue.hold();
    }
    lost.access(7, 1, true);
    lost.drop_root();
    // What a fast zap waits for is let go; in a flawed design it waits for nothing.
    if let Some(queue) = mmu.design().queue().filter(|_| !flawed(world)) {
        queue.release();
    }
    mmu.fast_zap_finish(task);
}

fn flawed(world: &World) -> bool {
    DESIGNS.iter().any(|d| d.name == world.setup.design && d.flawed)
}

#[test]
fn system_workqueue_puts_a_reference_nobody_gave_it() {
    let world = Setup { design: "system-workqueue", ..Setup::default() }.build();
    let task = world.task();
    let (mut cpu, mut lost) = (Cpu::new(&world, 0), Cpu::new(&world, 0));
    cpu.access(3, 1, true);
    lose_a_root_between_the_phases(&world, &task, &mut lost);
    // The fast zap has freed the root under its worker.
    let first = &world.judge.violations()[0];
    assert_eq!(first.rule, Rule::PutByNonOwner, "{first}");
    assert!(
        first.what.contains("Gift put a reference that it does not hold; held by")
            && first.what.contains("Work 1"),
        "{first}"
    );
    let queue = world.mmu.design().queue().expect("a worker");
    assert_eq!((queue.waiting(), world.mmu.violations().len()), (1, 0));
    queue.release();
    queue.flush();
    let told = world.mmu.violations();
    assert!(matches!(&told[..], [one] if one.contains("a worker found its root gone")), "{told:?}");
    // Reported, and nothing else is damaged: the VM goes on and ends with every page back.
    cpu.drop_root();
    cpu.access(9, 1, true);
    cpu.close();
    lost.close();
    assert_eq!(world.mmu.uninit(&task), Leftovers::default());
    let pool = world.mmu.pool().stats();
    assert_eq!((pool.taken, pool.double_frees), (0, 0));
}

#[test]
fn system_workqueue_puts_under_a_worker_that_is_in_the_middle() {
    // As above, but the worker has its root already when the gift is put: its own put then finds a count of zero.
    let mut seen = false;
    for _ in 0..300 {
        let setup = Setup { design: "system-workqueue", batch: 1, force_yield: Some(1), ..Setup::default() };
        let world = setup.build();
        let task = world.task();
        let mut lost = Cpu::new(&world, 0);
        lost.access(3, 1, true);
        {
            let mut guard = world.mmu.lock.write(&task);
            world.mmu.fast_zap_invalidate(&mut guard);
            world.mmu.fast_zap_in_lock(&mut guard);
        }
        lost.drop_root();
        for gfn in 0..600 {
            lost.access(gfn, 1, true);
        }
        lost.drop_root();
        world.mmu.fast_zap_finish(&task);
        world.mmu.design().quiesce();
        seen |= world.mmu.violations().iter().any(|v| v.contains("a root was put that nobody held"));
        lost.close();
        assert_eq!(world.mmu.uninit(&task), Leftovers::default());
        assert_eq!(world.mmu.pool().stats().taken, 0);
        if seen {
            assert!(world.saw(Rule::PutByNonOwner));
            return;
        }
    }
    panic!("the worker was never met in the middle");
}

#[test]
fn no_second_phase_returns_while_sptes_are_mapped() {
    let world = Setup { design: "no-second-phase", ..Setup::default() }.build();
    let task = world.task();
    let mut cpu = Cpu::new(&world, 0);
    for gfn in 0..5 {
        cpu.access(gfn, 1, true);
    }
    let queue = world.mmu.design().queue().expect("a worker");
    queue.hold();
    world.fast_zap(&task);
    assert_eq!(world.mmu.leaf_pages()[0], 5, "it has returned, and nothing is zapped");
    let rules: Vec<_> = world.judge.violations().iter().map(|v| v.rule).collect();
    assert!(rules.contains(&Rule::FastZapLeft) && rules.contains(&Rule::GiftKept), "{rules:?}");
    queue.release();
    queue.flush();
    assert_eq!(world.mmu.leaf_pages()[0], 0, "late, and complete");
    cpu.close();
    assert_eq!(world.mmu.uninit(&task), Leftovers::default());
    assert_eq!(world.mmu.violations(), Vec::<String>::new(), "its references are exact");
    assert_eq!(world.mmu.pool().stats().taken, 0);
}

#[test]
fn no_second_phase_is_clean_where_no_fast_zap_is() {
    // Roots that vCPUs drop: there its references are those of async-worker.
    let world = Setup { design: "no-second-phase", workers: 2, ..Setup::default() }.build();
    let mut cpu = Cpu::new(&world, 0);
    for gfn in 0..40 {
        cpu.access(gfn, 1, true);
        cpu.drop_root();
    }
    cpu.close();
    world.settle(&world.task());
    world.end();
}

#[test]
fn no_sound_design_is_caught_where_the_flawed_ones_are() {
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        for force_yield in [None, Some(1)] {
            let world = Setup { design: design.name, force_yield, ..Setup::default() }.build();
            let task = world.task();
            let (mut cpu, mut lost) = (Cpu::new(&world, 0), Cpu::new(&world, 0));
            for gfn in 0..5 {
                cpu.access(gfn, 1, true);
            }
            lose_a_root_between_the_phases(&world, &task, &mut lost);
            world.settle(&task);
            world.check(&task, "after the fast zap");
            cpu.close();
            lost.close();
            drop(task);
            world.end();
        }
    }
}

/// `in-place` that empties nothing: what the judge must see of a design that keeps its roots.
struct Forgets;

impl ZapDesign<Real> for Forgets {
    fn name(&self) -> &'static str {
        "forgets"
    }

    fn last_put(&self, mmu: &TdpMmu<Real>, task: &Task<Real>, root: u32, held: Held<'_, '_, Real>) {
        InPlace.last_put(mmu, task, root, held);
    }

    fn invalidate(&self, _: &TdpMmu<Real>, _: &mut Guard<'_, Real, Exclusive>) {}

    fn finish(&self, _: &TdpMmu<Real>, _: &Task<Real>) {}

    fn drain(&self, _: &TdpMmu<Real>, _: &Task<Real>) {}
}

#[test]
fn an_in_place_zap_that_forgets_an_entry_is_caught_and_one_that_is_refilled_is_not() {
    for (forgets, rules) in [(true, vec![Rule::FastZapLeft]), (false, vec![])] {
        let setup = Setup { design: "in-place", ..Setup::default() };
        let world = if forgets { setup.build_with(Arc::new(Forgets), "in-place") } else { setup.build() };
        let task = world.task();
        let mut cpu = Cpu::new(&world, 0);
        cpu.access(3, 1, true);
        {
            let mut guard = world.mmu.lock.write(&task);
            world.mmu.fast_zap_invalidate(&mut guard);
            world.mmu.fast_zap_in_lock(&mut guard);
        }
        // The root is valid: a fault fills it again before the fast zap has returned.
        cpu.access(3, 1, true);
        world.mmu.fast_zap_finish(&task);
        let found: Vec<_> = world.judge.violations().iter().map(|v| v.rule).collect();
        assert_eq!(found, rules);
        assert_eq!(world.mmu.leaf_pages()[0], 1);
        cpu.close();
        assert_eq!(world.mmu.uninit(&task), Leftovers::default());
    }
}
