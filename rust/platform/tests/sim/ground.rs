//! Locks, RCU, threads and the clock of the simulation.

use std::sync::{
    Arc, Mutex as StdMutex,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use tdpmmu_platform::{
    MmuLock, NIL, Platform, RawRwLock, RcuConfig, RcuDomain, RcuReader, Role, Sim, Site, Task, TaskConfig,
    sim::{self, End, Limits, SimConfig, SimRcu, SimRwLock, Strategy},
};

use crate::{
    Body,
    busy::{Counting, busy},
    config, random, run, together, word,
};

#[test]
fn a_program_that_uses_everything_ends_well_under_many_schedules() {
    for seed in 0..300 {
        let memory = if seed % 2 == 0 { sim::Memory::Sc } else { sim::Memory::Tso };
        let done = run(SimConfig { memory, yield_percent: 10, ..random(seed) }, busy);
        assert_eq!(done.end, End::Finished, "seed {seed}: {}", done.schedule);
        assert_eq!(done.leaked_tasks, 0);
        assert!(done.choices > 20 && done.width >= 5, "{} {}", done.choices, done.width);
    }
}

#[test]
fn writers_are_alone_and_readers_are_together() {
    let mut together_once = false;
    for seed in 0..200 {
        let most = Arc::new(AtomicU64::new(0));
        let seen = most.clone();
        let done = run(random(seed), move || {
            let lock = Arc::new(SimRwLock::new());
            let inside = word();
            let body = |shared: bool| {
                let (lock, inside, most) = (lock.clone(), inside.clone(), most.clone());
                Box::new(move || {
                    let weight = if shared { 1 } else { 100 };
                    Sim::point(Site::LockAcquire);
                    if shared {
                        lock.lock_shared()
                    } else {
                        lock.lock_exclusive()
                    }
                    let now = inside.fetch_add(weight, Ordering::SeqCst) + weight;
                    assert!(now <= 100, "a writer among others: {now}");
                    if shared {
                        most.fetch_max(now, Ordering::SeqCst);
                    }
                    Sim::point(Site::SpteZap);
                    inside.fetch_sub(weight, Ordering::SeqCst);
                    if shared { lock.unlock_shared() } else { lock.unlock_exclusive() }
                }) as Body
            };
            together(vec![body(true), body(false), body(true), body(false)]);
            assert!(!lock.is_contended() && lock.try_lock_exclusive());
            lock.unlock_exclusive();
        });
        assert_eq!(done.end, End::Finished);
        together_once |= seen.load(Ordering::SeqCst) == 2;
    }
    assert!(together_once, "two readers never met");
}

#[test]
fn the_lock_is_given_in_the_order_of_asking_and_says_that_somebody_waits() {
    let order: &'static StdMutex<Vec<u32>> = Box::leak(Box::default());
    let done = run(config(Strategy::Replay("sc".parse().unwrap())), move || {
        let lock = Arc::new(SimRwLock::new());
        lock.lock_exclusive();
        assert!(!lock.is_contended());
        let handles: Vec<_> = [false, true, false, true]
            .into_iter()
            .enumerate()
            .map(|(n, shared)| {
                let lock = lock.clone();
                let body = move || {
                    if shared {
                        lock.lock_shared()
                    } else {
                        lock.lock_exclusive()
                    }
                    order.lock().unwrap().push(n as u32);
                    if shared { lock.unlock_shared() } else { lock.unlock_exclusive() }
                };
                let handle = Sim::spawn(&format!("t{n}"), Box::new(body)).unwrap();
                // It runs until it waits.
                Sim::relax(Site::Spin);
                handle
            })
            .collect();
        assert!(lock.is_contended());
        lock.unlock_exclusive();
        assert!(!lock.try_lock_shared(), "the head has the lock already");
        handles.into_iter().for_each(|handle| handle.join().unwrap());
    });
    assert_eq!(done.end, End::Finished);
    assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3]);
}

#[test]
fn a_grace_period_waits_for_the_sections_that_were_there_and_for_no_later_ones() {
    let mut early = 0;
    for seed in 0..300 {
        let late: Arc<AtomicU32> = Arc::default();
        let seen = late.clone();
        let done = run(random(seed), move || {
            let reclaim = Arc::new(Counting::default());
            let rcu = SimRcu::try_new(reclaim.clone(), RcuConfig::default()).unwrap();
            let began = word();
            let (domain, freed, before) = (rcu.clone(), reclaim.clone(), began.clone());
            let reader: Body = Box::new(move || {
                let reader = domain.register("reader");
                for _ in 0..3 {
                    reader.enter();
                    let deferred_before = before.load(Ordering::SeqCst) != 0;
                    let already = freed.reclaimed.load(Ordering::SeqCst);
                    Sim::point(Site::WalkLockless);
                    Sim::point(Site::WalkLockless);
                    let now = freed.reclaimed.load(Ordering::SeqCst);
                    assert!(deferred_before || now == already, "freed under a reader that was inside");
                    if now != already {
                        late.fetch_add(1, Ordering::SeqCst);
                    }
                    reader.leave();
                    Sim::point(Site::RcuLeave);
                }
            });
            let domain = rcu.clone();
            let writer: Body = Box::new(move || {
                Sim::point(Site::RcuDefer);
                began.store(1, Ordering::SeqCst);
                domain.defer(0, &reclaim.links[0], 1);
                domain.barrier();
                assert_eq!(reclaim.links[0].load(Ordering::SeqCst), NIL);
                assert_eq!(reclaim.reclaimed.load(Ordering::SeqCst), 1);
            });
            together(vec![reader, writer]);
            rcu.stop();
        });
        assert_eq!(done.end, End::Finished, "{}", done.schedule);
        early += seen.load(Ordering::SeqCst);
    }
    assert!(early > 0, "no grace period ended while a later section was open");
}

#[test]
fn synchronize_waits_for_a_section_and_inside_one_for_ever() {
    let done = run(random(1), || {
        let rcu = SimRcu::try_new(Arc::new(Counting::default()), RcuConfig::default()).unwrap();
        let task = Task::<Sim>::new(&rcu, "selfish", Role::Caller, TaskConfig::default());
        let _section = task.rcu_read();
        rcu.synchronize();
    });
    let End::Deadlock(who) = done.end else { panic!("{:?}", done.end) };
    assert!(who.contains("main waits for the end of RCU read sections"), "{who}");
}

#[test]
fn sections_and_steps_beyond_the_limit_are_violations() {
    let walk = |limits: Limits, checks: bool| {
        run(SimConfig { limits, ..random(3) }, move || {
            let rcu = SimRcu::try_new(Arc::new(Counting::default()), RcuConfig::default()).unwrap();
            let task = Task::<Sim>::new(&rcu, "walker", Role::Caller, TaskConfig::default());
            let lock = MmuLock::<Sim>::new();
            let words = [const { AtomicU64::new(7) }; 20];
            let guard = lock.read(&task);
            let section = task.rcu_read();
            for word in &words {
                Sim::load(word, Site::SpteRead);
                if checks {
                    let _ = guard.should_yield();
                }
            }
            drop(section);
            drop(guard);
            rcu.stop();
        })
    };
    let free = walk(Limits::default(), false);
    assert_eq!((free.end.clone(), free.longest_rcu, free.longest_step), (End::Finished, 20, 20));
    let short = walk(Limits { rcu_units: 19, ..Limits::default() }, false);
    assert_eq!(short.violations[0].rule, "rcu-section-too-long");
    let step = walk(Limits { step_units: 19, ..Limits::default() }, false);
    assert_eq!(step.violations[0].rule, "step-too-long");
    let checked = walk(Limits { step_units: 1, rcu_units: 1 }, true);
    assert_eq!((checked.end, checked.longest_step, checked.longest_rcu), (End::Finished, 1, 1));
}

#[test]
fn a_table_word_found_poisoned_is_a_violation_by_name() {
    for touch in [0, 1, 2, 3] {
        let done = run(random(0), move || {
            #[repr(align(4096))]
            struct Page([AtomicU64; 512]);
            let page = Arc::new(Page([const { AtomicU64::new(0) }; 512]));
            sim::name_region(std::ptr::from_ref(&*page).addr(), 4096, |_| "table 7".to_owned());
            let shared = page.clone();
            let body: Body = Box::new(move || {
                let word = &shared.0[9];
                match touch {
                    0 => drop(Sim::load(word, Site::WalkLockless)),
                    1 => Sim::store(word, 1, Site::SpteInstall),
                    2 => drop(Sim::swap(word, 1, Site::SpteZap)),
                    _ => drop(Sim::cmpxchg(word, 0, 1, Site::SpteInstall)),
                }
            });
            page.0[9].store(sim::POISON, Ordering::SeqCst);
            together(vec![body]);
        });
        let found = &done.violations[0];
        assert_eq!(found.rule, "touched-after-free");
        assert!(found.what.contains("t0 touches table 7 entry 9"), "{}", found.what);
    }
}

#[test]
fn cold_zero_entries_of_tables_are_no_points_and_hot_or_used_ones_are() {
    let choices = |index: usize, value: u64, hot: Vec<u16>| {
        let done = run(SimConfig { hot, ..random(0) }, move || {
            #[repr(align(4096))]
            struct Page([AtomicU64; 512]);
            let page = Arc::new(Page([const { AtomicU64::new(0) }; 512]));
            page.0[index].store(value, Ordering::SeqCst);
            sim::name_region(std::ptr::from_ref(&*page).addr(), 4096, |_| String::new());
            let body = || {
                let page = page.clone();
                Box::new(move || {
                    for _ in 0..10 {
                        Sim::load(&page.0[index], Site::SpteRead);
                    }
                }) as Body
            };
            together(vec![body(), body()]);
        });
        done.sites.of(Site::SpteRead).passed
    };
    assert_eq!(choices(300, 0, vec![0]), 0);
    assert_eq!(choices(300, 8, vec![0]), 20);
    assert_eq!(choices(0, 0, vec![0]), 20);
    assert_eq!(choices(300, 0, vec![300]), 20);
}

#[test]
fn a_quiet_stretch_is_not_interrupted() {
    for seed in 0..50 {
        run(random(seed), || {
            let word = word();
            let body = || {
                let word = word.clone();
                Box::new(move || {
                    sim::quiet(|| {
                        let seen = Sim::load(&word, Site::SpteRead);
                        Sim::point(Site::SpteRead);
                        Sim::store(&word, seen + 1, Site::SpteRead);
                    });
                }) as Body
            };
            together(vec![body(), body(), body()]);
            assert_eq!(word.load(Ordering::SeqCst), 3);
        });
    }
}

#[test]
fn the_clock_moves_with_steps_and_a_timed_wait_ends() {
    let done = run(random(0), || {
        let before = Sim::ticks();
        let cell = AtomicU32::new(0);
        Sim::futex_wait(&cell, 0, Some(1_000_000));
        let between = Sim::ticks();
        assert!(between > before);
        Sim::futex_wait(&cell, 1, None);
        assert!(Sim::ticks() > between);
    });
    assert_eq!(done.end, End::Finished, "nobody wakes it: time does");
}

#[test]
fn outside_of_a_run_words_are_plain_and_threads_are_refused() {
    let word = AtomicU64::new(1);
    assert_eq!(Sim::swap(&word, 2, Site::SpteZap), 1);
    assert_eq!(Sim::cmpxchg(&word, 1, 3, Site::SpteZap), Err(2));
    assert_eq!(Sim::fetch_or(&word, 4, Site::SpteAd), 2);
    Sim::store(&word, 9, Site::SpteZap);
    assert_eq!(Sim::load(&word, Site::SpteZap), 9);
    assert!(Sim::spawn("nobody", Box::new(|| ())).is_err());
    let rcu = SimRcu::new(Arc::new(Counting::default()), RcuConfig::default());
    assert!(rcu.stats().thread_error.is_some());
    rcu.barrier();
    assert_eq!(sim::current(), None);
    assert!(!sim::violation("rule", "nobody listens".to_owned()));
}
