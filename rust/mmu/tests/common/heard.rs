//! What an MMU told its observer and asked of its host, for tests of the engine alone.
#![allow(dead_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex};

use tdpmmu_mmu::MmuHost;
use tdpmmu_platform::{Event, Observer, Platform, Task};
use tdpmmu_spte::Spte;

/// One thing that happened, in the order in which it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// (gfn, level, old, new, mmu_lock shared); the values without their frames.
    Spte(u64, u8, u64, u64, bool),
    Flush(Option<Range<u64>>),
    /// Frames given back as dirty.
    Dirty(u64, u64),
    /// Frames given back as accessed.
    Accessed(u64, u64),
    /// (address space, gfn) marked in the slot.
    Marked(u8, u64),
}

#[derive(Default)]
pub struct Ear {
    heard: Mutex<Vec<Heard>>,
}

impl Ear {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn note(&self, what: Heard) {
        self.heard.lock().expect("unpoisoned").push(what);
    }

    /// Everything since the last call.
    pub fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut self.heard.lock().expect("unpoisoned"))
    }

    /// Only the changes of entries since the last call: (gfn, level, old, new).
    pub fn sptes(&self) -> Vec<(u64, u8, u64, u64)> {
        let changes = self.take().into_iter();
        changes
            .filter_map(|what| match what {
                Heard::Spte(gfn, level, old, new, _) => Some((gfn, level, old, new)),
                _ => None,
            })
            .collect()
    }
}

/// An entry without its frame.
pub const fn bare(raw: u64) -> u64 {
    raw & !Spte::PFN_MASK
}

impl Observer for Ear {
    fn event(&self, _task: u32, event: &Event) {
        if let &Event::SpteChanged { gfn, level, old, new, shared, .. } = event {
            self.note(Heard::Spte(gfn, level, bare(old), bare(new), shared));
        }
    }
}

impl<P: Platform> MmuHost<P> for Ear {
    fn flush_remote(&self, _task: &Task<P>, range: Option<Range<u64>>) {
        self.note(Heard::Flush(range));
    }

    fn frames_dirty(&self, pfn: u64, count: u64) {
        self.note(Heard::Dirty(pfn, count));
    }

    fn frames_accessed(&self, pfn: u64, count: u64) {
        self.note(Heard::Accessed(pfn, count));
    }

    fn gfn_dirty(&self, _task: &Task<P>, as_id: u8, gfn: u64) {
        self.note(Heard::Marked(as_id, gfn));
    }
}
