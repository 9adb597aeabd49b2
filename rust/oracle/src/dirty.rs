//! O-DIRTY: no write is lost, none is credited to another owner's frame.
//!
//! **Guarantee.** What hardware or the fast fault sets in a leaf (D; W where that stands for it) is in the old value of the next change that is told of it: nobody overwrites it unseen
//! (bug-history 14). A leaf that loses its Dirty state has told the host before its task releases mmu_lock (up to 6.12). A write to a page of a slot that logs is marked in the log, or was returned by a call that
//! ended after it: asked at quiet points. No write-back reaches a released frame. A gfn that was write-protected has no W in any tree, nor may the fast fault give it.
//!
//! **Mechanism.** Three books: bits by leaf, from marks that were told and not yet seen in a change; write-backs owed by task and frame; guest writes by page since the log that covered them was
//! returned. A call that returns a page's mark covers each write to it until then: user space copies the page afterwards. The first and the third need the true order of events and all of them
//! (simulation); the frames' owner tags hold anywhere.
//!
//! **What it cannot see.** A mark on a leaf whose table a *shared* zap has unlinked: a new leaf may stand at the same place, so the book forgets what is below. Accessed, which may be lost.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;

use tdpmmu_platform::{Event, NO_TASK};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{index, span};

use crate::model::Key;
use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

/// A guest's write that no log has covered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingWrite {
    /// Address space of the vCPU.
    pub as_id: u8,
    /// The page.
    pub gfn: u64,
    /// The vCPU's task.
    pub task: u32,
}

type Place = (u32, u64, u8);

/// See the module text.
pub struct DirtyBook {
    rules: Rules,
    /// Bits that were set without mmu_lock, and by whom.
    marks: BTreeMap<Place, (u64, u32)>,
    dead: HashSet<u32>,
    /// Live shadow pages: their places are (page, index of the entry, level).
    shadow: HashSet<u32>,
    owed: HashMap<u32, Vec<(u64, u32, u64)>>,
    vm_writes_back: bool,
    logged: Vec<(u8, Range<u64>)>,
    pending: BTreeMap<(u8, u64), u32>,
    taken: HashMap<u32, BTreeSet<(u8, u64)>>,
    /// What rings hold: bitmaps are read at the check.
    ringed: BTreeSet<(u8, u64)>,
    /// Where accesses are told by virtual page: the gfn of each frame, as faults resolved it last.
    frames: HashMap<u64, u64>,
}

impl DirtyBook {
    /// Nothing written.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            marks: BTreeMap::new(),
            dead: HashSet::new(),
            shadow: HashSet::new(),
            owed: HashMap::new(),
            vm_writes_back: false,
            logged: Vec::new(),
            pending: BTreeMap::new(),
            taken: HashMap::new(),
            ringed: BTreeSet::new(),
            frames: HashMap::new(),
        }
    }

    /// Takes an event of `task` in.
    pub fn event(&mut self, task: u32, event: &Event, verdict: &mut Verdict) {
        match *event {
            Event::VmBegin { writes_back, .. } => {
                self.vm_writes_back = writes_back && self.rules.writes_back && self.rules.in_true_order();
            }
            Event::SpteMarked { root, table, gfn, level, old, new } if self.rules.in_true_order() => {
                let bits = new & !old & (self.rules.format.dirty | self.rules.format.write);
                if bits != 0 && !self.dead.contains(&table) {
                    // Several roots may share a shadow page, and know its entries by different gfns.
                    let shadow = (table, index(gfn, level) as u64, level);
                    let place = if self.shadow.contains(&table) { shadow } else { (root, gfn, level) };
                    let mark = self.marks.entry(place).or_insert((0, task));
                    *mark = (mark.0 | bits, task);
                }
            }
            Event::ShadowAlloc { table, .. } => {
                self.dead.remove(&table);
                self.shadow.insert(table);
            }
            Event::ShadowLeaf { table, index, level, old, new, .. } => {
                self.changed(task, (table, u64::from(index), level), Spte(old), Spte(new), false, verdict);
            }
            Event::ShadowZap { table } => {
                self.shadow.remove(&table);
                self.forget(table);
                self.dead.insert(table);
            }
            Event::TableUnlink { table, .. } => {
                self.dead.insert(table);
            }
            Event::TableAlloc { table, .. } | Event::TableFree { table } => {
                self.dead.remove(&table);
            }
            Event::RootFree { root } => self.forget(root),
            Event::SpteChanged { root, gfn, level, old, new, shared, .. } => {
                self.changed(task, (root, gfn, level), Spte(old), Spte(new), shared, verdict);
            }
            Event::WriteBack { pfn, count, dirty: true } => self.written_back(task, pfn, count),
            Event::Unlock { .. } => self.settle(task, verdict),
            Event::FrameStale { pfn, what } if !what.contains("guest") => {
                let text = format!("{what} reached frame {pfn:#x}, which has another owner by now");
                let owed = "no SPTE maps a frame when it is released".to_owned();
                verdict.unmet(Rule::StaleWriteBack, None, None, text, NO_TASK, owed);
            }
            Event::Resolved { gfn, pfn, .. } if self.rules.virtual_gfns => {
                self.frames.insert(pfn, gfn);
            }
            Event::GuestAccess { as_id, gfn, pfn, write: true, .. } => {
                let gfn = if self.rules.virtual_gfns { self.frames.get(&pfn).copied() } else { Some(gfn) };
                if let Some(gfn) = gfn.filter(|&gfn| self.logs(as_id, gfn)) {
                    self.pending.insert((as_id, gfn), task);
                }
            }
            Event::LogBegin { as_id, start, end, .. } => self.logged.push((as_id, start..end)),
            Event::LogEnd { as_id, start, end } => {
                self.logged.retain(|(space, r)| *space != as_id || r.end <= start || end <= r.start);
                self.pending.retain(|(space, gfn), _| *space != as_id || !(start..end).contains(gfn));
                self.ringed.retain(|(space, gfn)| *space != as_id || !(start..end).contains(gfn));
            }
            Event::DirtyMark { as_id, gfn } => {
                self.ringed.insert((as_id, gfn));
            }
            Event::DirtyTake { as_id, base, mask } => {
                let pages = (0..64).filter(|n| mask >> n & 1 != 0).map(|n| (as_id, base + n));
                for page in pages {
                    self.ringed.remove(&page);
                    self.taken.entry(task).or_default().insert(page);
                }
            }
            Event::LogReturn { .. } => {
                for page in self.taken.remove(&task).unwrap_or_default() {
                    self.pending.remove(&page);
                }
            }
            _ => {}
        }
    }

    /// The marks under `root` are nobody's any more.
    fn forget(&mut self, root: u32) {
        let below: Vec<Place> =
            self.marks.range((root, 0, 0)..=(root, u64::MAX, u8::MAX)).map(|(k, _)| *k).collect();
        for place in below {
            self.marks.remove(&place);
        }
    }

    fn logs(&self, as_id: u8, gfn: u64) -> bool {
        self.logged.iter().any(|(space, gfns)| *space == as_id && gfns.contains(&gfn))
    }

    fn changed(
        &mut self,
        task: u32,
        place: Place,
        old: Spte,
        new: Spte,
        shared: bool,
        verdict: &mut Verdict,
    ) {
        let (root, gfn, level) = place;
        let format = self.rules.format;
        if old.is_leaf(level)
            && let Some((bits, by)) = self.marks.remove(&place)
        {
            let counts = if format.ad_enabled(old) { format.dirty } else { format.write };
            if bits & counts & !old.raw() != 0 {
                let lost = if format.ad_enabled(old) { "Dirty" } else { "W" };
                let what = format!(
                    "{lost} was set at level {level}, and the change {:#x} -> {:#x} has not seen it",
                    old.raw(),
                    new.raw()
                );
                let owed = "an exchange, or a compare-exchange, of a leaf that hardware may mark".to_owned();
                verdict.unmet(Rule::DirtyLost, Some(root), Some(gfn), what, by, owed);
            }
        }
        if old.is_table(level) && shared {
            let to = (root, gfn + span(level), 0);
            let below: Vec<Place> = self
                .marks
                .range((root, gfn, 0)..to)
                .filter(|(at, _)| at.2 < level)
                .map(|(at, _)| *at)
                .collect();
            for at in below {
                self.marks.remove(&at);
            }
        }
        let dirty = |spte: Spte| spte.is_leaf(level) && format.leaf_needs_dirty(spte);
        if self.vm_writes_back && dirty(old) && !dirty(new) {
            self.owed.entry(task).or_default().push((old.pfn(), root, gfn));
        }
    }

    fn written_back(&mut self, task: u32, pfn: u64, count: u64) {
        let paid = |(owed, ..): &(u64, u32, u64)| (pfn..pfn + count).contains(owed);
        if let Some(owed) = self.owed.get_mut(&task)
            && owed.iter().any(paid)
        {
            owed.retain(|debt| !paid(debt));
            return;
        }
        // Told by nobody in particular: it serves whoever owes it.
        self.owed.values_mut().for_each(|owed| owed.retain(|debt| !paid(debt)));
    }

    fn settle(&mut self, task: u32, verdict: &mut Verdict) {
        let Some(owed) = self.owed.remove(&task) else { return };
        if let Some(&(pfn, root, gfn)) = owed.first() {
            let what = format!(
                "mmu_lock was released with {} write-backs owed, among them to frame {pfn:#x}",
                owed.len()
            );
            let promise = format!("frame {pfn:#x} is marked dirty before the unlock");
            verdict.unmet(Rule::WriteBackMissing, Some(root), Some(gfn), what, task, promise);
        }
    }

    /// `gfn` of `as_id` was write-protected at `level` and above: `leaves` of the model that map it, each with whether its root counts.
    pub(crate) fn protected<'a>(
        &self,
        gfn: u64,
        level: u8,
        leaves: impl Iterator<Item = (&'a Key, Spte)>,
        verdict: &mut Verdict,
    ) {
        let format = &self.rules.format;
        let mask = if self.rules.protects_by_w { format.write } else { format.write | format.mmu_writable };
        for (key, leaf) in leaves {
            if key.level >= level && leaf.raw() & mask != 0 {
                let what = format!(
                    "gfn {gfn:#x} was write-protected, and {:#x} at level {} is writable or may become so",
                    leaf.raw(),
                    key.level
                );
                verdict.broken(Rule::WriteTrackLeft, Some(key.root), Some(gfn), what);
            }
        }
    }

    /// Writes that no returned log covers and no ring holds: at a quiet point each must be marked in its slot's bitmap.
    pub fn pending(&self) -> Vec<PendingWrite> {
        let open = self.pending.iter().filter(|(page, _)| !self.ringed.contains(page));
        open.map(|(&(as_id, gfn), &task)| PendingWrite { as_id, gfn, task }).collect()
    }
}
