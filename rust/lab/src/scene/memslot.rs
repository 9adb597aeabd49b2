//! Memslot updates under running vCPUs.

use super::parts::{guest, populate, vm_spec};
use crate::config::{DesignPlan, Plan};
use crate::scenario::{Flag, Op, Scenario, Thread, Who};

/// The scenario of `bench zap`.
pub fn zap_scenario(plan: &Plan, design: &DesignPlan, tables: u64, step_ns: bool) -> Scenario {
    let vcpus = plan.config.vcpus;
    let mut threads: Vec<Thread> = (0..vcpus)
        .map(|id| Thread {
            who: Who::Vcpu(id as usize),
            ops: vec![guest(plan), Op::Touch { pages: plan.working_set_pages }],
        })
        .collect();
    threads.push(Thread {
        who: Who::Caller,
        ops: vec![
            Op::Await { flag: Flag::WarmedUp, count: vcpus },
            Op::SleepMs(20),
            Op::DeleteMemslot,
            Op::AwaitTeardown,
            // Every vCPU gets a chance to fault once under its new root.
            Op::SleepMs(20),
            Op::Raise(Flag::Refault),
        ],
    });
    Scenario {
        name: "memslot-delete".into(),
        vm: vm_spec(plan, design, tables, vcpus, step_ns),
        populate: populate(plan),
        threads,
        seed: plan.config.seed,
    }
}
