//! The end of a VM.

use super::parts::{any, code, guest, one_root, scenario};
use super::{Ask, Kind, Scene};
use crate::scenario::{Flag, Op, Scenario, Thread, Who};

pub(super) const TEARDOWN: Scene = Scene {
    name: "vm-teardown",
    kind: Kind::Drop,
    summary: "the VM is closed with all of its memory mapped: zap_all under the exclusive lock, then the roots, then the grace period",
    look_at: "close_ns, teardown",
    estimate: one_root,
    fits: any,
    build: teardown,
};

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
