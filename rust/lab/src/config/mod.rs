//! The request of `bench …`, as it is written.
//!
//! What follows from it is a [`Plan`] (`plan.rs`): every value checked, every pair that makes no sense refused, what was left open settled.

mod dirty;
mod plan;
mod shadow;

use serde::{Deserialize, Deserializer, Serialize};

use crate::LabError;

pub use self::dirty::{DirtyPlan, Protocol};
pub use self::plan::{AdMix, Case, Plan, PopulateBy};
pub use self::shadow::ShadowCase;

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
    /// Zap designs by name; `all`: every sound one of the TDP MMU; `shadow`: every one of the shadow MMU.
    #[serde(deserialize_with = "one_or_more")]
    pub designs: Vec<String>,
    /// Scenes by name; none: the experiment's default; `all`: all of the experiment.
    #[serde(deserialize_with = "one_or_more")]
    pub scenes: Vec<String>,
    /// Passes, each for a run of its own; none: the design's.
    #[serde(deserialize_with = "one_or_more")]
    pub passes: Vec<String>,
    /// `vcpu` or `mmu`, or the design's.
    pub ownership: Option<String>,
    /// `none`, `voluntary` or `full`, each for a run of its own.
    #[serde(deserialize_with = "one_or_more")]
    pub preempt: Vec<String>,
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
    /// Worker n runs on CPU `worker_cpus[n % len]`; empty: anywhere.
    pub worker_cpus: Vec<usize>,
    /// `per-vm` or `system`, or the design's own.
    pub worker_queue: Option<String>,
    /// vCPU n runs on CPU `vcpu_cpus[n % len]`; empty: anywhere.
    pub vcpu_cpus: Vec<usize>,
    /// `local`, `pipeline` or `global`: how the working sets of the vCPUs overlap.
    pub sharing: String,
    /// `slot-churn`: cycles of create and delete.
    pub churns: u64,
    /// Shadow designs: `direct` (tdp_mmu=N) or `guest` (tdp=0: the guest's own page tables are shadowed).
    pub paging: String,
    /// Shadow designs: how freed pages are kept from lockless walkers, each for a run of its own; none: `ipi`; `all`: every kind. `bench walk`: none is the walk of the TDP MMU.
    #[serde(deserialize_with = "one_or_more")]
    pub reclaim: Vec<String>,
    /// Shadow designs: most shadow pages (KVM_SET_NR_MMU_PAGES); none: no limit.
    pub quota: Option<u32>,
    /// `bench dirty`: how written pages are found, each protocol by name; none or `all`: every one.
    #[serde(deserialize_with = "one_or_more")]
    pub protocols: Vec<String>,
    /// `bench dirty`: `on` or `off`, or both: split huge pages when logging starts; none: whatever makes sense.
    #[serde(deserialize_with = "one_or_more")]
    pub eager: Vec<String>,
    /// `bench dirty`: one page in so many is written, each a measurement of its own; none: 1, 8 and 512.
    pub densities: Vec<u64>,
    /// Keep a timeline in each run.
    pub timeline: bool,
    /// Write a Perfetto trace there.
    pub perfetto: Option<String>,
    /// Write an HdrHistogram log there.
    pub hlog: Option<String>,
}

/// A single value, null for none, or a list.
pub(crate) fn one_or_more<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        Nothing(()),
        One(String),
        Many(Vec<String>),
    }
    Ok(match Given::deserialize(from)? {
        Given::Nothing(()) => Vec::new(),
        Given::One(one) => vec![one],
        Given::Many(many) => many,
    })
}

impl Default for BenchConfig {
    fn default() -> Self {
        Self {
            memory_bytes: 1 << 30,
            page: "4K".into(),
            vcpus: 2,
            levels: 4,
            designs: vec!["all".into()],
            scenes: Vec::new(),
            passes: Vec::new(),
            ownership: None,
            preempt: vec!["full".into()],
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
            worker_cpus: Vec::new(),
            worker_queue: None,
            vcpu_cpus: Vec::new(),
            sharing: "local".into(),
            churns: 100,
            paging: "direct".into(),
            reclaim: Vec::new(),
            quota: None,
            protocols: Vec::new(),
            eager: Vec::new(),
            densities: Vec::new(),
            timeline: false,
            perfetto: None,
            hlog: None,
        }
    }
}

impl BenchConfig {
    /// Parses a request.
    ///
    /// # Errors
    /// [`LabError::Usage`] for malformed JSON and unknown fields.
    pub fn parse(json: &str) -> Result<Self, LabError> {
        serde_json::from_str(json).map_err(|e| LabError::Usage(format!("bench configuration: {e}")))
    }
}
