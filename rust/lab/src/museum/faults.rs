//! 24, 26 to 29, 31, 34, 41, 42: what faults, aging, huge pages and the NX mitigation do to single entries.

use tdpmmu_platform::Bug;

use super::entry::{Catcher, Class, Entry, Hints};
use crate::program::{Act, Expect, MachineSpec, Program, SlotSpec, ThreadSpec, Want};
use crate::scenario::Who;

pub(super) const ENTRIES: &[Entry] = &[
    Entry {
        bug: Bug::B24,
        title: "leaves go where tables had to",
        class: Class::Corruption,
        kernels: "5.18-rc1",
        reference: "cf3e26427c08, reverted by 873dd122172f with fcb93eb6d09d; again as f47e5bbbc92f",
        cause: "Zapping a range of gfns was cut down to its leaves. Windows guests broke until it was reverted; the reports that we know give no root cause. What can be shown is what callers had been given before: after \
                the zap no table stands in the way of another mapping, as it does under the NX mitigation of these kernels, where any table under a gfn keeps its mapping small.",
        interleaving: "No race: a fetch maps 4 KiB pages, the range is zapped, and the next read finds an empty table where it could have had a huge page.",
        catcher: Catcher::Sim,
        program: zapped_range,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B26,
        title: "a table becomes an NX candidate after its teardown",
        class: Class::UseAfterFree,
        kernels: "6.2-rc",
        reference: "21a36ac6b6c7 and 61f94478547b (6.2)",
        cause: "A fault links a table and only then takes the lock to put it on the list of candidates, without a look at the flag by which teardown would have told that it had been there.",
        interleaving: "A vCPU links a table for a fetch; a collapse under the same shared lock removes the table, sees its flag, takes it off a list that it is not on yet; the vCPU puts the dead table on the list; it is freed, and the \
                       recovery thread reads it.",
        catcher: Catcher::Sim,
        program: candidate_beside_collapse,
        hints: Hints::USUAL.schedules(6000),
    },
    Entry {
        bug: Bug::B27,
        title: "a leaf over a frozen entry",
        class: Class::Corruption,
        kernels: "6.2-rc",
        reference: "f5d16bb9be68 (6.2)",
        cause: "On its way down a fault asked first whether it had come to its goal, and then whether the entry was frozen. So at the goal it did not ask.",
        interleaving: "A collapse freezes the entry of a table and flushes; a fault for a huge page comes to the entry, and exchanges the frozen value for its leaf; the collapse stores empty. The leaf is gone, and nobody \
                       has booked it.",
        catcher: Catcher::Sim,
        program: huge_fault_beside_collapse,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B28,
        title: "a leaf at a level that was not reached",
        class: Class::Corruption,
        kernels: "6.2-rc",
        reference: "80a3e4ae962d (6.2), hardened by 50a9ac25985c",
        cause: "A fault that met a frozen entry above its goal left the loop and ran into the leaf step all the same, which used the level at which the loop had ended.",
        interleaving: "A collapse freezes the entry above a table; a fetch that wants 4 KiB leaves its descent there, and writes a leaf of 2 MiB over the frozen value.",
        catcher: Catcher::Sim,
        program: small_fault_beside_collapse,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B29,
        title: "the notifier's sequence as an int",
        class: Class::Hang,
        kernels: "5.16-6.2",
        reference: "9829185ace98 in 6.1.y, against a955cad84cda; mainline was cured in passing by ba6e3fe25543 (6.3)",
        cause: "The fault passed its snapshot of the sequence through an int. From 2^31 on it comes out extended by its sign, and is compared at full width.",
        interleaving: "No race: the 2^31st invalidation ends; no later snapshot equals the sequence; each fault is found stale, for ever.",
        catcher: Catcher::Sim,
        program: many_invalidations,
        hints: Hints::USUAL.steps(20_000),
    },
    Entry {
        bug: Bug::B31,
        title: "aging thaws a frozen entry",
        class: Class::Corruption,
        kernels: "open since lockless aging (6.15); predicted on the list in August 2024",
        reference: "the list patch that wanted 0x498 for 0x5a0; b146a9b34aed (6.15) made aging lockless",
        cause: "The frozen value has the bits of both formats' Accessed. Without mmu_lock an entry can be frozen between the look at it and the AND that takes Accessed away; what is left is no longer recognised as frozen.",
        interleaving: "An ager finds a leaf young; its table is torn down and the entry frozen; the AND lands on the frozen value; a fault takes the entry for free, and its owner's last store destroys what the fault wrote.",
        catcher: Catcher::Sim,
        program: aging_beside_zap,
        hints: Hints::USUAL.schedules(8000),
    },
    Entry {
        bug: Bug::B34,
        title: "recovery asks for the slot of the wrong address space",
        class: Class::Warning,
        kernels: "6.3-6.4-rc",
        reference: "817fa998362d (6.4)",
        cause: "The recovery of NX huge pages leaves tables of slots that log dirty pages alone. It looked the slot up in address space 0, although the table may belong to SMM.",
        interleaving: "No race: a table of SMM is a candidate, SMM's slot begins to log, the recovery looks at the other address space and zaps it.",
        catcher: Catcher::Sim,
        program: recovery_in_smm,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B41,
        title: "huge-page limits asked for before the slot begins",
        class: Class::Corruption,
        kernels: "5.10-6.5",
        reference: "the test is there in 6.6; 992b54bd083c (6.9) is the same mistake with attributes",
        cause: "The end of dirty logging asks for each table on its way what level the slot allows. An entry of an upper level may begin before the slot does, and the limits are an array that begins with the slot.",
        interleaving: "No race: logging ends for a slot that is not aligned, and an entry before its array is read.",
        catcher: Catcher::Sim,
        program: unaligned_slot,
        hints: Hints::USUAL,
    },
    Entry {
        bug: Bug::B42,
        title: "a small table forbids a huge page for ever",
        class: Class::Performance,
        kernels: "up to 6.1",
        reference: "76901e56fb51 (6.2)",
        cause: "Under the NX mitigation a fault goes one level down where a table is, since a huge page there would be split again by the next fetch. It did so for any table, also for one that no fetch had asked for.",
        interleaving: "No race: the host collapses small pages into a huge one; the notifier empties the leaves and leaves their table; the next fault finds the table and maps small again.",
        catcher: Catcher::Sim,
        program: collapsed_by_the_host,
        hints: Hints::USUAL,
    },
];

/// A slot that logs, mapped small over a host that maps it huge; the setup of whatever a collapse is raced by.
fn logged_slot() -> (MachineSpec, Vec<(Who, Act)>) {
    let machine = MachineSpec {
        host_level: 2,
        slots: vec![SlotSpec::flat(0, 0, 512).logged()],
        ..MachineSpec::default()
    };
    (machine, vec![(Who::Vcpu(0), Act::write(0)), (Who::Vcpu(0), Act::write(1))])
}

const STOP_LOGGING: Act = Act::SetSlotFlags { as_id: 0, id: 0, log: false };

/// A fetch, a zap of what it mapped, a read that could be huge.
fn zapped_range() -> Program {
    let machine = MachineSpec { host_level: 2, nx: true, vcpus: 1, ..MachineSpec::of("inline", "5.15") };
    let threads = vec![
        ThreadSpec::caller([
            Act::WaitFor { flag: 0 },
            Act::ZapRange { gfn: 0, pages: 512 },
            Act::Raise { flag: 1 },
        ]),
        ThreadSpec::vcpu(
            0,
            [
                Act::fetch(0),
                Act::Raise { flag: 0 },
                Act::WaitFor { flag: 1 },
                Act::read(1),
                Act::LookUp { gfn: 1 },
            ],
        ),
    ];
    let expect = vec![Expect { thread: 1, act: 4, want: Want::Level { level: 2 } }];
    Program { machine, expect, ..Program::new("a range zapped and mapped again", threads) }
}

/// A fetch that makes a candidate beside the end of dirty logging, and the recovery. The fetch's 2 MiB have no table yet, the rest of its path has.
fn candidate_beside_collapse() -> Program {
    let machine = MachineSpec {
        host_level: 2,
        nx: true,
        slots: vec![SlotSpec::flat(0, 0, 1536).logged()],
        ..MachineSpec::default()
    };
    let setup = vec![(Who::Vcpu(1), Act::write(1024))];
    let threads =
        vec![ThreadSpec::caller([STOP_LOGGING]), ThreadSpec::vcpu(1, [Act::fetch(0), Act::fetch(512)])];
    Program { machine, setup, ..Program::new("a fetch beside the end of dirty logging", threads) }
}

/// A fault that may be huge beside the end of dirty logging.
fn huge_fault_beside_collapse() -> Program {
    let (machine, setup) = logged_slot();
    let threads =
        vec![ThreadSpec::caller([STOP_LOGGING]), ThreadSpec::vcpu(1, [Act::read(2), Act::write(3)])];
    Program { machine, setup, ..Program::new("a huge fault beside the end of dirty logging", threads) }
}

/// A fetch that must be small beside the end of dirty logging.
fn small_fault_beside_collapse() -> Program {
    let (machine, setup) = logged_slot();
    let machine = MachineSpec { nx: true, ..machine };
    let threads =
        vec![ThreadSpec::caller([STOP_LOGGING]), ThreadSpec::vcpu(1, [Act::fetch(2), Act::write(3)])];
    Program { machine, setup, ..Program::new("a small fault beside the end of dirty logging", threads) }
}

/// A VM that has seen almost 2^31 invalidations sees one more.
fn many_invalidations() -> Program {
    let machine = MachineSpec { start_seq: (1 << 31) - 1, ..MachineSpec::of("sync", "6.1") };
    let threads = vec![
        ThreadSpec::caller([Act::Unmap { hva_page: 0, pages: 1, may_block: true }, Act::Raise { flag: 0 }]),
        ThreadSpec::vcpu(0, [Act::write(0), Act::WaitFor { flag: 0 }, Act::write(1)]),
    ];
    Program { machine, ..Program::new("the 2^31st invalidation", threads) }
}

/// An ager beside a fast zap.
fn aging_beside_zap_of(format: &str) -> Program {
    let machine = MachineSpec { format: format.into(), ..MachineSpec::of("sync", "7.2") };
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::FastZap]),
        ThreadSpec::other(0, "ager", [Act::Age { hva_page: 0, pages: 1 }]),
    ];
    Program { machine, setup, ..Program::new("aging beside a fast zap", threads) }
}

fn aging_beside_zap() -> Program {
    aging_beside_zap_of("ept")
}

/// A candidate of SMM whose slot has begun to log.
fn recovery_in_smm() -> Program {
    let machine = MachineSpec {
        host_level: 2,
        nx: true,
        smm: true,
        vcpus: 1,
        slots: vec![SlotSpec::flat(0, 0, 512)],
        ..MachineSpec::default()
    };
    let setup = vec![
        (Who::Vcpu(0), Act::EnterSmm),
        (Who::Vcpu(0), Act::fetch(0)),
        (Who::Caller, Act::SetSlotFlags { as_id: 1, id: 0, log: true }),
    ];
    let threads =
        vec![ThreadSpec::caller([Act::RecoverNx { ratio: 1 }]), ThreadSpec::vcpu(0, [Act::fetch(1)])];
    let expect = vec![Expect { thread: 0, act: 0, want: Want::AtMost { count: 0 } }];
    Program { machine, setup, expect, ..Program::new("NX recovery and SMM", threads) }
}

/// Logging ends for a slot that begins in the middle of 2 MiB.
fn unaligned_slot() -> Program {
    let machine =
        MachineSpec { slots: vec![SlotSpec::flat(0, 0x100, 0x300).logged()], ..MachineSpec::default() };
    let setup = vec![(Who::Vcpu(0), Act::write(0x100)), (Who::Vcpu(0), Act::write(0x200))];
    let threads = vec![ThreadSpec::caller([STOP_LOGGING]), ThreadSpec::vcpu(0, [Act::read(0x101)])];
    Program {
        machine,
        setup,
        hot: vec![0x100, 0x101],
        ..Program::new("the end of dirty logging of an unaligned slot", threads)
    }
}

/// The host collapses what the guest had mapped small.
fn collapsed_by_the_host() -> Program {
    let machine = MachineSpec { nx: true, vcpus: 1, ..MachineSpec::default() };
    let setup = vec![(Who::Vcpu(0), Act::write(0))];
    let threads = vec![
        ThreadSpec::caller([Act::SetHostLevel { gfn: 0, pages: 512, level: 2 }, Act::Raise { flag: 0 }]),
        ThreadSpec::vcpu(0, [Act::read(0), Act::WaitFor { flag: 0 }, Act::read(1), Act::LookUp { gfn: 1 }]),
    ];
    let expect = vec![Expect { thread: 1, act: 3, want: Want::Level { level: 2 } }];
    Program { machine, setup, expect, ..Program::new("small pages collapsed by the host", threads) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Control;
    use crate::museum::{Budget, demo};

    #[test]
    fn a_frozen_entry_is_thawed_in_the_other_format_too() {
        let ept = ENTRIES.iter().find(|entry| entry.bug == Bug::B31).expect("an exhibit");
        let npt = Entry { program: || aging_beside_zap_of("npt"), ..*ept };
        let budget = Budget { seeds: 1, clean: Some(50), ..Budget::default() };
        let shown = demo(&npt, &budget, &Control::silent()).expect("a demonstration");
        assert!(shown.caught && !shown.false_alarm, "{:?} {:?}", shown.schedules, shown.alarm);
    }
}
