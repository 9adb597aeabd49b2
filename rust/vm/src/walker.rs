//! The hardware page walker of one vCPU.
//!
//! **Guarantee.** It trusts nothing but bits: no lock, no RCU, no refcount. It begins at the lowest table that the paging-structure cache
//! remembers (which may have been unlinked, even recycled, if somebody forgot a flush), follows present entries, sets Accessed and
//! Dirty by compare-exchange as hardware does, and fills the caches. What stops it is what stops a CPU: an entry that is not present, a permission
//! that is missing, the MMIO pattern.
//!
//! **Mechanism.** Entries are read through the pool, whose pages stay mapped for its life: a stale pointer reads a recycled page, as in a real
//! machine, and the owner tags of frames (`frames.rs`) tell.

use tdpmmu_platform::{Event, Platform, Site, Task};
use tdpmmu_spte::geometry::{index, round_down};
use tdpmmu_spte::{Format, Spte};
use tdpmmu_table::TablePool;

use crate::tlb::Tlb;

/// An access that the guest makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAccess {
    /// Where.
    pub gfn: u64,
    /// A write.
    pub write: bool,
    /// An instruction fetch.
    pub exec: bool,
}

impl GuestAccess {
    /// A read of `gfn`.
    pub const fn read(gfn: u64) -> Self {
        Self { gfn, write: false, exec: false }
    }

    /// A write to `gfn`.
    pub const fn write(gfn: u64) -> Self {
        Self { gfn, write: true, exec: false }
    }

    /// A fetch from `gfn`.
    pub const fn fetch(gfn: u64) -> Self {
        Self { gfn, write: false, exec: true }
    }
}

/// Why hardware gave up and the guest exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardwareFault {
    /// An entry on the path is not present.
    NotPresent,
    /// The leaf is present and does not allow the access (the P bit of the error code is set).
    Protection,
    /// The MMIO pattern (EPT misconfiguration, reserved bit on NPT), with the entry.
    Mmio(Spte),
}

/// Walks for `access` under `root`, filling `tlb`; `levels` is the level of the root. Returns the leaf, and whether this walk has set its Dirty bit.
///
/// # Errors
/// The fault that a CPU would raise.
pub fn walk<P: Platform>(
    task: &Task<P>,
    pool: &TablePool,
    format: &Format,
    tlb: &mut Tlb,
    root: u32,
    levels: u8,
    access: GuestAccess,
) -> Result<(Spte, bool), HardwareFault> {
    if task.wants_detail() {
        walk_told::<P>(task, pool, format, tlb, root, levels, access)
    } else {
        walk_as::<P, false>(task, pool, format, tlb, root, levels, access)
    }
}

#[cold]
fn walk_told<P: Platform>(
    task: &Task<P>,
    pool: &TablePool,
    format: &Format,
    tlb: &mut Tlb,
    root: u32,
    levels: u8,
    access: GuestAccess,
) -> Result<(Spte, bool), HardwareFault> {
    walk_as::<P, true>(task, pool, format, tlb, root, levels, access)
}

/// [`walk`], with its events or without.
#[inline(always)]
fn walk_as<P: Platform, const TOLD: bool>(
    task: &Task<P>,
    pool: &TablePool,
    format: &Format,
    tlb: &mut Tlb,
    root: u32,
    levels: u8,
    access: GuestAccess,
) -> Result<(Spte, bool), HardwareFault> {
    let vcpu = if TOLD { task.vcpu().unwrap_or(0) as u32 } else { 0 };
    let gfn = access.gfn;
    let (mut level, mut table) = tlb.structure(root, gfn).unwrap_or((levels, root));
    if TOLD && table != root {
        task.detail(|| Event::StructureUse { vcpu, root, gfn, level, table });
    }
    loop {
        let cell = &pool.entries(table)[index(access.gfn, level)];
        let entry = Spte(P::load(cell, Site::WalkLockless));
        if format.is_mmio(entry) {
            return Err(HardwareFault::Mmio(entry));
        }
        if !format.hardware_present(entry) {
            return Err(HardwareFault::NotPresent);
        }
        // Hardware knows bit 7, not bit 11.
        let leaf = level == 1 || level <= 3 && entry.raw() & Spte::PAGE_SIZE != 0;
        if leaf {
            let denied = access.write && !format.is_writable(entry)
                || access.exec && !format.is_executable(entry)
                || !access.write && !access.exec && entry.raw() & 1 == 0;
            if denied {
                return Err(HardwareFault::Protection);
            }
            let mut marked = entry;
            if format.ad_enabled(entry) {
                marked = format.with_accessed(marked);
                if access.write {
                    marked = format.with_dirty(marked);
                }
            }
            if marked != entry && P::cmpxchg(cell, entry.raw(), marked.raw(), Site::SpteAd).is_err() {
                // It changed under the walk: look again at what it is now.
                continue;
            }
            if TOLD && marked != entry {
                let (gfn, old, new) = (round_down(gfn, level), entry.raw(), marked.raw());
                task.detail(|| Event::SpteMarked { root, table, gfn, level, old, new });
            }
            let dirty = !format.ad_enabled(marked) || marked.raw() & format.dirty != 0;
            let write = format.is_writable(marked) && dirty;
            tlb.fill(root, access.gfn, level, marked, write, format.is_executable(marked));
            if TOLD {
                task.detail(|| Event::TlbFill { vcpu, root, gfn, level, spte: marked.raw() });
            }
            return Ok((marked, format.is_dirty(marked) && !format.is_dirty(entry)));
        }
        if level == 1 {
            return Err(HardwareFault::NotPresent);
        }
        table = entry.pfn() as u32;
        level -= 1;
        tlb.fill_structure(root, access.gfn, level, table);
        if TOLD {
            task.detail(|| Event::StructureFill { vcpu, root, gfn, level, table });
        }
    }
}
