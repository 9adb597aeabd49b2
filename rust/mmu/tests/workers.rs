//! What the workers of a design may and may not do: once per transition, for whom, on which CPU, how long. Workers are held back where a test needs one
//! to be late ([`tdpmmu_mmu::ZapQueue::hold`]): no test waits for a clock.

mod common;
#[path = "common/deadline.rs"]
mod deadline;

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::{Cpu, Mmu, Setup, end, fast_zap};
use deadline::must_end;
use tdpmmu_mmu::{DESIGNS, DesignInfo, DesignOptions, MmuError, QueueKind, ZapQueue, design};
use tdpmmu_platform::{Platform, Real, Role};
use tdpmmu_spte::geometry::span;

/// Sound designs with workers, each with both kinds of queue.
fn setups() -> Vec<Setup> {
    let with_workers = DESIGNS.iter().filter(|d| !d.flawed && d.queue.is_some());
    with_workers
        .flat_map(|d: &DesignInfo| {
            [QueueKind::PerVm, QueueKind::System].map(|kind| Setup {
                design: d.name,
                queue: Some(kind),
                ..Setup::default()
            })
        })
        .collect()
}

/// Designs of [`setups`] in which the last put of a valid root makes work.
fn setups_whose_last_put_queues() -> impl Iterator<Item = Setup> {
    setups().into_iter().filter(|s| design::info(s.design).expect("known").ownership.to_string() == "vcpu")
}

fn queue(mmu: &Mmu) -> &ZapQueue<Real> {
    mmu.design().queue().expect("a design with workers")
}

/// Drops the root and takes a new one.
fn reload(cpu: &mut Cpu) -> u32 {
    let old = cpu.root;
    cpu.drop_root();
    cpu.root = cpu.mmu.load_root(&cpu.task, &mut cpu.cache, cpu.mmu.root_role(false)).expect("room");
    old
}

#[test]
fn each_transition_queues_once_and_an_invalid_root_is_skipped() {
    for setup in setups_whose_last_put_queues() {
        let name = setup.design;
        let serial = name == "second-list-worker";
        let mmu = setup.build();
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(3, 1);
        queue(&mmu).hold();
        let first = reload(&mut cpu);
        assert_eq!((queue(&mmu).waiting(), mmu.refs(first)), (1, 1), "{name}: the worker's reference");
        cpu.fault(4, 1);
        let task = mmu.task("caller", Role::Caller);
        mmu.fast_zap_invalidate(&mut mmu.lock.write(&task));
        let queued = if serial { 1 } else { 2 };
        assert_eq!(queue(&mmu).waiting(), queued, "{name}: the second root, and the first one not again");
        assert_eq!((mmu.refs(first), mmu.refs(cpu.root)), (1, 2), "{name}");
        // A second one beside a vCPU that still holds its root, as a halted one does: nothing is left to queue.
        mmu.fast_zap_invalidate(&mut mmu.lock.write(&task));
        assert_eq!((queue(&mmu).waiting(), mmu.refs(cpu.root)), (queued, 2), "{name}");
        queue(&mmu).release();
        mmu.fast_zap_finish(&task);
        assert_eq!((mmu.leaf_pages()[0], mmu.refs(cpu.root)), (0, 1), "{name}");
        cpu.drop_root();
        drop(task);
        end(&cpu.close());
    }
}

#[test]
fn a_fast_zap_returns_only_after_what_was_lost_before_it() {
    for setup in setups_whose_last_put_queues() {
        let name = setup.design;
        let mmu = setup.build();
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(3, 1);
        queue(&mmu).hold();
        reload(&mut cpu);
        thread::scope(|scope| {
            let zap = scope.spawn(|| {
                fast_zap(&mmu, &mmu.task("caller", Role::Caller));
                mmu.leaf_pages()[0]
            });
            // It has invalidated the second root; of the first one nobody but the worker can rid it.
            while !mmu.is_obsolete(cpu.root) {
                thread::yield_now();
            }
            thread::sleep(Duration::from_millis(5));
            assert!(!zap.is_finished(), "{name}: it returned although a root waits");
            assert_eq!(mmu.leaf_pages()[0], 1, "{name}");
            queue(&mmu).release();
            assert_eq!(zap.join().expect("no panic"), 0, "{name}");
        });
        cpu.drop_root();
        end(&cpu.close());
    }
}

#[test]
fn a_dying_vm_is_zapped_by_who_drops_the_root() {
    for setup in setups_whose_last_put_queues() {
        let (name, kind) = (setup.design, setup.queue);
        let mmu = setup.build();
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(3, 1);
        assert_eq!((mmu.users(), mmu.put_user()), (1, 0));
        assert!(!mmu.get_user(), "nobody may begin to hold a VM without users");
        queue(&mmu).hold();
        cpu.drop_root();
        let direct = kind == Some(QueueKind::System);
        assert_eq!(queue(&mmu).waiting() == 0, direct, "{name}: only the system's queue asks for a user");
        assert_eq!(mmu.leaf_pages()[0] == 0, direct, "{name}");
        queue(&mmu).release();
        end(&cpu.close());
    }
}

#[test]
fn a_fast_zap_of_a_vm_without_users_leaves_nothing_mapped() {
    for setup in setups() {
        let name = setup.design;
        let mmu = setup.build();
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(3, 1);
        mmu.put_user();
        let task = mmu.task("nx_huge_pages", Role::Caller);
        fast_zap(&mmu, &task);
        assert_eq!((mmu.leaf_pages()[0], mmu.refs(cpu.root)), (0, 1), "{name}");
        cpu.drop_root();
        drop(task);
        end(&cpu.close());
    }
}

#[test]
fn an_item_in_the_systems_queue_holds_a_user_of_its_vm_until_it_has_run() {
    let mmu = Setup { design: "async-worker", queue: Some(QueueKind::System), ..Setup::default() }.build();
    let mut cpu = Cpu::new(&mmu);
    queue(&mmu).hold();
    cpu.drop_root();
    assert_eq!(mmu.users(), 2);
    // The last file descriptor goes, the VM does not.
    assert_eq!(mmu.put_user(), 1);
    queue(&mmu).release();
    mmu.design().quiesce();
    assert_eq!(mmu.users(), 0);
    end(&cpu.close());
}

#[test]
fn a_vm_on_the_systems_queue_waits_for_its_own_items_only() {
    must_end(|| {
        for design in ["async-worker", "async-worker-owned", "second-list-worker"] {
            let build = || Setup { design, queue: Some(QueueKind::System), ..Setup::default() }.build();
            let (late, prompt) = (build(), build());
            let mut held = Cpu::new(&late);
            held.fault(3, 1);
            queue(&late).hold();
            let task = late.task("caller", Role::Caller);
            late.fast_zap_invalidate(&mut late.lock.write(&task));
            let mut cpu = Cpu::new(&prompt);
            cpu.fault(3, 1);
            fast_zap(&prompt, &prompt.task("caller", Role::Caller));
            assert_eq!(prompt.leaf_pages()[0], 0, "{design}");
            assert!(prompt.design().take_worker_reports().len() <= 1, "{design}: of its own items");
            cpu.drop_root();
            end(&cpu.close());
            assert_eq!((late.leaf_pages()[0], queue(&late).waiting()), (1, 1), "{design}: still held back");
            queue(&late).release();
            late.fast_zap_finish(&task);
            held.drop_root();
            drop(task);
            end(&held.close());
        }
    });
}

#[test]
fn a_vm_ends_with_work_pending_and_leaves_nothing() {
    must_end(|| {
        for setup in setups_whose_last_put_queues() {
            let mmu = setup.build();
            let mut cpu = Cpu::new(&mmu);
            cpu.fault(3, 1);
            queue(&mmu).hold();
            reload(&mut cpu);
            cpu.drop_root();
            assert!(queue(&mmu).waiting() > 0);
            // Held back or not: the end of the VM is the end of the wait.
            end(&cpu.close());
        }
    });
}

#[test]
fn an_mmu_that_is_only_dropped_takes_its_workers_along() {
    must_end(|| {
        for setup in setups_whose_last_put_queues() {
            for _ in 0..20 {
                let mmu = Setup { workers: 2, design: setup.design, queue: setup.queue, ..Setup::default() }
                    .build();
                let mut cpu = Cpu::new(&mmu);
                for i in 0..8 {
                    cpu.fault(i * span(3), 1);
                    reload(&mut cpu);
                }
                cpu.drop_root();
                // No uninit: a worker may be the last to hold the MMU, and must neither wait for itself nor go on.
                drop(cpu);
                drop(mmu);
            }
        }
    });
}

#[test]
fn zap_all_meets_a_worker_that_has_yielded() {
    for kind in [QueueKind::PerVm, QueueKind::System] {
        let mut met = false;
        for _ in 0..200 {
            let setup = Setup {
                design: "async-worker",
                queue: Some(kind),
                passes: Some("4K,2M,1G,root"),
                batch: 1,
                force_yield: Some(1),
                ..Setup::default()
            };
            let mmu = setup.build();
            let mut cpu = Cpu::new(&mmu);
            for gfn in 0..2048 {
                cpu.fault(gfn, 1);
            }
            cpu.drop_root();
            let task = mmu.task("notifier", Role::Caller);
            loop {
                // Each check of the worker yields: this lock comes between two of its entries.
                let mut guard = mmu.lock.write(&task);
                let left = mmu.leaf_pages()[0];
                met |= (1..2048).contains(&left);
                if left < 2048 {
                    // It yields too, so that the two take turns in one tree.
                    mmu.zap_all(&mut guard);
                    assert_eq!(mmu.leaf_pages(), [0; 3], "{kind:?}");
                    break;
                }
            }
            drop(task);
            end(&cpu.close());
            if met {
                break;
            }
        }
        assert!(met, "{kind:?}: the worker was never met in the middle");
    }
}

#[test]
fn one_item_a_vm_serves_the_second_list() {
    let mmu = Setup { design: "second-list-worker", workers: 4, ..Setup::default() }.build();
    let mut cpu = Cpu::new(&mmu);
    queue(&mmu).hold();
    for i in 0..10 {
        cpu.fault(i, 1);
        reload(&mut cpu);
    }
    assert_eq!((queue(&mmu).waiting(), mmu.leaf_pages()[0]), (1, 10));
    queue(&mmu).release();
    mmu.design().quiesce();
    assert_eq!(mmu.leaf_pages()[0], 0, "the one item has zapped all ten");
    assert_eq!(mmu.design().take_worker_reports().len(), 1, "one worker, whatever was asked for");
    assert_eq!(mmu.design().queue_ns().map(|h| h.count()), Some(1));
    cpu.drop_root();
    end(&cpu.close());
}

#[test]
fn there_are_as_many_workers_as_asked_for_and_the_systems_are_shared() {
    let own = Setup { design: "async-worker", workers: 3, ..Setup::default() }.build();
    assert_eq!(own.design().take_worker_reports().len(), 3);
    end(&own);
    must_end(|| {
        // Two VMs hold both workers of the larger one's wish at once.
        let shared = |workers| Setup {
            design: "async-worker",
            queue: Some(QueueKind::System),
            workers,
            ..Setup::default()
        };
        let (one, two) = (shared(1).build(), shared(2).build());
        for mmu in [&one, &two] {
            let mut cpu = Cpu::new(mmu);
            cpu.fault(1, 1);
            cpu.drop_root();
            mmu.design().quiesce();
            assert_eq!(mmu.design().queue_ns().map(|h| h.count()), Some(1), "each has its own books");
            cpu.close();
        }
        end(&one);
        let mut cpu = Cpu::new(&two);
        cpu.drop_root();
        end(&cpu.close());
    });
}

#[test]
fn workers_run_where_they_are_bound() {
    let cpus = Real::cpus();
    let (send, seen) = mpsc::channel();
    // One worker more than CPUs, so that the round begins again.
    let options = DesignOptions { workers: cpus.len() + 1, worker_cpus: cpus.clone(), queue: None };
    let mmu = Setup::default().build();
    let queue = ZapQueue::<Real>::with_work(QueueKind::PerVm, &options, move |_, _, _| {
        send.send(Real::cpus()).expect("somebody listens");
    });
    queue.attach(Arc::downgrade(&mmu)).expect("CPUs that this process may use");
    for n in 0..20 {
        assert!(queue.push(&mmu, n));
    }
    queue.shutdown();
    assert!(!queue.push(&mmu, 0), "nobody is left to take it");
    drop(queue);
    let seen: Vec<_> = seen.iter().collect();
    assert_eq!(seen.len(), 20);
    assert!(seen.iter().all(|on| on.len() == 1 && cpus.contains(&on[0])), "{seen:?}");
    end(&mmu);
}

#[test]
fn workers_that_are_not_bound_run_where_the_process_may_whoever_starts_them() {
    let process = Real::process_cpus();
    for kind in [QueueKind::PerVm, QueueKind::System] {
        let (send, seen) = mpsc::channel();
        let (mmu, first) = (Setup::default().build(), process[0]);
        let started = thread::spawn(move || {
            Real::pin(first).expect("a CPU of this process");
            let options = DesignOptions { workers: 2, ..DesignOptions::default() };
            let queue = ZapQueue::<Real>::with_work(kind, &options, move |_, _, _| {
                send.send(Real::cpus()).expect("somebody listens");
            });
            queue.attach(Arc::downgrade(&mmu)).expect("threads");
            assert_eq!(Real::cpus(), [first], "who starts them stays where it is bound");
            assert!((0..20).all(|n| queue.push(&mmu, n)));
            queue.shutdown();
            end(&mmu);
        });
        started.join().expect("no panic");
        let seen: Vec<_> = seen.iter().collect();
        assert_eq!(seen.len(), 20, "{kind:?}");
        assert!(seen.iter().all(|on| *on == process), "{kind:?}: {seen:?}");
    }
}

#[test]
fn nothing_is_held_back_after_the_shutdown() {
    for setup in setups() {
        let mmu = setup.build();
        queue(&mmu).hold();
        assert!(queue(&mmu).is_held());
        end(&mmu);
        assert!(!queue(&mmu).is_held(), "the shutdown is a release");
        queue(&mmu).hold();
        assert!(!queue(&mmu).is_held(), "the system's queue would remember a VM that is gone");
    }
}

#[test]
fn a_cpu_that_this_process_may_not_use_is_an_error_that_names_it() {
    let setup = Setup { design: "async-worker", worker_cpus: vec![1023], ..Setup::default() };
    match setup.try_build() {
        Err(MmuError::Thread(error)) => assert!(error.to_string().contains("1023"), "{error}"),
        Ok(_) => panic!("accepted"),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_worker_that_panics_is_told_to_its_own_vm() {
    for kind in [QueueKind::PerVm, QueueKind::System] {
        let (mmu, other) = (Setup::default().build(), Setup::default().build());
        let options = DesignOptions { queue: Some(kind), ..DesignOptions::default() };
        let queue = ZapQueue::<Real>::with_work(kind, &options, |_, _, what| assert_ne!(what, 13));
        queue.attach(Arc::downgrade(&mmu)).expect("threads");
        for what in [12, 13, 14] {
            assert!(queue.push(&mmu, what));
        }
        queue.flush();
        assert_eq!((mmu.users(), queue.waiting()), (1, 0), "{kind:?}");
        assert!(matches!(&mmu.violations()[..], [one] if one.contains("panicked")), "{kind:?}");
        assert_eq!(other.violations(), Vec::<String>::new());
        // It goes on where the VM's own workers are joined; the system's serve others, who have nothing to do with it.
        let end_of_workers = panic::catch_unwind(AssertUnwindSafe(|| queue.shutdown()));
        assert_eq!(end_of_workers.is_err(), kind == QueueKind::PerVm);
        end(&other);
    }
}
