//! Every gap of a zap: a walk that may yield gives mmu_lock up, and anything may come in between. Each test puts one thing into the first gap, into
//! the second, and so on, until there is none left.
//!
//! **Guarantee** shown for each sound design: what is mapped when the gap begins is reached by who comes into it. A fast zap that returns has left nothing (P-FZ), a notifier that
//! returns has left nothing in its range (P-RCH), a root that comes or goes in a gap costs no reference (P-1).

#[path = "common/staged.rs"]
mod staged;
#[path = "common/world.rs"]
mod world;

use std::sync::{Arc, OnceLock, mpsc};
use std::thread;

use staged::{SLEEP, stage, stage_worker, unstage, unstage_worker};
use tdpmmu_mmu::{DESIGNS, DesignInfo, Held, QueueKind};
use tdpmmu_platform::{Owner, Role, Site};
use tdpmmu_spte::Passes;
use world::{Mmu, REGIONS, Terms, Vcpu, World, begin_fast_zap, finish_fast_zap, regions};

fn sound() -> impl Iterator<Item = &'static DesignInfo> {
    DESIGNS.iter().filter(|design| !design.flawed)
}

/// Is there a gap in the zap that the last put of a root makes, or makes a worker do?
fn put_yields(design: &DesignInfo) -> bool {
    !["in-place", "inline", "async-worker-owned", "sync"].contains(&design.name)
}

/// What comes into a gap of a zap of the root. It returns how many SPTEs it has left that it had to remove.
type Act = fn(&Arc<Mmu>, u32) -> u64;

/// Runs `schedule` with `act` in the first gap of its zap, then in the second, and so on; returns how many gaps there were: this thread's and the workers'. At
/// the end of a schedule no vCPU holds a root.
fn in_each_gap(design: &str, terms: &Terms, act: Act, schedule: fn(&World, u32)) -> u32 {
    for gap in 0.. {
        let mut world = World::new(design, terms);
        let root = world.vcpu.populated();
        let left = Arc::new(OnceLock::new());
        let once = || {
            let (mmu, left) = (Arc::clone(&world.mmu), Arc::clone(&left));
            move || {
                left.get_or_init(|| act(&mmu, root));
            }
        };
        stage(gap, Site::LockYield, once());
        stage_worker(gap, Site::LockYield, once());
        schedule(&world, root);
        world.finish_work();
        nothing_came();
        assert_eq!(world.end(&[]), Vec::<String>::new(), "{design}: gap {gap}");
        match left.get() {
            None => return gap,
            Some(left) => assert_eq!(*left, 0, "{design}: left in gap {gap}"),
        }
    }
    unreachable!("a walk has an end")
}

/// No gap was the one for the act; it is taken back.
fn nothing_came() -> bool {
    unstage(Site::LockYield) & unstage_worker()
}

fn terms(passes: &str, queue: Option<QueueKind>) -> Terms {
    Terms { yielding: 1, passes: Passes::parse(passes).expect("passes"), queue }
}

const PASSES: [&str; 3] = ["root", "1G,root", "4K,2M,1G,root"];

/// Leaves under `root`, which the caller knows to be there.
fn mapped(mmu: &Mmu, root: u32) -> u64 {
    mmu.count(&mmu.task("count", Role::Observer), root).sptes()
}

/// Another task runs a whole fast zap.
fn fast_zap(mmu: &Arc<Mmu>, root: u32) -> u64 {
    let task = mmu.task("caller in the gap", Role::Caller);
    begin_fast_zap(mmu, &task);
    finish_fast_zap(mmu, &task);
    mapped(mmu, root)
}

/// The host takes the middle region's pages away.
fn notifier(mmu: &Arc<Mmu>, root: u32) -> u64 {
    let task = mmu.task("notifier in the gap", Role::Caller);
    let taken = regions().nth(REGIONS as usize / 2).expect("a region");
    {
        let mut guard = mmu.lock.write(&task);
        let mut debt = mmu.unmap(&mut guard, 0, taken.clone(), true);
        mmu.pay(&task, &mut debt);
    }
    let mut left = 0;
    mmu.leaves(&task, root, taken, &mut |_, _, _| left += 1);
    left
}

/// The VM's memory goes away as a whole.
fn zap_all(mmu: &Arc<Mmu>, root: u32) -> u64 {
    let task = mmu.task("zap_all in the gap", Role::Caller);
    mmu.zap_all(&mut mmu.lock.write(&task));
    mapped(mmu, root)
}

/// Another vCPU loads a root of the same role, maps a page and drops it again.
fn a_root_comes_and_goes(mmu: &Arc<Mmu>, _root: u32) -> u64 {
    let mut vcpu = Vcpu::new(mmu);
    let root = vcpu.load(0);
    assert!(!mmu.is_obsolete(root));
    vcpu.fault(root, 5);
    vcpu.drop_roots(&[root]);
    vcpu.leave();
    0
}

/// The vCPU that held the root throughout lets it go.
fn its_vcpu_drops_it(mmu: &Arc<Mmu>, root: u32) -> u64 {
    mmu.put_roots(&mmu.task("vcpu in the gap", Role::Vcpu), &[root]);
    0
}

fn drop_it(world: &World, root: u32) {
    world.vcpu.drop_roots(&[root]);
}

/// The root's vCPU is halted, and drops it at last.
fn fast_zap_and_drop(world: &World, root: u32) {
    world.begin_fast_zap();
    world.finish_fast_zap();
    world.vcpu.drop_roots(&[root]);
}

/// The root's vCPU drops it in a gap, or after the last one.
fn fast_zap_beside_a_drop(world: &World, root: u32) {
    world.begin_fast_zap();
    world.finish_fast_zap();
    if nothing_came() {
        world.vcpu.drop_roots(&[root]);
    }
}

/// A notifier takes everything away; the root's vCPU drops it at last, unless it did so in a gap.
fn unmap_all(world: &World, root: u32) {
    unmap(world);
    world.vcpu.drop_roots(&[root]);
}

/// As [`unmap_all`], beside a drop in a gap of the notifier, or after it.
fn unmap_all_beside_a_drop(world: &World, root: u32) {
    unmap(world);
    if nothing_came() {
        world.vcpu.drop_roots(&[root]);
    }
}

fn unmap(world: &World) {
    {
        let mut guard = world.mmu.lock.write(&world.caller);
        let mut debt = world.mmu.unmap(&mut guard, 0, 0..world.mmu.max_gfn(), true);
        world.mmu.pay(&world.caller, &mut debt);
    }
    let left = world.mmu.count_all(&world.caller).sptes();
    assert_eq!(left, 0, "{}: the notifier has returned", world.mmu.design().name());
}

/// Who has been left the zap of a dropped root.
#[derive(Clone, Copy, PartialEq)]
enum Left {
    /// A worker.
    ToWorker,
    /// In a VM without users, whose system's workers take nothing more: whoever dropped it.
    ToDropper,
}

/// A whole fast zap in gap number `gap` of the zap of a root that was dropped in a design with a queue; false: there was no such gap. The zap goes on when
/// the fast zap has returned, or sleeps until somebody wakes it.
fn fast_zap_in_gap_of(left: Left, design: &str, gap: u32) -> bool {
    let queue = (left == Left::ToDropper).then_some(QueueKind::System);
    let mut world = World::new(design, &terms("root", queue));
    let root = world.vcpu.populated();
    let (returned, found) = mpsc::channel();
    let mmu = Arc::clone(&world.mmu);
    let act = move || {
        let (goes_on, go_on) = mpsc::channel();
        thread::spawn(move || {
            let task = mmu.task("caller in the gap", Role::Caller);
            // So that it is a root when we look.
            assert!(mmu.get_root(&task, root, Owner::Iterator));
            begin_fast_zap(&mmu, &task);
            let sleeps = goes_on.clone();
            stage(0, SLEEP, move || sleeps.send(()).expect("the zap waits"));
            mmu.fast_zap_finish(&task);
            unstage(SLEEP);
            let mapped = mapped(&mmu, root);
            mmu.put_root(&task, root, Owner::Iterator, Held::No);
            drop(task);
            returned.send(mapped).expect("the test waits");
            drop(goes_on);
        });
        // An error: it has returned without ever having slept.
        let _ = go_on.recv();
    };
    match left {
        Left::ToWorker => stage_worker(gap, Site::LockYield, act),
        Left::ToDropper => {
            assert_eq!(world.mmu.put_user(), 0);
            stage(gap, Site::LockYield, act);
        }
    }
    world.vcpu.drop_roots(&[root]);
    world.finish_work();
    let gapless = unstage(Site::LockYield) | unstage_worker();
    if !gapless {
        assert_eq!(found.recv(), Ok(0), "{design}: gap {gap}: the fast zap has returned (P-FZ)");
    }
    world.end_well(&[]);
    !gapless
}

fn fast_zaps_in_each_gap_of(left: Left) {
    for design in sound().filter(|design| design.queue.is_some()) {
        let gaps = (0..).take_while(|&gap| fast_zap_in_gap_of(left, design.name, gap)).count();
        assert_eq!(gaps > 8, put_yields(design), "{}: {gaps} gaps", design.name);
    }
}

#[test]
fn a_fast_zap_in_any_gap_of_a_last_put_leaves_nothing() {
    for passes in PASSES {
        for design in sound().filter(|design| design.queue.is_none()) {
            let gaps = in_each_gap(design.name, &terms(passes, None), fast_zap, drop_it);
            assert_eq!(gaps > 8, put_yields(design), "{}: {gaps} gaps", design.name);
        }
    }
}

#[test]
fn a_fast_zap_in_any_gap_of_a_workers_zap_waits_for_it() {
    fast_zaps_in_each_gap_of(Left::ToWorker);
}

#[test]
fn a_fast_zap_of_a_dying_vm_waits_for_who_zaps_what_no_worker_took() {
    fast_zaps_in_each_gap_of(Left::ToDropper);
}

#[test]
fn a_notifier_in_any_gap_of_a_zap_leaves_nothing_in_its_range() {
    for passes in PASSES {
        for design in sound() {
            let terms = terms(passes, None);
            let put = in_each_gap(design.name, &terms, notifier, drop_it);
            let zap = in_each_gap(design.name, &terms, notifier, fast_zap_and_drop);
            assert_eq!((put > 8, zap > 8), (put_yields(design), true), "{}: {put}, {zap} gaps", design.name);
        }
    }
}

#[test]
fn a_root_that_comes_and_goes_in_any_gap_of_a_zap_costs_no_reference() {
    for passes in PASSES {
        for design in sound() {
            let terms = terms(passes, None);
            let put = in_each_gap(design.name, &terms, a_root_comes_and_goes, drop_it);
            let zap = in_each_gap(design.name, &terms, a_root_comes_and_goes, fast_zap_and_drop);
            assert_eq!((put > 8, zap > 8), (put_yields(design), true), "{}: {put}, {zap} gaps", design.name);
        }
    }
}

#[test]
fn a_last_put_in_any_gap_of_a_fast_zap_frees_the_root_once() {
    for passes in PASSES {
        for design in sound() {
            let gaps =
                in_each_gap(design.name, &terms(passes, None), its_vcpu_drops_it, fast_zap_beside_a_drop);
            assert!(gaps > 8, "{}: {gaps} gaps", design.name);
        }
    }
}

#[test]
fn zap_all_in_any_gap_of_a_zap_leaves_nothing() {
    for design in sound() {
        let terms = terms("1G,root", None);
        let put = in_each_gap(design.name, &terms, zap_all, drop_it);
        let zap = in_each_gap(design.name, &terms, zap_all, fast_zap_and_drop);
        assert_eq!((put > 8, zap > 8), (put_yields(design), true), "{}: {put}, {zap} gaps", design.name);
    }
}

#[test]
fn a_fast_zap_or_a_last_put_in_any_gap_of_a_notifier_lets_no_spte_escape_it() {
    for design in sound() {
        // A notifier checks at each entry that is no leaf, 3600 of them.
        let terms = Terms { yielding: 61, ..Terms::default() };
        let zapped = in_each_gap(design.name, &terms, fast_zap, unmap_all);
        let dropped = in_each_gap(design.name, &terms, its_vcpu_drops_it, unmap_all_beside_a_drop);
        assert!(zapped > 50 && dropped > 50, "{}: {zapped}, {dropped} gaps", design.name);
    }
}
