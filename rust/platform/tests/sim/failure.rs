//! Runs that fail: what they tell. (That nothing is left of them: `tests/sim_leaks`, in a process of its own.)

use std::sync::Arc;

use tdpmmu_platform::{
    Mutex, Platform, Sim, Site, WorkQueue,
    sim::{self, End, InjectedPanic, SimConfig, Strategy},
};

use crate::{Body, config, random, run, together, word};

/// Two mutexes, taken in opposite orders.
fn embrace() {
    let (a, b) = (Arc::new(Mutex::<Sim, ()>::new(())), Arc::new(Mutex::<Sim, ()>::new(())));
    let body = |first: &Arc<Mutex<Sim, ()>>, second: &Arc<Mutex<Sim, ()>>| {
        let (first, second) = (first.clone(), second.clone());
        Box::new(move || {
            let _first = first.lock();
            let _second = second.lock();
        }) as Body
    };
    together(vec![body(&a, &b), body(&b, &a)]);
}

#[test]
fn a_deadlock_is_found_and_says_who_waits() {
    let found = (0..100).map(|seed| run(random(seed), embrace)).find(|run| run.end != End::Finished).unwrap();
    let End::Deadlock(who) = &found.end else { panic!("{:?}", found.end) };
    assert!(
        who.contains("t0 waits for") && who.contains("t1 waits for") && who.contains("main waits for"),
        "{who}"
    );
    assert_eq!(found.leaked_tasks, 0);
    let again = run(config(Strategy::Replay(found.schedule.clone())), embrace);
    assert_eq!((again.hash, again.end), (found.hash, found.end));
}

#[test]
fn a_livelock_ends_at_the_step_limit() {
    let polite = || {
        let word = word();
        let body = |me: u64| {
            let word = word.clone();
            Box::new(move || {
                while Sim::load(&word, Site::Spin) != 9 {
                    Sim::store(&word, me, Site::Spin);
                    Sim::relax(Site::Spin);
                }
            }) as Body
        };
        together(vec![body(1), body(2)]);
    };
    for strategy in [Strategy::Random { seed: 1 }, Strategy::Pct { seed: 1, depth: 3, steps: 100 }] {
        let done = run(SimConfig { max_steps: 5_000, ..config(strategy) }, polite);
        assert_eq!(done.end, End::StepLimit);
        assert_eq!(done.leaked_tasks, 0);
    }
}

#[test]
fn a_spinner_that_relaxes_lets_the_one_it_waits_for_run_under_every_strategy() {
    let waits = || {
        let word = word();
        let (spinner, worker) = (word.clone(), word);
        together(vec![
            Box::new(move || {
                while Sim::load(&spinner, Site::Spin) == 0 {
                    Sim::relax(Site::Spin);
                }
            }),
            Box::new(move || Sim::store(&worker, 1, Site::Spin)),
        ]);
    };
    for seed in 0..100 {
        for strategy in [
            Strategy::Random { seed },
            Strategy::Pct { seed, depth: 3, steps: 20 },
            Strategy::Targeted { first: Site::Spin, then: Site::Mutex, seed },
        ] {
            let done = run(SimConfig { max_steps: 2_000, ..config(strategy) }, waits);
            assert_eq!(done.end, End::Finished);
        }
    }
}

#[test]
fn a_panic_ends_the_run_with_its_words_and_place() {
    let done = run(random(0), || {
        together(vec![Box::new(|| {
            Sim::point(Site::Spin);
            panic!("the number is {}", 42);
        })]);
    });
    let End::Panicked(text) = done.end else { panic!("{:?}", done.end) };
    assert!(text.contains("t0: the number is 42 (") && text.contains("failure.rs"), "{text}");
}

#[test]
fn a_panic_that_was_asked_for_reaches_who_joins_and_nobody_else() {
    let done = run(random(0), || {
        let handle = Sim::spawn("t", Box::new(|| std::panic::panic_any(InjectedPanic))).unwrap();
        assert!(handle.join().unwrap_err().is::<InjectedPanic>());
        let queue = WorkQueue::<Sim, u32>::new("q", 1, |_| std::panic::panic_any(InjectedPanic)).unwrap();
        queue.queue(1);
        queue.flush();
        let thrown = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| queue.shutdown()));
        assert!(thrown.unwrap_err().is::<InjectedPanic>());
    });
    assert_eq!(done.end, End::Finished);
}

#[test]
fn without_the_stop_a_run_goes_on_after_a_violation() {
    let done = run(SimConfig { stop_at_violation: false, ..random(0) }, || {
        sim::violation("first", String::new());
        together(vec![Box::new(|| Sim::point(Site::Spin))]);
        sim::violation("second", String::new());
    });
    assert_eq!(done.end, End::Finished);
    assert_eq!(done.violations.len(), 2);
    assert!(done.failed());
}

#[test]
fn a_loop_without_a_point_ends_too() {
    let done = run(SimConfig { max_steps: 0, ..random(0) }, || {
        let word = word();
        while Sim::load(&word, Site::Spin) == 0 {}
    });
    assert_eq!(done.end, End::StepLimit);
    assert_eq!(done.leaked_tasks, 0);
}

/// Waits in its destructor for what never comes.
struct Patient(bool);

impl Drop for Patient {
    fn drop(&mut self) {
        let cell = std::sync::atomic::AtomicU32::new(0);
        loop {
            if self.0 {
                Sim::futex_wait(&cell, 0, None);
            } else {
                Sim::relax(Site::Spin);
            }
        }
    }
}

#[test]
fn a_task_whose_destructor_never_ends_is_leaked_and_counted() {
    for sleeps in [false, true] {
        let done = run(random(0), move || {
            together(vec![Box::new(move || {
                let _patient = Patient(sleeps);
                sim::violation("seeded", String::new());
                Sim::point(Site::Spin);
            })]);
        });
        assert_eq!(done.end, End::Stopped);
        // The one that never ends; main was waiting for it and is unwound.
        assert_eq!(done.leaked_tasks, 1);
        // The OS thread is none the worse for it.
        assert_eq!(run(random(1), lost_update_free).end, End::Finished);
    }
}

fn lost_update_free() {
    let word = word();
    let body = || {
        let word = word.clone();
        Box::new(move || {
            Sim::fetch_add(&word, 1, Site::RootRef);
        }) as Body
    };
    together(vec![body(), body()]);
}
