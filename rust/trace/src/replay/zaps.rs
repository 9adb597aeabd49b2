//! Which removals belong together, and why they happened.
//!
//! A stretch begins at the event that causes it (the fast zap, the notifier, the worker ...), or, where no such event is
//! recorded, at its first removal; it ends at the event that ends it, or when its thread turns to something else.

use super::report::Zap;
use super::shape::RootShape;
use super::summary::{Known, refine};
use super::tree::RootId;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
pub(crate) struct Stretch {
    pub(crate) cause: &'static str,
    t0: u64,
    last: u64,
    entries: BTreeMap<u8, u64>,
    leafs: u64,
    tables: u64,
    /// The first root that it removed something from.
    pub(crate) root: Option<RootId>,
    /// The trees before their first removal, where they are asked for.
    pub(crate) shapes: Vec<(RootId, RootShape)>,
    starts: u64,
    restarts: u64,
    /// Begun by an event that names the cause.
    pub(crate) named: bool,
}

impl Stretch {
    pub(crate) fn new(cause: &'static str, t0: u64, named: bool) -> Self {
        Self {
            cause,
            t0,
            last: t0,
            entries: BTreeMap::new(),
            leafs: 0,
            tables: 0,
            root: None,
            shapes: Vec::new(),
            starts: 0,
            restarts: 0,
            named,
        }
    }

    pub(crate) fn removed(&mut self, level: u8, t: u64, leaf: bool, root: RootId) {
        *self.entries.entry(level).or_default() += 1;
        self.leafs += u64::from(leaf);
        self.root.get_or_insert(root);
        self.last = self.last.max(t);
    }

    pub(crate) fn table(&mut self) {
        self.tables += 1;
    }

    pub(crate) fn iterated(&mut self, restart: bool) {
        if restart {
            self.restarts += 1;
        } else {
            self.starts += 1;
        }
    }

    /// The finished zap; `None` when nothing was removed, unless the cause is worth a line by itself.
    pub(crate) fn finish(
        &mut self,
        end: Option<u64>,
        pid: u32,
        comm: &str,
        yields_recorded: bool,
        known: Known<'_>,
    ) -> Option<Zap> {
        let telling = matches!(self.cause, "fast_zap" | "worker");
        if self.entries.is_empty() && self.tables == 0 && !telling {
            return None;
        }
        Some(Zap {
            cause: self.cause,
            refined: refine(self.cause, known),
            trigger: known.operation.map(|o| o.split(':').next().unwrap_or(o).to_owned()),
            vm: None,
            t0_ns: self.t0,
            duration_ns: end.unwrap_or(self.last).max(self.last).saturating_sub(self.t0),
            pid,
            comm: comm.to_owned(),
            entries: std::mem::take(&mut self.entries),
            leafs: self.leafs,
            tables: self.tables,
            yields: yields_recorded.then(|| self.restarts.saturating_sub(self.starts)),
        })
    }
}
