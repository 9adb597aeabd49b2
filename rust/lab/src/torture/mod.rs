//! # Torture: the real platform under random operations, with every judge that can listen
//!
//! **Guarantee.** What is reported as a violation happened on real threads, in an engine of which no line was changed (unless a bug was asked for). What a thread did is a function of the seed; in which order threads met is
//! the host's doing, so a violation may not come again at once. A clean result proves what [`Proof`] says and no more.
//!
//! **Mechanism.** A torture is a row of episodes, each a VM of another design, profile and machine: drawn from the seed, populated by racing faults, run in stutter (some 100 ms of operations, then a quiet point at which
//! everything is compared), closed, often while operations are under way. Every other episode runs on [`rough`] ground: the same words, locks and threads, but a thread may lose its CPU at any access, and the faults
//! of the plan strike. Half of the episodes have no judge listening: it makes threads meet at its own lock, and thereby keeps apart what should collide; they are held against their own books (cheap oracles).
//!
//! | file | idea |
//! | --- | --- |
//! | `episode.rs` | one VM: threads, stutter, quiet points, the end |
//! | `surface.rs` | random operations over the whole surface |
//! | `rough.rs` | the platform of real threads with faults |
//! | `report.rs` | the schema; the rule of three |
//! | `dice.rs` | repeatable choices |

mod command;
mod dice;
mod episode;
pub mod report;
pub mod rough;
pub mod surface;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tdpmmu_platform::{Bug, Real};
use tdpmmu_shadow::ReclaimKind;
use tdpmmu_spte::{KernelProfile, closest};
use tdpmmu_vm::{all_design_names, design_info};

pub use command::command;
pub use dice::Dice;
pub use report::{Proof, TortureReport};
pub use rough::Rough;

use crate::explore::{is_shadow, sound_designs};
use crate::faults::{FaultCount, FaultPlan, Injection};
use crate::program::MachineSpec;
use crate::{Control, LabError};

/// What is asked of a torture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TortureConfig {
    /// How long operations run in all, in seconds.
    pub seconds: f64,
    /// What repeats it; drawn if there is none.
    pub seed: Option<u64>,
    /// vCPU threads; three more play the VMM and the host.
    pub threads: usize,
    /// One profile; `None`: several in turn.
    pub profile: Option<String>,
    /// One design; `None`: every sound one in turn.
    pub design: Option<String>,
    /// What goes wrong.
    pub faults: FaultPlan,
    /// Of 1024 accesses on rough ground, so many cost the thread its CPU.
    pub shake: u32,
    /// Milliseconds between two quiet points.
    pub run_ms: u64,
    /// Stretches of so long per VM.
    pub rounds: u32,
    /// A defect to switch on, by its id in the museum: then the torture is to find it.
    pub bug: Option<String>,
}

impl Default for TortureConfig {
    fn default() -> Self {
        Self {
            seconds: 10.0,
            seed: None,
            threads: 3,
            profile: None,
            design: None,
            faults: FaultPlan::default(),
            shake: 8,
            run_ms: 200,
            rounds: 3,
            bug: None,
        }
    }
}

/// What was drawn for one episode.
#[derive(Clone, Debug)]
pub(crate) struct Draw {
    pub(crate) number: u64,
    pub(crate) seed: u64,
    pub(crate) design: String,
    pub(crate) machine: MachineSpec,
    pub(crate) rough: bool,
    pub(crate) judged: bool,
    pub(crate) close_under_fire: bool,
    pub(crate) run: Duration,
    pub(crate) rounds: u32,
}

impl Draw {
    /// The machine, in words.
    fn words(&self) -> String {
        let m = &self.machine;
        let ring = m.ring.map_or("bitmaps".to_owned(), |n| format!("rings of {n}"));
        let yields = m.force_yield.map_or(String::new(), |n| format!(", yields at every check number {n}"));
        let smm = if m.smm { ", smm" } else { "" };
        let judged = if self.judged { "judge" } else { "cheap oracles" };
        format!(
            "{} vCPUs, {}, {} levels, host pages of level {}, {}, {ring}, batch {}, {} workers{smm}{yields}; {judged}",
            m.vcpus, m.format, m.levels, m.host_level, m.dirty_mode, m.batch, m.workers
        )
    }
}

fn usage<T>(text: String) -> Result<T, LabError> {
    Err(LabError::Usage(text))
}

impl TortureConfig {
    fn check(&self) -> Result<Option<Bug>, LabError> {
        if !self.seconds.is_finite() || self.seconds <= 0.0 {
            return usage(format!("seconds = {}: a positive number", self.seconds));
        }
        if !(1..=256).contains(&self.threads) {
            return usage(format!("threads = {}: 1 to 256 vCPUs", self.threads));
        }
        if self.shake > 1024 {
            return usage(format!("shake = {}: of 1024 accesses, at most all", self.shake));
        }
        if !(1..=60_000).contains(&self.run_ms) {
            return usage(format!("run_ms = {}: 1 to 60000 ms between two quiet points", self.run_ms));
        }
        if self.rounds == 0 {
            return usage("rounds = 0: at least one stretch per VM".into());
        }
        if let Some(name) = &self.profile {
            KernelProfile::named(name).map_err(|error| LabError::Usage(error.to_string()))?;
        }
        if let Some(name) = &self.design
            && design_info(name).is_none()
        {
            let known = all_design_names();
            let near =
                closest(name, &known).map_or(String::new(), |near| format!("; did you mean {near:?}?"));
            return usage(format!(
                "design = {name:?}: no zap design is called that{near} (known: {})",
                known.join(", ")
            ));
        }
        if let Some(n) = self.faults.faults().iter().find_map(|fault| match fault {
            Injection::Pause(crate::faults::Who::Guest(n)) if usize::from(*n) >= self.threads => Some(*n),
            _ => None,
        }) {
            return usage(format!("faults = pause=guest:{n}: there are {} vCPUs, from 0", self.threads));
        }
        match &self.bug {
            None => Ok(None),
            Some(id) => match Bug::ALL.iter().find(|bug| bug.id().eq_ignore_ascii_case(id)) {
                Some(bug) => Ok(Some(*bug)),
                None => usage(format!("bug = {id:?}: the museum has none of that number")),
            },
        }
    }

    /// The next episode.
    fn draw(&self, seed: u64, number: u64) -> Draw {
        let seed = Dice::seed_of(seed, number);
        let mut dice = Dice::new(seed);
        // Those of the shadow MMU are tortured when asked for by name.
        let sound: Vec<&str> = sound_designs().into_iter().filter(|design| !is_shadow(design)).collect();
        // Every design has its turn before one has its second; what belongs to it is drawn until it can be.
        for _ in 0..1000 {
            let design =
                self.design.clone().unwrap_or_else(|| sound[number as usize % sound.len()].to_owned());
            let profile =
                self.profile.clone().unwrap_or_else(|| (*dice.pick(KernelProfile::NAMES)).to_owned());
            let machine = self.machine(&mut dice, &design, &profile);
            let rough = self.needs_rough() || number % 2 == 1;
            let draw = Draw {
                number,
                seed,
                design,
                rough,
                judged: dice.one_in(2) || self.bug.is_some(),
                close_under_fire: dice.one_in(2),
                run: Duration::from_millis(self.run_ms),
                rounds: self.rounds,
                machine,
            };
            if draw.machine.config(surface::HOST_PAGES, None).is_ok()
                && (self.profile.is_some() || keeps_its_word(&draw))
            {
                return draw;
            }
        }
        // Nothing that was drawn can be: the episode says why.
        let machine = MachineSpec::of(
            self.design.as_deref().unwrap_or(sound[0]),
            self.profile.as_deref().unwrap_or(KernelProfile::NAMES[0]),
        );
        let (design, run) = (machine.design.clone(), Duration::from_millis(self.run_ms));
        Draw {
            number,
            seed,
            design,
            machine,
            rough: false,
            judged: true,
            close_under_fire: false,
            run,
            rounds: self.rounds,
        }
    }

    fn machine(&self, dice: &mut Dice, design: &str, profile: &str) -> MachineSpec {
        let yields = self.faults.faults().iter().any(
            |fault| matches!(fault, Injection::Yield(rate) if rate.site.is_none() && rate.percent == 100),
        );
        let shadow = is_shadow(design);
        MachineSpec {
            reclaim: if shadow { (*dice.pick(&ReclaimKind::ALL)).name().into() } else { String::new() },
            quota: if shadow && dice.one_in(2) { Some(64) } else { None },
            workers: 1 + dice.below(2) as usize,
            vcpus: self.threads,
            levels: 4 + u8::from(dice.one_in(4)),
            slots: surface::SLOTS.to_vec(),
            smm: dice.one_in(3),
            host_level: 1 + u8::from(dice.one_in(2)),
            max_level: 1 + 2 * u8::from(!dice.one_in(4)),
            max_tables: self.faults.max_tables().unwrap_or(8192),
            format: if dice.one_in(3) { "ept" } else { "npt" }.into(),
            dirty_mode: if dice.one_in(3) { "d-bits" } else { "write-protect" }.into(),
            ring: dice.one_in(3).then_some(1024),
            eager_split: dice.one_in(2),
            nx: dice.one_in(3),
            batch: *dice.pick(&[1, 7, 512]),
            force_yield: if yields { Some(1) } else { *dice.pick(&[None, None, Some(1), Some(3)]) },
            ..MachineSpec::of(design, profile)
        }
    }

    /// Faults that only the rough platform has.
    fn needs_rough(&self) -> bool {
        self.bug.is_some()
            || self.faults.faults().iter().any(|fault| match fault {
                Injection::Yield(rate) => rate.site.is_some() || rate.percent != 100,
                Injection::Tables(_) | Injection::GraceDelay(_) | Injection::Storm(_) => false,
                _ => true,
            })
    }
}

/// Kernels of 5.13 to 5.17 let the host take pages away that an invalid root still maps (bug 13 of the museum): what torture finds there is that kernel's own. It is tortured when it is asked for by name.
fn keeps_its_word(draw: &Draw) -> bool {
    let keeps_roots = design_info(&draw.design).is_some_and(|info| info.obligations.keeps_roots);
    keeps_roots || draw.machine.kernel().is_ok_and(|kernel| kernel.unmap_invalid_roots)
}

/// Tortures until the time is over, it is cancelled, or something is broken.
///
/// # Errors
/// [`LabError::Usage`] names the value and the rule. A violation is in the report, and no error.
pub fn torture(config: &TortureConfig, control: &Control) -> Result<TortureReport, LabError> {
    let bug = config.check()?;
    let seed = config.seed.unwrap_or_else(drawn_seed);
    let mut report = TortureReport {
        schema: "tdpmmu.torture/1".into(),
        seed,
        plan: config.faults.to_string(),
        ..TortureReport::default()
    };
    let mut faults: BTreeMap<String, FaultCount> = BTreeMap::new();
    for number in 0.. {
        let left = config.seconds - report.seconds;
        if left <= 0.0 || control.cancelled() {
            break;
        }
        let mut draw = config.draw(seed, number);
        let whole = draw.run.as_secs_f64() * f64::from(draw.rounds);
        if left < whole {
            draw.run = draw.run.mul_f64((left / whole).max(0.05));
        }
        control.report(&format!("{} {}", draw.design, draw.machine.profile), report.seconds / config.seconds);
        let armed = config.faults.arm();
        let shake = if draw.rough { config.shake } else { 0 };
        let ground = rough::Ground { armed: armed.clone(), shake, bug, seed: draw.seed, vcpu: None };
        let sum = if draw.rough {
            episode::run::<Rough>(&draw, &armed, &ground, control)
        } else {
            episode::run::<Real>(&draw, &armed, &ground, control)
        };
        report.seconds += sum.episode.seconds;
        report.operations += sum.episode.operations;
        report.episodes.push(sum.episode);
        report.violations.extend(sum.violations.into_iter().map(|mut violation| {
            violation.episode = number;
            violation
        }));
        for (name, count) in sum.by_operation {
            let all = report.by_operation.entry(name).or_default();
            all.done += count.done;
            all.refused += count.refused;
            all.starved += count.starved;
        }
        for (name, count) in sum.accesses {
            *report.accesses.entry(name).or_default() += count;
        }
        for row in armed.counts() {
            let all = faults.entry(row.fault.clone()).or_insert(FaultCount {
                fault: row.fault,
                asked: 0,
                struck: 0,
            });
            all.asked += row.asked;
            all.struck += row.struck;
        }
        if !report.violations.is_empty() || sum.stuck {
            break;
        }
    }
    report.faults = faults.into_values().collect();
    report.cancelled = control.cancelled();
    report.proves = Proof::of(report.seconds, report.violations.len());
    control.report("done", 1.0);
    Ok(report)
}

/// A seed that nobody chose; printed, so that it can be given again.
fn drawn_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // JSON numbers are exact up to 2^53.
    std::collections::hash_map::RandomState::new().build_hasher().finish() >> 11
}
