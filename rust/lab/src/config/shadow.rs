//! What a request asks of the shadow MMU: how the guest is paged, how freed pages are kept from lockless walkers, how many pages there may be.
//!
//! The TDP MMU has none of these, and the shadow MMU has neither passes nor a first reference that somebody could own: what is asked of an MMU that no design of the
//! request has is a usage error; with designs of both, each takes what is its own.

use tdpmmu_mmu::DesignInfo;
use tdpmmu_shadow::{ReclaimKind, SHADOW_DESIGNS, ShadowDesign};
use tdpmmu_vm::{Paging, design_info};

use super::BenchConfig;
use super::plan::{one_of, usage};
use crate::LabError;

/// Fewest shadow pages of a VM (KVM_MIN_ALLOC_MMU_PAGES).
const FEWEST_PAGES: u32 = 64;
/// How the guest can be paged under the shadow MMU.
const PAGING: [Paging; 2] = [Paging::Direct, Paging::Guest];

/// A design of the shadow MMU, and what it runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowCase {
    /// The design.
    pub design: ShadowDesign,
    /// How the guest is paged.
    pub paging: Paging,
    /// How freed pages are kept from lockless walkers.
    pub reclaim: ReclaimKind,
    /// Most shadow pages; `None`: no limit.
    pub quota: Option<u32>,
}

impl ShadowCase {
    /// Are the guest's own page tables shadowed?
    pub fn shadows_guest(&self) -> bool {
        self.paging == Paging::Guest
    }
}

/// Is it a design of the shadow MMU?
pub(crate) fn is_shadow(info: &DesignInfo) -> bool {
    ShadowDesign::named(info.name).is_some()
}

impl BenchConfig {
    /// The kinds of reclamation asked for, each once; none: the usual one.
    pub(super) fn reclaim_kinds(&self) -> Result<Vec<ReclaimKind>, LabError> {
        let mut kinds = Vec::new();
        for name in &self.reclaim {
            let chosen = if name == "all" {
                ReclaimKind::ALL.to_vec()
            } else {
                vec![one_of("reclaim", name, &ReclaimKind::ALL.map(|kind| (kind.name(), kind)))?]
            };
            kinds.extend(chosen);
        }
        if kinds.is_empty() {
            kinds.push(ReclaimKind::default());
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
        let paging = one_of("paging", &self.paging, &PAGING.map(|paging| (paging.name(), paging)))?;
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
