//! The protocols of the shadow MMU: who meets over shadow pages.
//!
//! Under a shadow design the guest has no EPT or NPT, and its own tables are shadowed. Under a design of the TDP MMU the same is done by an L2: L1 runs on TDP tables, and its nested tables are shadowed. [`Guest`] makes of one list of acts
//! the right one for each: where a guest would load CR3, an L2 is entered; whoever changes nested tables is L1, so the L2 has exited and is entered again.
//!
//! Lockless walks of shadow pages are told apart by how they are reclaimed; each design has its own kind, so that all are met.

use tdpmmu_spte::KernelProfile;

use super::protocols::{Protocol, V0, V1, is_shadow, with};
use crate::program::{Act, MachineSpec, ProcessSpec, Program, SlotSpec, ThreadSpec, Who};

pub(super) const PROTOCOLS: &[Protocol] = &[
    Protocol {
        name: "shadow-fault-zap",
        about: "faults of two vCPUs through the guest's own page tables against a memslot that is deleted",
        nested: false,
        build: fault_zap,
    },
    Protocol {
        name: "shadow-reload",
        about: "shadow roots are loaded, left and lost by two vCPUs while a fast zap makes all of them obsolete",
        nested: false,
        build: reload,
    },
    Protocol {
        name: "shadow-unsync",
        about: "a guest changes its page tables on one vCPU and uses them on another, with and without a flush",
        nested: false,
        build: unsync,
    },
    Protocol {
        name: "shadow-quota",
        about: "two processes that do not fit into the quota of shadow pages, and a fast zap between them",
        nested: false,
        build: quota,
    },
    Protocol {
        name: "shadow-lockless-free",
        about: "walks of shadow pages without mmu_lock against shadow pages that are zapped and freed",
        nested: false,
        build: lockless_free,
    },
    Protocol {
        name: "shadow-slot-notifier",
        about: "the host takes pages away that only shadow pages map while their memslot goes and comes back",
        nested: false,
        build: slot_notifier,
    },
    Protocol {
        name: "nested-quota",
        about: "TDP faults of an L1 against the quota of the shadow pages that its L2s run on",
        nested: true,
        build: nested_quota,
    },
];

/// Whose tables are shadowed: a guest's, or an L1's for its L2.
#[derive(Clone, Copy)]
pub(crate) struct Guest {
    nested: bool,
}

impl Guest {
    /// The machine of that design with `processes` whose first 1024 pages are mapped.
    pub(crate) fn machine(machine: MachineSpec, processes: usize) -> (Self, MachineSpec) {
        let guest = Self { nested: !is_shadow(&machine.design) };
        let paging = if guest.nested { String::new() } else { "guest".to_owned() };
        let processes = vec![ProcessSpec::linear(1024); processes];
        (guest, MachineSpec { paging, nested: guest.nested, processes, ..machine })
    }

    /// The acts as this guest does them.
    pub(crate) fn acts(self, acts: impl IntoIterator<Item = Act>) -> Vec<Act> {
        let mut at = 0;
        let mut done = Vec::new();
        for act in acts {
            match act {
                Act::SetCr3 { process } => {
                    at = process;
                    done.push(if self.nested { Act::EnterL2 { process } } else { act });
                }
                Act::GuestMap { .. } | Act::GuestUnmap { .. } if self.nested => {
                    done.extend([act, Act::EnterL2 { process: at }]);
                }
                _ => done.push(act),
            }
        }
        done
    }

    fn vcpu(self, id: usize, acts: impl IntoIterator<Item = Act>) -> ThreadSpec {
        ThreadSpec::vcpu(id, self.acts(acts))
    }

    /// What is done before, by vCPUs that run in the first process.
    pub(crate) fn setup(self, acts: impl IntoIterator<Item = (Who, Act)>) -> Vec<(Who, Act)> {
        let enter = [V0, V1].map(|who| (who, Act::SetCr3 { process: 0 }));
        let each = |(who, act): (Who, Act)| self.acts([act]).into_iter().map(move |act| (who, act));
        enter.into_iter().chain(acts).flat_map(each).collect()
    }
}

fn map(gva: u64, gfn: u64) -> Act {
    Act::GuestMap { process: 0, gva, gfn, write: true }
}

fn unmap(gva: u64) -> Act {
    Act::GuestUnmap { process: 0, gva }
}

const TWO_SLOTS: fn() -> Vec<SlotSpec> =
    || vec![SlotSpec::flat(0, 0, 1024), SlotSpec { hva_page: 1024, ..SlotSpec::flat(1, 0x40000, 512) }];

fn fault_zap(machine: MachineSpec, _: &KernelProfile) -> Program {
    let (guest, machine) = Guest::machine(MachineSpec { slots: TWO_SLOTS(), ..machine }, 1);
    let mut program = with(
        machine,
        vec![
            guest.vcpu(0, [Act::write(0), Act::write(0x400), Act::write(1)]),
            guest.vcpu(1, [Act::read(0x400), Act::fetch(0x200), Act::Speculate { gfn: 0x401 }]),
            ThreadSpec::caller([Act::DeleteSlot { as_id: 0, id: 1 }]),
        ],
    );
    program.setup =
        guest.setup([(V0, map(0x400, 0x40000)), (V0, map(0x401, 0x40001)), (V1, Act::write(0x401))]);
    program
}

fn reload(machine: MachineSpec, _: &KernelProfile) -> Program {
    let (guest, machine) = Guest::machine(machine, 2);
    let mut program = with(
        machine,
        vec![
            guest.vcpu(0, [Act::read(0), Act::SetCr3 { process: 1 }, Act::write(0), Act::Unload]),
            guest.vcpu(1, [Act::write(1), Act::DropRoot, Act::SwitchRole { variant: 1 }, Act::read(0x200)]),
            ThreadSpec::caller([Act::FastZap, Act::FastZap]),
        ],
    );
    program.setup = guest.setup([(V0, Act::write(0)), (V1, Act::read(0))]);
    program
}

fn unsync(machine: MachineSpec, _: &KernelProfile) -> Program {
    let (guest, machine) = Guest::machine(machine, 1);
    let mut program = with(
        machine,
        vec![
            guest.vcpu(0, [map(0x401, 3), Act::write(0x401), unmap(0x401), Act::Invlpg { gva: 0x401 }]),
            guest.vcpu(1, [Act::read(0x401), map(0x401, 2), Act::FlushGuestTlb, Act::write(0x401)]),
            ThreadSpec::other(0, "host", [Act::Unmap { hva_page: 2, pages: 2, may_block: true }]),
        ],
    );
    program.setup = guest.setup([(V0, map(0x400, 1)), (V0, Act::write(0x400)), (V1, Act::read(0x400))]);
    program
}

fn quota(machine: MachineSpec, _: &KernelProfile) -> Program {
    let (guest, machine) = Guest::machine(MachineSpec { quota: Some(12), ..machine }, 2);
    let mut program = with(
        machine,
        vec![
            guest.vcpu(0, [Act::write(0x200), Act::SetCr3 { process: 1 }, Act::write(0), Act::write(0x200)]),
            guest.vcpu(1, [Act::write(1), Act::read(0x201), Act::Unload, Act::read(0)]),
            ThreadSpec::caller([Act::FastZap]),
        ],
    );
    program.setup = guest.setup([(V0, Act::write(0)), (V1, Act::read(0))]);
    program
}

/// Each design has its own kind of reclamation.
fn kind_of(design: &str) -> &'static str {
    match design {
        "shadow-walk" => "counter",
        "shadow-walk-break" => "rcu",
        "shadow-gen-kept" => "membarrier",
        "shadow-slot" => "epoch",
        _ => "ipi",
    }
}

fn lockless_free(machine: MachineSpec, _: &KernelProfile) -> Program {
    let reclaim = kind_of(&machine.design).to_owned();
    let (guest, machine) = Guest::machine(MachineSpec { reclaim, ..machine }, 1);
    let mut program = with(
        machine,
        vec![
            guest.vcpu(0, [Act::WalkShadow { gva: 0 }, Act::write(0), Act::WalkShadow { gva: 0x200 }]),
            guest.vcpu(1, [unmap(0x400), Act::read(0x200), Act::WalkShadow { gva: 0 }, Act::DropRoot]),
            ThreadSpec::caller([Act::ZapRange { gfn: 0, pages: 1024 }, Act::FastZap, Act::RcuBarrier]),
        ],
    );
    program.setup =
        guest.setup([(V0, map(0x400, 1)), (V0, Act::write(0)), (V0, Act::write(0x200)), (V1, Act::read(0))]);
    program
}

fn slot_notifier(machine: MachineSpec, _: &KernelProfile) -> Program {
    let (guest, machine) = Guest::machine(MachineSpec { slots: TWO_SLOTS(), ..machine }, 1);
    let mut program = with(
        machine,
        vec![
            guest.vcpu(0, [Act::write(0x400), Act::write(0), Act::read(0x401)]),
            ThreadSpec::other(
                0,
                "host",
                [
                    Act::Unmap { hva_page: 1024, pages: 1, may_block: true },
                    Act::Age { hva_page: 1025, pages: 1 },
                    Act::Unmap { hva_page: 0, pages: 2, may_block: false },
                ],
            ),
            ThreadSpec::caller([
                Act::DeleteSlot { as_id: 0, id: 1 },
                Act::CreateSlot(SlotSpec { hva_page: 1024, ..SlotSpec::flat(1, 0x40000, 512) }),
            ]),
        ],
    );
    program.setup = guest.setup([
        (V0, map(0x400, 0x40000)),
        (V0, map(0x401, 0x40001)),
        (V0, Act::write(0x400)),
        (V1, Act::write(0x401)),
        (V1, Act::write(0)),
    ]);
    program
}

/// A machine whose second L2 has five levels of nested tables over the four of the first: the first's root is a child too.
pub(crate) fn over_machine(machine: MachineSpec, quota: u32) -> MachineSpec {
    let processes = vec![ProcessSpec::linear(1024), ProcessSpec::over(0)];
    MachineSpec { nested: true, quota: Some(quota), processes, ..machine }
}

fn nested_quota(machine: MachineSpec, _: &KernelProfile) -> Program {
    let mut program = with(
        over_machine(machine, 9),
        vec![
            ThreadSpec::vcpu(
                0,
                [Act::write(0x200), Act::EnterL2 { process: 0 }, Act::read(0x200), Act::LeaveL2],
            ),
            ThreadSpec::vcpu(1, [Act::read(1), Act::Unload, Act::EnterL2 { process: 0 }, Act::write(0x201)]),
            ThreadSpec::caller([Act::FastZap]),
        ],
    );
    program.setup = vec![(V0, Act::write(0)), (V1, Act::EnterL2 { process: 1 }), (V1, Act::read(0))];
    program
}
