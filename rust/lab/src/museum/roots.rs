//! 9 to 13: roots, what hangs below them, and who may still reach them.

use tdpmmu_platform::Bug;

use super::{Catcher, Class, Entry, Hints};
use crate::program::{Act, MachineSpec, Program, SlotSpec, ThreadSpec, Who};

/// See the module text.
pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        bug: Bug::B09,
        title: "the books of a table are written after it was linked",
        class: Class::Crash,
        kernels: "5.12-6.1",
        reference: "Kernel bug 217562 (5.15.y, June 2023): a NULL pointer in list_del below the zap of invalidated roots, while a memslot was deleted. d25ceb926436 (6.2) keeps a counter instead of a list; 61f94478547b (6.2) writes the NX flag before the link; 5.15.y turned the TDP MMU off.",
        cause: "A fault links a new table by compare-exchange and puts it on the MMU's lists afterwards. From the link on a zap under the shared lock may find the table, remove it, and take it off a list that it is not on yet; \
                then the fault puts a table on the list that is waiting for its grace period. Here the list is that of NX candidates: all that is left of these lists in later kernels.",
        interleaving: "The vCPU links table S and is preempted. A zap under the shared lock (of an invalid root, or of what a dirty log leaves behind) unlinks S and finds it on no list. The vCPU goes on and adds S. \
                       S is freed; whoever walks the list next follows its links.",
        catcher: Catcher::Sim,
        program: late_books,
        hints: Hints::USUAL.schedules(6000),
    },
    Entry {
        bug: Bug::B10,
        title: "a walk that yields visits roots without a reference",
        class: Class::UseAfterFree,
        kernels: "5.13-5.15",
        reference: "7533377215b6 (5.16).",
        cause: "Two iterators over the roots: one takes a reference on the root it stands on, one does not. The unmap of a notifier may yield inside a root, and used the second.",
        interleaving: "The notifier yields inside root A, with no reference. A fast zap and the last vCPU put A; it is unlisted and freed. The notifier goes on in A, and then with A's next link.",
        catcher: Catcher::Sim,
        program: unheld_root,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B11,
        title: "a fault maps under an invalidated root",
        class: Class::UseAfterFree,
        kernels: "5.13-5.15",
        reference: "a955cad84cda (5.16) tests, under mmu_lock, whether the root is obsolete.",
        cause: "Under mmu_lock the fault asked whether the host had invalidated the page meanwhile, and not whether its root was still one.",
        interleaving: "A vCPU has its page and waits for mmu_lock. A fast zap (of another slot's deletion, or of a toggle of nx_huge_pages) invalidates the root and zaps [0, g). The vCPU takes the lock shared and maps a gfn below g. The fast zap ends, with an SPTE left that nobody will zap; \
                       when the memory goes and the root is freed at last, its Dirty bit is written to a page of somebody else.",
        catcher: Catcher::Sim,
        program: late_fault,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B13,
        title: "a notifier's unmap leaves invalid roots out",
        class: Class::UseAfterFree,
        kernels: "5.13-5.17",
        reference: "d62007edf01f with 04dc4e6ce274 and 83b83a02073e (5.18, and stable).",
        cause: "Taking a reference refused invalid roots, so every iterator left them out: also those whose caller must find all SPTEs of a page.",
        interleaving: "A fast zap invalidates the root and yields, or has yet to come to the page. The host takes the page away: the notifier finds no valid root that maps it and returns. The page is somebody else's; \
                       the zap then finds the SPTE and writes its Dirty bit there. Worst where the fast zap is a toggle of nx_huge_pages, which does not hold the process's memory.",
        catcher: Catcher::Sim,
        program: unmap_beside_zap,
        hints: Hints::USUAL,
    },
];

const V0: Who = Who::Vcpu(0);

/// Fetches make tables for the NX mitigation while the end of a dirty log removes such tables under the shared lock.
fn late_books() -> Program {
    let machine = MachineSpec {
        nx: true,
        host_level: 2,
        slots: vec![SlotSpec::flat(0, 0, 1024).logged()],
        // Flag first (6.2 on), and removed by a zap under the shared lock (up to 6.12).
        ..MachineSpec::of("", "6.6")
    };
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::fetch(0), Act::fetch(512)]),
        ThreadSpec::caller([Act::SetSlotFlags { as_id: 0, id: 0, log: false }]),
    ];
    Program { machine, setup: vec![(V0, Act::LoadRoot)], ..Program::new("log-end-beside-nx-fetch", threads) }
}

/// The host takes pages away while a fast zap and the vCPU let the root go.
fn unheld_root() -> Program {
    let setup = vec![(V0, Act::write(0)), (V0, Act::write(2))];
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::read(1)]),
        ThreadSpec::caller([Act::FastZap]),
        ThreadSpec::other(0, "notifier", [Act::Unmap { hva_page: 0, pages: 3, may_block: true }]),
    ];
    Program { setup, ..Program::new("notifier-beside-fast-zap", threads) }
}

/// A vCPU faults while everything is zapped. (A fault on a slot that goes is waited for: by SRCU, before its root is invalidated.)
fn late_fault() -> Program {
    let threads = vec![ThreadSpec::vcpu(0, [Act::write(1)]), ThreadSpec::caller([Act::FastZap])];
    Program { setup: vec![(V0, Act::write(0))], ..Program::new("fault-beside-fast-zap", threads) }
}

/// The host takes a page away while a fast zap is at work.
fn unmap_beside_zap() -> Program {
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(0)]),
        ThreadSpec::caller([Act::FastZap]),
        ThreadSpec::other(0, "notifier", [Act::Unmap { hva_page: 0, pages: 1, may_block: true }]),
    ];
    Program { setup: vec![(V0, Act::write(0))], ..Program::new("unmap-beside-fast-zap", threads) }
}
