//! What a run was asked to do, and what it therefore does.
//!
//! Precedence: a flag comes before the design's historic default, that before the kernel profile's. Pairs that make no
//! sense are usage errors which say why.

use serde::{Deserialize, Serialize};
use tdpmmu_mmu::design::effective_passes;
use tdpmmu_mmu::{DESIGNS, DesignInfo, OtherOwnership, design};
use tdpmmu_platform::Preempt;
use tdpmmu_spte::geometry::{max_gfn, page_bytes, parse_page_size};
use tdpmmu_spte::{KernelProfile, Ownership, Passes, closest};

use crate::LabError;

/// The request of `bench …`, as JSON. Unknown fields are refused. Units are in the names.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BenchConfig {
    /// Guest memory.
    pub memory_bytes: u64,
    /// `4K`, `2M` or `1G`.
    pub page: String,
    /// Running vCPUs (threads).
    pub vcpus: u32,
    /// Root level: 4 or 5.
    pub levels: u8,
    /// Zap designs by name; `all`: every sound one.
    pub designs: Vec<String>,
    /// Passes, or the design's.
    pub passes: Option<String>,
    /// `vcpu` or `mmu`, or the design's.
    pub ownership: Option<String>,
    /// `none`, `voluntary` or `full`.
    pub preempt: String,
    /// CPU time after which a task is asked to yield.
    pub tick_ns: u64,
    /// Kernel profile, with changed switches.
    pub kernel_profile: String,
    /// Repetitions of each design.
    pub reps: u32,
    /// Seed of the guests' access patterns.
    pub seed: u64,
    /// `bulk` or `fault`.
    pub populate: String,
    /// `none` or `bitmap`: what becomes of Dirty and Accessed of removed leaves.
    pub writeback: String,
    /// `clean`, `accessed` or `dirty`: state of the leaves at t0.
    pub ad_mix: String,
    /// A further, untimed repetition with oracles listening.
    pub check: bool,
    /// Memory that each vCPU touches.
    pub working_set_bytes: Option<u64>,
    /// One access every so many ns per vCPU (open loop).
    pub arrival_ns: u64,
    /// `bench drop`: drops of small roots in the loop.
    pub drop_loop: u64,
    /// Refuse above this.
    pub max_memory_bytes: Option<u64>,
    /// Worker threads of designs that have a queue.
    pub workers: usize,
}

impl Default for BenchConfig {
    fn default() -> Self {
        Self {
            memory_bytes: 1 << 30,
            page: "4K".into(),
            vcpus: 2,
            levels: 4,
            designs: vec!["all".into()],
            passes: None,
            ownership: None,
            preempt: "full".into(),
            tick_ns: 4_000_000,
            kernel_profile: "6.12".into(),
            reps: 1,
            seed: 0,
            populate: "bulk".into(),
            writeback: "bitmap".into(),
            ad_mix: "dirty".into(),
            check: true,
            working_set_bytes: None,
            arrival_ns: 20_000,
            drop_loop: 10_000,
            max_memory_bytes: None,
            workers: 1,
        }
    }
}

/// State of every leaf at t0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdMix {
    /// Neither accessed nor dirty.
    Clean,
    /// Accessed.
    Accessed,
    /// Accessed and dirty, as a guest leaves the memory it writes.
    Dirty,
}

/// How the guest's memory gets mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PopulateBy {
    /// Tables filled whole, in parallel.
    Bulk,
    /// Faults of all vCPUs, racing.
    Fault,
}

/// A request that makes sense.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The request as asked.
    pub config: BenchConfig,
    /// Parsed profile.
    pub profile: KernelProfile,
    /// Leaf level.
    pub level: u8,
    /// Parsed preemption model.
    pub preempt: Preempt,
    /// Parsed A/D mix.
    pub ad_mix: AdMix,
    /// Parsed population.
    pub populate: PopulateBy,
    /// Write Dirty and Accessed back.
    pub write_back: bool,
    /// Pages that each vCPU touches.
    pub working_set_pages: u64,
    /// One per design.
    pub designs: Vec<DesignPlan>,
}

/// One design and the settings that follow from it.
#[derive(Clone, Debug)]
pub struct DesignPlan {
    /// The design.
    pub info: &'static DesignInfo,
    /// Passes in effect.
    pub passes: Passes,
    /// Ownership in effect.
    pub ownership: Ownership,
}

fn usage<T>(message: impl Into<String>) -> Result<T, LabError> {
    Err(LabError::Usage(message.into()))
}

fn one_of<T: Copy>(name: &str, value: &str, choices: &[(&'static str, T)]) -> Result<T, LabError> {
    if let Some(&(_, choice)) = choices.iter().find(|(text, _)| *text == value) {
        return Ok(choice);
    }
    let names: Vec<_> = choices.iter().map(|c| c.0).collect();
    let hint = closest(value, &names).map(|c| format!(" (did you mean {c:?}?)")).unwrap_or_default();
    usage(format!("{name}={value:?}: expected one of {}{hint}", names.join(", ")))
}

impl BenchConfig {
    /// Parses a request.
    ///
    /// # Errors
    /// [`LabError::Usage`] for malformed JSON and unknown fields.
    pub fn parse(json: &str) -> Result<Self, LabError> {
        serde_json::from_str(json).map_err(|e| LabError::Usage(format!("bench configuration: {e}")))
    }

    /// Checks every value and pair, and settles what was left open.
    ///
    /// # Errors
    /// [`LabError::Usage`] naming the value and the rule.
    pub fn plan(&self) -> Result<Plan, LabError> {
        let level = parse_page_size(&self.page).map_err(|e| LabError::Usage(e.to_string()))?;
        if level > 3 {
            return usage(format!("page={:?}: guests map 4K, 2M or 1G pages", self.page));
        }
        if !matches!(self.levels, 4 | 5) {
            return usage(format!("levels={}: expected 4 or 5", self.levels));
        }
        let (unit, limit) = (page_bytes(level), max_gfn(self.levels, 52).saturating_mul(4096));
        if self.memory_bytes == 0 || !self.memory_bytes.is_multiple_of(unit) || self.memory_bytes > limit {
            return usage(format!(
                "memory={} bytes: must be a multiple of the page size {}, at least one page and at most {} with {} levels",
                self.memory_bytes,
                self.page,
                crate::units::bytes(limit),
                self.levels
            ));
        }
        if self.vcpus == 0 || self.vcpus > 1024 {
            return usage(format!("vcpus={}: expected 1 to 1024", self.vcpus));
        }
        if self.reps == 0 || self.tick_ns == 0 || self.arrival_ns == 0 || self.workers == 0 {
            return usage("reps, tick, arrival and workers must be above 0");
        }
        if self.arrival_ns > 1_000_000_000 {
            return usage(format!(
                "arrival_ns={}: at most 1,000,000,000 (one access a second)",
                self.arrival_ns
            ));
        }
        if self.drop_loop > 200_000 {
            return usage(format!("drop_loop={}: at most 200,000 drops", self.drop_loop));
        }
        let profile =
            KernelProfile::named(&self.kernel_profile).map_err(|e| LabError::Usage(e.to_string()))?;
        let preempt = one_of(
            "preempt",
            &self.preempt,
            &[("none", Preempt::None), ("voluntary", Preempt::Voluntary), ("full", Preempt::Full)],
        )?;
        let ad_mix = one_of(
            "ad_mix",
            &self.ad_mix,
            &[("clean", AdMix::Clean), ("accessed", AdMix::Accessed), ("dirty", AdMix::Dirty)],
        )?;
        let populate =
            one_of("populate", &self.populate, &[("bulk", PopulateBy::Bulk), ("fault", PopulateBy::Fault)])?;
        if populate == PopulateBy::Fault && ad_mix == AdMix::Clean {
            return usage(
                "ad_mix=clean with populate=fault: a fault leaves Accessed set; use accessed or dirty, or populate=bulk",
            );
        }
        let write_back = one_of("writeback", &self.writeback, &[("none", false), ("bitmap", true)])?;
        let pages = self.memory_bytes / unit;
        let wanted = self.working_set_bytes.unwrap_or(64 << 20) / unit;
        let designs = self.design_plans(&profile)?;
        Ok(Plan {
            config: self.clone(),
            profile,
            level,
            preempt,
            ad_mix,
            populate,
            write_back,
            working_set_pages: wanted.clamp(1, pages),
            designs,
        })
    }

    fn design_plans(&self, profile: &KernelProfile) -> Result<Vec<DesignPlan>, LabError> {
        let passes = match &self.passes {
            None => None,
            Some(text) => Some(Passes::parse(text).map_err(|e| LabError::Usage(e.to_string()))?),
        };
        let ownership = match self.ownership.as_deref() {
            None => None,
            Some(text) => {
                Some(one_of("ownership", text, &[("vcpu", Ownership::Vcpu), ("mmu", Ownership::Mmu)])?)
            }
        };
        let mut infos: Vec<&'static DesignInfo> = Vec::new();
        for name in &self.designs {
            if name == "all" {
                // `all`: every design that is sound, under this profile too.
                let sound =
                    |d: &&DesignInfo| !d.flawed && (profile.stale_root_check || !d.needs_stale_root_check);
                infos.extend(DESIGNS.iter().filter(sound));
                continue;
            }
            match design::info(name) {
                Some(info) if info.needs_stale_root_check && !profile.stale_root_check => {
                    return usage(format!(
                        "design {} with profile {}: that kernel's faults do not test whether their root is stale \
                         (before 5.16), and would map under a root that was zapped already; add ,stale-root-check=true",
                        info.name, profile.name
                    ));
                }
                Some(info) => infos.push(info),
                None => {
                    let names: Vec<_> = DESIGNS.iter().map(|d| d.name).collect();
                    let hint =
                        closest(name, &names).map(|c| format!(" (did you mean {c:?}?)")).unwrap_or_default();
                    return usage(format!(
                        "design={name:?}: expected all or one of {}{hint}",
                        names.join(", ")
                    ));
                }
            }
        }
        if infos.is_empty() {
            return usage("designs=[]: name at least one");
        }
        let asked_one = self.designs.len() == 1 && self.designs[0] != "all";
        let mut plans = Vec::new();
        for info in infos {
            let own = ownership.unwrap_or(info.ownership);
            if own != info.ownership
                && let OtherOwnership::Refused(why) = info.other_ownership
            {
                let sentence = format!("design {} with ownership {own} makes no sense: {why}", info.name);
                if asked_one || plans.is_empty() && self.designs != ["all"] {
                    return usage(sentence);
                }
                return usage(format!("{sentence}; name the designs that you want instead of all"));
            }
            plans.push(DesignPlan { info, passes: effective_passes(passes, info, profile), ownership: own });
        }
        Ok(plans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(change: impl FnOnce(&mut BenchConfig)) -> Result<Plan, LabError> {
        let mut config = BenchConfig::default();
        change(&mut config);
        config.plan()
    }

    #[test]
    fn a_flag_comes_before_the_design_and_that_before_the_profile() {
        let all = plan(|_| {}).expect("defaults make sense");
        let passes: Vec<_> = all.designs.iter().map(|d| (d.info.name, d.passes.to_string())).collect();
        assert_eq!(
            passes,
            [
                ("inline", "root".to_owned()),
                ("async-worker", "1G,root".to_owned()),
                ("sync", "4K,2M,1G,root".to_owned())
            ]
        );
        let old = plan(|c| c.kernel_profile = "6.1".into()).expect("makes sense");
        assert_eq!(old.designs[2].passes.to_string(), "1G,root");
        let asked = plan(|c| c.passes = Some("root".into())).expect("makes sense");
        assert!(asked.designs.iter().all(|d| d.passes == Passes::ROOT));
    }

    #[test]
    fn pairs_without_sense_say_why() {
        let error = plan(|c| {
            c.designs = vec!["inline".into()];
            c.ownership = Some("mmu".into());
        })
        .expect_err("nothing would be dropped");
        assert!(
            matches!(&error, LabError::Usage(m) if m.contains("inline") && m.contains("no vCPU ever drops")),
            "{error}"
        );
    }

    #[test]
    fn designs_that_need_a_later_kernels_test_are_refused_or_left_out() {
        let all = plan(|c| c.kernel_profile = "5.15".into()).expect("inline remains");
        assert_eq!(all.designs.iter().map(|d| d.info.name).collect::<Vec<_>>(), ["inline"]);
        let named = plan(|c| {
            c.kernel_profile = "5.15".into();
            c.designs = vec!["sync".into()];
        });
        assert!(
            matches!(&named, Err(LabError::Usage(m)) if m.contains("sync") && m.contains("5.15")),
            "{}",
            named.is_ok()
        );
        let mended = plan(|c| {
            c.kernel_profile = "5.15,stale-root-check=true".into();
            c.designs = vec!["sync".into()];
        });
        assert!(mended.is_ok());
    }

    #[test]
    fn unknown_names_get_the_closest_one() {
        let error = plan(|c| c.designs = vec!["async-workr".into()]).expect_err("a typo");
        assert!(error.to_string().contains("did you mean \"async-worker\""), "{error}");
        let error = BenchConfig::parse(r#"{"memory": 3}"#).expect_err("an unknown field");
        assert!(error.to_string().contains("memory"), "{error}");
    }

    #[test]
    fn sizes_are_checked_against_page_and_levels() {
        for bad in [0, 4095, 1 << 60] {
            assert!(plan(|c| c.memory_bytes = bad).is_err(), "{bad}");
        }
        assert!(
            plan(|c| {
                c.page = "1G".into();
                c.memory_bytes = 3 << 29;
            })
            .is_err()
        );
    }
}
