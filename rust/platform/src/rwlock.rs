//! A fair reader-writer lock in the manner of the kernel's queued rwlock.
//!
//! **Guarantee.** Many readers or one writer. Whoever must wait queues, and the queue is served first in, first
//! out. No newcomer passes a waiting writer, and no writer passes anybody, so neither side starves. A newcomer that reads
//! may pass readers that have been let in and have not woken up yet: it takes nothing from them. Uncontended, lock and unlock are
//! one atomic read-modify-write each. [`RawRwLock::is_contended`] is one load: giving the lock up would let somebody in.
//!
//! Why readers may pass readers: on the kernel's lock a waiter spins and enters within a microsecond, here it sleeps. If
//! newcomers queued behind sleepers, one writer would leave a convoy in which every later reader waits for the host's
//! scheduler, each behind the other, although nothing excludes them (measured: 87 of 89 ms of a zap).
//!
//! **Mechanism.** One 64-bit word holds everything ([`FairRwLock::state`]). A reader adds itself at once; if it then
//! sees a writer or a queue, it turns its count into a place in the queue with one more addition, which also
//! draws its ticket: position in the queue and visibility as a waiter are the same step.
//!
//! Only the *head* of the queue, the waiter whose ticket is being served, looks at the lock word; it takes the lock
//! by a compare-exchange that removes it from the count of waiters in the same step, then serves the next ticket.
//! A reader at the head thus lets the reader behind it in at once. The others sleep on one of a few turn words
//! chosen by ticket, so that serving a ticket wakes its owner and, rarely, a namesake.
//!
//! Releasing and at once retaking a contended lock hands it to the head: the returning thread sees the queue and
//! joins its end.
//!
//! **No wake-up is lost.** Two sleeps exist. *Turn*: a waiter marks the turn word by compare-exchange before it
//! sleeps on exactly that value; the server replaces the word by a swap and wakes if the mark was there. *Head*: the
//! head reads [`FairRwLock::gate`], then sets [`HEAD_ASLEEP`] in the lock word and looks at the state it replaced;
//! it sleeps only if that state does not admit it. A release that comes later sees the mark, changes the gate and
//! wakes; the gate that the head sleeps on is older, hence the futex refuses or the wake finds it. The head's load of
//! the gate happens before the gate's change: the mark is set with release, the releasing operation acquires it.

use crate::{
    api::RawRwLock,
    primitive::{AtomicU64, CachePadded, Ordering, SPINS, Sleep, relax},
};

/// A writer holds the lock.
const WRITER: u64 = 1;
/// The head of the queue sleeps, or is about to.
const HEAD_ASLEEP: u64 = 1 << 1;
/// One reader.
const READER: u64 = 1 << 2;
const READERS: u64 = ((1 << COUNT_BITS) - 1) << 2;
/// One queued waiter, the head included.
const WAITER: u64 = 1 << (2 + COUNT_BITS);
const WAITERS: u64 = ((1 << COUNT_BITS) - 1) << (2 + COUNT_BITS);
/// One queued waiter that wants to write; it is counted in [`WAITERS`] too.
const WRITE_WAITER: u64 = 1 << (2 + 2 * COUNT_BITS);
const WRITE_WAITERS: u64 = ((1 << COUNT_BITS) - 1) << (2 + 2 * COUNT_BITS);
/// One ticket drawn. The topmost field: it wraps by falling off the word.
const TICKET: u64 = 1 << TICKET_SHIFT;
const TICKET_SHIFT: u32 = 2 + 3 * COUNT_BITS;
const TICKET_MASK: u32 = (1 << (64 - TICKET_SHIFT)) - 1;
/// Width of the counts: 16,383 readers, and as many waiters. A VM has at most 4,096 vCPUs and few other threads.
const COUNT_BITS: u32 = 14;

/// Turn words: neighbours in the queue sleep on different ones. A power of two.
const TURNS: u32 = if cfg!(loom) { 2 } else { 8 };
/// In a turn word: somebody sleeps on it. The ticket being served is above.
const TURN_ASLEEP: u32 = 1;

const fn readers(state: u64) -> u64 {
    (state & READERS) / READER
}

const fn ticket(state: u64) -> u32 {
    (state >> TICKET_SHIFT) as u32
}

/// A newcomer may read: no writer inside, none waiting.
const fn is_open_to_readers<const MUTANT: u8>(state: u64) -> bool {
    state & (WRITER | if MUTANT == mutant::BARGING_READER { 0 } else { WRITE_WAITERS }) == 0
}

/// A newcomer may write: nobody inside, no queue.
const fn is_idle(state: u64) -> bool {
    state & (WRITER | READERS | WAITERS) == 0
}

/// The head of the queue may enter.
const fn admits_head<const SHARED: bool, const MUTANT: u8>(state: u64) -> bool {
    if SHARED || MUTANT == mutant::RASH_WRITER {
        state & WRITER == 0
    } else {
        state & (WRITER | READERS) == 0
    }
}

/// The fair reader-writer lock of the real platform. See the module's text.
pub type FairRwLock = QueuedLock<{ mutant::NONE }>;

/// Deliberate defects, for tests that show that the searches would find them. Folded away at compile time.
pub mod mutant {
    /// The lock as it is meant.
    pub const NONE: u8 = 0;
    /// The head sleeps without looking at the state it marked.
    pub const BLIND_HEAD: u8 = 1;
    /// A newcomer that hid the last reader's exit does not pass the wake-up on.
    pub const SILENT_NEWCOMER: u8 = 2;
    /// The next ticket's owner is not woken.
    pub const SILENT_SERVER: u8 = 3;
    /// Newcomers that read look at the writer inside only and pass those that wait.
    pub const BARGING_READER: u8 = 4;
    /// The head takes the lock for write although readers are inside.
    pub const RASH_WRITER: u8 = 5;
}

/// A queued reader-writer lock with a defect, or with [`mutant::NONE`].
#[derive(Debug)]
pub struct QueuedLock<const MUTANT: u8> {
    /// | bits | field |
    /// | --- | --- |
    /// | 0 | [`WRITER`] |
    /// | 1 | [`HEAD_ASLEEP`] |
    /// | 2..16 | readers inside, and newcomers about to queue |
    /// | 16..30 | waiters |
    /// | 30..44 | of these, writers |
    /// | 44..64 | next ticket, modulo 2^20 |
    state: CachePadded<AtomicU64>,
    /// Changes whenever a sleeping head is to look again.
    gate: Sleep,
    /// Turn word `t % TURNS` holds the last ticket served there, shifted by one, and [`TURN_ASLEEP`].
    turns: [Sleep; TURNS as usize],
}

impl<const MUTANT: u8> QueuedLock<MUTANT> {
    /// How many wait, as of now.
    pub fn waiters(&self) -> u32 {
        ((self.state.load(Ordering::Relaxed) & WAITERS) / WAITER) as u32
    }

    /// Serves `ticket`: its owner becomes the head.
    #[cold]
    fn serve(&self, ticket: u32) {
        let turn = &self.turns[(ticket % TURNS) as usize];
        // Release: the new head sees what the old one did as head. Acquire: pairs with the mark.
        let asleep = turn.word.swap(ticket << 1, Ordering::AcqRel) & TURN_ASLEEP != 0;
        if asleep && MUTANT != mutant::SILENT_SERVER {
            turn.wake_all();
        }
    }

    /// Waits until `ticket` is served.
    fn await_turn(&self, ticket: u32) {
        let turn = &self.turns[(ticket % TURNS) as usize];
        let mut spins = 0;
        loop {
            let seen = turn.word.load(Ordering::Acquire);
            if seen >> 1 == ticket {
                return;
            }
            if spins < SPINS {
                spins += 1;
                relax();
                continue;
            }
            let marked = seen | TURN_ASLEEP;
            if seen == marked
                || turn.word.compare_exchange(seen, marked, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                turn.wait(marked);
            }
        }
    }

    /// Waits in the queue with a drawn `ticket`, then takes the lock.
    #[cold]
    fn wait_queued<const SHARED: bool>(&self, ticket: u32) {
        self.await_turn(ticket);
        let mut spins = 0;
        loop {
            let seen = self.state.load(Ordering::Relaxed);
            if admits_head::<SHARED, MUTANT>(seen) {
                let change = if SHARED { READER } else { WRITER.wrapping_sub(WRITE_WAITER) };
                let taken = (seen - WAITER).wrapping_add(change) & !HEAD_ASLEEP;
                if self.state.compare_exchange(seen, taken, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    break;
                }
                continue;
            }
            if spins < SPINS {
                spins += 1;
                relax();
                continue;
            }
            // The gate is read before the mark is set: see the module's text.
            let gate = self.gate.word.load(Ordering::Acquire);
            let marked = self.state.fetch_or(HEAD_ASLEEP, Ordering::AcqRel);
            if !admits_head::<SHARED, MUTANT>(marked) || MUTANT == mutant::BLIND_HEAD {
                self.gate.wait(gate);
            }
        }
        self.serve(ticket.wrapping_add(1) & TICKET_MASK);
    }

    #[cold]
    fn wake_head(&self) {
        self.gate.word.fetch_add(1, Ordering::AcqRel);
        self.gate.wake_all();
    }

    /// A newcomer that counted itself as a reader found the lock closed: its count becomes a place in the queue.
    #[cold]
    fn queue_shared(&self) {
        let old = self.state.fetch_add(WAITER + TICKET - READER, Ordering::AcqRel);
        // For a moment this thread looked like a reader. If it hid the last reader's exit from a sleeping writer,
        // the wake-up is its to give.
        if readers(old) == 1 && old & HEAD_ASLEEP != 0 && MUTANT != mutant::SILENT_NEWCOMER {
            self.wake_head();
        }
        self.wait_queued::<true>(ticket(old));
    }

    #[cold]
    fn queue_exclusive(&self) {
        let old = self.state.fetch_add(WAITER + WRITE_WAITER + TICKET, Ordering::AcqRel);
        self.wait_queued::<false>(ticket(old));
    }

    #[inline(always)]
    fn enter_exclusive(&self) -> bool {
        let seen = self.state.load(Ordering::Relaxed);
        is_idle(seen)
            && self.state.compare_exchange(seen, seen + WRITER, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }
}

impl<const MUTANT: u8> RawRwLock for QueuedLock<MUTANT> {
    fn new() -> Self {
        QueuedLock {
            state: CachePadded(AtomicU64::new(0)),
            gate: Sleep::new(0),
            // Ticket 0 is being served; the other words hold the tickets one round back.
            turns: std::array::from_fn(|i| {
                let i = i as u32;
                Sleep::new(if i == 0 { 0 } else { (i.wrapping_sub(TURNS) & TICKET_MASK) << 1 })
            }),
        }
    }

    #[inline]
    fn lock_shared(&self) {
        self.lock_shared_or(|| ());
    }

    #[inline]
    fn lock_shared_or(&self, waiting: impl FnOnce()) {
        // Add first, look after: one RMW, and no load that would fetch the line twice when many CPUs read.
        if !is_open_to_readers::<MUTANT>(self.state.fetch_add(READER, Ordering::Acquire)) {
            waiting();
            self.queue_shared();
        }
    }

    #[inline]
    fn unlock_shared(&self) {
        let old = self.state.fetch_sub(READER, Ordering::AcqRel);
        debug_assert!(readers(old) > 0, "unlock_shared of a lock that nobody reads");
        if old & HEAD_ASLEEP != 0 && readers(old) == 1 {
            self.wake_head();
        }
    }

    #[inline]
    fn try_lock_shared(&self) -> bool {
        let mut seen = self.state.load(Ordering::Relaxed);
        while is_open_to_readers::<MUTANT>(seen) {
            match self.state.compare_exchange_weak(seen, seen + READER, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    #[inline]
    fn lock_exclusive(&self) {
        self.lock_exclusive_or(|| ());
    }

    #[inline]
    fn lock_exclusive_or(&self, waiting: impl FnOnce()) {
        if !self.enter_exclusive() {
            waiting();
            self.queue_exclusive();
        }
    }

    #[inline]
    fn unlock_exclusive(&self) {
        let old = self.state.fetch_sub(WRITER, Ordering::AcqRel);
        debug_assert!(old & WRITER != 0, "unlock_exclusive of a lock that nobody writes");
        if old & HEAD_ASLEEP != 0 {
            self.wake_head();
        }
    }

    #[inline]
    fn try_lock_exclusive(&self) -> bool {
        self.enter_exclusive()
    }

    #[inline(always)]
    fn is_contended(&self) -> bool {
        let state = self.state.load(Ordering::Relaxed);
        state & WRITE_WAITERS != 0 || state & WRITER != 0 && state & WAITERS != 0
    }
}
