//! Shared words: when an access is a point, and what it sees.
//!
//! **Points.** An access is a point if another task can care: always outside of table pages; inside, if the entry's index is hot, or if the word (in memory or in
//! the task's own buffer) is not zero. The point comes before the access, the access and whatever its caller reports next are one.
//!
//! **Store buffers.** Under TSO a store goes to the task's buffer if the schedule holds it back, or if older stores wait there. A load takes the youngest store
//! of its own buffer to the word, else memory. Read-modify-writes, fences, locks, blocking and the end of the task empty the buffer first.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    POISON,
    config::Memory,
    report::{Kind, Step},
    schedule::Choice,
    scheduler,
    world::{self, Pending, World},
};
use crate::{fault::Fault, site::Site};

/// An empty entry has this bit in some kernels (6.4 on), and no other.
const SUPPRESS_VE: u64 = 1 << 63;

impl World {
    /// What the current task sees in a word.
    #[inline]
    fn seen(&self, cell: &AtomicU64) -> u64 {
        let buffer = &self.tasks[self.current as usize].buffer;
        if !buffer.is_empty()
            && let Some(pending) = buffer.iter().rev().find(|pending| std::ptr::eq(pending.cell, cell))
        {
            return pending.value;
        }
        cell.load(Ordering::Relaxed)
    }

    /// Another task may care for an access to this word.
    #[inline]
    fn matters(&self, cell: &AtomicU64) -> bool {
        let address = std::ptr::from_ref(cell).addr();
        self.region(address).is_none()
            || self.hot[(address & 0xfff) >> 3]
            || cell.load(Ordering::Relaxed) & !SUPPRESS_VE != 0
            || self.seen(cell) & !SUPPRESS_VE != 0
    }

    /// Books an access.
    #[inline]
    fn accessed(&mut self, cell: &AtomicU64, site: Site, kind: Kind, old: u64, new: u64) {
        self.accesses += 1;
        let task = self.current;
        self.tasks[task as usize].accesses += 1;
        let address = std::ptr::from_ref(cell).addr();
        let place = self.region(address);
        let key = place.map_or(0, |(region, offset)| ((region as u64 + 1) << 48) | offset as u64);
        let code = match kind {
            Kind::Load => 1,
            Kind::Store => 2,
            Kind::Swap => 3,
            Kind::Cmpxchg { ok } => 4 + u64::from(ok),
            Kind::Rmw => 6,
            _ => 7,
        };
        self.mix(key ^ (u64::from(task) << 40) ^ ((site as u64) << 56) ^ code);
        if place.is_some() {
            self.mix(old);
            self.mix(new);
            let in_memory = if code == 1 { old } else { cell.load(Ordering::Relaxed) };
            if old == POISON || code == 2 && in_memory == POISON {
                self.touched_after_free(cell, site, kind);
            }
        }
        if self.relaxed != 0 {
            scheduler::stir(self);
        }
        if self.record {
            self.write_down(cell, site, kind, old, new);
        }
    }

    #[cold]
    fn touched_after_free(&mut self, cell: &AtomicU64, site: Site, kind: Kind) {
        let name = self.cell_name(std::ptr::from_ref(cell).addr());
        let name = name.map_or_else(String::new, |cell| format!("{} entry {}", cell.region, cell.index));
        let task = self.tasks[self.current as usize].name.clone();
        let what = format!("{task} touches {name} at {} ({}) after it was freed", site.name(), kind.name());
        self.violation("touched-after-free", what);
    }

    #[cold]
    fn write_down(&mut self, cell: &AtomicU64, site: Site, kind: Kind, old: u64, new: u64) {
        let cell = self.cell_name(std::ptr::from_ref(cell).addr());
        let (at, task) = (self.steps, self.current);
        self.log.push(Step { at, task, site, kind, cell, old, new, text: String::new() });
    }

    /// The oldest buffered store of `task` reaches memory.
    pub fn drain_one(&mut self, task: u32) {
        let buffer = &mut self.tasks[task as usize].buffer;
        let Some(Pending { cell, value, site }) = buffer.pop_front() else { return };
        if buffer.is_empty() {
            self.buffered.retain(|other| *other != task);
        }
        // SAFETY: whoever stored through the platform keeps the word alive until its task has made a barrier, blocked or ended, all of which empty the
        // buffer (documented at [`super::Sim`]).
        let cell = unsafe { &*cell };
        let old = cell.load(Ordering::Relaxed);
        cell.store(value, Ordering::Relaxed);
        let before = std::mem::replace(&mut self.current, task);
        self.accessed(cell, site, Kind::Drain, old, value);
        self.current = before;
    }

    /// All buffered stores of `task` reach memory.
    #[inline]
    pub fn drain_all(&mut self, task: u32) {
        while !self.tasks[task as usize].buffer.is_empty() {
            self.drain_one(task);
        }
    }

    /// The stores of everybody reach memory: what an interrupt to all CPUs does.
    pub fn drain_everybody(&mut self) {
        while let Some(task) = self.buffered.first() {
            self.drain_all(*task);
        }
    }

    /// Whether the store that the current task is about to make stays in its buffer.
    fn holds_back(&mut self) -> bool {
        if self.memory == Memory::Sc || self.alive < 2 || self.abandoned.is_some() {
            return false;
        }
        let id = self.current;
        let task = &mut self.tasks[id as usize];
        if task.quiet != 0 {
            return false;
        }
        if !task.buffer.is_empty() {
            // First in, first out: it cannot pass those before it.
            return true;
        }
        let at = task.counts.stores;
        task.counts.stores += 1;
        let holds = self.chooser.holds(id, at);
        if holds {
            self.turn(id, at, Choice::Hold);
        }
        holds
    }

    fn store(&mut self, cell: &AtomicU64, value: u64, site: Site) {
        let old = self.seen(cell);
        if self.holds_back() {
            let task = self.current;
            let buffer = &mut self.tasks[task as usize].buffer;
            if buffer.is_empty() {
                let place = self.buffered.partition_point(|other| *other < task);
                self.buffered.insert(place, task);
            }
            buffer.push_back(Pending { cell, value, site });
            self.accessed(cell, site, Kind::Store, old, value);
        } else {
            // A quiet store must not overtake what waits.
            self.drain_all(self.current);
            self.accessed(cell, site, Kind::Store, old, value);
            cell.store(value, Ordering::Relaxed);
        }
    }
}

/// The point of an access, if it is one. False: there is no world.
#[inline]
fn approach(cell: &AtomicU64, site: Site, kind: Kind) -> bool {
    let locked = !matches!(kind, Kind::Load | Kind::Store);
    match world::with(|world| {
        let full = locked && !world.tasks[world.current as usize].buffer.is_empty();
        world.alive > 1 && (full || world.matters(cell)) || world.accesses > world.max_accesses
    }) {
        None => false,
        Some(matters) => {
            if matters {
                scheduler::point(site, kind);
            }
            true
        }
    }
}

impl World {
    /// A load that nobody else can care for, which is most of what a walk does: of a table entry that is zero and not hot. Not logged.
    #[inline]
    fn cold_load(&mut self, cell: &AtomicU64) -> Option<u64> {
        let address = std::ptr::from_ref(cell).addr();
        if self.hot[(address & 0xfff) >> 3] || cell.load(Ordering::Relaxed) != 0 {
            return None;
        }
        let (region, offset) = self.region(address)?;
        let id = self.current;
        let task = &mut self.tasks[id as usize];
        if !task.buffer.is_empty() || self.accesses > self.max_accesses {
            return None;
        }
        task.accesses += 1;
        self.accesses += 1;
        self.mix((region as u64) << 48 ^ u64::from(id) << 40 ^ offset as u64);
        if self.relaxed != 0 {
            scheduler::stir(self);
        }
        Some(0)
    }
}

pub(super) fn load(cell: &AtomicU64, site: Site) -> u64 {
    if let Some(value) = world::with(|world| world.cold_load(cell)).flatten() {
        return value;
    }
    if !approach(cell, site, Kind::Load) {
        return cell.load(Ordering::SeqCst);
    }
    world::with(|world| {
        let value = world.seen(cell);
        world.accessed(cell, site, Kind::Load, value, value);
        value
    })
    .unwrap_or_default()
}

pub(super) fn store(cell: &AtomicU64, value: u64, site: Site) {
    if !approach(cell, site, Kind::Store) {
        return cell.store(value, Ordering::SeqCst);
    }
    world::with(|world| world.store(cell, value, site));
}

/// A read-modify-write that always writes: `change` makes the new value of the old one.
#[inline]
pub(super) fn modify(cell: &AtomicU64, site: Site, kind: Kind, change: impl Fn(u64) -> u64) -> u64 {
    if !approach(cell, site, kind) {
        let mut old = cell.load(Ordering::SeqCst);
        while let Err(now) = cell.compare_exchange(old, change(old), Ordering::SeqCst, Ordering::SeqCst) {
            old = now;
        }
        return old;
    }
    world::with(|world| {
        world.drain_all(world.current);
        let old = cell.load(Ordering::Relaxed);
        cell.store(change(old), Ordering::Relaxed);
        world.accessed(cell, site, kind, old, change(old));
        old
    })
    .unwrap_or_default()
}

pub(super) fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, site: Site) -> Result<u64, u64> {
    if !approach(cell, site, Kind::Cmpxchg { ok: true }) {
        return cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
    }
    // Only of entries: their loops must bear a lost race. Other words are compared once, by a locked instruction that does not fail for nothing.
    let entry = world::with(|world| world.region(std::ptr::from_ref(cell).addr()).is_some());
    let spurious = entry == Some(true) && scheduler::ask(Fault::Cmpxchg, site) != 0;
    world::with(|world| {
        world.drain_all(world.current);
        let found = cell.load(Ordering::Relaxed);
        let ok = found == old && !spurious;
        if ok {
            cell.store(new, Ordering::Relaxed);
        }
        world.accessed(cell, site, Kind::Cmpxchg { ok }, found, if ok { new } else { found });
        if ok { Ok(found) } else { Err(found) }
    })
    .unwrap_or(Err(0))
}

/// As [`crate::Platform::check_at`]: at an entry that no other task can care for a yield makes no difference that a yield at its neighbour does not make.
pub(super) fn check_at(cell: &AtomicU64) -> bool {
    world::with(|world| {
        let matters = world.matters(cell);
        if !matters {
            world.step_ends();
            world.section_stretch_ends();
        }
        matters
    })
    .unwrap_or(true)
}

pub(super) fn fence(site: Site) {
    if world::current().is_null() {
        return std::sync::atomic::fence(Ordering::SeqCst);
    }
    // With an empty buffer nothing comes of it that others could see.
    scheduler::settle(site);
    world::with(|world| {
        let task = world.current;
        world.mix(u64::from(task) << 8 ^ site as u64 ^ 0xFE4C_0000);
        world.note(site, Kind::Fence, 0, 0, String::new);
    });
}
