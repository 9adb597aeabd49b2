//! The shadow MMU by its reports: the life of each shadow page, who may still read it, and how far a zap has come.
//!
//! **Guarantee.** Between two allocations of a page it is zapped once, handed to reclamation once, after a flush that was asked for after the zap, and back in the pool after that. Nothing is linked or
//! mapped in a page that is invalid or obsolete: the invariant of I5, for both MMUs. No page comes back to the pool while a lockless walk that had begun before its zap is under way, and no such walk stands on
//! a page in the pool. A fast zap that takes everything returns when each page that it met is zapped; it checks for a yield after a bounded number of pages, and after a yield it zaps ten before the next.
//! No frame is released while a shadow leaf maps it.
//!
//! **Mechanism.** A state per page:
//!
//! ```text
//! FREE --ShadowAlloc--> LIVE --ShadowZap--> ZAPPED --ShadowFree--> HANDED --TableFree--> FREE
//! ```
//! A root that vCPUs hold is zapped once when its time comes, and once more by its last put.
//! Everything but `TableFree` is told under the exclusive lock, so the order of arrival is the order of things on every platform; that it *was* held is part of the judgement (bug-history 25). A page's epoch is
//! the number of toggles before its birth: the MMU's own generation may have one bit. What walks without the lock is told in detail only, in true order.
//!
//! | rule here | in history |
//! | --- | --- |
//! | wrong-lock-mode | 25 |
//! | created-under-invalid | 33 (and 11, in the other MMU) |
//! | step-too-long, zap-progress | 35 |
//! | shadow-life, `shadow_tree.rs` | 36 |
//! | slot-books-gone (`shadow_tree.rs`) | 37 |
//! | freed-under-reader, walked-freed | 44 |
//!
//! **What it cannot see.** Reverse maps, parent lists, unsync bits: `shadow_tree.rs` reads these. Which answer a check for a yield got: that checks are made, and that holds are not too short, is judged, not that a
//! waiter is let in. A section of the epoch library tells nothing: there a walk that stands on a freed page is found, not the free.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tdpmmu_platform::{Event, NO_TASK};
use tdpmmu_shadow::ShadowDesign;
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Role, Spte};

use crate::model::{Key, core, judge_change};
use crate::rule::Rule;
use crate::rules::{Check, Rules};
use crate::verdict::Verdict;

/// Pages that a zap of everything zaps at least between two yields (BATCH_ZAP_PAGES).
const BATCH: u32 = 10;

/// Pages that may be zapped between two checks: a batch, and what one page takes along by recursion (unsync children, nested pages without a parent).
const STEP: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Live,
    Zapped,
    Handed,
}

#[derive(Clone, Debug)]
struct Page {
    state: State,
    as_id: u8,
    gfn: u64,
    level: u8,
    role: u32,
    /// Toggles before its birth.
    epoch: u64,
    birth: u64,
    zapped: Option<(u64, u32)>,
    /// References of vCPUs as a root, and whether there were any when it was zapped.
    refs: u32,
    held: bool,
    links: BTreeSet<(u32, u16)>,
}

/// A leaf as it was told last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ToldLeaf {
    /// Address space.
    pub as_id: u8,
    /// What it translates.
    pub gfn: u64,
    /// Its level.
    pub level: u8,
    /// The entry.
    pub spte: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Work {
    /// Modes of its holds of mmu_lock: shared ones, exclusive ones.
    shared: u32,
    exclusive: u32,
    heard: bool,
    /// Pages zapped since the last check, and told that these were too many.
    step: u32,
    step_told: bool,
    /// Pages zapped in this hold, and in the one before it, of one fast zap.
    hold: u32,
    before: u32,
    /// Its lockless walk: since when, and whether it has stood on a shadow page.
    reads: Option<(u64, bool)>,
}

/// See the module text.
pub struct ShadowBook {
    rules: Rules,
    pages: BTreeMap<u32, Page>,
    leaves: BTreeMap<(u32, u16), ToldLeaf>,
    tasks: HashMap<u32, Work>,
    epoch: u64,
    clock: u64,
    /// When the last flush of everything was asked for that has been delivered.
    flushed: u64,
    open: HashMap<u32, Vec<u64>>,
    /// The fast zap under way: whose, and when it began.
    fast_zap: Option<(u32, u64)>,
    ended: bool,
}

impl ShadowBook {
    /// No pages.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            pages: BTreeMap::new(),
            leaves: BTreeMap::new(),
            tasks: HashMap::new(),
            epoch: 0,
            clock: 0,
            flushed: 0,
            open: HashMap::new(),
            fast_zap: None,
            ended: false,
        }
    }

    /// Takes an event of `task` in; those that are of no concern are ignored.
    pub fn event(&mut self, task: u32, event: &Event, verdict: &mut Verdict) {
        self.clock += 1;
        let at = self.clock;
        match *event {
            Event::ShadowAlloc { table, as_id, gfn, role, level } => {
                self.locked(task, table, gfn, verdict);
                self.alloc(table, (as_id, gfn, role, level), verdict);
            }
            Event::ShadowLink { parent, index, child } => {
                let gfn = self.pages.get(&child).map_or(0, |page| page.gfn);
                self.locked(task, parent, gfn, verdict);
                self.link(parent, index, child, verdict);
            }
            Event::ShadowUnlink { parent, index, child } => {
                let gfn = self.pages.get(&child).map_or(0, |page| page.gfn);
                self.locked(task, parent, gfn, verdict);
                self.unlink(parent, index, child, verdict);
            }
            Event::ShadowLeaf { as_id, table, index, gfn, level, old, new } => {
                self.locked(task, table, gfn, verdict);
                self.leaf((table, index), ToldLeaf { as_id, gfn, level, spte: new }, Spte(old), verdict);
            }
            Event::ShadowZap { table } => {
                let gfn = self.pages.get(&table).map_or(0, |page| page.gfn);
                self.locked(task, table, gfn, verdict);
                self.zapped(task, table, verdict);
            }
            Event::ShadowRoot { root, count } => {
                self.locked(task, root, 0, verdict);
                match self.pages.get_mut(&root) {
                    Some(page) if page.refs.abs_diff(count) == 1 => page.refs = count,
                    other => {
                        let was = other.map(|page| (page.state, page.refs));
                        let what = format!("shadow root {root} has {count} references, it had {was:?}");
                        verdict.broken(Rule::RefsDiffer, Some(root), None, what);
                    }
                }
            }
            Event::ShadowFree { table } => self.handed(table, verdict),
            Event::TableFree { table } => self.freed(table, verdict),
            Event::ShadowToggle { .. } => self.epoch += 1,
            Event::ShadowWalked { .. } => {
                if let Some((_, walks)) = &mut self.tasks.entry(task).or_default().reads {
                    *walks = true;
                }
            }
            Event::RcuEnter => self.tasks.entry(task).or_default().reads = Some((at, false)),
            Event::ReadingBegin { .. } => self.tasks.entry(task).or_default().reads = Some((at, true)),
            Event::RcuLeave | Event::ReadingEnd { .. } => self.tasks.entry(task).or_default().reads = None,
            Event::YieldCheck => {
                let work = self.tasks.entry(task).or_default();
                (work.step, work.step_told) = (0, false);
            }
            Event::Lock { shared } => {
                let work = self.tasks.entry(task).or_default();
                work.heard = true;
                *(if shared { &mut work.shared } else { &mut work.exclusive }) += 1;
                (work.step, work.step_told) = (0, false);
            }
            Event::Unlock { shared, .. } => {
                let work = self.tasks.entry(task).or_default();
                let holds = if shared { &mut work.shared } else { &mut work.exclusive };
                *holds = holds.saturating_sub(1);
                if work.hold != 0 {
                    (work.before, work.hold) = (work.hold, 0);
                }
            }
            Event::FlushBegin { .. } => self.open.entry(task).or_default().push(at),
            Event::FlushEnd { end, .. } => {
                if let Some(begun) = self.open.get_mut(&task).and_then(Vec::pop)
                    && end == u64::MAX
                {
                    self.flushed = self.flushed.max(begun);
                }
            }
            Event::FastZapBegin => {
                let work = self.tasks.entry(task).or_default();
                (work.hold, work.before) = (0, 0);
                self.fast_zap = Some((task, at));
            }
            Event::FastZapEnd => self.fast_zap_end(verdict),
            Event::VmEnd => self.ended = true,
            _ => {}
        }
    }

    /// Shadow pages change under the exclusive lock only.
    fn locked(&self, task: u32, table: u32, gfn: u64, verdict: &mut Verdict) {
        let Some(work) = self.tasks.get(&task).filter(|work| work.heard && work.exclusive == 0) else {
            return;
        };
        let (rule, how) = match work.shared {
            0 => (Rule::ChangedUnlocked, "without mmu_lock"),
            _ => (Rule::WrongLockMode, "with mmu_lock held shared"),
        };
        let what = format!("shadow page {table} was changed {how}");
        verdict.broken(rule, Some(table), Some(gfn), what);
    }

    fn alloc(&mut self, table: u32, made: (u8, u64, u32, u8), verdict: &mut Verdict) {
        let (as_id, gfn, role, level) = made;
        if Role(role).invalid(self.rules.role_layout) {
            let what = format!("shadow page {table} was made with role.invalid set ({role:#x})");
            verdict.broken(Rule::CreatedUnderInvalid, Some(table), Some(gfn), what);
        }
        let page = Page {
            state: State::Live,
            as_id,
            gfn,
            level,
            role,
            epoch: self.epoch,
            birth: self.clock,
            zapped: None,
            refs: 0,
            held: false,
            links: BTreeSet::new(),
        };
        if let Some(was) = self.pages.insert(table, page) {
            let what = format!("shadow page {table} was handed out while {:?}", was.state);
            verdict.broken(Rule::HandedOutTwice, Some(table), Some(gfn), what);
        }
        let told: Vec<_> = self.leaves.range((table, 0)..=(table, u16::MAX)).map(|(at, _)| *at).collect();
        for at in told {
            self.leaves.remove(&at);
        }
    }

    /// May anything be made in `table`?
    fn takes(&self, table: u32, gfn: u64, what: &str, verdict: &mut Verdict) {
        let Some(page) = self.pages.get(&table) else {
            let what = format!("{what} in page {table}, which is no shadow page");
            verdict.broken(Rule::ShadowLife, Some(table), Some(gfn), what);
            return;
        };
        let why = match page.state {
            State::Live if page.epoch == self.epoch => return,
            State::Live => "obsolete",
            State::Zapped | State::Handed => "invalid",
        };
        let what = format!("{what} in shadow page {table} (gfn {:#x}), which is {why}", page.gfn);
        verdict.broken(Rule::CreatedUnderInvalid, Some(table), Some(gfn), what);
    }

    fn link(&mut self, parent: u32, index: u16, child: u32, verdict: &mut Verdict) {
        let gfn = self.pages.get(&child).map_or(0, |page| page.gfn);
        self.takes(parent, gfn, "a table was linked", verdict);
        match self.pages.get_mut(&child) {
            Some(page) if page.state == State::Live => {
                if !page.links.insert((parent, index)) {
                    let what = format!("shadow page {child} was linked twice at entry {index} of {parent}");
                    verdict.broken(Rule::LinkedTwice, Some(child), Some(gfn), what);
                }
            }
            other => {
                let state = other.map(|page| page.state);
                let what = format!("shadow page {child} was linked below {parent} while {state:?}");
                verdict.broken(Rule::ShadowLife, Some(child), Some(gfn), what);
            }
        }
    }

    fn unlink(&mut self, parent: u32, index: u16, child: u32, verdict: &mut Verdict) {
        let page = self.pages.get_mut(&child);
        if !page.is_some_and(|page| page.links.remove(&(parent, index))) {
            let what =
                format!("shadow page {child} was unlinked from entry {index} of {parent}, where it was not");
            verdict.broken(Rule::UnlinkedTwice, Some(child), None, what);
        }
    }

    fn leaf(&mut self, at: (u32, u16), leaf: ToldLeaf, old: Spte, verdict: &mut Verdict) {
        let (format, new) = (&self.rules.format, Spte(leaf.spte));
        let key = Key { as_id: leaf.as_id, root: at.0, gfn: leaf.gfn, level: leaf.level };
        let mut found = Verdict::default();
        judge_change(&self.rules, key, old, new, &mut found);
        found.violations().iter().for_each(|one| {
            verdict.broken(one.rule, one.root, one.gfn, one.what.clone());
        });
        if new.is_leaf(leaf.level) && !old.is_leaf(leaf.level) {
            self.takes(at.0, leaf.gfn, "a leaf was made", verdict);
        }
        let was = self.leaves.get(&at).map_or(format.empty(), |told| Spte(told.spte));
        // One entry's reports are all made under the exclusive lock: each begins where the last ended, but for what hardware and the fast fault add.
        let same = core(format, leaf.level, was.raw()) == core(format, leaf.level, old.raw());
        if (was.is_present() || old.is_present()) && !same {
            let what = format!(
                "entry {} of shadow page {} went from {:#x}, the last report left {:#x}",
                at.1,
                at.0,
                old.raw(),
                was.raw()
            );
            verdict.broken(Rule::BrokenHistory, Some(at.0), Some(leaf.gfn), what);
        }
        if new.is_present() {
            self.leaves.insert(at, leaf)
        } else {
            self.leaves.remove(&at)
        };
    }

    fn zapped(&mut self, task: u32, table: u32, verdict: &mut Verdict) {
        let at = self.clock;
        match self.pages.get_mut(&table) {
            Some(page)
                if page.state == State::Live
                    || page.state == State::Zapped && page.held && page.refs == 0 =>
            {
                page.held = page.state == State::Live && page.refs != 0;
                (page.state, page.zapped) = (State::Zapped, Some((at, task)));
                if let Some((parent, index)) = page.links.first() {
                    let what =
                        format!("shadow page {table} was zapped and is linked at entry {index} of {parent}");
                    verdict.broken(Rule::FreedWhileLinked, Some(table), Some(page.gfn), what);
                }
                if let Some((_, leaf)) = self.leaves.range((table, 0)..=(table, u16::MAX)).next() {
                    let what = format!("shadow page {table} was zapped and maps {:#x}", leaf.spte);
                    verdict.broken(Rule::FreedUnzapped, Some(table), Some(leaf.gfn), what);
                }
            }
            other => {
                let what = match other {
                    Some(page) => format!("shadow page {table} was zapped while {:?}", page.state),
                    None => format!("page {table} was zapped, which is no shadow page"),
                };
                verdict.broken(Rule::ShadowLife, Some(table), None, what);
            }
        }
        self.worked(task, table, verdict);
    }

    /// One page more is zapped.
    fn worked(&mut self, task: u32, table: u32, verdict: &mut Verdict) {
        let design = self.rules.shadow;
        let in_fast_zap = self.fast_zap.is_some_and(|(by, _)| by == task);
        let Some(work) = self.tasks.get_mut(&task) else { return };
        work.step += 1;
        // S0 without lock-break makes no checks, and says so: `shadow-walk`, and `shadow-slot` where there is no slot to go by.
        let unbroken = design == ShadowDesign::Walk || design == ShadowDesign::Slot && in_fast_zap;
        let checks = !unbroken && self.rules.check == Check::Full && !self.ended;
        if checks && work.step > STEP && !std::mem::replace(&mut work.step_told, true) {
            let what = format!("more than {STEP} shadow pages zapped since the last reschedule check");
            let owed = format!("a reschedule check after each batch of {BATCH} pages");
            verdict.unmet(Rule::StepTooLong, Some(table), None, what, task, owed);
        }
        if in_fast_zap && design == ShadowDesign::Gen {
            let short = std::mem::take(&mut work.before);
            if (1..BATCH).contains(&short) {
                let what = format!("the zap gave mmu_lock up after {short} pages, and had more to do");
                let owed = format!("{BATCH} pages between two yields");
                verdict.unmet(Rule::ZapProgress, Some(table), None, what, task, owed);
            }
            work.hold += 1;
        }
    }

    fn handed(&mut self, table: u32, verdict: &mut Verdict) {
        let (flushed, ended) = (self.flushed, self.ended);
        match self.pages.get_mut(&table) {
            Some(page) if page.state == State::Zapped && page.refs == 0 => {
                page.state = State::Handed;
                let zapped = page.zapped.unwrap_or((0, NO_TASK));
                if flushed < zapped.0 && !ended {
                    let what = format!(
                        "shadow page {table} was given to be freed, and nothing was flushed since its zap"
                    );
                    let owed = format!("a flush of everything after the zap of page {table}");
                    verdict.unmet(Rule::FreedUnflushed, Some(table), Some(page.gfn), what, zapped.1, owed);
                }
            }
            other => {
                let what = match other {
                    Some(page) => format!("shadow page {table} was given to be freed while {:?}", page.state),
                    None => format!("page {table} was given to be freed as a shadow page, and is none"),
                };
                verdict.broken(Rule::ShadowLife, Some(table), None, what);
            }
        }
    }

    fn freed(&mut self, table: u32, verdict: &mut Verdict) {
        let Some(page) = self.pages.remove(&table) else { return };
        if page.state != State::Handed {
            let rule = if page.links.is_empty() { Rule::ShadowLife } else { Rule::FreedWhileLinked };
            let what = format!("shadow page {table} went back to the pool while {:?}", page.state);
            verdict.broken(rule, Some(table), Some(page.gfn), what);
        }
        let Some((zapped, by)) = page.zapped else { return };
        let reader = self.tasks.iter().filter_map(|(&task, work)| {
            work.reads.filter(|&(since, walks)| walks && since < zapped).map(|_| task)
        });
        if let Some(reader) = reader.min() {
            let what =
                format!("shadow page {table} was freed while task {reader} walks, since before its zap");
            let owed = format!("after the zap of page {table}, every walk that is under way ends");
            verdict.unmet(Rule::FreedUnderReader, Some(table), Some(page.gfn), what, by, owed);
        }
    }

    fn fast_zap_end(&mut self, verdict: &mut Verdict) {
        let Some((_, begun)) = self.fast_zap.take() else { return };
        // A deletion under `shadow-slot` is no fast zap; what is, has no slot to go by and zaps everything.
        let all = self.rules.shadow != ShadowDesign::GenKept;
        let mut left = self.pages.iter().filter(|(_, page)| page.state == State::Live && page.birth < begun);
        if let Some((&table, page)) = left.next().filter(|_| all) {
            let what = format!(
                "the fast zap returned and {} shadow pages that it met are not zapped, among them {table} (level {})",
                1 + left.count(),
                page.level
            );
            verdict.broken(Rule::FastZapLeft, Some(table), Some(page.gfn), what);
        }
    }

    /// May a vCPU use translations of shadow page `table`, with no request to reload pending?
    pub fn in_use(&self, table: u32) -> bool {
        self.pages.get(&table).is_some_and(|page| page.state == State::Live && page.epoch == self.epoch)
    }

    /// Leaves as they were told, by page and entry.
    pub(crate) fn told_leaves(&self) -> &BTreeMap<(u32, u16), ToldLeaf> {
        &self.leaves
    }

    /// Pages that are live or zapped: those that the MMU must know of, with address space, gfn, role and whether they are obsolete.
    pub(crate) fn told_pages(&self) -> impl Iterator<Item = (u32, (u8, u64, u32), bool, bool)> {
        let known = self.pages.iter().filter(|(_, page)| page.state != State::Handed);
        known.map(|(&table, page)| {
            let obsolete = page.epoch != self.epoch;
            (table, (page.as_id, page.gfn, page.role), obsolete, page.state == State::Zapped)
        })
    }

    /// Is `table` a shadow page?
    pub fn knows(&self, table: u32) -> bool {
        self.pages.contains_key(&table)
    }

    /// Leaves as they were told, the page in the place of the root.
    pub(crate) fn leaves(&self) -> Vec<(Key, Spte)> {
        let of = |(&(root, _), leaf): (&(u32, u16), &ToldLeaf)| {
            let ToldLeaf { as_id, gfn, level, spte } = *leaf;
            (Key { as_id, root, gfn, level }, Spte(spte))
        };
        self.leaves.iter().map(of).collect()
    }

    /// A frame that a leaf maps was released.
    pub(crate) fn released(&self, pfn: u64, count: u64, verdict: &mut Verdict) {
        let hit = self.leaves.iter().find(|(_, leaf)| {
            let first = Spte(leaf.spte).pfn() & !(span(leaf.level) - 1);
            Spte(leaf.spte).is_leaf(leaf.level) && first < pfn + count && pfn < first + span(leaf.level)
        });
        if let Some((&(table, index), leaf)) = hit {
            let what = format!(
                "frame {pfn:#x} was released while entry {index} of shadow page {table} maps it ({:#x} at level {})",
                leaf.spte, leaf.level
            );
            let owed = "every reverse map of a gfn is zapped before its frame goes".to_owned();
            verdict.unmet(Rule::MappedAfterRelease, Some(table), Some(leaf.gfn), what, NO_TASK, owed);
        }
    }

    /// The end: no page is left.
    pub fn finish(&self, verdict: &mut Verdict) {
        for (table, page) in &self.pages {
            let what =
                format!("shadow page {table} (level {}) never came back: {:?}", page.level, page.state);
            verdict.broken(Rule::TableLeaked, Some(*table), Some(page.gfn), what);
        }
    }
}
