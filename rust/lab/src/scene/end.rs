//! The end of a VM.

use super::parts::{any, any_shadow, code, guest, one_root, scenario};
use super::{Ask, Kind, Scene};
use crate::scenario::{Drop, Flag, Mark, Op, Scenario, Thread, Who, wait};

pub(super) const TEARDOWN: Scene = Scene {
    name: "vm-teardown",
    kind: Kind::Drop,
    summary: "the VM is closed with all of its memory mapped: zap_all under the exclusive lock, then the roots, then the grace period",
    look_at: "close_ns, teardown",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: teardown,
};

pub(super) const DYING: Scene = Scene {
    name: "dying-vm",
    kind: Kind::Drop,
    summary: "the last user reference is gone when a vCPU drops the last reference to the root that maps all of the memory",
    look_at: "block_drop_ns, teardown.cpu_ns (who zaps: no queue of the system's may)",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: dying,
};

/// Nobody runs any more: vCPU 0's thread exits, and puts its root.
fn dying(ask: &Ask<'_>) -> Scenario {
    let put = Op::DropRoot { mark: Mark::Drop, times: 1, sptes: 0, by: Drop::Unload };
    let threads = vec![
        Thread { who: Who::Vcpu(0), ops: vec![wait(Flag::UserGone), put, Op::Raise(Flag::Dropped)] },
        Thread {
            who: Who::Caller,
            ops: vec![Op::ReleaseUser, Op::Raise(Flag::UserGone), wait(Flag::Dropped), Op::AwaitTeardown],
        },
    ];
    scenario(ask, ask.plan.config.vcpus, Some(Who::Vcpu(0)), threads)
}

/// Each vCPU has run, and has left with its root cached.
fn teardown(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let mut threads: Vec<_> = (0..vcpus)
        .map(|id| {
            let mut thread = guest(ask.plan, id, Vec::new(), code(ask.plan));
            thread.ops.pop();
            thread
        })
        .collect();
    threads.push(Thread {
        who: Who::Caller,
        ops: vec![
            Op::Await { flag: Flag::WarmedUp, count: vcpus },
            Op::SleepMs(super::parts::SETTLE_MS),
            Op::Raise(Flag::Refault),
        ],
    });
    scenario(ask, vcpus, None, threads)
}
