//! mmu_lock on real threads: exclusion, order, hand-over. Scaled by TDPMMU_STRESS.

mod common;

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use common::{Pool, eventually, stress_time};
use tdpmmu_platform::{
    Event, FairRwLock, HoldSums, MmuLock, Observer, Platform, RawRwLock, RcuConfig, Real, Role, Task,
    TaskConfig,
};

#[test]
fn an_unlocked_lock_admits_readers_or_one_writer() {
    let lock = FairRwLock::new();
    assert!(lock.try_lock_shared() && lock.try_lock_shared());
    assert!(!lock.try_lock_exclusive());
    lock.unlock_shared();
    lock.unlock_shared();
    assert!(lock.try_lock_exclusive());
    assert!(!lock.try_lock_shared() && !lock.try_lock_exclusive());
    lock.unlock_exclusive();
    assert!(lock.try_lock_shared());
    lock.unlock_shared();
    assert!(!lock.is_contended());
}

#[test]
fn waiters_are_served_in_the_order_of_their_arrival() {
    // Twenty waiters, more than there are turn words: namesakes sleep on the same word.
    let lock = Arc::new(FairRwLock::new());
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let inside = Arc::new(AtomicU32::new(0));
    lock.lock_exclusive();
    let mut threads = Vec::new();
    for i in 0..20u32 {
        let (lock, order, inside) = (lock.clone(), order.clone(), inside.clone());
        let waiting = lock.clone();
        threads.push(thread::spawn(move || {
            lock.lock_exclusive();
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
            order.lock().unwrap().push(i);
            inside.fetch_sub(1, Ordering::SeqCst);
            lock.unlock_exclusive();
        }));
        eventually("the waiter queues", || waiting.waiters() == i + 1);
    }
    assert!(lock.is_contended());
    lock.unlock_exclusive();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let order = order.lock().unwrap();
    assert_eq!(*order, (0..20).collect::<Vec<_>>());
}

#[test]
fn readers_and_writers_exclude_each_other_under_stress() {
    let lock = Arc::new(FairRwLock::new());
    // Readers count up from 0, a writer sets -1: any mixture shows.
    let inside = Arc::new(AtomicI64::new(0));
    let taken: Arc<[AtomicU64; 6]> = Arc::default();
    let deadline = Instant::now() + stress_time();
    let threads: Vec<_> = (0..6)
        .map(|i| {
            let (lock, inside, taken) = (lock.clone(), inside.clone(), taken.clone());
            thread::spawn(move || {
                let mut n = 0u64;
                while Instant::now() < deadline {
                    n += 1;
                    if i < 2 {
                        lock.lock_exclusive();
                        assert_eq!(inside.swap(-1, Ordering::Relaxed), 0);
                        assert_eq!(inside.swap(0, Ordering::Relaxed), -1);
                        lock.unlock_exclusive();
                    } else if n.is_multiple_of(7) && lock.try_lock_shared() {
                        assert!(inside.fetch_add(1, Ordering::Relaxed) >= 0);
                        assert!(inside.fetch_sub(1, Ordering::Relaxed) >= 1);
                        lock.unlock_shared();
                    } else {
                        lock.lock_shared();
                        assert!(inside.fetch_add(1, Ordering::Relaxed) >= 0);
                        if n.is_multiple_of(64) {
                            thread::yield_now();
                        }
                        assert!(inside.fetch_sub(1, Ordering::Relaxed) >= 1);
                        lock.unlock_shared();
                    }
                }
                taken[i].store(n, Ordering::Relaxed);
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!(!lock.is_contended());
    assert!(lock.try_lock_exclusive(), "the lock is whole after the stress");
    for (i, n) in taken.iter().enumerate() {
        assert!(n.load(Ordering::Relaxed) > 0, "thread {i} never got the lock");
    }
}

#[test]
fn a_writer_gets_in_although_readers_overlap_without_a_gap() {
    let lock = Arc::new(FairRwLock::new());
    let stop = Arc::new(AtomicBool::new(false));
    // Each reader takes the next hold before the other gives its own back.
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (lock, stop) = (lock.clone(), stop.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    lock.lock_shared();
                    for _ in 0..200 {
                        std::hint::spin_loop();
                    }
                    lock.unlock_shared();
                }
            })
        })
        .collect();
    for _ in 0..50 {
        lock.lock_exclusive();
        lock.unlock_exclusive();
    }
    stop.store(true, Ordering::Relaxed);
    readers.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn relock_hands_the_lock_to_whoever_waited() {
    let domain = Pool::new(0).domain(RcuConfig::default());
    let task = Task::<Real>::new(&domain, "holder", Role::Caller, TaskConfig::default());
    let lock = Arc::new(MmuLock::<Real>::new());
    for shared in [false, true] {
        let entered = Arc::new(AtomicBool::new(false));
        let mut guard = lock.write(&task);
        assert!(!guard.should_yield());
        let waiter = {
            let (lock, entered, domain) = (lock.clone(), entered.clone(), domain.clone());
            thread::spawn(move || {
                let task = Task::<Real>::new(&domain, "waiter", Role::Vcpu, TaskConfig::default());
                if shared {
                    let _guard = lock.read(&task);
                    entered.store(true, Ordering::SeqCst);
                } else {
                    let _guard = lock.write(&task);
                    entered.store(true, Ordering::SeqCst);
                }
                assert_eq!(task.meter().take().contended, 1);
            })
        };
        eventually("the waiter queues", || guard.is_contended());
        assert!(guard.should_yield(), "a fully preemptible holder yields to a waiter");
        guard.relock();
        assert!(entered.load(Ordering::SeqCst));
        drop(guard);
        waiter.join().unwrap();
        let seen = task.meter().take();
        assert_eq!((seen.yields, seen.handoffs, seen.acquisitions), (1, 1, 2));
    }
}

#[derive(Default)]
struct Listener(std::sync::Mutex<Vec<Event>>);

impl Observer for Listener {
    fn event(&self, _task: u32, event: &Event) {
        self.0.lock().unwrap().push(*event);
    }
}

#[test]
fn an_observer_hears_of_holds_and_of_debts() {
    let domain = Pool::new(0).domain(RcuConfig::default());
    let listener = Arc::new(Listener::default());
    let config = TaskConfig::default();
    let task =
        Task::<Real>::with_observer(&domain, "heard", Role::Caller, config, Some(listener.clone() as Arc<_>));
    let lock = MmuLock::<Real>::new();
    let mut guard = lock.read(&task);
    guard.set_debt(true);
    guard.relock();
    guard.set_debt(false);
    drop(guard);
    drop(lock.write(&task));
    assert_eq!(
        *listener.0.lock().unwrap(),
        [
            Event::Lock { shared: true },
            Event::Unlock { shared: true, debt: true },
            Event::Lock { shared: true },
            Event::Unlock { shared: true, debt: false },
            Event::Lock { shared: false },
            Event::Unlock { shared: false, debt: false },
        ]
    );
}

#[test]
fn holds_and_waits_are_measured_in_their_mode() {
    let domain = Pool::new(0).domain(RcuConfig::default());
    let measure = TaskConfig { measure: true, ..TaskConfig::default() };
    let task = Task::<Real>::new(&domain, "measured", Role::Caller, measure);
    let lock = Arc::new(MmuLock::<Real>::new());
    for _ in 0..3 {
        drop(lock.read(&task));
    }
    let started = Arc::new(Barrier::new(2));
    let holder = {
        let (lock, domain, started) = (lock.clone(), domain.clone(), started.clone());
        thread::spawn(move || {
            let task = Task::<Real>::new(&domain, "holder", Role::Vcpu, TaskConfig::default());
            let guard = lock.write(&task);
            started.wait();
            eventually("the measured task queues", || guard.is_contended());
        })
    };
    started.wait();
    drop(lock.write(&task));
    holder.join().unwrap();
    let seen = task.meter().take();
    let h = seen.histograms.as_ref().unwrap();
    assert_eq!((h.read_hold.count(), h.reader_wait.count()), (3, 3));
    assert_eq!((h.write_hold.count(), h.writer_wait.count()), (1, 1));
    assert_eq!(h.reader_wait.summary().max, Some(0), "uncontended waits are none");
    assert!(h.writer_wait.summary().max.unwrap() > 0);
    assert_eq!(seen.contended, 1);
    assert!(seen.phase_ns(tdpmmu_platform::Phase::LockWait) > 0);
}

#[test]
fn exclusive_holds_are_summed_without_measuring_and_a_lock_break_begins_a_new_one() {
    let domain = Pool::new(0).domain(RcuConfig::default());
    let task = Task::<Real>::new(&domain, "caller", Role::Caller, TaskConfig::default());
    let lock = MmuLock::<Real>::new();
    let held_for = |ticks: u64| {
        let until = Real::ticks() + ticks;
        while Real::ticks() < until {
            std::hint::spin_loop();
        }
    };
    drop(lock.read(&task));
    assert_eq!(task.meter().exclusive_holds().count, 0, "shared holds do not count");
    {
        let mut guard = lock.write(&task);
        held_for(1_000);
        guard.relock();
        held_for(100_000);
        guard.relock();
        assert_eq!(task.meter().exclusive_holds().count, 2, "a hold counts when it ends");
    }
    let holds = task.meter().exclusive_holds();
    assert_eq!(holds.count, 3);
    assert!(holds.first_ticks >= 1_000 && holds.longest_ticks >= 100_000, "{holds:?}");
    assert!(holds.total_ticks >= holds.first_ticks + holds.longest_ticks, "{holds:?}");
    task.meter().reset_exclusive_holds();
    assert_eq!(task.meter().exclusive_holds(), HoldSums::default());
}

#[test]
fn a_panic_while_the_lock_was_given_up_leaves_it_whole() {
    let rcu = Pool::new(1).domain(RcuConfig::default());
    let task = Task::<Real>::new(&rcu, "panics", Role::Caller, TaskConfig::default());
    let lock = MmuLock::<Real>::new();
    let panics = |_: &Task<Real>| panic!("an allocation that fails hard");
    let result = panic::catch_unwind(AssertUnwindSafe(|| lock.write(&task).unlocked_for(panics)));
    assert!(result.is_err() && !task.holds_mmu_lock());
    let result = panic::catch_unwind(AssertUnwindSafe(|| lock.read(&task).unlocked_for(panics)));
    assert!(result.is_err() && !task.holds_mmu_lock());
    // An unlock too many would let a writer in beside a reader, or nobody at all.
    let reader = lock.read(&task);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let task = Task::<Real>::new(&rcu, "writer", Role::Caller, TaskConfig::default());
            drop(lock.write(&task));
        });
        while !lock.is_contended() {
            assert!(!writer.is_finished(), "a writer beside a reader");
            thread::yield_now();
        }
        drop(reader);
    });
}
