//! Memslot updates under running vCPUs: one, many, early.

use super::parts::{any, any_shadow, code, delete, guest, guests, one_root, scenario, vmm};
use super::{Ask, Kind, SLOT_CHURN_2013, Scene};
use crate::bench::SIZES;
use crate::config::Plan;
use crate::memory::Estimate;
use crate::scenario::{GuestCode, Op, Scenario, Sharing, Update, Who};

pub(super) const DELETE: Scene = Scene {
    name: "memslot-delete",
    kind: Kind::Zap,
    summary: "a memslot is deleted under running vCPUs: the fast zap invalidates every root and returns when nothing is mapped",
    look_at: "update_ns, block_update_ns, access_ns, step_units, teardown",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: |ask| update(ask, delete()),
};

pub(super) const MOVE: Scene = Scene {
    name: "memslot-move",
    kind: Kind::Zap,
    summary: "a memslot is moved to other gfns (a PCI BAR): INVALID, fast zap, then the new slot",
    look_at: "update_ns, block_update_ns",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: |ask| update(ask, vec![Op::Zap(Update::Move)]),
};

pub(super) const CHURN: Scene = Scene {
    name: "slot-churn",
    kind: Kind::Zap,
    summary: "a memslot is created and deleted many times (a PCI ROM, virtio-gpu blobs): the first zap meets a full tree, the others what was faulted in again",
    look_at: "updates, access_ns, final (the same in every design)",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: churn,
};

pub(super) const CHURN_2013: Scene = Scene {
    name: SLOT_CHURN_2013,
    kind: Kind::Zap,
    summary: "the case that the generation number was measured with: 6 vCPUs, 2 GiB of 4K pages (whatever is asked for), a memslot deleted and added again and again while the guest touches all of its memory",
    look_at: "cycle_ns, published (46.1 ms before, 21.6 ms after, and what this result has), updates",
    estimate: one_root,
    fits: small_pages,
    shadow: any_shadow,
    build: churn_2013,
};

pub(super) const CHURN_AND_DROP: Scene = Scene {
    name: "churn-and-drop",
    kind: Kind::Zap,
    summary: "a memslot is created and deleted many times while each vCPU toggles CR0.WP, on roots that it shares with nobody: roots are made and lost while fast zaps run",
    look_at: "violations, updates, toggles, final",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: churn_and_drop,
};

pub(super) const BOOT: Scene = Scene {
    name: "boot",
    kind: Kind::Zap,
    summary: "firmware maps memory in ascending order while its memslots change: several zaps of small roots",
    look_at: "updates, refault, access_ns",
    estimate: boot_memory,
    fits: any,
    shadow: any_shadow,
    build: boot,
};

pub(super) const NX_TOGGLE: Scene = Scene {
    name: "nx-toggle",
    kind: Kind::Zap,
    summary: "nx_huge_pages is toggled: a fast zap of every VM on the host, this one among them, whose last user reference is gone already",
    look_at: "update_ns, teardown.cpu_ns (a queue of the system's takes no work of a VM without a user)",
    estimate: one_root,
    fits: any,
    shadow: any_shadow,
    build: |ask| update(ask, vec![Op::ReleaseUser, Op::Zap(Update::NxToggle)]),
};

pub(super) const ZAP_64T: Scene = Scene {
    name: "zap-64t",
    kind: Kind::Zap,
    summary: "a memslot update at eight sizes, from an eighth to all of the memory: the slope, and what it says about 64 TiB",
    look_at: "fit, update_ns",
    estimate: one_root,
    fits: eighths,
    shadow: any_shadow,
    build: |ask| update(ask, delete()),
};

/// Fewest cycles of the scene of 2013, for a median; and most: each waits until the guest has touched its memory again.
const FEWEST_CYCLES: u64 = 20;
const MOST_CYCLES: u64 = 24;
/// A vCPU of that scene rests so long after each pass through its memory: six that never did would wait for two CPUs, not for the zap.
const REST_NS: u64 = 10_000_000;
/// A vCPU toggles CR0.WP so often.
const TOGGLE_NS: u64 = 100_000;
/// Room for the trees of toggles that wait for a worker or a grace period.
const TOGGLED_TABLES: u32 = 1 << 17;
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
    update(ask, vec![Op::Churn { cycles: ask.plan.config.churns, pause_us: 0, full: 0 }])
}

/// Each vCPU goes through a sixth of the memory in ascending order, so that all of it is mapped again before the next deletion.
fn churn_2013(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let mut plan = ask.plan.clone();
    plan.working_set_pages = (ask.estimate.sptes / u64::from(vcpus)).max(1);
    plan.sharing = Sharing::Local;
    let busy = GuestCode { ascending: true, rest_ns: Some(REST_NS), ..code(&plan) };
    let mut threads: Vec<_> = (0..vcpus).map(|id| guest(&plan, id, Vec::new(), busy.clone())).collect();
    let cycles = ask.plan.config.churns.clamp(FEWEST_CYCLES, MOST_CYCLES);
    // Where the sixths leave a rest, nobody touches it again.
    let full = plan.working_set_pages * u64::from(vcpus) * 95 / 100;
    threads.push(vmm(vcpus, vec![Op::Churn { cycles, pause_us: 0, full }]));
    scenario(ask, vcpus, Some(Who::Caller), threads)
}

/// No tree is big here: what matters is that a root appears and goes between the two phases of a fast zap.
fn churn_and_drop(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let toggling = GuestCode { toggle_ns: Some(TOGGLE_NS), ..code(ask.plan) };
    let alone = |id: u32| vec![Op::SwitchRole(id as usize % 4)];
    let mut threads: Vec<_> = (0..vcpus).map(|id| guest(ask.plan, id, alone(id), toggling.clone())).collect();
    threads.push(vmm(vcpus, vec![Op::Churn { cycles: ask.plan.config.churns, pause_us: 0, full: 0 }]));
    let mut made = scenario(ask, vcpus, Some(Who::Caller), threads);
    (made.populate, made.sptes) = (None, None);
    made.vm.max_tables = made.vm.max_tables.saturating_add(TOGGLED_TABLES);
    made
}

fn boot_memory(plan: &Plan) -> Estimate {
    let unit = tdpmmu_spte::geometry::page_bytes(plan.level);
    Estimate::new(plan.config.memory_bytes.min(BOOT_BYTES.max(unit)), plan.level, plan.config.levels)
}

/// vCPU 0 runs firmware; the others have not been started yet.
fn boot(ask: &Ask<'_>) -> Scenario {
    let mut plan = ask.plan.clone();
    plan.working_set_pages = ask.estimate.sptes;
    let firmware = GuestCode {
        ascending: true,
        warm: false,
        arrival_ns: BOOT_ARRIVAL_NS,
        write_percent: 100,
        ..code(&plan)
    };
    let threads = vec![
        guest(&plan, 0, Vec::new(), firmware),
        vmm(1, vec![Op::Churn { cycles: BOOT_UPDATES, pause_us: BOOT_PAUSE_US, full: 0 }]),
    ];
    let mut made = scenario(ask, ask.plan.config.vcpus, Some(Who::Caller), threads);
    (made.populate, made.sptes) = (None, None);
    made
}

/// The scene of 2013 is about 4K pages.
fn small_pages(plan: &Plan) -> Result<(), String> {
    if plan.level == 1 {
        return Ok(());
    }
    Err("its guest is mapped by 4K pages: leave page at 4K".into())
}

/// The sizes of `zap-64t` must exist.
pub(super) fn eighths(plan: &Plan) -> Result<(), String> {
    let unit = tdpmmu_spte::geometry::page_bytes(plan.level);
    if plan.config.memory_bytes.is_multiple_of(SIZES * unit) {
        return Ok(());
    }
    Err(format!(
        "an eighth of the memory, two eighths and so on are built: {} is no multiple of {SIZES} pages of {}",
        crate::units::bytes(plan.config.memory_bytes),
        plan.config.page
    ))
}
