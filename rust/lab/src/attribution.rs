//! Where each thread's time went.

use tdpmmu_platform::{MeterSnapshot, Platform, Real};

use crate::outcome::Outcome;
use crate::result::Attribution;
use crate::scenario::Who;

/// A row per thread.
pub fn attribution(outcome: &Outcome) -> Vec<Attribution> {
    let mut rows: Vec<Attribution> = outcome
        .threads
        .iter()
        .map(|t| {
            let role = match t.who {
                Who::Caller => "caller",
                Who::Vcpu(_) => "vcpu",
                Who::Other(_) => "other",
            };
            let elapsed = Real::ticks_to_ns(t.meter.elapsed_ticks);
            let mut row = Attribution::new(t.name.clone(), role, &t.meter, elapsed);
            row.cpu = t.cpu;
            row.run_delay_ns = t.run_delay_ns;
            row
        })
        .collect();
    for (n, (meter, _)) in outcome.workers.iter().enumerate() {
        let elapsed = Real::ticks_to_ns(meter.elapsed_ticks);
        rows.push(Attribution::new(format!("worker-{n}"), "worker", meter, elapsed));
    }
    // The RCU thread keeps no phases: its CPU time all goes into giving tables back.
    let mut rcu = Attribution::new("tdpmmu-rcu".into(), "rcu", &MeterSnapshot::default(), outcome.rcu_cpu_ns);
    rcu.ns.insert("free", outcome.rcu_cpu_ns);
    rows.push(rcu);
    rows
}
