//! The guest's own page tables in a program: processes of a guest that is shadowed, or the nested tables that an L1 keeps for its L2s.
//!
//! **Guarantee.** All of them are there before a vCPU runs, built from the host's side; afterwards only vCPUs change them, by the guest's own stores.
//!
//! **Mechanism.** Tables lie in a memslot of their own, behind the program's host memory. A process maps pages from 0 on to the frames of the same number, as far as it says. One that stands *over* another has a top table one level
//! higher, whose first entry is that other's top table: two L2s, of five and of four levels, then share what is below.

use tdpmmu_platform::Platform;
use tdpmmu_shadow::GuestPte;
use tdpmmu_vm::{GuestOs, Paging, Vm, VmError};

use super::SlotSpec;

/// First gfn of the guest's tables.
pub const TABLES_AT: u64 = 0x80000;
/// Pages for them.
const TABLE_PAGES: u64 = 64;
/// Slot id of their memory.
pub const TABLES_SLOT: u16 = 31;

/// The memslot of the guest's tables, behind `host_pages` pages of host memory.
pub(super) fn tables_slot(host_pages: u64) -> SlotSpec {
    SlotSpec {
        id: TABLES_SLOT,
        gfn: TABLES_AT,
        pages: TABLE_PAGES,
        hva_page: host_pages,
        ..SlotSpec::default()
    }
}

/// Pages of host memory that they need.
pub(super) const fn table_pages() -> u64 {
    TABLE_PAGES
}

/// A process: where its tables begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Gfn of the top table.
    pub cr3: u64,
    /// Levels, 4 or 5.
    pub levels: u8,
}

/// The processes of a program, and who changes their tables.
pub struct Guests<P: Platform> {
    os: GuestOs<P>,
    processes: Vec<Process>,
}

impl<P: Platform> Guests<P> {
    /// Builds the processes of `spec` in the memory of `vm`; vCPUs whose own tables are shadowed begin in the first.
    ///
    /// # Errors
    /// What the VM says of tables, or of a vCPU that is in use.
    pub fn build(vm: &Vm<P>, spec: &[super::ProcessSpec]) -> Result<Self, VmError> {
        let range = TABLES_AT..TABLES_AT + TABLE_PAGES;
        let os = GuestOs::new(0, range.clone());
        let mut processes: Vec<Process> = Vec::new();
        // Pages that the OS has not handed out: from the end.
        let mut last = range.end;
        for one in spec {
            let process = match one.over.and_then(|below| processes.get(below).copied()) {
                Some(below) => {
                    last -= 1;
                    vm.guest_memory().write::<P>(last, 0, GuestPte::table(below.cr3).0);
                    Process { cr3: last, levels: below.levels + 1 }
                }
                None => Process { cr3: os.new_process(vm)?, levels: vm.guest_levels() },
            };
            if one.over.is_none() && one.linear != 0 {
                os.build_linear(vm, process.cr3, 0..one.linear, 0, 1)?;
            }
            processes.push(process);
        }
        if vm.paging() == Paging::Guest
            && let Some(first) = processes.first()
        {
            for id in 0..vm.vcpu_count() {
                vm.vcpu(id)?.set_cr3(first.cr3)?;
            }
        }
        Ok(Self { os, processes })
    }

    /// Who changes tables.
    pub fn os(&self) -> &GuestOs<P> {
        &self.os
    }

    /// Process number `n`.
    ///
    /// # Errors
    /// [`VmError::Config`] without such a process.
    pub fn process(&self, n: usize) -> Result<Process, VmError> {
        let rule = "the machine has no such process";
        let missing = || VmError::Config { what: "process", value: n.to_string(), rule };
        self.processes.get(n).copied().ok_or_else(missing)
    }
}
