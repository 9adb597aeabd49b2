//! Which strategy the n-th schedule has: a function of the seed and n alone.

use serde::{Deserialize, Serialize};
use tdpmmu_platform::Site;
use tdpmmu_platform::sim::{Memory, Strategy};

use crate::LabError;

/// Strategies of a search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mix {
    /// A bit of each.
    #[default]
    Mix,
    /// Random switches.
    Random,
    /// Probabilistic concurrency testing.
    Pct,
    /// Depth first, few preemptions first.
    Dfs,
    /// Two sites that are to follow each other.
    Targeted,
}

impl Mix {
    /// Every value by its name.
    pub const NAMES: [&'static str; 5] = ["mix", "random", "pct", "dfs", "targeted"];

    /// The value of that name.
    ///
    /// # Errors
    /// [`LabError::Usage`].
    pub fn parse(name: &str) -> Result<Self, LabError> {
        Ok(match name {
            "mix" => Mix::Mix,
            "random" => Mix::Random,
            "pct" => Mix::Pct,
            "dfs" => Mix::Dfs,
            "targeted" => Mix::Targeted,
            _ => return Err(unknown("strategy", name, &Self::NAMES)),
        })
    }
}

/// Memory models of a search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Models {
    /// Two schedules of three are sequentially consistent, the third has store buffers.
    #[default]
    Mix,
    /// Sequentially consistent.
    Sc,
    /// x86: store buffers.
    Tso,
}

impl Models {
    /// Every value by its name.
    pub const NAMES: [&'static str; 3] = ["mix", "sc", "tso"];

    /// The value of that name.
    ///
    /// # Errors
    /// [`LabError::Usage`].
    pub fn parse(name: &str) -> Result<Self, LabError> {
        Ok(match name {
            "mix" => Models::Mix,
            "sc" => Models::Sc,
            "tso" => Models::Tso,
            _ => return Err(unknown("memory", name, &Self::NAMES)),
        })
    }
}

/// A name that is none of `known`.
pub(super) fn unknown(what: &str, name: &str, known: &[&str]) -> LabError {
    let hint = tdpmmu_spte::closest(name, known)
        .map_or_else(String::new, |closest| format!("; did you mean {closest}?"));
    LabError::Usage(format!("{what}={name:?}: expected one of {}{hint}", known.join(", ")))
}

/// What the plan knows of the program from its first run.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) choices: u64,
    pub(super) sites: Vec<Site>,
}

/// One schedule to run.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) strategy: Strategy,
    pub(super) memory: Memory,
    pub(super) yield_percent: u8,
    /// The depth, if it counts for the bound.
    pub(super) depth: Option<u32>,
}

/// The n-th number after `seed` (splitmix64).
pub(super) fn mixed(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The `n`-th schedule that is drawn. (Those of the depth-first search follow from each other.)
pub(super) fn planned(
    mix: Mix,
    models: Models,
    depth: Option<u32>,
    seed: u64,
    n: u64,
    known: &Known,
) -> Planned {
    let drawn = mixed(seed, n);
    let memory = match models {
        Models::Sc => Memory::Sc,
        Models::Tso => Memory::Tso,
        Models::Mix if mixed(seed ^ 0x75, n).is_multiple_of(3) => Memory::Tso,
        Models::Mix => Memory::Sc,
    };
    // Yields by the schedule's own choice: none, some, many.
    let yield_percent = [0, 5, 25][(mixed(seed ^ 0x79, n) % 3) as usize];
    let random = Strategy::Random { seed: drawn };
    let pct = |depth: u32| Strategy::Pct { seed: drawn, depth, steps: known.choices.max(1) };
    let targeted = || match known.sites.len() as u64 {
        0 => random.clone(),
        sites => {
            let pick = |salt: u64| known.sites[(mixed(drawn, salt) % sites) as usize];
            Strategy::Targeted { first: pick(1), then: pick(2), seed: drawn }
        }
    };
    let plain = |strategy| Planned { strategy, memory, yield_percent, depth: None };
    let by_depth = |depth| Planned { strategy: pct(depth), memory, yield_percent, depth: Some(depth) };
    match mix {
        Mix::Random | Mix::Dfs => plain(random),
        Mix::Pct => by_depth(depth.unwrap_or(2 + (n % 2) as u32)),
        Mix::Targeted => plain(targeted()),
        Mix::Mix => match n % 8 {
            0..=2 => plain(random),
            3 | 4 => by_depth(depth.unwrap_or(2)),
            5 | 6 => by_depth(depth.unwrap_or(3)),
            _ => plain(targeted()),
        },
    }
}
