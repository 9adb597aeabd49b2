//! The life of a root as of 5.18, under loom: references, the invalid bit, who tears down.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test --release --test loom_root`.
//!
//! A root begins valid with its vCPU's reference. Whoever turns it invalid (the last put, or the fast zap, which takes a reference for it) owns one reference and
//! queues its teardown once; the worker zaps it and puts. Walkers in shared mode take references on valid roots only, and never from zero. The put that
//! finds it invalid at zero frees it. So: one teardown, one free, the teardown before the free, and nobody touches it later. What each rule is for
//! is shown by leaving it out.
#![cfg(loom)]

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

mod mutant {
    pub const NONE: u8 = 0;
    /// The fast zap does not leave invalid roots out: it queues a second teardown with a reference of its own that nobody gives back.
    pub const INVALIDATES_TWICE: u8 = 1;
    /// A walker takes its reference without looking whether there is one.
    pub const GETS_FROM_ZERO: u8 = 2;
    /// The last put re-arms the count after the lock was released.
    pub const LATE_REARM: u8 = 3;
    /// The invalid bit is read and then written, and walkers may set it too.
    pub const PLAIN_INVALID: u8 = 4;
    /// A put does not order what was done under the reference before the free.
    pub const PLAIN_PUT: u8 = 5;
    /// The fast zap puts every invalid root once, as if it had given each a reference (the v3 series).
    pub const ASSUMES_GIFTS: u8 = 6;
}

const INVALID: u32 = 1;

fn bounded(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(body);
}

struct Root {
    mmu_lock: RwLock<()>,
    refs: AtomicU32,
    role: AtomicU32,
    queued: AtomicU32,
    freed: AtomicBool,
    page: UnsafeCell<u64>,
}

// SAFETY: the page is read under references and overwritten by the put that frees; loom's UnsafeCell checks the order.
unsafe impl Sync for Root {}
// SAFETY: as above.
unsafe impl Send for Root {}

impl Root {
    fn new() -> Arc<Self> {
        Arc::new(Root {
            mmu_lock: RwLock::new(()),
            refs: AtomicU32::new(1),
            role: AtomicU32::new(0),
            queued: AtomicU32::new(0),
            freed: AtomicBool::new(false),
            page: UnsafeCell::new(7),
        })
    }

    fn touch(&self) {
        // SAFETY: under a reference; loom checks that no free runs beside or before it.
        assert_eq!(self.page.with(|page| unsafe { *page }), 7, "a freed root was used");
    }

    /// Sets the invalid bit; was it set before?
    fn invalidate<const M: u8>(&self) -> bool {
        if M == mutant::PLAIN_INVALID {
            let role = self.role.load(Ordering::Acquire);
            thread::yield_now();
            self.role.store(role | INVALID, Ordering::Release);
            return role & INVALID != 0;
        }
        self.role.fetch_or(INVALID, Ordering::AcqRel) & INVALID != 0
    }

    fn get<const M: u8>(&self) -> bool {
        if M == mutant::GETS_FROM_ZERO {
            self.refs.fetch_add(1, Ordering::AcqRel);
            return true;
        }
        let mut refs = self.refs.load(Ordering::Acquire);
        while refs != 0 {
            match self.refs.compare_exchange(refs, refs + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(now) => refs = now,
            }
        }
        false
    }

    /// Gives a reference back, with mmu_lock held; true: the caller has a teardown to run once it has left the lock.
    fn put<const M: u8>(&self) -> bool {
        let order = if M == mutant::PLAIN_PUT { Ordering::Relaxed } else { Ordering::AcqRel };
        let had = self.refs.fetch_sub(1, order);
        assert_ne!(had, 0, "a root was put that nobody held");
        if had != 1 {
            return false;
        }
        if self.invalidate::<M>() {
            assert!(!self.freed.swap(true, Ordering::AcqRel), "a root was freed twice");
            // SAFETY: the last reference of an invalid root; loom checks that nobody uses it.
            self.page.with_mut(|page| unsafe { *page = 0xdead });
            return false;
        }
        if M != mutant::LATE_REARM {
            self.refs.store(1, Ordering::Release);
        }
        self.queued.fetch_add(1, Ordering::AcqRel);
        true
    }

    /// The work item.
    fn tear_down<const M: u8>(&self) {
        if M == mutant::LATE_REARM {
            self.refs.store(1, Ordering::Release);
        }
        let _shared = self.mmu_lock.read().unwrap();
        self.touch();
        assert!(!self.put::<M>(), "the worker's put turned a valid root invalid");
    }

    /// A vCPU drops its root.
    fn drop_by_vcpu<const M: u8>(&self) {
        let work = {
            let _shared = self.mmu_lock.read().unwrap();
            self.put::<M>()
        };
        if work {
            self.tear_down::<M>();
        }
    }

    /// The first phase of a fast zap, and its work item.
    fn fast_zap<const M: u8>(&self) {
        let work = {
            let _exclusive = self.mmu_lock.write().unwrap();
            if self.freed.load(Ordering::Acquire) {
                return;
            }
            let refs = self.refs.load(Ordering::Acquire);
            assert_ne!(refs, 0, "a listed root without a reference under the exclusive lock");
            let invalid = self.role.load(Ordering::Acquire) & INVALID != 0;
            if !invalid || M == mutant::INVALIDATES_TWICE {
                self.refs.fetch_add(1, Ordering::AcqRel);
                self.invalidate::<M>();
                self.queued.fetch_add(1, Ordering::AcqRel);
            }
            // A work item that is pending is not queued again.
            !invalid || M == mutant::ASSUMES_GIFTS
        };
        if work {
            self.tear_down::<M>();
        }
    }

    /// A walker in shared mode that gives the lock up in the middle.
    fn walk<const M: u8>(&self) {
        let got = {
            let _shared = self.mmu_lock.read().unwrap();
            self.role.load(Ordering::Acquire) & INVALID == 0 && self.get::<M>()
        };
        if !got {
            return;
        }
        let work = {
            let _shared = self.mmu_lock.read().unwrap();
            self.touch();
            self.put::<M>()
        };
        if work {
            self.tear_down::<M>();
        }
    }

    fn is_gone(&self) {
        assert!(
            self.freed.load(Ordering::Acquire),
            "the root leaked with {} references",
            self.refs.load(Ordering::Acquire)
        );
        assert_eq!(self.queued.load(Ordering::Acquire), 1, "teardowns queued");
    }
}

fn vcpu_against_fast_zap<const M: u8>() {
    bounded(|| {
        let root = Root::new();
        let vcpu = {
            let root = root.clone();
            thread::spawn(move || root.drop_by_vcpu::<M>())
        };
        root.fast_zap::<M>();
        vcpu.join().unwrap();
        root.is_gone();
    });
}

fn vcpu_against_walker<const M: u8>() {
    bounded(|| {
        let root = Root::new();
        let vcpu = {
            let root = root.clone();
            thread::spawn(move || root.drop_by_vcpu::<M>())
        };
        root.walk::<M>();
        vcpu.join().unwrap();
        root.is_gone();
    });
}

#[test]
fn a_root_is_torn_down_once_and_freed_once() {
    vcpu_against_fast_zap::<{ mutant::NONE }>();
    vcpu_against_walker::<{ mutant::NONE }>();
}

#[test]
fn a_root_with_a_walker_and_a_fast_zap_is_torn_down_once_and_freed_once() {
    bounded(|| {
        let root = Root::new();
        let vcpu = {
            let root = root.clone();
            thread::spawn(move || root.drop_by_vcpu::<{ mutant::NONE }>())
        };
        let walker = {
            let root = root.clone();
            thread::spawn(move || root.walk::<{ mutant::NONE }>())
        };
        root.fast_zap::<{ mutant::NONE }>();
        vcpu.join().unwrap();
        walker.join().unwrap();
        root.is_gone();
    });
}

#[test]
#[should_panic]
fn canary_invalid_roots_are_not_left_out() {
    vcpu_against_fast_zap::<{ mutant::INVALIDATES_TWICE }>();
}

#[test]
#[should_panic]
fn canary_a_reference_from_zero() {
    vcpu_against_walker::<{ mutant::GETS_FROM_ZERO }>();
}

#[test]
#[should_panic]
fn canary_rearmed_after_the_lock() {
    vcpu_against_fast_zap::<{ mutant::LATE_REARM }>();
}

#[test]
#[should_panic]
fn canary_invalid_bit_read_and_then_written() {
    // Two that take the count to zero at once, as a reference from zero lets them.
    bounded(|| {
        let root = Root::new();
        let other = {
            let root = root.clone();
            thread::spawn(move || !root.invalidate::<{ mutant::PLAIN_INVALID }>())
        };
        let mine = !root.invalidate::<{ mutant::PLAIN_INVALID }>();
        let others = other.join().unwrap();
        assert!(mine != others, "the transition has one owner");
    });
}

#[test]
fn the_transition_to_invalid_has_one_owner() {
    bounded(|| {
        let root = Root::new();
        let other = {
            let root = root.clone();
            thread::spawn(move || !root.invalidate::<{ mutant::NONE }>())
        };
        let mine = !root.invalidate::<{ mutant::NONE }>();
        let others = other.join().unwrap();
        assert!(mine != others, "the transition has one owner");
    });
}

#[test]
#[should_panic]
fn canary_a_put_that_orders_nothing() {
    vcpu_against_fast_zap::<{ mutant::PLAIN_PUT }>();
    vcpu_against_walker::<{ mutant::PLAIN_PUT }>();
}

#[test]
#[should_panic]
fn canary_gifts_that_were_not_given() {
    vcpu_against_fast_zap::<{ mutant::ASSUMES_GIFTS }>();
}
