//! A plan at work: it answers the platform's questions, and keeps count.
//!
//! **Guarantee.** An answer depends on the plan, the number of the question and the dice alone; [`Nth::Drawn`] also on what it drew at the first question of the run. So an [`Armed`] serves one run (or all
//! threads of a torture, where order is the host's).

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tdpmmu_platform::{Fault, Faults, Site};

use super::{FaultPlan, Injection, Nth, Rate, Who, WorkerFault};

/// Requests for pages among which [`Nth::Drawn`] chooses the one that fails.
const DRAWN_AMONG: u32 = 64;

/// How often a fault was possible, and how often it struck.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCount {
    /// Its name ([`Fault::name`]).
    pub fault: String,
    /// Questions.
    pub asked: u64,
    /// Times that it struck.
    pub struck: u64,
}

/// See the module text.
#[derive(Debug)]
pub struct Armed {
    plan: FaultPlan,
    drawn: AtomicU32,
    asked: Vec<AtomicU64>,
    struck: Vec<AtomicU64>,
    disarmed: AtomicU32,
    found: Mutex<BTreeSet<(&'static str, String)>>,
}

impl FaultPlan {
    /// The plan, ready for one run.
    pub fn arm(&self) -> Arc<Armed> {
        let zeros = || Fault::ALL.iter().map(|_| AtomicU64::new(0)).collect();
        Arc::new(Armed {
            plan: self.clone(),
            drawn: AtomicU32::new(0),
            asked: zeros(),
            struck: zeros(),
            disarmed: AtomicU32::new(0),
            found: Mutex::default(),
        })
    }
}

fn hits(rate: &Rate, site: Site, dice: &mut dyn FnMut(u32) -> u32) -> bool {
    rate.site.is_none_or(|only| only == site) && (rate.percent == 100 || dice(100) < u32::from(rate.percent))
}

impl Armed {
    /// The plan.
    pub fn plan(&self) -> &FaultPlan {
        &self.plan
    }

    /// Nothing strikes from here on, until [`Armed::rearm`]: for quiet points and the end of a VM. Nests.
    pub fn disarm(&self) {
        self.disarmed.fetch_add(1, Relaxed);
    }

    /// Takes one [`Armed::disarm`] back.
    pub fn rearm(&self) {
        self.disarmed.fetch_sub(1, Relaxed);
    }

    /// The ground itself has seen a rule broken.
    pub fn found(&self, rule: &'static str, what: &str) {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert((rule, what.to_owned()));
    }

    /// What [`Armed::found`] was told since the last time, each once.
    pub fn take_found(&self) -> BTreeSet<(&'static str, String)> {
        std::mem::take(&mut *self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How often `fault` was asked about, and how often it struck.
    pub fn count(&self, fault: Fault) -> (u64, u64) {
        (self.asked[fault as usize].load(Relaxed), self.struck[fault as usize].load(Relaxed))
    }

    /// Faults that were asked about, with their counts.
    pub fn counts(&self) -> Vec<FaultCount> {
        let row = |fault: &Fault| {
            let (asked, struck) = self.count(*fault);
            FaultCount { fault: fault.name().to_owned(), asked, struck }
        };
        Fault::ALL.iter().map(row).filter(|row| row.asked != 0).collect()
    }

    /// As [`Faults::inject`], with the count of questions kept here: for platforms that keep none.
    pub fn ask(&self, fault: Fault, site: Site, dice: &mut dyn FnMut(u32) -> u32) -> u32 {
        let nth = self.asked[fault as usize].load(Relaxed);
        self.inject(fault, site, nth, dice)
    }

    fn strikes(
        &self,
        injection: &Injection,
        fault: Fault,
        site: Site,
        nth: u64,
        dice: &mut dyn FnMut(u32) -> u32,
    ) -> u32 {
        let now_and_then =
            |dice: &mut dyn FnMut(u32) -> u32, of: u32, length: u32| if dice(of) == 0 { length } else { 0 };
        match (fault, injection) {
            (Fault::Alloc, Injection::Alloc(which)) => u32::from(match *which {
                Nth::Only(k) => nth + 1 == u64::from(k),
                Nth::From(k) => nth + 1 >= u64::from(k),
                Nth::Percent(p) => dice(100) < u32::from(p),
                Nth::Drawn => {
                    if nth == 0 {
                        self.drawn.store(dice(DRAWN_AMONG), Relaxed);
                    }
                    nth == u64::from(self.drawn.load(Relaxed))
                }
            }),
            (Fault::Cmpxchg, Injection::Cmpxchg(rate)) | (Fault::Yield, Injection::Yield(rate)) => {
                u32::from(hits(rate, site, dice))
            }
            (Fault::GraceDelay, Injection::GraceDelay(length))
            | (Fault::FlushDelay, Injection::FlushDelay(length)) => length.points(),
            (Fault::WorkerStall, Injection::Worker(WorkerFault::Stall)) => now_and_then(dice, 2, u32::MAX),
            (Fault::WorkerPanic, Injection::Worker(WorkerFault::Panic)) => now_and_then(dice, 4, 1),
            (Fault::WorkerDie, Injection::Worker(WorkerFault::Die)) => now_and_then(dice, 2, 1),
            (Fault::FlushMerge, Injection::FlushMerge) => now_and_then(dice, 2, 50),
            (Fault::FlushExtra, Injection::FlushExtra) => now_and_then(dice, 4, 1),
            (Fault::VcpuPause, Injection::Pause(Who::Guest(_))) => now_and_then(dice, 4, 100),
            (Fault::Pause, Injection::Pause(Who::Lockless)) if site == Site::WalkLockless => {
                now_and_then(dice, 4, u32::MAX)
            }
            _ => 0,
        }
    }
}

impl Faults for Armed {
    fn inject(&self, fault: Fault, site: Site, nth: u64, dice: &mut dyn FnMut(u32) -> u32) -> u32 {
        if self.disarmed.load(Relaxed) != 0 {
            return 0;
        }
        self.asked[fault as usize].fetch_add(1, Relaxed);
        let struck =
            self.plan.faults().iter().map(|i| self.strikes(i, fault, site, nth, dice)).find(|&n| n != 0);
        if struck.is_some() {
            self.struck[fault as usize].fetch_add(1, Relaxed);
        }
        struck.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn struck(plan: &str, fault: Fault, asks: u32) -> Vec<u32> {
        let armed = plan.parse::<FaultPlan>().expect(plan).arm();
        let mut state = 1u32;
        let mut dice = |n: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % n
        };
        (0..asks).filter(|_| armed.ask(fault, Site::SpteRead, &mut dice) != 0).collect()
    }

    #[test]
    fn the_kth_request_fails_and_no_other_or_all_after_it() {
        assert_eq!(struck("alloc=3", Fault::Alloc, 6), [2]);
        assert_eq!(struck("alloc=3+", Fault::Alloc, 6), [2, 3, 4, 5]);
        assert_eq!(struck("alloc=every", Fault::Alloc, 64).len(), 1);
        assert!(struck("alloc=3", Fault::Cmpxchg, 6).is_empty());
    }

    #[test]
    fn a_site_and_a_probability_are_kept() {
        assert_eq!(struck("yield=all", Fault::Yield, 5).len(), 5);
        assert_eq!(struck("yield=SpteRead", Fault::Yield, 5).len(), 5);
        assert_eq!(struck("yield=SpteZap", Fault::Yield, 5).len(), 0);
        let some = struck("cmpxchg=20%", Fault::Cmpxchg, 1000).len();
        assert!((100..300).contains(&some), "{some}");
    }

    #[test]
    fn what_is_disarmed_neither_strikes_nor_counts() {
        let armed = "yield=all".parse::<FaultPlan>().expect("a plan").arm();
        armed.disarm();
        assert_eq!(armed.ask(Fault::Yield, Site::LockYield, &mut |_| 0), 0);
        armed.rearm();
        assert_eq!(armed.ask(Fault::Yield, Site::LockYield, &mut |_| 0), 1);
        assert_eq!(armed.count(Fault::Yield), (1, 1));
    }
}
