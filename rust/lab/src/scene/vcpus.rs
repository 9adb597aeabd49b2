//! vCPUs that do not simply run: halted, or moved about.

use tdpmmu_platform::{Platform, Real};

use super::parts::{any, any_shadow, code, delete, guest, guests, one_root, scenario, vmm};
use super::{Ask, Kind, Scene};
use crate::config::Plan;
use crate::scenario::{Flag, GuestCode, Op, Scenario, Thread, Who, wait};

pub(super) const HALTED: Scene = Scene {
    name: "halted-vcpu",
    kind: Kind::Zap,
    summary: "a vCPU sleeps in HLT and holds its root through a memslot update; woken later, it must not use it",
    look_at: "update_ns, retained_table_pages (what the sleeper keeps), wake_ns",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: halted,
};

pub(super) const MIGRATING: Scene = Scene {
    name: "migrating-vcpu",
    kind: Kind::Zap,
    summary: "the host moves every vCPU to the next CPU each millisecond, also during the memslot update",
    look_at: "migrations, update_ns.kick_wait, block_update_ns, access_ns",
    estimate: one_root,
    fits: two_cpus,
    shadow: any_shadow,
    build: migrating,
};

const MIGRATE_NS: u64 = 1_000_000;

fn halted(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let sleeper = vcpus as usize;
    let mut threads = guests(ask.plan);
    threads.push(Thread {
        who: Who::Vcpu(sleeper),
        ops: vec![Op::Load, Op::Raise(Flag::HolderReady), Op::Halt],
    });
    let mut caller = vmm(vcpus, delete());
    caller.ops.insert(0, wait(Flag::HolderReady));
    // After the quiet time that follows the teardown, before the guests end.
    let end = caller.ops.len() - 1;
    caller.ops.insert(end, Op::Wake(sleeper));
    threads.push(caller);
    scenario(ask, vcpus + 1, Some(Who::Caller), threads)
}

fn two_cpus(_plan: &Plan) -> Result<(), String> {
    match Real::cpus().len() {
        0 | 1 => Err("this process may use one CPU: there is nowhere to move a vCPU".into()),
        _ => Ok(()),
    }
}

fn migrating(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let moved = |id| {
        let code = GuestCode { migrate_ns: Some(MIGRATE_NS), ..code(ask.plan) };
        guest(ask.plan, id, Vec::new(), code)
    };
    let mut threads: Vec<_> = (0..vcpus).map(moved).collect();
    threads.push(vmm(vcpus, delete()));
    scenario(ask, vcpus, Some(Who::Caller), threads)
}
