//! Pages that have come back from RCU and are kept from their next user: off but for those who look for a use after free.
//!
//! **Guarantee.** A page in quarantine holds [`Spte::POISON`] in every entry, a value that no table ever holds, so that who still reads it is found out at
//! once and who still writes it leaves a mark. It is not used again while another page is left; then the one that has waited longest goes first. What was written to
//! it meanwhile is counted when it leaves ([`crate::PoolStats::overwritten`]) or is asked for ([`crate::TablePool::overwritten`]).
//!
//! **Mechanism.** A queue in the order of freeing, and a bit a page, by which a second free is found out as the free map does.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tdpmmu_spte::Spte;

use crate::{Entries, FreeMap};

pub(crate) struct Quarantine {
    held: FreeMap,
    order: Mutex<VecDeque<u32>>,
}

impl Quarantine {
    /// For the pages below `len`.
    pub(crate) fn new(len: usize) -> Self {
        Self { held: FreeMap::new(len, len), order: Mutex::default() }
    }

    fn order(&self) -> MutexGuard<'_, VecDeque<u32>> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is the page in quarantine?
    pub(crate) fn holds(&self, page: u32) -> bool {
        self.held.has(page)
    }

    /// Takes a page in, poisoned; false: it is here already.
    pub(crate) fn take_in(&self, page: u32, entries: &Entries) -> bool {
        let mut order = self.order();
        if self.held.has(page) {
            return false;
        }
        for entry in entries {
            entry.store(Spte::POISON, Ordering::Relaxed);
        }
        self.held.give(page);
        order.push_back(page);
        true
    }

    /// The page that has been here longest; it is here no more.
    pub(crate) fn release(&self) -> Option<u32> {
        let page = self.order().pop_front()?;
        self.held.take(page);
        Some(page)
    }

    /// The pages here, in the order in which they would leave.
    pub(crate) fn pages(&self) -> Vec<u32> {
        self.order().iter().copied().collect()
    }
}

/// Has somebody written to a page since it was poisoned?
pub(crate) fn was_written(entries: &Entries) -> bool {
    entries.iter().any(|entry| entry.load(Ordering::Relaxed) != Spte::POISON)
}
