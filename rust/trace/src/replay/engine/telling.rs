//! What is told beside the verdict: zaps with their causes, operations, spans, the shapes of trees. Nothing here is judged.

#[allow(clippy::wildcard_imports)] // one engine in several files
use super::*;
use crate::perfetto::Name;
use crate::replay::shape;
use crate::replay::summary::Known as Circumstances;

/// Zaps that a design decides about; the others are the same in each.
const OF_DESIGN: [&str; 4] = ["fast_zap", "worker", "root_drop", "teardown"];

impl Engine {
    /// Does the change fit a root of another VM as well?
    pub(super) fn another_vm_fits(&self, c: &Change, chosen: RootId, candidates: &[RootId]) -> bool {
        let vm = |r: RootId| self.forest.roots[r as usize].vm;
        candidates.iter().any(|&r| {
            r != chosen
                && (vm(r) != vm(chosen) || !self.book.one_vm(r as usize, chosen as usize))
                && matches!(self.forest.find(r, c.level, c.gfn), Found::Entry(t, i) if self.explain(c, t, i).is_some())
        })
    }

    /// Before the first removal of this zap from this tree.
    pub(super) fn keep_shape(&mut self, c: &Change, root: RootId, replaced: bool) {
        if self.shapes.as_ref().is_none_or(|s| s.len() >= MOST_SHAPES) {
            return;
        }
        let stretch = self.threads[c.thread].zapping(c.ns, replaced);
        if !OF_DESIGN.contains(&stretch.cause) || stretch.shapes.iter().any(|s| s.0 == root) {
            return;
        }
        let r = &self.forest.roots[root as usize];
        let shape = shape::take(&self.forest, &self.format, r.table, r.as_id, r.level);
        self.threads[c.thread].zapping(c.ns, replaced).shapes.push((root, shape));
    }

    /// The stretch of zapping of this thread, if there is one, is over.
    pub(crate) fn zap_ended(&mut self, t: usize, end: Option<u64>) {
        let Some(mut stretch) = self.threads[t].stretch.take() else { return };
        let thread = &self.threads[t];
        let root = stretch.root.map(|r| self.forest.roots[r as usize].vm);
        let (mine, owner) = (self.vms[thread.vm].tgid, root.and_then(|vm| self.vms[vm].tgid));
        let known = Circumstances {
            operation: thread.ops.last().map(|op| op.kind.as_str()),
            own_process: mine.zip(owner).map(|(a, b)| a == b && !thread.kernel),
        };
        let Some(zap) = stretch.finish(end, thread.pid, &thread.comm, self.seen.iter_restart, known) else {
            return;
        };
        self.causes.add(&zap);
        let (t0, ns, refined) = (zap.t0_ns, zap.duration_ns, zap.refined);
        self.span(t, t0, t0.saturating_add(ns), refined.into(), "zap");
        let detail = || {
            let entries: u64 = zap.entries.values().sum();
            format!("{entries} entries, {} tables", zap.tables)
        };
        self.operations.other(ns, t0, || (format!("zap:{refined}"), detail(), zap.pid, zap.comm.clone()));
        if let (Some(shapes), false) = (&mut self.shapes, stretch.shapes.is_empty()) {
            let roots = stretch.shapes.into_iter().map(|s| s.1).collect();
            shapes.push(Shape { zap: self.zaps.len(), roots });
        }
        if let Some(root) = stretch.root {
            self.book.zap(root as usize);
        }
        self.zap_roots.push(stretch.root);
        self.zaps.push(zap);
    }

    pub(crate) fn span(&mut self, t: usize, begin: u64, end: u64, name: Name, category: &'static str) {
        if let Some(recorded) = &mut self.recorded {
            recorded.span(t, begin, end, name, category);
        }
    }

    /// The marks end an operation.
    pub(crate) fn operation_ended(&mut self, op: OpenOp, c: &Change) {
        let ns = c.ns.saturating_sub(op.t0);
        let kind = op.kind.split(':').next().unwrap_or(&op.kind).to_owned();
        if self.recorded.is_some() {
            self.span(c.thread, op.t0, c.ns, Name::from(format!("{} {kind}", op.number)), "operation");
        }
        let thread = &self.threads[c.thread];
        self.operations.marked(ns, op.t0, || (kind, op.detail, c.pid, thread.comm.clone()));
    }

    /// A guest's fault.
    pub(crate) fn fault_begins(&mut self, c: &Change, error_code: u64) {
        self.fault_ends(c, false);
        self.faults.fault(error_code);
        self.threads[c.thread].fault_since = Some(c.ns);
        let thread = &self.threads[c.thread];
        self.book.fault(c.thread, c.pid, &thread.comm);
    }

    /// The thread has done what the fault was about, or has turned to something else.
    pub(crate) fn fault_ends(&mut self, c: &Change, handled: bool) {
        let thread = &mut self.threads[c.thread];
        let since = thread.fault_since.take();
        if std::mem::take(&mut thread.has_page) && !handled {
            self.faults.gave_up();
        }
        let (Some(since), true) = (since, handled) else { return };
        let ns = c.ns.saturating_sub(since);
        self.faults.handled(ns);
        let gfn = thread.fault.unwrap_or_default();
        let thread = &self.threads[c.thread];
        self.operations
            .other(ns, since, || ("fault".to_owned(), format!("gfn {gfn:#x}"), c.pid, thread.comm.clone()));
        self.span(c.thread, since, c.ns, "fault".into(), "fault");
    }

    /// The host's page for a gfn is known, and the thread is about to map it.
    pub(crate) fn page_found(&mut self, c: &Change) {
        let thread = &mut self.threads[c.thread];
        thread.has_page = true;
        if thread.fault.is_none() {
            self.faults.prefetched();
        }
    }

    pub(crate) fn notifier_begins(&mut self, c: &Change) {
        self.threads[c.thread].notifier_since.get_or_insert(c.ns);
    }

    pub(crate) fn notifier_ends(&mut self, c: &Change) {
        let Some(since) = self.threads[c.thread].notifier_since.take() else { return };
        let comm = &self.threads[c.thread].comm;
        let ns = c.ns.saturating_sub(since);
        self.operations.other(ns, since, || ("notifier".to_owned(), String::new(), c.pid, comm.clone()));
        self.span(c.thread, since, c.ns, "notifier".into(), "notifier");
    }
}
