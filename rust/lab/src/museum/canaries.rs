//! Canaries: defects that nobody is known to have made, each there to show that an oracle is awake. And 44a, the barrier of guest entry.

use tdpmmu_platform::Bug;

use super::entry::{Catcher, Class, Entry, Hints};
use crate::program::{Act, MachineSpec, Program, SlotSpec, ThreadSpec};
use crate::scenario::Who;

/// A canary has no history: class, title, what is wrong, and where to look.
const fn canary(
    bug: Bug,
    class: Class,
    title: &'static str,
    cause: &'static str,
    interleaving: &'static str,
    program: fn() -> Program,
) -> Entry {
    Entry {
        bug,
        title,
        class,
        kernels: "none: a canary",
        reference: "none",
        cause,
        interleaving,
        catcher: Catcher::Sim,
        program,
        hints: Hints::USUAL.schedules(6000),
    }
}

pub(super) const CANARIES: &[Entry] = &[
    canary(
        Bug::C01,
        Class::StaleTlb,
        "kick first, request second",
        "A vCPU that is kicked before its request is set leaves the guest, finds nothing to do, and enters again with the translations it had.",
        "The host unmaps a page; the vCPU answers the kick and is back in the guest before the request is there.",
        guest_beside_unmap,
    ),
    canary(
        Bug::C02,
        Class::StaleTlb,
        "the request taken, the TLB kept",
        "A vCPU services a flush request and does not empty its TLB.",
        "No race: the host unmaps a page, the guest reads it again.",
        guest_beside_unmap,
    ),
    canary(
        Bug::C03,
        Class::StaleTlb,
        "an unmap without its flush",
        "The notifier returns to the host with the flush owed that its zap made necessary.",
        "No race: the host unmaps a page, the guest reads it again.",
        guest_beside_unmap,
    ),
    canary(
        Bug::C04,
        Class::UseAfterFree,
        "a table freed without a grace period",
        "A removed table goes back to the pool at once, whoever walks in it.",
        "A walker without mmu_lock stands on a table; the table is removed and given out again.",
        walker_beside_zap,
    ),
    canary(
        Bug::C05,
        Class::UseAfterFree,
        "a lockless walk without a read section",
        "A walker without mmu_lock is not seen by grace periods.",
        "The walker reads a table's number; the table is removed, its grace period ends, it is freed; the walker goes down.",
        walker_beside_zap,
    ),
    canary(
        Bug::C06,
        Class::Crash,
        "a table given back twice",
        "A removed table goes back to the pool at once, and a second time after its grace period.",
        "No race.",
        walker_beside_zap,
    ),
    canary(
        Bug::C07,
        Class::UseAfterFree,
        "the notifier's sequence not compared",
        "A fault looks whether an invalidation is in progress, and not whether one has come and gone.",
        "A fault asks the host for its page; the host takes the page away, begin to end; the fault maps it.",
        fault_beside_unmap,
    ),
    canary(
        Bug::C08,
        Class::UseAfterFree,
        "a fault without a read section",
        "mmu_lock held shared does not keep tables: others that hold it shared remove them.",
        "A fault stands on a table that the end of dirty logging removes; its grace period ends.",
        fault_beside_collapse,
    ),
    canary(
        Bug::C09,
        Class::StaleTlb,
        "a root loaded without a flush of its tag",
        "The page of a root may have been a root before, and translations that are tagged with its number may still be cached.",
        "A root dies unflushed, as dead roots may; its page becomes a root again; the vCPU hits what it had cached under the first.",
        roots_of_one_page,
    ),
    canary(
        Bug::C10,
        Class::Leak,
        "a queue that ends with work in it",
        "The VM's end does not wait for what its workers have yet to do.",
        "A root is queued, the VM is closed, the worker finds nothing to work on.",
        end_beside_worker,
    ),
    canary(
        Bug::C11,
        Class::UseAfterFree,
        "a reference put before the work",
        "A walk over roots puts the reference that was to keep the root while it works, or yields.",
        "An unmap yields inside a root whose last reference goes meanwhile.",
        unmap_beside_root_loss,
    ),
    canary(
        Bug::C12,
        Class::Corruption,
        "a leaf counted that was not made",
        "The loser of a race for an entry counts a leaf as the winner does.",
        "Two vCPUs fault on one page.",
        two_faults,
    ),
    canary(
        Bug::C13,
        Class::Hang,
        "two locks in the wrong order",
        "Write protection takes mmu_lock first and slots_lock inside it.",
        "A fast zap holds slots_lock and wants mmu_lock; write protection holds mmu_lock and wants slots_lock.",
        protect_beside_zap,
    ),
    canary(
        Bug::C14,
        Class::StaleTlb,
        "a flush that does not wait",
        "A remote flush sends its kicks and returns, while vCPUs are still in the guest.",
        "The host frees a page while the guest, kicked and not out yet, reads it.",
        guest_beside_unmap,
    ),
];

/// 44 at another place: the same pair of barriers, between guest entry and requests.
pub(super) const ENTRIES: &[Entry] = &[Entry {
    bug: Bug::B44a,
    title: "guest entry without its barrier",
    class: Class::StaleTlb,
    kernels: "none: a hazard of the design of lockless walks (2012)",
    reference: "the lockless shadow walk of 2012: mode, full barrier, read of the tables; and on the other side unlink, full barrier, read of the mode",
    cause: "A vCPU writes its mode and then looks for requests; who makes a request writes it and then reads the mode. Without a full barrier between the two the mode may still be in the store buffer when the requests are read, \
            and neither side sees the other.",
    interleaving: "A vCPU stores its mode, which stays in its buffer, and finds no request; a flush is requested and the vCPU found outside; the flush returns, the vCPU is in the guest with its old translations.",
    catcher: Catcher::Tso,
    program: guest_beside_unmap,
    hints: Hints::USUAL,
}];

/// A guest reads a page again and again, in and out of the guest, while the host takes it away.
fn guest_beside_unmap() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::Unmap { hva_page: 0, pages: 1, may_block: true }]),
        ThreadSpec::vcpu(
            0,
            [Act::read(0), Act::Leave, Act::read(0), Act::Leave, Act::read(0), Act::write(1)],
        ),
    ];
    Program { setup, ..Program::new("a guest beside an unmap", threads) }
}

/// A vCPU touches a page for the first time while the host takes it away.
fn fault_beside_unmap() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(1))];
    let threads = vec![
        ThreadSpec::caller([Act::Unmap { hva_page: 0, pages: 1, may_block: true }]),
        ThreadSpec::vcpu(0, [Act::write(0), Act::read(0)]),
    ];
    Program { setup, ..Program::new("a fault beside an unmap", threads) }
}

/// A walk without mmu_lock beside a fast zap.
fn walker_beside_zap() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::FastZap, Act::RcuBarrier]),
        ThreadSpec::vcpu(0, [Act::LookUp { gfn: 0 }, Act::LookUp { gfn: 1 }]),
    ];
    Program { setup, ..Program::new("a lockless walk beside a fast zap", threads) }
}

/// A fault beside the removal of tables under the shared lock.
fn fault_beside_collapse() -> Program {
    let slots = vec![SlotSpec::flat(0, 0, 512).logged()];
    let machine = MachineSpec { host_level: 2, nx: true, slots, ..MachineSpec::default() };
    let setup = vec![(Who::Vcpu(1), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::SetSlotFlags { as_id: 0, id: 0, log: false }, Act::RcuBarrier]),
        ThreadSpec::vcpu(1, [Act::fetch(1)]),
    ];
    Program { machine, setup, ..Program::new("a fault beside a collapse", threads) }
}

/// Roots die and are born again until pages come back: the pool uses a page that was freed last of all.
fn roots_of_one_page() -> Program {
    let life = [Act::read(0), Act::FastZap, Act::RcuBarrier];
    let lives: Vec<Act> = std::iter::repeat_n(life, 45).flatten().collect();
    let threads = vec![ThreadSpec::vcpu(0, lives)];
    let machine = MachineSpec { max_tables: 10, vcpus: 1, ..MachineSpec::default() };
    Program { machine, ..Program::new("roots that follow each other in one page", threads) }
}

/// A root is lost, and the VM ends.
fn end_beside_worker() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![ThreadSpec::vcpu(0, [Act::DropRoot, Act::write(1)])];
    Program {
        machine: MachineSpec::of("async-worker", "6.1-async"),
        setup,
        end_races: true,
        ..Program::new("the end of a VM beside its worker", threads)
    }
}

/// An unmap that yields beside a vCPU that loses its root.
fn unmap_beside_root_loss() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0)), (Who::Vcpu(0), Act::write(1))];
    let threads = vec![
        ThreadSpec::caller([Act::Unmap { hva_page: 0, pages: 2, may_block: true }]),
        ThreadSpec::vcpu(0, [Act::DropRoot, Act::write(0)]),
    ];
    Program {
        machine: MachineSpec::of("async-worker", "6.1-async"),
        setup,
        ..Program::new("an unmap beside a lost root", threads)
    }
}

/// Two vCPUs want the same page.
fn two_faults() -> Program {
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(0), Act::read(1)]),
        ThreadSpec::vcpu(1, [Act::read(0), Act::write(1)]),
    ];
    Program::new("two vCPUs fault on one page", threads)
}

/// Write protection beside a fast zap.
fn protect_beside_zap() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::FastZap]),
        ThreadSpec::other(0, "protector", [Act::WriteProtect { as_id: 0, gfn: 0 }]),
        ThreadSpec::vcpu(0, [Act::write(0)]),
    ];
    Program { setup, ..Program::new("write protection beside a fast zap", threads) }
}
