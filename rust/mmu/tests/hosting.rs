//! Workers that wait, die or panic at a chosen step: on the platform, where it can tell, and without leaving anybody waiting.

#[path = "common/deadline.rs"]
mod deadline;
#[path = "common/staged.rs"]
mod staged;
#[path = "common/world.rs"]
mod world;

use std::sync::{Arc, Weak, mpsc};
use std::thread;

use deadline::must_end;
use staged::{SLEEP, Staged, stage, stage_worker};
use tdpmmu_mmu::{DesignOptions, Held, QueueKind, Yield, ZapQueue};
use tdpmmu_platform::{Owner, Site};
use world::{LEAVES, Terms, Vcpu, World};

fn idle(options: &DesignOptions) -> ZapQueue<Staged> {
    ZapQueue::with_work(QueueKind::PerVm, options, |_, _, _| ())
}

#[test]
fn who_waits_for_workers_sleeps_where_the_platform_can_tell() {
    must_end(|| {
        let world = World::new("sync", &Terms::default());
        let queue = idle(&DesignOptions::default());
        let (go, may_start) = mpsc::channel::<()>();
        // The worker is not ready before the one who attaches it sleeps: on a platform that runs one thread at a time it has its turn then.
        stage_worker(0, Site::Mutex, move || may_start.recv().expect("the other one sleeps"));
        stage(0, SLEEP, move || go.send(()).expect("the worker waits"));
        queue.attach(Arc::downgrade(&world.mmu)).expect("a thread");
        queue.shutdown();
        world.end_well(&[]);
    });
}

#[test]
fn who_waits_for_the_second_list_sleeps_where_the_platform_can_tell() {
    must_end(|| {
        let mut world = World::new("second-list-worker", &Terms::default());
        let roots = [world.vcpu.load(0), world.vcpu.load(1)];
        let mmu = Arc::clone(&world.mmu);
        let (sleeps, other) = mpsc::channel();
        // While one queues the item, another one loses a root: it must be seen to wait, or nobody would let the first one go on.
        stage(0, Site::QueueWork, move || {
            let (tell, told) = mpsc::channel();
            let loser = thread::spawn(move || {
                let vcpu = Vcpu::new(&mmu);
                stage(0, SLEEP, move || tell.send(()).expect("somebody waits"));
                vcpu.drop_roots(&[roots[1]]);
            });
            told.recv().expect("it sleeps");
            sleeps.send(loser).expect("somebody waits");
        });
        world.vcpu.drop_roots(&[roots[0]]);
        other.recv().expect("the item was queued").join().expect("no panic");
        assert_eq!(world.queued(), 1);
        world.finish_work();
        assert_eq!(world.listed_roots(), 0);
        world.end_well(&[]);
    });
}

#[test]
fn a_worker_that_dies_as_it_starts_is_an_error_and_nobody_waits_for_it() {
    must_end(|| {
        let world = World::new("sync", &Terms::default());
        let options = DesignOptions { workers: 3, ..DesignOptions::default() };
        stage_worker(0, Site::Mutex, || panic!("as it starts"));
        let error = idle(&options).attach(Arc::downgrade(&world.mmu)).expect_err("one of three");
        assert!(error.to_string().contains("panicked"), "{error}");
        let error = idle(&options).attach(Weak::new()).expect_err("whose workers?");
        assert!(error.to_string().contains("gone"), "{error}");
        world.end_well(&[]);
    });
}

#[test]
fn the_second_list_is_served_also_after_the_zap_of_one_root_panicked() {
    must_end(|| {
        let terms = Terms { queue: Some(QueueKind::System), ..Terms::default() };
        let mut world = World::new("second-list-worker", &terms);
        let full = world.vcpu.populated();
        let lost = [world.vcpu.load(1), world.vcpu.load(2)];
        world.vcpu.drop_roots(&[full]);
        world.vcpu.drop_roots(&lost);
        assert_eq!((world.queued(), world.listed_roots()), (1, 3));
        stage_worker(0, Site::RcuEnter, || panic!("in the middle of the first root"));
        world.finish_work();
        assert_eq!(world.listed_roots(), 1, "the other two are gone, in the same item");
        // What comes later is served too.
        let later = world.vcpu.load(3);
        world.vcpu.drop_roots(&[later]);
        world.finish_work();
        assert_eq!((world.listed_roots(), world.mmu.leaf_pages()[0]), (1, LEAVES as i64));
        // The panic has cost one root its zap and one reference, and was told.
        {
            let mut guard = world.mmu.lock.read(&world.caller);
            world.mmu.zap_root(&mut guard, full, Yield::Allowed);
            world.mmu.put_root(&world.caller, full, Owner::Work, Held::Shared(&mut guard));
        }
        let told = world.end(&[]);
        assert!(matches!(&told[..], [one] if one.contains("panicked")), "{told:?}");
    });
}
