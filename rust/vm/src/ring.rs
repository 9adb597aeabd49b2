//! Dirty rings: each vCPU tells what it wrote in the order in which it wrote it.
//!
//! **Guarantee.** A page that a vCPU makes writable in a slot that logs is in that vCPU's ring before the write can complete; an entry is protected again when it is
//! reset, never before user space has harvested it. A vCPU whose ring is soft-full does not enter the guest: a ring never overflows by a guest's doing.
//!
//! **Mechanism.** A ring is a power of two of entries and three counters: what the vCPU has pushed (`dirty`), what user space has harvested (`fetched`), what was reset (`reset`). Only
//! what lies between two of them is in a state: pushed, harvested, free. Each counter has one writer, so a push takes no lock and no locked instruction. 64 entries are kept back (and 512 more where hardware logs pages by itself), as one exit
//! may push several. Resets of neighbours are gathered into masks of 64 pages around the first, forwards and backwards, as Linux 5.11 and later do:
//! each mask costs one hold of mmu_lock exclusive and the walks of one CLEAR word.
//!
//! Who makes a page writable pushes to the ring of the vCPU that its task runs ([`Task::vcpu`]), as `kvm_get_running_vcpu` has it.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Event, Mutex, Platform, Site, Task};

use crate::slot::MemSlot;
use crate::{Vm, VmError};

/// Most entries of a ring (KVM_DIRTY_RING_MAX_ENTRIES).
pub const MAX_ENTRIES: u32 = 65536;
/// Entries kept back for what one exit may push (KVM_DIRTY_RING_RSVD_ENTRIES).
pub const RESERVED: u32 = 64;
/// Entries of the log that hardware keeps by itself (PML).
pub const HARDWARE_LOG: u32 = 512;
/// Least entries that KVM accepts: a page of 16-byte entries.
const MIN_ENTRIES: u32 = 256;

/// One page that a vCPU wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RingEntry {
    /// Memslot.
    pub slot: u16,
    /// Its address space.
    pub as_id: u8,
    /// The page, counted from the slot's first.
    pub offset: u64,
}

/// A place for an entry: slot and address space in one word, the page in the other.
#[derive(Default)]
struct Place([AtomicU64; 2]);

impl Place {
    fn put(&self, entry: RingEntry) {
        self.0[0].store(u64::from(entry.slot) | u64::from(entry.as_id) << 16, Relaxed);
        self.0[1].store(entry.offset, Relaxed);
    }

    fn get(&self) -> RingEntry {
        let slot = self.0[0].load(Relaxed);
        RingEntry { slot: slot as u16, as_id: (slot >> 16) as u8, offset: self.0[1].load(Relaxed) }
    }
}

/// One vCPU's ring. The counters only grow, each by one party; what lies behind a counter was written before it moved.
struct Ring<P: Platform> {
    places: Box<[Place]>,
    /// Pushed: by the thread that runs the vCPU.
    dirty: AtomicU64,
    /// Harvested: under `user`.
    fetched: AtomicU64,
    /// Reset: under slots_lock.
    reset: AtomicU64,
    /// User space's side; the kernel has it to itself.
    user: Mutex<P, ()>,
}

impl<P: Platform> Ring<P> {
    fn new(entries: u32) -> Self {
        let count = || AtomicU64::new(0);
        Self {
            places: (0..entries).map(|_| Place::default()).collect(),
            dirty: count(),
            fetched: count(),
            reset: count(),
            user: Mutex::new(()),
        }
    }

    #[inline]
    fn place(&self, n: u64) -> &Place {
        &self.places[n as usize & (self.places.len() - 1)]
    }

    /// As the thread that runs the vCPU sees it; others see a moment.
    #[inline]
    fn used(&self) -> u64 {
        P::load(&self.dirty, Site::DirtyBitmap).saturating_sub(P::load(&self.reset, Site::DirtyBitmap))
    }

    #[inline]
    fn is_full(&self) -> bool {
        self.used() >= self.places.len() as u64
    }
}

/// The rings of a VM.
pub(crate) struct Rings<P: Platform> {
    soft_limit: u64,
    rings: Vec<Ring<P>>,
}

impl<P: Platform> Rings<P> {
    /// Rings of `entries` for each of `vcpus`; `hardware_log`: pages arrive by hardware's own log too.
    ///
    /// # Errors
    /// [`VmError::Config`] by KVM's rules on the size.
    pub(crate) fn new(entries: u32, vcpus: usize, hardware_log: bool) -> Result<Self, VmError> {
        let bad =
            |rule| Err(VmError::Config { what: "dirty_ring", value: format!("{entries} entries"), rule });
        let reserved = RESERVED + if hardware_log { HARDWARE_LOG } else { 0 };
        if !entries.is_power_of_two() {
            return bad("a ring's size is a power of two");
        }
        if entries < MIN_ENTRIES || entries < reserved {
            return bad(
                "a ring has at least 256 entries (a page of them), and what is kept back: 64, with D-bit logging 576",
            );
        }
        if entries > MAX_ENTRIES {
            return bad("a ring has at most 65536 entries");
        }
        Ok(Self {
            soft_limit: u64::from(entries - reserved),
            rings: (0..vcpus).map(|_| Ring::new(entries)).collect(),
        })
    }

    /// Pushes an entry, on the thread that runs the vCPU; false: the ring was full, and the entry is not in it.
    #[inline]
    pub(crate) fn push(&self, vcpu: usize, entry: RingEntry) -> bool {
        let Some(ring) = self.rings.get(vcpu).filter(|ring| !ring.is_full()) else { return false };
        let at = P::load(&ring.dirty, Site::DirtyBitmap);
        ring.place(at).put(entry);
        P::store(&ring.dirty, at + 1, Site::DirtyBitmap);
        true
    }

    /// May the vCPU enter the guest no more?
    #[inline]
    pub(crate) fn soft_full(&self, vcpu: usize) -> bool {
        self.rings.get(vcpu).is_some_and(|ring| ring.used() >= self.soft_limit)
    }

    /// Has the ring no room for what one exit may push?
    #[inline]
    pub(crate) fn full(&self, vcpu: usize) -> bool {
        self.rings.get(vcpu).is_some_and(Ring::is_full)
    }

    /// Takes what was pushed and not yet harvested.
    fn harvest(&self, vcpu: usize) -> Vec<RingEntry> {
        let Some(ring) = self.rings.get(vcpu) else { return Vec::new() };
        let _turn = ring.user.lock();
        let from = P::load(&ring.fetched, Site::DirtyBitmap);
        let until = P::load(&ring.dirty, Site::DirtyBitmap);
        let taken = (from..until).map(|n| ring.place(n).get()).collect();
        P::store(&ring.fetched, until, Site::DirtyBitmap);
        taken
    }

    /// The next harvested entry, free from now on. One caller at a time: slots_lock.
    fn next_to_reset(&self, vcpu: usize) -> Option<RingEntry> {
        let ring = self.rings.get(vcpu)?;
        let at = P::load(&ring.reset, Site::DirtyBitmap);
        (at != P::load(&ring.fetched, Site::DirtyBitmap)).then(|| {
            let entry = ring.place(at).get();
            P::store(&ring.reset, at + 1, Site::DirtyBitmap);
            entry
        })
    }
}

/// Harvested pages of one slot that one mask covers.
struct Batch {
    entry: RingEntry,
    mask: u64,
}

impl Batch {
    /// Takes `next` in, if it lies within 63 pages after the first page, or before it as far as no bit falls out of the mask.
    fn takes(&mut self, next: RingEntry) -> bool {
        if (next.slot, next.as_id) != (self.entry.slot, self.entry.as_id) {
            return false;
        }
        let delta = next.offset.wrapping_sub(self.entry.offset) as i64;
        if (0..64).contains(&delta) {
            self.mask |= 1 << delta;
            return true;
        }
        let back = delta.unsigned_abs();
        if delta < 0 && back < 64 && self.mask.leading_zeros() as u64 >= back {
            self.entry.offset = next.offset;
            self.mask = self.mask << back | 1;
            return true;
        }
        false
    }
}

impl<P: Platform> Vm<P> {
    fn rings(&self, what: &'static str) -> Result<&Rings<P>, VmError> {
        self.side().rings.as_ref().ok_or(VmError::OtherLog { what, has: "bitmaps" })
    }

    /// What `vcpu` has pushed since the last call, oldest first; harvested from now on, to be reset by [`Vm::reset_dirty_rings`].
    ///
    /// # Errors
    /// [`VmError::OtherLog`] without rings, [`VmError::NoVcpu`].
    pub fn dirty_ring(&self, vcpu: usize) -> Result<Vec<RingEntry>, VmError> {
        let rings = self.rings("a dirty ring")?;
        if vcpu >= self.vcpu_count() {
            return Err(VmError::NoVcpu { vcpu, count: self.vcpu_count() });
        }
        // What hardware has logged and not handed over yet belongs to what was written before.
        self.sync_hardware_logs();
        Ok(rings.harvest(vcpu))
    }

    /// KVM_RESET_DIRTY_RINGS: the harvested pages of every ring are protected again, and their entries free. Returns how many there were.
    ///
    /// # Errors
    /// [`VmError::OtherLog`] without rings, [`VmError::Closed`].
    pub fn reset_dirty_rings(&self, task: &Task<P>) -> Result<u64, VmError> {
        let rings = self.rings("KVM_RESET_DIRTY_RINGS")?;
        let slots = self.lock_slots(task);
        self.open()?;
        let set = slots.set();
        let mut count = 0;
        for vcpu in 0..self.vcpu_count() {
            let mut batch: Option<Batch> = None;
            while let Some(entry) = rings.next_to_reset(vcpu) {
                count += 1;
                if batch.as_mut().is_some_and(|batch| batch.takes(entry)) {
                    continue;
                }
                if let Some(done) = batch.replace(Batch { entry, mask: 1 }) {
                    self.reset_batch(task, set.by_id(done.entry.as_id, done.entry.slot), &done);
                }
            }
            if let Some(done) = batch {
                self.reset_batch(task, set.by_id(done.entry.as_id, done.entry.slot), &done);
            }
        }
        if count != 0 {
            self.mmu().flush(task, None);
        }
        for as_id in 0..=1 {
            task.observe(|| Event::LogReturn { as_id, start: 0, end: u64::MAX });
        }
        Ok(count)
    }

    /// A slot that has gone since, or has become shorter, has nothing to protect.
    fn reset_batch(&self, task: &Task<P>, slot: Option<&std::sync::Arc<MemSlot>>, batch: &Batch) {
        let Some(slot) = slot else { return };
        let last = batch.entry.offset.saturating_add(u64::from(63 - batch.mask.leading_zeros()));
        if last >= slot.pages {
            return;
        }
        let (as_id, base) = (slot.as_id, slot.base + batch.entry.offset);
        task.observe(|| Event::DirtyTake { as_id, base, mask: batch.mask });
        let mut guard = self.mmu().lock.write(task);
        self.protect_dirty(&mut self.harvest(&mut guard, slot), slot, batch.entry.offset, batch.mask);
    }
}

#[cfg(test)]
mod tests {
    use tdpmmu_platform::Real;

    use super::*;

    type Rings = super::Rings<Real>;

    fn at(offset: u64) -> RingEntry {
        RingEntry { slot: 1, as_id: 0, offset }
    }

    #[test]
    fn neighbours_are_gathered_forwards_and_backwards_while_no_page_falls_out() {
        let mut batch = Batch { entry: at(100), mask: 1 };
        assert!(batch.takes(at(163)) && batch.takes(at(100)));
        assert!(!batch.takes(at(164)), "the 65th page");
        assert!(!batch.takes(at(99)), "page 163 would fall out");
        let mut batch = Batch { entry: at(100), mask: 1 };
        assert!(batch.takes(at(90)) && batch.takes(at(95)));
        assert_eq!((batch.entry.offset, batch.mask), (90, 1 | 1 << 5 | 1 << 10));
        assert!(!batch.takes(RingEntry { slot: 2, ..at(91) }), "another slot");
        assert!(!batch.takes(RingEntry { as_id: 1, ..at(91) }), "another address space");
        assert!(batch.takes(at(37)) && !batch.takes(at(36)));
    }

    #[test]
    fn a_ring_is_full_before_it_overflows() {
        let rings = Rings::new(256, 1, false).expect("a power of two");
        for n in 0..256 {
            assert_eq!(rings.soft_full(0), n >= 192, "{n} of 256");
            assert!(!rings.full(0) && rings.push(0, at(n)));
        }
        assert!(rings.full(0) && !rings.push(0, at(0)), "refused, not overwritten");
        assert!(rings.next_to_reset(0).is_none(), "nothing is reset before it was harvested");
        assert_eq!(rings.harvest(0).len(), 256);
        assert_eq!(rings.harvest(0), []);
        assert_eq!(rings.next_to_reset(0), Some(at(0)));
        assert!(!rings.full(0) && rings.push(0, at(7)));
        assert_eq!(rings.harvest(0), [at(7)]);
    }

    #[test]
    fn a_push_a_harvest_and_a_reset_need_not_take_turns() {
        const PAGES: u64 = 200_000;
        let rings = Rings::new(256, 1, false).expect("a power of two");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..PAGES {
                    // The page tells its slot, so that an entry put together from two is found out.
                    let entry = RingEntry { slot: n as u16, as_id: n as u8 & 1, offset: n };
                    while !rings.push(0, entry) {
                        std::thread::yield_now();
                    }
                }
            });
            let (mut harvested, mut reset) = (0, 0);
            while reset < PAGES {
                for entry in rings.harvest(0) {
                    assert_eq!(
                        (entry.offset, entry.slot),
                        (harvested, harvested as u16),
                        "each once, in order"
                    );
                    harvested += 1;
                }
                while let Some(entry) = rings.next_to_reset(0) {
                    assert_eq!(
                        entry.offset, reset,
                        "what was harvested is not overwritten before it is reset"
                    );
                    reset += 1;
                }
            }
            assert_eq!(harvested, PAGES);
        });
    }

    #[test]
    fn sizes_that_kvm_refuses_are_refused() {
        for (entries, log) in
            [(0, false), (100, false), (128, false), (256, true), (512, true), (1 << 17, false)]
        {
            assert!(matches!(Rings::new(entries, 1, log), Err(VmError::Config { .. })), "{entries}");
        }
        assert!(Rings::new(1024, 1, true).is_ok() && Rings::new(65536, 1, false).is_ok());
    }
}
