//! The guest's own page tables, in a machine whose guest translates by them: processes, and what vCPUs store into their tables.
//!
//! As in `machine.rs`: plain values in, plain values out, every operation through the gate. The tables lie in a memslot of their own, far from any memory: its gfns are nobody's business but the guest's.

use tdpmmu_platform::Real;
use tdpmmu_spte::geometry::span;
use tdpmmu_vm::{GuestOs, Region, SlotFlags, Vm};

use crate::error::Fault;
use crate::machine::{Machine, wrong};

/// The memslot of the guest's tables: the last id there is.
const TABLE_SLOT: u16 = 32_763;
/// Their first gfn, at 64 TiB: memory ends below.
const TABLE_BASE: u64 = 1 << 34;
/// Pages for tables beyond those that map all of memory once: 64 MiB.
const SPARE: u64 = 1 << 14;

/// The guest's processes.
pub struct GuestTables {
    os: GuestOs<Real>,
    /// What every vCPU runs at first: a virtual page is the gfn of the same number.
    boot: u64,
    /// Pages that `boot` maps, from 0 on.
    pub pages: u64,
}

impl GuestTables {
    /// Builds the first process of a VM with `pages` of memory from gfn 0 on, mapped by pages of `level` as far as they go, and lets every vCPU run it.
    pub fn new(vm: &Vm<Real>, pages: u64, level: u8) -> Result<Self, Fault> {
        if pages > TABLE_BASE {
            let message = format!(
                "memory={} bytes: at most 64 TiB where the guest has tables of its own",
                pages * 4096
            );
            return Err(Fault::Invalid(message));
        }
        // One entry in 512 is a table's at each level; the tables map themselves once as well.
        let tables = SPARE + pages / 500;
        let primary = &vm.side().primary;
        let hva = primary.region(tables, TABLE_BASE, 1, true).map_err(wrong)?;
        let region = Region {
            id: TABLE_SLOT,
            as_id: 0,
            base: TABLE_BASE,
            pages: tables,
            hva,
            flags: SlotFlags::default(),
        };
        vm.set_memslot(&vm.task("guest", tdpmmu_platform::Role::Caller), &region).map_err(wrong)?;
        let os = GuestOs::new(0, TABLE_BASE..TABLE_BASE + tables);
        let boot = os.new_process(vm).map_err(wrong)?;
        let whole = pages / span(level) * span(level);
        os.build_linear(vm, boot, 0..whole, 0, level).map_err(wrong)?;
        os.build_linear(vm, boot, whole..pages, whole, 1).map_err(wrong)?;
        for id in 0..vm.vcpu_count() {
            vm.vcpu(id).and_then(|mut vcpu| vcpu.set_cr3(boot)).map_err(wrong)?;
        }
        Ok(Self { os, boot, pages })
    }
}

impl Machine {
    fn guest(&self) -> Result<&GuestTables, Fault> {
        self.guest.as_ref().ok_or_else(|| {
            let paging = self.vm.paging().name();
            let why = "the guest's own tables are shadowed under paging=\"guest\" only";
            Fault::Unsupported(format!("guest: this VM has paging {paging:?}, and {why}"))
        })
    }

    /// What all vCPUs ran at first.
    pub fn guest_boot(&self) -> Result<u64, Fault> {
        let _inside = self.enter("guest")?;
        Ok(self.guest()?.boot)
    }

    /// A new process: its CR3.
    pub fn guest_process(&self) -> Result<u64, Fault> {
        let _inside = self.enter("guest.process")?;
        self.guest()?.os.new_process(&self.vm).map_err(wrong)
    }

    /// Stores of a vCPU map a virtual page.
    pub fn guest_map(
        &self,
        vcpu: usize,
        cr3: u64,
        (gva, gfn, level): (u64, u64, u8),
        writable: bool,
    ) -> Result<(), Fault> {
        let _inside = self.enter("guest.map")?;
        let guest = self.guest()?;
        let mut vcpu = self.vm.vcpu(vcpu).map_err(wrong)?;
        guest.os.map(&mut vcpu, cr3, gva, gfn, level, writable).map_err(wrong)
    }

    /// A store of a vCPU takes a page out; whether there was one.
    pub fn guest_unmap(&self, vcpu: usize, cr3: u64, gva: u64) -> Result<bool, Fault> {
        let _inside = self.enter("guest.unmap")?;
        let guest = self.guest()?;
        let mut vcpu = self.vm.vcpu(vcpu).map_err(wrong)?;
        guest.os.unmap(&mut vcpu, cr3, gva).map_err(wrong)
    }

    /// The vCPU loads CR3.
    pub fn guest_switch(&self, vcpu: usize, cr3: u64) -> Result<(), Fault> {
        let _inside = self.enter("guest.switch")?;
        self.guest()?;
        self.vm.vcpu(vcpu).and_then(|mut vcpu| vcpu.set_cr3(cr3)).map_err(wrong)
    }

    /// The vCPU forgets one translation, or all of its process.
    pub fn guest_invalidate(&self, vcpu: usize, gva: Option<u64>) -> Result<(), Fault> {
        let _inside = self.enter("guest.invalidate")?;
        self.guest()?;
        let mut vcpu = self.vm.vcpu(vcpu).map_err(wrong)?;
        match gva {
            Some(gva) => vcpu.invlpg(gva),
            None => vcpu.flush_guest_tlb(),
        }
        Ok(())
    }

    /// What a process's tables say: gfn of the page itself, level, writable.
    pub fn guest_translate(&self, cr3: u64, gva: u64) -> Result<Option<(u64, u8, bool)>, Fault> {
        let _inside = self.enter("guest.translate")?;
        let found = self.guest()?.os.translate(&self.vm, cr3, gva);
        Ok(found.map(|walk| (walk.gfn, walk.level, walk.access.write)))
    }
}
