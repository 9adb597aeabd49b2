//! Births and deaths: tables and roots come into the books when they are linked, and leave them when their removal is
//! complete or their page is freed.

#[allow(clippy::wildcard_imports)] // one engine in three files
use super::*;

impl Engine {
    // ---- births ----

    pub(super) fn link(&mut self, c: &Change, t: TableId, i: usize) {
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

    pub(super) fn check_birth(&mut self, c: &Change, pa: u64) {
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
    pub(super) fn retire_recycled(&mut self, c: &Change, pa: u64, other: TableId) {
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
        let v = &self.vms[vm];
        let (pid, comm) = self.threads.get(self.now).map_or((0, ""), |t| (t.pid, t.comm.as_str()));
        self.book.root(id as usize, (v.tgid, v.script), pid, comm);
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
    pub(super) fn adopt(&mut self, mut t: TableId, mut i: usize, level: u8, gfn: u64) -> (TableId, usize) {
        self.forget(t, i);
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

    pub(super) fn unlink(&mut self, c: &Change, t: TableId, i: usize, old: Spte) {
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
    pub(super) fn finish_removal(&mut self, id: TableId, c: &Change) {
        if !self.forest.holds(id) {
            return;
        }
        let table = self.forest.table(id);
        let (level, gfn, pa, prepared, shared) =
            (table.level, table.gfn, table.pa, table.prepared, table.shared_removal);
        let frozen = self.format.frozen;
        let unknown =
            table.adopted || table.known.iter().any(|k| matches!(k, Known::Unknown | Known::Doubted));
        let present = table.entries.iter().position(|&e| Spte(e).is_present());
        let open = if shared { table.first_open(frozen) } else { None };
        let at = Change { gfn, level, ..*c };
        if !unknown {
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
    pub(super) fn discard(&mut self, id: TableId) {
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

    pub(super) fn leafs_below(&self, id: TableId) -> [i64; 4] {
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

    pub(super) fn check_empty_root(&mut self, root: RootId, c: &Change) {
        let id = self.forest.roots[root as usize].table;
        if !self.forest.holds(id) || self.seen.lost {
            return;
        }
        let table = self.forest.table(id);
        let known = |k: usize| !matches!(table.known[k], Known::Unknown | Known::Doubted);
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
}
