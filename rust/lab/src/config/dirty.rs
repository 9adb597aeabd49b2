//! What `bench dirty` goes through: how written pages are found, whether huge pages are split ahead, and how many pages are written.

use tdpmmu_spte::{EagerSplit, KernelProfile, LEVEL_4K};

use super::BenchConfig;
use super::plan::{one_of, usage};
use crate::LabError;

/// Fewest pages between two written ones, by default: all, one in eight, one in a leaf table.
const DENSITIES: [u64; 3] = [1, 8, 512];

/// How written pages are found and made to be found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// GET_DIRTY_LOG alone, which protects what it reports.
    Get,
    /// Manual protect: GET copies, CLEAR protects 64 pages a call.
    Clear64,
    /// Manual protect: GET copies, one CLEAR protects the whole slot.
    Clear,
    /// Manual protect, every page dirty at the start: nothing is protected before the first CLEAR.
    InitSet,
    /// A ring per vCPU: push in the fault, collect, reset.
    Ring,
    /// Hardware's D bits instead of write protection, harvested by GET.
    DBits,
}

impl Protocol {
    /// Every one, in the order of results.
    pub const ALL: [Protocol; 6] =
        [Self::Get, Self::Clear64, Self::Clear, Self::InitSet, Self::Ring, Self::DBits];

    /// Its name.
    pub const fn name(self) -> &'static str {
        ["get", "clear-64", "clear", "init-set", "ring", "d-bits"][self as usize]
    }

    /// Does user space ask for protection by a call of its own?
    pub const fn is_manual(self) -> bool {
        matches!(self, Self::Clear64 | Self::Clear | Self::InitSet)
    }
}

/// A request for `bench dirty` that makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPlan {
    /// Protocols, each in a VM of its own.
    pub protocols: Vec<Protocol>,
    /// Split huge pages when logging starts; `None`: there is nothing to split.
    pub eager: Vec<Option<bool>>,
    /// One page in so many is written.
    pub densities: Vec<u64>,
}

impl BenchConfig {
    /// Checks what only `bench dirty` asks for. Whatever was left open is everything that makes sense.
    pub(super) fn dirty_plan(&self, profile: &KernelProfile, level: u8) -> Result<DirtyPlan, LabError> {
        let mut protocols = Vec::new();
        for name in &self.protocols {
            let named = Protocol::ALL.map(|p| (p.name(), p));
            let chosen =
                if name == "all" { Protocol::ALL.to_vec() } else { vec![one_of("protocol", name, &named)?] };
            protocols.extend(chosen);
        }
        if protocols.is_empty() {
            protocols.extend(Protocol::ALL);
        }
        protocols.sort_by_key(|&p| p as u8);
        protocols.dedup();

        let splits = profile.eager_split != EagerSplit::None;
        let mut eager = Vec::new();
        for name in &self.eager {
            let on = one_of("eager", name, &[("on", true), ("off", false)])?;
            if level == LEVEL_4K {
                return usage(format!("eager={name} with page=4K: there is no huge page to split"));
            }
            if on && !splits {
                return usage(format!(
                    "eager=on with profile {}: that kernel does not split ahead of faults (5.18 and later do)",
                    profile.name
                ));
            }
            if !eager.contains(&Some(on)) {
                eager.push(Some(on));
            }
        }
        if eager.is_empty() {
            eager = match level {
                LEVEL_4K => vec![None],
                _ if splits => vec![Some(true), Some(false)],
                _ => vec![Some(false)],
            };
        }

        let pages = self.memory_bytes / 4096;
        let mut densities = Vec::new();
        for &density in &self.densities {
            if density == 0 || density > pages {
                return usage(format!(
                    "density={density}: one page in 1 to {pages} (the guest's pages) is written"
                ));
            }
            if !densities.contains(&density) {
                densities.push(density);
            }
        }
        if densities.is_empty() {
            densities.extend(DENSITIES.into_iter().filter(|&density| density <= pages));
        }
        Ok(DirtyPlan { protocols, eager, densities })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<DirtyPlan, LabError> {
        BenchConfig::parse(json)?.plan(None).map(|plan| plan.dirty)
    }

    #[test]
    fn what_is_left_open_is_everything_that_makes_sense() {
        let small = plan("{}").expect("defaults make sense");
        assert_eq!((small.eager, small.densities), (vec![None], vec![1, 8, 512]));
        assert_eq!(small.protocols, Protocol::ALL);
        let huge = plan(r#"{"page": "2M"}"#).expect("makes sense");
        assert_eq!(huge.eager, [Some(true), Some(false)]);
        let old =
            plan(r#"{"page": "2M", "kernel_profile": "5.15", "designs": "inline"}"#).expect("makes sense");
        assert_eq!(old.eager, [Some(false)], "5.15 splits nothing ahead");
        let tiny = plan(r#"{"memory_bytes": 65536}"#).expect("makes sense");
        assert_eq!(tiny.densities, [1, 8]);
    }

    #[test]
    fn what_makes_no_sense_names_value_and_rule() {
        for (json, said) in [
            (r#"{"eager": "on"}"#, "no huge page to split"),
            (r#"{"eager": "on", "page": "2M", "kernel_profile": "5.15"}"#, "does not split ahead"),
            (r#"{"eager": "yes", "page": "2M"}"#, "expected one of on, off"),
            (r#"{"densities": [0]}"#, "density=0"),
            (r#"{"densities": [262145]}"#, "262144"),
            (r#"{"protocols": "init-sett"}"#, "did you mean \"init-set\""),
        ] {
            let error = plan(json).expect_err(json).to_string();
            assert!(error.contains(said), "{json}: {error}");
        }
    }

    #[test]
    fn names_are_told_once_and_in_order() {
        let chosen = plan(r#"{"protocols": ["ring", "get", "ring"], "densities": [512, 1, 512]}"#)
            .expect("makes sense");
        assert_eq!(chosen.protocols, [Protocol::Get, Protocol::Ring]);
        assert_eq!(chosen.densities, [512, 1]);
    }
}
