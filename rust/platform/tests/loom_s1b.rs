//! Reclamation against lockless walkers of shadow pages, under loom: each handshake of `tdpmmu_shadow::reclaim`, and each of its barriers taken away.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test --release --test loom_s1b`.
//!
//! `loom_walk` has the bare litmus. Here are the protocols as they run: the mode word carries a number, so that the freer waits for the walk that it saw and not for the next; the kind `counter`, whose freer does not
//! wait but defers; and the kind `membarrier`, whose walker has no barrier at all. An interrupt to each CPU is modelled as what it is: at some point of its program the walker executes a full barrier, between the freer's
//! call and its return. The walker looks for it wherever an interrupt could come, and loom tries them all.
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
    pub const NO_OPENING_BARRIER: u8 = 1;
    pub const NO_BARRIER_OF_THE_FREER: u8 = 2;
    pub const RELAXED_CLOSING_STORE: u8 = 3;
    pub const RELAXED_LOOK: u8 = 4;
    pub const DOES_NOT_WAIT: u8 = 5;
    pub const DEFERS_BEFORE_THE_SECTION: u8 = 6;
}

/// Of the mode word: the lowest bit says that somebody reads, the rest numbers the walks.
const READING: u32 = 1;
const WALK: u32 = 2;

fn bounded(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(body);
}

/// One vCPU's word and one page of the tree.
struct Shared {
    mode: AtomicU32,
    /// 1 while the page is linked.
    link: AtomicU32,
    page: UnsafeCell<u64>,
    /// Kind `counter`: walkers inside.
    readers: AtomicU32,
    /// Kind `counter`: sections of RCU that are open, and who is told to free when the last one ends.
    section: AtomicU32,
    /// The interrupt that a membarrier sends: asked for, and taken.
    interrupt: AtomicU32,
    taken: AtomicU32,
}

// SAFETY: the page is read by walkers and overwritten by the freer; that they never meet is what loom's UnsafeCell checks.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new() -> Arc<Self> {
        let zero = || AtomicU32::new(0);
        Arc::new(Shared {
            mode: zero(),
            link: AtomicU32::new(1),
            page: UnsafeCell::new(7),
            readers: zero(),
            section: zero(),
            interrupt: zero(),
            taken: zero(),
        })
    }

    fn read(&self) -> bool {
        let linked = self.link.load(Ordering::Acquire) == 1;
        if linked {
            // SAFETY: the freer waits for walkers that may have seen the link; loom checks it.
            assert_eq!(self.page.with(|page| unsafe { *page }), 7, "a walk in a freed page");
        }
        linked
    }

    fn overwrite(&self) {
        // SAFETY: unlinked, and whoever could have seen it has left; loom checks it.
        self.page.with_mut(|page| unsafe { *page = 0xdead });
    }

    fn open(&self) {
        let word = self.mode.load(Ordering::Relaxed);
        self.mode.store((word & !READING) + WALK + READING, Ordering::Release);
    }

    fn close<const M: u8>(&self) {
        let word = self.mode.load(Ordering::Relaxed);
        let order = if M == mutant::RELAXED_CLOSING_STORE { Ordering::Relaxed } else { Ordering::Release };
        self.mode.store(word & !READING, order);
    }

    /// Kind `ipi`.
    fn walk<const M: u8>(&self) {
        self.open();
        if M != mutant::NO_OPENING_BARRIER {
            fence(Ordering::SeqCst);
        }
        self.read();
        self.close::<M>();
    }

    /// The flush, as far as walkers are concerned: waits for the walk that is going on, if one is.
    fn wait<const M: u8>(&self) {
        let look = if M == mutant::RELAXED_LOOK { Ordering::Relaxed } else { Ordering::Acquire };
        let seen = self.mode.load(look);
        while M != mutant::DOES_NOT_WAIT && seen & READING != 0 && self.mode.load(look) == seen {
            thread::yield_now();
        }
    }

    fn free<const M: u8>(&self) {
        self.link.store(0, Ordering::Release);
        if M != mutant::NO_BARRIER_OF_THE_FREER {
            fence(Ordering::SeqCst);
        }
        self.wait::<M>();
        self.overwrite();
    }

    /// An interrupt may come here.
    fn interruptible(&self) {
        if self.interrupt.load(Ordering::Relaxed) == 1 && self.taken.load(Ordering::Relaxed) == 0 {
            fence(Ordering::SeqCst);
            self.taken.store(1, Ordering::Release);
        }
    }

    /// Kind `membarrier`: nothing stands between the word and the read, but an interrupt may.
    fn walk_light(&self) {
        self.interruptible();
        self.open();
        self.interruptible();
        self.read();
        self.interruptible();
        self.close::<{ mutant::NONE }>();
        // Who is switched out passes a barrier, whether somebody asks or not.
        fence(Ordering::SeqCst);
        self.taken.store(1, Ordering::Release);
    }

    fn free_heavy<const M: u8>(&self) {
        self.link.store(0, Ordering::Release);
        if M == mutant::NO_OPENING_BARRIER {
            // A full barrier of its own in the place of membarrier: nobody makes the walker's.
            fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
            self.interrupt.store(1, Ordering::Relaxed);
            while self.taken.load(Ordering::Acquire) == 0 {
                thread::yield_now();
            }
            fence(Ordering::SeqCst);
        }
        self.wait::<M>();
        self.overwrite();
    }

    /// Kind `counter`. The section of RCU is a count that the deferred free waits for.
    fn walk_counted<const M: u8>(&self) {
        let outer = M != mutant::DEFERS_BEFORE_THE_SECTION;
        if outer {
            self.section.fetch_add(1, Ordering::SeqCst);
        }
        if M == mutant::NO_OPENING_BARRIER {
            self.readers.store(1, Ordering::Relaxed);
        } else {
            self.readers.fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
        self.read();
        self.readers.store(0, Ordering::Release);
        if outer {
            self.section.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn free_or_defer<const M: u8>(&self) {
        self.link.store(0, Ordering::Release);
        if M != mutant::NO_BARRIER_OF_THE_FREER {
            fence(Ordering::SeqCst);
        }
        if self.readers.load(Ordering::Acquire) != 0 {
            // The grace period.
            while self.section.load(Ordering::Acquire) != 0 {
                thread::yield_now();
            }
        }
        self.overwrite();
    }
}

fn against(
    walk: impl Fn(&Shared) + Copy + Send + Sync + 'static,
    free: impl Fn(&Shared) + Copy + Send + Sync + 'static,
) {
    bounded(move || {
        let shared = Shared::new();
        let walker = {
            let shared = shared.clone();
            thread::spawn(move || walk(&shared))
        };
        free(&shared);
        walker.join().unwrap();
    });
}

#[test]
fn ipi_a_walk_never_meets_a_freed_page() {
    against(Shared::walk::<{ mutant::NONE }>, Shared::free::<{ mutant::NONE }>);
}

#[test]
fn ipi_two_walks_in_a_row_never_meet_a_freed_page_and_the_freer_waits_for_one_only() {
    let twice = |shared: &Shared| {
        shared.walk::<{ mutant::NONE }>();
        shared.walk::<{ mutant::NONE }>();
    };
    against(twice, Shared::free::<{ mutant::NONE }>);
}

#[test]
#[should_panic]
fn canary_ipi_without_the_opening_barrier() {
    against(Shared::walk::<{ mutant::NO_OPENING_BARRIER }>, Shared::free::<{ mutant::NONE }>);
}

#[test]
#[should_panic]
fn canary_ipi_without_the_barrier_of_the_freer() {
    against(Shared::walk::<{ mutant::NONE }>, Shared::free::<{ mutant::NO_BARRIER_OF_THE_FREER }>);
}

#[test]
#[should_panic]
fn canary_ipi_with_a_relaxed_closing_store() {
    against(Shared::walk::<{ mutant::RELAXED_CLOSING_STORE }>, Shared::free::<{ mutant::NONE }>);
}

#[test]
#[should_panic]
fn canary_ipi_with_a_relaxed_look_of_the_freer() {
    against(Shared::walk::<{ mutant::NONE }>, Shared::free::<{ mutant::RELAXED_LOOK }>);
}

#[test]
#[should_panic]
fn canary_ipi_with_a_freer_that_does_not_wait() {
    against(Shared::walk::<{ mutant::NONE }>, Shared::free::<{ mutant::DOES_NOT_WAIT }>);
}

#[test]
fn membarrier_a_walk_without_a_barrier_never_meets_a_freed_page() {
    against(Shared::walk_light, Shared::free_heavy::<{ mutant::NONE }>);
}

#[test]
#[should_panic]
fn canary_membarrier_with_a_plain_barrier_in_its_place() {
    against(Shared::walk_light, Shared::free_heavy::<{ mutant::NO_OPENING_BARRIER }>);
}

#[test]
fn counter_a_walk_never_meets_a_freed_page_whether_freed_or_deferred() {
    against(Shared::walk_counted::<{ mutant::NONE }>, Shared::free_or_defer::<{ mutant::NONE }>);
}

#[test]
#[should_panic]
fn canary_counter_without_the_opening_barrier() {
    against(
        Shared::walk_counted::<{ mutant::NO_OPENING_BARRIER }>,
        Shared::free_or_defer::<{ mutant::NONE }>,
    );
}

#[test]
#[should_panic]
fn canary_counter_without_the_barrier_of_the_freer() {
    against(
        Shared::walk_counted::<{ mutant::NONE }>,
        Shared::free_or_defer::<{ mutant::NO_BARRIER_OF_THE_FREER }>,
    );
}

#[test]
#[should_panic]
fn canary_counter_outside_of_a_section() {
    against(
        Shared::walk_counted::<{ mutant::DEFERS_BEFORE_THE_SECTION }>,
        Shared::free_or_defer::<{ mutant::NONE }>,
    );
}
