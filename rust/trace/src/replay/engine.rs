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

use super::judge::{Drift, Step, drifted, lawful};
use super::report::{Births, Checked, Deaths, LISTED_MISMATCHES, Mismatch, StatChecks, Zap};
use super::threads::{Birth, Thread};
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
    /// Changes of a leaf count so far: to know that nothing moved between two points.
    pub(crate) leaf_moves: u64,
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
            leaf_moves: 0,
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
        if let Some(count) = self.vms[vm].leafs.get_mut(level as usize) {
            *count += by;
            self.leaf_moves += 1;
        }
    }

    fn apply(&mut self, c: Change, t: TableId, i: usize) {
        let (old, new) = (Spte(c.old), Spte(c.new));
        let root = self.forest.table(t).root;
        let first = self.forest.table(t).known[i] == Known::Unknown;
        let before = Spte(self.forest.table(t).entries[i]);
        let was_known = self.forest.table(t).known[i] != Known::Unknown;
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
        let removes =
            old.is_present() && (!new.is_present() || (old.is_table(c.level) && new.is_leaf(c.level)));
        if removes {
            let thread = &mut self.threads[c.thread];
            thread.zap_entry(c.level, c.ns, old.is_table(c.level) && new.is_leaf(c.level));
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

    // ---- births ----

    fn link(&mut self, c: &Change, t: TableId, i: usize) {
        let (old, new) = (Spte(c.old), Spte(c.new));
        let pa = new.pfn() << 12;
        let root = self.forest.table(t).root;
        self.check_birth(c, pa);
        let stale = self.forest.table(t).child(i);
        if stale != NONE {
            self.discard(stale);
        }
        if let Some(&other) = self.by_pa.get(&pa) {
            self.retire_recycled(c, pa, other);
            if !self.forest.holds(t) {
                return;
            }
        }
        if self.dead_pa.remove(&pa).is_some() {
            // A kprobe in interrupt context misses some hits, so a missing free_sp proves nothing.
            self.deaths.inferred += 1;
        }
        let level = c.level - 1;
        let child = self.forest.new_table(root, level, c.gfn, pa, self.format.nonpresent, Known::Traced);
        if old.is_leaf(c.level) {
            let f = self.format;
            // NX on a huge leaf is always the mitigation's: TDP maps are executable otherwise.
            let mitigated = !f.is_executable(old);
            let table = self.forest.table_mut(child);
            for k in 0..table.entries.len() {
                table.entries[k] = f.split_child(old, c.level, k, mitigated).0;
            }
            table.known.fill(Known::Split);
            self.leaf_moved(root, level, 512);
        }
        self.by_pa.insert(pa, child);
        self.forest.hang(t, i, child);
        self.release(root, level, c.gfn, c);
    }

    fn check_birth(&mut self, c: &Change, pa: u64) {
        let birth = self.threads[c.thread].birth.take();
        if !self.seen.birth {
            self.births.inferred += 1;
            return;
        }
        let Some(Birth { gfn, level, spt }) = birth else {
            if self.seen.lost || self.seen.blind {
                self.births.inferred += 1;
            } else {
                self.complain(c, "birth", 0, pa, "a table is linked that its thread did not allocate");
            }
            return;
        };
        if (gfn, level) != (c.gfn, c.level - 1) {
            self.complain(
                c,
                "birth",
                gfn,
                c.gfn,
                format!("the table was allocated for gfn {gfn:#x} level {level}"),
            );
            return;
        }
        if let Some(spt) = spt {
            let base = *self.direct_map.get_or_insert(spt.wrapping_sub(pa));
            if spt.wrapping_sub(base) != pa {
                self.complain(
                    c,
                    "birth",
                    spt.wrapping_sub(base),
                    pa,
                    "the table linked is not the one its thread allocated",
                );
                return;
            }
        }
        self.births.traced += 1;
    }

    /// The page of a live table is linked anew: a root page whose end was not recorded, or a contradiction.
    fn retire_recycled(&mut self, c: &Change, pa: u64, other: TableId) {
        if !self.forest.holds(other) {
            self.by_pa.remove(&pa);
            return;
        }
        let root = self.forest.table(other).root;
        if self.forest.roots[root as usize].table == other {
            self.check_empty_root(root, c);
            self.end_root(root);
        } else {
            if !self.seen.lost {
                self.complain(c, "birth", 0, pa, "the page is a table already");
            }
            self.discard(other);
        }
    }

    /// A root comes to life. `known`: its entries are known to be empty.
    pub(crate) fn new_root(&mut self, spt: u64, as_id: u8, level: u8, vm: usize, known: bool) -> RootId {
        let id = self.forest.roots.len() as RootId;
        let knowledge = if known { Known::Traced } else { Known::Unknown };
        let pa = self.direct_map.filter(|_| spt != 0).map_or(0, |base| spt.wrapping_sub(base));
        self.seen.blind |= !known;
        self.forest.roots.push(Root { spt, as_id, level, table: NONE, vm, live: true, dying: Vec::new() });
        let table = self.forest.new_table(id, level, 0, pa, self.format.nonpresent, knowledge);
        self.forest.roots[id as usize].table = table;
        if pa != 0 {
            self.dead_pa.remove(&pa);
            self.by_pa.insert(pa, table);
        }
        if spt != 0 {
            self.roots_by_spt.insert(spt, id);
        }
        self.root_generations += 1;
        self.unclaimed_root_births = self.unclaimed_root_births.saturating_sub(1);
        self.invalidated_since_root = false;
        id
    }

    /// A root has gone; its address may come back as another root or table.
    pub(crate) fn end_root(&mut self, root: RootId) {
        let r = &mut self.forest.roots[root as usize];
        r.live = false;
        let (spt, table) = (r.spt, r.table);
        if self.roots_by_spt.get(&spt) == Some(&root) {
            self.roots_by_spt.remove(&spt);
        }
        self.discard(table);
    }

    /// A table whose content is not known, hung below an entry whose content is not known.
    fn adopt(&mut self, mut t: TableId, mut i: usize, level: u8, gfn: u64) -> (TableId, usize) {
        while self.forest.table(t).level > level {
            let (root, above) = (self.forest.table(t).root, self.forest.table(t).level);
            let base = gfn & !(table_span(above - 1) - 1);
            let child = self.forest.new_table(root, above - 1, base, 0, 0, Known::Unknown);
            self.forest.table_mut(child).adopted = true;
            self.forest.hang(t, i, child);
            (t, i) = (child, index(gfn, above - 1));
        }
        (t, i)
    }

    // ---- deaths ----

    fn unlink(&mut self, c: &Change, t: TableId, i: usize, old: Spte) {
        let mut child = self.forest.table(t).child(i);
        if child == NONE {
            // Its removal will be told entry by entry, so it needs a place.
            let root = self.forest.table(t).root;
            child = self.forest.new_table(root, c.level - 1, c.gfn, old.pfn() << 12, 0, Known::Unknown);
            self.forest.table_mut(child).adopted = true;
        }
        self.forest.unhang(t, i);
        let parent_shared = c.shared;
        let root = self.forest.table(child).root;
        let table = self.forest.table_mut(child);
        table.life = Life::Dying;
        table.shared_removal |= parent_shared == Some(true);
        let complete = table.first_open(self.format.frozen).is_none();
        self.forest.roots[root as usize].dying.push(child);
        self.threads[c.thread].zap_table();
        if complete && self.forest.table(child).prepared {
            self.finish_removal(child, c);
        } else {
            self.threads[c.thread].removal.push(child);
        }
    }

    /// Its remover has turned to something else: the removal must be complete.
    fn finish_removal(&mut self, id: TableId, c: &Change) {
        if !self.forest.holds(id) {
            return;
        }
        let table = self.forest.table(id);
        let (level, gfn, pa, prepared, shared) =
            (table.level, table.gfn, table.pa, table.prepared, table.shared_removal);
        let frozen = self.format.frozen;
        let unknown = table.adopted || table.known.contains(&Known::Unknown);
        let present = table.entries.iter().position(|&e| Spte(e).is_present());
        let open = if shared { table.first_open(frozen) } else { None };
        let at = Change { gfn, level, ..*c };
        if !unknown && !self.seen.lost {
            if let Some(k) = present {
                let value = self.forest.table(id).entries[k];
                let rule =
                    format!("the table at gfn {gfn:#x} was removed, but its entry {k} is still present");
                self.complain(&at, "removal", self.format.frozen, value, rule);
            } else if let Some(k) = open {
                let value = self.forest.table(id).entries[k];
                let rule =
                    format!("removal under the shared lock freezes every entry, but entry {k} was not");
                self.complain(&at, "removal", self.format.frozen, value, rule);
            }
            if self.seen.prepare && !prepared {
                self.complain(&at, "death", 1, 0, "a table was removed without kvm_mmu_prepare_zap_page");
            }
        }
        if pa != 0 && self.by_pa.get(&pa) == Some(&id) {
            self.by_pa.remove(&pa);
            self.dead_pa.insert(pa, c.line);
        }
        self.discard(id);
    }

    /// Takes a table out of the books, with everything below it and its leafs.
    fn discard(&mut self, id: TableId) {
        if !self.forest.holds(id) {
            return;
        }
        let (root, level) = (self.forest.table(id).root, self.forest.table(id).level);
        let leafs = self.leafs_below(id);
        for (l, n) in leafs.into_iter().enumerate().filter(|&(_, n)| n > 0) {
            self.leaf_moved(root, l as u8, -n);
        }
        debug_assert!(level <= 5);
        let mut freed = std::mem::take(&mut self.freed);
        self.forest.drop_table(id, &mut freed);
        for pa in freed.drain(..) {
            if self.by_pa.get(&pa).is_some_and(|&t| !self.forest.holds(t)) {
                self.by_pa.remove(&pa);
            }
        }
        self.freed = freed;
        // Ids are used again, so nobody may keep one.
        for k in (0..self.waiting.len()).rev() {
            let (Wait::Value(t, _) | Wait::Seen(t, _)) = self.waiting[k].on else { continue };
            if self.forest.holds(t) {
                continue;
            }
            let Some(Waiting { change, on }) = self.waiting.remove(k) else { continue };
            if matches!(on, Wait::Value(..)) && !change.fast {
                self.complain(
                    &change,
                    "old_value",
                    0,
                    change.old,
                    "the entry's table was removed before its value came",
                );
            }
        }
        for thread in &mut self.threads {
            thread.removal.retain(|&t| self.forest.holds(t));
            thread.last = thread.last.filter(|l| self.forest.holds(l.0));
        }
    }

    fn leafs_below(&self, id: TableId) -> [i64; 4] {
        let mut sum = [0; 4];
        let mut todo = vec![id];
        while let Some(t) = todo.pop() {
            let table = self.forest.table(t);
            for i in 0..table.entries.len() {
                let known = table.known[i] != Known::Unknown;
                if known && Spte(table.entries[i]).is_leaf(table.level) && table.level <= 3 {
                    sum[table.level as usize] += 1;
                }
                if table.child(i) != NONE {
                    todo.push(table.child(i));
                }
            }
        }
        sum
    }

    /// The thread does something else: whatever it was removing must be complete.
    pub(crate) fn end_removals(&mut self, c: &Change) {
        while let Some(top) = self.threads[c.thread].removal.pop() {
            self.finish_removal(top, c);
        }
    }

    /// `free_sp`: the grace period of a removed table or root is over.
    pub(crate) fn freed(&mut self, spt: u64, c: &Change) {
        self.seen.free = true;
        if let Some(&root) = self.roots_by_spt.get(&spt) {
            self.check_empty_root(root, c);
            self.end_root(root);
            self.deaths.traced += 1;
            return;
        }
        let Some(base) = self.direct_map else {
            self.deaths.unmatched += 1;
            return;
        };
        let pa = spt.wrapping_sub(base);
        if self.dead_pa.remove(&pa).is_some() {
            self.deaths.traced += 1;
            return;
        }
        match self.by_pa.get(&pa).copied().filter(|&t| self.forest.holds(t)) {
            Some(t) if self.forest.table(t).life == Life::Dying => {
                self.finish_removal(t, c);
                self.dead_pa.remove(&pa);
                self.deaths.traced += 1;
            }
            Some(t) => {
                let at = Change { gfn: self.forest.table(t).gfn, level: self.forest.table(t).level, ..*c };
                if !self.seen.lost {
                    self.complain(&at, "death", 0, pa, "a table was freed that is still linked");
                }
                self.discard(t);
            }
            None => self.deaths.unmatched += 1,
        }
    }

    fn check_empty_root(&mut self, root: RootId, c: &Change) {
        let id = self.forest.roots[root as usize].table;
        if !self.forest.holds(id) || self.seen.lost {
            return;
        }
        let table = self.forest.table(id);
        let known = |k: usize| table.known[k] != Known::Unknown;
        if let Some(k) = (0..table.entries.len()).find(|&k| known(k) && Spte(table.entries[k]).is_present()) {
            let (value, level) = (table.entries[k], table.level);
            let at = Change { gfn: k as u64 * span(level), level, ..*c };
            self.complain(
                &at,
                "death",
                self.format.nonpresent,
                value,
                "a root was freed with a present entry",
            );
        }
    }

    /// `kvm_mmu_prepare_zap_page`: before (7.2) or after (older) the entry's own event.
    pub(crate) fn prepare(&mut self, thread: usize, gfn: u64, level: u8) {
        if let Some(&top) = self.threads[thread].removal.last() {
            let table = self.forest.table_mut(top);
            if (table.level, table.gfn) == (level, gfn) {
                table.prepared = true;
                self.seen.prepare = true;
                return;
            }
        }
        let root = self.threads[thread].root.or(self.threads[thread].guessed_root);
        if let Some(root) = root.filter(|&r| self.forest.roots[r as usize].live)
            && let Found::Entry(t, _) = self.forest.find(root, level, gfn)
            && self.profile.children_before_parent_events
        {
            self.forest.table_mut(t).prepared = true;
            self.seen.prepare = true;
        }
    }

    // ---- waiting ----

    fn wait(&mut self, c: Change, on: Wait) {
        self.waiting.push_back(Waiting { change: c, on });
        if self.waiting.len() > WAITING {
            self.expire_first();
        }
    }

    pub(crate) fn anything_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Judges what has waited long enough. `now` in ns; `u64::MAX` for everything.
    pub(crate) fn expire(&mut self, now: u64) {
        while let Some(first) = self.waiting.front() {
            if now != u64::MAX && first.change.ns.saturating_add(WINDOW_NS) > now {
                break;
            }
            self.expire_first();
        }
    }

    fn expire_first(&mut self) {
        let Some(Waiting { change: c, on }) = self.waiting.pop_front() else { return };
        match on {
            Wait::Value(t, i) => {
                if let Some(why) = self.explain(&c, t, i) {
                    self.accept(c, t, i, why);
                } else {
                    let expected = self.forest.table(t).entries[i];
                    if self.forest.table(t).known[i] == Known::Blind {
                        // It may be the line that belongs before the first one seen of this entry.
                        self.checked.unknown += u64::from(!c.fast);
                        let table = self.forest.table_mut(t);
                        table.known[i] = Known::Unknown;
                        return;
                    }
                    if c.fast {
                        self.complain(
                            &c,
                            "old_value",
                            expected,
                            c.old,
                            "the fast page fault found another value",
                        );
                        return;
                    }
                    self.complain(
                        &c,
                        "old_value",
                        expected,
                        c.old,
                        "the old value is not the one that was left here",
                    );
                    self.apply(c, t, i);
                }
                self.retry(t, i, None);
            }
            Wait::Seen(t, i) => {
                if !self.saw(&c, t, i) {
                    let expected = self.forest.table(t).entries[i];
                    self.complain(&c, "observation", expected, c.new, "kvm_mmu_set_spte shows another value");
                }
            }
            Wait::Table(_) if c.fast => self.fast_unplaced += 1,
            Wait::Table(_) => self.force_table(c),
        }
    }

    /// The path to the entry never came: report it once, and make one so that what follows has a place.
    fn force_table(&mut self, c: Change) {
        let Some(root) = self.threads[c.thread].root.or_else(|| self.choose_root(&c)) else {
            self.complain(&c, "no_table", 0, c.new, "no root is known in this address space");
            return;
        };
        if !self.forest.roots[root as usize].live {
            self.complain(&c, "no_table", 0, c.new, "the root has been freed");
            return;
        }
        match self.forest.find(root, c.level, c.gfn) {
            Found::Missing => {}
            found => return self.put(c, root, found),
        }
        self.complain(&c, "no_table", 0, c.old, "no table is linked for this entry");
        let table = self.forest.roots[root as usize].table;
        if self.forest.roots[root as usize].level < c.level {
            return;
        }
        let mut t = table;
        loop {
            let (level, i) = (self.forest.table(t).level, index(c.gfn, self.forest.table(t).level));
            if level <= c.level {
                break;
            }
            match self.forest.table(t).child(i) {
                NONE => {
                    self.adopt(t, i, c.level, c.gfn);
                    break;
                }
                child => t = child,
            }
        }
        if let Found::Entry(t, i) = self.forest.find(root, c.level, c.gfn) {
            self.apply(c, t, i);
        }
    }

    /// An entry has a new value: what waited for it goes on. `by` is the change that came late, if one did.
    fn retry(&mut self, t: TableId, i: usize, by: Option<&Change>) {
        while !self.waiting.is_empty() && self.forest.holds(t) {
            let next = (0..self.waiting.len()).find(|&k| match self.waiting[k].on {
                Wait::Value(wt, wi) => {
                    (wt, wi) == (t, i) && self.explain(&self.waiting[k].change, t, i).is_some()
                }
                Wait::Seen(wt, wi) => (wt, wi) == (t, i) && self.saw(&self.waiting[k].change, t, i),
                Wait::Table(_) => false,
            });
            let Some(Waiting { change, on }) = next.and_then(|k| self.waiting.remove(k)) else { return };
            if let Wait::Seen(..) = on {
                continue;
            }
            let Some(why) = self.explain(&change, t, i) else { return };
            match by {
                None => self.accept(change, t, i, why),
                Some(by) => self.accept_late(change, t, i, why, by),
            }
        }
    }

    /// A change that stood before the line it follows from. Lines of one thread on one CPU are never swapped.
    fn accept_late(&mut self, c: Change, t: TableId, i: usize, why: Why, by: &Change) {
        if (c.pid, c.cpu) != (by.pid, by.cpu) {
            return self.accept(c, t, i, if c.fast { why } else { Why::Reordered });
        }
        let rule =
            format!("the change it follows from stands later, in line {}, of the same thread", by.line);
        let expected = self.forest.table(t).entries[i];
        self.complain(&c, "old_value", expected, c.old, rule);
        if !c.fast {
            self.apply(c, t, i);
        }
    }

    /// A table has come: what waited for it goes on.
    fn release(&mut self, root: RootId, level: u8, gfn: u64, by: &Change) {
        let covers = |c: &Change| c.level <= level && c.gfn >= gfn && c.gfn - gfn < table_span(level);
        let mut k = 0;
        while k < self.waiting.len() {
            let ours =
                matches!(self.waiting[k].on, Wait::Table(r) if r == root) && covers(&self.waiting[k].change);
            if !ours {
                k += 1;
                continue;
            }
            let change = self.waiting[k].change;
            let place = if change.fast {
                self.fast_place(&change, root)
            } else {
                self.forest.find(root, change.level, change.gfn)
            };
            let Found::Entry(t, i) = place else {
                k += 1;
                continue;
            };
            self.waiting.remove(k);
            match self.explain(&change, t, i) {
                Some(why) => {
                    self.accept_late(change, t, i, why, by);
                    self.retry(t, i, Some(&change));
                    k = 0;
                }
                None => self.waiting.push_back(Waiting { change, on: Wait::Value(t, i) }),
            }
        }
    }

    // ---- fast page faults and observations ----

    fn fast_place(&self, c: &Change, root: RootId) -> Found {
        match self.forest.find_leaf(root, c.gfn) {
            Some((t, i)) => {
                let table = self.forest.table(t);
                let value = Spte(table.entries[i]);
                if value.is_leaf(table.level) && value.pfn() == Spte(c.old).pfn() {
                    Found::Entry(t, i)
                } else {
                    Found::Missing
                }
            }
            None => Found::Missing,
        }
    }

    /// A fast page fault that changed its entry. `c.gfn` is the faulting gfn, of any alignment.
    pub(crate) fn fast_fault(&mut self, mut c: Change) {
        let Some(root) = self.threads[c.thread].root.or(self.threads[c.thread].guessed_root) else {
            self.fast_unplaced += 1;
            return;
        };
        if !self.forest.roots[root as usize].live {
            self.fast_unplaced += 1;
            return;
        }
        match self.fast_place(&c, root) {
            Found::Entry(t, i) => {
                c.level = self.forest.table(t).level;
                c.gfn &= !(span(c.level) - 1);
                self.settle(c, t, i);
            }
            _ => self.wait(c, Wait::Table(root)),
        }
    }

    /// `kvm_mmu_set_spte` read this value from this entry: at that moment, or as the thread had just written it.
    pub(crate) fn observe(&mut self, c: Change, at: u64) {
        let Some(root) = self.threads[c.thread].root else { return };
        if !self.forest.roots[root as usize].live {
            return;
        }
        let gfn = c.gfn & !(span(c.level) - 1);
        let Found::Entry(t, i) = self.forest.find(root, c.level, gfn) else { return };
        let pa = self.forest.table(t).pa;
        if pa != 0
            && self.forest.table(t).life == Life::Linked
            && (pa != at & !0xfff || i as u64 != (at & 0xfff) / 8)
        {
            if !self.seen.lost {
                self.complain(
                    &c,
                    "observation",
                    pa + i as u64 * 8,
                    at,
                    "kvm_mmu_set_spte names another entry",
                );
            }
            return;
        }
        let wrote = self.threads[c.thread].last.filter(|l| (l.0, l.1) == (t, i)).map(|l| l.2);
        // With one vCPU nobody can have used the entry in between; with several, one may have set A and D already.
        let alone = self.faulting_threads < 2 && !self.seen.lost;
        if alone && wrote.is_some_and(|w| w != c.new) {
            let expected = wrote.unwrap_or_default();
            self.complain(
                &c,
                "observation",
                expected,
                c.new,
                "kvm_mmu_set_spte shows another value than its thread has just written",
            );
            return;
        }
        let just_wrote = wrote.is_some_and(|w| drifted(&self.format, c.level, w, c.new).is_some());
        if just_wrote || self.saw(&c, t, i) {
            self.observations += 1;
        } else {
            self.wait(Change { gfn, ..c }, Wait::Seen(t, i));
        }
    }

    fn saw(&self, c: &Change, t: TableId, i: usize) -> bool {
        let table = self.forest.table(t);
        table.known[i] == Known::Unknown
            || drifted(&self.format, table.level, table.entries[i], c.new).is_some()
    }

    // ---- announcements ----

    /// `hcs` announces each change of an entry before the change's own event.
    pub(crate) fn announce(&mut self, c: &Change) {
        if let Some(&(gfn, level, _)) = self.threads[c.thread].announced.last() {
            let nested = c.level < level && c.gfn >= gfn && c.gfn - gfn < span(level);
            if !nested {
                self.threads[c.thread].announced.clear();
                let at = Change { gfn, level, ..*c };
                if !self.seen.lost {
                    self.complain(
                        &at,
                        "announced",
                        0,
                        0,
                        "a change of this entry was announced and has no event",
                    );
                }
            }
        }
        self.threads[c.thread].announced.push((c.gfn, c.level, c.shared == Some(true)));
    }

    fn take_announcement(&mut self, c: &mut Change) {
        let Some((gfn, level, shared)) = self.threads[c.thread].announced.pop() else { return };
        if (gfn, level) != (c.gfn, c.level) {
            self.threads[c.thread].announced.clear();
            if !self.seen.lost {
                self.complain(
                    c,
                    "announced",
                    gfn,
                    c.gfn,
                    format!("the change announced was of gfn {gfn:#x} level {level}"),
                );
            }
            return;
        }
        c.shared = Some(shared);
    }

    // ---- losses ----

    /// Events were lost: nothing that was rebuilt is certain any more.
    pub(crate) fn lose(&mut self) {
        while let Some(Waiting { change, .. }) = self.waiting.pop_front() {
            self.checked.unknown += u64::from(!change.fast);
        }
        self.seen.lost = true;
        for thread in &mut self.threads {
            thread.removal.clear();
            thread.announced.clear();
            thread.birth = None;
            thread.fault = None;
        }
        for root in 0..self.forest.roots.len() {
            for dying in std::mem::take(&mut self.forest.roots[root].dying) {
                self.discard(dying);
            }
        }
        self.forest.for_each_table(|table| table.known.fill(Known::Unknown));
        self.dead_pa.clear();
        for vm in &mut self.vms {
            vm.leafs = [0; 4];
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
