//! A guest's operating system, as far as page tables go: it builds them in guest memory, and changes them by stores that the guest makes.
//!
//! **Guarantee.** [`GuestOs::map`] and [`GuestOs::unmap`] touch the tables only as a guest's CPU would: each entry is a store through the vCPU's own translations ([`Vcpu::write_guest`]), which faults, finds the page
//! write-protected, is emulated. Neither flushes: that the guest forgets `invlpg`, or is late with it, is the caller's to decide. A table's page is never used for anything else afterwards.
//!
//! **Mechanism.** A range of gfns for tables, handed out in order. A guest that walks its own tables (no EPT or NPT) reaches them by virtual addresses: every process has, in the upper half of its
//! address space, the same direct map of that range, as Linux guests do. Where the vCPU's addresses are guest-physical (an L1 that keeps nested tables), the page is reached by its gfn. One lock per guest, taken outside of the
//! guest: who waits for it answers kicks.
//!
//! What is built from the host's side ([`GuestOs::new_process`], [`GuestOs::build_linear`]) is what was there when the VM was started, or fresh pages: nothing that is shadowed already may be written so.

use std::ops::Range;

use tdpmmu_platform::{Mutex, Platform, Site};
use tdpmmu_shadow::{GuestPte, GuestWalk, walk_guest};
use tdpmmu_spte::geometry::{index, span};
use tdpmmu_spte::{Access, LEVEL_1G, LEVEL_4K};

use crate::config::Paging;
use crate::{AccessOutcome, Vcpu, Vm, VmError};

/// The guest's page tables and who hands out pages for them. See the module text.
pub struct GuestOs<P: Platform> {
    as_id: u8,
    table_gfns: Range<u64>,
    state: Mutex<P, State>,
}

#[derive(Default)]
struct State {
    /// Pages of the range that are tables.
    used: u64,
    /// What the upper half of every process holds in its top table: (index, entry).
    kernel: Option<(u16, u64)>,
}

/// Where a store of one entry goes: by the guest, or from the host's side.
enum By<'a, 'v, P: Platform> {
    Host(&'a Vm<P>),
    Guest(&'a mut Vcpu<'v, P>),
}

impl<P: Platform> By<'_, '_, P> {
    fn vm(&self) -> &Vm<P> {
        match self {
            Self::Host(vm) => vm,
            Self::Guest(vcpu) => vcpu.vm(),
        }
    }

    fn read(&mut self, os: &GuestOs<P>, table: u64, at: u16) -> Result<GuestPte, VmError> {
        Ok(GuestPte(match self {
            Self::Host(vm) => vm.guest_memory().read::<P>(table, at),
            Self::Guest(vcpu) => {
                let gva = os.table_gva(vcpu.vm(), table);
                vcpu.read_guest(gva, at)?
            }
        }))
    }

    fn write(&mut self, os: &GuestOs<P>, table: u64, at: u16, pte: u64) -> Result<(), VmError> {
        match self {
            Self::Host(vm) => {
                vm.guest_memory().write::<P>(table, at, pte);
                Ok(())
            }
            Self::Guest(vcpu) => {
                let gva = os.table_gva(vcpu.vm(), table);
                match vcpu.write_guest(gva, at, pte)? {
                    AccessOutcome::Stopped => Err(VmError::Cancelled),
                    _ => Ok(()),
                }
            }
        }
    }
}

impl<P: Platform> GuestOs<P> {
    /// An operating system whose tables lie in `table_gfns` of address space `as_id`, which a memslot must cover when a vCPU uses them.
    pub fn new(as_id: u8, table_gfns: Range<u64>) -> Self {
        Self { as_id, table_gfns, state: Mutex::new(State::default()) }
    }

    /// The gfns that its tables lie in.
    pub fn table_gfns(&self) -> Range<u64> {
        self.table_gfns.clone()
    }

    /// Pages of guest memory that are tables now.
    pub fn tables(&self) -> u64 {
        self.state.lock().used
    }

    /// First virtual page of the direct map, in a guest whose tables have that many levels: the upper half.
    const fn direct_map(levels: u8) -> u64 {
        1 << (9 * levels as u32 - 1)
    }

    /// The page by which the guest itself reaches its table in `gfn`.
    pub fn table_gva(&self, vm: &Vm<P>, gfn: u64) -> u64 {
        match vm.paging() {
            Paging::Guest => Self::direct_map(vm.guest_levels()) + gfn,
            Paging::Tdp | Paging::Direct => gfn,
        }
    }

    fn new_table(&self, vm: &Vm<P>, state: &mut State) -> Result<u64, VmError> {
        if state.used == 0 {
            vm.guest_memory().declare(self.table_gfns.clone())?;
        }
        let gfn = self.table_gfns.start + state.used;
        if gfn >= self.table_gfns.end {
            return Err(VmError::BadRange {
                as_id: self.as_id,
                start: self.table_gfns.start,
                end: self.table_gfns.end,
                rule: "the guest has no page left for its tables",
            });
        }
        state.used += 1;
        P::point(Site::GuestMemory);
        Ok(gfn)
    }

    /// The table of `level` on the path to `gva`, made where it is missing: its gfn.
    fn table_for(
        &self,
        by: &mut By<'_, '_, P>,
        state: &mut State,
        cr3: u64,
        gva: u64,
        level: u8,
    ) -> Result<u64, VmError> {
        let (mut table, mut at) = (cr3, by.vm().guest_levels());
        while at > level {
            let slot = index(gva, at) as u16;
            let pte = by.read(self, table, slot)?;
            if pte.is_leaf(at) {
                let rule = "a larger page of the guest is in the way: unmap it first";
                return Err(VmError::BadRange { as_id: self.as_id, start: gva, end: gva + 1, rule });
            }
            table = if pte.is_present() {
                pte.gfn()
            } else {
                let new = self.new_table(by.vm(), state)?;
                by.write(self, table, slot, GuestPte::table(new).0)?;
                new
            };
            at -= 1;
        }
        Ok(table)
    }

    /// A new process with nothing mapped but the direct map of the tables, where the guest needs one. Returns its CR3: the gfn of its top table.
    ///
    /// # Errors
    /// [`VmError::BadRange`] without a page for a table; [`VmError::Host`] without address space for their contents.
    pub fn new_process(&self, vm: &Vm<P>) -> Result<u64, VmError> {
        let mut state = self.state.lock();
        let cr3 = self.new_table(vm, &mut state)?;
        if vm.paging() != Paging::Guest {
            return Ok(cr3);
        }
        let levels = vm.guest_levels();
        let first = Self::direct_map(levels) + self.table_gfns.start;
        let top = index(first, levels) as u16;
        if let Some((at, pte)) = state.kernel {
            vm.guest_memory().write::<P>(cr3, at, pte);
            return Ok(cr3);
        }
        let last = Self::direct_map(levels) + self.table_gfns.end - 1;
        if index(last, levels) as u16 != top {
            let rule = "the direct map of the tables lies below one entry of the top table";
            let Range { start, end } = self.table_gfns;
            return Err(VmError::BadRange { as_id: self.as_id, start, end, rule });
        }
        let mut by = By::Host(vm);
        self.fill(&mut by, &mut state, cr3, first..last + 1, self.table_gfns.start, LEVEL_4K)?;
        state.kernel = Some((top, vm.guest_memory().read::<P>(cr3, top)));
        Ok(cr3)
    }

    fn fill(
        &self,
        by: &mut By<'_, '_, P>,
        state: &mut State,
        cr3: u64,
        gvas: Range<u64>,
        gfn0: u64,
        level: u8,
    ) -> Result<(), VmError> {
        let mut gva = gvas.start;
        while gva < gvas.end {
            let table = self.table_for(by, state, cr3, gva, level)?;
            // The rest of this table in one go.
            loop {
                let leaf = GuestPte::leaf(gfn0 + (gva - gvas.start), level, Access::ALL);
                by.write(self, table, index(gva, level) as u16, leaf.0)?;
                gva += span(level);
                if gva >= gvas.end || index(gva, level) == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Maps `gvas` of the process to the guest frames from `gfn0` on, by pages of `level` and with all access, from the host's side: before any vCPU has run in it.
    ///
    /// # Errors
    /// [`VmError::BadRange`] for a range or frame that is not aligned to the level, or without a page for a table.
    pub fn build_linear(
        &self,
        vm: &Vm<P>,
        cr3: u64,
        gvas: Range<u64>,
        gfn0: u64,
        level: u8,
    ) -> Result<(), VmError> {
        self.check(gvas.start | gvas.end | gfn0, level)?;
        self.fill(&mut By::Host(vm), &mut self.state.lock(), cr3, gvas, gfn0, level)
    }

    fn check(&self, aligned: u64, level: u8) -> Result<(), VmError> {
        if (LEVEL_4K..=LEVEL_1G).contains(&level) && aligned.is_multiple_of(span(level)) {
            return Ok(());
        }
        let rule = "pages of the guest are 4K (1), 2M (2) or 1G (3), and aligned";
        Err(VmError::BadRange { as_id: self.as_id, start: aligned, end: aligned.saturating_add(1), rule })
    }

    /// The guest maps `gva` of the process to `gfn` by a page of `level`, by its own stores. What was mapped there by a page of that size is replaced; nothing is flushed.
    ///
    /// # Errors
    /// [`VmError::BadRange`] without alignment, without a page for a table, or below a larger page; as [`Vcpu::write_guest`].
    pub fn map(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        cr3: u64,
        gva: u64,
        gfn: u64,
        level: u8,
        writable: bool,
    ) -> Result<(), VmError> {
        self.check(gva | gfn, level)?;
        vcpu.leave();
        let mut state = self.state.lock();
        let mut by = By::Guest(vcpu);
        let table = self.table_for(&mut by, &mut state, cr3, gva, level)?;
        let leaf = GuestPte::leaf(gfn, level, Access { write: writable, ..Access::ALL });
        by.write(self, table, index(gva, level) as u16, leaf.0)
    }

    /// The guest takes the page that maps `gva` out of the process, of whatever size, by a store of its own; nothing is flushed. False: nothing was mapped.
    ///
    /// # Errors
    /// As [`Vcpu::write_guest`].
    pub fn unmap(&self, vcpu: &mut Vcpu<'_, P>, cr3: u64, gva: u64) -> Result<bool, VmError> {
        vcpu.leave();
        let _lock = self.state.lock();
        let mut by = By::Guest(vcpu);
        let (mut table, mut level) = (cr3, by.vm().guest_levels());
        loop {
            let at = index(gva, level) as u16;
            let pte = by.read(self, table, at)?;
            if !pte.is_present() {
                return Ok(false);
            }
            if pte.is_leaf(level) {
                by.write(self, table, at, 0)?;
                return Ok(true);
            }
            (table, level) = (pte.gfn(), level - 1);
        }
    }

    /// What the process's tables say about `gva` now, read from the host's side.
    pub fn translate(&self, vm: &Vm<P>, cr3: u64, gva: u64) -> Option<GuestWalk> {
        walk_guest::<P>(vm.side(), self.as_id, cr3, vm.guest_levels(), gva, false, false).ok()
    }
}
