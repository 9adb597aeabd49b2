//! What if: the zaps of a recording, through another design.
//!
//! **Guarantee.** Nothing is modelled. Each tree that a recorded zap met is built again in the engine, entry for entry by level and place, and counted;
//! then the zap is run through the design, on real threads, and timed. What was recorded stands beside it. The times are this machine's:
//! they compare with one another, not with the recorded ones, which were taken on another machine and under tracing.
//!
//! **Mechanism.** A replay with `shapes` keeps the trees as they were before the first removal of each zap that a design decides about: fast zaps, drops of a last
//! reference, ends of VMs. A worker's zap belongs to the fast zap that waits for it, else to the drop that left it behind. Each is one run:
//! a VM of its own (`rebuild.rs`), vCPUs that hold its roots, and the request (`run.rs`). Zaps that are the same in every design (notifiers, dirty
//! logging, NX recovery) are not run; they are listed as skipped, with the reason.

mod rebuild;
mod run;

use std::collections::BTreeMap;

use serde::Serialize;
use tdpmmu_mmu::design;
use tdpmmu_spte::KernelProfile;
use tdpmmu_trace::{Replay, Shape, Zap};

use crate::host::HostInfo;
use crate::{Control, LabError};

/// Most zaps that are run.
pub const MOST_ZAPS: usize = 256;

/// What is asked.
#[derive(Clone, Debug)]
pub struct WhatIfOptions {
    /// The zap design's name.
    pub design: String,
    /// The kernel whose rules hold otherwise; none: the recording's.
    pub profile: Option<String>,
    /// Each zap is run so often, on a tree built anew; the run with the median request is reported. At least 1.
    pub reps: u32,
}

impl WhatIfOptions {
    /// This design, under the recording's kernel, each zap three times.
    pub fn new(design: &str) -> Self {
        Self { design: design.to_owned(), profile: None, reps: 3 }
    }
}

/// The recorded zaps through a design.
#[derive(Clone, Debug, Serialize)]
pub struct WhatIf {
    /// The design.
    pub design: String,
    /// The kernel profile that holds otherwise.
    pub profile: String,
    /// CPU of the machine that the times are from.
    pub machine: String,
    /// Its CPUs.
    pub cpus: usize,
    /// Each zap that was run, in the order of the recording.
    pub zaps: Vec<WhatIfZap>,
    /// Their sums; `vcpu_blocked_max_ns` is the largest.
    pub total: Totals,
    /// Zaps that were not run, and why.
    pub skipped: Vec<Skipped>,
    /// What a reader must know.
    pub note: String,
}

/// One zap, as recorded and as run.
#[derive(Clone, Debug, Serialize)]
pub struct WhatIfZap {
    /// Begin in the recording, ns of its clock.
    pub t0_ns: u64,
    /// Its refined cause.
    pub cause: String,
    /// What was run: `fast_zap`, `root_drop` or `vm_end`.
    pub run_as: &'static str,
    /// Leafs mapped at t0, counted in the engine.
    pub sptes: u64,
    /// Page-table pages at t0, roots included.
    pub tables: u64,
    /// Roots.
    pub roots: u64,
    /// vCPUs that ran.
    pub vcpus: usize,
    /// vCPU threads that the recording shows.
    pub vcpus_recorded: usize,
    /// Duration of the recorded zap, on the recording's machine.
    pub recorded_ns: u64,
    /// How long the request held its caller: the memslot update, the end of the VM.
    pub caller_blocked_ns: u64,
    /// Per vCPU: from its exit for the request, or its drop, until it was back in the guest.
    pub vcpus_blocked_ns: Vec<u64>,
    /// The largest of these.
    pub vcpu_blocked_max_ns: u64,
    /// CPU time of workers.
    pub background_ns: u64,
    /// Page-table pages linked still when the request returned.
    pub retained_tables_at_return: u64,
}

/// Sums over zaps.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Totals {
    /// Zaps that were run.
    pub zaps: u64,
    /// Their leafs.
    pub sptes: u64,
    /// Recorded durations.
    pub recorded_ns: u64,
    /// Callers blocked.
    pub caller_blocked_ns: u64,
    /// The longest that a vCPU was blocked.
    pub vcpu_blocked_max_ns: u64,
    /// Workers.
    pub background_ns: u64,
}

/// Zaps that were not run.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// Why.
    pub why: String,
    /// How many.
    pub zaps: u64,
}

/// What a recorded zap is run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RunAs {
    FastZap,
    RootDrop,
    VmEnd,
}

impl RunAs {
    fn name(self) -> &'static str {
        match self {
            RunAs::FastZap => "fast_zap",
            RunAs::RootDrop => "root_drop",
            RunAs::VmEnd => "vm_end",
        }
    }
}

/// The design's settings for all runs.
struct Setting {
    design: String,
    profile: KernelProfile,
    cpus: usize,
}

/// Runs the zaps of a replay (made with `shapes`) through a design.
///
/// # Errors
/// [`LabError::Usage`] for an unknown design or profile, [`LabError::Memory`] when a tree does not fit this host, [`LabError::Cancelled`],
/// [`LabError::Internal`].
pub fn what_if(replay: &Replay, options: &WhatIfOptions, control: &Control) -> Result<WhatIf, LabError> {
    if design::info(&options.design).is_none() {
        let known = design::names().join(", ");
        return Err(LabError::Usage(format!("what_if={:?}: no such design; known: {known}", options.design)));
    }
    if options.reps == 0 {
        return Err(LabError::Usage("reps=0: each zap must be run at least once".to_owned()));
    }
    let name = options.profile.as_deref().unwrap_or(&replay.kernel);
    let profile = KernelProfile::named(name).map_err(|e| LabError::Usage(e.to_string()))?;
    let host = HostInfo::collect();
    let setting = Setting { design: options.design.clone(), profile, cpus: host.cpus };
    let mut skipped: BTreeMap<String, u64> = BTreeMap::new();
    skip_the_rest(replay, &mut skipped);
    let mut zaps = Vec::new();
    for (n, shape) in replay.shapes.iter().enumerate() {
        control.check()?;
        control.report(&format!("what if: {}", options.design), n as f64 / replay.shapes.len() as f64);
        let Some(zap) = replay.zaps.get(shape.zap) else { continue };
        if zaps.len() >= MOST_ZAPS {
            *skipped.entry(format!("more than {MOST_ZAPS} zaps")).or_default() += 1;
            continue;
        }
        if let Err(why) = rebuild::fits(shape) {
            *skipped.entry(why).or_default() += 1;
            continue;
        }
        zaps.push(one(replay, zap, shape, &setting, options.reps, control)?);
    }
    let total = zaps.iter().fold(Totals::default(), |sum, zap: &WhatIfZap| Totals {
        zaps: sum.zaps + 1,
        sptes: sum.sptes + zap.sptes,
        recorded_ns: sum.recorded_ns + zap.recorded_ns,
        caller_blocked_ns: sum.caller_blocked_ns + zap.caller_blocked_ns,
        vcpu_blocked_max_ns: sum.vcpu_blocked_max_ns.max(zap.vcpu_blocked_max_ns),
        background_ns: sum.background_ns + zap.background_ns,
    });
    Ok(WhatIf {
        design: options.design.clone(),
        profile: setting.profile.to_string(),
        machine: host.cpu,
        cpus: host.cpus,
        zaps,
        total,
        skipped: skipped.into_iter().map(|(why, zaps)| Skipped { why, zaps }).collect(),
        note: "times of this machine, measured in this run; recorded_ns is of the recording's machine, under its tracing".to_owned(),
    })
}

/// Zaps without a tree: none that a design decides about, or nothing was there to zap.
fn skip_the_rest(replay: &Replay, skipped: &mut BTreeMap<String, u64>) {
    let mut with = vec![false; replay.zaps.len()];
    for shape in &replay.shapes {
        if let Some(there) = with.get_mut(shape.zap) {
            *there = true;
        }
    }
    for (zap, _) in replay.zaps.iter().zip(with).filter(|(_, there)| !there) {
        let why = match zap.cause {
            "fast_zap" | "root_drop" | "teardown" => "nothing was mapped, or a worker zapped it",
            "worker" => "the tree before the zap is not known",
            _ => "the same in every design",
        };
        *skipped.entry(why.to_owned()).or_default() += 1;
    }
}

/// A fast zap during which a worker zapped.
fn waiting<'r>(replay: &'r Replay, zap: &Zap) -> Option<&'r Zap> {
    let end = |z: &Zap| z.t0_ns.saturating_add(z.duration_ns);
    replay.zaps.iter().find(|z| z.cause == "fast_zap" && z.t0_ns <= zap.t0_ns && end(z) >= zap.t0_ns)
}

fn one(
    replay: &Replay,
    zap: &Zap,
    shape: &Shape,
    setting: &Setting,
    reps: u32,
    control: &Control,
) -> Result<WhatIfZap, LabError> {
    let (run_as, asked) = match zap.cause {
        "teardown" => (RunAs::VmEnd, zap),
        "worker" => waiting(replay, zap).map_or((RunAs::RootDrop, zap), |z| (RunAs::FastZap, z)),
        "root_drop" if !zap.refined.starts_with("memslot") => (RunAs::RootDrop, zap),
        _ => (RunAs::FastZap, zap),
    };
    let vm = zap.vm.and_then(|id| replay.per_vm.iter().find(|vm| vm.id == id));
    let vcpus_recorded = vm.map_or(0, |vm| if vm.faults > 0 { vm.pids.len() } else { 0 });
    let mut runs = Vec::new();
    for _ in 0..reps {
        control.check()?;
        runs.push(run::run(shape, run_as, setting, vcpus_recorded.max(1), control)?);
    }
    runs.sort_by_key(|r: &run::Measured| r.caller_blocked_ns + r.vcpus_blocked_ns.iter().sum::<u64>());
    let measured = runs.swap_remove((runs.len() - 1) / 2);
    Ok(WhatIfZap {
        t0_ns: asked.t0_ns,
        cause: asked.refined.to_owned(),
        run_as: run_as.name(),
        sptes: measured.sptes,
        tables: measured.tables,
        roots: shape.roots.len() as u64,
        vcpus: measured.vcpus_blocked_ns.len(),
        vcpus_recorded,
        recorded_ns: asked.duration_ns,
        caller_blocked_ns: measured.caller_blocked_ns,
        vcpu_blocked_max_ns: measured.vcpus_blocked_ns.iter().copied().max().unwrap_or(0),
        vcpus_blocked_ns: measured.vcpus_blocked_ns,
        background_ns: measured.background_ns,
        retained_tables_at_return: measured.retained_tables,
    })
}
