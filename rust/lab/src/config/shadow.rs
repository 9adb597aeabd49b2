//! What a request asks of the shadow MMU: how the guest is paged, how freed pages are kept from lockless walkers, how many pages there may be.
//!
//! The TDP MMU has none of these, and the shadow MMU has neither passes nor a first reference that somebody could own: what is asked of an MMU that no design of the
//! request has is a usage error; with designs of both, each takes what is its own.

use std::sync::OnceLock;

use tdpmmu_mmu::{DesignInfo, Obligations, OtherOwnership};
use tdpmmu_shadow::{SHADOW_DESIGNS, ShadowDesign};
use tdpmmu_spte::Ownership;

use super::BenchConfig;
use super::plan::{one_of, usage};
use crate::LabError;

/// Fewest shadow pages of a VM (KVM_MIN_ALLOC_MMU_PAGES).
const FEWEST_PAGES: u32 = 64;
/// How KVM reclaims since 3.5.
const USUAL: &str = "ipi";
/// How the guest is paged, by name.
const PAGING: [&str; 2] = ["direct", "guest"];
/// How pages are reclaimed, by name.
const KINDS: [&str; 5] = ["counter", "ipi", "membarrier", "rcu", "epoch"];

/// A design of the shadow MMU, and what it runs with. Names as on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowCase {
    /// The design.
    pub design: ShadowDesign,
    /// `direct` or `guest`.
    pub paging: &'static str,
    /// How freed pages are kept from lockless walkers.
    pub reclaim: &'static str,
    /// Most shadow pages; `None`: no limit.
    pub quota: Option<u32>,
}

impl ShadowCase {
    /// Are the guest's own page tables shadowed?
    pub fn shadows_guest(&self) -> bool {
        self.paging == "guest"
    }
}

/// Is it a design of the shadow MMU?
pub(crate) fn is_shadow(info: &DesignInfo) -> bool {
    ShadowDesign::named(info.name).is_some()
}

impl BenchConfig {
    /// The kinds of reclamation asked for, each once; none: the usual one.
    pub(super) fn reclaim_kinds(&self) -> Result<Vec<&'static str>, LabError> {
        let mut kinds = Vec::new();
        for name in &self.reclaim {
            let chosen = if name == "all" {
                KINDS.to_vec()
            } else {
                vec![one_of("reclaim", name, &KINDS.map(|kind| (kind, kind)))?]
            };
            kinds.extend(chosen);
        }
        if kinds.is_empty() {
            kinds.push(USUAL);
        }
        let mut once = Vec::new();
        for kind in kinds {
            if !once.contains(&kind) {
                once.push(kind);
            }
        }
        Ok(once)
    }

    /// What each of `infos` runs with: nothing for one of the TDP MMU, for one of the shadow MMU a case per kind of reclamation.
    pub(super) fn shadow_cases(
        &self,
        infos: &[&'static DesignInfo],
    ) -> Result<Vec<Vec<Option<ShadowCase>>>, LabError> {
        let paging = one_of("paging", &self.paging, &PAGING.map(|paging| (paging, paging)))?;
        let kinds = self.reclaim_kinds()?;
        if let Some(quota) = self.quota
            && quota < FEWEST_PAGES
        {
            return usage(format!(
                "quota={quota}: a VM has at least {FEWEST_PAGES} shadow pages (KVM_MIN_ALLOC_MMU_PAGES)"
            ));
        }
        let names = || infos.iter().map(|i| i.name).collect::<Vec<_>>().join(", ");
        if !infos.iter().any(|info| is_shadow(info)) {
            let asked = [
                (self.paging != "direct", "paging"),
                (!self.reclaim.is_empty(), "reclaim"),
                (self.quota.is_some(), "quota"),
            ];
            if let Some((_, name)) = asked.iter().find(|a| a.0) {
                return usage(format!(
                    "{name} with design {}: only the shadow MMU has it (name a shadow design, or shadow for all of them)",
                    names()
                ));
            }
        }
        if infos.iter().all(|info| is_shadow(info)) {
            let asked = [
                (!self.passes.is_empty(), "passes", "the shadow MMU has no passes: it zaps page by page"),
                (
                    self.ownership.is_some(),
                    "ownership",
                    "a shadow page belongs to the cache, whoever has it as root",
                ),
            ];
            if let Some((_, name, why)) = asked.iter().find(|a| a.0) {
                return usage(format!("{name} with design {}: {why}", names()));
            }
        }
        let of = |info: &&'static DesignInfo| match ShadowDesign::named(info.name) {
            None => vec![None],
            Some(design) => kinds
                .iter()
                .map(|&reclaim| Some(ShadowCase { design, paging, reclaim, quota: self.quota }))
                .collect(),
        };
        Ok(infos.iter().map(of).collect())
    }
}

/// The designs of the shadow MMU.
pub(super) fn shadow_designs() -> impl Iterator<Item = &'static DesignInfo> {
    SHADOW_DESIGNS.iter().filter_map(|design| design_info(design.name))
}

static ROWS: OnceLock<Vec<DesignInfo>> = OnceLock::new();

fn rows() -> &'static [DesignInfo] {
    ROWS.get_or_init(|| {
        SHADOW_DESIGNS
            .iter()
            .map(|d| DesignInfo {
                name: d.name,
                mainline: d.mainline,
                summary: d.summary,
                passes: None,
                ownership: Ownership::Vcpu,
                other_ownership: OtherOwnership::Refused("a shadow page belongs to the cache"),
                needs_stale_root_check: false,
                queue: None,
                obligations: Obligations { keeps_roots: !d.zaps_all, ..Obligations::STRICT },
                flawed: false,
            })
            .collect()
    })
}

/// The design of that name, of either MMU.
pub(crate) fn design_info(name: &str) -> Option<&'static DesignInfo> {
    tdpmmu_mmu::design::info(name).or_else(|| rows().iter().find(|row| row.name == name))
}

/// The names of all designs, of both MMUs.
pub(crate) fn all_design_names() -> Vec<&'static str> {
    tdpmmu_mmu::design::names().into_iter().chain(rows().iter().map(|row| row.name)).collect()
}
