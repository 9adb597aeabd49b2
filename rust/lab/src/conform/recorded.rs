//! What KVM was recorded to do: the comparator's half of a recording.
//!
//! Values are named, not raw: a table by how many were installed at its place before it ([`super::names`]), a root by how many of its address space there were before it.

use std::collections::HashMap;

use tdpmmu_trace::{Event, Head, Mark, Probe, RootArg};

use super::names::{Change, NO_ROOT, NO_TABLE, Names, Place, bits_of, is_table, table_of};

/// An SPTE transition, and who made it.
#[derive(Clone, Copy, Debug)]
pub struct Transition {
    /// Line of the trace.
    pub line: u64,
    /// Thread, an index.
    pub thread: u32,
    /// Operation open in it.
    pub op: u32,
    /// The change.
    pub change: Change,
}

/// A table came, or went.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// Line of the trace.
    pub line: u64,
    /// Thread, an index.
    pub thread: u32,
    /// Operation open in it.
    pub op: u32,
    /// It came; else it was torn down.
    pub birth: bool,
    /// Level of its entries.
    pub level: u8,
    /// First gfn.
    pub gfn: u64,
}

/// KVM's statistics after an operation.
#[derive(Clone, Debug)]
pub struct Stat {
    /// Line of the trace.
    pub line: u64,
    /// The operation.
    pub number: u64,
    /// JSON as it was printed.
    pub json: Vec<u8>,
    /// Workers were zapping, or other operations were open: the numbers were moving.
    pub moving: bool,
}

/// The lines of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// First line.
    pub begin: u64,
    /// Last line.
    pub end: u64,
    /// Thread, an index.
    pub thread: u32,
    /// A vCPU runs in it.
    pub runs: bool,
}

/// See the module text.
#[derive(Default)]
pub struct Recorded {
    /// Every transition, in the order of the lines.
    pub transitions: Vec<Transition>,
    /// Births and deaths of tables.
    pub lives: Vec<Life>,
    /// Statistics.
    pub stats: Vec<Stat>,
    /// Spans of operations.
    pub spans: Vec<Span>,
    /// Threads that serve the zap queue.
    pub workers: Vec<u32>,
    /// Announced losses.
    pub lost: u64,
    /// Tables' births are recorded.
    pub has_births: bool,
    /// Tables' deaths are recorded.
    pub has_deaths: bool,
    names: Names,
    /// Removals of tables that no installation was printed for yet: where, whose frame, index.
    orphans: HashMap<(Place, u64), usize>,
    roots: HashMap<u64, u32>,
    root_counts: [u32; 2],
    current: HashMap<u32, u32>,
    open: HashMap<u64, Span>,
    works: u32,
}

impl Recorded {
    /// Operations that never ended are over with the trace.
    pub(crate) fn close(&mut self) {
        self.spans.extend(std::mem::take(&mut self.open).into_values());
    }

    pub(crate) fn take(&mut self, thread: u32, op: u32, head: &Head<'_>, event: &Event<'_>) {
        let line = head.line;
        match *event {
            Event::SpteChanged { as_id, gfn, level, old, new } => {
                let root = self.current.get(&thread).copied().unwrap_or(NO_ROOT);
                let change = self.names.change(0, root, (as_id, gfn, level), old, new);
                self.transitions.push(Transition { line, thread, op, change });
                self.adopt((as_id, level, gfn), change, old, new);
                // Without the probe of an item's begin, a workqueue's thread that changes entries serves the zap queue: nothing else of KVM's does so there.
                if head.comm.starts_with(b"kworker/") && !self.workers.contains(&thread) {
                    self.workers.push(thread);
                }
            }
            Event::GetPage { page, created: true } => {
                self.has_births = true;
                self.lives.push(Life { line, thread, op, birth: true, level: page.level, gfn: page.gfn });
            }
            Event::PrepareZapPage(page) => {
                self.has_deaths = true;
                self.lives.push(Life { line, thread, op, birth: false, level: page.level, gfn: page.gfn });
            }
            Event::InitSp { sp, sptep: 0, role, .. } => {
                let name = self.new_root(role);
                self.roots.insert(sp, name);
            }
            Event::IterStart { root, .. }
            | Event::ZapRootPass { root, .. }
            | Event::ZapLeafs { root, .. }
            | Event::SplitRoot { root, .. } => self.on_root(thread, root),
            Event::ZapSp { .. } => {
                // Works on one entry, through no walk: it says nothing of the root.
                self.current.insert(thread, NO_ROOT);
            }
            Event::Probe(Probe::ZapRootWork) => {
                if !self.workers.contains(&thread) {
                    self.workers.push(thread);
                }
                self.works += 1;
            }
            Event::Probe(Probe::ZapRootWorkRet) => self.works = self.works.saturating_sub(1),
            Event::Mark(Mark::Begin { number, kind, .. }) => {
                let runs = matches!(kind, b"touch" | b"pre_fault_memory");
                // Operations of one thread follow each other: one without an end is over.
                let over: Vec<u64> =
                    self.open.iter().filter(|(_, span)| span.thread == thread).map(|(&n, _)| n).collect();
                for span in over.iter().filter_map(|n| self.open.remove(n)) {
                    self.spans.push(Span { end: line, ..span });
                }
                self.open.insert(number, Span { begin: line, end: u64::MAX, thread, runs });
            }
            Event::Mark(Mark::End { number, .. }) => {
                if let Some(span) = self.open.remove(&number) {
                    self.spans.push(Span { end: line, ..span });
                }
            }
            Event::Mark(Mark::Stat { number, json }) => {
                let moving = self.works > 0 || !self.open.is_empty();
                self.stats.push(Stat { line, number, json: json.to_vec(), moving });
            }
            _ => {}
        }
    }

    /// An event is printed after its compare-exchange: where vCPUs race, a table's removal can be printed before its installation, and gets its name then.
    fn adopt(&mut self, place: Place, change: Change, old: u64, new: u64) {
        if is_table(change.old, place.1) && table_of(change.old) == NO_TABLE {
            self.orphans.insert((place, table_of(old)), self.transitions.len() - 1);
        }
        if is_table(change.new, place.1)
            && let Some(at) = self.orphans.remove(&(place, table_of(new)))
        {
            let early = &mut self.transitions[at].change;
            early.old = bits_of(early.old) | table_of(change.new) << 12;
        }
    }

    fn new_root(&mut self, role: u32) -> u32 {
        let as_id = usize::from(role >> 24 != 0);
        let n = self.root_counts[as_id];
        self.root_counts[as_id] += 1;
        super::names::root_name(as_id as u8, n)
    }

    fn on_root(&mut self, thread: u32, root: RootArg) {
        // A walk below a table (7.2 looks for the first leaf of one): the root is the one of the walk around it.
        if (1..=3).contains(&(root.role & 0xf)) {
            return;
        }
        let name = match self.roots.get(&root.root) {
            Some(&name) => name,
            // Without births of roots an address may stand for several.
            None => NO_ROOT,
        };
        self.current.insert(thread, name);
    }
}
