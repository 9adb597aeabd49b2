//! The work queue and the mutex on real threads. Scaled by TDPMMU_STRESS.

mod common;

use std::{
    sync::{
        Arc, Mutex as StdMutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use common::{eventually, stress_time};
use tdpmmu_platform::{Mutex, Platform, Real, Serve, WorkQueue};

#[test]
fn one_worker_runs_items_in_the_order_queued() {
    let order = Arc::new(StdMutex::new(Vec::new()));
    let seen = order.clone();
    let queue = WorkQueue::<Real, u32>::new("order", 1, move |i| seen.lock().unwrap().push(*i)).unwrap();
    for i in 0..1_000 {
        assert!(queue.queue(i));
    }
    queue.flush();
    assert_eq!(*order.lock().unwrap(), (0..1_000).collect::<Vec<_>>());
    assert_eq!(queue.queue_ns().count(), 1_000);
    assert!(queue.is_empty());
}

#[test]
fn shutdown_runs_what_is_queued_and_refuses_what_comes_later() {
    let ran = Arc::new(AtomicU64::new(0));
    let count = ran.clone();
    let queue = WorkQueue::<Real, ()>::new("down", 2, move |()| {
        count.fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    (0..100).for_each(|_| assert!(queue.queue(())));
    queue.shutdown();
    assert_eq!(ran.load(Ordering::SeqCst), 100);
    assert!(!queue.queue(()));
    queue.flush();
    queue.shutdown();
    assert_eq!(ran.load(Ordering::SeqCst), 100);
}

#[test]
fn a_queue_without_workers_is_an_error_that_names_it() {
    let error = WorkQueue::<Real, ()>::new("nobody", 0, |()| ()).err().unwrap();
    assert!(error.to_string().contains("nobody"), "{error}");
}

#[test]
fn a_thread_name_with_nul_is_an_error() {
    let error = Real::spawn("a\0b", Box::new(|| ())).err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn a_panic_of_an_item_ends_neither_the_worker_nor_the_flush() {
    let ran = Arc::new(AtomicU64::new(0));
    let count = ran.clone();
    let queue = WorkQueue::<Real, u32>::new("panics", 1, move |i| {
        assert!(*i != 1, "item one");
        count.fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    (0..3).for_each(|i| assert!(queue.queue(i)));
    queue.flush();
    assert_eq!(ran.load(Ordering::SeqCst), 2);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| queue.shutdown())).unwrap_err();
    assert_eq!(*caught.downcast_ref::<&str>().unwrap(), "item one");
}

#[test]
fn each_worker_has_a_context_of_its_own() {
    let seen = Arc::new(StdMutex::new(std::collections::BTreeSet::new()));
    let insert = seen.clone();
    let queue = WorkQueue::<Real, ()>::with_context(
        "context",
        2,
        |index| (index, thread::current().id()),
        move |(index, id), ()| {
            assert_eq!(*id, thread::current().id());
            insert.lock().unwrap().insert(*index);
            // Both workers must take part before either goes on.
            eventually("the other worker comes", || insert.lock().unwrap().len() == 2);
        },
    )
    .unwrap();
    queue.queue(());
    queue.queue(());
    queue.flush();
    assert_eq!(seen.lock().unwrap().len(), 2);
}

#[test]
fn every_item_runs_once_and_before_its_flush_returns_under_stress() {
    let ran: Arc<Vec<AtomicU64>> = Arc::new((0..4).map(|_| AtomicU64::new(0)).collect());
    let count = ran.clone();
    let queue = WorkQueue::<Real, usize>::new("stress", 3, move |who| {
        count[*who].fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    let deadline = Instant::now() + stress_time();
    thread::scope(|s| {
        for who in 0..4 {
            let (queue, ran) = (&queue, &ran);
            s.spawn(move || {
                let mut queued = 0;
                while Instant::now() < deadline {
                    for _ in 0..=queued % 5 {
                        queue.queue(who);
                        queued += 1;
                    }
                    queue.flush();
                    assert_eq!(ran[who].load(Ordering::SeqCst), queued);
                }
            });
        }
    });
}

#[test]
fn a_flush_of_one_owner_waits_for_nobody_elses_items() {
    let ran = Arc::new(StdMutex::new(Vec::new()));
    let seen = ran.clone();
    let queue = WorkQueue::<Real, u32>::new("owners", 1, move |i| seen.lock().unwrap().push(*i)).unwrap();
    queue.hold_for(1);
    for i in 0..6 {
        assert!(queue.queue_for(u64::from(i) % 3, i));
    }
    queue.flush_for(0);
    queue.flush_for(2);
    assert_eq!(*ran.lock().unwrap(), [0, 2, 3, 5], "in order, past the one who is held back");
    assert_eq!((queue.len_for(1), queue.len()), (2, 2));
    queue.release_for(1);
    queue.flush();
    assert_eq!(*ran.lock().unwrap(), [0, 2, 3, 5, 1, 4]);
}

#[test]
fn a_shutdown_runs_what_is_held_back() {
    let ran = Arc::new(AtomicU64::new(0));
    let count = ran.clone();
    let queue = WorkQueue::<Real, ()>::new("held", 2, move |()| {
        count.fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    queue.hold_for(7);
    assert!(queue.queue_for(7, ()));
    queue.shutdown();
    queue.hold_for(7);
    assert_eq!(ran.load(Ordering::SeqCst), 1);
}

#[test]
fn a_queue_grows_and_never_shrinks() {
    let queue = WorkQueue::<Real, ()>::new("grows", 1, |()| ()).unwrap();
    for (asked, there) in [(3, 3), (2, 3), (4, 4)] {
        queue.grow(asked).unwrap();
        assert_eq!(queue.workers(), there);
    }
    queue.shutdown();
    queue.grow(9).unwrap();
    assert_eq!(queue.workers(), 4, "nobody starts after the shutdown");
}

#[test]
fn a_worker_that_drops_the_last_hold_of_its_queue_waits_for_nobody() {
    type Slot = StdMutex<Option<Arc<WorkQueue<Real, ()>>>>;
    let slot = Arc::new(Slot::default());
    let (held, ran) = (slot.clone(), Arc::new(AtomicU64::new(0)));
    let count = ran.clone();
    let queue = WorkQueue::<Real, ()>::new("self", 2, move |()| {
        drop(held.lock().unwrap().take());
        count.fetch_add(1, Ordering::SeqCst);
    })
    .unwrap();
    let queue = Arc::new(queue);
    *slot.lock().unwrap() = Some(queue.clone());
    queue.hold_for(0);
    assert!(queue.queue(()) && queue.queue(()));
    let shared = Arc::downgrade(&queue);
    queue.release_for(0);
    drop(queue);
    eventually("both items have run and the queue is gone", || {
        ran.load(Ordering::SeqCst) == 2 && shared.upgrade().is_none()
    });
}

#[test]
fn a_nudge_reaches_every_worker_between_its_items() {
    struct Counts(Arc<Vec<AtomicU64>>, usize);
    impl Serve<()> for Counts {
        fn run(&self, (): &()) {}
        fn between(&self) {
            self.0[self.1].fetch_add(1, Ordering::SeqCst);
        }
    }
    let seen: Arc<Vec<AtomicU64>> = Arc::new((0..3).map(|_| AtomicU64::new(0)).collect());
    let counts = seen.clone();
    let queue = WorkQueue::<Real, ()>::served("nudged", 3, move |n| Counts(counts.clone(), n)).unwrap();
    for _ in 0..5 {
        let before: Vec<u64> = seen.iter().map(|n| n.load(Ordering::SeqCst)).collect();
        queue.nudge();
        eventually("each has looked again", || {
            seen.iter().zip(&before).all(|(now, before)| now.load(Ordering::SeqCst) > *before)
        });
    }
}

#[test]
fn a_mutex_excludes_under_stress() {
    let mutex = Mutex::<Real, (u64, u64)>::new((0, 0));
    let deadline = Instant::now() + stress_time();
    let total = AtomicU64::new(0);
    thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                let mut n = 0u64;
                while Instant::now() < deadline {
                    let mut value = mutex.lock();
                    value.0 += 1;
                    if n.is_multiple_of(32) {
                        thread::yield_now();
                    }
                    value.1 += 1;
                    assert_eq!(value.0, value.1);
                    n += 1;
                }
                total.fetch_add(n, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(mutex.into_inner().0, total.into_inner());
}
