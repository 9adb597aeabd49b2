//! 14 to 17: bits that hardware and the fast page fault write, and lost races.

use tdpmmu_platform::Bug;

use super::{Catcher, Class, Entry, Hints};
use crate::program::{Act, MachineSpec, Program, SlotSpec, ThreadSpec, Who};

/// See the module text.
pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        bug: Bug::B14,
        title: "a plain store loses Dirty",
        class: Class::LostDirty,
        kernels: "5.10-5.17",
        reference: "ba3a6120a4e7 with 54eb3ef56f36 and 706c9c55e5a3 (5.18).",
        cause: "Under the exclusive lock a leaf was stored over, and the iterator's snapshot taken for its old value. Hardware sets Accessed and Dirty without any lock, also through a table that was just unlinked; the fast page fault gives W back.",
        interleaving: "The notifier reads an SPTE with W and without D. The guest writes: hardware sets D. The notifier stores the empty value and decides by its snapshot that the page was clean.",
        catcher: Catcher::Sim,
        program: write_beside_unmap,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B15,
        title: "a lost race of dirty logging is retried on an entry that is gone",
        class: Class::Warning,
        kernels: "5.13-5.17",
        reference: "3354ef5a592d (5.18).",
        cause: "Whether the entry is a present leaf was asked by the iterator only. After a failed compare-exchange the loop went on with the value found, which may be empty, frozen, or no memory at all, and asked of it which bit to take; \
                a debug kernel warns there.",
        interleaving: "Dirty logging reads a huge leaf. A vCPU's fetch below it freezes the leaf, to put a table in its place. The compare-exchange fails, and dirty logging goes on with the frozen value.",
        catcher: Catcher::Sim,
        program: log_beside_zapped_huge,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B16,
        title: "a lost race of dirty logging write-protects a table",
        class: Class::Corruption,
        kernels: "5.13-6.7",
        reference: "45a61ebb2211 (6.8), patch 2 of a series of October 2023; the loop is of a6a0b05da9f3.",
        cause: "3354ef5a592d asked again whether the entry is present, not whether it is still a leaf. Where the bit to take is W, a table's entry loses it: everything below is read-only, and no fault ever gives W back to an entry that is no leaf.",
        interleaving: "Dirty logging reads a huge leaf. A vCPU's fault splits it: the entry links a table now. The compare-exchange fails, and the retry takes W from the table's entry.",
        catcher: Catcher::Sim,
        program: log_beside_split_huge,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B17,
        title: "write protection stops at an entry that lacks W already",
        class: Class::Corruption,
        kernels: "5.10-5.16",
        reference: "7c8a4742c4ab (5.17, and 5.10 stable).",
        cause: "To protect a gfn for the shadow MMU means to take W and MMU-writable. The loop left an entry alone that had no W; dirty logging leaves such entries behind, with MMU-writable set.",
        interleaving: "Dirty logging takes W. The guest builds page tables of its own in that page, so the gfn is write-protected, which does nothing. The guest's next write is fixed by the fast page fault, without mmu_lock, and the shadow MMU hears nothing of it.",
        catcher: Catcher::Sim,
        program: protect_after_log,
        hints: Hints::USUAL.schedules(1000),
    },
];

const V0: Who = Who::Vcpu(0);

/// The guest writes a page whose Dirty bit the log has taken, while the host takes the page away.
fn write_beside_unmap() -> Program {
    let machine = MachineSpec {
        slots: vec![SlotSpec::flat(0, 0, 64).logged()],
        format: "ept".into(),
        dirty_mode: "d-bits".into(),
        ..MachineSpec::default()
    };
    let setup = vec![(V0, Act::write(0)), (Who::Caller, Act::GetDirtyLog { as_id: 0, id: 0 })];
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(0)]),
        ThreadSpec::other(0, "notifier", [Act::Unmap { hva_page: 0, pages: 1, may_block: true }]),
    ];
    Program { machine, setup, ..Program::new("write-beside-unmap", threads) }
}

/// A log begins while a fetch breaks a huge leaf up.
fn log_beside_fetch(profile: &str) -> Program {
    let machine = MachineSpec {
        slots: vec![SlotSpec::flat(0, 0, 512)],
        nx: true,
        host_level: 2,
        eager_split: false,
        ..MachineSpec::of("", profile)
    };
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::fetch(1), Act::write(0)]),
        ThreadSpec::caller([Act::SetSlotFlags { as_id: 0, id: 0, log: true }]),
    ];
    Program { machine, setup: vec![(V0, Act::write(0))], ..Program::new("log-start-beside-fetch", threads) }
}

fn log_beside_zapped_huge() -> Program {
    log_beside_fetch("6.1")
}

fn log_beside_split_huge() -> Program {
    log_beside_fetch("6.12")
}

/// A page is logged, then write-protected, then written.
fn protect_after_log() -> Program {
    let machine = MachineSpec { slots: vec![SlotSpec::flat(0, 0, 64).logged()], ..MachineSpec::default() };
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(0), Act::write(0)]),
        ThreadSpec::caller([Act::GetDirtyLog { as_id: 0, id: 0 }, Act::WriteProtect { as_id: 0, gfn: 0 }]),
    ];
    Program { machine, setup: vec![(V0, Act::write(0))], ..Program::new("protect-beside-log", threads) }
}
