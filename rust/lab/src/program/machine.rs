//! The VM of a program: small, and all defaults.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tdpmmu_platform::{Observer, RcuConfig, TaskConfig};
use tdpmmu_shadow::ReclaimKind;
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_spte::{FormatKind, KernelProfile, Ownership, Passes};
use tdpmmu_vm::{DirtyMode, MAX_HOST_PAGES, Paging, VmConfig};

use super::ProgramError;
use super::guests::{table_pages, tables_slot};

/// A memslot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SlotSpec {
    /// Slot id.
    pub id: u16,
    /// Address space: 1 is system management mode.
    pub as_id: u8,
    /// First gfn.
    pub gfn: u64,
    /// Pages.
    pub pages: u64,
    /// First page behind it, counted from the beginning of the program's host memory.
    pub hva_page: u64,
    /// KVM_MEM_LOG_DIRTY_PAGES.
    pub log: bool,
    /// KVM_MEM_READONLY.
    pub read_only: bool,
}

impl SlotSpec {
    /// A plain slot whose host pages have the numbers of its gfns.
    pub fn flat(id: u16, gfn: u64, pages: u64) -> Self {
        Self { id, gfn, pages, hva_page: gfn, ..Self::default() }
    }

    /// The same slot with a dirty log.
    pub fn logged(mut self) -> Self {
        self.log = true;
        self
    }
}

/// A tree of the guest's own page tables, which is there before any vCPU runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessSpec {
    /// Pages mapped from 0 on, each to the frame of its number.
    pub linear: u64,
    /// Its top table is one level higher than that process's (by number, a lower one), and links it at its first entry: for an L2.
    pub over: Option<usize>,
}

impl ProcessSpec {
    /// The first `pages` pages mapped to themselves.
    pub const fn linear(pages: u64) -> Self {
        Self { linear: pages, over: None }
    }

    /// One level above process `below`.
    pub const fn over(below: usize) -> Self {
        Self { linear: 0, over: Some(below) }
    }
}

/// The VM. Names as on the command line; `None`: the design's or the profile's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineSpec {
    /// Kernel profile with switches.
    pub profile: String,
    /// Zap design; empty: the profile's.
    pub design: String,
    /// Passes.
    pub passes: Option<String>,
    /// Owner of the first reference: `vcpu` or `mmu`.
    pub ownership: Option<String>,
    /// Whose queue workers serve: `per-vm` or `system`.
    pub worker_queue: Option<String>,
    /// Worker threads of designs with a queue.
    pub workers: usize,
    /// vCPUs.
    pub vcpus: usize,
    /// Root level, 4 or 5.
    pub levels: u8,
    /// Memslots at the start.
    pub slots: Vec<SlotSpec>,
    /// Address space 1 gets the same memslots.
    pub smm: bool,
    /// Level by which the host maps its memory.
    pub host_level: u8,
    /// Largest leaf.
    pub max_level: u8,
    /// Most tables.
    pub max_tables: u32,
    /// `npt` or `ept`.
    pub format: String,
    /// `write-protect` or `d-bits`.
    pub dirty_mode: String,
    /// Entries of each vCPU's dirty ring; `None`: bitmaps.
    pub ring: Option<u32>,
    /// Module parameter eager_page_split.
    pub eager_split: bool,
    /// Module parameter nx_huge_pages at the start.
    pub nx: bool,
    /// Entries handled between two reschedule checks.
    pub batch: u16,
    /// mmu_invalidate_seq at the start.
    pub start_seq: u64,
    /// Memslot generation at the start, even.
    pub generation: u64,
    /// Each check of a walk asks to yield, whoever waits.
    pub force_yield: Option<u32>,
    /// Under a shadow design: `direct` or `guest` (the guest's own tables are shadowed); empty: direct.
    pub paging: String,
    /// Under a design of the TDP MMU: vCPUs may enter an L2, on shadow pages of the tables that L1 keeps for it.
    pub nested: bool,
    /// Most shadow pages.
    pub quota: Option<u32>,
    /// How shadow pages and lockless walkers keep out of each other's way: `counter`, `ipi`, `membarrier`, `rcu`, `epoch`; empty: ipi.
    pub reclaim: String,
    /// The guest's own page tables; vCPUs that run on shadow pages of these begin in the first.
    pub processes: Vec<ProcessSpec>,
    /// Freed tables are poisoned and used again last: a use after free shows. Off: a page becomes a table again at once.
    pub quarantine: bool,
}

impl Default for MachineSpec {
    fn default() -> Self {
        Self {
            profile: "6.12".into(),
            design: String::new(),
            passes: None,
            ownership: None,
            worker_queue: None,
            workers: 1,
            vcpus: 2,
            levels: 4,
            slots: vec![SlotSpec::flat(0, 0, 1024)],
            smm: false,
            host_level: 1,
            max_level: 3,
            max_tables: 256,
            format: "npt".into(),
            dirty_mode: "write-protect".into(),
            ring: None,
            eager_split: true,
            nx: false,
            batch: 1,
            start_seq: 0,
            generation: 0,
            force_yield: None,
            paging: String::new(),
            nested: false,
            quota: None,
            reclaim: String::new(),
            processes: Vec::new(),
            quarantine: true,
        }
    }
}

/// Room beside the program's memory for frames that a page is copied to.
const SPARE_PAGES: u64 = 4 * span(2);

impl MachineSpec {
    /// The machine under another design and profile.
    pub fn of(design: &str, profile: &str) -> Self {
        Self { design: design.into(), profile: profile.into(), ..Self::default() }
    }

    /// The profile.
    ///
    /// # Errors
    /// [`ProgramError::Machine`].
    pub fn kernel(&self) -> Result<KernelProfile, ProgramError> {
        KernelProfile::named(&self.profile).map_err(|e| bad("profile", &self.profile, e.to_string()))
    }

    /// The design that holds.
    ///
    /// # Errors
    /// [`ProgramError::Machine`] without such a profile.
    pub fn design_name(&self) -> Result<String, ProgramError> {
        Ok(if self.design.is_empty() { self.kernel()?.design.to_owned() } else { self.design.clone() })
    }

    /// What a VM is made from, with `observer` listening.
    ///
    /// # Errors
    /// [`ProgramError::Machine`] with the field, its value and the rule.
    pub fn config(
        &self,
        host_pages: u64,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<VmConfig, ProgramError> {
        let profile = self.kernel()?;
        let mut config = VmConfig::new(profile);
        config.format = match self.format.as_str() {
            "npt" => profile.format(FormatKind::Npt),
            "ept" => profile.format(FormatKind::Ept),
            other => return Err(bad("format", other, "npt or ept")),
        };
        config.root_level = self.levels;
        config.maxphyaddr = if self.levels == 5 { 52 } else { 48 };
        config.design = (!self.design.is_empty()).then(|| self.design.clone());
        if let Some(passes) = &self.passes {
            config.passes = Some(Passes::parse(passes).map_err(|e| bad("passes", passes, e.to_string()))?);
        }
        config.ownership = match self.ownership.as_deref() {
            None => None,
            Some("vcpu") => Some(Ownership::Vcpu),
            Some("mmu") => Some(Ownership::Mmu),
            Some(other) => return Err(bad("ownership", other, "vcpu or mmu")),
        };
        if let Some(queue) = &self.worker_queue {
            let kind =
                tdpmmu_mmu::QueueKind::parse(queue).map_err(|e| bad("worker_queue", queue, e.to_string()))?;
            config.worker_queue = Some(kind);
        }
        config.workers = self.workers;
        config.vcpus = self.vcpus;
        config.max_tables = self.max_tables;
        config.max_level = self.max_level;
        config.batch = self.batch;
        config.hugepages = false;
        config.quarantine = self.quarantine;
        // Each region begins a GiB of its own, and collapsed memory is copied.
        let host_pages = host_pages + if self.processes.is_empty() { 0 } else { table_pages() };
        let collapse = if self.max_level > self.host_level { host_pages } else { 0 };
        let room = host_pages + collapse + 2 * span(3) + SPARE_PAGES;
        config.host_pages = room.min(MAX_HOST_PAGES);
        config.dirty_mode = match self.dirty_mode.as_str() {
            "write-protect" => DirtyMode::WriteProtect,
            "d-bits" => DirtyMode::DBits,
            other => return Err(bad("dirty_mode", other, "write-protect or d-bits")),
        };
        config.dirty_ring = self.ring;
        config.eager_page_split = self.eager_split;
        config.nx_huge_pages = self.nx;
        config.memslot_generation = self.generation;
        config.shadow.nested = self.nested;
        config.shadow.quota = self.quota;
        if !self.paging.is_empty() {
            config.shadow.paging =
                Paging::parse(&self.paging).ok_or_else(|| bad("paging", &self.paging, "direct or guest"))?;
        }
        if !self.reclaim.is_empty() {
            config.shadow.reclaim = ReclaimKind::parse(&self.reclaim)
                .map_err(|e| bad("reclaim", &self.reclaim, e.to_string()))?;
        }
        config.check_frames = true;
        config.task = TaskConfig {
            measure: false,
            attribute: false,
            force_yield: self.force_yield,
            ..TaskConfig::default()
        };
        config.rcu = RcuConfig { batch_delay_ns: 0, ..RcuConfig::default() };
        config.observer = observer;
        config.check().map_err(|error| ProgramError::Machine {
            field: "machine",
            value: self.design_name().unwrap_or_default(),
            rule: error.to_string(),
        })?;
        Ok(config)
    }

    /// Pages of host memory that slots reach into.
    pub fn host_pages<'a>(&'a self, later: impl Iterator<Item = &'a SlotSpec>) -> u64 {
        let ends = self.slots.iter().chain(later).map(|slot| slot.hva_page.saturating_add(slot.pages));
        ends.max().unwrap_or(1).max(1)
    }

    /// The memslot of the guest's own tables, if there are any, behind `host_pages` pages.
    pub(super) fn tables(&self, host_pages: u64) -> Option<SlotSpec> {
        (!self.processes.is_empty()).then(|| tables_slot(host_pages))
    }

    /// Is what the hardware translates, and TLBs hold, another address than the guest-physical one, at least at times?
    pub fn has_virtual_gfns(&self) -> bool {
        self.paging == "guest" || self.nested
    }

    /// Bytes of guest memory at the start.
    pub fn memory_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.pages * page_bytes(1)).sum()
    }
}

fn bad(field: &'static str, value: &str, rule: impl Into<String>) -> ProgramError {
    ProgramError::Machine { field, value: value.to_owned(), rule: rule.into() }
}
