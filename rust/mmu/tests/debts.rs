//! No flush is owed while mmu_lock is given up (rule F1), whoever gives it up: also the zap that a notifier's own put makes, because the vCPU
//! has dropped the root in a gap of the notifier.

#[path = "common/staged.rs"]
mod staged;
#[path = "common/world.rs"]
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use staged::{stage, unstage};
use tdpmmu_mmu::{DESIGNS, QueueKind};
use tdpmmu_platform::{Event, Observer, Preempt, Role, Site, Task, TaskConfig};
use world::{REGIONS, Terms, World, regions};

/// Releases of mmu_lock, and those with a flush owed.
#[derive(Default)]
struct Releases {
    all: AtomicU64,
    owing: AtomicU64,
}

impl Observer for Releases {
    fn event(&self, _task: u32, event: &Event) {
        if let Event::Unlock { debt, .. } = event {
            self.all.fetch_add(1, Ordering::Relaxed);
            self.owing.fetch_add(u64::from(*debt), Ordering::Relaxed);
        }
    }
}

#[test]
fn a_notifier_whose_put_is_the_last_gives_nothing_up_that_it_owes() {
    for design in DESIGNS.iter().filter(|design| !design.flawed) {
        for queue in [None, Some(QueueKind::System)] {
            let world = World::new(design.name, &Terms { yielding: 7, queue, ..Terms::default() });
            if queue.is_some() {
                // A dying VM: who loses a root zaps it, though the design has workers.
                world.mmu.put_user();
            }
            let vcpu = world::Vcpu::new(&world.mmu);
            let mut populates = world::Vcpu::new(&world.mmu);
            let root = populates.populated();
            populates.leave();
            let releases = Arc::new(Releases::default());
            let config = TaskConfig {
                preempt: Preempt::None,
                tick_ns: 1 << 50,
                force_yield: Some(7),
                ..TaskConfig::default()
            };
            let notifier = Task::with_observer(
                world.mmu.rcu(),
                "notifier",
                Role::Caller,
                config,
                Some(releases.clone() as Arc<dyn Observer>),
            );
            stage(0, Site::LockYield, move || vcpu.drop_roots(&[root]));
            {
                let mut guard = world.mmu.lock.write(&notifier);
                // Up to the last leaf: nothing after it makes the walk yield, and pay.
                let end = regions().last().expect("a region").end;
                let mut debt = world.mmu.unmap(&mut guard, 0, 0..end, true);
                world.mmu.pay(&notifier, &mut debt);
            }
            assert!(!unstage(Site::LockYield), "{}: dropped in a gap", design.name);
            assert!(world.mmu.flushes() >= REGIONS, "{}", design.name);
            let seen = (releases.all.load(Ordering::Relaxed), releases.owing.load(Ordering::Relaxed));
            assert!(seen.0 > 1 && seen.1 == 0, "{} {queue:?}: (releases, owing) {seen:?}", design.name);
            drop(notifier);
            world.end_well(&[]);
        }
    }
}
