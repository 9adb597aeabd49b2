//! The replay itself: each event against the rebuilt tables.
//!
//! # Guarantee
//! Every SPTE change is counted once under exactly one heading of [`Checked`](super::report::Checked), and a change that
//! no heading explains is a mismatch. The explanations are the untraced writes of a real kernel and nothing wider:
//!
//! * *hardware* adds A, or A and D under W;
//! * *the fast page fault* adds W to an MMU-writable leaf. Where the recording holds `fast_page_fault`, the event itself
//!   is a step of the entry's chain and nothing else excuses a new W;
//! * *a silent unfreeze* empties a frozen entry of a live table, in kernels whose atomic zap traces before it flushes (<= 6.9);
//! * *a split's children* have the values computed from the huge leaf;
//! * *reordering*: an event is printed after its cmpxchg, so two threads' lines about one entry can stand swapped. Such an
//!   event waits [`WINDOW_NS`] for the line that leads to it; only a chain that closes is accepted.
//!
//! # Mechanism
//! An event is placed (thread -> root by the last `iter_start`; tables being removed by their remover come first), its old
//! value compared, the step judged, then applied. Tables are checked when they are linked (allocated by this thread, not in
//! use) and when their removal ends (every entry frozen under the shared lock, none present under the exclusive one).

mod losses;
mod tables;
mod telling;
mod waiting;

use super::judge::{Drift, Step, drifted, lawful};
use super::record::Recorded;
use super::report::{Births, Checked, Deaths, LISTED_MISMATCHES, Loss, Mismatch, StatChecks, Zap};
use super::shape::{MOST_SHAPES, Shape};
use super::summary::{Causes, FaultBook, Operations, VmBook};
use super::threads::{Birth, OpenOp, Thread};
use super::tree::{Forest, Found, Known, Life, NONE, Root, RootId, TableId};
use std::collections::{BTreeMap, HashMap, VecDeque};
use tdpmmu_spte::geometry::{index, span, table_span};
use tdpmmu_spte::{AtomicZapOrder, Class, Format, FormatKind, KernelProfile, Spte};

/// How long a change waits for the line that precedes it, in ns. Recorded swaps are some microseconds apart.
pub(crate) const WINDOW_NS: u64 = 20_000_000;
/// Most changes that wait at once; beyond it the oldest are judged as they stand.
const WAITING: usize = 1 << 16;

/// What one change event says, with its place in the recording.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) line: u64,
    pub(crate) ns: u64,
    pub(crate) pid: u32,
    pub(crate) cpu: u32,
    pub(crate) thread: usize,
    pub(crate) as_id: u8,
    pub(crate) gfn: u64,
    pub(crate) level: u8,
    pub(crate) old: u64,
    pub(crate) new: u64,
    /// A fast page fault: a step of the chain, but no SPTE change event.
    pub(crate) fast: bool,
    pub(crate) demand_fault: bool,
    pub(crate) shared: Option<bool>,
}

#[derive(Clone, Copy, Debug)]
enum Wait {
    /// Its old value is not there yet.
    Value(TableId, usize),
    /// Its table is not there yet.
    Table(RootId),
    /// `kvm_mmu_set_spte` saw a value that is not there (yet).
    Seen(TableId, usize),
}

struct Waiting {
    change: Change,
    on: Wait,
}

pub(crate) struct Vm {
    pub(crate) tgid: Option<u32>,
    pub(crate) script: Option<u64>,
    /// Present leafs by level, 1 to 3.
    pub(crate) leafs: [i64; 4],
}

#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) iter_start: bool,
    pub(crate) iter_restart: bool,
    pub(crate) fast_fault: bool,
    pub(crate) birth: bool,
    pub(crate) prepare: bool,
    pub(crate) free: bool,
    pub(crate) create_vm: bool,
    pub(crate) lost: bool,
    pub(crate) blind: bool,
}

pub(crate) struct Engine {
    pub(crate) profile: KernelProfile,
    pub(crate) format: Format,
    pub(crate) format_known: bool,
    pub(crate) forest: Forest,
    pub(crate) roots_by_spt: HashMap<u64, RootId>,
    by_pa: HashMap<u64, TableId>,
    dead_pa: HashMap<u64, u64>,
    /// Kernel address of a table minus its physical address, once known.
    pub(crate) direct_map: Option<u64>,
    pub(crate) threads: Vec<Thread>,
    pub(crate) vms: Vec<Vm>,
    waiting: VecDeque<Waiting>,
    pub(crate) seen: Seen,
    pub(crate) unclaimed_root_births: u64,
    pub(crate) root_generations: u64,
    pub(crate) invalidated_since_root: bool,
    /// A fast page fault inferred before the first event of one: mismatches if one comes.
    tentative: Vec<Mismatch>,
    tentative_count: u64,
    pub(crate) checked: Checked,
    pub(crate) kinds: BTreeMap<&'static str, u64>,
    pub(crate) mismatches: Vec<Mismatch>,
    pub(crate) transitions: u64,
    pub(crate) births: Births,
    pub(crate) deaths: Deaths,
    pub(crate) stats: StatChecks,
    pub(crate) observations: u64,
    pub(crate) fast_unplaced: u64,
    /// Threads that have served a guest's fault.
    pub(crate) faulting_threads: u32,
    pub(crate) zaps: Vec<Zap>,
    /// The root of each zap.
    pub(crate) zap_roots: Vec<Option<RootId>>,
    /// Changes of a leaf count so far: to know that nothing moved between two points.
    pub(crate) leaf_moves: u64,
    /// Leafs by level, over all VMs.
    pub(crate) leafs: [i64; 4],
    pub(crate) book: VmBook,
    pub(crate) faults: FaultBook,
    pub(crate) causes: Causes,
    pub(crate) operations: Operations,
    pub(crate) recorded: Option<Recorded>,
    /// The trees before zaps, where they are asked for.
    pub(crate) shapes: Option<Vec<Shape>>,
    pub(crate) losses: Vec<Loss>,
    /// Mismatches that a loss announced later may still take back.
    recent: VecDeque<losses::Recent>,
    /// Until then lines of before a loss may still come, ns.
    shadow_until: u64,
    /// Whose event is being taken.
    pub(crate) now: usize,
    freed: Vec<u64>,
}

impl Engine {
    pub(crate) fn new(profile: KernelProfile) -> Self {
        Self {
            profile,
            format: profile.format(FormatKind::Npt),
            format_known: false,
            forest: Forest::default(),
            roots_by_spt: HashMap::new(),
            by_pa: HashMap::new(),
            dead_pa: HashMap::new(),
            direct_map: None,
            threads: Vec::new(),
            vms: Vec::new(),
            waiting: VecDeque::new(),
            seen: Seen::default(),
            unclaimed_root_births: 0,
            root_generations: 0,
            invalidated_since_root: false,
            tentative: Vec::new(),
            tentative_count: 0,
            checked: Checked::default(),
            kinds: BTreeMap::new(),
            mismatches: Vec::new(),
            transitions: 0,
            births: Births::default(),
            deaths: Deaths::default(),
            stats: StatChecks::default(),
            observations: 0,
            fast_unplaced: 0,
            faulting_threads: 0,
            zaps: Vec::new(),
            zap_roots: Vec::new(),
            leaf_moves: 0,
            leafs: [0; 4],
            book: VmBook::default(),
            faults: FaultBook::default(),
            causes: Causes::default(),
            operations: Operations::default(),
            recorded: None,
            shapes: None,
            losses: Vec::new(),
            recent: VecDeque::new(),
            shadow_until: 0,
            now: 0,
            freed: Vec::new(),
        }
    }

    // ---- mismatches ----

    fn describe(c: &Change, kind: &'static str, expected: u64, got: u64, rule: String) -> Mismatch {
        Mismatch {
            kind,
            line: c.line,
            t_ns: c.ns,
            pid: c.pid,
            as_id: c.as_id,
            gfn: c.gfn,
            level: c.level,
            expected: format!("{expected:#x}"),
            got: format!("{got:#x}"),
            rule,
        }
    }

    pub(crate) fn report(&mut self, mismatch: Mismatch) {
        self.checked.mismatch += 1;
        *self.kinds.entry(mismatch.kind).or_default() += 1;
        if self.mismatches.len() < LISTED_MISMATCHES {
            self.mismatches.push(mismatch);
        }
    }

    pub(crate) fn complain(
        &mut self,
        c: &Change,
        kind: &'static str,
        expected: u64,
        got: u64,
        rule: impl Into<String>,
    ) {
        // Kinds that stand in place of one of the headings under which a change is counted.
        let heading = !c.fast && matches!(kind, "old_value" | "transition" | "no_table");
        if self.excused(kind) {
            self.checked.unknown += u64::from(heading);
            return;
        }
        self.remember(c.ns, kind, heading);
        self.report(Self::describe(c, kind, expected, got, rule.into()));
    }

    // ---- a change ----

    /// Takes one SPTE change event.
    pub(crate) fn change(&mut self, mut c: Change) {
        self.transitions += 1;
        if !self.format_known {
            self.guess_format(c.level, c.new);
            self.guess_format(c.level, c.old);
        }
        self.take_announcement(&mut c);
        if c.gfn & (span(c.level) - 1) != 0 {
            self.complain(
                &c,
                "transition",
                c.gfn & !(span(c.level) - 1),
                c.gfn,
                "the gfn of an entry must be aligned to its level",
            );
            return;
        }
        if self.adrift(&c) {
            return;
        }
        let Some((root, found)) = self.place(&c) else {
            self.wait(c, Wait::Table(0));
            return;
        };
        self.put(c, root, found);
    }

    fn put(&mut self, c: Change, root: RootId, found: Found) {
        match found {
            Found::Entry(table, i) => self.settle(c, table, i),
            Found::Blind(table, i) => {
                let (table, i) = self.adopt(table, i, c.level, c.gfn);
                self.settle(c, table, i);
            }
            Found::Missing => self.wait(c, Wait::Table(root)),
        }
    }

    fn guess_format(&mut self, level: u8, value: u64) {
        let spte = Spte(value);
        if !spte.is_present() {
            return;
        }
        let ept = if spte.is_leaf(level) { value & 1 << 4 != 0 } else { value & 1 << 5 == 0 };
        let kind = if ept { FormatKind::Ept } else { FormatKind::Npt };
        self.format = self.profile.format(kind);
        self.format_known = true;
    }

    /// The root and the entry that an event of this thread is about.
    fn place(&mut self, c: &Change) -> Option<(RootId, Found)> {
        while let Some(&top) = self.threads[c.thread].removal.last() {
            let table = self.forest.table(top);
            let (root, i) = (table.root, index(c.gfn, c.level));
            let fits = table.level == c.level
                && table.covers(c.gfn)
                && self.forest.roots[root as usize].as_id == c.as_id;
            // Where roots are not told apart, the next zap of another root can look like this removal's next entry.
            let ambiguous = !self.seen.iter_start && fits && self.explain(c, top, i).is_none();
            if fits && !(ambiguous && self.explained_elsewhere(c)) {
                return Some((root, Found::Entry(top, i)));
            }
            self.threads[c.thread].removal.pop();
            self.finish_removal(top, c);
        }
        if let Some(root) = self.threads[c.thread].root
            && self.forest.roots[root as usize].as_id == c.as_id
            && self.forest.roots[root as usize].live
        {
            return Some((root, self.forest.find(root, c.level, c.gfn)));
        }
        self.choose_root(c).map(|root| (root, self.forest.find(root, c.level, c.gfn)))
    }

    /// Could these two be one VM? A thread that no mark has placed yet may belong to any of its process.
    fn same_vm(&self, a: usize, b: usize) -> bool {
        let (a, b) = (&self.vms[a], &self.vms[b]);
        a.tgid == b.tgid && (a.script == b.script || a.script.is_none() || b.script.is_none())
    }

    fn explained_elsewhere(&self, c: &Change) -> bool {
        (0..self.forest.roots.len() as RootId).any(|r| {
            let root = &self.forest.roots[r as usize];
            let there = root.live && root.as_id == c.as_id && self.forest.holds(root.table);
            there && matches!(self.forest.walk(root.table, c.level, c.gfn), Found::Entry(t, i) if self.explain(c, t, i).is_some())
        })
    }

    /// Without `iter_start`: the tree whose entry has the old value; the thread's last one first, then the newest.
    fn choose_root(&mut self, c: &Change) -> Option<RootId> {
        let vm = self.threads[c.thread].vm_if_user();
        let last = self.threads[c.thread].guessed_root;
        let candidates: Vec<RootId> = (0..self.forest.roots.len() as RootId)
            .rev()
            .filter(|&r| {
                let root = &self.forest.roots[r as usize];
                root.live && root.as_id == c.as_id && vm.is_none_or(|vm| self.same_vm(root.vm, vm))
            })
            .collect();
        let ordered = last.into_iter().filter(|l| candidates.contains(l)).chain(candidates.iter().copied());
        let mut fallback = None;
        for root in ordered {
            match self.forest.find(root, c.level, c.gfn) {
                Found::Entry(t, i) => {
                    let explained = self.explain(c, t, i).is_some();
                    if explained {
                        self.threads[c.thread].guessed_root = Some(root);
                        if candidates.len() > 1 && self.another_vm_fits(c, root, &candidates) {
                            self.book.unplaced += 1;
                        }
                        return Some(root);
                    }
                    fallback.get_or_insert(root);
                }
                Found::Blind(..) => return Some(root),
                Found::Missing => {}
            }
        }
        let fresh = c.level >= 4 && self.format.is_empty(Spte(c.old)) && Spte(c.new).is_present();
        let begins = candidates.is_empty()
            || (fresh && (self.invalidated_since_root || self.unclaimed_root_births > 0 || !self.seen.birth));
        if begins && !self.seen.iter_start {
            let known = (self.seen.create_vm || self.unclaimed_root_births > 0) && !self.seen.lost;
            let vm = self.threads[c.thread].vm;
            let level = if c.level == 5 { 5 } else { 4 };
            let root = self.new_root(0, c.as_id, level, vm, known);
            self.threads[c.thread].guessed_root = Some(root);
            return Some(root);
        }
        fallback.or_else(|| candidates.first().copied())
    }

    /// How the entry's value explains the event's old one.
    fn explain(&self, c: &Change, t: TableId, i: usize) -> Option<Why> {
        let table = self.forest.table(t);
        let (value, known) = (table.entries[i], table.known[i]);
        if known == Known::Unknown {
            return Some(Why::Unknown);
        }
        if known == Known::Doubted {
            // It was not touched, or came back to what it was; else nobody knows how it got here.
            return Some(match drifted(&self.format, c.level, value, c.old) {
                Some(Drift::Same) => Why::Same,
                Some(Drift::Hardware) => Why::Hardware,
                Some(Drift::FastFault) | None => Why::Unknown,
            });
        }
        match drifted(&self.format, c.level, value, c.old) {
            Some(Drift::Same) => Some(match known {
                Known::Fast => Why::FastFault,
                Known::Split => Why::Split,
                _ => Why::Same,
            }),
            Some(Drift::Hardware) => Some(Why::Hardware),
            Some(Drift::FastFault) if self.profile.fast_page_fault && !self.seen.fast_fault => {
                Some(Why::Tentative)
            }
            Some(Drift::FastFault) => None,
            None => {
                let silent =
                    known == Known::Frozen && value == self.format.frozen && c.old == self.format.nonpresent;
                silent.then_some(Why::Unfreeze)
            }
        }
    }

    fn settle(&mut self, c: Change, t: TableId, i: usize) {
        match self.explain(&c, t, i) {
            Some(why) => {
                self.accept(c, t, i, why);
                self.retry(t, i, Some(&c));
            }
            None => self.wait(c, Wait::Value(t, i)),
        }
    }

    /// The old value is explained: judge the step, count it, apply it.
    fn accept(&mut self, c: Change, t: TableId, i: usize, why: Why) {
        if c.fast {
            let table = self.forest.table_mut(t);
            (table.entries[i], table.known[i]) = (c.new, Known::Fast);
            return;
        }
        let step = Step { gfn: c.gfn, level: c.level, old: c.old, new: c.new, demand_fault: c.demand_fault };
        let mut lawful = lawful(&self.profile, &self.format, &step);
        if lawful.is_ok() && self.freezes_in_the_open(&c, t) {
            lawful = Err("an empty entry is frozen only where its table is removed");
        }
        match lawful {
            Ok(()) => self.count(&c, why, t, i),
            Err(rule) => self.complain(&c, "transition", c.old, c.new, rule),
        }
        self.apply(c, t, i);
    }

    /// Up to 7.2's order of events, an empty entry of a linked table is never frozen.
    fn freezes_in_the_open(&self, c: &Change, t: TableId) -> bool {
        !self.profile.children_before_parent_events
            && !self.seen.lost
            && self.forest.table(t).life == Life::Linked
            && !self.forest.table(t).adopted
            && c.new == self.format.frozen
            && !Spte(c.old).is_present()
    }

    fn count(&mut self, c: &Change, why: Why, t: TableId, i: usize) {
        let counter = match why {
            Why::Same => &mut self.checked.same,
            Why::Hardware => &mut self.checked.hw_ad,
            Why::FastFault => &mut self.checked.fast_pf,
            Why::Split => &mut self.checked.split_child,
            Why::Unfreeze => &mut self.checked.silent_unfreeze,
            Why::Reordered => &mut self.checked.reordered,
            Why::Unknown => &mut self.checked.unknown,
            Why::Tentative => {
                self.tentative_count += 1;
                if self.tentative.len() < LISTED_MISMATCHES {
                    let expected = self.forest.table(t).entries[i];
                    let rule = "W was added, and no fast_page_fault event tells of it".to_owned();
                    self.tentative.push(Self::describe(c, "old_value", expected, c.old, rule));
                }
                &mut self.checked.fast_pf
            }
        };
        *counter += 1;
    }

    /// The recording does hold fast_page_fault events: what was put down to unseen ones does not stand.
    pub(crate) fn first_fast_fault(&mut self) {
        if self.seen.fast_fault {
            return;
        }
        self.seen.fast_fault = true;
        self.checked.fast_pf -= self.tentative_count;
        let listed = std::mem::take(&mut self.tentative);
        self.checked.mismatch += self.tentative_count - listed.len() as u64;
        self.tentative_count = 0;
        listed.into_iter().for_each(|m| self.report(m));
    }

    fn leaf_moved(&mut self, root: RootId, level: u8, by: i64) {
        let vm = self.forest.roots[root as usize].vm;
        if let Some(sum) = self.leafs.get_mut(level as usize) {
            *sum += by;
            self.book.leaf(root as usize, level, by);
        }
        if let Some(count) = self.vms[vm].leafs.get_mut(level as usize) {
            *count += by;
            self.leaf_moves += 1;
        }
    }

    fn apply(&mut self, c: Change, t: TableId, i: usize) {
        let (old, new) = (Spte(c.old), Spte(c.new));
        let root = self.forest.table(t).root;
        let (known, before) = (self.forest.table(t).known[i], Spte(self.forest.table(t).entries[i]));
        let was_known = known != Known::Unknown;
        // Its first value after a time in the dark: a line of before may still stand after it.
        let first = match known {
            Known::Unknown => true,
            Known::Doubted => before != old || c.ns < self.shadow_until,
            _ => false,
        };
        self.book.transition(root as usize);
        if self.threads[c.thread].fault.is_some() {
            self.book.serves(c.thread, root as usize);
            if new.is_leaf(c.level) && !old.is_leaf(c.level) {
                self.faults.leaf(c.level);
            }
        }
        let removes =
            old.is_present() && (!new.is_present() || (old.is_table(c.level) && new.is_leaf(c.level)));
        if removes {
            let replaced = old.is_table(c.level) && new.is_leaf(c.level);
            if self.shapes.is_some() {
                self.keep_shape(&c, root, replaced);
            }
            let leaf = old.is_leaf(c.level);
            self.threads[c.thread].zap_entry(c.level, c.ns, replaced, leaf, root);
        }
        self.drop_stale_child(t, i, c.level, old);
        if !self.forest.holds(t) {
            return;
        }
        let counted = if was_known { before.is_leaf(c.level) } else { false };
        if counted {
            self.leaf_moved(root, c.level, -1);
        }
        if new.is_leaf(c.level) {
            self.leaf_moved(root, c.level, 1);
        }
        let table = self.forest.table_mut(t);
        (table.entries[i], table.known[i]) = (c.new, if first { Known::Blind } else { Known::Traced });
        if c.new == self.format.frozen {
            let unfreezes = self.profile.atomic_zap_order == AtomicZapOrder::BookkeepingBeforeFlush;
            if table.life == Life::Linked && unfreezes && !self.profile.children_before_parent_events {
                table.known[i] = Known::Frozen;
            }
            // An exclusive removal leaves empty entries alone.
            table.shared_removal |=
                !old.is_present() || (c.shared == Some(true) && table.life == Life::Dying);
        }
        if old.is_table(c.level) && !new.is_table(c.level) {
            self.unlink(&c, t, i, old);
        }
        if new.is_table(c.level) && !old.is_table(c.level) && c.level > 1 {
            self.link(&c, t, i);
        }
        if self.forest.holds(t) {
            self.threads[c.thread].last = Some((t, i, c.new));
        }
    }

    /// The table at this physical address.
    pub(crate) fn page_table(&self, pa: u64) -> Option<TableId> {
        self.by_pa.get(&pa).copied().filter(|&t| self.forest.holds(t))
    }

    /// Removed tables whose freeing was not recorded.
    pub(crate) fn waiting_deaths(&self) -> u64 {
        self.dead_pa.len() as u64
    }

    pub(crate) fn is_mmio(&self, value: u64, level: u8) -> bool {
        self.format.classify(Spte(value), level) == Class::Mmio
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Same,
    Hardware,
    FastFault,
    Split,
    Unfreeze,
    Reordered,
    Unknown,
    /// A fast page fault, if it turns out that the recording has no events of them.
    Tentative,
}
