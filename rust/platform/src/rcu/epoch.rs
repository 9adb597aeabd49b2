//! Which read sections are over: one word per reader, one counter, an asymmetric barrier.
//!
//! **Guarantee.** When [`Epoch::is_over`] has returned true for a target drawn by [`Epoch::begin`], every section
//! that loaded a link which was cut before `begin` has ended, and its accesses happen before the return.
//!
//! **Mechanism.** The counter of grace periods only grows. A reader's word is 0 outside sections; inside it is the
//! counter as the reader saw it on entry, with the depth of nesting in the low bits. `begin` makes the caller's cuts
//! visible (heavy barrier) and draws the next count; a section with an older count is waited for, one with the new
//! count is not.
//!
//! **Why that is enough.** Let a reader load a link L that was cut before `begin`, and let it still see it. Two ways
//! in which the scan could miss the section:
//!
//! * *The scan reads the word before the reader's store reached it.* The reader does: store word; light barrier; load
//!   L. The reclaimer: cut L; heavy barrier; load word. If the heavy barrier orders itself before the reader's light
//!   one, the load of L comes after the cut and finds it gone. If after, the word's store is visible to the scan.
//!   Either way nothing is missed. `membarrier` splits every running thread's program order at one point, hence
//!   the light side need only keep the compiler from moving the load above the store; the fallback makes
//!   both sides SeqCst fences, whose total order gives the same two cases.
//! * *The reader entered with the new count, yet saw the old link.* The counter is raised after the cut, with release;
//!   the reader loads it with acquire. Who sees the new count sees the cut.
//!
//! The quick path does the same with the fewest instructions: where the light barrier is free and nothing is nested, one
//! comparison of the word with 0 tells so, and one with the token tells on leaving that it still holds. The counter is
//! copied to every reader at `begin`, beside its word.
//!
//! A reader that entered with a stale count after the scan passed its zero word is the first case, "gone" branch: it
//! sees no old link, and later grace periods wait for it needlessly at worst.
//!
//! The reader's stores are releases: the scan's acquire of any later word (0, or the count of a next section) puts all
//! of the earlier section before the reclamation. On x86 all of this is plain stores and loads.

use std::{cell::Cell, marker::PhantomData};

use crate::primitive::{Arc, AtomicU64, Mutex, Ordering};

/// The two sides of the barrier. Where light and heavy are the same fence the scheme is the textbook one; the
/// trait exists so that loom can also be shown the scheme with the barrier missing.
pub trait Barrier: Send + Sync {
    /// Between a reader's store of its word and its loads.
    fn light(&self);
    /// Between a reclaimer's cuts and its loads of the words.
    fn heavy(&self);
    /// Whether [`Barrier::light_if_quick`] does as well: readers then take the quick path.
    fn is_quick(&self) -> bool;
    /// [`Barrier::light`] where [`Barrier::is_quick`] holds, without asking again.
    fn light_if_quick(&self);
}

/// One grace period. Below it: the depth of nesting.
const PERIOD: u64 = 1 << DEPTH_BITS;
const DEPTH_BITS: u32 = 12;
const DEPTH: u64 = PERIOD - 1;
/// In a reader's word: its sections do not take the quick path.
const SLOW: u64 = 1 << 63;

/// The word of a reader outside sections.
const fn is_outside(word: u64) -> bool {
    word & DEPTH == 0
}

/// The word of a section that began before the grace period `target`.
const fn is_older(word: u64, target: u64) -> bool {
    !is_outside(word) && (word & !SLOW) >> DEPTH_BITS < target
}

/// A reader's word and name, shared between the reader and the scans. On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub struct Slot {
    /// | bits | field |
    /// | --- | --- |
    /// | 0..12 | depth of nesting; 0 outside sections |
    /// | 12..63 | the count of grace periods seen on entry: at one a microsecond, good for 70 years |
    /// | 63 | [`SLOW`] |
    word: AtomicU64,
    /// The reader's own copy of the count of grace periods, on the line of its word: entering needs no other line.
    now: AtomicU64,
    id: u32,
    name: Box<str>,
}

impl Slot {
    /// Unique within the epoch.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The name given at registration.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// The counter, the readers and the barrier.
#[derive(Debug)]
pub struct Epoch<B> {
    barrier: B,
    readers: Mutex<Readers>,
}

#[derive(Debug)]
struct Readers {
    /// The count of grace periods begun, with depth 1: what a reader stores on entry.
    now: u64,
    next_id: u32,
    slots: Vec<Arc<Slot>>,
}

impl<B: Barrier> Epoch<B> {
    /// No readers, over the given barrier.
    pub fn new(barrier: B) -> Self {
        Epoch { barrier, readers: Mutex::new(Readers { now: PERIOD | 1, next_id: 0, slots: Vec::new() }) }
    }

    /// The barrier in use.
    pub fn barrier(&self) -> &B {
        &self.barrier
    }

    /// Begins a grace period for everything the caller has cut so far; returns its target for [`Epoch::is_over`].
    pub fn begin(&self) -> u64 {
        let mut readers = self.readers.lock().unwrap();
        readers.now += PERIOD;
        let now = readers.now;
        for slot in &readers.slots {
            // Release: whoever enters with the new count sees the cuts.
            slot.now.store(now, Ordering::Release);
        }
        drop(readers);
        self.barrier.heavy();
        now >> DEPTH_BITS
    }

    /// Whether all sections older than `target` have ended. `blocked` is called for each that has not.
    pub fn is_over(&self, target: u64, mut blocked: impl FnMut(&Slot)) -> bool {
        // A reader that registers after this scan enters after the lock is released, hence sees the cuts.
        let readers = self.readers.lock().unwrap();
        let mut over = true;
        for slot in &readers.slots {
            let word = slot.word.load(Ordering::Acquire);
            if is_older(word, target) {
                over = false;
                blocked(slot);
            }
        }
        over
    }

    /// Registers a reader. (Not a method: loom's `Arc` cannot be a receiver.)
    pub fn register(epoch: &Arc<Self>, name: &str) -> Handle<B> {
        let mut readers = epoch.readers.lock().unwrap();
        let id = readers.next_id;
        readers.next_id += 1;
        let slot = Arc::new(Slot {
            word: AtomicU64::new(if epoch.barrier.is_quick() { 0 } else { SLOW }),
            now: AtomicU64::new(readers.now),
            id,
            name: name.into(),
        });
        readers.slots.push(slot.clone());
        drop(readers);
        Handle { slot, epoch: epoch.clone(), _one_thread: PhantomData }
    }

    /// How many readers are registered.
    pub fn reader_count(&self) -> usize {
        self.readers.lock().unwrap().slots.len()
    }
}

/// A registered reader. Only one thread at a time may hold it: the word has a single writer.
#[derive(Debug)]
pub struct Handle<B: Barrier> {
    slot: Arc<Slot>,
    epoch: Arc<Epoch<B>>,
    _one_thread: PhantomData<Cell<()>>,
}

impl<B: Barrier> Handle<B> {
    /// The id that stall reports carry.
    pub fn id(&self) -> u32 {
        self.slot.id
    }

    /// Sends sections through [`Handle::enter`] and [`Handle::leave`] although the barrier is quick: for a reader that
    /// has something else to do there. Not inside a section.
    pub fn set_slow(&self) {
        let word = self.slot.word.load(Ordering::Relaxed);
        assert!(is_outside(word), "RCU reader {} changed inside a section", self.slot.name);
        self.slot.word.store(SLOW, Ordering::Release);
    }

    /// The quick path: begins an outermost section, or does nothing. All reasons for not being quick (nesting, a
    /// barrier that costs something, [`Handle::set_slow`]) are one comparison.
    #[inline(always)]
    pub fn try_enter(&self) -> Option<QuickSection<'_>> {
        let slot = &*self.slot;
        if slot.word.load(Ordering::Relaxed) != 0 {
            return None;
        }
        let token = slot.now.load(Ordering::Acquire);
        slot.word.store(token, Ordering::Release);
        self.epoch.barrier.light_if_quick();
        Some(QuickSection { word: &slot.word, token })
    }

    /// Begins a section, or nests one level deeper.
    #[inline]
    pub fn enter(&self) {
        let word = self.slot.word.load(Ordering::Relaxed);
        if is_outside(word) {
            self.slot.word.store(word | self.slot.now.load(Ordering::Acquire), Ordering::Release);
            self.epoch.barrier.light();
        } else {
            assert!(word & DEPTH != DEPTH, "RCU read sections nested {DEPTH} deep");
            self.slot.word.store(word + 1, Ordering::Release);
        }
    }

    /// Ends one level.
    #[inline]
    pub fn leave(&self) {
        let word = self.slot.word.load(Ordering::Relaxed);
        assert!(!is_outside(word), "RCU read section left that was not entered");
        // Release: the section's loads stay above it.
        self.slot.word.store(if word & DEPTH == 1 { word & SLOW } else { word - 1 }, Ordering::Release);
    }

    /// Levels entered and not left.
    #[inline(always)]
    pub fn depth(&self) -> u32 {
        (self.slot.word.load(Ordering::Relaxed) & DEPTH) as u32
    }
}

/// A section begun on the quick path: where its word is, and what it holds while nothing is nested.
#[derive(Clone, Copy, Debug)]
pub struct QuickSection<'a> {
    word: &'a AtomicU64,
    token: u64,
}

impl QuickSection<'_> {
    /// Ends the section if it is the reader's only one, else does nothing and returns false.
    #[inline(always)]
    pub fn try_leave(self) -> bool {
        // Guards may end in any order: a nested section that outlives this one shows in the depth.
        let alone = self.word.load(Ordering::Relaxed) == self.token;
        if alone {
            // Release: the section's loads stay above it.
            self.word.store(0, Ordering::Release);
        }
        alone
    }
}

impl<B: Barrier> Drop for Handle<B> {
    fn drop(&mut self) {
        // A leaked guard must not block grace periods for ever: the borrow it held has ended.
        self.epoch.readers.lock().unwrap().slots.retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}
