//! 18 to 23, 30, 39, 40: who tears a dead root down, in which steps, and who waits for it.

use tdpmmu_platform::Bug;

use super::entry::{Catcher, Class, Entry, Hints};
use crate::program::{Act, Expect, MachineSpec, Program, SlotSpec, ThreadSpec, Want};
use crate::scenario::Who;

pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        bug: Bug::B18,
        title: "writes of an L2 are not logged",
        class: Class::LostDirty,
        kernels: "5.10-6.8 (CVE-2024-26990)",
        reference: "2673dfb591a3 (6.9, 6.6 and 6.8 stable)",
        cause: "Clearing dirty state took D from every SPTE, on the ground that hardware would log the write that sets it again. PML is off while an L2 runs, as it would write L2's addresses down: \
                the SPTEs of a root in guest mode have to lose W instead.",
        interleaving: "Logging starts and takes D from a leaf under an L2's root; the L2 writes, hardware sets D again and logs nothing; the next harvest does not have the page.",
        catcher: Catcher::Sim,
        program: l2_writes,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B19,
        title: "who puts the last reference zaps everything at once",
        class: Class::Lockup,
        kernels: "5.13-5.17",
        reference: "8351779ce65f (5.18): 485 s for a guest of 32 TiB",
        cause: "The last put took the root off the list first, where no notifier finds it any more: from then on the zap may not give up mmu_lock, or a page could be freed that the root still maps. So it does not, \
                however large the tree is.",
        interleaving: "No race: a vCPU unloads its root, and is away until the last SPTE is gone.",
        catcher: Catcher::Sim,
        program: last_put,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B20,
        title: "512 GiB in one RCU section",
        class: Class::Lockup,
        kernels: "5.13-5.17",
        reference: "1b6043e8e584 (5.18)",
        cause: "A root was zapped in one pass over its own entries: each takes the whole subtree with it, recursively, between two checks and inside one RCU section.",
        interleaving: "No race: a fast zap meets a root with one full top-level entry; the grace period of everybody waits for it.",
        catcher: Catcher::Sim,
        program: big_steps,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B21,
        title: "a gift is put that nobody gave",
        class: Class::Underflow,
        kernels: "none: v3 of the 5.18 series (February 2022)",
        reference: "review of patch 22/28 of v3, 2 March 2022",
        cause: "A fast zap takes a reference on each root as it invalidates it, and in its second phase zaps and puts every invalid root. That was right while nobody else made roots invalid. v3 lets the last put of \
                a valid root do so too, and drops the flag by which v2 had told the two kinds apart.",
        interleaving: "A fast zap invalidates and unlocks. A vCPU loads a new root and loses it: the put invalidates the root and arms its count for who zaps it. The second phase meets the root, takes it for one of \
                       its own and puts the one reference there is; the zapper's own put finds nothing.",
        catcher: Catcher::Sim,
        program: lost_between_phases,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B22a,
        title: "a fast zap does not wait for the workers",
        class: Class::UseAfterFree,
        kernels: "none: a sketch in the thread of v3",
        reference: "the thread of patch 22/28, March 2022",
        cause: "With every root queued for a worker nothing seemed left to do in a fast zap. But it is the promise of a fast zap that nothing of the memslot is mapped when it returns, for then the slot goes, and \
                with it every notifier's way to the SPTEs.",
        interleaving: "The deletion queues the root and returns; the host takes a page of the slot away, no slot covers it and nothing is zapped; the worker finds the SPTE and writes Dirty back to somebody else's page.",
        catcher: Catcher::Sim,
        program: queued_zap,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B22b,
        title: "a fast zap waits for its own work only",
        class: Class::UseAfterFree,
        kernels: "none: considered in the thread of v3",
        reference: "the thread of patch 22/28, March 2022",
        cause: "Roots that are invalid already are skipped by the invalidation, since their work is queued. So who waits for the items that it has queued itself does not wait for those.",
        interleaving: "A vCPU loses its root, which is queued; a deletion of the slot finds no valid root, queues nothing and returns, and the worker has not begun.",
        catcher: Catcher::Sim,
        program: queued_before,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B22c,
        title: "the mark is taken, and the zap left out",
        class: Class::UseAfterFree,
        kernels: "none: what the mark of 6.6 guards against",
        reference: "0df9dab891ff (6.6) brought the mark",
        cause: "From 6.6 on a mark on each root says who owes its zap. It is cleared by who zaps: cleared without a zap, the root is put and freed, and its SPTEs are nobody's.",
        interleaving: "No race: the fast zap clears the mark, puts the MMU's reference, and goes on.",
        catcher: Catcher::Sim,
        program: big_steps,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B23,
        title: "one work item queued twice",
        class: Class::Leak,
        kernels: "none: an earlier form of the 5.18 series",
        reference: "efd995dae5eb (5.18) says why it skips roots that are invalid already",
        cause: "The invalidation gave each listed root a reference and queued its item, whether it was invalid already or not. To queue an item that is pending does nothing: it runs once and puts one of the two references.",
        interleaving: "A vCPU loses its root, which is queued; before the worker begins a fast zap references and queues it again; the worker zaps once and puts once. The root and its page stay for ever.",
        catcher: Catcher::Sim,
        program: queued_twice,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B30,
        title: "roots built again for ever",
        class: Class::Performance,
        kernels: "5.10-6.3",
        reference: "edbdb43fc96b (6.4, 6.3.2), with 01b31714bd90; syzbot found a bug in its first form",
        cause: "A root belonged to the vCPUs that used it. A guest with one vCPU that enters SMM, or toggles CR0.WP, drops its roots each time, so that the last reference goes with them, and faults its memory in again.",
        interleaving: "No race: into SMM and back, and everything is mapped anew.",
        catcher: Catcher::Sim,
        program: smm_and_back,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B40,
        title: "roots are loaded one vCPU at a time",
        class: Class::Latency,
        kernels: "5.10-6.8",
        reference: "the series of 8ca983631f3c (6.9), its patches on loading and freeing roots: above 3 ms before, below 100 us after, with 100 vCPUs and more",
        cause: "To find a root on the list, and to put one, mmu_lock was held exclusively. After a fast zap every vCPU does both: they wait for each other, and, the lock being fair, all faults wait behind them.",
        interleaving: "No race: a fast zap, and each vCPU holds the lock alone to load its new root.",
        catcher: Catcher::Sim,
        program: roots_loaded,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B39,
        title: "a GiB between two checks",
        class: Class::Latency,
        kernels: "5.18-6.8",
        reference: "8ca983631f3c (6.9)",
        cause: "The first pass of a root's zap went down to 1 GiB entries and removed whatever hung below one of them in a single step: 262,656 entries for a full GiB, hundreds of microseconds without a check.",
        interleaving: "No race: a fast zap of a populated GiB, and a thread on the same CPU that waits to be scheduled.",
        catcher: Catcher::Sim,
        program: big_steps,
        hints: Hints::USUAL,
    },
];

/// An L2's vCPU writes beside the start of logging, and afterwards; its writes are collected.
fn l2_writes() -> Program {
    const L2: u8 = 4;
    let machine = MachineSpec { format: "ept".into(), dirty_mode: "d-bits".into(), ..MachineSpec::default() };
    let log = Act::GetDirtyLog { as_id: 0, id: 0 };
    let threads = vec![
        ThreadSpec::caller([
            Act::SetSlotFlags { as_id: 0, id: 0, log: true },
            Act::Raise { flag: 0 },
            log.clone(),
            Act::WaitFor { flag: 1 },
            log,
        ]),
        ThreadSpec::vcpu(
            0,
            [Act::write(0), Act::WaitFor { flag: 0 }, Act::write(0), Act::write(1), Act::Raise { flag: 1 }],
        ),
    ];
    let setup = vec![(Who::Vcpu(0), Act::SwitchRole { variant: L2 }), (Who::Vcpu(0), Act::write(0))];
    Program { machine, setup, ..Program::new("an L2 writes to a slot that logs", threads) }
}

/// A vCPU drops a root that maps two tables of pages, while the host takes a page away.
fn last_put() -> Program {
    let machine =
        MachineSpec { passes: Some("4K,2M,1G,root".into()), ..MachineSpec::of("async-worker", "6.12") };
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(0), Act::write(512), Act::DropRoot, Act::write(0)]),
        ThreadSpec::caller([Act::Unmap { hva_page: 0, pages: 1, may_block: true }]),
    ];
    Program { machine, ..Program::new("a root dropped by its last vCPU", threads) }
}

/// A fast zap of two tables of pages beside a guest that goes on.
fn big_steps() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0)), (Who::Vcpu(0), Act::write(512))];
    let threads =
        vec![ThreadSpec::caller([Act::FastZap]), ThreadSpec::vcpu(0, [Act::write(0), Act::read(512)])];
    Program { setup, ..Program::new("a fast zap beside a running guest", threads) }
}

/// Roots come and go beside a fast zap, under v2's design.
fn lost_between_phases() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::FastZap]),
        ThreadSpec::vcpu(0, [Act::DropRoot, Act::write(0), Act::DropRoot, Act::write(1)]),
    ];
    Program {
        machine: MachineSpec::of("defunct-flag", "6.12"),
        setup,
        ..Program::new("roots lost beside a fast zap", threads)
    }
}

/// A memslot is deleted, and then the host takes its memory.
fn queued_zap() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0)), (Who::Vcpu(0), Act::write(1))];
    let threads = vec![
        ThreadSpec::caller([
            Act::DeleteSlot { as_id: 0, id: 0 },
            Act::Unmap { hva_page: 0, pages: 2, may_block: true },
        ]),
        ThreadSpec::vcpu(0, [Act::read(0)]),
    ];
    Program {
        machine: MachineSpec::of("async-worker", "6.1-async"),
        setup,
        ..Program::new("a memslot deleted under a worker's design", threads)
    }
}

/// The same, while the only vCPU unloads its root.
fn queued_before() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0)), (Who::Vcpu(0), Act::write(1))];
    let threads =
        vec![ThreadSpec::caller([Act::DeleteSlot { as_id: 0, id: 0 }]), ThreadSpec::vcpu(0, [Act::Unload])];
    Program {
        machine: MachineSpec::of("async-worker", "6.1-async"),
        setup,
        ..Program::new("a root lost beside the deletion of a memslot", threads)
    }
}

/// A root lost beside a fast zap, and another one beside the next.
fn queued_twice() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::FastZap]),
        ThreadSpec::vcpu(0, [Act::DropRoot, Act::write(0), Act::Unload]),
    ];
    Program {
        machine: MachineSpec::of("async-worker", "6.1-async"),
        setup,
        ..Program::new("a root lost beside a fast zap, under a worker's design", threads)
    }
}

/// vCPUs load new roots after a fast zap, and drop them: what they have to do with each other is none of mmu_lock's exclusive business.
fn roots_loaded() -> Program {
    let setup = vec![(Who::Vcpu(0), Act::write(0)), (Who::Vcpu(1), Act::read(0))];
    let threads = vec![
        ThreadSpec::caller([Act::FastZap]),
        ThreadSpec::vcpu(0, [Act::write(0), Act::DropRoot, Act::write(0), Act::ExclusiveHolds]),
        ThreadSpec::vcpu(1, [Act::read(0), Act::DropRoot, Act::ExclusiveHolds]),
    ];
    let none = Want::AtMost { count: 0 };
    let expect =
        vec![Expect { thread: 1, act: 3, want: none.clone() }, Expect { thread: 2, act: 2, want: none }];
    Program { setup, expect, ..Program::new("roots loaded after a fast zap", threads) }
}

/// One vCPU goes into SMM and back, twice.
fn smm_and_back() -> Program {
    let machine = MachineSpec {
        vcpus: 1,
        smm: true,
        slots: vec![SlotSpec::flat(0, 0, 512)],
        ..MachineSpec::of("async-worker-owned", "6.6")
    };
    let acts = [
        Act::write(0),
        Act::EnterSmm,
        Act::read(0),
        Act::ExitSmm,
        Act::write(0),
        Act::EnterSmm,
        Act::read(0),
    ];
    let expect = [4, 6].map(|act| Expect { thread: 0, act, want: Want::NoFault }).to_vec();
    let threads = vec![ThreadSpec::vcpu(0, acts)];
    Program { machine, expect, ..Program::new("a guest that toggles SMM", threads) }
}
