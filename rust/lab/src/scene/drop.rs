//! A vCPU drops the last reference to its root, beside vCPUs that run on another root; the baseline is the same sequence while somebody else holds the root.

use super::memslot::eighths;
use super::parts::{after, any, any_shadow, code, direct_shadow, guest, one_root, scenario, vm_spec};
use super::{Ask, Kind, Scene};
use crate::config::{Case, Plan};
use crate::memory::Estimate;
use crate::scenario::{Drop, Flag, Mark, Op, Scenario, Thread, Who, wait};

pub(super) const CR0_WP: Scene = Scene {
    name: "cr0-wp",
    kind: Kind::Drop,
    summary: "a vCPU that toggles CR0.WP drops the last reference to the root that maps all of the memory",
    look_at: "block_drop_ns, block_baseline_ns, teardown, retained_table_pages, drop_loop",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: |ask| last_drop(ask, Drop::Toggle),
};

pub(super) const SMM_EXIT: Scene = Scene {
    name: "smm-exit",
    kind: Kind::Drop,
    summary: "an SMI and its RSM: each resets the vCPU's MMU context, and the SMI drops the last reference to the root that maps all of the memory",
    look_at: "block_drop_ns (the whole round trip), block_baseline_ns, teardown, retained_table_pages",
    estimate: one_root,
    fits: any,
    shadow: direct_shadow,
    build: |ask| last_drop(ask, Drop::Smi),
};

pub(super) const ZAP_64T: Scene = Scene {
    name: "zap-64t",
    kind: Kind::Drop,
    summary: "the drop at eight sizes, from an eighth to all of the memory: the slope, and what it says about 64 TiB",
    look_at: "fit, block_drop_ns",
    estimate: one_root,
    fits: eighths,
    shadow: any_shadow,
    build: |ask| last_drop(ask, Drop::Toggle),
};

/// Drops of the baseline.
const BASELINE_DROPS: u64 = 200;
/// SPTEs under each root of the drop loop.
pub const LOOP_SPTES: u64 = 16;

fn drops(mark: Mark, times: u64, sptes: u64, by: Drop) -> Op {
    Op::DropRoot { mark, times, sptes, by }
}

fn last_drop(ask: &Ask<'_>, by: Drop) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let mut threads = vec![
        Thread {
            who: Who::Vcpu(0),
            ops: vec![
                wait(Flag::HolderReady),
                Op::Await { flag: Flag::WarmedUp, count: vcpus - 1 },
                drops(Mark::Baseline, BASELINE_DROPS, 0, by),
                Op::Raise(Flag::BaselineDone),
                wait(Flag::HolderGone),
                drops(Mark::Drop, 1, 0, by),
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
            ops: after(Flag::Dropped, vec![Op::AwaitTeardown, Op::Raise(Flag::Refault)]),
        },
    ];
    threads.extend((1..vcpus).map(|id| guest(ask.plan, id, vec![Op::SwitchRole(1)], code(ask.plan))));
    scenario(ask, vcpus + 1, Some(Who::Vcpu(0)), threads)
}

/// Many drops of small roots: the percentiles that one big root cannot give.
pub fn drop_loop_scenario(plan: &Plan, case: &Case) -> Scenario {
    let mut small = plan.clone();
    small.config.memory_bytes = 64 << 20;
    small.level = 1;
    let times = plan.config.drop_loop;
    let ask = Ask { plan: &small, case, estimate: Estimate::default(), step_ns: false };
    let threads = vec![
        Thread {
            who: Who::Vcpu(0),
            ops: vec![
                drops(Mark::Drop, times, LOOP_SPTES, Drop::Toggle),
                Op::Raise(Flag::Dropped),
                wait(Flag::HolderReady),
                drops(Mark::Baseline, times, LOOP_SPTES, Drop::Toggle),
                Op::Raise(Flag::BaselineDone),
            ],
        },
        Thread {
            who: Who::Vcpu(1),
            ops: after(Flag::Dropped, vec![Op::Load, Op::Raise(Flag::HolderReady), wait(Flag::BaselineDone)]),
        },
    ];
    // A worker that falls behind leaves up to one tree a drop waiting: the backlog is measured, not cut off.
    let vm = vm_spec(&ask, 64 + 5 * times, 2);
    // All of the pool is touched first: the loop goes through all of it.
    let estimate = Estimate { tables: u64::from(vm.max_tables), ..Estimate::default() };
    Scenario {
        name: "drop-loop".into(),
        vm,
        populate: None,
        threads,
        seed: plan.config.seed,
        pays: Some(Who::Vcpu(0)),
        estimate,
        sptes: None,
    }
}
