//! A guest whose own page tables are shadowed: they are there before it runs, as a boot loader leaves them.

use tdpmmu_platform::{Platform, Role as TaskRole};
use tdpmmu_spte::geometry::{ENTRIES, round_up, span, tables_below_root};
use tdpmmu_vm::slots::Region;
use tdpmmu_vm::{GuestOs, SlotFlags, Vm};

use super::internal;
use crate::LabError;

/// The memslot of the guest's tables.
const SLOT: u16 = 502;

/// Pages for the tables of a guest of `pages` pages mapped at `level`: the tables, and those of a direct map over them.
pub(super) fn table_pages(pages: u64, level: u8, levels: u8) -> u64 {
    let tables = tables_below_root(pages, level, levels) + 1;
    tables + tables.div_ceil(ENTRIES as u64) + 8
}

/// Maps all of the guest's memory one to one by pages of `level`, in tables of its own, and points every vCPU's CR3 there. They lie in a memslot of their own, a GiB behind the memory: the guest does not
/// touch them while it runs. Returns how many there are.
pub(crate) fn build<P: Platform>(vm: &Vm<P>, pages: u64, level: u8, levels: u8) -> Result<u64, LabError> {
    let task = vm.task("guest-tables", TaskRole::Caller);
    let base = round_up(pages, 3) + span(3);
    let count = table_pages(pages, level, levels);
    let hva =
        vm.side().primary.region(count, base, 1, true).map_err(internal("memory for the guest's tables"))?;
    let region = Region { id: SLOT, as_id: 0, base, pages: count, hva, flags: SlotFlags::default() };
    vm.set_memslot(&task, &region).map_err(internal("the guest's tables"))?;
    let guest = GuestOs::new(0, base..base + count);
    let fail = internal("the guest's tables");
    let cr3 = guest.new_process(vm).map_err(&fail)?;
    guest.build_linear(vm, cr3, 0..pages, 0, level).map_err(&fail)?;
    for id in 0..vm.vcpu_count() {
        vm.vcpu(id).and_then(|mut vcpu| vcpu.set_cr3(cr3)).map_err(&fail)?;
    }
    Ok(guest.tables())
}
