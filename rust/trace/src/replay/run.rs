//! The loop: each record to its thread, its stretch of zapping, and the engine.

use super::ReplayOptions;
use super::engine::{Change, Engine, Vm};
use super::marks::Marks;
use super::record::Recorded;
use super::report::Replay;
use super::summary::{Ambiguous, Causes, Curve, FaultBook, Operations, VmBook};
use super::threads::{Birth, Thread};
use super::tree::RootId;
use super::zaps::Stretch;
use crate::error::ReplayError;
use crate::event::{Event, Probe, RootArg};
use crate::line::Head;
use crate::reader::{Item, TraceReader};
use std::collections::{BTreeSet, HashMap};
use tdpmmu_spte::{FormatKind, KernelProfile, Role};

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
    curve: Curve,
    /// Last event of each CPU, ns.
    by_cpu: HashMap<u32, u64>,
    last_cpu: (u32, u64),
    tgids: BTreeSet<u32>,
    served: bool,
    roots_told: bool,
}

impl<'a> Run<'a> {
    pub(crate) fn new(profile: KernelProfile, source: &'static str, options: &'a ReplayOptions<'a>) -> Self {
        let mut engine = Engine::new(profile);
        engine.recorded = options.record.then(Recorded::default);
        engine.shapes = options.shapes.then(Vec::new);
        Self {
            engine,
            marks: Marks::default(),
            source,
            options,
            by_pid: HashMap::new(),
            last_thread: (u32::MAX, 0),
            first_ns: None,
            last_ns: 0,
            backwards: 0,
            curve: Curve::new(),
            by_cpu: HashMap::new(),
            last_cpu: (u32::MAX, 0),
            tgids: BTreeSet::new(),
            served: false,
            roots_told: false,
        }
    }

    pub(crate) fn drive(mut self, mut reader: TraceReader) -> Result<Replay, ReplayError> {
        let mut next_progress = PROGRESS_BYTES;
        while let Some(item) = reader.next()? {
            match item {
                Item::Lost(count) => {
                    let cpu = reader.lost_cpu();
                    self.lost(cpu, count);
                }
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

    /// Events were lost on this CPU, or on one that is not named, since its last event.
    fn lost(&mut self, cpu: Option<u32>, count: Option<u64>) {
        let (last, at) = self.last_cpu;
        if last != u32::MAX {
            self.by_cpu.insert(last, at);
        }
        let since = match cpu {
            Some(cpu) => self.by_cpu.get(&cpu).copied(),
            None => self.by_cpu.values().min().copied(),
        };
        self.engine.lose(self.last_ns, since.unwrap_or(0), cpu, count);
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
        if self.last_cpu.0 != head.cpu {
            let (cpu, at) = std::mem::replace(&mut self.last_cpu, (head.cpu, head.ns));
            if cpu != u32::MAX {
                self.by_cpu.insert(cpu, at);
            }
        }
        self.last_cpu.1 = head.ns;
        self.curve.at(head.ns, &self.engine.leafs, self.engine.forest.live_tables);
        let t = self.thread(head);
        self.engine.now = t;
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
                    e.threads[t].adrift = false;
                }
                if let Some(stretch) = &mut e.threads[t].stretch {
                    stretch.iterated(false);
                }
            }
            Event::SetSpte { gfn, spte, level, at } => {
                e.end_removals(&c);
                let as_id = e.threads[t].root.map_or(0, |r| e.forest.roots[r as usize].as_id);
                e.fault_ends(&c, true);
                if !e.is_mmio(spte, level) {
                    e.faults.mapped(level);
                    e.observe(Change { as_id, gfn, level, new: spte, ..c }, at);
                }
                self.turn(c);
            }
            Event::FastPageFault { gpa, old, new, fixed, spurious, .. } => {
                e.first_fast_fault();
                e.faults.fast(fixed, spurious);
                if fixed || spurious {
                    e.fault_ends(&c, true);
                }
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
                    let root = e.new_root(spt, Role(role).as_id(), level, vm, true);
                    e.threads[t].made_root = Some(root);
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
                // The root that this thread has made since it began to load one.
                if let Some(root) = e.threads[t].made_root.take() {
                    e.direct_map = Some(e.forest.roots[root as usize].spt.wrapping_sub(hpa));
                }
            }
            Event::FreeSp { spt } => e.freed(spt, &c),
            Event::ZapSp { spt, role, .. } => {
                e.end_removals(&c);
                let pa = e.direct_map.map(|base| spt.wrapping_sub(base));
                let root = pa.and_then(|pa| e.root_of_page(pa));
                let as_id = Role(role).as_id();
                e.threads[t].root = root.filter(|&r| e.forest.roots[r as usize].as_id == as_id);
                e.threads[t].adrift &= e.threads[t].root.is_none();
                self.stretch(t, "nx_recovery", ns, true);
            }
            Event::PageFault { address, error_code, .. } => {
                e.end_removals(&c);
                e.fault_begins(&c, error_code);
                e.faulting_threads += u32::from(!std::mem::replace(&mut e.threads[t].faults, true));
                e.threads[t].fault = Some(address >> 12);
                self.turn(c);
            }
            Event::SpteRequested { .. } => {
                e.end_removals(&c);
                e.page_found(&c);
                self.turn(c);
            }
            Event::ZapAllFast { .. } => {
                e.invalidated_since_root = true;
                self.close(t, None);
                self.stretch(t, "fast_zap", ns, true);
            }
            Event::HandleMmio { .. } => e.faults.mmio(),
            Event::MarkMmio { .. } => {
                e.faults.mmio_made();
                e.fault_ends(&c, true);
            }
            Event::AgeHva { .. } => e.threads[t].fault = None,
            Event::UserspaceExit { .. } => {
                e.fault_ends(&c, false);
                e.threads[t].fault = None;
            }
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
                self.close(t, None);
                self.marks.take(&mut self.engine, mark, &c);
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
            Probe::InvStart => {
                self.engine.notifier_begins(&c);
                self.stretch(t, "notifier", ns, true);
            }
            Probe::InvEnd => {
                self.close(t, Some(ns));
                self.engine.notifier_ends(&c);
            }
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
            Probe::MmuLoad => {
                self.engine.threads[t].made_root = None;
                self.close(t, None);
            }
            Probe::MmuUnload | Probe::FreeRoots | Probe::WrprotSlot | Probe::ClearDirtyPtMasked => {
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
        self.engine.zap_ended(t, end);
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
        let input = reader.kind();
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
        let timeline = std::mem::replace(&mut self.curve, Curve::new()).finish(
            self.last_ns,
            &e.leafs,
            e.forest.live_tables,
        );
        let (causes, storms, storms_total) = std::mem::take::<Causes>(&mut e.causes).finish();
        let ept = e.format_known && e.format.kind == FormatKind::Ept;
        let book = std::mem::take::<VmBook>(&mut e.book);
        let ambiguous = Self::ambiguous(&book, e.seen.lost);
        let of_thread: Vec<Option<usize>> = (0..e.threads.len()).map(|t| book.of_thread(t)).collect();
        let (per_vm, vm_of) = book.finish();
        for (zap, root) in e.zaps.iter_mut().zip(&e.zap_roots) {
            zap.vm = root.and_then(|r| vm_of.get(r as usize).copied());
        }
        let mut recorded = e.recorded.take();
        for (t, thread) in recorded.iter_mut().flat_map(|r| &mut r.threads).enumerate() {
            (thread.pid, thread.vm) = (e.threads[t].pid, of_thread[t].map(|root| vm_of[root]));
            thread.comm.clone_from(&e.threads[t].comm);
        }
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
            begin_ns: self.first_ns.unwrap_or(0),
            timeline,
            causes,
            storms,
            storms_total,
            faults: std::mem::take::<FaultBook>(&mut e.faults).finish(ept),
            top_operations: std::mem::take::<Operations>(&mut e.operations).finish(),
            per_vm,
            ambiguous,
            losses: std::mem::take(&mut e.losses),
            what_if: None,
            input,
            recorded,
            shapes: e.shapes.take().unwrap_or_default(),
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

impl Run<'_> {
    fn ambiguous(book: &VmBook, lost: bool) -> Ambiguous {
        let why = match (book.unplaced, lost) {
            (0, _) => None,
            (_, true) => Some("events were lost, and no later event names the root of these changes"),
            (_, false) => Some(
                "the recording names no roots (iter_start), and the entry has this value in trees of several VMs",
            ),
        };
        Ambiguous { transitions: book.unplaced, why: why.map(str::to_owned) }
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
