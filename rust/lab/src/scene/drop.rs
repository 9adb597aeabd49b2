//! A vCPU drops the last reference to its root, beside vCPUs that run on another root; the baseline is the same sequence while somebody else holds the root.

use super::parts::{guest, populate, vm_spec};
use crate::config::{DesignPlan, Plan};
use crate::scenario::{Flag, Mark, Op, Scenario, Thread, Who, wait};

/// Drops of the baseline.
const BASELINE_DROPS: u64 = 200;
/// SPTEs under each root of the drop loop.
pub const LOOP_SPTES: u64 = 16;

/// The scenario of `bench drop`.
pub fn drop_scenario(plan: &Plan, design: &DesignPlan, tables: u64, step_ns: bool) -> Scenario {
    let vcpus = plan.config.vcpus;
    let drops = |mark, times| Op::DropRoot { mark, times, sptes: 0 };
    let mut threads = vec![
        Thread {
            who: Who::Vcpu(0),
            ops: vec![
                wait(Flag::HolderReady),
                Op::Await { flag: Flag::WarmedUp, count: vcpus - 1 },
                drops(Mark::Baseline, BASELINE_DROPS),
                Op::Raise(Flag::BaselineDone),
                wait(Flag::HolderGone),
                drops(Mark::Drop, 1),
                Op::Raise(Flag::Dropped),
            ],
        },
        // Holds the big root while the baseline is taken.
        Thread {
            who: Who::Vcpu(vcpus as usize),
            ops: vec![
                Op::Load,
                Op::Raise(Flag::HolderReady),
                wait(Flag::BaselineDone),
                Op::Unload,
                Op::Raise(Flag::HolderGone),
            ],
        },
        Thread {
            who: Who::Caller,
            ops: vec![wait(Flag::Dropped), Op::AwaitTeardown, Op::Raise(Flag::Refault)],
        },
    ];
    threads.extend((1..vcpus).map(|id| Thread {
        who: Who::Vcpu(id as usize),
        ops: vec![Op::SwitchRole, guest(plan), Op::Touch { pages: plan.working_set_pages }],
    }));
    Scenario {
        name: "last-reference-dropped".into(),
        vm: vm_spec(plan, design, tables, vcpus + 1, step_ns),
        populate: populate(plan),
        threads,
        seed: plan.config.seed,
    }
}

/// Many drops of small roots: the percentiles that one big root cannot give.
pub fn drop_loop_scenario(plan: &Plan, design: &DesignPlan) -> Scenario {
    let mut small = plan.clone();
    small.config.memory_bytes = 64 << 20;
    small.level = 1;
    let times = plan.config.drop_loop;
    Scenario {
        name: "drop-loop".into(),
        // A worker that falls behind leaves up to one tree a drop waiting: the backlog is measured, not cut off.
        vm: vm_spec(&small, design, 64 + 5 * times, 2, false),
        populate: None,
        threads: vec![
            Thread {
                who: Who::Vcpu(0),
                ops: vec![
                    Op::DropRoot { mark: Mark::Drop, times, sptes: LOOP_SPTES },
                    Op::Raise(Flag::Dropped),
                    wait(Flag::HolderReady),
                    Op::DropRoot { mark: Mark::Baseline, times, sptes: LOOP_SPTES },
                    Op::Raise(Flag::BaselineDone),
                ],
            },
            Thread {
                who: Who::Vcpu(1),
                ops: vec![
                    wait(Flag::Dropped),
                    Op::Load,
                    Op::Raise(Flag::HolderReady),
                    wait(Flag::BaselineDone),
                ],
            },
        ],
        seed: plan.config.seed,
    }
}
