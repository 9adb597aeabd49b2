//! What a request asks for, and what it therefore does.
//!
//! Precedence: a flag comes before the design's historic default, that before the kernel profile's. Pairs that make no
//! sense are usage errors which say why; what is only meant by `all` is left out instead.

use tdpmmu_mmu::design::effective_passes;
use tdpmmu_mmu::{DESIGNS, DesignInfo, OtherOwnership, QueueKind};
use tdpmmu_platform::{Platform, Preempt, Real};
use tdpmmu_spte::geometry::{max_gfn, page_bytes, parse_page_size};
use tdpmmu_spte::{KernelProfile, Ownership, Passes, closest};
use tdpmmu_vm::{all_design_names, design_info};

use super::shadow::{is_shadow, shadow_designs};
use super::{BenchConfig, DirtyPlan, ShadowCase};
use crate::LabError;
use crate::memory::Estimate;
use crate::scenario::Sharing;
use crate::scene::{self, Kind, Scene};

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
    /// Parsed A/D mix.
    pub ad_mix: AdMix,
    /// Parsed population.
    pub populate: PopulateBy,
    /// Parsed sharing.
    pub sharing: Sharing,
    /// Write Dirty and Accessed back.
    pub write_back: bool,
    /// Pages that each vCPU touches.
    pub working_set_pages: u64,
    /// What `bench dirty` goes through.
    pub dirty: DirtyPlan,
    /// Single operations under the shadow MMU: the design and what it runs with, a kind of reclamation each; empty: the TDP MMU's.
    pub shadow: Vec<ShadowCase>,
    /// What to run, in this order, each `reps` times: scenes x designs x passes (shadow MMU: kinds of reclamation) x preemption. Empty for single operations.
    pub cases: Vec<Case>,
}

/// One scene under one design, and the settings that follow from it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The scene.
    pub scene: &'static Scene,
    /// The design.
    pub info: &'static DesignInfo,
    /// Passes in effect.
    pub passes: Passes,
    /// Ownership in effect.
    pub ownership: Ownership,
    /// Preemption model.
    pub preempt: Preempt,
    /// What a design of the shadow MMU runs with; `None`: a design of the TDP MMU.
    pub shadow: Option<ShadowCase>,
}

impl Case {
    /// What its scene's memory comes to under its MMU.
    pub fn estimate(&self, plan: &Plan) -> Estimate {
        let plan = self.scene.settled(plan);
        let bare = (self.scene.estimate)(&plan);
        let gfns = plan.config.memory_bytes / page_bytes(1);
        self.shadow.map_or(bare, |shadow| bare.shadowed(gfns, plan.level, shadow.shadows_guest()))
    }

    /// The passes' name in a result: the shadow MMU has none.
    pub fn passes_name(&self) -> String {
        if self.shadow.is_some() { "-".into() } else { self.passes.to_string() }
    }

    /// The owner of the first reference in a result: a shadow page has none.
    pub fn ownership_name(&self) -> String {
        if self.shadow.is_some() { "-".into() } else { self.ownership.to_string() }
    }

    /// The preemption model's name on the command line.
    pub fn preempt_name(&self) -> &'static str {
        PREEMPT.iter().find(|p| p.1 == self.preempt).map_or("?", |p| p.0)
    }
}

/// The preemption models by name.
pub(crate) const PREEMPT: &[(&str, Preempt)] =
    &[("none", Preempt::None), ("voluntary", Preempt::Voluntary), ("full", Preempt::Full)];

/// The design of a shadow MMU whose zaps are not what is measured.
const WALKED: &str = "shadow-gen";

pub(super) fn usage<T>(message: impl Into<String>) -> Result<T, LabError> {
    Err(LabError::Usage(message.into()))
}

pub(super) fn one_of<T: Copy>(name: &str, value: &str, choices: &[(&'static str, T)]) -> Result<T, LabError> {
    if let Some(&(_, choice)) = choices.iter().find(|(text, _)| *text == value) {
        return Ok(choice);
    }
    let names: Vec<_> = choices.iter().map(|c| c.0).collect();
    let hint = closest(value, &names).map(|c| format!(" (did you mean {c:?}?)")).unwrap_or_default();
    usage(format!("{name}={value:?}: expected one of {}{hint}", names.join(", ")))
}

impl BenchConfig {
    /// Checks every value and pair, and settles what was left open; `kind`: the experiment, `None` for a single operation.
    ///
    /// # Errors
    /// [`LabError::Usage`] naming the value and the rule.
    pub fn plan(&self, kind: Option<Kind>) -> Result<Plan, LabError> {
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
        if self.churns == 0 || self.churns > 1_000_000 {
            return usage(format!("churns={}: expected 1 to 1,000,000 cycles", self.churns));
        }
        if self.drop_loop > 200_000 {
            return usage(format!("drop_loop={}: at most 200,000 drops", self.drop_loop));
        }
        let profile =
            KernelProfile::named(&self.kernel_profile).map_err(|e| LabError::Usage(e.to_string()))?;
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
        let sharing = one_of(
            "sharing",
            &self.sharing,
            &[Sharing::Local, Sharing::Pipeline, Sharing::Global].map(|s| (s.name(), s)),
        )?;
        if let Some(queue) = &self.worker_queue {
            one_of("worker_queue", queue, &QueueKind::ALL.map(|kind| (kind.name(), kind)))?;
        }
        let cpus = Real::cpus();
        for (name, list) in [("worker_cpus", &self.worker_cpus), ("vcpu_cpus", &self.vcpu_cpus)] {
            if let Some(cpu) = list.iter().find(|cpu| !cpus.contains(cpu)) {
                return usage(format!("{name}: CPU {cpu} is not one that this process may use ({cpus:?})"));
            }
        }
        let mut plan = Plan {
            config: self.clone(),
            profile,
            level,
            ad_mix,
            populate,
            sharing,
            write_back,
            working_set_pages: wanted.clamp(1, pages),
            dirty: self.dirty_plan(&profile, level)?,
            shadow: Vec::new(),
            cases: Vec::new(),
        };
        let infos = self.design_infos(&plan.profile, kind.is_none())?;
        let with = self.shadow_cases(&infos.iter().map(|i| i.0).collect::<Vec<_>>())?;
        match kind {
            None => plan.shadow = self.single(&infos, with)?,
            Some(kind) => plan.cases = self.cases(kind, &plan, &infos, &with)?,
        }
        Ok(plan)
    }

    /// Single operations know one MMU at a time.
    fn single(
        &self,
        infos: &[(&'static DesignInfo, Ownership)],
        with: Vec<Vec<Option<ShadowCase>>>,
    ) -> Result<Vec<ShadowCase>, LabError> {
        if let Some(scene) = self.scenes.first() {
            return usage(format!("scene={scene:?}: only zap and drop have scenes"));
        }
        let shadow: Vec<_> = with.into_iter().flatten().flatten().collect();
        let names: Vec<_> = infos.iter().map(|i| i.0.name).collect();
        if !shadow.is_empty() && names.len() > 1 {
            return usage(format!(
                "designs={}: single operations are measured under one MMU at a time; name one shadow design",
                names.join(",")
            ));
        }
        Ok(shadow)
    }

    /// scenes x designs x passes or kinds of reclamation x preemption.
    fn cases(
        &self,
        kind: Kind,
        plan: &Plan,
        infos: &[(&'static DesignInfo, Ownership)],
        with: &[Vec<Option<ShadowCase>>],
    ) -> Result<Vec<Case>, LabError> {
        let scenes = self.scene_list(kind, plan)?;
        let mut passes = Vec::new();
        for text in &self.passes {
            let parsed = Passes::parse(text).map_err(|e| LabError::Usage(e.to_string()))?;
            if !passes.contains(&Some(parsed)) {
                passes.push(Some(parsed));
            }
        }
        if passes.is_empty() {
            passes.push(None);
        }
        let mut models = Vec::new();
        for name in &self.preempt {
            let model = one_of("preempt", name, PREEMPT)?;
            if !models.contains(&model) {
                models.push(model);
            }
        }
        if models.is_empty() {
            return usage("preempt=[]: expected one or more of none, voluntary, full");
        }
        let mut cases = Vec::new();
        for scene in scenes {
            for (&(info, ownership), with) in infos.iter().zip(with) {
                let asked = if is_shadow(info) { &[None][..] } else { &passes };
                for (&asked, &shadow) in asked.iter().flat_map(|a| with.iter().map(move |w| (a, w))) {
                    if let Some(shadow) = &shadow
                        && let Err(why) = (scene.shadow)(plan, shadow)
                    {
                        if self.scenes.iter().any(|name| name == scene.name) {
                            return usage(format!("scene {} under {}: {why}", scene.name, info.name));
                        }
                        continue;
                    }
                    let passes = effective_passes(asked, info, &plan.profile);
                    cases.extend(models.iter().map(|&preempt| Case {
                        scene,
                        info,
                        passes,
                        ownership,
                        preempt,
                        shadow,
                    }));
                }
            }
        }
        Ok(cases)
    }

    /// The scenes asked for. A scene that makes no sense with these settings is an error where it is named, and left out of `all`.
    fn scene_list(&self, kind: Kind, plan: &Plan) -> Result<Vec<&'static Scene>, LabError> {
        let mut scenes: Vec<&'static Scene> = Vec::new();
        let mut add = |scene: &'static Scene| {
            if !scenes.iter().any(|s| s.name == scene.name) {
                scenes.push(scene);
            }
        };
        for name in &self.scenes {
            if name == "all" {
                let fits = |s: &&Scene| !s.has_its_own_guest() && (s.fits)(plan).is_ok();
                scene::of(kind).filter(fits).for_each(&mut add);
                continue;
            }
            let Some(scene) = scene::find(kind, name) else {
                return usage(scene::unknown(kind, name));
            };
            if let Err(why) = (scene.fits)(plan) {
                return usage(format!("scene {name}: {why}"));
            }
            add(scene);
        }
        if scenes.is_empty() {
            scenes.extend(scene::of(kind).take(1));
        }
        Ok(scenes)
    }

    /// The designs asked for, each with the ownership in effect.
    fn design_infos(
        &self,
        profile: &KernelProfile,
        single: bool,
    ) -> Result<Vec<(&'static DesignInfo, Ownership)>, LabError> {
        let ownership = match self.ownership.as_deref() {
            None => None,
            Some(text) => {
                Some(one_of("ownership", text, &[("vcpu", Ownership::Vcpu), ("mmu", Ownership::Mmu)])?)
            }
        };
        let mut infos: Vec<&'static DesignInfo> = Vec::new();
        // `bench walk --reclaim` names no design: there is a shadow MMU, whichever its design.
        let any = [String::from(WALKED)];
        let unnamed = single && self.designs == ["all"] && !self.reclaim.is_empty();
        for name in if unnamed { &any[..] } else { &self.designs } {
            if name == "all" {
                // `all`: every design that is sound, under this profile too.
                let sound =
                    |d: &&DesignInfo| !d.flawed && (profile.stale_root_check || !d.needs_stale_root_check);
                infos.extend(DESIGNS.iter().filter(sound));
                continue;
            }
            if name == "shadow" {
                infos.extend(shadow_designs());
                continue;
            }
            match design_info(name) {
                Some(info) if info.needs_stale_root_check && !profile.stale_root_check => {
                    return usage(format!(
                        "design {} with profile {}: that kernel's faults do not test whether their root is stale \
                         (before 5.16), and would map under a root that was zapped already; add ,stale-root-check=true",
                        info.name, profile.name
                    ));
                }
                Some(info) => infos.push(info),
                None => {
                    let names = all_design_names();
                    let hint =
                        closest(name, &names).map(|c| format!(" (did you mean {c:?}?)")).unwrap_or_default();
                    return usage(format!(
                        "design={name:?}: expected all, shadow, or one of {}{hint}",
                        names.join(", ")
                    ));
                }
            }
        }
        if infos.is_empty() {
            return usage("designs=[]: name at least one");
        }
        if !infos.iter().any(|info| info.queue.is_some()) {
            let idle = [
                (!self.worker_cpus.is_empty(), "worker_cpus"),
                (self.worker_queue.is_some(), "worker_queue"),
                (self.workers > 1, "workers"),
            ];
            if let Some((_, name)) = idle.iter().find(|i| i.0) {
                let names: Vec<_> = infos.iter().map(|i| i.name).collect();
                return usage(format!("{name} with design {}: it has no workers", names.join(", ")));
            }
        }
        let asked_one = self.designs.len() == 1 && self.designs[0] != "all";
        let mut plans = Vec::new();
        for info in infos {
            let own = ownership.filter(|_| !is_shadow(info)).unwrap_or(info.ownership);
            if own != info.ownership
                && let OtherOwnership::Refused(why) = info.other_ownership
            {
                let sentence = format!("design {} with ownership {own} makes no sense: {why}", info.name);
                if asked_one || plans.is_empty() && self.designs != ["all"] {
                    return usage(sentence);
                }
                return usage(format!("{sentence}; name the designs that you want instead of all"));
            }
            if !plans.iter().any(|(other, _): &(&DesignInfo, _)| other.name == info.name) {
                plans.push((info, own));
            }
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
        config.plan(Some(Kind::Zap))
    }

    #[test]
    fn a_flag_comes_before_the_design_and_that_before_the_profile() {
        let passes = |plan: &Plan, name| {
            let case = plan.cases.iter().find(|c| c.info.name == name).expect("a case");
            case.passes.to_string()
        };
        let all = plan(|_| {}).expect("defaults make sense");
        let of = |name| passes(&all, name);
        assert_eq!(
            [of("inline"), of("async-worker"), of("sync")],
            ["root", "1G,root", "4K,2M,1G,root"].map(String::from)
        );
        let old = plan(|c| c.kernel_profile = "6.1".into()).expect("makes sense");
        assert_eq!(passes(&old, "sync"), "1G,root");
        let asked = plan(|c| c.passes = vec!["root".into()]).expect("makes sense");
        assert!(asked.cases.iter().all(|c| c.passes == Passes::ROOT));
    }

    #[test]
    fn all_is_every_sound_design_of_the_experiments_first_scene() {
        let all = plan(|_| {}).expect("defaults make sense");
        let sound: Vec<_> = DESIGNS.iter().filter(|d| !d.flawed).map(|d| d.name).collect();
        assert_eq!(all.cases.iter().map(|c| c.info.name).collect::<Vec<_>>(), sound);
        assert!(all.cases.iter().all(|c| c.scene.name == "memslot-delete"));
        let flawed = plan(|c| c.designs = vec!["no-second-phase".into()]).expect("asked for by name");
        assert!(flawed.cases[0].info.flawed);
    }

    #[test]
    fn lists_multiply_and_repeated_values_do_not() {
        let json = r#"{"scenes": ["memslot-delete", "boot", "boot"], "designs": ["sync", "inline"], "passes": ["1G,root", "root"],
                       "preempt": ["none", "full"]}"#;
        let config = BenchConfig::parse(json).expect("well formed");
        assert_eq!(config.plan(Some(Kind::Zap)).expect("makes sense").cases.len(), 16);
        let single = r#"{"scenes": "boot", "designs": "sync", "passes": "root", "preempt": "none"}"#;
        let single = BenchConfig::parse(single).expect("a single value is a list of one");
        let plan = single.plan(Some(Kind::Zap)).expect("makes sense");
        assert_eq!((plan.cases.len(), plan.cases[0].preempt), (1, Preempt::None));
        let null = BenchConfig::parse(r#"{"passes": null}"#).expect("null is none");
        assert!(null.passes.is_empty());
    }

    #[test]
    fn scenes_belong_to_their_experiment_and_must_make_sense() {
        let scene = |name: &str, change: &dyn Fn(&mut BenchConfig)| {
            plan(|c| {
                c.scenes = vec![name.into()];
                change(c);
            })
            .expect_err("no sense")
            .to_string()
        };
        assert!(scene("cr0-wp", &|_| {}).contains("belongs to bench drop"));
        assert!(scene("slot-chrun", &|_| {}).contains("did you mean \"slot-churn\""));
        assert!(scene("zap-64t", &|c| c.memory_bytes = 4096).contains("an eighth"));
        let all = plan(|c| {
            c.scenes = vec!["all".into()];
            c.memory_bytes = 4096;
        })
        .expect("what does not fit is left out");
        assert!(all.cases.iter().all(|c| c.scene.kind == Kind::Zap && c.scene.name != "zap-64t"));
        assert!(BenchConfig { scenes: vec!["boot".into()], ..BenchConfig::default() }.plan(None).is_err());
    }

    #[test]
    fn settings_of_workers_need_a_design_with_workers() {
        let ask = |design: &str, change: &dyn Fn(&mut BenchConfig)| {
            plan(|c| {
                c.designs = vec![design.into()];
                change(c);
            })
        };
        for change in [
            (|c| c.worker_cpus = vec![Real::cpus()[0]]) as fn(&mut BenchConfig),
            |c| c.worker_queue = Some("system".into()),
            |c| c.workers = 2,
        ] {
            assert!(ask("async-worker", &change).is_ok());
            assert!(ask("all", &change).is_ok(), "those that have workers use them");
            let error = ask("sync", &change).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("it has no workers"), "{error}");
        }
        let error = ask("async-worker", &|c| c.worker_cpus = vec![4095]).expect_err("no such CPU");
        assert!(error.to_string().contains("CPU 4095"), "{error}");
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
        let all = plan(|c| c.kernel_profile = "5.15".into()).expect("the older ones remain");
        assert_eq!(all.cases.iter().map(|c| c.info.name).collect::<Vec<_>>(), ["in-place", "inline"]);
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
