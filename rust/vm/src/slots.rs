//! The set of memslots: published to vCPUs without a lock, replaced under slots_lock.
//!
//! **Guarantee.** A vCPU that has entered its read section sees one whole set until it leaves. When [`Memslots::publish`] returns, no vCPU
//! uses an older set: together with the INVALID step of delete and move that means that no *new* SPTE for a slot appears once
//! the fast zap begins (Linux: `install_new_memslots`, `synchronize_srcu`).
//!
//! **Mechanism.** SRCU is a second RCU domain with the vCPUs as its only readers: a fault may sleep on mmu_lock inside
//! its section without holding up the grace periods of page tables. Entering costs two stores and no fence on platforms with asymmetric
//! barriers. Each address space has its own generation, space 0 the even and space 1 the odd numbers: it grows by 2 with each publication of that space, so
//! CREATE and FLAGS cost one step, DELETE and MOVE two; bit 63 is set while a publication is under way, and no MMIO entry made then is ever current. Who
//! publishes learns the next generation before it counts ([`Swapped`]): when its low 19 bits, which MMIO entries keep, have wrapped, all of them must go first.
//!
//! What the shadow MMU keeps with a slot (reverse maps, lpage_info) is published with the set and found through it alone: a slot that is out of the set has no books, so whoever still refers to them is found out. An INVALID slot
//! has its books; they go with the second publication, when nothing refers to them any more.
//!
//! A notifier translates its host range by one set and must end by the same one, so the swap itself waits until no invalidation is
//! running (`mn_active_invalidate_count`), under the small lock that also counts them.
//!
//! The rules of an update, as KVM_SET_USER_MEMORY_REGION has them, are in [`plan`]: a pure function from the present set and the wish to the change.

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use tdpmmu_platform::{Mutex, MutexGuard, Platform, RcuConfig, RcuDomain, RcuReader, Reclaim, Site};
use tdpmmu_shadow::{BookSet, LpageInfo};
use tdpmmu_spte::mmio::GENERATION_MASK;

use crate::VmError;
use crate::slot::{DirtyBitmap, MemSlot, SlotFlags};

/// Address spaces: 0, and 1 for system management mode.
pub const ADDRESS_SPACES: usize = 2;
/// Slot ids per address space (KVM_USER_MEM_SLOTS).
pub const MAX_SLOTS: u16 = 32764;
/// Most pages of one slot (KVM_MEM_MAX_NR_PAGES).
pub const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;
/// In the generation: a publication is under way.
pub const UPDATE_IN_PROGRESS: u64 = 1 << 63;

/// All memslots at one instant.
#[derive(Clone, Default)]
pub struct SlotSet {
    /// Generation of each address space, without the in-progress flag.
    pub generations: [u64; ADDRESS_SPACES],
    /// Publications of a slot so far: who came later stands later among slots of one host address.
    serial: u64,
    spaces: [Vec<Arc<MemSlot>>; ADDRESS_SPACES],
    /// The books of all these slots, INVALID ones too.
    books: Arc<BookSet>,
}

impl SlotSet {
    /// The shadow MMU's books of all these slots, INVALID ones too; empty in a VM without shadow pages.
    pub fn books(&self) -> &Arc<BookSet> {
        &self.books
    }

    /// The books again, from the slots: what no slot of this set has is not found any more.
    fn with_books(mut self) -> Self {
        self.books = Arc::new(BookSet::new(self.iter().filter_map(|slot| slot.books.clone())));
        self
    }

    /// The slots of an address space, by gfn.
    pub fn space(&self, as_id: u8) -> &[Arc<MemSlot>] {
        self.spaces.get(usize::from(as_id)).map_or(&[], Vec::as_slice)
    }

    /// The slot that holds `gfn`. O(log n).
    #[inline]
    pub fn find(&self, as_id: u8, gfn: u64) -> Option<&Arc<MemSlot>> {
        let space = self.space(as_id);
        let after = match space {
            [one] => usize::from(one.base <= gfn),
            _ => space.partition_point(|slot| slot.base <= gfn),
        };
        space.get(after.checked_sub(1)?).filter(|slot| slot.contains(gfn))
    }

    /// The slot with this id.
    pub fn by_id(&self, as_id: u8, id: u16) -> Option<&Arc<MemSlot>> {
        self.space(as_id).iter().find(|slot| slot.id == id)
    }

    /// Every slot, address space 0 first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<MemSlot>> {
        self.spaces.iter().flatten()
    }

    /// (as_id, gfns) behind a range of host virtual pages: address space 0 first, and in each by host address, as the kernel's interval tree has them (5.17 on);
    /// of slots at one host address the one published last comes last.
    pub fn gfns_of(&self, hvas: &Range<u64>) -> Vec<(u8, Range<u64>)> {
        let mut ranges = Vec::new();
        for space in &self.spaces {
            let mut hit: Vec<_> = space.iter().filter_map(|slot| Some((slot, slot.gfns_of(hvas)?))).collect();
            hit.sort_by_key(|(slot, _)| (slot.hva, slot.serial));
            ranges.extend(hit.into_iter().map(|(slot, gfns)| (slot.as_id, gfns)));
        }
        ranges
    }

    fn without(&self, as_id: u8, id: u16) -> Self {
        let mut set = self.clone();
        if let Some(space) = set.spaces.get_mut(usize::from(as_id)) {
            space.retain(|slot| slot.id != id);
        }
        set.with_books()
    }

    fn with(&self, mut slot: MemSlot) -> Self {
        let mut set = self.without(slot.as_id, slot.id);
        set.serial += 1;
        slot.serial = set.serial;
        if let Some(space) = set.spaces.get_mut(usize::from(slot.as_id)) {
            let at = space.partition_point(|other| other.base < slot.base);
            space.insert(at, Arc::new(slot));
        }
        set.with_books()
    }
}

/// What user space asks for: one call of KVM_SET_USER_MEMORY_REGION. `pages` 0 deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Slot id.
    pub id: u16,
    /// Address space.
    pub as_id: u8,
    /// First gfn.
    pub base: u64,
    /// Pages; 0 deletes the slot.
    pub pages: u64,
    /// First host virtual page.
    pub hva: u64,
    /// Flags.
    pub flags: SlotFlags,
}

/// What a [`Region`] comes to.
pub enum Change {
    /// Nothing differs.
    Nothing,
    /// A new slot: one publication.
    Create(MemSlot),
    /// The slot goes: INVALID publication, zap, publication.
    Delete(Arc<MemSlot>),
    /// The same memory at other gfns: as delete, then the new slot.
    Move(Arc<MemSlot>, MemSlot),
    /// Only the flags differ: one publication.
    Flags(Arc<MemSlot>, MemSlot),
}

/// Applies KVM's rules.
///
/// # Errors
/// [`VmError::BadSlot`] (EINVAL) and [`VmError::SlotOverlap`] (EEXIST).
pub fn plan(set: &SlotSet, region: &Region, max_gfn: u64, log: Logs) -> Result<Change, VmError> {
    let Region { id, as_id, base, pages, hva, flags } = *region;
    let end = base.saturating_add(pages);
    let bad = |rule| Err(VmError::BadSlot { as_id, id, start: base, end, rule });
    if usize::from(as_id) >= ADDRESS_SPACES {
        return bad("there are two address spaces, 0 and 1");
    }
    if id >= MAX_SLOTS {
        return bad("slot ids end at 32763");
    }
    let old = set.by_id(as_id, id).cloned();
    if pages == 0 {
        return match old {
            Some(old) => Ok(Change::Delete(old)),
            None => Err(VmError::NoSlot { as_id, id }),
        };
    }
    if pages > MAX_SLOT_PAGES {
        return bad("a memslot has at most 2^31 - 1 pages");
    }
    if base.checked_add(pages).is_none_or(|end| end > max_gfn) {
        return bad("a memslot must end within the guest's physical address space");
    }
    if hva.checked_add(pages).is_none() {
        return bad("the host address range wraps");
    }
    if let Some(old) = &old {
        if old.pages != pages {
            return bad("the size of a memslot cannot change");
        }
        if old.hva != hva {
            return bad("the host address of a memslot cannot change");
        }
        if old.flags.readonly != flags.readonly {
            return bad("READONLY cannot change");
        }
        if old.base == base && old.flags == flags {
            return Ok(Change::Nothing);
        }
    }
    if old.as_ref().is_none_or(|old| old.base != base)
        && let Some(other) =
            set.space(as_id).iter().find(|o| o.id != id && o.base < end && base < o.base + o.pages)
    {
        return Err(VmError::SlotOverlap {
            as_id,
            id,
            start: base,
            end,
            other: other.id,
            other_start: other.base,
            other_end: other.base + other.pages,
        });
    }
    let kept = old.as_ref().and_then(|old| old.dirty.as_ref());
    let dirty = match (kept, log) {
        _ if !flags.log_dirty => None,
        // A slot that moves takes its log along.
        (Some(kept), _) => Some(kept.moved_to(base)),
        (None, Logs::Ring) => None,
        (None, Logs::Bitmap { all_set }) => {
            let dirty = DirtyBitmap::new(base, pages)?;
            if all_set {
                dirty.set_all();
            }
            Some(Arc::new(dirty))
        }
    };
    let lpage = match &old {
        Some(old) if old.base == base => old.lpage.clone(),
        _ => Arc::new(
            LpageInfo::new(base, pages, hva)
                .map_err(|e| VmError::Host { what: "huge-page counters", reason: e.to_string() })?,
        ),
    };
    // A slot elsewhere gets books of its own, where the VM keeps any.
    let books = old.as_ref().filter(|old| old.base == base).and_then(|old| old.books.clone());
    let new = MemSlot { id, as_id, base, pages, hva, flags, invalid: false, dirty, lpage, books, serial: 0 };
    Ok(match old {
        None => Change::Create(new),
        Some(old) if old.base != base => Change::Move(old, new),
        Some(old) => Change::Flags(old, new),
    })
}

/// How a slot that logs keeps its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logs {
    /// In a bitmap of its own.
    Bitmap {
        /// All of it is dirty at first (KVM_DIRTY_LOG_INITIALLY_SET).
        all_set: bool,
    },
    /// In the vCPUs' rings: there is no bitmap.
    Ring,
}

struct NothingDeferred;

impl Reclaim for NothingDeferred {
    fn reclaim(&self, _head: u32) -> usize {
        0
    }
}

/// The published set, and SRCU around it.
pub struct Memslots<P: Platform> {
    active: AtomicPtr<SlotSet>,
    generations: [AtomicU64; ADDRESS_SPACES],
    /// mn_active_invalidate_count. The set is only ever swapped under this lock, at 0.
    invalidations: Mutex<P, u64>,
    /// Slots with a dirty bitmap (nr_memslots_dirty_logging).
    logging: AtomicU64,
    srcu: Arc<P::Rcu>,
}

impl<P: Platform> Memslots<P> {
    /// An empty set; address space 0 begins with `generation` (even), space 1 with the number after it.
    pub fn new(rcu: RcuConfig, generation: u64) -> Self {
        let generations = [generation, generation + 1];
        Self {
            active: AtomicPtr::new(Box::into_raw(Box::new(SlotSet { generations, ..SlotSet::default() }))),
            generations: generations.map(AtomicU64::new),
            invalidations: Mutex::new(0),
            logging: AtomicU64::new(0),
            srcu: P::Rcu::new(Arc::new(NothingDeferred), rcu),
        }
    }

    /// A reader for one vCPU or task.
    pub fn reader(self: &Arc<Self>, name: &str) -> SlotReader<P> {
        SlotReader { reader: self.srcu.register(name), slots: Arc::clone(self) }
    }

    /// The generation of an address space, with [`UPDATE_IN_PROGRESS`] while a publication is under way.
    #[inline]
    pub fn generation(&self, as_id: u8) -> u64 {
        P::load(&self.generations[usize::from(as_id) % ADDRESS_SPACES], Site::SlotsLock)
    }

    fn locked(&self) -> MutexGuard<'_, P, u64> {
        self.invalidations.lock()
    }

    fn with_set<R>(&self, read: impl FnOnce(&SlotSet) -> R) -> R {
        let _no_swap = self.locked();
        // SAFETY: the pointer is a live Box; it is only swapped, and only then freed, after taking the lock held here.
        read(unsafe { &*self.active.load(Ordering::Acquire) })
    }

    /// A private copy of the set.
    pub fn snapshot(&self) -> SlotSet {
        self.with_set(SlotSet::clone)
    }

    /// The shadow MMU's books of the published set.
    pub fn books(&self) -> Arc<BookSet> {
        self.with_set(|set| Arc::clone(&set.books))
    }

    /// Counts an invalidation of `hvas` in and translates it: (as_id, gfns), address space 0 first. The set stays
    /// published until [`Memslots::end_invalidation`].
    pub fn begin_invalidation(&self, hvas: &Range<u64>) -> Vec<(u8, Range<u64>)> {
        let mut running = self.locked();
        *running += 1;
        // SAFETY: as in `with_set`.
        unsafe { &*self.active.load(Ordering::Acquire) }.gfns_of(hvas)
    }

    /// Counts an invalidation out.
    pub fn end_invalidation(&self) {
        let mut running = self.locked();
        *running = running.saturating_sub(1);
    }

    /// Does any slot log dirty pages?
    #[inline]
    pub fn any_logs(&self) -> bool {
        P::point(Site::DirtyBitmap);
        self.logging.load(Ordering::Relaxed) != 0
    }

    /// Marks `gfn` in the dirty bitmap of its slot, if that slot has one.
    #[inline]
    pub fn mark_dirty(&self, as_id: u8, gfn: u64) {
        if self.any_logs() {
            self.with_set(|set| {
                if let Some(dirty) = set.find(as_id, gfn).and_then(|slot| slot.dirty.as_ref()) {
                    dirty.mark::<P>(gfn);
                }
            });
        }
    }

    /// The slot of `gfn`, if it logs dirty pages: (its id, the gfn's offset in it).
    pub fn logging_slot(&self, as_id: u8, gfn: u64) -> Option<(u16, u64)> {
        self.with_set(|set| {
            let slot = set.find(as_id, gfn).filter(|slot| slot.flags.log_dirty)?;
            Some((slot.id, gfn - slot.base))
        })
    }

    /// Publishes `set` and waits until no reader uses an older one. The generation of `as_id` is still the old one, in progress, until [`Memslots::settle`].
    fn publish(&self, as_id: u8, mut set: SlotSet) -> Swapped {
        let space = usize::from(as_id) % ADDRESS_SPACES;
        let before = P::load(&self.generations[space], Site::SlotsLock);
        let generation = (before + ADDRESS_SPACES as u64) & !UPDATE_IN_PROGRESS;
        set.generations[space] = generation;
        let logging = set.iter().filter(|slot| slot.flags.log_dirty).count() as u64;
        let new = Box::into_raw(Box::new(set));
        let old = loop {
            let running = self.locked();
            if *running == 0 {
                // Bits are marked from before the first fault that can see the bitmap.
                self.logging.fetch_max(logging, Ordering::Relaxed);
                P::store(&self.generations[space], before | UPDATE_IN_PROGRESS, Site::SlotsLock);
                P::locked(Site::SlotsLock);
                break self.active.swap(new, Ordering::AcqRel);
            }
            drop(running);
            P::yield_cpu(Site::SlotsLock);
        };
        self.srcu.synchronize();
        self.logging.store(logging, Ordering::Relaxed);
        // SAFETY: `old` came from Box::into_raw and is no longer published. Readers under SRCU are gone after the grace period
        // (`SlotGuard` does not outlive its section); readers under the lock loaded it before the swap and are out of the lock.
        drop(unsafe { Box::from_raw(old) });
        Swapped { space, generation }
    }

    fn settle(&self, swapped: Swapped) {
        P::store(&self.generations[swapped.space], swapped.generation, Site::SlotsLock);
    }

    /// Ends the SRCU thread.
    pub fn stop(&self) {
        self.srcu.stop();
    }
}

impl<P: Platform> Drop for Memslots<P> {
    fn drop(&mut self) {
        // SAFETY: the last published Box; readers hold an Arc of `self`, so none is left.
        drop(unsafe { Box::from_raw(*self.active.get_mut()) });
    }
}

/// The right to replace the set: what slots_lock protects. One per VM, inside that lock.
pub struct SlotWriter<P: Platform> {
    slots: Arc<Memslots<P>>,
}

impl<P: Platform> SlotWriter<P> {
    /// The writer of `slots`; the caller makes exactly one.
    pub(crate) fn new(slots: Arc<Memslots<P>>) -> Self {
        Self { slots }
    }

    /// The present set.
    pub fn set(&self) -> SlotSet {
        self.slots.snapshot()
    }

    /// Publishes the slot as INVALID: faults on it retry from now on. One generation step.
    pub fn invalidate(&mut self, slot: &MemSlot) -> Swapped {
        self.slots.publish(slot.as_id, self.set().with(MemSlot { invalid: true, ..slot.clone() }))
    }

    /// Publishes the set with `slot` in the place of the one with its id. One generation step.
    pub fn install(&mut self, slot: MemSlot) -> Swapped {
        self.slots.publish(slot.as_id, self.set().with(slot))
    }

    /// Publishes the set without the slot. One generation step.
    pub fn remove(&mut self, as_id: u8, id: u16) -> Swapped {
        self.slots.publish(as_id, self.set().without(as_id, id))
    }

    /// The publication is over: its generation counts from now on.
    pub fn settle(&mut self, swapped: Swapped) {
        self.slots.settle(swapped);
    }
}

/// A set is published, its generation does not count yet. To be given to [`SlotWriter::settle`].
#[must_use = "until it is settled no MMIO entry is current"]
pub struct Swapped {
    space: usize,
    generation: u64,
}

impl Swapped {
    /// Has the part of the generation that MMIO entries keep come round to its beginning? Entries made then would look current again.
    pub fn wrapped(&self) -> bool {
        self.generation & GENERATION_MASK & !(ADDRESS_SPACES as u64 - 1) == 0
    }
}

/// A vCPU's access to the set.
pub struct SlotReader<P: Platform> {
    reader: <P::Rcu as RcuDomain>::Reader,
    slots: Arc<Memslots<P>>,
}

impl<P: Platform> SlotReader<P> {
    /// Begins a read section.
    #[inline]
    pub fn enter(&self) -> SlotGuard<'_, P> {
        self.reader.enter();
        P::point(Site::SlotsLock);
        // SAFETY: loaded inside the read section; `publish` frees a replaced set only after a grace period, which this section
        // holds up until the guard leaves it.
        let set = unsafe { &*self.slots.active.load(Ordering::Acquire) };
        SlotGuard { reader: &self.reader, set }
    }

    /// The generation of an address space now, with its in-progress flag.
    #[inline]
    pub fn generation(&self, as_id: u8) -> u64 {
        self.slots.generation(as_id)
    }
}

/// A read section and the set it sees.
pub struct SlotGuard<'a, P: Platform> {
    reader: &'a <P::Rcu as RcuDomain>::Reader,
    set: &'a SlotSet,
}

impl<P: Platform> Deref for SlotGuard<'_, P> {
    type Target = SlotSet;
    #[inline]
    fn deref(&self) -> &SlotSet {
        self.set
    }
}

impl<P: Platform> Drop for SlotGuard<'_, P> {
    #[inline]
    fn drop(&mut self) {
        self.reader.leave();
    }
}
