//! A machine on shadow pages: what is looked up, listed and counted there.
//!
//! Pages of the shadow MMU are walked under its reclamation, and some kinds of that let only vCPUs walk: a look-up borrows a vCPU that nobody uses, and its root. It loads none: without a root nothing is mapped.

use std::ops::Range;

use serde_json::{Value, json};
use tdpmmu_platform::Real;
use tdpmmu_shadow::{ReclaimKind, ShadowDesign, ShadowMmu};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{round_down, span};
use tdpmmu_vm::{Paging, ShadowSpec, Vcpu, VmError};

use crate::error::Fault;
use crate::machine::{Machine, Row, frame, wrong};

/// What a VM of that design is asked for; the face has checked most of it.
pub fn spec(
    design: &str,
    paging: Option<&str>,
    reclaim: Option<&str>,
    quota: Option<u32>,
) -> Result<ShadowSpec, Fault> {
    let mut spec = ShadowSpec { quota, ..ShadowSpec::default() };
    if ShadowDesign::named(design).is_none() {
        for (name, given) in [("paging", paging), ("reclaim", reclaim), ("quota", quota.map(|_| "a number"))]
        {
            if let Some(given) = given {
                return Err(Fault::Invalid(format!(
                    "{name}={given:?} with design {design}: of the shadow MMU only"
                )));
            }
        }
        return Ok(spec);
    }
    if let Some(name) = paging {
        spec.paging = match Paging::parse(name) {
            Some(paging) if paging != Paging::Tdp => paging,
            _ => return Err(Fault::Invalid(format!("paging={name:?}: expected direct or guest"))),
        };
    }
    if let Some(name) = reclaim {
        spec.reclaim = ReclaimKind::parse(name).map_err(|error| Fault::Invalid(error.to_string()))?;
    }
    Ok(spec)
}

impl Machine {
    /// A vCPU of an address space that nobody uses, outside the guest, with a root that is valid; `None`: nothing is mapped there that a look-up could find.
    fn walker(&self, as_id: u8) -> Result<Option<(Vcpu<'_, Real>, u32)>, Fault> {
        let Some(shadow) = self.vm.shadow() else { return Ok(None) };
        let (mut busy, mut free) = (None, false);
        for id in 0..self.vm.vcpu_count() {
            match self.vm.vcpu(id) {
                Ok(mut vcpu) if vcpu.in_smm() == (as_id == 1) => {
                    free = true;
                    vcpu.leave();
                    if let Some(root) = vcpu.current_root().filter(|&root| !shadow.is_obsolete(root)) {
                        return Ok(Some((vcpu, root)));
                    }
                }
                Ok(_) => free = true,
                Err(error @ VmError::Busy { .. }) => busy = Some(error),
                Err(error) => return Err(wrong(error)),
            }
        }
        match busy {
            // With some vCPU at hand the answer is known: none that is free maps anything.
            Some(error) if !free => Err(wrong(error)),
            _ => Ok(None),
        }
    }

    /// The leaf of each page under the root of a free vCPU; level 0 where there is none.
    pub(crate) fn shadow_lookup(&self, as_id: u8, pages: &[u64]) -> Result<Vec<Row>, Fault> {
        let mut walker = self.walker(as_id)?;
        let row = |&page: &u64| {
            let found = walker.as_mut().and_then(|(vcpu, _)| vcpu.walk_shadow(page));
            found.map_or([page, 0, 0, 0], |(spte, level)| {
                [page, spte.raw(), frame(spte, level, page), u64::from(level)]
            })
        };
        Ok(pages.iter().map(row).collect())
    }

    /// Every leaf of `pages` under the root of a free vCPU, ascending.
    pub(crate) fn shadow_mappings(&self, as_id: u8, pages: Range<u64>) -> Result<Vec<Row>, Fault> {
        let (Some(shadow), Some((vcpu, root))) = (self.vm.shadow(), self.walker(as_id)?) else {
            return Ok(Vec::new());
        };
        let state = self.vm.vcpu_state(vcpu.id());
        let walker = shadow.reclamation().walker(state).map_err(|e| Fault::Internal(e.to_string()))?;
        let (mut rows, mut at) = (Vec::new(), pages.start);
        while at < pages.end {
            let walk = shadow.walk_lockless(&walker.begin(vcpu.task()), root, at);
            let first = round_down(at, walk.level);
            if let Some((spte, level)) = walk.leaf() {
                rows.push([first, spte.raw(), frame(spte, level, first), u64::from(level)]);
            }
            at = first + span(walk.level);
        }
        Ok(rows)
    }

    /// Leaves of all sizes and tables of the shadow MMU; none without one.
    pub(crate) fn shadow_sums(&self) -> (i64, i64) {
        self.vm.shadow().map_or((0, 0), |shadow| {
            let counts = shadow.counts();
            (counts.leaves.iter().sum::<u64>() as i64, counts.pages as i64)
        })
    }

    /// The counts of the shadow MMU, and its roots: (in use by vCPUs, of them obsolete).
    pub(crate) fn shadow_stats(&self) -> Option<(Value, usize, usize)> {
        let shadow = self.vm.shadow()?;
        let counts = shadow.counts();
        let (roots, obsolete) = self.shadow_roots(shadow);
        let value = json!({
            "paging": self.vm.paging().name(),
            "reclaim": shadow.reclamation().kind().name(),
            "pages": counts.pages, "pages_peak": counts.pages_peak, "indirect": counts.indirect,
            "obsolete": counts.obsolete, "zapped_held": counts.zapped_held,
            "waiting": counts.waiting, "waiting_peak": counts.waiting_peak,
            "toggles": counts.toggles, "zapped": counts.zapped, "reclaimed": counts.reclaimed,
            "batches": counts.batches, "longest_batch": counts.longest_batch, "restarts": counts.restarts,
        });
        Some((value, roots, obsolete))
    }

    fn shadow_roots(&self, shadow: &ShadowMmu<Real>) -> (usize, usize) {
        let task = self.task("roots");
        let guard = self.vm.mmu().lock.write(&task);
        let pages = shadow.pages(&guard);
        let held = || pages.iter().filter(|page| page.root_count > 0);
        (held().count(), held().filter(|page| page.obsolete).count())
    }

    /// What the shadow MMU itself found wrong, and counts that its pages do not bear out.
    pub(crate) fn shadow_violations(&self) -> Vec<String> {
        let Some(shadow) = self.vm.shadow() else { return Vec::new() };
        let mut found = shadow.violations();
        let task = self.task("verify");
        let guard = self.vm.mmu().lock.write(&task);
        let (counts, pages) = (shadow.counts(), shadow.pages(&guard));
        let live = pages.iter().filter(|page| !page.invalid || page.root_count > 0).count() as u64;
        if live != counts.pages {
            found
                .push(format!("{} shadow pages by the running count, {live} in hash and list", counts.pages));
        }
        let obsolete = pages.iter().filter(|page| page.obsolete && page.listed).count() as u64;
        if obsolete != counts.obsolete {
            found.push(format!("{} obsolete pages by the running count, {obsolete} listed", counts.obsolete));
        }
        for page in &pages {
            if !page.in_hash && !page.invalid {
                found.push(format!("shadow page {:#x} is listed, and the hash does not find it", page.table));
            }
            for &(parent, index) in &page.parents {
                let entry = Spte(
                    shadow.pool().entries(parent)[usize::from(index)]
                        .load(std::sync::atomic::Ordering::Relaxed),
                );
                if entry.pfn() != u64::from(page.table) {
                    found.push(format!(
                        "shadow page {:#x} has a parent entry {parent:#x}[{index}] that names {:#x}",
                        page.table,
                        entry.pfn()
                    ));
                }
            }
        }
        found
    }
}
