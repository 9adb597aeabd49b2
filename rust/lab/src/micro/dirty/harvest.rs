//! How written pages are found and taken for clean again, by protocol.
//!
//! A harvest may come in parts (a ring is full before the guest has written all), so its times add up.

use tdpmmu_vm::slot::MemSlot;

use super::fail;
use super::floor;
use super::round::{Round, timed};
use crate::LabError;
use crate::config::Protocol;

/// As large as KVM allows: resets are gathered, and fewer of them interrupt the guest.
pub(super) const RING_ENTRIES: u32 = 65_536;

/// What a harvest came to so far.
pub(super) struct Harvest {
    /// Reading: GET with manual protection, or a ring.
    read_ns: u64,
    /// Taking for clean: CLEAR, GET without manual protection, or reset.
    clear_ns: u64,
    /// Words or entries read.
    read: u64,
    /// Pages taken for clean.
    cleared: u64,
    /// Each page found, by gfn: a page that a full ring interrupted is found twice.
    found: Vec<u64>,
}

impl Harvest {
    fn find(&mut self, gfn: u64) {
        self.found[(gfn / 64) as usize] |= 1 << (gfn % 64);
    }

    /// Different pages found.
    fn pages(&self) -> u64 {
        self.found.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

impl Round<'_> {
    pub(super) fn new_harvest(&self) -> Harvest {
        let found = vec![0; self.pages.div_ceil(64) as usize];
        Harvest { read_ns: 0, clear_ns: 0, read: 0, cleared: 0, found }
    }

    /// Harvests what has been written since the last time.
    pub(super) fn harvest(&self, harvest: &mut Harvest) -> Result<(), LabError> {
        if self.setting.protocol == Protocol::Ring {
            return self.harvest_ring(harvest);
        }
        for slot in self.vm.slots().space(0) {
            self.harvest_slot(slot, harvest)?;
        }
        Ok(())
    }

    fn harvest_slot(&self, slot: &MemSlot, harvest: &mut Harvest) -> Result<(), LabError> {
        let get = || self.vm.get_dirty_log(&self.task, 0, slot.id).map_err(fail("GET_DIRTY_LOG"));
        let (ns, log) = timed(get)?;
        for gfn in log.gfns() {
            harvest.find(gfn);
        }
        if !self.setting.protocol.is_manual() {
            harvest.clear_ns += ns;
            harvest.cleared += log.count();
            return Ok(());
        }
        harvest.read_ns += ns;
        harvest.read += log.words.len() as u64;
        let clear = |first: u64, pages: u64, words: &[u64]| {
            self.vm
                .clear_dirty_log(&self.task, 0, slot.id, first, pages, words)
                .map_err(fail("CLEAR_DIRTY_LOG"))
        };
        let (ns, cleared) = timed(|| {
            if self.setting.protocol != Protocol::Clear64 {
                return clear(0, log.pages, &log.words);
            }
            let mut cleared = 0;
            for (n, word) in log.words.iter().enumerate().filter(|(_, word)| **word != 0) {
                let first = n as u64 * 64;
                cleared += clear(first, (log.pages - first).min(64), std::slice::from_ref(word))?;
            }
            Ok(cleared)
        })?;
        harvest.clear_ns += ns;
        harvest.cleared += cleared;
        Ok(())
    }

    fn harvest_ring(&self, harvest: &mut Harvest) -> Result<(), LabError> {
        let (ns, entries) = timed(|| self.vm.dirty_ring(0).map_err(fail("a dirty ring")))?;
        harvest.read_ns += ns;
        harvest.read += entries.len() as u64;
        let set = self.vm.slots();
        for entry in &entries {
            let slot = set.by_id(entry.as_id, entry.slot);
            let slot = slot.ok_or_else(|| LabError::Internal(format!("{entry:?} names no memslot")))?;
            harvest.find(slot.base + entry.offset);
        }
        let reset = || self.vm.reset_dirty_rings(&self.task).map_err(fail("KVM_RESET_DIRTY_RINGS"));
        let (ns, cleared) = timed(reset)?;
        harvest.clear_ns += ns;
        harvest.cleared += cleared;
        Ok(())
    }

    /// The CLEAR that protects what enabling left alone.
    pub(super) fn first_clear(&mut self) -> Result<(), LabError> {
        let mut harvest = self.new_harvest();
        self.harvest(&mut harvest)?;
        self.lap(
            "first-clear",
            harvest.read_ns + harvest.clear_ns,
            harvest.cleared,
            floor::first_clear(self.limits, self.setting),
        );
        if harvest.pages() == self.pages && harvest.cleared == self.pages {
            return Ok(());
        }
        let message = format!("{} of {} pages were dirty at the start", harvest.pages(), self.pages);
        Err(LabError::Check { message, partial: String::new() })
    }

    /// The laps of a harvest.
    pub(super) fn harvested(&mut self, harvest: &Harvest) {
        let (limits, setting) = (self.limits, self.setting);
        let of = || floor::clear(limits, setting);
        match self.setting.protocol {
            Protocol::Get | Protocol::DBits => {}
            Protocol::Clear64 | Protocol::Clear | Protocol::InitSet => {
                self.lap("get", harvest.read_ns, harvest.read, floor::copy(limits));
                self.lap("clear", harvest.clear_ns, harvest.cleared, of());
            }
            Protocol::Ring => {
                self.lap("collect", harvest.read_ns, harvest.read, floor::collect(limits));
                self.lap("reset", harvest.clear_ns, harvest.cleared, of());
            }
        }
        self.lap("harvest", harvest.read_ns + harvest.clear_ns, self.written_pages(), of());
    }

    /// Was every page found that was written, and no other?
    pub(super) fn all_found(&self, harvest: &Harvest) -> Result<(), LabError> {
        let (written, found) = (self.written_pages(), harvest.pages());
        let first_wrong = (0..self.pages).find(|gfn| {
            let bit = harvest.found[(gfn / 64) as usize] >> (gfn % 64) & 1 != 0;
            bit != gfn.is_multiple_of(self.setting.density)
        });
        let Some(gfn) = first_wrong else { return Ok(()) };
        let name = self.setting.protocol.name();
        let message = format!(
            "{written} pages written, {found} found dirty by {name}; the first that is wrong: gfn {gfn:#x}"
        );
        Err(LabError::Check { message, partial: String::new() })
    }
}
