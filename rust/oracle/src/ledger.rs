//! The ledger of root references: who holds each root, and what was promised to it.
//!
//! **Guarantee.** For every root, from allocation to free: the count is the sum of its owners (I4); a reference is put by a class of owner that
//! holds one; zero is final, but for the re-arm of 5.18 (I2); valid -> invalid happens once, and creates one obligation (I3, P-1); the root is
//! freed unreferenced, invalid and zapped. When a fast zap ends, every obligation on the roots that it met has been discharged.
//!
//! **Mechanism.** Two books per root. *By owner*: a class's own get is always told before the put that it pays for (the same task does
//! both, or the reference was handed over through a lock or a queue), so a class that would go below zero is a fault at once. *By count*: each
//! report carries the count after it, an edge `before -> after` of a [`Chain`]; these may arrive in any order, even the last-but-one put after
//! the free. A freed root whose count is not whole yet waits among the `late` for its missing reports.
//!
//! The 5.18 re-arm (0 -> 1, for the worker) is legal for [`Owner::Work`] on an invalid root only: whoever put the last reference of a valid
//! root made the transition, and passes that reference on.
//!
//! What a fast zap must have done by its end is the design's own promise ([`tdpmmu_mmu::Obligations`]). One that keeps its roots valid is asked for
//! less: that each entry which was there at its begin was removed at some time, whatever was mapped since.
//!
//! **I5, and why it needs no allowance.** A fault tests for staleness after it took mmu_lock shared. A root turns invalid either under the
//! exclusive lock, which no fault shares, or in the last put, when no vCPU holds the root and none can get it, the count being zero. Both sides tell
//! inside their hold. So in order of arrival too, a creation after the invalidation is a creation under an invalid root. The reference
//! itself may be taken later: a vCPU that found the root valid, lost the race and got an invalid one will see that and reload.

use std::collections::{BTreeMap, BTreeSet};

use tdpmmu_platform::{Event, Owner};
use tdpmmu_spte::{Role, Spte};

use crate::chain::{Chain, Edge};
use crate::model::{Key, ReferenceModel};
use crate::rule::{OWNERS, Rule, slot};
use crate::rules::Rules;
use crate::verdict::Verdict;

#[derive(Clone, Debug)]
struct Root {
    as_id: u8,
    count: Chain,
    owners: [i64; OWNERS.len()],
    valid: bool,
    /// Its count was told as zero, and nobody has re-armed it: no vCPU can have it.
    lost: bool,
    scheduled: u32,
    zapping: u32,
    zapped: u32,
    /// Which allocation of this page: pages are recycled.
    birth: u64,
}

impl Root {
    fn step(&mut self, before: u64, after: u64) {
        self.count.push(Edge { from: before, to: after, shared: true });
        while self.count.step(|v| v).is_some() {}
    }

    fn holds(&self) -> i64 {
        self.owners.iter().sum()
    }

    fn owners_text(&self) -> String {
        let text = |owner: &Owner| {
            let n = self.owners[slot(*owner)];
            (n != 0).then(|| format!("{owner:?} {n}"))
        };
        let held: Vec<String> = OWNERS.iter().filter_map(text).collect();
        if held.is_empty() { "nobody".to_owned() } else { held.join(", ") }
    }
}

/// See the module text.
pub struct RootLedger {
    rules: Rules,
    live: BTreeMap<u32, Root>,
    late: BTreeMap<u32, Vec<Root>>,
    births: u64,
    /// The roots, by page and birth, that the open fast zap must leave empty.
    fast_zap: Option<BTreeSet<(u32, u64)>>,
    /// What was present when it began and has not been removed since; of designs that keep their roots.
    before: BTreeSet<Key>,
}

impl RootLedger {
    /// An empty ledger.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            live: BTreeMap::new(),
            late: BTreeMap::new(),
            births: 0,
            fast_zap: None,
            before: BTreeSet::new(),
        }
    }

    /// Takes an event in. `model` must not have seen it yet when it frees a root, and says what is present.
    pub fn event(&mut self, event: &Event, model: &ReferenceModel, verdict: &mut Verdict) {
        match *event {
            Event::RootAlloc { root, role, refs } => self.alloc(root, Role(role).as_id(), refs, verdict),
            Event::RootGet { root, refs, owner } => self.get(root, refs, owner, verdict),
            Event::RootPut { root, refs, owner } => self.put(root, refs, owner, verdict),
            Event::RootPass { root, from, to } => self.pass(root, from, to, verdict),
            Event::RootInvalidate { root } => {
                let Some(r) = self.known(root, verdict) else { return };
                if !std::mem::replace(&mut r.valid, false) {
                    verdict.broken(Rule::InvalidatedTwice, Some(root), None, "invalidated again".to_owned());
                }
            }
            Event::RootSchedule { root } => {
                let Some(r) = self.known(root, verdict) else { return };
                r.scheduled += 1;
                if r.scheduled > 1 {
                    let what = format!("scheduled {} times in one life", r.scheduled);
                    verdict.broken(Rule::ScheduledTwice, Some(root), None, what);
                }
            }
            Event::RootZapBegin { root } => {
                let unlisted_is_fine = self.rules.design.last_put_zaps;
                let Some(r) = self.known(root, verdict) else { return };
                r.zapping += 1;
                if r.holds() <= 0 && !unlisted_is_fine {
                    let what = "a zap that may yield began on a root that nobody holds".to_owned();
                    verdict.broken(Rule::ZapUnreferenced, Some(root), None, what);
                }
            }
            Event::RootZapEnd { root } => {
                let Some(r) = self.known(root, verdict) else { return };
                r.zapping = r.zapping.saturating_sub(1);
                r.zapped += 1;
            }
            Event::RootFree { root } => self.free(root, verdict),
            Event::SpteChanged { as_id, root, gfn, level, old, new, shared } => {
                if Spte(old).is_present() && !Spte(new).is_present() {
                    self.before.remove(&Key { as_id, root, gfn, level });
                }
                if !self.live.contains_key(&root) && self.rules.in_true_order() {
                    let what = format!("an entry below {root} changed, which is no live root");
                    verdict.broken(Rule::UnknownRoot, Some(root), Some(gfn), what);
                }
                let created = !Spte(old).is_present() && Spte(new).is_present();
                // Under the exclusive lock only change_pte makes leaves: in the place of one that it has just taken out, under any root.
                if created
                    && shared
                    && self.rules.checks_stale_root
                    && self.live.get(&root).is_some_and(|r| !r.valid)
                {
                    verdict.broken(
                        Rule::CreatedUnderInvalid,
                        Some(root),
                        Some(gfn),
                        format!("{new:#x} was created at level {level} under an invalid root"),
                    );
                }
            }
            Event::FastZapBegin => {
                // Under the exclusive lock: no report is missing. All roots, not only the valid ones: those that were invalid
                // before have an obligation open that this fast zap must wait for (D4), or are empty.
                let met = self.live.iter().map(|(&root, r)| (root, r.birth)).collect();
                if self.rules.design.keeps_roots {
                    self.before =
                        model.entries().filter(|(_, spte)| spte.is_present()).map(|(key, _)| key).collect();
                }
                if self.fast_zap.replace(met).is_some() {
                    let what = "a fast zap began inside another: slots_lock is not held".to_owned();
                    verdict.broken(Rule::FastZapOverlap, None, None, what);
                }
            }
            Event::FastZapEnd => self.fast_zap_end(model, verdict),
            _ => {}
        }
    }

    fn known(&mut self, root: u32, verdict: &mut Verdict) -> Option<&mut Root> {
        let found = self.live.get_mut(&root);
        if found.is_none() {
            verdict.broken(Rule::UnknownRoot, Some(root), None, format!("{root} is no live root"));
        }
        found
    }

    fn alloc(&mut self, root: u32, as_id: u8, refs: u32, verdict: &mut Verdict) {
        let mut owners = [0; OWNERS.len()];
        owners[slot(Owner::Vcpu)] = 1;
        owners[slot(Owner::Mmu)] = i64::from(refs) - 1;
        self.births += 1;
        let new = Root {
            as_id,
            count: Chain::new(u64::from(refs)),
            owners,
            valid: true,
            lost: false,
            scheduled: 0,
            zapping: 0,
            zapped: 0,
            birth: self.births,
        };
        if !(1..=2).contains(&refs) {
            let what = format!("a new root has {refs} references, one vCPU's and perhaps the MMU's are owed");
            verdict.broken(Rule::RefsDiffer, Some(root), None, what);
        }
        if self.live.insert(root, new).is_some() {
            verdict.broken(Rule::HandedOutTwice, Some(root), None, "a live root was allocated".to_owned());
        }
    }

    fn get(&mut self, root: u32, refs: u32, owner: Owner, verdict: &mut Verdict) {
        let Some(r) = self.known(root, verdict) else { return };
        let refs = u64::from(refs);
        if refs <= 1 && (r.valid || owner != Owner::Work) {
            let what = format!("{owner:?} took the count from zero to {refs}");
            verdict.broken(Rule::Resurrected, Some(root), None, what);
        }
        r.owners[slot(owner)] += 1;
        // Other gets that come after the last put were only told late.
        r.lost &= refs != 1;
        r.step(refs.wrapping_sub(1), refs);
    }

    fn put(&mut self, root: u32, refs: u32, owner: Owner, verdict: &mut Verdict) {
        let (before, after) = (u64::from(refs.wrapping_add(1)), u64::from(refs));
        // A put that was told late belongs to the root that was freed meanwhile.
        if let Some(late) = self.late.get_mut(&root)
            && let Some(i) = late.iter().position(|r| {
                let fits = r.count.at() == before || r.count.early().iter().any(|e| e.from == after);
                fits && r.owners[slot(owner)] > 0
            })
        {
            late[i].owners[slot(owner)] -= 1;
            late[i].step(before, after);
            if late[i].count.is_balanced(|v| v) && late[i].count.at() == 0 {
                late.swap_remove(i);
            }
            if late.is_empty() {
                self.late.remove(&root);
            }
            return;
        }
        let Some(r) = self.known(root, verdict) else { return };
        if r.owners[slot(owner)] <= 0 {
            let what =
                format!("{owner:?} put a reference that it does not hold; held by {}", r.owners_text());
            verdict.broken(Rule::PutByNonOwner, Some(root), None, what);
        }
        r.owners[slot(owner)] -= 1;
        r.lost |= after == 0;
        r.step(before, after);
    }

    fn pass(&mut self, root: u32, from: Owner, to: Owner, verdict: &mut Verdict) {
        let Some(r) = self.known(root, verdict) else { return };
        if r.owners[slot(from)] <= 0 {
            let what = format!("{from:?} passed a reference that it does not hold");
            verdict.broken(Rule::PutByNonOwner, Some(root), None, what);
        }
        r.owners[slot(from)] -= 1;
        r.owners[slot(to)] += 1;
    }

    fn free(&mut self, root: u32, verdict: &mut Verdict) {
        let Some(r) = self.live.remove(&root) else {
            verdict.broken(Rule::UnknownRoot, Some(root), None, "freed, but no live root".to_owned());
            return;
        };
        if r.valid && !self.rules.design.last_put_zaps {
            verdict.broken(
                Rule::FreedValid,
                Some(root),
                None,
                "freed without having been invalid".to_owned(),
            );
        }
        if !r.valid && r.scheduled == 0 && self.rules.design.schedules {
            let what = "invalidated, never scheduled to be zapped, and freed".to_owned();
            verdict.broken(Rule::NeverScheduled, Some(root), None, what);
        }
        if r.zapped == 0 || r.zapping != 0 {
            let what = format!("freed after {} whole zaps, {} still going on", r.zapped, r.zapping);
            verdict.broken(Rule::FreedUnzapped, Some(root), None, what);
        }
        // Who frees has told its own put: the last step to zero is taken, or waits for one before it.
        let done = r.count.is_balanced(|v| v);
        let at_zero = r.count.at() == 0;
        let awaited = r.count.early().iter().any(|e| e.to == 0);
        if !at_zero && (done || !awaited) {
            let what = format!("freed at count {}, held by {}", r.count.at(), r.owners_text());
            verdict.broken(Rule::FreedReferenced, Some(root), None, what);
        } else if !done {
            self.late.entry(root).or_default().push(r);
        }
    }

    fn fast_zap_end(&mut self, model: &ReferenceModel, verdict: &mut Verdict) {
        let Some(met) = self.fast_zap.take() else {
            let what = "a fast zap ended that had not begun".to_owned();
            verdict.broken(Rule::FastZapOverlap, None, None, what);
            return;
        };
        for &(root, birth) in &met {
            if self.live.get(&root).is_none_or(|r| r.birth != birth) {
                continue;
            }
            if self.rules.design.keeps_roots {
                let mut left = self.before.iter().filter(|key| key.root == root);
                if let Some(key) = left.next() {
                    let what = format!(
                        "the fast zap returned and {} entries that it met were never removed, among them one at level {}",
                        1 + left.count(),
                        key.level
                    );
                    verdict.broken(Rule::FastZapLeft, Some(root), Some(key.gfn), what);
                }
                continue;
            }
            let mut left = model.present_under(root);
            if left != 0 && !self.rules.writes_back {
                // Mapped is what can be reached, or has a write-back still to come (6.13 on: nothing has). NX recovery tears down under the shared lock from 6.18 on.
                left = model.reachable_under(root);
            }
            if left != 0 {
                let example = model.example_under(root);
                let text = example.map_or(String::new(), |(key, spte)| {
                    format!(", among them {:#x} at level {}", spte.raw(), key.level)
                });
                verdict.broken(
                    Rule::FastZapLeft,
                    Some(root),
                    example.map(|(key, _)| key.gfn),
                    format!("the fast zap returned with {left} present entries{text}"),
                );
            }
        }
        if self.rules.design.keeps_roots {
            return;
        }
        // What is mapped is the worse of the two: references come second.
        for (root, birth) in met {
            let Some(r) = self.live.get(&root).filter(|r| r.birth == birth) else { continue };
            if r.valid {
                let what = "the fast zap returned and the root is still valid".to_owned();
                verdict.broken(Rule::FastZapLeft, Some(root), None, what);
            } else if self.held_after(r) {
                let what = format!("the fast zap returned and the root is still held by {}", r.owners_text());
                verdict.broken(Rule::GiftKept, Some(root), None, what);
            }
            if self.rules.design.schedules && r.scheduled == 0 {
                let what = "invalidated by a fast zap and not scheduled".to_owned();
                verdict.broken(Rule::NeverScheduled, Some(root), None, what);
            }
        }
    }

    /// Is an obligation on this root still open, though the fast zap that had to wait for it has returned?
    fn held_after(&self, root: &Root) -> bool {
        let holds = |owner: Owner| root.owners[slot(owner)] > 0;
        holds(Owner::Gift) || holds(Owner::Mmu) || holds(Owner::Work) && !self.rules.design.zapper_outlives
    }

    /// May a vCPU use translations of that root: is it known, valid, and held?
    pub fn in_use(&self, root: u32) -> bool {
        self.live.get(&root).is_some_and(|r| r.valid && !r.lost)
    }

    /// Is that root known and valid?
    pub fn is_valid(&self, root: u32) -> bool {
        self.live.get(&root).is_some_and(|r| r.valid)
    }

    /// Live roots: (page, address space, valid).
    pub fn roots(&self) -> impl Iterator<Item = (u32, u8, bool)> {
        self.live.iter().map(|(&root, r)| (root, r.as_id, r.valid))
    }

    /// Roots that the open fast zap must leave empty.
    pub fn in_fast_zap(&self) -> impl Iterator<Item = u32> {
        self.fast_zap.iter().flatten().map(|&(root, _)| root)
    }

    /// mmu_lock is held exclusively: `listed` are the roots on the list with their counts and invalid bits. `quiet`: nobody walks the list.
    pub fn check(&mut self, listed: &BTreeMap<u32, (u32, bool)>, quiet: bool, verdict: &mut Verdict) {
        for (&root, r) in &mut self.live {
            let (left, balanced) = r.count.quiet(|v| v);
            if let Some(edge) = left.first().filter(|_| !balanced) {
                let what =
                    format!("the count is {}, a report says {} -> {}", r.count.at(), edge.from, edge.to);
                verdict.broken(Rule::BrokenHistory, Some(root), None, what);
            }
            let Some(&(refs, invalid)) = listed.get(&root) else {
                verdict.broken(Rule::ListDiffers, Some(root), None, "a live root is not listed".to_owned());
                continue;
            };
            if r.count.at() != u64::from(refs) || r.holds() != i64::from(refs) {
                let what =
                    format!("the count is {refs}, the reports say {}: {}", r.count.at(), r.owners_text());
                verdict.broken(Rule::RefsDiffer, Some(root), None, what);
            }
            if r.valid == invalid {
                let what = format!("invalid is {invalid}, the reports say {}", !r.valid);
                verdict.broken(Rule::RefsDiffer, Some(root), None, what);
            }
            let walking = r.owners[slot(Owner::Iterator)];
            if quiet && walking != 0 {
                let what = format!("{walking} references of walks over the root list, and nobody walks");
                verdict.broken(Rule::RefsDiffer, Some(root), None, what);
            }
        }
        for &root in listed.keys() {
            if !self.live.contains_key(&root) {
                verdict.broken(Rule::ListDiffers, Some(root), None, "listed, but no live root".to_owned());
            }
        }
        for (root, late) in std::mem::take(&mut self.late) {
            for r in late {
                let what = format!("freed while the count was {}, held by {}", r.count.at(), r.owners_text());
                verdict.broken(Rule::FreedReferenced, Some(root), None, what);
            }
        }
    }

    /// The end: no root should be left.
    pub fn finish(&self, verdict: &mut Verdict) {
        for (&root, r) in &self.live {
            let validity = if r.valid { "valid" } else { "invalid" };
            let what = format!(
                "a {validity} root of address space {} is left, held by {}",
                r.as_id,
                r.owners_text()
            );
            verdict.broken(Rule::RootLeaked, Some(root), None, what);
        }
        if self.fast_zap.is_some() {
            verdict.broken(Rule::FastZapOverlap, None, None, "a fast zap never ended".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use tdpmmu_spte::{FormatKind, KernelProfile};

    use super::*;

    use Owner::{Iterator as I, Vcpu as V, Work as W};

    /// What is found broken in a root's life whose count is told as `steps`: who, the count after it, got (true) or put. The page is freed
    /// with the last step.
    fn told(steps: &[(Owner, u32, bool)]) -> Vec<Rule> {
        let profile = KernelProfile::named("6.1-async").expect("known");
        let rules = Rules::of(&profile, profile.format(FormatKind::Npt), "async-worker");
        let (mut ledger, model) = (RootLedger::new(rules), ReferenceModel::new(rules));
        let mut verdict = Verdict::default();
        let mut events = vec![
            Event::RootAlloc { root: 7, role: 0, refs: 1 },
            Event::RootInvalidate { root: 7 },
            Event::RootSchedule { root: 7 },
            Event::RootZapBegin { root: 7 },
            Event::RootZapEnd { root: 7 },
        ];
        events.extend(steps.iter().map(|&(owner, refs, got)| match got {
            true => Event::RootGet { root: 7, refs, owner },
            false => Event::RootPut { root: 7, refs, owner },
        }));
        events.push(Event::RootFree { root: 7 });
        for event in &events {
            ledger.event(event, &model, &mut verdict);
        }
        ledger.check(&BTreeMap::new(), true, &mut verdict);
        verdict.violations().iter().map(|v| v.rule).collect()
    }

    #[test]
    fn a_round_trip_that_is_told_out_of_order_is_no_reference_left() {
        let in_order = [(I, 2, true), (I, 1, false), (V, 0, false), (W, 1, true), (W, 0, false)];
        assert_eq!(told(&in_order), []);
        // The chain has been to zero by the time the second round trip is whole.
        let late = [
            (I, 2, true),
            (V, 0, false),
            (W, 1, true),
            (W, 0, false),
            (I, 2, true),
            (I, 1, false),
            (I, 1, false),
        ];
        assert_eq!(told(&late), []);
    }

    #[test]
    fn a_reference_that_is_left_is_seen_whatever_the_order() {
        assert_eq!(told(&[(I, 2, true), (V, 1, false)]), [Rule::FreedReferenced]);
        assert_eq!(told(&[(V, 0, false), (W, 1, true)]), [Rule::FreedReferenced]);
        // One put of an iterator is never told.
        let one_short =
            [(I, 2, true), (V, 0, false), (W, 1, true), (W, 0, false), (I, 2, true), (I, 1, false)];
        assert_eq!(told(&one_short), [Rule::FreedReferenced]);
    }
}
