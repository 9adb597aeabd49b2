//! Somebody else needs a lock while the zap runs.

use super::parts::{any, any_shadow, delete, guests, one_root, scenario, vmm};
use super::{Ask, Kind, Scene};
use crate::scenario::{Intruder, Op, Scenario, Thread, Who};

pub(super) const UPDATE: Scene = Scene {
    name: "waiting-update",
    kind: Kind::Zap,
    summary: "another memslot update arrives during the zap: it waits for slots_lock until the zap is over",
    look_at: "waiting.wait_ns, update_ns.total",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: |ask| waiting(ask, Intruder::Update),
};

pub(super) const NOTIFIER: Scene = Scene {
    name: "waiting-notifier",
    kind: Kind::Zap,
    summary: "the host unmaps pages of the guest during the zap: each notifier wants mmu_lock exclusively, the zap must give way",
    look_at: "waiting.wait_ns, yields, lock.handoffs",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: |ask| waiting(ask, Intruder::Notifier),
};

fn waiting(ask: &Ask<'_>, what: Intruder) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let mut threads = guests(ask.plan);
    threads.push(vmm(vcpus, delete()));
    threads.push(Thread { who: Who::Other(0), ops: vec![Op::Intrude(what)] });
    scenario(ask, vcpus, Some(Who::Caller), threads)
}
