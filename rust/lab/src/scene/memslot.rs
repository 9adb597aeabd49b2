//! Memslot updates under running vCPUs: one, many, early.

use super::parts::{any, code, delete, guest, guests, one_root, scenario, vmm};
use super::{Ask, Kind, Scene};
use crate::config::Plan;
use crate::memory::Estimate;
use crate::scenario::{Op, Scenario, Update, Who};

pub(super) const DELETE: Scene = Scene {
    name: "memslot-delete",
    kind: Kind::Zap,
    summary: "a memslot is deleted under running vCPUs: the fast zap invalidates every root and returns when nothing is mapped",
    look_at: "update_ns, block_update_ns, access_ns, step_units, teardown",
    estimate: one_root,
    fits: any,
    build: |ask| update(ask, delete()),
};

pub(super) const MOVE: Scene = Scene {
    name: "memslot-move",
    kind: Kind::Zap,
    summary: "a memslot is moved to other gfns (a PCI BAR): INVALID, fast zap, then the new slot",
    look_at: "update_ns, block_update_ns",
    estimate: one_root,
    fits: any,
    build: |ask| update(ask, vec![Op::Zap(Update::Move)]),
};

pub(super) const CHURN: Scene = Scene {
    name: "slot-churn",
    kind: Kind::Zap,
    summary: "a memslot is created and deleted many times (a PCI ROM, virtio-gpu blobs): the first zap meets a full tree, the others what was faulted in again",
    look_at: "updates, access_ns, final (the same in every design)",
    estimate: one_root,
    fits: any,
    build: churn,
};

pub(super) const BOOT: Scene = Scene {
    name: "boot",
    kind: Kind::Zap,
    summary: "firmware maps memory in ascending order while its memslots change: several zaps of small roots",
    look_at: "updates, refault, access_ns",
    estimate: boot_memory,
    fits: any,
    build: boot,
};

pub(super) const NX_TOGGLE: Scene = Scene {
    name: "nx-toggle",
    kind: Kind::Zap,
    summary: "nx_huge_pages is toggled: a fast zap of every VM on the host, this one among them, whose last user reference is gone already",
    look_at: "update_ns, teardown.cpu_ns (a queue of the system's takes no work of a VM without a user)",
    estimate: one_root,
    fits: any,
    build: |ask| update(ask, vec![Op::ReleaseUser, Op::Zap(Update::NxToggle)]),
};

pub(super) const ZAP_64T: Scene = Scene {
    name: "zap-64t",
    kind: Kind::Zap,
    summary: "a memslot update at an eighth, a quarter, half and all of the memory: the slope, and what it says about 64 TiB",
    look_at: "fit, update_ns",
    estimate: one_root,
    fits: eighths,
    build: |ask| update(ask, delete()),
};

/// Memory that firmware goes through.
const BOOT_BYTES: u64 = 256 << 20;
/// Memslot updates of a boot.
const BOOT_UPDATES: u64 = 16;
/// Between two of them.
const BOOT_PAUSE_US: u64 = 2_000;
/// Firmware touches a page so often.
const BOOT_ARRIVAL_NS: u64 = 1_000;

fn update(ask: &Ask<'_>, what: Vec<Op>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let mut threads = guests(ask.plan);
    threads.push(vmm(vcpus, what));
    scenario(ask, vcpus, Some(Who::Caller), threads)
}

fn churn(ask: &Ask<'_>) -> Scenario {
    update(ask, vec![Op::Churn { cycles: ask.plan.config.churns, pause_us: 0 }])
}

fn boot_memory(plan: &Plan) -> Estimate {
    let unit = tdpmmu_spte::geometry::page_bytes(plan.level);
    Estimate::new(plan.config.memory_bytes.min(BOOT_BYTES.max(unit)), plan.level, plan.config.levels)
}

/// vCPU 0 runs firmware; the others have not been started yet.
fn boot(ask: &Ask<'_>) -> Scenario {
    let mut plan = ask.plan.clone();
    plan.working_set_pages = ask.estimate.sptes;
    let firmware = crate::scenario::GuestCode {
        ascending: true,
        warm: false,
        arrival_ns: BOOT_ARRIVAL_NS,
        write_percent: 100,
        ..code(&plan)
    };
    let threads = vec![
        guest(&plan, 0, Vec::new(), firmware),
        vmm(1, vec![Op::Churn { cycles: BOOT_UPDATES, pause_us: BOOT_PAUSE_US }]),
    ];
    let mut made = scenario(ask, ask.plan.config.vcpus, Some(Who::Caller), threads);
    (made.populate, made.sptes) = (None, None);
    made
}

/// The sizes of `zap-64t` must exist.
pub(super) fn eighths(plan: &Plan) -> Result<(), String> {
    let unit = tdpmmu_spte::geometry::page_bytes(plan.level);
    if plan.config.memory_bytes.is_multiple_of(8 * unit) {
        return Ok(());
    }
    Err(format!(
        "an eighth, a quarter and half of the memory are built too: {} is no multiple of 8 pages of {}",
        crate::units::bytes(plan.config.memory_bytes),
        plan.config.page
    ))
}
