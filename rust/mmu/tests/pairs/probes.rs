//! Probes: each runs one schedule on one design and returns a number. Nothing in them depends on time.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use tdpmmu_platform::{Role, Site};

use crate::staged::{stage, unstage};
use crate::world::{Terms, World, begin_fast_zap, finish_fast_zap, written};

/// One schedule, run on the design of this name.
pub type Probe = fn(&str) -> u64;

macro_rules! probes {
    ($($name:ident),+ $(,)?) => {
        /// Every probe of this file.
        pub const PROBES: &[(&str, Probe)] = &[$((stringify!($name), $name)),+];
    };
}

probes! {
    references_at_birth,
    entries_written_by_who_drops_a_root,
    entries_written_by_who_drops_a_root_of_a_dying_vm,
    yields_in_the_last_put,
    roots_listed_while_their_sptes_are_there,
    valid_roots_when_no_vcpu_has_one,
    work_items_queued_for_three_dropped_roots,
    user_references_after_three_roots_were_dropped,
    valid_roots_after_the_exclusive_hold,
    work_items_queued_by_a_fast_zap_of_three_roots,
    entries_written_in_the_exclusive_hold,
    entries_written_by_the_caller_of_a_fast_zap,
    entries_written_by_the_workers_of_a_fast_zap,
    sptes_mapped_when_the_fast_zap_returns,
    references_of_a_halted_vcpus_root_in_the_second_fast_zap,
    references_of_a_dropped_root_in_a_fast_zap,
    violations_when_a_root_is_lost_between_the_phases,
}

/// A vCPU has loaded a root: the count that it was born with.
pub fn references_at_birth(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.load(0);
    let refs = world.mmu.refs(root);
    world.end_well(&[root]);
    refs.into()
}

/// The vCPU drops the last reference; workers are held back: what it wrote before it could go on.
pub fn entries_written_by_who_drops_a_root(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    let writes = written(&world.vcpu.task, || world.vcpu.drop_roots(&[root]));
    world.end_well(&[]);
    writes
}

/// The same in a VM whose last user reference is gone.
pub fn entries_written_by_who_drops_a_root_of_a_dying_vm(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    assert_eq!(world.mmu.put_user(), 0);
    let writes = written(&world.vcpu.task, || world.vcpu.drop_roots(&[root]));
    world.end_well(&[]);
    writes
}

/// The vCPU drops the last reference, and every check asks it to yield: how often it gave mmu_lock up.
pub fn yields_in_the_last_put(design: &str) -> u64 {
    let mut world = World::new(design, &Terms { yielding: 1, ..Terms::default() });
    let root = world.vcpu.populated();
    let before = world.vcpu.task.meter().yields.get();
    world.vcpu.drop_roots(&[root]);
    let yields = world.vcpu.task.meter().yields.get() - before;
    world.end_well(&[]);
    yields
}

/// The vCPU drops the last reference: the roots that a notifier finds on the list when the first table is torn down by it, or when
/// it has dropped the root without tearing anything down. The SPTEs are still there (P-RCH).
pub fn roots_listed_while_their_sptes_are_there(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    let listed = Rc::new(Cell::new(None));
    let (mmu, seen) = (Arc::clone(&world.mmu), Rc::clone(&listed));
    // Inside the RCU section of the walk.
    stage(0, Site::SpteTeardown, move || seen.set(Some(mmu.listed_roots().count() as u64)));
    world.vcpu.drop_roots(&[root]);
    unstage(Site::SpteTeardown);
    let listed = listed.get().unwrap_or_else(|| world.listed_roots());
    world.end_well(&[]);
    listed
}

/// The only vCPU has dropped its root: the valid ones that the next vCPU with the same role would find.
pub fn valid_roots_when_no_vcpu_has_one(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    world.vcpu.drop_roots(&[root]);
    let valid = world.mmu.valid_roots(&world.caller).len() as u64;
    world.end_well(&[]);
    valid
}

/// Three roots lose their last reference in one hold of mmu_lock: the work items that this queues.
pub fn work_items_queued_for_three_dropped_roots(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let roots = world.vcpu.three_roots();
    world.vcpu.drop_roots(&roots);
    let queued = world.queued();
    world.end_well(&[]);
    queued
}

/// The same: the references of the VM's users, the file descriptor's among them, that keep the VM.
pub fn user_references_after_three_roots_were_dropped(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let roots = world.vcpu.three_roots();
    world.vcpu.drop_roots(&roots);
    let users = world.mmu.users();
    world.end_well(&[]);
    users.into()
}

/// A fast zap meets three roots: those that are valid when it gives mmu_lock up.
pub fn valid_roots_after_the_exclusive_hold(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let roots = world.vcpu.three_roots();
    world.begin_fast_zap();
    let valid = world.mmu.valid_roots(&world.caller).len() as u64;
    world.finish_fast_zap();
    world.end_well(&roots);
    valid
}

/// A fast zap meets three roots: the work items that this queues.
pub fn work_items_queued_by_a_fast_zap_of_three_roots(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let roots = world.vcpu.three_roots();
    world.begin_fast_zap();
    let queued = world.queued();
    world.finish_fast_zap();
    world.end_well(&roots);
    queued
}

/// A fast zap: the entries written while every vCPU's fault waits for mmu_lock.
pub fn entries_written_in_the_exclusive_hold(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    let writes = written(&world.caller, || world.begin_fast_zap());
    world.finish_fast_zap();
    world.end_well(&[root]);
    writes
}

/// A fast zap: the entries written by who asked for it.
pub fn entries_written_by_the_caller_of_a_fast_zap(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    let writes = written(&world.caller, || {
        world.begin_fast_zap();
        world.finish_fast_zap();
    });
    world.end_well(&[root]);
    writes
}

/// A fast zap: the entries written by workers.
pub fn entries_written_by_the_workers_of_a_fast_zap(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    world.begin_fast_zap();
    world.finish_fast_zap();
    let writes = world.written_by_workers();
    world.end_well(&[root]);
    writes
}

/// A fast zap whose workers are late: none starts before somebody waits for it. The SPTEs that are mapped under the root when the fast zap returns.
pub fn sptes_mapped_when_the_fast_zap_returns(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.populated();
    world.begin_fast_zap();
    world.finish_fast_zap();
    let mapped = world.mmu.count(&world.caller, root).sptes();
    world.end_well(&[root]);
    mapped
}

/// A halted vCPU holds a root through a fast zap, and nothing is queued any more when a second one comes: the references when that one
/// ends its exclusive hold, the vCPU's among them.
pub fn references_of_a_halted_vcpus_root_in_the_second_fast_zap(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let root = world.vcpu.load(0);
    world.begin_fast_zap();
    world.finish_fast_zap();
    world.finish_work();
    world.hold_workers();
    world.begin_fast_zap();
    let refs = world.mmu.refs(root);
    world.finish_fast_zap();
    world.end_well(&[root]);
    refs.into()
}

/// A fast zap begins when the last vCPU reference of a root has been dropped and its SPTEs are there: in the first yield of the last put, or after a put
/// that left the zap to others (whose workers are held back) or gave the lock up nowhere. The references of that root when the exclusive hold ends.
pub fn references_of_a_dropped_root_in_a_fast_zap(design: &str) -> u64 {
    let mut world = World::new(design, &Terms { yielding: 1, ..Terms::default() });
    let root = world.vcpu.populated();
    let refs = Rc::new(Cell::new(None));
    let (mmu, seen) = (Arc::clone(&world.mmu), Rc::clone(&refs));
    stage(0, Site::LockYield, move || {
        // Another task, in the gap.
        let task = mmu.task("caller in the gap", Role::Caller);
        begin_fast_zap(&mmu, &task);
        seen.set(Some(mmu.refs(root)));
        finish_fast_zap(&mmu, &task);
    });
    world.vcpu.drop_roots(&[root]);
    unstage(Site::LockYield);
    let refs = refs.get().unwrap_or_else(|| {
        world.begin_fast_zap();
        let refs = world.mmu.refs(root);
        world.finish_fast_zap();
        refs
    });
    world.end_well(&[]);
    refs.into()
}

/// A root is made and lost between the two phases of one fast zap, its worker held back (bug-history 21): what the MMU records as broken.
pub fn violations_when_a_root_is_lost_between_the_phases(design: &str) -> u64 {
    let mut world = World::new(design, &Terms::default());
    let old = world.vcpu.populated();
    world.begin_fast_zap();
    world.vcpu.drop_roots(&[old]);
    let new = world.vcpu.load(0);
    world.vcpu.fault(new, 5);
    world.vcpu.drop_roots(&[new]);
    world.finish_fast_zap();
    world.end(&[]).len() as u64
}
