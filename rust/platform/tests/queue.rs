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
use tdpmmu_platform::{Mutex, Platform, Real, WorkQueue};

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
