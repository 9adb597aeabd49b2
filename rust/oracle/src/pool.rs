//! The counting pool: each table linked once, unlinked once, freed once.
//!
//! **Guarantee.** Between two allocations of a page there is at most one link, one unlink after it and one free after that; nothing reachable is
//! freed; at the end [`CountingPool::leaks`] names what is left, with level and gfn.
//!
//! **Mechanism.** A state per page:
//!
//! ```text
//! FREE --alloc--> OWNED --link--> LINKED --unlink--> DEAD --free--> FREE
//!         OWNED --alloc--> OWNED      (a race was lost, the page went back to its cache, or by way of it to the pool: not told)
//!         OWNED --unlink--> EARLY --link--> DEAD
//! ```
//! EARLY: the compare-exchange links, the report follows; a zap that reads the new entry in between tells of the unlink first. The page
//! cannot be *freed* before the report, though: the linker is inside its RCU section until it has told. For the same reason a table may be
//! linked below a dead one (its parent went while it was being linked): the teardown of the parent finds it, or
//! [`CountingPool::check`] does.

use std::collections::{BTreeMap, BTreeSet};

use tdpmmu_platform::Event;

use crate::rule::Rule;
use crate::tree::SeenTable;
use crate::verdict::Verdict;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Owned,
    Linked { parent: u32, index: u16 },
    Root,
    Early,
    Dead,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    state: State,
    level: u8,
    gfn: u64,
}

/// A table that is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leak {
    /// Pool index.
    pub table: u32,
    /// Its level.
    pub level: u8,
    /// Its first gfn.
    pub gfn: u64,
    /// How far it got: `owned`, `linked`, `root`, `dead` (waits for RCU).
    pub state: &'static str,
}

/// See the module text.
#[derive(Default)]
pub struct CountingPool {
    pages: BTreeMap<u32, Page>,
    shadow: BTreeSet<u32>,
}

impl CountingPool {
    /// An empty pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes an event in; those that are not about pages are ignored.
    pub fn event(&mut self, event: &Event, verdict: &mut Verdict) {
        match *event {
            Event::TableAlloc { table, level, gfn } => self.alloc(table, level, gfn, verdict),
            Event::TableLink { table, parent, index } => self.link(table, parent, index, verdict),
            Event::TableUnlink { table, level, gfn } => self.unlink(table, level, gfn, verdict),
            Event::RootAlloc { root, .. } => self.birth(root, verdict),
            Event::RootFree { root } => self.death(root, verdict),
            // One pool serves both MMUs: the life of a shadow page is `shadow.rs`' to judge.
            Event::ShadowAlloc { table, gfn, .. } => self.shadowed(table, gfn, verdict),
            Event::TableFree { table } if self.shadow.remove(&table) => {}
            Event::TableFree { table } => self.free(table, verdict),
            _ => {}
        }
    }

    fn shadowed(&mut self, table: u32, gfn: u64, verdict: &mut Verdict) {
        self.shadow.insert(table);
        if let Some(was) = self.pages.remove(&table)
            && was.state != State::Owned
        {
            let what = format!("table {table} became a shadow page while {:?}", was.state);
            verdict.broken(Rule::HandedOutTwice, None, Some(gfn), what);
        }
    }

    fn alloc(&mut self, table: u32, level: u8, gfn: u64, verdict: &mut Verdict) {
        if self.shadow.contains(&table) {
            let what = format!("table {table} was handed out while it is a shadow page");
            verdict.broken(Rule::HandedOutTwice, None, Some(gfn), what);
        }
        let page = Page { state: State::Owned, level, gfn };
        if let Some(was) = self.pages.insert(table, page)
            && was.state != State::Owned
        {
            verdict.broken(
                Rule::HandedOutTwice,
                None,
                Some(gfn),
                format!("table {table} was handed out while {:?}", was.state),
            );
        }
    }

    fn link(&mut self, table: u32, parent: u32, index: u16, verdict: &mut Verdict) {
        if !self.pages.contains_key(&parent) {
            verdict.broken(
                Rule::UsedAfterUnlink,
                None,
                None,
                format!("table {table} was linked below {parent}, which is free"),
            );
        }
        let Some(page) = self.pages.get_mut(&table) else {
            verdict.broken(Rule::LinkedTwice, None, None, format!("table {table} was linked while free"));
            return;
        };
        match page.state {
            State::Owned => page.state = State::Linked { parent, index },
            State::Early => page.state = State::Dead,
            State::Linked { .. } | State::Root => verdict.broken(
                Rule::LinkedTwice,
                None,
                Some(page.gfn),
                format!("table {table} was linked while {:?}", page.state),
            ),
            State::Dead => verdict.broken(
                Rule::UsedAfterUnlink,
                None,
                Some(page.gfn),
                format!("table {table} was linked again after its unlink"),
            ),
        }
    }

    fn unlink(&mut self, table: u32, level: u8, gfn: u64, verdict: &mut Verdict) {
        let Some(page) = self.pages.get_mut(&table) else {
            verdict.broken(
                Rule::UnlinkedTwice,
                None,
                Some(gfn),
                format!("table {table} was unlinked while free"),
            );
            return;
        };
        if (page.level, page.gfn) != (level, gfn) {
            verdict.broken(
                Rule::HeaderDiffers,
                None,
                Some(gfn),
                format!(
                    "table {table} was made for level {} gfn {:#x} and unlinked at level {level} gfn {gfn:#x}",
                    page.level, page.gfn
                ),
            );
        }
        match page.state {
            State::Owned => page.state = State::Early,
            State::Linked { .. } => page.state = State::Dead,
            State::Root | State::Early | State::Dead => verdict.broken(
                Rule::UnlinkedTwice,
                None,
                Some(gfn),
                format!("table {table} was unlinked while {:?}", page.state),
            ),
        }
    }

    fn birth(&mut self, root: u32, verdict: &mut Verdict) {
        match self.pages.get_mut(&root) {
            Some(page) if page.state == State::Owned => page.state = State::Root,
            other => {
                let state = other.map(|p| p.state);
                verdict.broken(
                    Rule::LinkedTwice,
                    Some(root),
                    None,
                    format!("page {root} became a root while {state:?}"),
                );
            }
        }
    }

    fn death(&mut self, root: u32, verdict: &mut Verdict) {
        match self.pages.get_mut(&root) {
            Some(page) if page.state == State::Root => page.state = State::Dead,
            other => {
                let state = other.map(|p| p.state);
                verdict.broken(
                    Rule::UnlinkedTwice,
                    Some(root),
                    None,
                    format!("page {root} died as a root while {state:?}"),
                );
            }
        }
    }

    fn free(&mut self, table: u32, verdict: &mut Verdict) {
        let page = self.pages.remove(&table);
        let (rule, gfn) = match page {
            Some(Page { state: State::Dead, .. }) => return,
            None => (Rule::FreedTwice, None),
            // Only what was unlinked goes through RCU: it was in there twice, and came back to use in between.
            Some(Page { state: State::Owned, gfn, .. }) => (Rule::FreedTwice, Some(gfn)),
            Some(page) => (Rule::FreedWhileLinked, Some(page.gfn)),
        };
        let was = page.map(|p| p.state);
        verdict.broken(rule, None, gfn, format!("table {table} came back from RCU while {was:?}"));
    }

    /// Linked tables that are no roots.
    pub fn linked(&self) -> u64 {
        self.pages.values().filter(|p| matches!(p.state, State::Linked { .. })).count() as u64
    }

    /// Is `root` alive as a root?
    pub fn is_root(&self, root: u32) -> bool {
        self.pages.get(&root).is_some_and(|p| p.state == State::Root)
    }

    /// Compares with the tables that a full read reached; mmu_lock is held exclusively. Afterwards what is booked as linked
    /// is what was found. `drained`: no page may wait for RCU.
    pub fn check(&mut self, found: &[SeenTable], drained: bool, verdict: &mut Verdict) {
        let found: BTreeMap<u32, &SeenTable> = found.iter().map(|t| (t.table, t)).collect();
        for (&table, page) in &self.pages {
            let Page { state, level, gfn } = *page;
            let reached = found.get(&table);
            match (state, reached) {
                (State::Linked { parent, index }, Some(seen))
                    if seen.parent != Some((parent, index)) || (seen.level, seen.gfn) != (level, gfn) =>
                {
                    verdict.broken(
                        Rule::HeaderDiffers,
                        Some(seen.root),
                        Some(gfn),
                        format!("table {table} is at {seen:?}, it was linked as {page:?}"),
                    );
                }
                (State::Linked { parent, .. }, None) => {
                    // Its parent went away, and nobody took it out: lost for ever.
                    let rule = if self.pages.get(&parent).is_some_and(|p| p.state != State::Dead) {
                        Rule::TableLeaked
                    } else {
                        Rule::UsedAfterUnlink
                    };
                    verdict.broken(
                        rule,
                        None,
                        Some(gfn),
                        format!("table {table} (level {level}) is linked below {parent} and not reachable"),
                    );
                }
                (State::Early, _) => verdict.broken(
                    Rule::UnlinkedTwice,
                    None,
                    Some(gfn),
                    format!("table {table} (level {level}) was unlinked and never linked"),
                ),
                (State::Dead, None) if drained => verdict.broken(
                    Rule::TableLeaked,
                    None,
                    Some(gfn),
                    format!("table {table} (level {level}) was unlinked and not freed after a barrier"),
                ),
                (State::Dead | State::Owned, Some(seen)) => verdict.broken(
                    Rule::UsedAfterUnlink,
                    Some(seen.root),
                    Some(gfn),
                    format!("table {table} (level {level}) is reachable while {state:?}"),
                ),
                _ => {}
            }
        }
        for (table, seen) in found {
            if !self.pages.contains_key(&table) {
                verdict.broken(
                    Rule::UsedAfterUnlink,
                    Some(seen.root),
                    Some(seen.gfn),
                    format!("table {table} (level {}) is reachable and free", seen.level),
                );
            }
        }
    }

    /// Everything that is not free.
    pub fn leaks(&self) -> Vec<Leak> {
        let leak = |(&table, page): (&u32, &Page)| Leak {
            table,
            level: page.level,
            gfn: page.gfn,
            state: match page.state {
                State::Owned => "owned",
                State::Linked { .. } => "linked",
                State::Root => "root",
                State::Early | State::Dead => "dead",
            },
        };
        self.pages.iter().map(leak).collect()
    }

    /// The end, with `taken` pages still out by the pool's count. A page that only a cache holds, or held, is told of by nobody: it is
    /// a leak if the count says that something is missing.
    pub fn finish(&self, taken: u64, verdict: &mut Verdict) {
        for leak in self.leaks() {
            if leak.state != "owned" || taken != 0 {
                verdict.broken(
                    Rule::TableLeaked,
                    None,
                    Some(leak.gfn),
                    format!("table {} (level {}) never came back: {}", leak.table, leak.level, leak.state),
                );
            }
        }
    }
}
