//! The reference model: what every entry of every tree should hold, from the reports alone.
//!
//! **Guarantee.** At a point where mmu_lock is held exclusively, the model holds exactly the entries that the reported changes leave, and
//! [`ReferenceModel::compare`] finds every entry of the tree that differs, both ways. Present entries are counted by root at any time.
//!
//! **Mechanism.** A `BTreeMap` by (address space, root, gfn, level), each entry a [`Chain`](crate::chain) of reports. Four things the
//! engine does without a report, as the kernel does (untraced writes, `docs/rules.md`), and the model knows them:
//!
//! * frozen -> empty, when an atomic zap publishes. The two count as one value, *absent*. A table that was torn down all frozen and another
//!   one, fresh and empty, that takes its place are then one history too, and need no table in the key.
//! * the 512 leaves that a split makes: derived from the huge leaf whose replacement *is* reported.
//! * W set by the fast page fault, A and D set by hardware: tolerated as additions, never as losses; W only on an MMU-writable leaf.
//! * MMIO entries in a table torn down exclusively: they vanish with the report of their table.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tdpmmu_platform::Event;
use tdpmmu_spte::geometry::{ENTRIES, MAX_LEVEL, round_down, span};
use tdpmmu_spte::{Format, Spte};

use crate::chain::{Chain, Edge};
use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

/// Where an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Address space: 1 is SMM.
    pub as_id: u8,
    /// Pool index of the root.
    pub root: u32,
    /// First gfn of the entry.
    pub gfn: u64,
    /// Level of the entry, 1..=5.
    pub level: u8,
}

impl Key {
    /// Is `gfn` below this entry?
    pub fn covers(&self, gfn: u64) -> bool {
        (self.gfn..self.gfn + span(self.level)).contains(&gfn)
    }
}

/// Empty and frozen alike.
const ABSENT: u64 = 0;

/// See the module text.
pub struct ReferenceModel {
    rules: Rules,
    cells: BTreeMap<Key, Chain>,
    /// Entries with reports that wait.
    waiting: BTreeSet<Key>,
    /// Present entries by root.
    present: HashMap<u32, i64>,
    /// Entries that are frozen for a change which is told when it is complete.
    frozen: BTreeSet<Key>,
    /// Level of the roots' entries: the highest that was told.
    top: u8,
}

fn is_present(raw: u64) -> bool {
    Spte(raw).is_present()
}

/// The bits of a present leaf that may change without a report.
fn silent_bits(format: &Format) -> u64 {
    format.accessed | format.dirty | format.write
}

/// What cannot change without a report.
pub(crate) fn core(format: &Format, level: u8, raw: u64) -> u64 {
    let spte = Spte(raw);
    if spte.is_leaf(level) {
        let spte = if format.is_access_tracked(spte) { format.restore_access_track(spte) } else { spte };
        // Whether a small leaf that a split has made may execute depends on the mitigation at that moment, which nobody tells.
        let untold = if level == 1 { format.exec | format.nx } else { 0 };
        spte.raw() & !(silent_bits(format) | untold)
    } else if spte.is_present() {
        raw & !format.accessed
    } else {
        raw
    }
}

/// A huge leaf that became a table has 512 children from the start; no report says so.
fn split_children(rules: &Rules, key: Key, edge: Edge, work: &mut Vec<(Key, Edge)>) {
    let (was, is) = (Spte(edge.from), Spte(edge.to));
    // Whoever split it, a fault or dirty logging: a kernel that zaps first goes through empty.
    if !was.is_leaf(key.level) || !is.is_table(key.level) {
        return;
    }
    // A leaf of a guest's page lacks X for one reason only, the NX mitigation: its small children get it back.
    let mitigated = !rules.format.is_executable(rules.format.restore_access_track(was));
    let level = key.level - 1;
    for index in 0..ENTRIES {
        let child = rules.format.split_child(was, key.level, index, mitigated);
        let gfn = key.gfn + index as u64 * span(level);
        work.push((Key { gfn, level, ..key }, Edge { from: ABSENT, to: child.raw(), shared: true }));
    }
}

/// Is the change legal, whatever was there before?
pub(crate) fn judge_change(rules: &Rules, key: Key, old: Spte, new: Spte, verdict: &mut Verdict) {
    let format = &rules.format;
    let mut broken = |rule, what: String| verdict.broken(rule, Some(key.root), Some(key.gfn), what);
    if !(1..=MAX_LEVEL).contains(&key.level) || round_down(key.gfn, key.level) != key.gfn {
        broken(Rule::MalformedSpte, format!("gfn {:#x} is not aligned to level {}", key.gfn, key.level));
        return;
    }
    if format.is_frozen(old) {
        broken(Rule::FrozenChanged, format!("a frozen entry became {:#x}", new.raw()));
    }
    let (was_leaf, is_leaf) = (old.is_leaf(key.level), new.is_leaf(key.level));
    if was_leaf && is_leaf && old.pfn() != new.pfn() {
        broken(
            Rule::LeafMoved,
            format!("a present leaf went from frame {:#x} to {:#x}", old.pfn(), new.pfn()),
        );
    }
    if is_leaf && let Err(state) = format.write_state(new) {
        broken(Rule::MalformedSpte, format!("{:#x}: {state:?}", new.raw()));
    }
    if is_leaf && !new.pfn().is_multiple_of(span(key.level)) {
        broken(Rule::MalformedSpte, format!("frame {:#x} is not aligned to level {}", new.pfn(), key.level));
    }
    // Hardware sets Accessed in entries of every level.
    let bare = |spte: Spte| spte.raw() & !format.accessed;
    let full = |off: bool| bare(format.table(new.pfn(), off));
    if new.is_table(key.level) && ![full(false), full(true)].contains(&bare(new)) {
        let what = format!("{:#x} at level {} links a table and denies something", new.raw(), key.level);
        broken(Rule::TableProtected, what);
    }
    let reason = format.is_mmio(old) || format.is_mmio(new) || format.is_frozen(new);
    if !old.is_present() && !new.is_present() && !reason {
        broken(Rule::IdleChange, format!("{:#x} became {:#x}", old.raw(), new.raw()));
    }
}

impl ReferenceModel {
    /// An empty model.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            cells: BTreeMap::new(),
            waiting: BTreeSet::new(),
            present: HashMap::new(),
            frozen: BTreeSet::new(),
            top: 0,
        }
    }

    fn normal(&self, raw: u64) -> u64 {
        let spte = Spte(raw);
        if self.rules.format.is_empty(spte) || self.rules.format.is_frozen(spte) { ABSENT } else { raw }
    }

    /// Takes an event in; those that are not about entries are ignored.
    pub fn event(&mut self, event: &Event, verdict: &mut Verdict) {
        match *event {
            Event::SpteChanged { as_id, root, gfn, level, old, new, shared } => {
                let key = Key { as_id, root, gfn, level };
                self.frozen.remove(&key);
                self.top = self.top.max(level);
                judge_change(&self.rules, key, Spte(old), Spte(new), verdict);
                self.push(key, Edge { from: self.normal(old), to: self.normal(new), shared });
            }
            Event::SpteFrozen { as_id, root, gfn, level, .. } => {
                self.frozen.insert(Key { as_id, root, gfn, level });
            }
            // Every change below a root is told before its reporter gives its own reference up, so all are here.
            Event::RootFree { root } => self.forget(root, verdict),
            _ => {}
        }
    }

    fn push(&mut self, key: Key, edge: Edge) {
        if edge.from == edge.to {
            return;
        }
        self.push_all(vec![(key, edge)]);
    }

    fn push_all(&mut self, mut work: Vec<(Key, Edge)>) {
        while let Some((key, edge)) = work.pop() {
            self.cells.entry(key).or_insert_with(|| Chain::new(ABSENT)).push(edge);
            self.advance(key, &mut work);
        }
    }

    /// Takes every report at `key` that fits by now; what follows from them goes to `work`.
    fn advance(&mut self, key: Key, work: &mut Vec<(Key, Edge)>) {
        let format = self.rules.format;
        let Some(chain) = self.cells.get_mut(&key) else { return };
        let mut vanished = false;
        let mut delta = 0;
        loop {
            let before = chain.at();
            let Some(edge) = chain.step(|v| core(&format, key.level, v)) else { break };
            delta += i64::from(is_present(edge.to)) - i64::from(is_present(before));
            split_children(&self.rules, key, edge, work);
            vanished |=
                Spte(edge.from).is_table(key.level) && !Spte(edge.to).is_table(key.level) && !edge.shared;
        }
        let whole = chain.is_whole();
        let gone = chain.at() == ABSENT && whole && !chain.reordered;
        *self.present.entry(key.root).or_default() += delta;
        if whole {
            self.waiting.remove(&key);
        } else {
            self.waiting.insert(key);
        }
        if gone {
            self.cells.remove(&key);
        }
        if vanished {
            let to = Key { gfn: key.gfn + span(key.level), level: 0, ..key };
            let mmio: Vec<Key> = self
                .cells
                .range(Key { level: 0, ..key }..to)
                .filter(|(k, c)| k.level < key.level && c.is_whole() && !is_present(c.at()))
                .map(|(k, _)| *k)
                .collect();
            for key in mmio {
                self.cells.remove(&key);
            }
        }
    }

    /// Present entries under `root`, tables included, as far as reports could be ordered.
    pub fn present_under(&self, root: u32) -> u64 {
        self.present.get(&root).copied().unwrap_or(0).max(0) as u64
    }

    /// Those of them that a walk from the root would come to: not what hangs below an entry that has been taken out, while somebody is still tearing it down.
    pub fn reachable_under(&self, root: u32) -> u64 {
        let present = |key: &Key| {
            !self.frozen.contains(key) && self.cells.get(key).is_some_and(|chain| is_present(chain.at()))
        };
        let mut count = 0;
        for as_id in 0..=1 {
            let reached = |key: &Key| {
                (key.level + 1..=self.top)
                    .all(|level| present(&Key { gfn: round_down(key.gfn, level), level, ..*key }))
            };
            count += self.under(as_id, root).filter(|(key, _)| present(key) && reached(key)).count();
        }
        count as u64
    }

    /// One of the present entries under `root`, for a report.
    pub fn example_under(&self, root: u32) -> Option<(Key, Spte)> {
        (0..=1).find_map(|as_id| {
            self.under(as_id, root).find(|(_, c)| is_present(c.at())).map(|(k, c)| (*k, Spte(c.at())))
        })
    }

    fn under(&self, as_id: u8, root: u32) -> impl Iterator<Item = (&Key, &Chain)> {
        self.cells
            .range(Key { as_id, root, gfn: 0, level: 0 }..)
            .take_while(move |(k, _)| k.as_id == as_id && k.root == root)
    }

    fn forget(&mut self, root: u32, verdict: &mut Verdict) {
        self.settle_root(root, verdict);
        let mut keys = Vec::new();
        for as_id in 0..=1 {
            keys.extend(self.under(as_id, root).map(|(k, _)| *k));
        }
        let mut present = 0;
        let mut first = None;
        for key in keys {
            if let Some(chain) = self.cells.remove(&key)
                && is_present(chain.at())
            {
                present += 1;
                first.get_or_insert((key, chain.at()));
            }
        }
        self.present.remove(&root);
        self.frozen.retain(|key| key.root != root);
        if let Some((key, raw)) = first {
            verdict.broken(
                Rule::FreedUnzapped,
                Some(root),
                Some(key.gfn),
                format!("freed with {present} present entries, among them {raw:#x} at level {}", key.level),
            );
        }
    }

    /// All reports about `key` are in.
    fn settle(&mut self, key: Key, verdict: &mut Verdict) {
        if !self.waiting.remove(&key) {
            return;
        }
        let format = self.rules.format;
        let Some(chain) = self.cells.get_mut(&key) else { return };
        let at = chain.at();
        let (left, balanced) = chain.quiet(|v| core(&format, key.level, v));
        if !balanced && let Some(edge) = left.first() {
            verdict.broken(
                Rule::BrokenHistory,
                Some(key.root),
                Some(key.gfn),
                format!(
                    "at level {} the entry holds {at:#x}, but {} reports do not follow, as {:#x} -> {:#x}",
                    key.level,
                    left.len(),
                    edge.from,
                    edge.to
                ),
            );
        }
        // A round trip leaves the entry where it is, but what it passed through had children.
        let mut work = Vec::new();
        for edge in left {
            split_children(&self.rules, key, edge, &mut work);
        }
        self.push_all(work);
    }

    /// Settles what waits in `keys`, top down: an entry's leftovers may complete its children's histories.
    fn settle_where(&mut self, keys: impl Fn(&Key) -> bool, verdict: &mut Verdict) {
        for level in (1..=MAX_LEVEL).rev() {
            let at_level: Vec<Key> =
                self.waiting.iter().filter(|k| k.level == level && keys(k)).copied().collect();
            for key in at_level {
                self.settle(key, verdict);
            }
        }
    }

    /// All reports about `root` are in.
    pub fn settle_root(&mut self, root: u32, verdict: &mut Verdict) {
        if !self.waiting.is_empty() {
            self.settle_where(|k| k.root == root, verdict);
        }
    }

    /// All reports are in (mmu_lock is held exclusively): puts the rest in order.
    pub fn settle_all(&mut self, verdict: &mut Verdict) {
        self.settle_where(|_| true, verdict);
    }

    /// The present leaves that are certain by now.
    pub(crate) fn leaves(&self) -> impl Iterator<Item = (&Key, Spte)> {
        let certain = self.cells.iter().filter(|(_, chain)| chain.is_whole());
        certain.map(|(key, chain)| (key, Spte(chain.at()))).filter(|(key, spte)| spte.is_leaf(key.level))
    }

    /// The entries that should be there, in order.
    pub fn entries(&self) -> impl Iterator<Item = (Key, Spte)> {
        self.cells.iter().filter(|(_, c)| c.at() != ABSENT).map(|(k, c)| (*k, Spte(c.at())))
    }

    /// Compares with the entries that are there (neither empty nor frozen ones), after [`ReferenceModel::settle_all`].
    /// What differs is reported, then believed, so that one fault is reported once.
    pub fn compare(&mut self, found: &BTreeMap<Key, Spte>, verdict: &mut Verdict) {
        let missing: Vec<(Key, u64)> = self
            .cells
            .iter()
            .filter(|(k, c)| c.at() != ABSENT && !found.contains_key(k))
            .map(|(k, c)| (*k, c.at()))
            .collect();
        for (key, raw) in missing {
            verdict.broken(
                Rule::TreeDiffers,
                Some(key.root),
                Some(key.gfn),
                format!("the entry at level {} should hold {raw:#x} and is empty", key.level),
            );
            self.believe(key, ABSENT);
        }
        for (&key, &seen) in found {
            let (at, fuzzy) = self.cells.get(&key).map_or((ABSENT, false), |c| (c.at(), c.reordered));
            if let Some(why) = self.differs(key.level, Spte(at), seen, fuzzy) {
                verdict.broken(
                    Rule::TreeDiffers,
                    Some(key.root),
                    Some(key.gfn),
                    format!(
                        "the entry at level {} holds {:#x}, the reports say {at:#x}: {why}",
                        key.level,
                        seen.raw()
                    ),
                );
            }
            if at != seen.raw() || fuzzy {
                self.believe(key, seen.raw());
            }
        }
        self.cells.retain(|_, c| c.at() != ABSENT || !c.is_whole());
    }

    fn believe(&mut self, key: Key, raw: u64) {
        let was = self.cells.get(&key).map_or(ABSENT, Chain::at);
        *self.present.entry(key.root).or_default() += i64::from(is_present(raw)) - i64::from(is_present(was));
        if raw == ABSENT {
            self.cells.remove(&key);
        } else {
            self.cells.insert(key, Chain::new(raw));
        }
    }

    /// Why `seen` cannot be what the reports left as `at`.
    fn differs(&self, level: u8, at: Spte, seen: Spte, fuzzy: bool) -> Option<&'static str> {
        let format = &self.rules.format;
        if core(format, level, at.raw()) != core(format, level, seen.raw()) {
            return Some("another entry");
        }
        if !at.is_leaf(level) {
            return None;
        }
        let restored =
            if format.is_access_tracked(at) { format.restore_access_track(at).raw() } else { at.raw() };
        let added = seen.raw() & !restored & silent_bits(format);
        let lost = at.raw() & !seen.raw() & silent_bits(format);
        if lost != 0 && !fuzzy {
            return Some("bits were lost without a report");
        }
        if added & format.write != 0 && !format.is_mmu_writable(at) {
            return Some("W appeared on a leaf that is not MMU-writable");
        }
        None
    }
}
