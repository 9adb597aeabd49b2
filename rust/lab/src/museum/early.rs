//! 1 to 8: flushes that were owed, the first iterators, RCU.

use tdpmmu_platform::Bug;

use super::{Catcher, Class, Entry, Hints};
use crate::program::{Act, MachineSpec, Program, SlotSpec, ThreadSpec, Who};

/// See the module text.
pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        bug: Bug::B01,
        title: "flush debt of an earlier root dropped on a yield",
        class: Class::StaleTlb,
        kernels: "5.10-5.11",
        reference: "a835429cda91 (5.12) passes the pending flush into the walk of the next root; 1af4a96025b3 had let the zap of a range yield.",
        cause: "The zap of a gfn range visits root after root. The helper for one root kept a flush flag of its own, false at first, and the flags were added up only when all roots were done. \
                When the walk of the second root yielded before it had zapped anything, nothing told it that the first root's entries were still in TLBs.",
        interleaving: "The notifier zaps the page in root A and goes on to root B. A vCPU wants mmu_lock; the walk of B yields and does not flush. Whoever takes the lock now may rely on unlocked meaning flushed; \
                       a vCPU that is still in the guest on root A writes to the page through its TLB.",
        catcher: Catcher::Sim,
        program: two_roots,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B02,
        title: "NX recovery does not flush",
        class: Class::StaleTlb,
        kernels: "5.10-5.11",
        reference: "048f49809c52 (5.12) flushes for what the recovery zapped in the TDP MMU.",
        cause: "The recovery thread flushed for the shadow MMU's list of invalid pages alone. What the TDP MMU's zap answered (a flush is needed) was dropped.",
        interleaving: "The recovery unlinks a table and hands it to RCU. A vCPU has the table in its paging-structure cache; the grace period ends, the page is used again, and the vCPU's next walk \
                       takes what stands there for SPTEs.",
        catcher: Catcher::Sim,
        program: recovery,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B03,
        title: "NX recovery overwrites the flush it owes",
        class: Class::StaleTlb,
        kernels: "5.12-rc",
        reference: "\"Preserve pending TLB flush across calls to kvm_tdp_mmu_zap_sp\", a fix of 048f49809c52; since 33a3164161fc the zap does not yield and so pays nothing itself.",
        cause: "The loop over the candidates assigned each zap's answer to its flush flag instead of adding it. A candidate that turned out to be gone already answered false and took back what the one before had owed.",
        interleaving: "Two candidates. The first is zapped: a flush is owed. Before the second is reached, a vCPU's fault puts a huge page in its place (the recovery shares mmu_lock from 6.18 on). \
                       The second zap finds nothing to do, says so, and the loop ends without a flush.",
        catcher: Catcher::Sim,
        program: two_candidates,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B04a,
        title: "the iterator yields only after a change",
        class: Class::Lockup,
        kernels: "5.10-5.11",
        reference: "\"Yield in TDU MMU iter even if no SPTES changed\", in the 5.10.y series of April 2021.",
        cause: "The reschedule check stood behind the change of an entry. A walk over a range with tables and nothing in them changed nothing and so never looked whether somebody waited.",
        interleaving: "The host takes a range away twice. The tables of the first time are still linked; the second walk reads all their entries under mmu_lock without a single check.",
        catcher: Catcher::Sim,
        program: empty_range,
        hints: Hints::USUAL.schedules(400),
    },
    Entry {
        bug: Bug::B04b,
        title: "the iterator makes no progress between two yields",
        class: Class::Hang,
        kernels: "5.10-5.11",
        reference: "\"Ensure forward progress when yielding in TDP MMU iter\" and \"Rename goal_gfn\", in the 5.10.y series of April 2021.",
        cause: "After a yield the walk starts again towards the same gfn, and its first check may say yes once more. Nothing remembered that this place had been yielded at already.",
        interleaving: "The lock is contended at each check: the walk yields, restarts at the root, comes to the check, yields.",
        catcher: Catcher::Sim,
        program: always_asked,
        hints: Hints::USUAL.schedules(400).steps(30_000),
    },
    Entry {
        bug: Bug::B05,
        title: "the loop steps on from a restarted iterator",
        class: Class::Leak,
        kernels: "5.10-5.15",
        reference: "3a0f64de479c (5.16) lets a flag carry the restart over to the next step. Found at Cloudflare, as a warning when a VM ended.",
        cause: "The reschedule check restarted the walk on the spot, at the root's entry for the gfn reached. The loop's continue then stepped on from there, and where the walk does not go below the root's entries \
                that step is to the side: the entry that was current at the yield is never visited.",
        interleaving: "A fast zap with one pass at the root's level yields at entry k and goes on with k+1. Everything below k stays linked under a root that is freed; or it is found later, when the memslot and the process's memory are gone.",
        catcher: Catcher::Sim,
        program: top_entries,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B06,
        title: "the root list is walked outside of the RCU section",
        class: Class::UseAfterFree,
        kernels: "5.12-rc",
        reference: "70fb3e41a97a and 14f6fec2e8e0 (5.13) put the reads of RCU-protected pointers into sections, as sparse and lockdep had asked; the list of roots came under RCU when its walkers began to share mmu_lock.",
        cause: "A link was followed after the section that kept its target had been left. Nothing went wrong as long as everybody who freed held the lock exclusively.",
        interleaving: "A walker under the shared lock stands on a root that it has no reference on. Another task unlists it and gives it to RCU; no section holds the grace period up; the walker reads the next link of a page that is free.",
        catcher: Catcher::Sim,
        program: list_walk,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B07,
        title: "at a yield the RCU section ends before the flush",
        class: Class::UseAfterFree,
        kernels: "5.12-5.17 (latent)",
        reference: "bd29677952fa (5.18) swaps the two, so that bb95dfb9e2df could stop flushing for each removed table; fcb93eb6d09d did the same for the restored kvm_zap_gfn_range.",
        cause: "The yield left the RCU section, then flushed, then dropped the lock. Harmless while the removal of a table flushed for itself; afterwards the section was all that kept an unlinked table from being used again before the flush.",
        interleaving: "A walk unlinks table P and yields: it leaves its section. The grace period ends, P is a page of somebody else. A vCPU that has P in its paging-structure cache walks it; the flush comes after that.",
        catcher: Catcher::Sim,
        program: collapse_yields,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B08,
        title: "the flush of a removed table begins at its last entry",
        class: Class::StaleTlb,
        kernels: "5.12-5.15",
        reference: "574c3c55e969 (5.16, and 5.15 stable).",
        cause: "After the loop over the table's entries the variable of the loop, the gfn of the last child, was taken for the table's first gfn. Only a hypervisor below that flushes by range (Hyper-V) does exactly what it is asked.",
        interleaving: "None is needed: the range asked for begins where the table's last entry does.",
        catcher: Catcher::Sim,
        program: whole_table,
        hints: Hints::USUAL.schedules(400),
    },
];

fn on(machine: MachineSpec, name: &str, setup: &[(Who, Act)], threads: Vec<ThreadSpec>) -> Program {
    Program { machine, setup: setup.to_vec(), ..Program::new(name, threads) }
}

const V0: Who = Who::Vcpu(0);
const V1: Who = Who::Vcpu(1);

/// Two roots of one address space; the notifier finds its page under the newer one and walks the older one afterwards.
fn two_roots() -> Program {
    let setup = [(V0, Act::write(2)), (V1, Act::SwitchRole { variant: 1 }), (V1, Act::write(0))];
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(2)]),
        ThreadSpec::vcpu(1, [Act::write(0), Act::write(0)]),
        ThreadSpec::other(0, "notifier", [Act::Unmap { hva_page: 0, pages: 3, may_block: true }]),
    ];
    on(MachineSpec::default(), "notifier-two-roots", &setup, threads)
}

fn nx(profile: &str) -> MachineSpec {
    MachineSpec { nx: true, host_level: 2, ..MachineSpec::of("", profile) }
}

/// One table that a fetch has forced, and its recovery beside a guest that uses it.
fn recovery() -> Program {
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::fetch(0), Act::read(1), Act::read(2)]),
        ThreadSpec::other(0, "nx-recovery", [Act::RecoverNx { ratio: 1 }]),
    ];
    on(nx("6.12"), "nx-recovery", &[(V0, Act::fetch(0))], threads)
}

/// Two of them, recovered under the shared lock beside faults.
fn two_candidates() -> Program {
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::read(514)]),
        ThreadSpec::vcpu(1, [Act::read(0), Act::read(1)]),
        ThreadSpec::other(0, "nx-recovery", [Act::RecoverNx { ratio: 1 }]),
    ];
    on(nx("7.2"), "nx-recovery-shared", &[(V0, Act::fetch(0)), (V0, Act::fetch(512))], threads)
}

/// Tables without leaves, and a range over all of them.
fn empty_range() -> Program {
    let all = || Act::Unmap { hva_page: 0, pages: 2048, may_block: true };
    let setup = [
        (V0, Act::read(0)),
        (V0, Act::read(512)),
        (V0, Act::read(1024)),
        (V0, Act::read(1536)),
        (Who::Caller, all()),
    ];
    let threads =
        vec![ThreadSpec::vcpu(0, [Act::read(0), Act::read(1)]), ThreadSpec::other(0, "notifier", [all()])];
    let machine = MachineSpec { slots: vec![SlotSpec::flat(0, 0, 2048)], ..MachineSpec::default() };
    on(machine, "notifier-empty-range", &setup, threads)
}

/// Each check of each walk says yes.
fn always_asked() -> Program {
    let setup = [(V0, Act::write(0)), (V0, Act::write(1)), (V0, Act::write(2))];
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::write(1), Act::write(2)]),
        ThreadSpec::other(0, "notifier", [Act::Unmap { hva_page: 0, pages: 3, may_block: true }]),
    ];
    let machine = MachineSpec { force_yield: Some(1), ..MachineSpec::default() };
    on(machine, "notifier-always-contended", &setup, threads)
}

/// Leaves below three entries of the root, zapped by one pass at the root's level.
fn top_entries() -> Program {
    const TOP: u64 = 1 << 27;
    let slot = |id: u16| SlotSpec {
        id,
        gfn: u64::from(id) * TOP,
        pages: 2,
        hva_page: u64::from(id) * 512,
        ..SlotSpec::default()
    };
    let machine = MachineSpec {
        slots: vec![slot(0), slot(1), slot(2)],
        passes: Some("root".into()),
        ..MachineSpec::default()
    };
    let setup = [(V0, Act::write(0)), (V0, Act::write(TOP)), (V0, Act::write(2 * TOP))];
    let threads =
        vec![ThreadSpec::vcpu(0, [Act::write(0), Act::write(TOP)]), ThreadSpec::caller([Act::FastZap])];
    on(machine, "fast-zap-top-entries", &setup, threads)
}

/// Roots come and go while a dirty log begins under the shared lock.
fn list_walk() -> Program {
    let setup = [(V0, Act::write(0)), (V1, Act::SwitchRole { variant: 1 }), (V1, Act::write(1))];
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::DropRoot, Act::write(0)]),
        ThreadSpec::vcpu(1, [Act::DropRoot]),
        ThreadSpec::caller([Act::SetSlotFlags { as_id: 0, id: 0, log: true }]),
    ];
    on(MachineSpec::of("async-worker", "6.1-async"), "log-start-beside-lost-roots", &setup, threads)
}

/// A dirty log ends: tables give way to huge leaves, in place, beside a guest that has them cached.
fn collapse_yields() -> Program {
    let machine = MachineSpec {
        slots: vec![SlotSpec::flat(0, 0, 1024).logged()],
        host_level: 2,
        ..MachineSpec::of("", "7.2")
    };
    let setup = [(V0, Act::write(0)), (V0, Act::write(512))];
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::read(0), Act::read(1), Act::read(2)]),
        ThreadSpec::caller([Act::SetSlotFlags { as_id: 0, id: 0, log: false }]),
    ];
    on(machine, "log-end-recovers-huge", &setup, threads)
}

/// The host takes away all that a table maps, in a kernel that removes the table then.
fn whole_table() -> Program {
    let threads = vec![
        ThreadSpec::vcpu(0, [Act::read(0), Act::read(1)]),
        ThreadSpec::other(0, "notifier", [Act::Unmap { hva_page: 0, pages: 512, may_block: true }]),
    ];
    on(
        MachineSpec::of("", "5.15"),
        "notifier-whole-table",
        &[(V0, Act::write(0)), (V0, Act::write(1))],
        threads,
    )
}
