//! The schema of a torture's result, and what it proves.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::faults::FaultCount;

/// tdpmmu.torture/1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TortureReport {
    /// `tdpmmu.torture/1`.
    pub schema: String,
    /// Time that operations ran, quiet checks not counted.
    pub seconds: f64,
    /// Operations that threads completed.
    pub operations: u64,
    /// What repeats it.
    pub seed: u64,
    /// What was broken; empty is the only good answer.
    pub violations: Vec<TortureViolation>,
    /// Faults that were possible, with how often they struck.
    pub faults: Vec<FaultCount>,
    /// The fault plan.
    pub plan: String,
    /// Operations by name.
    pub by_operation: BTreeMap<String, OperationCount>,
    /// Accesses by how they ended.
    pub accesses: BTreeMap<String, u64>,
    /// VMs that lived and died, one after the other.
    pub episodes: Vec<EpisodeReport>,
    /// What so much time without a violation proves.
    pub proves: Proof,
    /// It was ended from outside.
    pub cancelled: bool,
}

/// How often an operation was carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationCount {
    /// It did what it does.
    pub done: u64,
    /// The VM refused it, as KVM does (a slot that is gone).
    pub refused: u64,
    /// It ran out of table pages: a plan takes them away, or all wait for RCU.
    pub starved: u64,
}

/// Something was broken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TortureViolation {
    /// Episode, from 0.
    pub episode: u64,
    /// The rule: an oracle's, or the torture's own (`no-progress`, `unexpected-error`, `panic`, `not-recovered`, `starved-writer`).
    pub rule: String,
    /// In words.
    pub what: String,
}

/// The life of one VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpisodeReport {
    /// Its seed.
    pub seed: u64,
    /// Zap design.
    pub design: String,
    /// Kernel profile.
    pub profile: String,
    /// `real`, or `rough`: with faults and lost CPUs at every access.
    pub ground: String,
    /// The machine, in words.
    pub machine: String,
    /// Seconds that operations ran.
    pub seconds: f64,
    /// Operations.
    pub operations: u64,
    /// Quiet points at which everything was compared.
    pub quiet_checks: u32,
    /// Events that the judge heard; 0 where only the cheap oracles listened.
    pub events: u64,
    /// Table pages allocated.
    pub tables: u64,
    /// Stalls of grace periods that RCU reported, with the readers' names.
    pub stalls: BTreeMap<String, u64>,
    /// It was closed while operations were under way.
    pub closed_under_fire: bool,
}

/// The rule of three.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Hours without a violation.
    pub clean_hours: f64,
    /// With 95 % confidence failures are rarer than this, per hour of this load on this machine; `None` after a violation.
    pub failures_per_hour_below: Option<f64>,
    /// In words.
    pub text: String,
}

impl Proof {
    /// What `seconds` with so many `violations` prove.
    pub fn of(seconds: f64, violations: usize) -> Self {
        let hours = seconds / 3600.0;
        if violations != 0 || hours <= 0.0 {
            let text = if violations == 0 {
                "nothing ran: nothing is proven"
            } else {
                "something was broken: nothing is proven"
            };
            return Self { clean_hours: 0.0, failures_per_hour_below: None, text: text.to_owned() };
        }
        let bound = 3.0 / hours;
        let text = format!(
            "{hours:.4} clean hours: failures are rarer than {bound:.3} an hour of this load on this machine, with 95 % confidence (3/N); no more than that"
        );
        Self { clean_hours: hours, failures_per_hour_below: Some(bound), text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_hour_proves_three_an_hour_and_a_violation_proves_nothing() {
        let hour = Proof::of(3600.0, 0);
        assert_eq!((hour.clean_hours, hour.failures_per_hour_below), (1.0, Some(3.0)));
        assert_eq!(Proof::of(3600.0, 1).failures_per_hour_below, None);
        assert_eq!(Proof::of(0.0, 0).failures_per_hour_below, None);
    }
}
