//! More than one root: roles and address spaces.

use super::parts::{
    any, any_shadow, code, delete, direct_shadow, guest, guests, one_root, populate, scenario, vmm,
};
use super::{Ask, Kind, Scene};
use crate::scenario::{Op, Populate, Scenario, Who};

pub(super) const SEVERAL: Scene = Scene {
    name: "several-roots",
    kind: Kind::Zap,
    summary: "a memslot update while three roots (CR0.WP and EFER.NX set and clear) map all of the memory, vCPU i on root i mod 3",
    look_at: "update_ns, teardown.cpus_used, sptes (three times the guest's)",
    estimate: |plan| one_root(plan).times(ROOTS as u64),
    fits: any,
    shadow: any_shadow,
    build: several,
};

/// As many as a vCPU can cache, less one.
const ROOTS: usize = 3;

fn several(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let mut threads: Vec<_> = (0..vcpus)
        .map(|id| {
            let role = Op::SwitchRole(id as usize % ROOTS);
            guest(ask.plan, id, vec![role], code(ask.plan))
        })
        .collect();
    threads.push(vmm(vcpus, delete()));
    let mut made = scenario(ask, vcpus, Some(Who::Caller), threads);
    made.populate = Some(populate(ask.plan, ROOTS));
    made
}

pub(super) const TWO_SPACES: Scene = Scene {
    name: "two-address-spaces",
    kind: Kind::Zap,
    summary: "a memslot update while one vCPU is in SMM: address space 1 has the same memory and a root of its own, and is zapped too",
    look_at: "update_ns, sptes (twice the guest's), block_update_ns",
    estimate: |plan| one_root(plan).times(2),
    fits: any,
    shadow: direct_shadow,
    build: two_spaces,
};

fn two_spaces(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let in_smm = vcpus;
    let mut threads = guests(ask.plan);
    threads.push(guest(ask.plan, in_smm, vec![Op::EnterSmm], code(ask.plan)));
    threads.push(vmm(vcpus + 1, delete()));
    let mut made = scenario(ask, vcpus + 1, Some(Who::Caller), threads);
    made.populate = Some(Populate { smm: Some(in_smm as usize), ..populate(ask.plan, 1) });
    made.vm.smm = true;
    made
}
