//! What has to wait for a line that stands later, what else shows an entry's value, and what announces a change.

#[allow(clippy::wildcard_imports)] // one engine in three files
use super::*;

impl Engine {
    // ---- waiting ----

    pub(super) fn wait(&mut self, c: Change, on: Wait) {
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

    pub(super) fn expire_first(&mut self) {
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
                        self.forget(t, i);
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
    pub(super) fn force_table(&mut self, c: Change) {
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
    pub(super) fn retry(&mut self, t: TableId, i: usize, by: Option<&Change>) {
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
    pub(super) fn accept_late(&mut self, c: Change, t: TableId, i: usize, why: Why, by: &Change) {
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
    pub(super) fn release(&mut self, root: RootId, level: u8, gfn: u64, by: &Change) {
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

    pub(super) fn fast_place(&self, c: &Change, root: RootId) -> Found {
        match self.forest.find_leaf(root, c.gfn) {
            Some((t, i)) => {
                let table = self.forest.table(t);
                let value = Spte(table.entries[i]);
                let alike = value.pfn() == Spte(c.old).pfn() && Spte(c.old).is_leaf(table.level);
                if value.is_leaf(table.level) && alike { Found::Entry(t, i) } else { Found::Missing }
            }
            None => Found::Missing,
        }
    }

    /// A fast page fault that changed its entry. `c.gfn` is the faulting gfn, of any alignment.
    pub(crate) fn fast_fault(&mut self, mut c: Change) {
        let Some(root) = self.threads[c.thread].root.or(self.threads[c.thread].guessed_root) else {
            self.fast_unplaced += 1;
            if self.seen.lost {
                self.forget_leafs(c.gfn);
            }
            return;
        };
        if !self.forest.roots[root as usize].live {
            self.fast_unplaced += 1;
            return;
        }
        let place = self.fast_place(&c, root);
        if self.fast_in_the_dark(&c, root, place) {
            self.fast_unplaced += 1;
            return;
        }
        match place {
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

    pub(super) fn saw(&self, c: &Change, t: TableId, i: usize) -> bool {
        let table = self.forest.table(t);
        matches!(table.known[i], Known::Unknown | Known::Doubted)
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

    pub(super) fn take_announcement(&mut self, c: &mut Change) {
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
}
