//! Zap designs of both MMUs by name.

use tdpmmu_mmu::{DesignInfo, Obligations, OtherOwnership};
use tdpmmu_shadow::{SHADOW_DESIGNS, ShadowDesign, ShadowDesignInfo};
use tdpmmu_spte::Ownership;

/// A shadow design as the table of designs tells it: no passes, no workers, and roots that only vCPUs refer to.
const fn row(info: &ShadowDesignInfo) -> DesignInfo {
    DesignInfo {
        name: info.name,
        mainline: info.mainline,
        summary: info.summary,
        passes: None,
        ownership: Ownership::Vcpu,
        other_ownership: OtherOwnership::Refused(
            "a shadow root is an entry of the hash, which needs no reference; only vCPUs have any",
        ),
        needs_stale_root_check: false,
        queue: None,
        obligations: Obligations {
            schedules: false,
            last_put_zaps: false,
            keeps_roots: !info.zaps_all,
            zapper_outlives: false,
        },
        flawed: false,
    }
}

const ROWS: [DesignInfo; SHADOW_DESIGNS.len()] = {
    let mut rows = [row(&SHADOW_DESIGNS[0]); SHADOW_DESIGNS.len()];
    let mut n = 1;
    while n < rows.len() {
        rows[n] = row(&SHADOW_DESIGNS[n]);
        n += 1;
    }
    rows
};

static SHADOW: [DesignInfo; SHADOW_DESIGNS.len()] = ROWS;

/// What is known about a zap design of either MMU: the TDP MMU's own, those registered with it, and the shadow MMU's.
pub fn design_info(name: &str) -> Option<&'static DesignInfo> {
    SHADOW.iter().find(|design| design.name == name).or_else(|| tdpmmu_mmu::design::info(name))
}

/// The name of every design: the TDP MMU's (registered ones last), then the shadow MMU's, oldest first.
pub fn all_design_names() -> Vec<&'static str> {
    let mut names = tdpmmu_mmu::design::names();
    names.extend(SHADOW.iter().map(|design| design.name));
    names
}

/// The shadow design of that name.
pub(crate) fn shadow_design(name: &str) -> Option<ShadowDesign> {
    ShadowDesign::named(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_leads_to_its_design_and_only_the_slot_design_keeps_roots() {
        let names = all_design_names();
        for name in &names {
            assert_eq!(design_info(name).map(|info| info.name), Some(*name));
        }
        let shadow: Vec<_> = names.iter().filter(|name| shadow_design(name).is_some()).collect();
        assert_eq!(shadow.len(), SHADOW_DESIGNS.len());
        for name in shadow {
            let info = design_info(name).expect("listed");
            assert_eq!(info.obligations.keeps_roots, *name == "shadow-slot");
        }
        assert!(design_info("shadow").is_none());
    }
}
