use std::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};

use super::*;
use crate::{
    api::{Exclusive, JoinHandle, Platform, RcuDomain, Reclaim, Shared},
    mmu_lock::MmuLock,
    rcu::RcuConfig,
    task::{Role, Task, TaskConfig},
};

struct Nothing;

impl Reclaim for Nothing {
    fn reclaim(&self, _head: u32) -> usize {
        1
    }
}

fn machine(cpus: usize) -> Machine {
    Machine { cpus, costs: Costs::default() }
}

fn go(body: impl FnOnce() + Send + 'static) -> JoinHandle {
    Timed::spawn("t", Box::new(body)).expect("a world")
}

#[test]
fn a_word_that_many_cpus_change_is_served_to_one_after_the_other() {
    let one = |tasks: usize| {
        let cell = Arc::new(AtomicU64::new(0));
        let (_, ran) = run(&machine(8), move || {
            let tasks: Vec<_> = (0..tasks)
                .map(|_| {
                    let cell = cell.clone();
                    go(move || {
                        for _ in 0..40_000 {
                            Timed::fetch_add(&cell, 1, Site::Users);
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.join().expect("no panic");
            }
            assert_eq!(cell.load(Ordering::SeqCst) % 40_000, 0);
        })
        .expect("an end");
        ran.ns
    };
    // Alone each addition costs a locked instruction; with three others each must fetch the line, and they queue for it.
    let (alone, four) = (one(1), one(4));
    assert!(four > 20 * alone, "{alone} ns alone, {four} ns with four");
}

#[test]
fn the_same_program_is_the_same_run() {
    let once = || {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = seen.clone();
        let (_, ran) = run(&machine(2), move || {
            let rcu = TimedRcu::new(Arc::new(Nothing), RcuConfig::default());
            let lock = Arc::new(MmuLock::<Timed>::new());
            let tasks: Vec<_> = (0..5u32)
                .map(|n| {
                    let (lock, rcu, seen) = (lock.clone(), rcu.clone(), seen.clone());
                    go(move || {
                        let task = Task::<Timed>::new(&rcu, "t", Role::Vcpu, TaskConfig::default());
                        for _ in 0..20 {
                            if n == 0 {
                                drop(lock.write(&task));
                            } else {
                                drop(lock.read(&task));
                            }
                            charge_ns(700.0 * f64::from(n));
                            seen.lock().expect("no panic").push((n, Timed::ticks()));
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.join().expect("no panic");
            }
            rcu.stop();
        })
        .expect("an end");
        (ran, told.lock().expect("no panic").clone())
    };
    let first = once();
    assert_eq!(first.1.len(), 100);
    assert!(first.1.is_sorted_by_key(|step| step.1), "time never goes back");
    assert_eq!(first, once());
}

#[test]
fn a_writer_excludes_readers_and_a_waiter_that_waits_long_sleeps() {
    let waited = |hold_ns: f64| {
        run(&machine(2), move || {
            let rcu = TimedRcu::new(Arc::new(Nothing), RcuConfig::default());
            let lock = Arc::new(MmuLock::<Timed>::new());
            let task = Task::<Timed>::new(&rcu, "w", Role::Caller, TaskConfig::default());
            let held = lock.write(&task);
            let (other, theirs) = (lock.clone(), rcu.clone());
            let reader = go(move || {
                let task = Task::<Timed>::new(&theirs, "r", Role::Vcpu, TaskConfig::default());
                let cpu = Timed::thread_cpu_ns();
                let _read = other.read(&task);
                assert!(Timed::thread_cpu_ns() - cpu < 10_000);
            });
            charge_ns(hold_ns);
            let released = Timed::ticks();
            drop::<crate::Guard<'_, _, Exclusive>>(held);
            reader.join().expect("no panic");
            let read: crate::Guard<'_, _, Shared> = lock.read(&task);
            drop(read);
            rcu.stop();
            Timed::ticks_to_ns(Timed::ticks() - released)
        })
        .expect("an end")
        .0
    };
    // The reader starts some 10 us after the spawn and spins for 4: a hold that ends meanwhile costs no wake-up.
    let (short, long) = (waited(12_000.0), waited(1_000_000.0));
    assert!(short < long, "{short} ns, {long} ns");
}

#[test]
fn rcu_waits_for_who_is_inside_and_for_nobody_else() {
    let (held, free) = run(&machine(4), || {
        let freed = Arc::new(Mutex::new(Vec::new()));
        struct Note(Arc<Mutex<Vec<u64>>>);
        impl Reclaim for Note {
            fn reclaim(&self, _head: u32) -> usize {
                self.0.lock().expect("no panic").push(Timed::ticks());
                1
            }
        }
        let rcu = TimedRcu::new(
            Arc::new(Note(freed.clone())),
            RcuConfig { batch_delay_ns: 0, ..RcuConfig::default() },
        );
        let task = Task::<Timed>::new(&rcu, "reader", Role::Vcpu, TaskConfig::default());
        let link = AtomicU32::new(0);
        let section = task.rcu_read();
        rcu.defer(1, &link, 1);
        charge_ns(3_000_000.0);
        let left = Timed::ticks();
        drop(section);
        rcu.barrier();
        let held = freed.lock().expect("no panic")[0] >= left;
        rcu.defer(2, &link, 1);
        let before = Timed::ticks();
        rcu.barrier();
        let free = freed.lock().expect("no panic")[1] - before;
        rcu.stop();
        (held, free)
    })
    .expect("an end")
    .0;
    assert!(held);
    assert!(Timed::ticks_to_ns(free) < 200_000, "{free}");
}

#[test]
fn who_waits_for_ever_is_named() {
    let error = run(&machine(2), || {
        let never = AtomicU32::new(0);
        Timed::futex_wait(&never, 0, None);
    })
    .expect_err("nobody wakes it");
    assert!(error.to_string().contains("main"), "{error}");
    let error = run(&machine(2), || assert_eq!(1, 2, "on purpose")).expect_err("a panic");
    assert!(matches!(error, TimedError::Panicked(text) if text.contains("on purpose")));
}

#[test]
fn waking_all_ends_though_the_woken_sleep_again_at_once() {
    let (wakes, _) = run(&machine(2), || {
        let (bell, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (theirs, over) = (bell.clone(), stop.clone());
        let sleeper = go(move || {
            while over.load(Ordering::SeqCst) == 0 {
                Timed::futex_wait(&theirs, 0, None);
            }
        });
        Timed::idle_until(Timed::ns_to_ticks(1_000_000), Site::Users);
        let woken = Timed::futex_wake(&bell, u32::MAX);
        stop.store(1, Ordering::SeqCst);
        bell.store(1, Ordering::SeqCst);
        Timed::futex_wake(&bell, u32::MAX);
        sleeper.join().expect("no panic");
        woken
    })
    .expect("an end");
    assert_eq!(wakes, 1);
}

#[test]
fn waiting_costs_a_cpu_only_while_spinning() {
    let ((), ran) = run(&machine(1), || {
        let flag = Arc::new(AtomicU32::new(0));
        let theirs = flag.clone();
        let sleeper = go(move || {
            Timed::futex_wait(&theirs, 0, None);
            assert!(Timed::thread_cpu_ns() < 10_000);
        });
        charge_ns(50_000_000.0);
        flag.store(1, Ordering::SeqCst);
        Timed::futex_wake(&flag, 1);
        sleeper.join().expect("no panic");
        quiet(|| charge_ns(1e9));
    })
    .expect("an end");
    assert!((50_000_000..51_000_000).contains(&ran.ns), "{ran:?}");
}
