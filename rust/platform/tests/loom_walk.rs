//! Two handshakes by store buffering, under loom: the lockless walk against the freer, and guest entry against the kick.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test --release --test loom_walk`.
//!
//! *Walk* (the shadow MMU's since 2012): the walker says that it reads, then reads; the freer unlinks, then looks who reads and waits for them. If the walker sees the
//! old link, the freer sees the walker. *Kick*: the vCPU says that it is in guest mode, then looks for requests; whoever makes a request then looks whether
//! to kick. One of them sees the other. Each barrier taken away must be found.
#![cfg(loom)]

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering, fence},
    },
    thread,
};

mod mutant {
    pub const NONE: u8 = 0;
    pub const NO_BARRIER_OF_THE_READER: u8 = 1;
    pub const NO_BARRIER_OF_THE_OTHER: u8 = 2;
    pub const PLAIN_CLOSING_STORE: u8 = 3;
    pub const DOES_NOT_WAIT: u8 = 4;
}

const OUTSIDE: u32 = 0;
const READING: u32 = 1;
const IN_GUEST: u32 = 2;

fn bounded(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(body);
}

struct Shared {
    mode: AtomicU32,
    /// 1 while the page is linked.
    link: AtomicU32,
    page: UnsafeCell<u64>,
}

// SAFETY: the page is read by walkers and overwritten by the freer; that they never meet is what loom's UnsafeCell checks.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Shared { mode: AtomicU32::new(OUTSIDE), link: AtomicU32::new(1), page: UnsafeCell::new(7) })
    }

    fn walk<const M: u8>(&self) {
        self.mode.store(READING, Ordering::Relaxed);
        if M != mutant::NO_BARRIER_OF_THE_READER {
            fence(Ordering::SeqCst);
        }
        if self.link.load(Ordering::Acquire) == 1 {
            // SAFETY: the freer waits for readers that may have seen the link; loom checks it.
            assert_eq!(self.page.with(|page| unsafe { *page }), 7, "a walk in a freed page");
        }
        let closing = if M == mutant::PLAIN_CLOSING_STORE { Ordering::Relaxed } else { Ordering::Release };
        self.mode.store(OUTSIDE, closing);
    }

    fn free<const M: u8>(&self) {
        self.link.store(0, Ordering::Relaxed);
        if M != mutant::NO_BARRIER_OF_THE_OTHER {
            fence(Ordering::SeqCst);
        }
        // The IPI is taken once the walker has its interrupts on again.
        while M != mutant::DOES_NOT_WAIT && self.mode.load(Ordering::Acquire) == READING {
            thread::yield_now();
        }
        // SAFETY: unlinked, and whoever could have seen it has left; loom checks it.
        self.page.with_mut(|page| unsafe { *page = 0xdead });
    }
}

fn walk_against_free<const M: u8>() {
    bounded(|| {
        let shared = Shared::new();
        let walker = {
            let shared = shared.clone();
            thread::spawn(move || shared.walk::<M>())
        };
        shared.free::<M>();
        walker.join().unwrap();
    });
}

#[test]
fn a_lockless_walk_never_meets_a_freed_page() {
    walk_against_free::<{ mutant::NONE }>();
}

#[test]
#[should_panic]
fn canary_walker_without_its_barrier() {
    walk_against_free::<{ mutant::NO_BARRIER_OF_THE_READER }>();
}

#[test]
#[should_panic]
fn canary_freer_without_its_barrier() {
    walk_against_free::<{ mutant::NO_BARRIER_OF_THE_OTHER }>();
}

#[test]
#[should_panic]
fn canary_walk_closed_by_a_plain_store() {
    walk_against_free::<{ mutant::PLAIN_CLOSING_STORE }>();
}

#[test]
#[should_panic]
fn canary_freer_that_does_not_wait() {
    walk_against_free::<{ mutant::DOES_NOT_WAIT }>();
}

/// Guest entry against a request: a vCPU in the guest has the request, or was kicked.
fn entry_against_kick<const M: u8>() {
    bounded(|| {
        let mode = Arc::new(AtomicU32::new(OUTSIDE));
        let request = Arc::new(AtomicU32::new(0));
        let vcpu = {
            let (mode, request) = (mode.clone(), request.clone());
            thread::spawn(move || {
                mode.store(IN_GUEST, Ordering::Relaxed);
                if M != mutant::NO_BARRIER_OF_THE_READER {
                    fence(Ordering::SeqCst);
                }
                request.load(Ordering::Relaxed) != 0
            })
        };
        request.fetch_or(1, Ordering::Release);
        if M != mutant::NO_BARRIER_OF_THE_OTHER {
            fence(Ordering::SeqCst);
        }
        let kicked = mode.load(Ordering::Relaxed) == IN_GUEST;
        let served = vcpu.join().unwrap();
        assert!(kicked || served, "in the guest with a request that nobody looked at, and not kicked");
    });
}

#[test]
fn a_request_is_seen_at_entry_or_kicks() {
    entry_against_kick::<{ mutant::NONE }>();
}

#[test]
#[should_panic]
fn canary_entry_without_its_barrier() {
    entry_against_kick::<{ mutant::NO_BARRIER_OF_THE_READER }>();
}

#[test]
#[should_panic]
fn canary_kick_without_its_barrier() {
    entry_against_kick::<{ mutant::NO_BARRIER_OF_THE_OTHER }>();
}
