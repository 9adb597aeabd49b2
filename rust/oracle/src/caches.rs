//! O-TLB, the truth: what each vCPU has cached, and may still use.
//!
//! **Guarantee.** No table goes back to the pool, and no host frame to its next owner, while a vCPU in the guest has a way to it in its caches under the root that it runs on (I7c, I11). No
//! flush is told as delivered while a vCPU runs on that has not emptied its caches since the flush was asked for. No vCPU enters the guest with
//! translations of another root's life under its root's page number (F6). No hardware walk goes through a freed table.
//!
//! **Mechanism.** Each vCPU's fills are booked by root; a delivered flush empties the book, the load of a root drops what is tagged with it. Evictions are not told, so the book holds at least
//! what the cache holds: that is no excuse for whoever releases, since nobody who flushes can know of an eviction. A vCPU that is not in the guest cannot use what it has, and passes its
//! requests before it enters.
//!
//! The delivery of flushes is judged in any order of arrival: a vCPU tells of its exit before the kicker can see it, and of its flush before it enters again. The rest needs
//! the true order (simulation); on the real platform `frames.rs` of the VM checks each access by the owner's tag instead.
//!
//! **What it cannot see.** Which access goes wrong: it fires at the release, one step before a guest could be hurt. On the real platform, a stale entry that no access uses.

use std::collections::{BTreeMap, HashMap, HashSet};

use tdpmmu_platform::{Event, NO_TASK};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{round_down, span};

use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Tag {
    root: u32,
    level: u8,
    gfn: u64,
}

#[derive(Clone, Copy, Debug)]
struct Filled {
    /// The frame, or the table.
    what: u64,
    at: u64,
}

#[derive(Default)]
struct Vcpu {
    task: Option<u32>,
    /// The root it runs on, while it is in the guest.
    on: Option<u32>,
    flushed_at: u64,
    pages: BTreeMap<Tag, Filled>,
    tables: BTreeMap<Tag, Filled>,
}

impl Vcpu {
    fn drop_root(&mut self, root: u32) {
        self.pages.retain(|tag, _| tag.root != root);
        self.tables.retain(|tag, _| tag.root != root);
    }

    fn under(map: &BTreeMap<Tag, Filled>, root: u32) -> impl Iterator<Item = (&Tag, &Filled)> {
        let (from, to) = (Tag { root, level: 0, gfn: 0 }, Tag { root, level: u8::MAX, gfn: u64::MAX });
        map.range(from..=to)
    }
}

/// See the module text.
pub struct Caches {
    true_order: bool,
    vcpus: BTreeMap<u32, Vcpu>,
    births: HashMap<u32, u64>,
    /// Tables in the pool.
    free: HashSet<u32>,
    open: HashMap<u32, Vec<u64>>,
    clock: u64,
    ended: bool,
}

impl Caches {
    /// Empty caches.
    pub fn new(rules: Rules) -> Self {
        Self {
            true_order: rules.in_true_order(),
            vcpus: BTreeMap::new(),
            births: HashMap::new(),
            free: HashSet::new(),
            open: HashMap::new(),
            clock: 0,
            ended: false,
        }
    }

    /// Takes an event of `task` in.
    pub fn event(&mut self, task: u32, event: &Event, verdict: &mut Verdict) {
        self.clock += 1;
        let at = self.clock;
        match *event {
            Event::GuestEnter { vcpu, root } => {
                let v = self.vcpus.entry(vcpu).or_default();
                (v.on, v.task) = (Some(root), Some(task));
                self.entered(vcpu, root, verdict);
            }
            Event::GuestExit { vcpu } => self.vcpus.entry(vcpu).or_default().on = None,
            Event::TlbFlush { vcpu } => {
                let v = self.vcpus.entry(vcpu).or_default();
                v.flushed_at = at;
                v.pages.clear();
                v.tables.clear();
            }
            Event::TlbFlushRoot { vcpu, root } => self.vcpus.entry(vcpu).or_default().drop_root(root),
            Event::TlbFill { vcpu, root, gfn, level, spte } if self.true_order => {
                let tag = Tag { root, level, gfn: round_down(gfn, level) };
                let what = Spte(spte).pfn();
                self.vcpus.entry(vcpu).or_default().pages.insert(tag, Filled { what, at });
            }
            Event::StructureFill { vcpu, root, gfn, level, table } if self.true_order => {
                self.walked(vcpu, root, gfn, table, verdict);
                let tag = Tag { root, level, gfn: round_down(gfn, level + 1) };
                let what = u64::from(table);
                self.vcpus.entry(vcpu).or_default().tables.insert(tag, Filled { what, at });
            }
            Event::StructureUse { vcpu, root, gfn, table, .. } if self.true_order => {
                self.walked(vcpu, root, gfn, table, verdict);
            }
            Event::TableAlloc { table, .. } => {
                self.free.remove(&table);
            }
            // Any shadow page may be a root.
            Event::RootAlloc { root, .. } | Event::ShadowAlloc { table: root, .. } => {
                self.births.insert(root, at);
                self.free.remove(&root);
            }
            Event::ShadowWalked { table } if self.true_order && self.free.contains(&table) => {
                let what = format!("a lockless walk stands on table {table}, which was freed");
                verdict.broken(Rule::WalkedFreed, None, None, what);
            }
            Event::TableFree { table } => {
                self.free.insert(table);
                self.freed(table, verdict);
            }
            Event::FrameRelease { pfn, count } => self.released(pfn, count, verdict),
            Event::FrameStale { pfn, what } if what.contains("guest") => {
                let text = format!("{what} reached frame {pfn:#x}, which has another owner by now");
                verdict.broken(Rule::StaleAccess, None, None, text);
            }
            Event::FlushBegin { .. } => self.open.entry(task).or_default().push(at),
            Event::FlushEnd { .. } => {
                if let Some(begun) = self.open.get_mut(&task).and_then(Vec::pop) {
                    self.delivered(begun, verdict);
                }
            }
            Event::VmEnd => self.ended = true,
            _ => {}
        }
    }

    fn entered(&self, vcpu: u32, root: u32, verdict: &mut Verdict) {
        let (Some(v), Some(&birth)) = (self.vcpus.get(&vcpu), self.births.get(&root)) else { return };
        let old = Vcpu::under(&v.pages, root).chain(Vcpu::under(&v.tables, root)).find(|(_, f)| f.at < birth);
        if let Some((tag, _)) = old {
            let what = format!(
                "vCPU {vcpu} entered the guest with a translation of another root's life on that page"
            );
            let owed = format!("vCPU {vcpu} flushes the tag of root {root} when it loads it");
            verdict.unmet(Rule::StaleTag, Some(root), Some(tag.gfn), what, v.task.unwrap_or(NO_TASK), owed);
        }
    }

    fn walked(&self, vcpu: u32, root: u32, gfn: u64, table: u32, verdict: &mut Verdict) {
        if self.free.contains(&table) {
            let what = format!("the walker of vCPU {vcpu} reads table {table}, which was freed");
            verdict.broken(Rule::WalkedFreed, Some(root), Some(gfn), what);
        }
    }

    fn freed(&self, table: u32, verdict: &mut Verdict) {
        for (vcpu, v) in self.vcpus.iter().filter(|_| self.true_order && !self.ended) {
            let Some(root) = v.on else { continue };
            if let Some((tag, _)) = Vcpu::under(&v.tables, root).find(|(_, f)| f.what == u64::from(table)) {
                let what = format!(
                    "table {table} was freed while vCPU {vcpu} in the guest has it in its paging-structure cache"
                );
                let owed =
                    format!("a flush that vCPU {vcpu} has answered, after the unlink of table {table}");
                verdict.unmet(Rule::FreedWhileCached, Some(root), Some(tag.gfn), what, NO_TASK, owed);
            }
        }
    }

    fn released(&self, pfn: u64, count: u64, verdict: &mut Verdict) {
        for (vcpu, v) in self.vcpus.iter().filter(|_| self.true_order && !self.ended) {
            let Some(root) = v.on else { continue };
            let hit = Vcpu::under(&v.pages, root).find(|(tag, filled)| {
                let first = filled.what & !(span(tag.level) - 1);
                first < pfn + count && pfn < first + span(tag.level)
            });
            if let Some((tag, filled)) = hit {
                let what = format!(
                    "frame {pfn:#x} was released while vCPU {vcpu} in the guest has a translation to {:#x}",
                    filled.what
                );
                let owed = format!("a flush that vCPU {vcpu} has answered, after the unmap");
                verdict.unmet(Rule::ReleasedWhileCached, Some(root), Some(tag.gfn), what, NO_TASK, owed);
            }
        }
    }

    fn delivered(&self, begun: u64, verdict: &mut Verdict) {
        for (vcpu, v) in self.vcpus.iter().filter(|_| !self.ended) {
            if let Some(root) = v.on
                && v.flushed_at < begun
            {
                let what = format!(
                    "a flush was told as delivered while vCPU {vcpu} is in the guest and has not flushed"
                );
                let owed =
                    format!("vCPU {vcpu} leaves the guest, or has flushed since the flush was asked for");
                verdict.unmet(
                    Rule::FlushUndelivered,
                    Some(root),
                    None,
                    what,
                    v.task.unwrap_or(NO_TASK),
                    owed,
                );
            }
        }
    }
}
