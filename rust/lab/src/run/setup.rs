//! Before the clock runs: the VM, its memory, its population.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tdpmmu_mmu::QueueKind;
use tdpmmu_platform::{Observer, Platform, Preempt, RcuConfig, Role as TaskRole, TaskConfig};
use tdpmmu_shadow::ReclaimKind;
use tdpmmu_spte::geometry::{max_gfn, page_bytes, span};
use tdpmmu_spte::{KernelProfile, Ownership, Passes};
use tdpmmu_vm::slots::Region;
use tdpmmu_vm::{AdMix, BulkOptions, MAX_HOST_PAGES, Paging, Progress, SlotFlags, VmConfig};

use super::{Shared, guest_os, internal, lock};
use crate::LabError;
use crate::scenario::{Ad, By, Populate, VmSpec};

/// The extra slot that a memslot update deletes: far from the guest's memory.
const EXTRA_SLOT: u16 = 500;
/// The slot that somebody else creates meanwhile.
const OTHER_SLOT: u16 = 501;
const EXTRA_PAGES: u64 = 64;
/// At most so many pieces does the host collapse in a scene.
pub(crate) const MOST_COLLAPSED: u64 = 16;

/// Settings of tasks in a scenario.
pub(super) fn task_config(spec: &VmSpec) -> TaskConfig {
    let preempt = match spec.preempt.as_str() {
        "none" => Preempt::None,
        "voluntary" => Preempt::Voluntary,
        _ => Preempt::Full,
    };
    TaskConfig {
        preempt,
        tick_ns: spec.tick_ns,
        measure: true,
        attribute: true,
        step_ns: spec.step_ns,
        force_yield: spec.force_yield,
        record: spec.record,
        pace: None,
    }
}

/// The VM's configuration from its spec.
///
/// # Errors
/// [`LabError::Usage`] for names that do not parse.
pub fn vm_config(spec: &VmSpec, observer: Option<Arc<dyn Observer>>) -> Result<VmConfig, LabError> {
    let bad = |e: String| LabError::Usage(e);
    let profile = KernelProfile::named(&spec.profile).map_err(|e| bad(e.to_string()))?;
    let mut config = VmConfig::new(profile);
    config.root_level = spec.levels;
    config.maxphyaddr = if spec.levels == 5 { 52 } else { 48 };
    config.design = Some(spec.design.clone());
    if spec.shadow.is_none() {
        config.passes = Some(Passes::parse(&spec.passes).map_err(|e| bad(e.to_string()))?);
        config.ownership = Some(match spec.ownership.as_str() {
            "vcpu" => Ownership::Vcpu,
            "mmu" => Ownership::Mmu,
            other => return Err(bad(format!("ownership={other:?}: expected vcpu or mmu"))),
        });
    }
    if let Some(shadow) = &spec.shadow {
        config.shadow.paging = Paging::parse(&shadow.paging)
            .ok_or_else(|| bad(format!("paging={:?}: expected direct or guest", shadow.paging)))?;
        config.shadow.reclaim = ReclaimKind::parse(&shadow.reclaim).map_err(|e| bad(e.to_string()))?;
        config.shadow.quota = shadow.quota;
    }
    config.workers = spec.workers;
    config.worker_cpus.clone_from(&spec.worker_cpus);
    let queue = spec.worker_queue.as_deref().map(QueueKind::parse).transpose();
    config.worker_queue = queue.map_err(|e| bad(e.to_string()))?;
    config.vcpus = spec.vcpus;
    config.max_tables = spec.max_tables;
    config.max_level = spec.max_level;
    // Room to collapse into: the host copies to a run of frames that is free and aligned.
    let collapsed = if spec.max_level > spec.level { MOST_COLLAPSED * span(spec.max_level) } else { 0 };
    // Each small region begins a GiB of its own.
    let memory = spec.memory_bytes / page_bytes(1);
    // A guest's own tables; a region begins a GiB of its own.
    let tables = guest_os::table_pages(memory, spec.level, spec.levels) + span(3);
    let pages = memory + collapsed + tables + 2 * span(3);
    config.host_pages = pages.clamp(1 << 20, MAX_HOST_PAGES);
    config.write_back = spec.write_back;
    config.task = task_config(spec);
    config.rcu = RcuConfig { log: spec.log, ..RcuConfig::default() };
    config.observer = observer;
    Ok(config)
}

/// Small memslots far from the guest's memory.
pub(super) struct Regions {
    /// The one that updates delete.
    pub(super) extra: Region,
    /// The same, moved.
    pub(super) moved: Region,
    /// One that does not exist yet.
    pub(super) other: Region,
}

impl<P: Platform> Shared<'_, P> {
    /// First gfn of one of several places far from the guest's memory.
    fn place(&self, n: u64) -> u64 {
        let (middle, away) = (max_gfn(4, 48) / 2, n * 2 * EXTRA_PAGES);
        if self.pages() <= middle {
            return middle + away;
        }
        max_gfn(self.scenario.vm.levels, 52) - EXTRA_PAGES - away
    }

    /// A small region at one of these places.
    fn region(&self, id: u16, place: u64) -> Result<Region, LabError> {
        let base = self.place(place);
        let hva =
            self.vm.side().primary.region(EXTRA_PAGES, base, 1, true).map_err(internal("host memory"))?;
        Ok(Region { id, as_id: 0, base, pages: EXTRA_PAGES, hva, flags: SlotFlags::default() })
    }

    /// Memory and memslots, and the pool's pages touched.
    pub(super) fn prepare(&self) -> Result<(), LabError> {
        let spec = &self.scenario.vm;
        let task = self.vm.task("setup", TaskRole::Caller);
        self.vm.add_memory(&task, 0, self.pages(), spec.level).map_err(internal("memslots"))?;
        let (extra, other) = (self.region(EXTRA_SLOT, 0)?, self.region(OTHER_SLOT, 2)?);
        self.vm.set_memslot(&task, &extra).map_err(internal("the extra memslot"))?;
        // A move keeps the host address.
        let moved = Region { base: self.place(1), ..extra };
        let _ = self.regions.set(Regions { extra, moved, other });
        if spec.shadow.as_ref().is_some_and(|shadow| shadow.paging == "guest") {
            let tables = guest_os::build(self.vm, self.pages(), spec.level, spec.levels)?;
            lock(&self.collected).guest_tables = tables;
        }
        let _ = self.base_role.set(self.vm.vcpu(0).map_err(internal("a vCPU"))?.role());
        if spec.smm {
            self.vm.share_memory_with_smm(&task).map_err(internal("memslots of SMM"))?;
        }
        self.control.report("touching page-table memory", 0.0);
        let begin = P::ticks();
        // In steps, so that an interrupt is heeded while gigabytes are touched.
        for step in 1..=16 {
            self.control.check()?;
            self.vm
                .mmu()
                .pool()
                .prefault(self.scenario.estimate.tables * step / 16)
                .map_err(|e| LabError::Internal(e.to_string()))?;
        }
        lock(&self.collected).prefault_ns = P::ticks_to_ns(P::ticks() - begin);
        self.scenario.populate.as_ref().map_or(Ok(()), |how| self.populate(how))
    }

    /// Once per role; vCPU 0 ends in the common one, with all the roots in its cache. Then in SMM.
    fn populate(&self, how: &Populate) -> Result<(), LabError> {
        let vcpus = if how.by == By::Bulk { 0..1 } else { 0..self.guests };
        for variant in (0..how.roots).rev() {
            if how.roots > 1 {
                for id in vcpus.clone() {
                    let mut vcpu = self.vm.vcpu(id).map_err(internal("a vCPU"))?;
                    vcpu.switch_role(self.role(variant));
                }
            }
            self.populate_root(how, vcpus.clone())?;
        }
        if let Some(id) = how.smm {
            self.vm.vcpu(id).map_err(internal("a vCPU"))?.enter_smm();
            self.populate_root(how, id..id + 1)?;
        }
        Ok(())
    }

    fn populate_root(&self, how: &Populate, vcpus: Range<usize>) -> Result<(), LabError> {
        let spec = &self.scenario.vm;
        let pages = self.pages();
        let progress = Progress::default();
        // Cancellation is watched from beside too.
        let fraction = || {
            if self.stopped() {
                progress.cancel.store(true, Ordering::Relaxed);
            }
            progress.done.load(Ordering::Relaxed) as f64 / pages as f64
        };
        let mut wall = 0;
        let made = self
            .watched("populating", fraction, || {
                let begin = P::ticks();
                let made = match how.by {
                    By::Bulk => self.vm.vcpu(vcpus.start).and_then(|mut vcpu| {
                        let ad = match how.ad {
                            Ad::Clean => AdMix::Untouched,
                            Ad::Accessed => AdMix::Clean,
                            Ad::Dirty => AdMix::Dirty,
                        };
                        let options = BulkOptions { level: spec.level, ad, threads: usize::from(!P::BULK) };
                        self.vm.populate_bulk(&mut vcpu, 0..pages, &options, &progress)
                    }),
                    By::Faults => {
                        let write = how.ad == Ad::Dirty;
                        self.vm.populate_by_faults(vcpus, 0..pages, write, &progress).map(|(made, _)| made)
                    }
                };
                wall = P::ticks() - begin;
                made
            })
            .map_err(internal("populating"))?;
        let mut all = lock(&self.collected);
        all.populate_ns += P::ticks_to_ns(wall);
        all.populated += made;
        Ok(())
    }
}
