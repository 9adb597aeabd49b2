//! The RCU epoch and the deferred chain under loom.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test --release --test loom_rcu`.
//! loom knows no membarrier: both sides are SeqCst fences here, which is the fallback flavour exactly and a stronger
//! reader than the membarrier flavour's. The canaries take the fences away and must be found.
#![cfg(loom)]

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering, fence},
    },
    thread,
};
use tdpmmu_platform::{
    NIL,
    rcu::{
        chain::Chain,
        epoch::{Barrier, Epoch, Handle},
    },
};

/// Fences on both sides. `QUICK`: readers take the quick path, whose fence is its own.
struct Fences<const QUICK: bool>;
impl<const QUICK: bool> Barrier for Fences<QUICK> {
    fn is_quick(&self) -> bool {
        QUICK
    }
    fn light_if_quick(&self) {
        fence(Ordering::SeqCst);
    }
    fn light(&self) {
        fence(Ordering::SeqCst);
    }
    fn heavy(&self) {
        fence(Ordering::SeqCst);
    }
}

/// No barrier on the reclaimer's side.
struct NoHeavy;
impl Barrier for NoHeavy {
    fn is_quick(&self) -> bool {
        true
    }
    fn light_if_quick(&self) {
        fence(Ordering::SeqCst);
    }
    fn light(&self) {
        fence(Ordering::SeqCst);
    }
    fn heavy(&self) {}
}

/// No barrier on the reader's side, and none of the kind that would make up for it.
struct NoLight<const QUICK: bool>;
impl<const QUICK: bool> Barrier for NoLight<QUICK> {
    fn is_quick(&self) -> bool {
        QUICK
    }
    fn light_if_quick(&self) {}
    fn light(&self) {}
    fn heavy(&self) {
        fence(Ordering::SeqCst);
    }
}

/// A linked object: `link` is 1 while it can be found; its page is overwritten when reclaimed.
struct Object {
    link: AtomicU32,
    page: UnsafeCell<u64>,
}

// SAFETY: the page is read inside sections and overwritten after their end; loom's UnsafeCell checks that.
unsafe impl Sync for Object {}
// SAFETY: as above.
unsafe impl Send for Object {}

const POISON: u64 = 0xdead;

impl Object {
    fn new() -> Arc<Self> {
        Arc::new(Object { link: AtomicU32::new(1), page: UnsafeCell::new(7) })
    }

    fn read(&self) {
        if self.link.load(Ordering::Acquire) == 1 {
            // SAFETY: found inside a section; loom checks that nobody overwrites it meanwhile.
            assert_eq!(self.page.with(|p| unsafe { *p }), 7, "a reader saw a reclaimed page");
        }
    }

    fn reclaim(&self) {
        // SAFETY: after a grace period; loom checks that every reader's access happens before.
        self.page.with_mut(|p| unsafe { *p = POISON });
    }
}

fn bounded(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(body);
}

/// A section as a task's guard makes it: quick if the reader allows it.
fn section<B: Barrier>(handle: &Handle<B>, body: impl FnOnce()) {
    let quick = handle.try_enter();
    if quick.is_none() {
        handle.enter();
    }
    body();
    if !quick.is_some_and(|q| q.try_leave()) {
        handle.leave();
    }
}

fn cut_wait_reclaim<B: Barrier>(epoch: &Epoch<B>, object: &Object) {
    object.link.store(0, Ordering::Release);
    let target = epoch.begin();
    while !epoch.is_over(target, |_| ()) {
        thread::yield_now();
    }
    object.reclaim();
}

fn reader_against_reclaimer<B: Barrier + 'static>(make: fn() -> B) {
    bounded(move || {
        let epoch = Arc::new(Epoch::new(make()));
        let object = Object::new();
        let reader = {
            let handle = Epoch::register(&epoch, "reader");
            let object = object.clone();
            thread::spawn(move || section(&handle, || object.read()))
        };
        cut_wait_reclaim(&epoch, &object);
        reader.join().unwrap();
    });
}

#[test]
fn nothing_is_reclaimed_under_a_reader_that_saw_it() {
    reader_against_reclaimer(|| Fences::<false>);
}

#[test]
fn nothing_is_reclaimed_under_a_quick_reader_that_saw_it() {
    reader_against_reclaimer(|| Fences::<true>);
}

#[test]
fn a_quick_section_nested_around_another_lasts_to_the_last_end() {
    bounded(|| {
        let epoch = Arc::new(Epoch::new(Fences::<true>));
        let object = Object::new();
        let reader = {
            let handle = Epoch::register(&epoch, "reader");
            let object = object.clone();
            thread::spawn(move || {
                let outer = handle.try_enter().unwrap();
                assert!(handle.try_enter().is_none());
                handle.enter();
                // The outer guard ends first, the inner section goes on.
                assert!(!outer.try_leave());
                handle.leave();
                object.read();
                handle.leave();
                assert_eq!(handle.depth(), 0);
            })
        };
        cut_wait_reclaim(&epoch, &object);
        reader.join().unwrap();
    });
}

#[test]
fn a_second_section_of_a_reader_does_not_hide_the_first() {
    bounded(|| {
        let epoch = Arc::new(Epoch::new(Fences::<true>));
        let object = Object::new();
        let reader = {
            let handle = Epoch::register(&epoch, "reader");
            let object = object.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    section(&handle, || object.read());
                }
            })
        };
        cut_wait_reclaim(&epoch, &object);
        reader.join().unwrap();
    });
}

#[test]
fn a_nested_section_lasts_to_the_outer_end() {
    bounded(|| {
        let epoch = Arc::new(Epoch::new(Fences::<false>));
        let object = Object::new();
        let reader = {
            let handle = Epoch::register(&epoch, "reader");
            let object = object.clone();
            thread::spawn(move || {
                handle.enter();
                handle.enter();
                assert_eq!(handle.depth(), 2);
                handle.leave();
                object.read();
                handle.leave();
                assert_eq!(handle.depth(), 0);
            })
        };
        cut_wait_reclaim(&epoch, &object);
        reader.join().unwrap();
    });
}

#[test]
fn two_reclaimers_wait_each_for_its_own_reader() {
    bounded(|| {
        let epoch = Arc::new(Epoch::new(Fences::<false>));
        let (mine, others) = (Object::new(), Object::new());
        let handle = Epoch::register(&epoch, "both");
        let other = {
            let (epoch, others) = (epoch.clone(), others.clone());
            thread::spawn(move || cut_wait_reclaim(&epoch, &others))
        };
        handle.enter();
        others.read();
        handle.leave();
        cut_wait_reclaim(&epoch, &mine);
        other.join().unwrap();
    });
}

#[test]
fn a_reader_that_registers_late_sees_the_cut_or_is_waited_for() {
    bounded(|| {
        let epoch = Arc::new(Epoch::new(Fences::<false>));
        let object = Object::new();
        let reader = {
            let (epoch, object) = (epoch.clone(), object.clone());
            thread::spawn(move || {
                let handle = Epoch::register(&epoch, "late");
                handle.enter();
                object.read();
                handle.leave();
            })
        };
        cut_wait_reclaim(&epoch, &object);
        reader.join().unwrap();
    });
}

#[test]
fn a_chain_spliced_by_two_is_taken_whole_and_once() {
    bounded(|| {
        let chain = Arc::new(Chain::new());
        let links: Arc<Vec<AtomicU32>> = Arc::new((0..4).map(|_| AtomicU32::new(NIL)).collect());
        // Each side splices a chain of two: 0 -> 1 and 2 -> 3.
        let side = |first: u32| {
            let (chain, links) = (chain.clone(), links.clone());
            move || {
                links[first as usize].store(first + 1, Ordering::Relaxed);
                chain.splice(first, &links[first as usize + 1], || ());
            }
        };
        let other = thread::spawn(side(2));
        side(0)();
        let mut seen = [0; 4];
        let mut collect = || {
            let mut id = chain.take();
            while id != NIL {
                seen[id as usize] += 1;
                id = links[id as usize].load(Ordering::Relaxed);
            }
        };
        collect();
        other.join().unwrap();
        collect();
        assert_eq!(seen, [1; 4]);
        assert!(chain.is_empty());
    });
}

// Canaries: each must be found.

#[test]
#[should_panic]
fn canary_without_the_heavy_barrier_is_caught() {
    reader_against_reclaimer(|| NoHeavy);
}

#[test]
#[should_panic]
fn canary_without_the_light_barrier_is_caught() {
    reader_against_reclaimer(|| NoLight::<false>);
}

#[test]
#[should_panic]
fn canary_without_the_quick_light_barrier_is_caught() {
    reader_against_reclaimer(|| NoLight::<true>);
}

#[test]
#[should_panic]
fn canary_without_the_scan_is_caught() {
    bounded(|| {
        let epoch = Arc::new(Epoch::new(Fences::<false>));
        let object = Object::new();
        let reader = {
            let handle = Epoch::register(&epoch, "reader");
            let object = object.clone();
            thread::spawn(move || {
                handle.enter();
                object.read();
                handle.leave();
            })
        };
        object.link.store(0, Ordering::Release);
        epoch.begin();
        object.reclaim();
        reader.join().unwrap();
    });
}
