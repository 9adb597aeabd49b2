//! A `tdpmmu_vm::Vm` on the real platform, as the bindings use it: plain values in, plain values and JSON out.
//!
//! Nothing here knows Python. Every operation enters through the machine's gate, so that closing can wait for it
//! and nothing runs in a forked child.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use tdpmmu_mmu::QueueKind;
use tdpmmu_platform::{Preempt, Real, Role, Task, TaskConfig};
use tdpmmu_spte::{FormatKind, KernelProfile, Ownership, Passes, Spte};
use tdpmmu_vm::{
    AccessOutcome, BulkOptions, DirtyMode, FastZapTimes, GuestAccess, Paging, Progress, Vcpu, Vm, VmConfig,
    VmError,
};

use crate::error::Fault;
use crate::gate::{Gate, Pass};
use crate::guest::GuestTables;
use crate::job::Control;
use crate::shadowed;

/// What the face sends: every value there, most of them checked already.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    levels: u8,
    vcpus: usize,
    design: String,
    kernel_profile: String,
    passes: Option<String>,
    ownership: Option<String>,
    preempt: String,
    tick_ns: u64,
    memory_bytes: Option<u64>,
    page: String,
    max_table_bytes: Option<u64>,
    #[allow(dead_code)] // kept with the machine by the face
    seed: u64,
    check: String,
    workers: usize,
    worker_cpus: Vec<usize>,
    worker_queue: Option<String>,
    eager_page_split: bool,
    dirty_mode: String,
    dirty_ring: Option<u32>,
    nx_huge_pages: bool,
    memslot_generation: u64,
    format: String,
    /// Of a shadow design: `direct` or `guest`.
    paging: Option<String>,
    /// Of a shadow design: how zapped pages are kept from lockless walkers.
    reclaim: Option<String>,
    /// Of a shadow design: most shadow pages.
    quota: Option<u32>,
}

/// A leaf as it crosses to numpy: gfn, SPTE, frame, level.
pub type Row = [u64; 4];

/// What one access came to: `AccessOutcome`, level (0: not mapped), frame.
pub type Access = (u8, u8, u64);

/// A memslot: id, address space, first gfn, pages, read-only, dirty log.
pub type Slot = (u16, u8, u64, u64, bool, bool);

/// How to populate.
#[derive(Clone, Copy)]
pub struct Populate {
    pub level: u8,
    pub threads: usize,
    pub by_fault: bool,
}

pub struct Machine {
    pub(crate) vm: Vm<Real>,
    gate: Gate,
    /// Of a guest that translates by tables of its own.
    pub(crate) guest: Option<GuestTables>,
    /// Of the host's pages, where a slot does not say.
    pub(crate) level: u8,
}

pub(crate) fn wrong(error: VmError) -> Fault {
    match error {
        VmError::BadSlot { .. }
        | VmError::SlotOverlap { .. }
        | VmError::NoSlot { .. }
        | VmError::BadRange { .. }
        | VmError::BadHva { .. }
        | VmError::BadAnswer { .. }
        | VmError::BadAccess { .. }
        | VmError::DirtyLog { .. }
        | VmError::NotLogging { .. }
        | VmError::OtherLog { .. }
        | VmError::Config { .. }
        | VmError::GuestFault { .. }
        | VmError::NoCr3 { .. }
        | VmError::NoVcpu { .. } => Fault::Invalid(error.to_string()),
        VmError::Pool(_) | VmError::HostFull { .. } | VmError::Host { .. } | VmError::Quota { .. } => {
            Fault::Memory { message: error.to_string(), needed_bytes: 0, available_bytes: 0 }
        }
        VmError::Busy { .. } => Fault::Busy(error.to_string()),
        VmError::RingFull { .. } => Fault::RingFull(error.to_string()),
        VmError::Unsupported { .. } | VmError::NeedsTdp { .. } | VmError::NeedsShadow { .. } => {
            Fault::Unsupported(error.to_string())
        }
        VmError::Closed => Fault::Closed(error.to_string()),
        VmError::Cancelled => Fault::Cancelled,
        other => Fault::Internal(other.to_string()),
    }
}

impl Machine {
    /// Errors: a value that breaks a rule, values that contradict each other, a host that refuses address space.
    pub fn new(text: &str) -> Result<Machine, Fault> {
        let request: Request =
            serde_json::from_str(text).map_err(|e| Fault::Invalid(format!("config: {e}")))?;
        let invalid = |e: &dyn std::fmt::Display| Fault::Invalid(e.to_string());
        let profile = KernelProfile::named(&request.kernel_profile).map_err(|e| invalid(&e))?;
        let level = match request.page.as_str() {
            "4K" => 1,
            "2M" => 2,
            "1G" => 3,
            other => return Err(Fault::Invalid(format!("page={other:?}: expected 4K, 2M or 1G"))),
        };
        let preempt = match request.preempt.as_str() {
            "none" => Preempt::None,
            "voluntary" => Preempt::Voluntary,
            "full" => Preempt::Full,
            other => {
                return Err(Fault::Invalid(format!("preempt={other:?}: expected none, voluntary or full")));
            }
        };
        let ownership = match request.ownership.as_deref() {
            None => None,
            Some("vcpu") => Some(Ownership::Vcpu),
            Some("mmu") => Some(Ownership::Mmu),
            Some(other) => return Err(Fault::Invalid(format!("ownership={other:?}: expected vcpu or mmu"))),
        };
        let passes = request.passes.as_deref().map(Passes::parse).transpose().map_err(|e| invalid(&e))?;
        let worker_queue = request.worker_queue.as_deref().map(QueueKind::parse).transpose();
        let worker_queue = worker_queue.map_err(|e| invalid(&e))?;
        let dirty_mode = match request.dirty_mode.as_str() {
            "write-protect" => DirtyMode::WriteProtect,
            "d-bits" => DirtyMode::DBits,
            other => {
                return Err(Fault::Invalid(format!(
                    "dirty_mode={other:?}: expected write-protect or d-bits"
                )));
            }
        };
        let format = match request.format.as_str() {
            "npt" => FormatKind::Npt,
            "ept" => FormatKind::Ept,
            other => return Err(Fault::Invalid(format!("format={other:?}: expected npt or ept"))),
        };
        // Address space only: pages are taken from the host as they are used. 64 GiB of tables is 32 TiB of 4K.
        let max_tables = request.max_table_bytes.map_or(1 << 24, |bytes| bytes / 4096);
        let shadow = shadowed::spec(
            &request.design,
            request.paging.as_deref(),
            request.reclaim.as_deref(),
            request.quota,
        )?;
        let config = VmConfig {
            root_level: request.levels,
            maxphyaddr: if request.levels == 5 { 52 } else { 48 },
            design: Some(request.design),
            passes,
            ownership,
            vcpus: request.vcpus,
            max_tables: u32::try_from(max_tables).unwrap_or(u32::MAX),
            max_level: level,
            workers: request.workers,
            worker_cpus: request.worker_cpus,
            worker_queue,
            check_frames: request.check == "cheap",
            format: profile.format(format),
            eager_page_split: request.eager_page_split,
            dirty_mode,
            dirty_ring: request.dirty_ring,
            nx_huge_pages: request.nx_huge_pages,
            memslot_generation: request.memslot_generation,
            shadow,
            task: TaskConfig { preempt, tick_ns: request.tick_ns, ..TaskConfig::default() },
            ..VmConfig::new(profile)
        };
        let vm = Vm::new(config).map_err(wrong)?;
        let mut machine = Machine { vm, gate: Gate::new("VM"), guest: None, level };
        let pages = request.memory_bytes.unwrap_or(0) / 4096;
        if pages > 0 {
            let task = machine.task("memory");
            machine.vm.add_memory(&task, 0, pages, level).map_err(wrong)?;
        }
        if machine.vm.paging() == Paging::Guest {
            machine.guest = Some(GuestTables::new(&machine.vm, pages, level)?);
        }
        Ok(machine)
    }

    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(crate) fn task(&self, name: &str) -> Task<Real> {
        self.vm.task(name, Role::Caller)
    }

    pub(crate) fn enter(&self, name: &'static str) -> Result<Pass<'_>, Fault> {
        self.gate.enter(name)
    }

    pub fn memslots(&self) -> Result<Vec<Slot>, Fault> {
        let _inside = self.enter("memslots")?;
        let mut slots: Vec<Slot> = (self.vm.slots().iter())
            .map(|s| (s.id, s.as_id, s.base, s.pages, s.flags.readonly, s.flags.log_dirty))
            .collect();
        slots.sort_by_key(|slot| (slot.1, slot.2));
        Ok(slots)
    }

    /// The first vCPU that nobody uses, ready for guest entry.
    fn any_vcpu(&self) -> Result<Vcpu<'_, Real>, Fault> {
        let mut last = VmError::Busy { vcpu: 0 };
        for id in 0..self.vm.vcpu_count() {
            match self.vm.vcpu(id) {
                Ok(vcpu) => return Ok(vcpu),
                Err(busy @ VmError::Busy { .. }) => last = busy,
                Err(other) => return Err(wrong(other)),
            }
        }
        Err(wrong(last))
    }

    /// `gfns` of `None` is every memslot of address space 0.
    pub fn populate(
        &self,
        gfns: Option<Range<u64>>,
        how: Populate,
        control: &Control,
    ) -> Result<String, Fault> {
        let _inside = self.enter("populate")?;
        let begin = Instant::now();
        let spans = match gfns {
            Some(gfns) if gfns.is_empty() => Vec::new(),
            Some(gfns) => vec![gfns],
            // All that the guest's first process maps, which is no more than its memory.
            None if self.guest.is_some() => self.guest.iter().map(|guest| 0..guest.pages).collect(),
            None => self.vm.slots().space(0).iter().map(|slot| slot.gfns()).collect(),
        };
        let pages: u64 = spans.iter().map(|s| s.end - s.start).sum();
        let mut made = 0;
        let mut before = 0;
        for span in spans {
            let length = span.end - span.start;
            made +=
                self.watched(control, (before, pages), |progress| self.populate_span(span, how, progress))?;
            before += length;
        }
        Ok(json!({
            "sptes": made,
            "table_pages": self.tables(&self.task("count")),
            "wall_ns": begin.elapsed().as_nanos() as u64,
        })
        .to_string())
    }

    fn populate_span(&self, span: Range<u64>, how: Populate, progress: &Progress) -> Result<u64, Fault> {
        if how.by_fault {
            let vcpus = if how.threads == 0 { self.vm.vcpu_count() } else { how.threads };
            let vcpus = vcpus.min(self.vm.vcpu_count());
            return Ok(self.vm.populate_by_faults(0..vcpus, span, true, progress).map_err(wrong)?.0);
        }
        let options = BulkOptions { level: how.level, threads: how.threads, ..BulkOptions::default() };
        loop {
            let mut vcpu = self.any_vcpu()?;
            // Services what is requested: a root that a fast zap made obsolete is put, and another loaded.
            if !vcpu.enter().map_err(wrong)? {
                return Err(Fault::Closed("populate: the VM is closing".into()));
            }
            match self.vm.populate_bulk(&mut vcpu, span.clone(), &options, progress) {
                // A fast zap took the root away meanwhile: the rest goes under the next one.
                Err(VmError::Mmu(_)) if vcpu.current_root().is_some_and(|r| self.vm.mmu().is_obsolete(r)) => {
                }
                done => return done.map_err(wrong),
            }
        }
    }

    /// Runs `work` while a helper thread carries progress out and the cancel flag in.
    fn watched<T: Send>(
        &self,
        control: &Control,
        (before, of): (u64, u64),
        work: impl FnOnce(&Progress) -> Result<T, Fault> + Send,
    ) -> Result<T, Fault> {
        let progress = Progress::default();
        let progress = &progress;
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let watch = move || {
                let tick = Duration::from_millis(5);
                while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = stopped.recv_timeout(tick) {
                    let done = before + progress.done.load(Relaxed);
                    control.report("populate", (done as f64 / of.max(1) as f64).min(1.0));
                    progress.cancel.store(control.cancelled(), Relaxed);
                }
            };
            let watcher = std::thread::Builder::new().spawn_scoped(scope, watch);
            watcher.map_err(|error| Fault::Os { error, path: "starting a thread".into() })?;
            let result = work(progress);
            drop(stop);
            result
        })
    }

    pub fn fault(&self, vcpu: usize, access: GuestAccess) -> Result<Access, Fault> {
        let _inside = self.enter("fault")?;
        let mut vcpu = self.vm.vcpu(vcpu).map_err(wrong)?;
        let outcome = access_once(&mut vcpu, access)?;
        let mapped = outcome != AccessOutcome::Emulate as u8 && outcome != GUEST_FAULT;
        let leaf = if mapped { vcpu.lookup(access.gfn) } else { None };
        let (level, pfn) = leaf.map_or((0, 0), |(spte, level)| (level, frame(spte, level, access.gfn)));
        Ok((outcome, level, pfn))
    }

    /// The outcome of each access, in order.
    pub fn fault_batch(
        &self,
        vcpu: usize,
        gfns: &[u64],
        (write, exec): (bool, bool),
        control: &Control,
    ) -> Result<Vec<u8>, Fault> {
        let _inside = self.enter("fault_batch")?;
        let mut vcpu = self.vm.vcpu(vcpu).map_err(wrong)?;
        let mut outcomes = Vec::with_capacity(gfns.len());
        for chunk in gfns.chunks(4096) {
            if control.cancelled() {
                return Err(Fault::Cancelled);
            }
            for &gfn in chunk {
                outcomes.push(access_once(&mut vcpu, GuestAccess { gfn, write, exec })?);
            }
            if gfns.len() > 1 << 16 {
                control.report("fault_batch", outcomes.len() as f64 / gfns.len() as f64);
            }
        }
        Ok(outcomes)
    }

    /// The leaf of each gfn under the valid root of an address space; level 0 where there is none.
    pub fn lookup_batch(&self, as_id: u8, gfns: &[u64]) -> Result<Vec<Row>, Fault> {
        let _inside = self.enter("lookup_batch")?;
        if self.vm.paging() != Paging::Tdp {
            return self.shadow_lookup(as_id, gfns);
        }
        let task = self.task("lookup");
        let mmu = self.vm.mmu();
        let mut rows = Vec::with_capacity(gfns.len());
        for chunk in gfns.chunks(512) {
            // A root found in this section is not freed before it ends.
            let section = task.rcu_read();
            let root = self.valid_root(as_id);
            let found = |gfn| root.and_then(|root| mmu.lookup_within(&section, root, gfn));
            rows.extend(chunk.iter().map(|&gfn| match found(gfn) {
                Some((spte, level)) => [gfn, spte.raw(), frame(spte, level, gfn), u64::from(level)],
                None => [gfn, 0, 0, 0],
            }));
        }
        Ok(rows)
    }

    /// Every present leaf of `gfns` under the valid root of an address space, ascending.
    pub fn mappings(&self, as_id: u8, gfns: Range<u64>) -> Result<Vec<Row>, Fault> {
        let _inside = self.enter("mappings")?;
        if self.vm.paging() != Paging::Tdp {
            return self.shadow_mappings(as_id, gfns);
        }
        let task = self.task("mappings");
        let mut rows = Vec::new();
        let _rcu = task.rcu_read();
        if let Some(root) = self.valid_root(as_id) {
            let mut keep =
                |gfn: u64, level: u8, spte: Spte| rows.push([gfn, spte.raw(), spte.pfn(), u64::from(level)]);
            self.vm.mmu().leaves(&task, root, gfns, &mut keep);
        }
        Ok(rows)
    }

    fn valid_root(&self, as_id: u8) -> Option<u32> {
        let mmu = self.vm.mmu();
        mmu.listed_roots().find(|&root| !mmu.is_obsolete(root) && mmu.as_id(root) == as_id)
    }

    pub fn unmap(&self, gfns: Range<u64>) -> Result<String, Fault> {
        let _inside = self.enter("unmap")?;
        self.zapping(|task| {
            let pages =
                if gfns.is_empty() { 0 } else { self.vm.unmap_gfns(task, gfns, true).map_err(wrong)? };
            Ok(json!({ "host_pages": pages }))
        })
    }

    pub fn fast_zap(&self) -> Result<String, Fault> {
        let _inside = self.enter("fast_zap")?;
        self.zapping(|task| Ok(times_json(&self.vm.fast_zap(task).map_err(wrong)?)))
    }

    pub fn drop_root(&self, vcpu: usize) -> Result<String, Fault> {
        let _inside = self.enter("drop_root")?;
        self.zapping(|_| {
            self.vm.vcpu(vcpu).map_err(wrong)?.drop_root().map_err(wrong)?;
            Ok(json!({}))
        })
    }

    /// Page-table pages that are linked, and the roots on the list, of both MMUs.
    fn tables(&self, task: &Task<Real>) -> i64 {
        self.tdp_tables(task) + self.shadow_sums().1
    }

    fn tdp_tables(&self, task: &Task<Real>) -> i64 {
        let _rcu = task.rcu_read();
        self.vm.mmu().linked_tables() + self.vm.mmu().listed_roots().count() as i64
    }

    /// What `work` unmapped and took, with what it says itself.
    pub(crate) fn zapping(
        &self,
        work: impl FnOnce(&Task<Real>) -> Result<Value, Fault>,
    ) -> Result<String, Fault> {
        let mmu = self.vm.mmu();
        let task = self.task("zap");
        let leaves = || mmu.leaf_pages().iter().sum::<i64>() + self.shadow_sums().0;
        let (sptes, tables, begin) = (leaves(), self.tables(&task), Instant::now());
        let mut report = work(&task)?;
        report["wall_ns"] = json!(begin.elapsed().as_nanos() as u64);
        report["sptes"] = json!((sptes - leaves()).max(0));
        report["table_pages_before"] = json!(tables);
        report["table_pages_after"] = json!(self.tables(&task));
        Ok(report.to_string())
    }

    pub fn stats(&self) -> Result<String, Fault> {
        let _inside = self.enter("stats")?;
        let mmu = self.vm.mmu();
        let task = self.task("stats");
        let kvm = self.vm.stats();
        let (roots, invalid) = {
            let _rcu = task.rcu_read();
            let roots: Vec<u32> = mmu.listed_roots().collect();
            (roots.len(), roots.iter().filter(|&&root| mmu.is_obsolete(root)).count())
        };
        let (pool, frames) = (mmu.pool().stats(), self.vm.side().primary.frames().stats());
        let (shadow, held, obsolete) = self.shadow_stats().unwrap_or((Value::Null, 0, 0));
        Ok(json!({
            "shadow": shadow,
            "pages_4k": kvm.pages_4k, "pages_2m": kvm.pages_2m, "pages_1g": kvm.pages_1g,
            "pf_taken": kvm.pf_taken, "pf_fixed": kvm.pf_fixed, "pf_emulate": kvm.pf_emulate,
            "pf_spurious": kvm.pf_spurious, "pf_fast": kvm.pf_fast,
            "pf_mmio_spte_created": kvm.pf_mmio_spte_created, "nx_lpage_splits": kvm.nx_lpage_splits,
            "remote_tlb_flush": kvm.remote_tlb_flush,
            "remote_tlb_flush_requests": kvm.remote_tlb_flush_requests,
            "table_pages": mmu.linked_tables() + roots as i64 + self.shadow_sums().1,
            "roots": roots + held, "roots_invalid": invalid + obsolete,
            "pool_pages": pool.taken, "pool_peak_pages": pool.peak, "pool_allocs": pool.allocs,
            "pool_frees": pool.frees, "pool_cap_hits": pool.cap_hits, "flushes": mmu.flushes(),
            "frames_issued": frames.issued, "frames_released": frames.released,
            "frames_dirtied": frames.dirtied, "frames_accessed": frames.accessed,
        })
        .to_string())
    }

    /// Violations as text. Reads every entry.
    pub fn verify(&self) -> Result<Vec<String>, Fault> {
        let _inside = self.enter("verify")?;
        let mmu = self.vm.mmu();
        let task = self.task("verify");
        let mut found = mmu.violations();
        let (leaves, tables) = (mmu.leaf_pages(), self.tdp_tables(&task));
        let counted = mmu.count_all(&task);
        // A count that moved while the tree was read says nothing.
        if leaves == mmu.leaf_pages() && tables == self.tdp_tables(&task) {
            // Kernels before 5.15 keep no count.
            let sizes = if mmu.profile().page_stats { ["4K", "2M", "1G"].as_slice() } else { &[] };
            for (at, (&kept, name)) in leaves.iter().zip(sizes).enumerate() {
                let there = counted.leaves[at + 1] as i64;
                if kept != there {
                    found
                        .push(format!("{kept} leaves of {name} by the running count, {there} in the tables"));
                }
            }
            if tables != counted.all_tables() as i64 {
                found.push(format!(
                    "{tables} tables by the running count, {} reachable",
                    counted.all_tables()
                ));
            }
        }
        found.extend(self.shadow_violations());
        let frames = self.vm.side().primary.frames();
        found.extend(frames.violations().iter().map(|violation| format!("frame owner: {violation:?}")));
        let pool = mmu.pool().stats();
        if pool.double_frees != 0 {
            found.push(format!("{} tables freed twice", pool.double_frees));
        }
        Ok(found)
    }

    /// `None`: it was closed already.
    pub fn close(&self, timeout: Option<Duration>, control: &Control) -> Result<Option<String>, Fault> {
        if !self.gate.close(timeout, || !control.cancelled())? {
            return Ok(None);
        }
        let report = self.vm.close().map_err(wrong)?;
        self.gate.finish();
        let mut violations = report.violations.clone();
        if !report.is_clean() && violations.is_empty() {
            violations.push(format!("{report:?}"));
        }
        Ok(Some(
            json!({
                "wall_ns": report.total_ns,
                "zap_all_ns": report.zap_all_ns,
                "table_pages_leaked": report.tables_leaked,
                "violations": violations,
            })
            .to_string(),
        ))
    }
}

/// `FaultOutcome.GUEST_FAULT` of the face: the outcome after those of [`AccessOutcome`] but `Stopped`.
const GUEST_FAULT: u8 = 6;

/// One access, as the guest: enters, accesses, and stays in the guest for the next.
fn access_once(vcpu: &mut Vcpu<'_, Real>, access: GuestAccess) -> Result<u8, Fault> {
    match vcpu.access(access) {
        Ok(AccessOutcome::Stopped) => Err(Fault::Closed("the VM is closing".into())),
        Ok(outcome) => Ok(outcome as u8),
        Err(VmError::GuestFault { .. }) => Ok(GUEST_FAULT),
        Err(error) => Err(wrong(error)),
    }
}

/// The frame of `gfn` itself under a leaf that may cover many.
pub(crate) fn frame(spte: Spte, level: u8, gfn: u64) -> u64 {
    spte.pfn() + (gfn & (tdpmmu_spte::geometry::span(level) - 1))
}

pub(crate) fn times_json(times: &FastZapTimes) -> Value {
    json!({
        "lock_wait_ns": times.lock_wait_ns,
        "exclusive_hold_ns": times.exclusive_hold_ns,
        "exclusive_total_ns": times.exclusive_total_ns,
        "exclusive_longest_ns": times.exclusive_longest_ns,
        "kick_wait_ns": times.kick_wait_ns,
        "kicked": times.kicked,
        "zap_ns": times.zap_ns,
        "total_ns": times.total_ns,
    })
}

/// Frees a machine that nobody closed, on a thread of its own: a garbage collection must not wait for a teardown.
/// In a forked child it is only forgotten: what a teardown waits for does not exist there.
pub fn abandon(machine: Arc<Machine>) {
    if machine.gate.forked() {
        std::mem::forget(machine);
    } else if !machine.gate.finished() {
        // Where no thread can be had, the closure is dropped here, and the machine with it.
        let _ = std::thread::Builder::new().name("tdpmmu-drop".into()).spawn(move || drop(machine));
    }
}
