//! The audit of the shadow MMU: what is there, read whole under the exclusive lock, and held against itself, against the memslots and against what was told.
//!
//! **Guarantee.** After [`ShadowView::judge`] without a finding: reverse maps and leaves are one to one; each page's parents are the entries that name it, and each present entry names a page one level below, of the gfn that the
//! entry stands for; hash, active list and reports hold the same pages, and no invalid one is on the list; from a root in use no obsolete or invalid page is reached; nothing is mapped in an invalid page;
//! unsync marks are those of unsync pages; what a page shadows in step with the guest's table cannot be written unseen; lpage_info counts the shadowed tables, and the books exist of every slot that a page refers to; the
//! statistics are a recount.
//!
//! **Mechanism.** [`ShadowView::read`] copies everything into maps; [`ShadowView::judge`] looks at the copy alone, so that a test can damage one. Reverse maps of gfns without a leaf are read in small slots only.
//!
//! **What it cannot see.** Anything between two audits; the guest's own tables, which a page may rightly differ from until the guest flushes. `judge.rs` compares leaves with host and memslots (O-MODEL).

use std::collections::{BTreeMap, BTreeSet};

use tdpmmu_platform::{Exclusive, Guard, Platform, Site};
use tdpmmu_shadow::{PageInfo, ShadowCounts, ShadowDesign, ShadowMmu};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Format, Spte};

use crate::model::core;
use crate::rule::Rule;
use crate::rules::Rules;
use crate::shadow::ShadowBook;
use crate::verdict::Verdict;

/// A page and an index in it.
pub type Place = (u32, u16);

/// Slots of more pages are asked for the reverse maps of gfns that have leaves only.
const SMALL: u64 = 1 << 16;

/// A memslot's books.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// Address space.
    pub as_id: u8,
    /// First gfn.
    pub base: u64,
    /// Pages.
    pub pages: u64,
    /// Reasons against huge pages where there are any, by level and first gfn of the frame.
    pub reasons: BTreeMap<(u8, u64), u32>,
}

impl SlotView {
    fn holds(&self, as_id: u8, gfn: u64) -> bool {
        self.as_id == as_id && (self.base..self.base + self.pages).contains(&gfn)
    }

    /// What alignment alone comes to at the frame of `level` that begins at `gfn`.
    fn alignment(&self, level: u8, gfn: u64) -> u32 {
        let end = self.base + self.pages;
        let ends = |at: u64, last: u64| {
            u32::from(!at.is_multiple_of(span(level)) && last & !(span(level) - 1) == gfn)
        };
        ends(self.base, self.base) + ends(end, end - 1)
    }
}

/// Everything that the shadow MMU holds, at one moment.
#[derive(Clone, Debug, Default)]
pub struct ShadowView {
    /// Pages in the hash or on the active list.
    pub pages: BTreeMap<u32, PageInfo>,
    /// The active list, oldest first.
    pub active: Vec<u32>,
    /// Entries that are not empty.
    pub entries: BTreeMap<Place, Spte>,
    /// The gfn of each leaf.
    pub gfns: BTreeMap<Place, u64>,
    /// Links with an unsync mark.
    pub marks: BTreeSet<Place>,
    /// Reverse maps that are not empty, by address space, gfn and level.
    pub rmaps: BTreeMap<(u8, u64, u8), Vec<Place>>,
    /// The memslots' books.
    pub slots: Vec<SlotView>,
    /// The counters.
    pub counts: ShadowCounts,
}

impl ShadowView {
    /// Reads everything.
    pub fn read<P: Platform>(mmu: &ShadowMmu<P>, guard: &Guard<'_, P, Exclusive>) -> Self {
        let mut view = Self { active: mmu.active_pages(guard), counts: mmu.counts(), ..Self::default() };
        for page in mmu.pages(guard) {
            view.read_page(mmu, guard, &page);
            view.pages.insert(page.table, page);
        }
        let books = mmu.books();
        for slot in books.iter() {
            let mut reasons = BTreeMap::new();
            for level in [2, 3] {
                let first = slot.base & !(span(level) - 1);
                let frames = (first..slot.base + slot.pages).step_by(span(level) as usize);
                // A slot may begin inside of its first frame.
                let counted = frames.map(|gfn| (gfn, slot.lpage.reasons(gfn.max(slot.base), level)));
                reasons.extend(counted.filter(|(_, n)| *n != 0).map(|(gfn, n)| ((level, gfn), n)));
            }
            view.slots.push(SlotView { as_id: slot.as_id, base: slot.base, pages: slot.pages, reasons });
        }
        let mut asked: BTreeSet<(u8, u64, u8)> = BTreeSet::new();
        for (&(table, index), &gfn) in &view.gfns {
            if let Some(page) = view.pages.get(&table) {
                asked.insert((page.as_id, gfn, page.role.level()));
            }
            debug_assert!(usize::from(index) < tdpmmu_spte::ENTRIES);
        }
        for slot in view.slots.iter().filter(|slot| slot.pages <= SMALL) {
            for level in 1..=3 {
                let first = slot.base & !(span(level) - 1);
                let frames = (first..slot.base + slot.pages).step_by(span(level) as usize);
                asked.extend(frames.map(|gfn| (slot.as_id, gfn.max(slot.base), level)));
            }
        }
        for (as_id, gfn, level) in asked {
            let leaves = mmu.rmap_of(guard, as_id, gfn, level);
            if !leaves.is_empty() {
                view.rmaps.insert((as_id, gfn & !(span(level) - 1), level), leaves);
            }
        }
        view
    }

    fn read_page<P: Platform>(
        &mut self,
        mmu: &ShadowMmu<P>,
        guard: &Guard<'_, P, Exclusive>,
        page: &PageInfo,
    ) {
        let level = page.role.level();
        for (index, cell) in mmu.pool().entries(page.table).iter().enumerate() {
            let (spte, at) = (Spte(P::load(cell, Site::SpteRead)), (page.table, index as u16));
            if mmu.format().is_empty(spte) {
                continue;
            }
            self.entries.insert(at, spte);
            if spte.is_leaf(level) {
                self.gfns.insert(at, mmu.gfn_at(guard, at.0, at.1));
            } else if spte.is_table(level) && mmu.unsync_mark(guard, at.0, at.1) {
                self.marks.insert(at);
            }
        }
    }

    /// The leaves: where, of which page, the entry, what it translates.
    pub fn leaves(&self) -> impl Iterator<Item = (Place, &PageInfo, Spte, u64)> {
        let leaf =
            |(at, gfn): (&Place, &u64)| Some((*at, self.pages.get(&at.0)?, *self.entries.get(at)?, *gfn));
        self.gfns.iter().filter_map(leaf)
    }

    /// The links: where, of which page, to which page.
    fn links(&self) -> impl Iterator<Item = (Place, &PageInfo, u64)> {
        let link = |(at, spte): (&Place, &Spte)| {
            let page = self.pages.get(&at.0)?;
            spte.is_table(page.role.level()).then_some((*at, page, spte.pfn()))
        };
        self.entries.iter().filter_map(link)
    }

    /// Looks for everything that is wrong with the view by itself, and by what `book` was told, if it heard everything.
    pub fn judge(&self, rules: &Rules, book: Option<&ShadowBook>, verdict: &mut Verdict) {
        self.judge_pages(rules, verdict);
        self.judge_links(verdict);
        self.judge_rmaps(verdict);
        self.judge_unsync(rules, verdict);
        self.judge_slots(rules, verdict);
        self.judge_counts(rules, verdict);
        if let Some(book) = book {
            self.judge_told(&rules.format, book, verdict);
        }
    }

    /// Does a page count for its slot, by its gfn?
    fn accounts(&self, rules: &Rules, page: &PageInfo) -> bool {
        // The fourth version of the series clears all counts when everything becomes obsolete.
        let cleared = rules.shadow == ShadowDesign::GenKept && page.obsolete;
        !page.role.direct() && !page.invalid && !cleared
    }

    fn judge_pages(&self, rules: &Rules, verdict: &mut Verdict) {
        let mut broken = |page: &PageInfo, what: String| {
            verdict.broken(Rule::PagesDiffer, Some(page.table), Some(page.gfn), what);
        };
        let mut seen = BTreeSet::new();
        let mut newer = false;
        for &table in &self.active {
            let Some(page) = self.pages.get(&table) else {
                let what = format!("page {table} is on the active list, and is no page");
                verdict.broken(Rule::PagesDiffer, Some(table), None, what);
                return;
            };
            if !seen.insert(table) {
                broken(page, format!("shadow page {table} is on the active list twice"));
            }
            if page.invalid {
                broken(page, format!("shadow page {table} is invalid, and on the active list"));
            }
            // First in, first out: a page of this generation is newer than any obsolete one.
            if page.obsolete && newer && rules.shadow == ShadowDesign::Gen {
                broken(page, format!("shadow page {table} is obsolete, and newer than one that is not"));
            }
            newer |= !page.obsolete;
        }
        for page in self.pages.values() {
            let table = page.table;
            if page.listed != seen.contains(&table) || !page.invalid && !page.listed {
                broken(page, format!("shadow page {table} is not on the active list ({page:?})"));
            }
            if !page.in_hash {
                broken(page, format!("shadow page {table} is in no chain of the hash"));
            }
        }
        self.judge_ways(verdict);
    }

    /// What a vCPU may come to from its root.
    fn judge_ways(&self, verdict: &mut Verdict) {
        for root in self.pages.values().filter(|page| page.root_count != 0 && !page.obsolete) {
            let (mut seen, mut open) = (BTreeSet::from([root.table]), vec![root.table]);
            while let Some(at) = open.pop() {
                for (place, _, child) in self.links().filter(|(place, ..)| place.0 == at) {
                    let Some(page) = u32::try_from(child).ok().and_then(|child| self.pages.get(&child))
                    else {
                        continue;
                    };
                    if page.obsolete {
                        let how = if page.invalid { "invalid" } else { "obsolete" };
                        let what = format!(
                            "entry {} of shadow page {} names {child}, which is {how}",
                            place.1, place.0
                        );
                        verdict.broken(Rule::ObsoleteReachable, Some(root.table), Some(page.gfn), what);
                    }
                    if seen.insert(page.table) {
                        open.push(page.table);
                    }
                }
            }
        }
    }

    fn judge_links(&self, verdict: &mut Verdict) {
        let mut named: BTreeMap<u32, Vec<Place>> = BTreeMap::new();
        for (at, page, child) in self.links() {
            let mut broken = |what: String| {
                verdict.broken(Rule::ParentsDiffer, Some(at.0), Some(page.gfn), what);
            };
            let Some(below) = u32::try_from(child).ok().and_then(|child| self.pages.get(&child)) else {
                broken(format!("entry {} of shadow page {} names page {child}, which is none", at.1, at.0));
                continue;
            };
            named.entry(below.table).or_default().push(at);
            let level = page.role.level();
            if below.role.level() + 1 != level || below.as_id != page.as_id {
                broken(format!("entry {} of shadow page {} (level {level}) names {below:?}", at.1, at.0));
            }
            let direct = page.gfn + u64::from(at.1) * span(level);
            if page.role.direct() && (!below.role.direct() || below.gfn != direct) {
                broken(format!(
                    "entry {} of direct page {} translates {direct:#x}, and names {below:?}",
                    at.1, at.0
                ));
            }
        }
        for page in self.pages.values() {
            let (mut of, mut is) = (page.parents.clone(), named.remove(&page.table).unwrap_or_default());
            of.sort_unstable();
            is.sort_unstable();
            if of != is {
                let what =
                    format!("shadow page {} is named by entries {is:?}, its parents say {of:?}", page.table);
                verdict.broken(Rule::ParentsDiffer, Some(page.table), Some(page.gfn), what);
            }
        }
        for (at, spte) in &self.entries {
            if let Some(page) = self.pages.get(&at.0).filter(|page| page.invalid)
                && spte.is_present()
            {
                let what =
                    format!("entry {} of shadow page {} is {spte:?}, and the page invalid", at.1, at.0);
                verdict.broken(Rule::CreatedUnderInvalid, Some(at.0), Some(page.gfn), what);
            }
        }
    }

    fn judge_rmaps(&self, verdict: &mut Verdict) {
        let mut mapped: BTreeMap<(u8, u64, u8), Vec<Place>> = BTreeMap::new();
        for (at, page, _, gfn) in self.leaves() {
            let level = page.role.level();
            mapped.entry((page.as_id, gfn & !(span(level) - 1), level)).or_default().push(at);
            let direct = page.gfn + u64::from(at.1) * span(level);
            if page.role.direct() && gfn != direct {
                let what = format!("the leaf at entry {} of direct page {} says gfn {gfn:#x}", at.1, at.0);
                verdict.broken(Rule::RmapDiffers, Some(at.0), Some(direct), what);
            }
        }
        let keys: BTreeSet<_> = mapped.keys().chain(self.rmaps.keys()).copied().collect();
        for key in keys {
            let mut is = mapped.remove(&key).unwrap_or_default();
            let mut of = self.rmaps.get(&key).cloned().unwrap_or_default();
            is.sort_unstable();
            of.sort_unstable();
            if is != of {
                let (as_id, gfn, level) = key;
                let what = format!(
                    "gfn {gfn:#x} of address space {as_id} is mapped at level {level} by {is:?}, its reverse map says {of:?}"
                );
                verdict.broken(Rule::RmapDiffers, None, Some(gfn), what);
            }
        }
    }

    fn judge_unsync(&self, rules: &Rules, verdict: &mut Verdict) {
        for (at, page, child) in self.links() {
            let Some(below) = u32::try_from(child).ok().and_then(|child| self.pages.get(&child)) else {
                continue;
            };
            if self.marks.contains(&at) != (below.unsync || below.unsync_children != 0) {
                let what = format!(
                    "the mark of entry {} of shadow page {} is {}, its child {} has unsync {} and {} such below",
                    at.1,
                    at.0,
                    self.marks.contains(&at),
                    below.table,
                    below.unsync,
                    below.unsync_children
                );
                verdict.broken(Rule::UnsyncDiffers, Some(at.0), Some(page.gfn), what);
            }
        }
        for page in self.pages.values() {
            let marks = self.marks.range((page.table, 0)..=(page.table, u16::MAX)).count();
            if marks != page.unsync_children as usize {
                let what =
                    format!("shadow page {} counts {} marks of {marks}", page.table, page.unsync_children);
                verdict.broken(Rule::UnsyncDiffers, Some(page.table), Some(page.gfn), what);
            }
            if page.unsync && (page.role.direct() || page.role.level() != 1 || page.invalid) {
                let what =
                    format!("{page:?} is unsync, which only a valid page of a guest's lowest table may be");
                verdict.broken(Rule::UnsyncDiffers, Some(page.table), Some(page.gfn), what);
            }
        }
        let in_step: BTreeSet<(u8, u64)> = self.tracked().collect();
        for (at, page, leaf, gfn) in self.leaves() {
            let level = page.role.level();
            let first = gfn & !(span(level) - 1);
            let writable = rules.format.is_writable(leaf) || rules.format.is_mmu_writable(leaf);
            let to = (page.as_id, first)..(page.as_id, first + span(level));
            if writable && let Some((_, table)) = in_step.range(to).next() {
                let what = format!(
                    "entry {} of shadow page {} ({:#x} at level {level}) may write gfn {table:#x}, a table that is shadowed",
                    at.1,
                    at.0,
                    leaf.raw()
                );
                verdict.broken(Rule::TrackedWritable, Some(at.0), Some(*table), what);
            }
        }
    }

    /// Gfns, with their address space, that hold a guest's table which a page in use shadows and is in step with.
    pub fn tracked(&self) -> impl Iterator<Item = (u8, u64)> {
        let pages = self.pages.values().filter(|page| !page.role.direct() && !page.obsolete && !page.unsync);
        pages.map(|page| (page.as_id, page.gfn))
    }

    fn judge_slots(&self, rules: &Rules, verdict: &mut Verdict) {
        let slot = |as_id: u8, gfn: u64| self.slots.iter().find(|slot| slot.holds(as_id, gfn));
        for (at, page, leaf, gfn) in self.leaves() {
            if slot(page.as_id, gfn).is_none() {
                let what =
                    format!("entry {} of shadow page {} ({:#x}) maps gfn {gfn:#x}", at.1, at.0, leaf.raw());
                verdict.broken(Rule::SlotBooksGone, Some(at.0), Some(gfn), what);
            }
        }
        let mut shadowed: BTreeMap<(u8, u8, u64), u32> = BTreeMap::new();
        for page in self.pages.values().filter(|page| self.accounts(rules, page)) {
            if slot(page.as_id, page.gfn).is_none() {
                let what =
                    format!("shadow page {} shadows the guest's table in gfn {:#x}", page.table, page.gfn);
                verdict.broken(Rule::SlotBooksGone, Some(page.table), Some(page.gfn), what);
                continue;
            }
            for level in [2, 3] {
                *shadowed.entry((page.as_id, level, page.gfn & !(span(level) - 1))).or_default() += 1;
            }
        }
        for slot in &self.slots {
            for level in [2, 3] {
                let frames: BTreeSet<u64> = slot
                    .reasons
                    .keys()
                    .filter(|key| key.0 == level)
                    .map(|key| key.1)
                    .chain(
                        shadowed.keys().filter(|key| (key.0, key.1) == (slot.as_id, level)).map(|key| key.2),
                    )
                    .chain([slot.base, slot.base + slot.pages - 1].map(|gfn| gfn & !(span(level) - 1)))
                    .collect();
                for gfn in frames {
                    let (first, end) = (gfn.max(slot.base), (gfn + span(level)).min(slot.base + slot.pages));
                    if first >= end {
                        continue;
                    }
                    // Two slots may share a frame: each counts what lies in it.
                    let here = self.pages.values().filter(|page| {
                        self.accounts(rules, page)
                            && page.as_id == slot.as_id
                            && (first..end).contains(&page.gfn)
                    });
                    let is = slot.alignment(level, gfn) + here.count() as u32;
                    let of = slot.reasons.get(&(level, gfn)).copied().unwrap_or(0);
                    if is != of {
                        let what = format!("lpage_info has {of} reasons at level {level}, a recount {is}");
                        verdict.broken(Rule::LpageDiffers, None, Some(gfn), what);
                    }
                }
            }
        }
    }

    fn judge_counts(&self, rules: &Rules, verdict: &mut Verdict) {
        let mut broken = |what: String| verdict.broken(Rule::StatsDiffer, None, None, what);
        let mut leaves = [0u64; 4];
        for (_, page, ..) in self.leaves() {
            leaves[usize::from(page.role.level()).min(3)] += 1;
        }
        if rules.page_stats && self.counts.leaves != leaves {
            broken(format!(
                "shadow leaves by level are {:?} by the statistics, {leaves:?} by a recount",
                self.counts.leaves
            ));
        }
        let living = self.pages.values().filter(|page| !page.invalid || page.root_count != 0).count() as u64;
        let held = self.pages.values().filter(|page| page.invalid && page.root_count != 0).count() as u64;
        let obsolete = self.pages.values().filter(|page| page.listed && page.obsolete).count() as u64;
        for (name, of, is) in [
            ("shadow pages", self.counts.pages, living),
            ("zapped roots that are held", self.counts.zapped_held, held),
            ("obsolete shadow pages", self.counts.obsolete, obsolete),
        ] {
            if of != is {
                broken(format!("{of} {name} by the count, {is} by a recount"));
            }
        }
    }

    fn judge_told(&self, format: &Format, book: &ShadowBook, verdict: &mut Verdict) {
        let mut told = BTreeSet::new();
        for (table, (as_id, gfn, role), obsolete, zapped) in book.told_pages() {
            told.insert(table);
            let Some(page) = self.pages.get(&table) else {
                let what =
                    format!("shadow page {table} was made and not freed, and is neither in hash nor list");
                verdict.broken(Rule::PagesDiffer, Some(table), Some(gfn), what);
                continue;
            };
            if (page.as_id, page.gfn) != (as_id, gfn) || page.role.level() != (role & 0xf) as u8 {
                let what =
                    format!("{page:?} was made for gfn {gfn:#x} of address space {as_id}, role {role:#x}");
                verdict.broken(Rule::HeaderDiffers, Some(table), Some(gfn), what);
            }
            if page.invalid != zapped || page.obsolete != (obsolete || zapped) {
                let what = format!("{page:?} is told as zapped: {zapped}, obsolete: {obsolete}");
                verdict.broken(Rule::PagesDiffer, Some(table), Some(gfn), what);
            }
        }
        for page in self.pages.values().filter(|page| !told.contains(&page.table)) {
            let what = format!("shadow page {} is in hash or list, and free by the reports", page.table);
            verdict.broken(Rule::PagesDiffer, Some(page.table), Some(page.gfn), what);
        }
        let leaves = book.told_leaves();
        for (at, page, leaf, gfn) in self.leaves() {
            let level = page.role.level();
            match leaves.get(&at) {
                Some(one) if (one.gfn, one.level) == (gfn, level) => {
                    if core(format, level, one.spte) != core(format, level, leaf.raw()) {
                        let what = format!(
                            "entry {} of shadow page {} is {:#x}, {:#x} by the reports",
                            at.1,
                            at.0,
                            leaf.raw(),
                            one.spte
                        );
                        verdict.broken(Rule::TreeDiffers, Some(at.0), Some(gfn), what);
                    }
                }
                other => {
                    let what =
                        format!("entry {} of shadow page {} maps gfn {gfn:#x}, told: {other:?}", at.1, at.0);
                    verdict.broken(Rule::TreeDiffers, Some(at.0), Some(gfn), what);
                }
            }
        }
        for (at, one) in leaves {
            if !self.gfns.contains_key(at) {
                let what = format!("entry {} of shadow page {} is no leaf, told: {one:?}", at.1, at.0);
                verdict.broken(Rule::TreeDiffers, Some(at.0), Some(one.gfn), what);
            }
        }
    }
}
