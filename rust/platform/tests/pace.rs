//! A pace decides alone where its task yields, and is called where the lock is free.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use common::{Domain, Pool};
use tdpmmu_platform::{MmuLock, Pace, Preempt, RcuConfig, Real, Role, Task, TaskConfig, YieldPoint};

const HERE: YieldPoint = YieldPoint { root: 3, gfn: 0x200, level: 2 };

/// Yields at even gfns. In each gap it looks whether the lock is free.
struct Even {
    lock: Arc<MmuLock<Real>>,
    domain: Arc<Domain>,
    asked: Mutex<Vec<(u32, YieldPoint)>>,
    gaps: AtomicU32,
    last: AtomicU32,
}

impl Even {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            lock: Arc::new(MmuLock::new()),
            domain: Pool::new(0).domain(RcuConfig::default()),
            asked: Mutex::default(),
            gaps: AtomicU32::new(0),
            last: AtomicU32::new(u32::MAX),
        })
    }

    fn task(self: &Arc<Self>, config: TaskConfig) -> Task<Real> {
        let pace: Arc<dyn Pace> = self.clone();
        Task::new(&self.domain, "paced", Role::Caller, TaskConfig { pace: Some(pace), ..config })
    }

    fn gaps(&self) -> u32 {
        self.gaps.load(Ordering::Relaxed)
    }
}

impl Pace for Even {
    fn wants_yield(&self, task: u32, at: YieldPoint) -> bool {
        self.asked.lock().unwrap().push((task, at));
        at.gfn.is_multiple_of(2)
    }

    fn unlocked(&self, task: u32) {
        // Another task gets it at once, exclusively: it is free.
        let other = Task::<Real>::new(&self.domain, "other", Role::Caller, TaskConfig::default());
        drop(self.lock.write(&other));
        assert_eq!(other.meter().take().contended, 0);
        self.gaps.fetch_add(1, Ordering::Relaxed);
        self.last.store(task, Ordering::Relaxed);
    }
}

#[test]
fn the_pace_is_asked_where_a_walk_stands_and_its_answer_is_taken() {
    let even = Even::new();
    let task = even.task(TaskConfig::default());
    let odd = YieldPoint { gfn: 0x201, level: 1, ..HERE };
    assert!(task.should_yield_at(&even.lock, || Some(HERE)));
    assert!(!task.should_yield_at(&even.lock, || Some(odd)));
    assert_eq!(*even.asked.lock().unwrap(), [(task.id(), HERE), (task.id(), odd)]);
}

#[test]
fn neither_force_nor_the_tick_nor_a_waiter_overrules_it() {
    for preempt in [Preempt::None, Preempt::Voluntary, Preempt::Full] {
        let even = Even::new();
        let jumpy = TaskConfig { preempt, force_yield: Some(1), tick_ns: 0, ..TaskConfig::default() };
        let unpaced = Task::<Real>::new(&even.domain, "unpaced", Role::Caller, jumpy.clone());
        assert!(unpaced.should_yield(&even.lock), "{preempt:?}");
        let task = even.task(jumpy);
        let guard = even.lock.read(&task);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let task = Task::<Real>::new(&even.domain, "waiter", Role::Caller, TaskConfig::default());
                drop(even.lock.write(&task));
            });
            while !guard.is_contended() {
                std::thread::yield_now();
            }
            assert!(!guard.should_yield(), "{preempt:?}: no walk, no place to name");
            assert!(!task.should_yield_at(&even.lock, || None), "{preempt:?}: a walk that has not moved");
            assert!(!task.should_yield_at(&even.lock, || Some(YieldPoint { gfn: 1, ..HERE })), "{preempt:?}");
            drop(guard);
            waiter.join().unwrap();
        });
        assert_eq!(even.asked.lock().unwrap().len(), 1);
    }
}

#[test]
fn without_a_pace_nobody_asks_where_the_walk_stands() {
    let even = Even::new();
    for preempt in [Preempt::None, Preempt::Full] {
        let config = TaskConfig { preempt, ..TaskConfig::default() };
        let task = Task::<Real>::new(&even.domain, "unpaced", Role::Caller, config);
        assert!(!task.should_yield_at(&even.lock, || unreachable!("a hot path that names its place")));
    }
}

#[test]
fn a_gap_is_told_between_release_and_retake_in_both_modes() {
    let even = Even::new();
    let task = even.task(TaskConfig::default());
    {
        let mut guard = even.lock.read(&task);
        guard.relock();
        assert_eq!(even.gaps(), 1);
        assert_eq!(guard.unlocked_for(|task| task.id()), task.id());
        assert_eq!(even.gaps(), 2, "an allocation is a gap, too");
        assert!(task.holds_mmu_lock());
    }
    {
        let mut guard = even.lock.write(&task);
        guard.relock();
        guard.unlocked_for(|_| ());
    }
    assert_eq!((even.gaps(), even.last.load(Ordering::Relaxed)), (4, task.id()));
    drop(even.lock.write(&task));
    assert_eq!(even.gaps(), 4, "the end of a hold is no gap");
}

#[test]
fn a_panic_in_a_gap_goes_on_with_the_lock_held() {
    struct Panics;
    impl Pace for Panics {
        fn wants_yield(&self, _task: u32, _at: YieldPoint) -> bool {
            true
        }
        fn unlocked(&self, _task: u32) {
            panic!("a test of a pace that fails");
        }
    }
    let even = Even::new();
    let config = TaskConfig { pace: Some(Arc::new(Panics)), ..TaskConfig::default() };
    let task = Task::<Real>::new(&even.domain, "panics", Role::Caller, config);
    for shared in [true, false] {
        let run = || {
            if shared {
                even.lock.read(&task).relock();
            } else {
                even.lock.write(&task).relock();
            }
        };
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        assert!(!task.holds_mmu_lock());
        let other = Task::<Real>::new(&even.domain, "other", Role::Caller, TaskConfig::default());
        drop(even.lock.write(&other));
    }
}
