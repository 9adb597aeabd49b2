//! Where each thread's time went, who paid, and what the others lost meanwhile.
//!
//! **Guarantee.** The phases of a row add up to its `elapsed_ns` within 5 %, or the run is an error. `elapsed_ns` is not their sum: for the
//! thread that pays it is the request, stamped by whoever times the request (the fast-zap call, the drop, the faults, the close), for every
//! other thread the window from t0 to the end of the teardown, by the window's own stamps, as far as the thread lived in it.
//!
//! **Mechanism.** A task is in one phase at a time and books each change. The phases of a request are the difference of the task's sums
//! around it; those of the others are split at t0 and at the end of the teardown (`run/meanwhile.rs`),
//! those of a worker run from its last report before t0 to that after the end. A thread pays if the
//! request was its own or if it spent CPU time in the zap of a root.

use std::collections::BTreeMap;

use serde::Serialize;
use tdpmmu_platform::{Histogram, MeterSnapshot, Phase};

use crate::outcome::{Outcome, ThreadReport};
use crate::scenario::{Mark, Who};

const PHASES: usize = Phase::ALL.len();
/// Relative tolerance of the sums.
const TOLERANCE: f64 = 0.05;
/// Absolute one: two looks at the clock with an interrupt between them, on a request of a microsecond.
const SLACK_NS: u64 = 10_000;

/// A request, stamped from outside, and what its task was doing meanwhile.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Ticks by phase.
    pub phase_ticks: [u64; PHASES],
    /// Entry and return of each call, in ticks.
    pub calls: Vec<(u64, u64)>,
}

impl Request {
    /// One more call, and its ticks by phase.
    pub fn add(&mut self, entered: u64, returned: u64, phase_ticks: &[u64; PHASES]) {
        self.calls.push((entered, returned.max(entered)));
        for (sum, ticks) in self.phase_ticks.iter_mut().zip(phase_ticks) {
            *sum += ticks;
        }
    }

    /// Entry to return, all calls together, in ticks.
    pub fn elapsed(&self) -> u64 {
        self.calls.iter().map(|(entered, returned)| returned - entered).sum()
    }
}

/// One thread's time.
#[derive(Clone, Debug, Serialize)]
pub struct Attribution {
    /// Thread.
    pub thread: String,
    /// vcpu, caller, other, worker or rcu.
    pub role: &'static str,
    /// CPU that it ended on.
    pub cpu: Option<u32>,
    /// Its CPU time in the same stretch.
    pub cpu_ns: u64,
    /// It took part in the teardown.
    pub pays: bool,
    /// ns by phase.
    pub ns: BTreeMap<&'static str, u64>,
    /// The stretch itself.
    pub elapsed_ns: u64,
    /// Of it, runnable and waiting for a CPU; null where the host does not say.
    pub run_delay_ns: Option<u64>,
}

/// What those lost who did not ask for the teardown.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Others {
    /// Waiting for mmu_lock or slots_lock.
    pub lock_wait_ns: u64,
    /// From a kick to the next guest entry.
    pub kicked_ns: u64,
    /// Runnable, but without a CPU.
    pub run_delay_ns: u64,
    /// Accesses that took longer than the time to the next intended one.
    pub accesses_late: u64,
}

fn by_phase(outcome: &Outcome, ticks: &[u64; PHASES]) -> BTreeMap<&'static str, u64> {
    Phase::ALL.iter().map(|&phase| (phase.name(), (outcome.to_ns)(ticks[phase as usize]))).collect()
}

fn zapped(meter: &MeterSnapshot) -> bool {
    meter.walk_cpu_ns > 0
}

/// A row per thread, in the order caller, vCPUs, others, workers, RCU.
pub fn attribution(outcome: &Outcome) -> Vec<Attribution> {
    let mut rows: Vec<Attribution> =
        outcome.threads.iter().map(|thread| of_thread(outcome, thread)).collect();
    if outcome.pays.is_none() {
        rows.insert(0, of_close(outcome));
    }
    rows.extend(outcome.workers.iter().enumerate().map(|(n, (meter, cpu_ns))| Attribution {
        thread: worker_name(n),
        role: "worker",
        cpu: None,
        cpu_ns: *cpu_ns,
        pays: zapped(meter),
        ns: by_phase(outcome, &meter.phase_ticks),
        elapsed_ns: (outcome.to_ns)(meter.elapsed_ticks),
        run_delay_ns: None,
    }));
    rows.push(of_rcu(outcome));
    rows
}

/// The name of worker `n`'s row and track.
pub fn worker_name(n: usize) -> String {
    format!("worker-{n}")
}

/// The name of the RCU thread's row and track.
pub const RCU: &str = "tdpmmu-rcu";
/// The name of the row and track of whoever closes the VM, where that is the request.
pub const CLOSE: &str = "close";

fn of_thread(outcome: &Outcome, thread: &ThreadReport) -> Attribution {
    let (ticks, elapsed_ns) = match &thread.request {
        Some(request) => (&request.phase_ticks, (outcome.to_ns)(request.elapsed())),
        None => {
            let ticks = thread.stamped_ticks.unwrap_or(thread.meter.elapsed_ticks);
            (&thread.meter.phase_ticks, (outcome.to_ns)(ticks))
        }
    };
    Attribution {
        thread: thread.name.clone(),
        role: role_of(thread.who),
        cpu: thread.cpu,
        cpu_ns: thread.cpu_ns,
        pays: thread.request.is_some() || zapped(&thread.meter),
        ns: by_phase(outcome, ticks),
        elapsed_ns,
        run_delay_ns: thread.run_delay_ns,
    }
}

/// The role that a row and a track carry.
pub fn role_of(who: Who) -> &'static str {
    match who {
        Who::Caller => "caller",
        Who::Vcpu(_) => "vcpu",
        Who::Other(_) => "other",
    }
}

fn of_close(outcome: &Outcome) -> Attribution {
    Attribution {
        thread: CLOSE.into(),
        role: "caller",
        cpu: None,
        cpu_ns: outcome.close.cpu_ns,
        pays: true,
        ns: by_phase(outcome, &outcome.close.phase_ticks),
        elapsed_ns: outcome.close.total_ns,
        run_delay_ns: None,
    }
}

/// The RCU thread, over the window.
fn of_rcu(outcome: &Outcome) -> Attribution {
    let elapsed_ns = (outcome.to_ns)(outcome.end.saturating_sub(outcome.t0));
    let (waiting, freeing) = outcome.rcu_thread_ns;
    let mut ns = by_phase(outcome, &[0; PHASES]);
    ns.insert(Phase::GracePeriod.name(), waiting);
    ns.insert(Phase::Free.name(), freeing);
    ns.insert(Phase::Other.name(), elapsed_ns.saturating_sub(waiting + freeing));
    Attribution {
        thread: RCU.into(),
        role: "rcu",
        cpu: None,
        cpu_ns: outcome.rcu_cpu_ns,
        pays: outcome.freed > 0,
        ns,
        elapsed_ns,
        run_delay_ns: None,
    }
}

/// What the threads lost whose request it was not; `arrival_ns`: between two intended accesses.
pub fn others(outcome: &Outcome, arrival_ns: u64) -> Others {
    let mut lost = Others::default();
    for thread in outcome.threads.iter().filter(|thread| thread.request.is_none()) {
        let felt = &thread.felt;
        lost.lock_wait_ns += thread.meter.phase_ns(Phase::LockWait);
        lost.kicked_ns += u64::try_from(felt.block_update.sum()).unwrap_or(u64::MAX);
        lost.run_delay_ns += thread.run_delay_ns.unwrap_or(0);
        let late = felt.access.iter().flat_map(|h| h.buckets()).filter(|(value, _)| *value > arrival_ns);
        lost.accesses_late += late.map(|(_, count)| count).sum::<u64>();
    }
    lost
}

/// What the request took by the stamps that its own figures are made of.
pub fn requested_ns(outcome: &Outcome) -> Option<u64> {
    if outcome.pays.is_none() {
        return Some(outcome.close.total_ns);
    }
    let marks = [Mark::Update, Mark::Drop, Mark::Replace];
    let sums: Vec<u128> = marks.iter().filter_map(|m| outcome.marks.get(m)).map(Histogram::sum).collect();
    (!sums.is_empty()).then(|| u64::try_from(sums.iter().sum::<u128>()).unwrap_or(u64::MAX))
}

/// Why the rows cannot be true, if they cannot; `requested`: the thread whose request it was, and what it took.
pub fn doubt(rows: &[Attribution], requested: Option<(&str, u64)>) -> Option<String> {
    let apart = |ns: u64, of: u64| ns.abs_diff(of) > ((of as f64 * TOLERANCE) as u64).max(SLACK_NS);
    rows.iter().find_map(|row| {
        let (thread, elapsed) = (&row.thread, row.elapsed_ns);
        let sum: u64 = row.ns.values().sum();
        if apart(sum, elapsed) {
            return Some(format!("{thread}: its phases add up to {sum} ns where {elapsed} ns have passed"));
        }
        let (_, took) = requested.filter(|(who, _)| who == thread)?;
        apart(elapsed, took)
            .then(|| format!("{thread}: {elapsed} ns are attributed of a request that took {took} ns"))
    })
}

/// [`doubt`] of a run's rows.
pub fn doubted(outcome: &Outcome, rows: &[Attribution]) -> Option<String> {
    let payer = match outcome.pays {
        None => Some(CLOSE),
        Some(who) => outcome.threads.iter().find(|t| t.who == who).map(|t| &*t.name),
    };
    doubt(rows, payer.zip(requested_ns(outcome)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(elapsed_ns: u64, parts: &[u64]) -> Attribution {
        let ns = Phase::ALL.iter().zip(parts).map(|(phase, ns)| (phase.name(), *ns)).collect();
        Attribution {
            thread: "vmm".into(),
            role: "caller",
            cpu: None,
            cpu_ns: 0,
            pays: true,
            ns,
            elapsed_ns,
            run_delay_ns: None,
        }
    }

    #[test]
    fn parts_that_miss_the_whole_by_more_than_a_twentieth_are_doubted() {
        assert_eq!(doubt(&[row(1_000_000, &[500_000, 460_000])], None), None);
        assert_eq!(doubt(&[row(1_000_000, &[500_000, 540_000])], None), None);
        let short = doubt(&[row(1_000, &[900]), row(1_000_000, &[500_000, 440_000])], None);
        assert_eq!(short.unwrap(), "vmm: its phases add up to 940000 ns where 1000000 ns have passed");
        assert!(doubt(&[row(1_000_000, &[1_060_000])], None).is_some());
    }

    #[test]
    fn a_payer_whose_row_is_not_the_request_is_doubted() {
        let rows = [row(1_000_000, &[1_000_000])];
        assert_eq!(doubt(&rows, Some(("vmm", 1_040_000))), None);
        assert_eq!(doubt(&rows, Some(("somebody", 9))), None);
        let other = doubt(&rows, Some(("vmm", 2_000_000))).unwrap();
        assert_eq!(other, "vmm: 1000000 ns are attributed of a request that took 2000000 ns");
    }

    #[test]
    fn the_calls_of_a_request_are_summed_without_what_lies_between() {
        let mut request = Request::default();
        let mut ticks = [0; PHASES];
        ticks[Phase::SpteWork as usize] = 70;
        ticks[Phase::Yield as usize] = 30;
        request.add(1_000, 1_100, &ticks);
        request.add(90_000, 90_100, &ticks);
        assert_eq!(request.elapsed(), 200);
        assert_eq!(request.phase_ticks.iter().sum::<u64>(), 200);
    }
}
