//! 25, 33, 35 to 37, 44b and 44c: the shadow MMU's reclaim, its list of pages, its slots' books, and its lockless walkers.

use tdpmmu_platform::Bug;

use super::entry::{Catcher, Class, Entry, Hints};
use crate::program::{Act, MachineSpec, ProcessSpec, Program, SlotSpec, ThreadSpec};
use crate::scenario::Who;

pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        bug: Bug::B25,
        title: "reclaim under the shared lock",
        class: Class::UseAfterFree,
        kernels: "up to 6.0",
        reference: "fixed by 47b0c2e4c220 (6.1-rc7)",
        cause: "A fault made room in the quota of shadow pages before it looked which MMU it was for. A TDP fault holds mmu_lock shared, and zapping a shadow page needs it exclusive.",
        interleaving: "An L1 has L2s whose shadow pages fill the quota; two of its vCPUs fault on TDP tables at once, and both unlink the same shadow page.",
        catcher: Catcher::Sim,
        program: tdp_fault_beside_a_full_quota,
        hints: Hints::USUAL.schedules(400),
    },
    Entry {
        bug: Bug::B33,
        title: "stale before the reclaim, not after",
        class: Class::UseAfterFree,
        kernels: "5.9 to 7.1",
        reference: "CVE-2026-64561 (\"Zapscape\"), fixed by 2abd5287f083 (7.2-rc5); the window opened with f95eec9bed76",
        cause: "A fault on shadow pages looked whether its root is obsolete, and made room in the quota after that. Reclaim passes over pages that are held as roots, but takes what hangs below a page along: \
                a nested page without a parent, be it a root of the vCPU that faults. What is mapped below is born with role.invalid set, and is put on the active list all the same.",
        interleaving: "One vCPU. L1 runs an L2 of five levels of nested tables, then one of four levels on the same tables below: the second's root was a child of the first's. The quota is full, the fault finds its root good, \
                       the oldest page goes, and with it, as its last child, the root.",
        catcher: Catcher::Sim,
        program: root_below_an_old_root,
        hints: Hints::USUAL.schedules(50),
    },
    Entry {
        bug: Bug::B35,
        title: "a batch that never fills",
        class: Class::Lockup,
        kernels: "up to 5.17",
        reference: "fixed by b28cb0cd2c5e (5.18)",
        cause: "The zap of obsolete pages yields after ten of them. How many it has zapped it learned only where others went along with a page: pages that go alone counted for nothing.",
        interleaving: "None: a fast zap of many leaf tables.",
        catcher: Catcher::Sim,
        program: many_obsolete_pages,
        hints: Hints::USUAL.schedules(10),
    },
    Entry {
        bug: Bug::B36,
        title: "a zapped root back on the list",
        class: Class::Hang,
        kernels: "up to 5.8",
        reference: "fixed by f95eec9bed76 (5.9)",
        cause: "The zap of a page that vCPUs hold as a root put it back on the active list, invalid as it was.",
        interleaving: "None: a fast zap while a vCPU holds its root. Whoever walks the list for obsolete pages meets that one again and again.",
        catcher: Catcher::Sim,
        program: fast_zap_of_a_held_root,
        hints: Hints::USUAL.schedules(50),
    },
    Entry {
        bug: Bug::B37,
        title: "pages that outlive their slot's books",
        class: Class::UseAfterFree,
        kernels: "5.1 and 5.2 zapped the slot alone, and were reverted for assigned GPUs (never explained); with this in it, none",
        reference: "4e103134b862 (5.1), reverted by d012a06ab1d2 (5.3); again as a quirk in aa8d1f48d353 (6.12)",
        cause: "Only what a slot's reverse maps name is zapped. A page that shadows a guest's table in the slot is counted in the slot's lpage_info, and takes itself out of it when it goes: after the slot has.",
        interleaving: "None: the slot that holds a guest's page tables is deleted.",
        catcher: Catcher::Sim,
        program: slot_of_tables_goes,
        hints: Hints::USUAL.schedules(50),
    },
    Entry {
        bug: Bug::B44b,
        title: "a lockless walk without its barrier",
        class: Class::UseAfterFree,
        kernels: "none: a hazard of the design of lockless walks (2012)",
        reference: "the lockless shadow walk of 2012, as 44a",
        cause: "A vCPU says in its mode word that it reads shadow pages, and then reads. Without a full barrier between the two the mode may still be in the store buffer while entries are read.",
        interleaving: "The walker's mode stays in its buffer, and it has read an entry; the page that it names is unlinked and zapped; the freer finds the vCPU outside, waits for nobody, and frees the page under the walk.",
        catcher: Catcher::Tso,
        program: walks_beside_a_fast_zap,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B44c,
        title: "a freer without its barrier",
        class: Class::UseAfterFree,
        kernels: "none: a hazard of the design of lockless walks (2012)",
        reference: "the lockless shadow walk of 2012, as 44a",
        cause: "Who frees shadow pages unlinks them, and then looks which vCPUs read. The unlink is a plain store: without a full barrier it may still be in the store buffer when the modes are read. (Any locked instruction on the way \
                is such a barrier, so the exhibit makes its requests by plain stores, too.)",
        interleaving: "The freer's unlink stays in its buffer; it finds the vCPU outside, and frees the page; the vCPU begins a walk, correctly announced, and reads the old entry.",
        catcher: Catcher::Tso,
        program: walks_beside_a_fast_zap,
        hints: Hints::USUAL.schedules(6000),
    },
];

const V0: Who = Who::Vcpu(0);
const V1: Who = Who::Vcpu(1);

/// An L1 on TDP tables with room for few shadow pages. Its memory is 8 MiB, so that an L2 has four leaf tables.
fn nested(quota: u32, processes: Vec<ProcessSpec>) -> MachineSpec {
    let slots = vec![SlotSpec::flat(0, 0, 2048)];
    MachineSpec { nested: true, quota: Some(quota), processes, slots, ..MachineSpec::default() }
}

/// Two faults of an L1, when its L2's shadow pages leave no room.
fn tdp_fault_beside_a_full_quota() -> Program {
    let mut setup = vec![(V1, Act::EnterL2 { process: 0 })];
    setup.extend([0, 0x200, 0x400].map(|gfn| (V1, Act::read(gfn))));
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(5), Act::read(0x601)]),
        ThreadSpec::vcpu(1, [Act::LeaveL2, Act::write(6)]),
    ];
    let machine = nested(10, vec![ProcessSpec::linear(2048)]);
    Program { machine, setup, ..Program::new("TDP faults of an L1 whose L2 fills the quota", threads) }
}

/// An L2 whose root was a child of another L2's, and a quota that is full when it faults.
fn root_below_an_old_root() -> Program {
    let setup = vec![(V0, Act::EnterL2 { process: 1 }), (V0, Act::read(0)), (V0, Act::Unload)];
    let threads = vec![ThreadSpec::vcpu(
        0,
        [Act::EnterL2 { process: 0 }, Act::read(0), Act::read(0x200), Act::read(0x400), Act::read(0x600)],
    )];
    let machine = nested(10, vec![ProcessSpec::linear(2048), ProcessSpec::over(0)]);
    let machine = MachineSpec { vcpus: 1, ..machine };
    Program { machine, setup, ..Program::new("an L2 whose root hangs below an old one", threads) }
}

fn direct() -> MachineSpec {
    MachineSpec::of("shadow-gen", "6.12")
}

/// A fast zap of seventy leaf tables.
fn many_obsolete_pages() -> Program {
    const TABLES: u64 = 70;
    let setup = (0..TABLES).map(|n| (V0, Act::read(n * 512))).collect();
    let threads = vec![ThreadSpec::caller([Act::FastZap])];
    let slots = vec![SlotSpec::flat(0, 0, TABLES * 512)];
    let machine = MachineSpec { slots, vcpus: 1, ..direct() };
    Program { machine, setup, ..Program::new("a fast zap of many shadow pages", threads) }
}

/// A fast zap while a vCPU holds its root.
fn fast_zap_of_a_held_root() -> Program {
    let setup = vec![(V0, Act::write(0)), (V0, Act::Leave)];
    let threads = vec![ThreadSpec::caller([Act::FastZap]), ThreadSpec::vcpu(0, [Act::Yield, Act::write(1)])];
    Program { machine: direct(), setup, ..Program::new("a fast zap of a root that is held", threads) }
}

/// The memslot of a guest's page tables is deleted, by the design that zaps the slot alone.
fn slot_of_tables_goes() -> Program {
    let machine = MachineSpec {
        paging: "guest".into(),
        processes: vec![ProcessSpec::linear(1024)],
        ..MachineSpec::of("shadow-slot", "6.12")
    };
    let setup = vec![(V0, Act::write(0)), (V1, Act::read(1))];
    let threads = vec![
        ThreadSpec::caller([Act::DeleteSlot { as_id: 0, id: crate::program::TABLES_SLOT }]),
        ThreadSpec::vcpu(1, [Act::read(0)]),
    ];
    Program { machine, setup, ..Program::new("the memslot of a guest's page tables goes", threads) }
}

/// A vCPU that walks shadow pages without mmu_lock, again and again, while all of them are zapped.
fn walks_beside_a_fast_zap() -> Program {
    let walk = Act::WalkShadow { gva: 0 };
    let setup = vec![(V0, Act::write(0))];
    let threads =
        vec![ThreadSpec::caller([Act::FastZap]), ThreadSpec::vcpu(0, [walk.clone(), walk.clone(), walk])];
    let machine = MachineSpec { vcpus: 1, ..direct() };
    Program { machine, setup, ..Program::new("lockless walks beside a fast zap of shadow pages", threads) }
}
