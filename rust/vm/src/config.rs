//! What a VM is made from.

use std::sync::Arc;

use tdpmmu_mmu::{DesignOptions, OtherOwnership, QueueKind};
use tdpmmu_platform::{Observer, RcuConfig, TaskConfig};
use tdpmmu_shadow::ReclaimKind;
use tdpmmu_spte::{Format, FormatKind, KernelProfile, LEVEL_1G, Ownership, Passes};

use crate::VmError;
use crate::design::{design_info, shadow_design};
use crate::dirty::DirtyMode;

/// Most pages of a modelled host: 64 TiB for a guest, and 4 GiB for what a test puts beside it.
pub const MAX_HOST_PAGES: u64 = (1 << 34) + (1 << 20);

/// Most worker threads of one VM.
pub const MAX_WORKERS: usize = 1024;

/// The level (1 to 3) by which the host maps a host virtual page now.
pub type HostLevel = Arc<dyn Fn(u64) -> u8 + Send + Sync>;

/// How a vCPU's translations come about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Paging {
    /// Guest-physical addresses are translated by the TDP MMU.
    #[default]
    Tdp,
    /// Guest-physical addresses are translated by direct shadow pages: EPT or NPT before 5.11, and with tdp_mmu=N since.
    Direct,
    /// The guest's virtual addresses are translated by pages that shadow the guest's own tables: no EPT or NPT at all (tdp=0).
    Guest,
}

impl Paging {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Tdp, Self::Direct, Self::Guest];

    /// Its name in options and results.
    pub const fn name(self) -> &'static str {
        ["tdp", "direct", "guest"][self as usize]
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|paging| paging.name() == name)
    }
}

/// The shadow MMU of a VM. The VM has one if its design is one of the shadow MMU's, or if `nested` asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowSpec {
    /// What the vCPUs run on under a shadow design; [`Paging::Tdp`] is not possible there. Ignored under a design of the TDP MMU.
    pub paging: Paging,
    /// How freed shadow pages and lockless walkers keep out of each other's way.
    pub reclaim: ReclaimKind,
    /// Most shadow pages in use (KVM_SET_NR_MMU_PAGES); `None`: no bound but the pool's.
    pub quota: Option<u32>,
    /// vCPUs of a VM on the TDP MMU may enter an L2, on shadow pages of the tables that L1 keeps for it.
    pub nested: bool,
}

impl Default for ShadowSpec {
    fn default() -> Self {
        Self { paging: Paging::Direct, reclaim: ReclaimKind::default(), quota: None, nested: false }
    }
}

/// Fewest shadow pages that a quota may allow: a fault takes up to five, under a root. (KVM_SET_NR_MMU_PAGES asks for 64.)
pub const MIN_QUOTA: u32 = 8;

/// Everything that decides how a VM behaves. `None` means the design's historic setting, else the profile's.
#[derive(Clone)]
pub struct VmConfig {
    /// The kernel whose rules hold.
    pub profile: KernelProfile,
    /// EPT or NPT entries.
    pub format: Format,
    /// 4 or 5.
    pub root_level: u8,
    /// Physical address bits, 36..=52.
    pub maxphyaddr: u8,
    /// Zap design; `None`: the profile's.
    pub design: Option<String>,
    /// Granularities of a root zap.
    pub passes: Option<Passes>,
    /// Who owns a root's first reference.
    pub ownership: Option<Ownership>,
    /// Worker threads of designs with a queue, at least 1; others ignore this and the next two.
    pub workers: usize,
    /// CPUs that workers are bound to, worker n to the n-th, round and round; empty: not bound.
    pub worker_cpus: Vec<usize>,
    /// Whose queue the workers serve.
    pub worker_queue: Option<QueueKind>,
    /// vCPUs.
    pub vcpus: usize,
    /// Most page-table pages that may exist.
    pub max_tables: u32,
    /// Back tables with huge pages.
    pub hugepages: bool,
    /// Poison freed tables, and use them again only when no others are left: for who looks for a use after free.
    pub quarantine: bool,
    /// Entries handled between two reschedule checks in a leaf table: 512 to measure, 1 to conform.
    pub batch: u16,
    /// Write Dirty and Accessed back at zap (where the profile does).
    pub write_back: bool,
    /// Largest leaf, 1..=3.
    pub max_level: u8,
    /// Most pages that all regions of the modelled host may have together, up to [`MAX_HOST_PAGES`].
    pub host_pages: u64,
    /// Who answers for the host's mapping levels where nobody faults (the end of dirty logging); `None`: the modelled host.
    pub host_level: Option<HostLevel>,
    /// Module parameter eager_page_split: huge leaves are split when logging starts.
    pub eager_page_split: bool,
    /// How dirty pages are told from clean ones.
    pub dirty_mode: DirtyMode,
    /// Entries of each vCPU's dirty ring, a power of two; `None`: bitmaps.
    pub dirty_ring: Option<u32>,
    /// Module parameter nx_huge_pages at the start.
    pub nx_huge_pages: bool,
    /// Generation that address space 0 begins with, even; space 1 begins with the number after it.
    pub memslot_generation: u64,
    /// The shadow MMU, where there is one.
    pub shadow: ShadowSpec,
    /// Check the owner of the frame at each guest access too.
    pub check_frames: bool,
    /// Settings of tasks.
    pub task: TaskConfig,
    /// Settings of RCU.
    pub rcu: RcuConfig,
    /// Who listens.
    pub observer: Option<Arc<dyn Observer>>,
}

impl VmConfig {
    /// A VM as `profile` runs it: NPT, four levels, one vCPU, up to 2^20 tables and 64 TiB of host memory.
    pub fn new(profile: KernelProfile) -> Self {
        Self {
            format: profile.format(FormatKind::Npt),
            profile,
            root_level: 4,
            maxphyaddr: 48,
            design: None,
            passes: None,
            ownership: None,
            workers: 1,
            worker_cpus: Vec::new(),
            worker_queue: None,
            vcpus: 1,
            max_tables: 1 << 20,
            hugepages: true,
            quarantine: false,
            batch: 512,
            write_back: true,
            max_level: LEVEL_1G,
            host_pages: 1 << 34,
            host_level: None,
            eager_page_split: true,
            dirty_mode: DirtyMode::WriteProtect,
            dirty_ring: None,
            nx_huge_pages: false,
            memslot_generation: 0,
            shadow: ShadowSpec::default(),
            check_frames: false,
            task: TaskConfig::default(),
            rcu: RcuConfig::default(),
            observer: None,
        }
    }

    /// The design's name that holds.
    pub fn design_name(&self) -> &str {
        self.design.as_deref().unwrap_or(self.profile.design)
    }

    /// What its vCPUs run on.
    pub fn paging(&self) -> Paging {
        if shadow_design(self.design_name()).is_some() { self.shadow.paging } else { Paging::Tdp }
    }

    /// Has the VM a shadow MMU?
    pub fn has_shadow(&self) -> bool {
        self.shadow.nested || shadow_design(self.design_name()).is_some()
    }

    /// The design of the TDP MMU: the profile's in a VM whose vCPUs have no roots of it.
    pub fn tdp_design_name(&self) -> &str {
        let wanted = self.design_name();
        match shadow_design(wanted) {
            None => wanted,
            // A profile that was told to have a shadow design is still the kernel of its name.
            Some(_) if shadow_design(self.profile.design).is_some() => {
                KernelProfile::named(self.profile.name).map_or("sync", |profile| profile.design)
            }
            Some(_) => self.profile.design,
        }
    }

    /// What the design is built with.
    pub fn design_options(&self) -> DesignOptions {
        DesignOptions {
            workers: self.workers,
            worker_cpus: self.worker_cpus.clone(),
            queue: self.worker_queue,
        }
    }

    /// Checks the values against each other; returns what holds: (passes, ownership).
    ///
    /// # Errors
    /// [`VmError::Config`] naming the value and the rule.
    pub fn check(&self) -> Result<(Passes, Ownership), VmError> {
        let bad = |what, value: String, rule| Err(VmError::Config { what, value, rule });
        if !(4..=5).contains(&self.root_level) {
            return bad("root_level", self.root_level.to_string(), "a TDP root has 4 or 5 levels");
        }
        if !(36..=52).contains(&self.maxphyaddr) {
            return bad("maxphyaddr", self.maxphyaddr.to_string(), "36 to 52 physical address bits");
        }
        if self.vcpus == 0 || self.vcpus > 4096 {
            return bad("vcpus", self.vcpus.to_string(), "1 to 4096 (KVM_MAX_VCPUS)");
        }
        if !(1..=3).contains(&self.max_level) {
            return bad("max_level", self.max_level.to_string(), "leaves are 4K (1), 2M (2) or 1G (3)");
        }
        if !(1..=512).contains(&self.batch) {
            return bad("batch", self.batch.to_string(), "1 to 512 entries between two checks");
        }
        if self.host_pages == 0 || self.host_pages > MAX_HOST_PAGES {
            return bad(
                "host_pages",
                self.host_pages.to_string(),
                "1 to 2^34 + 2^20 pages (64 TiB and 4 GiB)",
            );
        }
        if self.max_tables == 0 {
            return bad("max_tables", self.max_tables.to_string(), "at least one table");
        }
        if !self.memslot_generation.is_multiple_of(2) || self.memslot_generation >= 1 << 62 {
            let rule = "address space 0 has the even generations, below 2^62";
            return bad("memslot_generation", self.memslot_generation.to_string(), rule);
        }
        if self.workers == 0 || self.workers > MAX_WORKERS {
            return bad("workers", self.workers.to_string(), "1 to 1024 worker threads");
        }
        let name = self.design_name();
        if design_info(name).is_none() {
            return bad("design", name.to_owned(), "no zap design of this build has that name");
        }
        if shadow_design(name).is_some() {
            self.check_shadow_design(name)?;
        }
        if let Some(quota) = self.shadow.quota.filter(|&quota| quota < MIN_QUOTA) {
            return bad(
                "quota",
                quota.to_string(),
                "at least 8 shadow pages: a root, and what one fault takes",
            );
        }
        let name = self.tdp_design_name();
        let Some(info) = tdpmmu_mmu::design::info(name) else {
            return bad("design", name.to_owned(), "the profile's design is one of the TDP MMU's");
        };
        if info.needs_stale_root_check && !self.profile.stale_root_check {
            let value = format!("{name} with profile {}", self.profile.name);
            let rule = "a fault of this profile does not test whether its root is obsolete, so it may map under a root that this design has \
                        zapped for good: the tables would leak (a profile of 5.18 or later tests it; design inline zaps at the last put)";
            return bad("design", value, rule);
        }
        let ownership = self.ownership.unwrap_or(info.ownership);
        if ownership != info.ownership
            && let OtherOwnership::Refused(why) = info.other_ownership
        {
            return bad("ownership", format!("{ownership:?} with design {name}"), why);
        }
        Ok((tdpmmu_mmu::design::effective_passes(self.passes, info, &self.profile), ownership))
    }

    /// What a shadow design does not go together with.
    fn check_shadow_design(&self, name: &str) -> Result<(), VmError> {
        let bad = |what, value: String, rule| Err(VmError::Config { what, value, rule });
        if let Some(passes) = self.passes {
            return bad("passes", format!("{passes} with design {name}"), "the shadow MMU has no passes");
        }
        if let Some(ownership) = self.ownership {
            let rule = "the shadow MMU has no roots of its own: only vCPUs refer to them";
            return bad("ownership", format!("{ownership:?} with design {name}"), rule);
        }
        if self.shadow.paging == Paging::Tdp {
            let rule = "under a shadow design the vCPUs run on shadow pages: direct or guest";
            return bad("paging", format!("tdp with design {name}"), rule);
        }
        if self.shadow.nested {
            let rule = "an L2 runs on shadow pages under an L1 on the TDP MMU: a design of that one";
            return bad("nested", format!("true with design {name}"), rule);
        }
        if self.dirty_mode == DirtyMode::DBits {
            let rule =
                "hardware logs guest-physical addresses of a TDP walk; shadow pages are write-protected";
            return bad("dirty_mode", format!("DBits with design {name}"), rule);
        }
        Ok(())
    }
}
