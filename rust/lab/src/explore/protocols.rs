//! The protocols by name: for each, the smallest machine and the fewest acts in which its parties can meet in every order.
//!
//! A protocol says who meets, never what goes wrong. It is a program for each zap design and kernel; what a kernel does not have (a change_pte callback, an eager split) is left out of it.
//! Those of the shadow MMU are in `shadow.rs` beside this file.
//!
//! gfns are chosen for the indices they have: 0 and 1 share a leaf table, 0x200 has a leaf table of its own below the same 1 GiB, 0x40000 differs at level 3.

use std::sync::LazyLock;

use tdpmmu_shadow::ShadowDesign;
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{all_design_names, design_info};

use crate::program::{Act, MachineSpec, Program, ProgramError, SlotSpec, ThreadSpec, Who};

/// A protocol: who meets.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// Its name on the command line.
    pub name: &'static str,
    /// Who meets, in one sentence.
    pub about: &'static str,
    /// It is about an L2 on shadow pages beside an L1 on the TDP MMU: no shadow design has that.
    pub(super) nested: bool,
    pub(super) build: fn(MachineSpec, &KernelProfile) -> Program,
}

/// Is it a design of the shadow MMU?
pub fn is_shadow(design: &str) -> bool {
    ShadowDesign::named(design).is_some()
}

impl Protocol {
    /// Is there a program of this protocol under that design?
    pub fn fits(&self, design: &str) -> bool {
        !(self.nested && is_shadow(design))
    }

    /// The program of this protocol under a design, in a kernel.
    ///
    /// # Errors
    /// [`ProgramError::Machine`] for a design or a kernel that does not exist, or a design that the kernel cannot have.
    pub fn program(&self, design: &str, profile: &str) -> Result<Program, ProgramError> {
        let machine = MachineSpec::of(design, profile);
        let kernel = machine.kernel()?;
        if !self.fits(design) {
            let rule =
                format!("{} is about an L2 beside an L1 on the TDP MMU: a design of that one", self.name);
            return Err(ProgramError::Machine { field: "design", value: design.to_owned(), rule });
        }
        // By its name, so that a printed run and its program are one.
        let machine = MachineSpec { design: machine.design_name()?, ..machine };
        let mut program = (self.build)(machine, &kernel);
        self.name.clone_into(&mut program.name);
        program.check()?;
        Ok(program)
    }
}

/// The kernel in which a design was, or would have been, and was right. 5.15 itself maps under invalid roots and does not unmap from them: there `inline` falls to bugs 11 and 13
/// of the history; with what 5.16 and 5.18 added it is sound.
pub fn natural_profile(design: &str) -> &'static str {
    match design {
        "in-place" => "5.10",
        "inline" => "5.15,stale-root-check=true,unmap-invalid-roots=true",
        "async-worker" => "5.18",
        "async-worker-owned" => "6.1-async",
        "defunct-flag" | "system-workqueue" | "no-second-phase" | "second-list" | "second-list-worker" => {
            "5.18"
        }
        _ => "6.12",
    }
}

/// Designs that are meant to be right.
pub fn sound_designs() -> Vec<&'static str> {
    let sound = |name: &&str| design_info(name).is_some_and(|info| !info.flawed);
    all_design_names().into_iter().filter(sound).collect()
}

/// Designs that are known to be wrong.
pub fn flawed_designs() -> Vec<&'static str> {
    let flawed = |name: &&str| design_info(name).is_some_and(|info| info.flawed);
    all_design_names().into_iter().filter(flawed).collect()
}

/// The protocol of that name.
pub fn protocol(name: &str) -> Option<&'static Protocol> {
    protocols().iter().find(|protocol| protocol.name == name)
}

static ALL: LazyLock<Vec<Protocol>> =
    LazyLock::new(|| PROTOCOLS.iter().chain(super::shadow::PROTOCOLS).copied().collect());

/// Every protocol.
pub fn protocols() -> &'static [Protocol] {
    &ALL
}

const PROTOCOLS: &[Protocol] = &[
    Protocol {
        name: "root-lifecycle",
        about: "roots are made, shared, lost and made anew by two vCPUs, while a fast zap takes all of them",
        nested: false,
        build: root_lifecycle,
    },
    Protocol {
        name: "fault-zap",
        about: "faults of two vCPUs against a memslot that is deleted",
        nested: false,
        build: fault_zap,
    },
    Protocol {
        name: "yield-put",
        about: "a walk that yields inside a root against the vCPUs that put it",
        nested: false,
        build: yield_put,
    },
    Protocol {
        name: "freeze-install",
        about: "a fault that replaces a table by a huge page against faults below it",
        nested: false,
        build: freeze_install,
    },
    Protocol {
        name: "fastzap-defunct",
        about: "a fast zap against roots that have just lost their last vCPU",
        nested: false,
        build: fastzap_defunct,
    },
    Protocol {
        name: "notifier-invalid",
        about: "the host takes pages away while a fast zap is at the invalid root that maps them",
        nested: false,
        build: notifier_invalid,
    },
    Protocol {
        name: "split-invalidate",
        about: "dirty logging splits huge pages, and allocates, across an invalidation of the root",
        nested: false,
        build: split_invalidate,
    },
    Protocol {
        name: "zapall-worker",
        about: "the end of the VM against a zap that has given mmu_lock up in the middle",
        nested: false,
        build: zapall_worker,
    },
    Protocol {
        name: "dirtylog-zap",
        about: "a dirty log is collected while vCPUs write and the host takes pages away",
        nested: false,
        build: dirtylog_zap,
    },
    Protocol {
        name: "lockless-free",
        about: "walks without mmu_lock, and fast page faults, against tables that are freed",
        nested: false,
        build: lockless_free,
    },
    Protocol {
        name: "teardown-worker",
        about: "the VM loses its last file descriptor while roots are on their way to a worker",
        nested: false,
        build: teardown_worker,
    },
    Protocol {
        name: "slots-faults",
        about: "memslots come, move and change their backing while vCPUs prefault and fault, in both address spaces",
        nested: false,
        build: slots_faults,
    },
    Protocol {
        name: "nx-recovery",
        about: "the NX recovery thread and an nx_huge_pages toggle against fetches and writes",
        nested: false,
        build: nx_recovery,
    },
    Protocol {
        name: "ring-reset",
        about: "dirty rings are harvested and reset while vCPUs fill them and the host takes pages away",
        nested: false,
        build: ring_reset,
    },
    Protocol {
        name: "aging-zap",
        about: "aging, and a page that moves, against faults and a zap of a range",
        nested: false,
        build: aging_zap,
    },
];

pub(super) fn with(machine: MachineSpec, threads: Vec<ThreadSpec>) -> Program {
    Program { machine, ..Program::new("", threads) }
}

pub(super) const V0: Who = Who::Vcpu(0);
pub(super) const V1: Who = Who::Vcpu(1);

fn root_lifecycle(machine: MachineSpec, _: &KernelProfile) -> Program {
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(0), Act::DropRoot, Act::write(1), Act::Unload]),
            ThreadSpec::vcpu(
                1,
                [Act::read(0), Act::SwitchRole { variant: 1 }, Act::write(0x200), Act::Unload],
            ),
            ThreadSpec::caller([Act::FastZap]),
        ],
    );
    program.setup = vec![(V0, Act::write(0))];
    program
}

fn fault_zap(machine: MachineSpec, _: &KernelProfile) -> Program {
    let machine =
        MachineSpec { slots: vec![SlotSpec::flat(0, 0, 1024), SlotSpec::flat(1, 0x40000, 512)], ..machine };
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(0), Act::write(0x40000), Act::write(1)]),
            ThreadSpec::vcpu(1, [Act::read(0x40000), Act::fetch(0x200), Act::Speculate { gfn: 0x40001 }]),
            ThreadSpec::caller([Act::DeleteSlot { as_id: 0, id: 1 }]),
        ],
    );
    // Where roots die with their last user vCPU 0 has used up its cache of tables by then, and must ask for more in a fault.
    program.setup =
        [Act::read(0), Act::DropRoot, Act::read(0), Act::DropRoot, Act::read(0), Act::read(0x200)]
            .map(|act| (V0, act))
            .into();
    program.setup.push((V1, Act::write(0x40001)));
    program
}

fn yield_put(machine: MachineSpec, _: &KernelProfile) -> Program {
    let unmap = |hva_page, pages| Act::Unmap { hva_page, pages, may_block: true };
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::DropRoot, Act::write(0), Act::Unload]),
            ThreadSpec::vcpu(1, [Act::Unload, Act::SwitchRole { variant: 2 }, Act::read(1)]),
            ThreadSpec::other(0, "host", [unmap(0, 0x201), unmap(1, 1)]),
        ],
    );
    program.setup = vec![
        (V0, Act::write(0)),
        (V0, Act::write(0x200)),
        (V1, Act::SwitchRole { variant: 1 }),
        (V1, Act::write(1)),
        (V1, Act::write(0x200)),
    ];
    program
}

/// Huge pages where there was a table: the host has collapsed what is behind it.
fn freeze_install(machine: MachineSpec, _: &KernelProfile) -> Program {
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(0), Act::write(0x201)]),
            ThreadSpec::vcpu(1, [Act::write(1), Act::read(0x200), Act::LookUp { gfn: 0 }]),
            ThreadSpec::caller([Act::ZapRange { gfn: 0, pages: 1 }, Act::FastZap]),
        ],
    );
    program.setup = vec![
        (V0, Act::write(0)),
        (V0, Act::write(0x200)),
        (Who::Caller, Act::SetHostLevel { gfn: 0, pages: 1024, level: 2 }),
    ];
    program
}

fn fastzap_defunct(machine: MachineSpec, _: &KernelProfile) -> Program {
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::Unload, Act::read(0)]),
            ThreadSpec::vcpu(1, [Act::DropRoot, Act::Unload]),
            ThreadSpec::caller([Act::FastZap, Act::FastZap]),
        ],
    );
    program.setup = vec![
        (V0, Act::write(0)),
        (V1, Act::SwitchRole { variant: 1 }),
        (V1, Act::write(0)),
        (V1, Act::write(0x200)),
    ];
    program
}

fn notifier_invalid(machine: MachineSpec, _: &KernelProfile) -> Program {
    let machine =
        MachineSpec { slots: vec![SlotSpec::flat(0, 0, 1024), SlotSpec::flat(1, 0x40000, 512)], ..machine };
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(0), Act::write(0x200)]),
            ThreadSpec::other(0, "host", [Act::Unmap { hva_page: 0, pages: 2, may_block: true }]),
            ThreadSpec::caller([Act::DeleteSlot { as_id: 0, id: 1 }]),
        ],
    );
    program.setup = vec![
        (V0, Act::write(0)),
        (V0, Act::write(1)),
        (V1, Act::SwitchRole { variant: 1 }),
        (V1, Act::read(1)),
    ];
    program
}

fn split_invalidate(machine: MachineSpec, _: &KernelProfile) -> Program {
    let machine = MachineSpec { host_level: 2, ..machine };
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(1), Act::write(0x200), Act::write(0)]),
            ThreadSpec::caller([
                Act::SetSlotFlags { as_id: 0, id: 0, log: true },
                Act::GetDirtyLog { as_id: 0, id: 0 },
            ]),
            ThreadSpec::other(0, "nx", [Act::FastZap]),
        ],
    );
    program.setup = vec![(V0, Act::write(0)), (V0, Act::write(0x200)), (V1, Act::read(0))];
    program
}

fn zapall_worker(machine: MachineSpec, _: &KernelProfile) -> Program {
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(1), Act::DropRoot, Act::Unload]),
            ThreadSpec::caller([Act::FastZap, Act::Close]),
        ],
    );
    program.setup = vec![(V0, Act::write(0)), (V0, Act::write(0x200)), (V1, Act::read(0))];
    program.end_races = true;
    program
}

fn dirtylog_zap(machine: MachineSpec, _: &KernelProfile) -> Program {
    let machine = MachineSpec { slots: vec![SlotSpec::flat(0, 0, 128).logged()], ..machine };
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(0), Act::write(1), Act::write(0)]),
            ThreadSpec::caller([
                Act::GetDirtyLog { as_id: 0, id: 0 },
                Act::SetLogProtect { manual: true, initially_set: false },
                Act::ClearDirtyLog { as_id: 0, id: 0, first: 0, mask: 3 },
                Act::GetDirtyLog { as_id: 0, id: 0 },
            ]),
            ThreadSpec::other(0, "host", [Act::Unmap { hva_page: 0, pages: 1, may_block: true }]),
        ],
    );
    program.setup = vec![(V0, Act::write(0)), (V1, Act::read(1))];
    program
}

fn lockless_free(machine: MachineSpec, _: &KernelProfile) -> Program {
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::LookUp { gfn: 0 }, Act::write(0), Act::LookUp { gfn: 0x200 }]),
            ThreadSpec::vcpu(1, [Act::write(0), Act::Speculate { gfn: 0x200 }, Act::DropRoot]),
            ThreadSpec::caller([
                Act::WriteProtect { as_id: 0, gfn: 0 },
                Act::ZapRange { gfn: 0, pages: 1024 },
                Act::Synchronize,
            ]),
        ],
    );
    program.setup = vec![
        (V0, Act::write(0)),
        (V0, Act::write(0x200)),
        (V1, Act::read(0)),
        (Who::Caller, Act::SetSlotFlags { as_id: 0, id: 0, log: true }),
    ];
    program
}

fn teardown_worker(machine: MachineSpec, _: &KernelProfile) -> Program {
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::SwitchRole { variant: 1 }, Act::read(0), Act::Unload]),
            ThreadSpec::caller([Act::FastZap, Act::ReleaseUser]),
            ThreadSpec::other(0, "reaper", [Act::FlushWorkers, Act::Close]),
        ],
    );
    program.setup = vec![(V0, Act::write(0)), (V1, Act::read(0x200))];
    program.end_races = true;
    program
}

fn slots_faults(machine: MachineSpec, kernel: &KernelProfile) -> Program {
    let machine = MachineSpec {
        smm: true,
        slots: vec![SlotSpec::flat(0, 0, 256), SlotSpec { read_only: true, ..SlotSpec::flat(1, 0x200, 64) }],
        ..machine
    };
    let mut caller = vec![
        Act::CreateSlot(SlotSpec { hva_page: 256, ..SlotSpec::flat(2, 0x400, 64) }),
        Act::MoveSlot { as_id: 0, id: 2, gfn: 0x40000 },
        Act::Raise { flag: 0 },
    ];
    if kernel.slot_zap_quirk {
        caller.insert(1, Act::SetSlotZapAll { on: false });
    }
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::PreFault { gfn: 0, pages: 2 }, Act::write(0x400), Act::write(0x40000)]),
            ThreadSpec::vcpu(
                1,
                [
                    Act::EnterSmm,
                    Act::write(0),
                    Act::ExitSmm,
                    Act::read(0x200),
                    Act::WaitFor { flag: 0 },
                    Act::Poll,
                ],
            ),
            ThreadSpec::caller(caller),
        ],
    );
    program.setup = vec![(V0, Act::LoadRoot), (V1, Act::read(0))];
    program
}

fn nx_recovery(machine: MachineSpec, _: &KernelProfile) -> Program {
    let machine = MachineSpec { host_level: 2, nx: true, ..machine };
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::fetch(0x201), Act::write(0), Act::Leave]),
            ThreadSpec::other(
                0,
                "recovery",
                [Act::RecoverNx { ratio: 1 }, Act::Yield, Act::RecoverNx { ratio: 1 }],
            ),
            ThreadSpec::caller([Act::SetNx { on: false }]),
        ],
    );
    program.setup = vec![(V0, Act::fetch(0)), (V1, Act::write(0x200))];
    program
}

fn ring_reset(machine: MachineSpec, _: &KernelProfile) -> Program {
    let slots = vec![SlotSpec::flat(0, 0, 128).logged()];
    let dirty_mode = if is_shadow(&machine.design) { "write-protect" } else { "d-bits" }.into();
    let machine = MachineSpec { ring: Some(1024), dirty_mode, slots, ..machine };
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(0), Act::write(1), Act::Enter, Act::write(0)]),
            ThreadSpec::caller([Act::CollectRings, Act::ResetRings, Act::CollectRings, Act::ResetRings]),
            ThreadSpec::other(0, "host", [Act::Unmap { hva_page: 1, pages: 1, may_block: false }]),
        ],
    );
    program.setup = vec![(V0, Act::write(0)), (V1, Act::read(0))];
    program
}

fn aging_zap(machine: MachineSpec, kernel: &KernelProfile) -> Program {
    let mut host = vec![
        Act::Age { hva_page: 0, pages: 2 },
        Act::ReplacePage { hva_page: 0, writable: true },
        Act::TestAge { hva_page: 0, pages: 1 },
        Act::AgeFlush { hva_page: 1, pages: 1 },
    ];
    if kernel.set_spte_gfn {
        host.insert(2, Act::ChangePte { hva_page: 1, writable: false });
    }
    let mut program = with(
        machine,
        vec![
            ThreadSpec::vcpu(0, [Act::write(0), Act::read(1), Act::write(1)]),
            ThreadSpec::other(0, "host", host),
            ThreadSpec::caller([Act::ZapRange { gfn: 0, pages: 2 }, Act::RcuBarrier]),
        ],
    );
    program.setup = vec![
        (V0, Act::write(0)),
        (V0, Act::write(1)),
        (V1, Act::read(0)),
        (Who::Caller, Act::SetEagerSplit { on: false }),
        (Who::Caller, Act::StopVcpus),
        (Who::Caller, Act::ResumeVcpus),
        (Who::Caller, Act::ExclusiveHolds),
    ];
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_protocol_has_a_program_for_each_design_in_its_kernel() {
        for protocol in protocols() {
            for design in all_design_names().into_iter().filter(|design| protocol.fits(design)) {
                if let Err(error) = protocol.program(design, natural_profile(design)) {
                    panic!("{} under {design}: {error}", protocol.name);
                }
            }
        }
    }

    #[test]
    fn a_design_that_a_kernel_cannot_have_is_refused_by_name() {
        let error = protocols()[0].program("sync", "5.10").expect_err("5.10 does not test for stale roots");
        assert!(error.to_string().contains("sync with profile 5.10"), "{error}");
    }
}
