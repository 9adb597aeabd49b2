//! The loop: each record to its thread, its stretch of zapping, and the engine.

use super::ReplayOptions;
use super::engine::{Change, Engine, Vm};
use super::marks::Marks;
use super::report::Replay;
use super::threads::{Birth, Thread};
use super::tree::RootId;
use super::zaps::Stretch;
use crate::error::ReplayError;
use crate::event::{Event, Probe, RootArg};
use crate::line::Head;
use crate::reader::{Item, TraceReader};
use std::collections::{BTreeSet, HashMap};
use tdpmmu_spte::{KernelProfile, Role};

const PROGRESS_BYTES: u64 = 4 << 20;

pub(crate) struct Run<'a> {
    engine: Engine,
    marks: Marks,
    source: &'static str,
    options: &'a ReplayOptions<'a>,
    by_pid: HashMap<u32, usize>,
    last_thread: (u32, usize),
    first_ns: Option<u64>,
    last_ns: u64,
    backwards: u64,
    tgids: BTreeSet<u32>,
    served: bool,
    roots_told: bool,
}

impl<'a> Run<'a> {
    pub(crate) fn new(profile: KernelProfile, source: &'static str, options: &'a ReplayOptions<'a>) -> Self {
        Self {
            engine: Engine::new(profile),
            marks: Marks::default(),
            source,
            options,
            by_pid: HashMap::new(),
            last_thread: (u32::MAX, 0),
            first_ns: None,
            last_ns: 0,
            backwards: 0,
            tgids: BTreeSet::new(),
            served: false,
            roots_told: false,
        }
    }

    pub(crate) fn drive(mut self, mut reader: TraceReader) -> Result<Replay, ReplayError> {
        let mut next_progress = PROGRESS_BYTES;
        while let Some(item) = reader.next()? {
            match item {
                Item::Lost(_) => self.engine.lose(),
                Item::Record(head, event) => self.record(&head, &event),
            }
            if reader.bytes() >= next_progress {
                next_progress = reader.bytes() + PROGRESS_BYTES;
                if self.options.progress.is_some_and(|go_on| !go_on(reader.bytes())) {
                    return Err(ReplayError::Cancelled { bytes: reader.bytes() });
                }
            }
        }
        self.finish(reader)
    }

    fn thread(&mut self, head: &Head<'_>) -> usize {
        if self.last_thread.0 == head.pid {
            return self.last_thread.1;
        }
        let index = match self.by_pid.get(&head.pid) {
            Some(&index) => index,
            None => {
                let tgid = head.tgid;
                let script = self.engine.vms.iter().rev().find(|v| v.tgid == tgid).and_then(|v| v.script);
                let vm = self.engine.vm(tgid, script);
                self.engine.threads.push(Thread::new(head.pid, head.comm, vm));
                let index = self.engine.threads.len() - 1;
                self.by_pid.insert(head.pid, index);
                index
            }
        };
        self.last_thread = (head.pid, index);
        index
    }

    fn record(&mut self, head: &Head<'_>, event: &Event<'_>) {
        if matches!(event, Event::Other) {
            return;
        }
        if self.first_ns.is_some() && head.ns < self.last_ns {
            self.backwards += 1;
        }
        self.first_ns.get_or_insert(head.ns);
        self.last_ns = self.last_ns.max(head.ns);
        let t = self.thread(head);
        if let Some(only) = self.options.vm_of {
            let thread = &self.engine.threads[t];
            let id = head.tgid.unwrap_or(head.pid);
            if !thread.kernel {
                if matches!(event, Event::SpteChanged { .. }) {
                    self.tgids.insert(id);
                }
                if id != only {
                    return;
                }
            }
            self.served |= id == only;
        }
        if self.engine.anything_waits() {
            self.engine.expire(head.ns);
        }
        let c = Change {
            line: head.line,
            ns: head.ns,
            pid: head.pid,
            cpu: head.cpu,
            thread: t,
            as_id: 0,
            gfn: 0,
            level: 0,
            old: 0,
            new: 0,
            fast: false,
            demand_fault: false,
            shared: self.engine.threads[t].shared,
        };
        self.event(event, c);
    }

    fn event(&mut self, event: &Event<'_>, c: Change) {
        let (t, ns) = (c.thread, c.ns);
        let e = &mut self.engine;
        match *event {
            Event::SpteChanged { as_id, gfn, level, old, new } => {
                let span = tdpmmu_spte::geometry::span(level);
                // Elsewhere an asynchronous page fault may have installed it later, as a prefetch.
                let demand_fault =
                    e.seen.create_vm && e.threads[t].fault.is_some_and(|f| f & !(span - 1) == gfn);
                e.change(Change { as_id, gfn, level, old, new, demand_fault, ..c });
            }
            Event::ChangedEntry { gfn, level, shared } => {
                e.announce(&Change { gfn, level, shared: Some(shared), ..c });
            }
            Event::IterStart { root, .. } => {
                e.end_removals(&c);
                e.seen.iter_start = true;
                self.roots_told = true;
                // 7.2 looks for a leaf below a table by an iterator of its own, inside another walk.
                if !e.is_inner_walk(&root) {
                    let id = Self::root(e, &root, t);
                    e.threads[t].root = Some(id);
                }
                if let Some(stretch) = &mut e.threads[t].stretch {
                    stretch.iterated(false);
                }
            }
            Event::SetSpte { gfn, spte, level, at } => {
                e.end_removals(&c);
                let as_id = e.threads[t].root.map_or(0, |r| e.forest.roots[r as usize].as_id);
                if !e.is_mmio(spte, level) {
                    e.observe(Change { as_id, gfn, level, new: spte, ..c }, at);
                }
                self.turn(c);
            }
            Event::FastPageFault { gpa, old, new, fixed, .. } => {
                e.first_fast_fault();
                if fixed && old != new {
                    let as_id = e.threads[t].root.map_or(0, |r| e.forest.roots[r as usize].as_id);
                    e.fast_fault(Change { as_id, gfn: gpa >> 12, level: 1, old, new, fast: true, ..c });
                }
            }
            Event::PrepareZapPage(page) => e.prepare(t, page.gfn, page.level),
            Event::InitSp { spt, sptep, gfn, role, .. } => {
                e.seen.birth = true;
                let level = Role(role).level();
                if sptep == 0 {
                    if let Some(&old) = e.roots_by_spt.get(&spt) {
                        e.end_root(old);
                    }
                    let vm = e.threads[t].vm;
                    e.new_root(spt, Role(role).as_id(), level, vm, true);
                    self.roots_told = true;
                } else {
                    e.births.unlinked += u64::from(e.threads[t].birth.is_some());
                    e.threads[t].birth = Some(Birth { gfn, level, spt: Some(spt) });
                }
            }
            Event::GetPage { page, created: true } => {
                // With init_sp recorded this line repeats it.
                let told = e.threads[t]
                    .birth
                    .is_some_and(|b| (b.gfn, b.level) == (page.gfn, page.level) && b.spt.is_some());
                let root_told = page.level >= 4 && e.direct_map.is_some();
                if !told && !root_told && !self.roots_told {
                    e.seen.birth = true;
                    if page.level >= 4 {
                        e.unclaimed_root_births += 1;
                    }
                    e.births.unlinked += u64::from(e.threads[t].birth.is_some_and(|b| b.level < 4));
                    e.threads[t].birth = Some(Birth { gfn: page.gfn, level: page.level, spt: None });
                }
            }
            Event::RootHpa { hpa } if e.direct_map.is_none() => {
                // The root loaded just now is the newest one.
                if let Some(root) = e.forest.roots.last().filter(|r| r.live && r.spt != 0) {
                    e.direct_map = Some(root.spt.wrapping_sub(hpa));
                }
            }
            Event::FreeSp { spt } => e.freed(spt, &c),
            Event::ZapSp { spt, role, .. } => {
                e.end_removals(&c);
                let pa = e.direct_map.map(|base| spt.wrapping_sub(base));
                let root = pa.and_then(|pa| e.root_of_page(pa));
                let as_id = Role(role).as_id();
                e.threads[t].root = root.filter(|&r| e.forest.roots[r as usize].as_id == as_id);
                self.stretch(t, "nx_recovery", ns, true);
            }
            Event::PageFault { address, .. } => {
                e.end_removals(&c);
                e.faulting_threads += u32::from(!std::mem::replace(&mut e.threads[t].faults, true));
                e.threads[t].fault = Some(address >> 12);
                self.turn(c);
            }
            Event::SpteRequested { .. } => {
                e.end_removals(&c);
                self.turn(c);
            }
            Event::ZapAllFast { .. } => {
                e.invalidated_since_root = true;
                self.close(t, None);
                self.stretch(t, "fast_zap", ns, true);
            }
            Event::AgeHva { .. } | Event::UserspaceExit { .. } => e.threads[t].fault = None,
            Event::UnmapHva { .. } => {
                e.end_removals(&c);
                e.threads[t].shared = None;
                self.stretch(t, "notifier", ns, true);
            }
            Event::ZapLeafs { .. } => {
                e.end_removals(&c);
                e.threads[t].shared = Some(false);
                if e.threads[t].stretch.is_none() {
                    self.stretch(t, "slot_leafs", ns, true);
                }
            }
            Event::ZapRootPass { root, shared, .. } => {
                e.end_removals(&c);
                Self::root(e, &root, t);
                e.threads[t].shared = Some(shared);
                if e.threads[t].stretch.is_none() {
                    self.stretch(t, "root_drop", ns, true);
                }
            }
            Event::PutRoot(_) => {
                e.end_removals(&c);
                e.threads[t].shared = None;
            }
            Event::SplitRoot { .. } | Event::ScheduleZapRoot(_) | Event::ZapRoot { .. } => e.end_removals(&c),
            Event::Mark(mark) => {
                e.end_removals(&c);
                e.threads[t].shared = None;
                self.marks.take(e, mark, &c);
                self.close(t, None);
            }
            Event::Probe(probe) => self.probe(probe, c),
            _ => {}
        }
    }

    fn probe(&mut self, probe: Probe, c: Change) {
        let (t, ns) = (c.thread, c.ns);
        let e = &mut self.engine;
        match probe {
            Probe::LinkSp
            | Probe::MnClearYoung
            | Probe::MnTestYoung
            | Probe::MnChangePte
            | Probe::AllocRootRet => return,
            Probe::FlushRemoteTlbs | Probe::TrySplit => {
                let nx = e.threads[t].stretch.as_ref().is_some_and(|s| s.cause == "nx_recovery");
                e.end_removals(&c);
                if nx {
                    self.close(t, Some(ns));
                }
                return;
            }
            Probe::IterRestart => {
                e.end_removals(&c);
                e.seen.iter_restart = true;
                if let Some(stretch) = &mut e.threads[t].stretch {
                    stretch.iterated(true);
                }
                return;
            }
            _ => e.end_removals(&c),
        }
        e.threads[t].shared = None;
        match probe {
            Probe::InvStart => self.stretch(t, "notifier", ns, true),
            Probe::InvEnd => self.close(t, Some(ns)),
            Probe::ZapCollapsible | Probe::RecoverHugePages => self.stretch(t, "collapse", ns, true),
            Probe::ZapAll => self.stretch(t, "teardown", ns, true),
            Probe::MnRelease | Probe::Uninit => {
                self.close(t, None);
                self.stretch(t, "teardown", ns, true);
            }
            Probe::ZapRootWork => {
                self.marks.works += 1;
                self.close(t, None);
                self.stretch(t, "worker", ns, true);
            }
            Probe::ZapRootWorkRet => {
                self.marks.works = self.marks.works.saturating_sub(1);
                self.close(t, Some(ns));
            }
            Probe::ZapInvalidatedRootsRet => self.close(t, Some(ns)),
            Probe::InvalidateAllRoots => self.engine.invalidated_since_root = true,
            Probe::MmuUnload
            | Probe::MmuLoad
            | Probe::FreeRoots
            | Probe::WrprotSlot
            | Probe::ClearDirtyPtMasked => {
                self.close(t, None);
            }
            _ => {}
        }
    }

    /// The thread does something that is no part of a zap.
    fn turn(&mut self, c: Change) {
        self.engine.threads[c.thread].shared = None;
        self.close(c.thread, None);
    }

    fn stretch(&mut self, t: usize, cause: &'static str, ns: u64, named: bool) {
        let thread = &mut self.engine.threads[t];
        match &thread.stretch {
            Some(open)
                if open.named && (open.cause == cause || cause == "notifier" || cause == "teardown") => {}
            _ => {
                self.close(t, None);
                self.engine.threads[t].stretch = Some(Stretch::new(cause, ns, named));
            }
        }
    }

    fn close(&mut self, t: usize, end: Option<u64>) {
        let e = &mut self.engine;
        if let Some(stretch) = e.threads[t].stretch.take() {
            let thread = &e.threads[t];
            if let Some(zap) = stretch.finish(end, thread.pid, &thread.comm, e.seen.iter_restart) {
                e.zaps.push(zap);
            }
        }
    }

    /// The root that an event names; one that was not seen before comes to life.
    fn root(e: &mut Engine, arg: &RootArg, t: usize) -> RootId {
        if let Some(&id) = e.roots_by_spt.get(&arg.spt) {
            return id;
        }
        let role = Role(arg.role);
        // Known to be empty: allocated in this recording, or by a VM that was created in it.
        let known = (e.unclaimed_root_births > 0 || (e.seen.create_vm && !e.seen.birth)) && !e.seen.lost;
        let vm = e.threads[t].vm;
        e.new_root(arg.spt, role.as_id(), role.level().clamp(1, 5), vm, known)
    }

    fn finish(mut self, reader: TraceReader) -> Result<Replay, ReplayError> {
        self.engine.expire(u64::MAX);
        for t in 0..self.engine.threads.len() {
            self.close(t, None);
        }
        let path = reader.path().to_path_buf();
        let read = reader.finish()?;
        if let Some(asked) = self.options.vm_of.filter(|_| !self.served) {
            let seen: Vec<String> = self.tgids.iter().map(u32::to_string).collect();
            let seen = if seen.is_empty() { "none".to_owned() } else { seen.join(", ") };
            return Err(ReplayError::NoSuchVm { path, asked, seen });
        }
        let mut notes = Vec::new();
        let e = &mut self.engine;
        let waiting = e.waiting_deaths();
        e.deaths.inferred += waiting;
        if read.records == 0 {
            notes.push("the recording holds no events".to_owned());
        }
        if read.lost > 0 {
            notes
                .push(format!("{} events were lost: what followed could be checked in part only", read.lost));
        }
        if e.seen.blind && !e.seen.lost {
            notes.push("the recording begins in the middle of a VM's life: entries are unknown until their first event".to_owned());
        }
        if self.backwards > 0 {
            notes.push(format!("time goes backwards at {} lines", self.backwards));
        }
        if read.bad_lines > 0 {
            notes.push(format!("{} lines could not be read", read.bad_lines));
        }
        if e.fast_unplaced > 0 {
            notes.push(format!("{} fast page faults could not be placed in a table", e.fast_unplaced));
        }
        let unfinished = e.threads.iter().filter(|t| !t.removal.is_empty()).count();
        if unfinished > 0 {
            notes.push(format!("{unfinished} removals were under way at the end"));
        }
        let vms: BTreeSet<usize> = e.forest.roots.iter().map(|r| r.vm).collect();
        Ok(Replay {
            schema: "tdpmmu.replay/1",
            file: path.display().to_string(),
            kernel: e.profile.to_string(),
            profile_from: self.source,
            format: e.format_known.then(|| e.format.kind.name()),
            events: read.records,
            transitions: e.transitions,
            checked: e.checked,
            mismatch_kinds: std::mem::take(&mut e.kinds),
            mismatches: std::mem::take(&mut e.mismatches),
            roots: self.roots_told.then_some(e.root_generations),
            vms: vms.len() as u64,
            tables_peak: e.forest.peak_tables,
            tables_at_end: e.forest.live_tables,
            births: e.births,
            deaths: e.deaths,
            stat_checks: e.stats,
            observations: e.observations,
            zaps: std::mem::take(&mut e.zaps),
            lines: read.lines,
            bytes: read.bytes,
            bad_lines: read.bad_lines,
            bad: read.bad,
            lost: read.lost,
            time_backwards: self.backwards,
            span_ns: self.last_ns.saturating_sub(self.first_ns.unwrap_or(0)),
            notes,
        })
    }
}

impl Engine {
    /// The VM of a process and, where a test program names it, of its number.
    fn vm(&mut self, tgid: Option<u32>, script: Option<u64>) -> usize {
        if let Some(at) = self.vms.iter().position(|v| v.tgid == tgid && v.script == script) {
            return at;
        }
        self.vms.push(Vm { tgid, script, leafs: [0; 4] });
        self.vms.len() - 1
    }

    /// An operation on VM number `script` begins in this thread.
    pub(crate) fn enter_script_vm(&mut self, thread: usize, script: u64) {
        let tgid = self.vms[self.threads[thread].vm].tgid;
        self.threads[thread].vm = self.vm(tgid, Some(script));
    }

    /// Does the iterator start at a table that is no root?
    fn is_inner_walk(&self, arg: &RootArg) -> bool {
        if self.roots_by_spt.contains_key(&arg.spt) {
            return false;
        }
        let page = self.direct_map.and_then(|base| self.page_table(arg.spt.wrapping_sub(base)));
        page.is_some() || Role(arg.role).level() < 4
    }

    fn root_of_page(&self, pa: u64) -> Option<RootId> {
        self.page_table(pa).map(|t| self.forest.table(t).root)
    }
}
