//! The guest's own page tables: their format, and the walk that KVM makes of them in software.
//!
//! **Guarantee.** A walk reads each entry once, from the top down, and returns what it has read: the path is what the guest's memory held at those moments, not at one. Whoever builds shadow
//! pages from it reads an entry again before anything is made from it ([`GuestWalk::still`]). The guest's words are never written: Accessed and Dirty of the guest's
//! entries are left out of this model, so every present entry counts as accessed and every writable one as dirty.
//!
//! **Mechanism.** Long-mode tables of four or five levels, 512 entries of 8 bytes: present (bit 0), writable (1), user (2), page size (7, at levels 2 and 3), frame (12 to 51), no-execute (63). What an access may do is the
//! intersection over the path. A supervisor's access asks for present, writable (CR0.WP is set) and executable; the user bit is carried into the shadow entry, not asked for.

use tdpmmu_platform::Platform;
use tdpmmu_spte::geometry::{MAX_LEVEL, index, span};
use tdpmmu_spte::{Access, LEVEL_1G, LEVEL_2M, LEVEL_4K};

use crate::ShadowHost;

/// One entry of a guest's page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct GuestPte(pub u64);

impl GuestPte {
    /// Maps something.
    pub const PRESENT: u64 = 1;
    /// May be written through.
    pub const WRITE: u64 = 1 << 1;
    /// May be reached from user mode.
    pub const USER: u64 = 1 << 2;
    /// A leaf, above level 1.
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// May not be executed.
    pub const NX: u64 = 1 << 63;
    const FRAME: u64 = ((1 << 52) - 1) & !0xfff;

    /// An entry that points to the guest's table in `gfn`: all access.
    pub const fn table(gfn: u64) -> Self {
        Self((gfn << 12) & Self::FRAME | Self::PRESENT | Self::WRITE | Self::USER)
    }

    /// A leaf at `level` (1 to 3) for `gfn`, whose bits below the level's alignment are dropped.
    pub const fn leaf(gfn: u64, level: u8, access: Access) -> Self {
        let mut raw = ((gfn & !(span(level) - 1)) << 12) & Self::FRAME | Self::PRESENT;
        if level > LEVEL_4K {
            raw |= Self::PAGE_SIZE;
        }
        if access.write {
            raw |= Self::WRITE;
        }
        if access.user {
            raw |= Self::USER;
        }
        if !access.exec {
            raw |= Self::NX;
        }
        Self(raw)
    }

    /// Does it map anything?
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Is it a present leaf at `level`?
    #[inline]
    pub const fn is_leaf(self, level: u8) -> bool {
        self.is_present()
            && (level == LEVEL_4K
                || (level == LEVEL_2M || level == LEVEL_1G) && self.0 & Self::PAGE_SIZE != 0)
    }

    /// The guest frame that it names: of a page, or of a table.
    #[inline]
    pub const fn gfn(self) -> u64 {
        (self.0 & Self::FRAME) >> 12
    }

    /// What it allows.
    #[inline]
    pub const fn access(self) -> Access {
        Access {
            write: self.0 & Self::WRITE != 0,
            exec: self.0 & Self::NX == 0,
            user: self.0 & Self::USER != 0,
        }
    }
}

/// What both allow.
#[inline]
pub(crate) const fn both(a: Access, b: Access) -> Access {
    Access { write: a.write && b.write, exec: a.exec && b.exec, user: a.user && b.user }
}

/// A path through the guest's tables that allows an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestWalk {
    /// The entry read at each level (1 to 5); 0 where none was read.
    pub ptes: [u64; 6],
    /// The gfn of the table that it was read from.
    pub tables: [u64; 6],
    /// Levels of the guest's tables: 4 or 5.
    pub levels: u8,
    /// Level of the guest's leaf: 1, 2 or 3.
    pub level: u8,
    /// The page asked for (a virtual page number).
    pub page: u64,
    /// The guest frame that `page` translates to.
    pub gfn: u64,
    /// What the whole path allows.
    pub access: Access,
}

impl GuestWalk {
    /// What the entries *above* a table of `level` allow: the access in the role of the shadow page of that table. Everything, at the top.
    pub fn access_above(&self, level: u8) -> Access {
        (level + 1..=self.levels)
            .fold(Access::ALL, |access, at| both(access, GuestPte(self.ptes[usize::from(at)]).access()))
    }

    /// Does the guest's entry at `level` still hold what the walk read?
    pub fn still<P: Platform>(&self, host: &dyn ShadowHost<P>, as_id: u8, level: u8) -> bool {
        let table = self.tables[usize::from(level)];
        let index = index(self.page, level) as u16;
        host.read_guest(as_id, table, index) == self.ptes[usize::from(level)]
    }
}

/// The guest's own page fault: its tables do not allow the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum GuestFault {
    /// An entry on the path is not present.
    #[error("guest page {page:#x}: the guest's entry at level {level} is not present")]
    NotPresent {
        /// The page asked for.
        page: u64,
        /// Level of the entry.
        level: u8,
    },
    /// The path allows less than was asked.
    #[error("guest page {page:#x}: the guest's tables do not allow the access (leaf at level {level})")]
    Protection {
        /// The page asked for.
        page: u64,
        /// Level of the leaf.
        level: u8,
    },
    /// The number of levels is none that long mode has.
    #[error("guest paging with {levels} levels: must be 4 or 5")]
    Levels {
        /// What was given.
        levels: u8,
    },
}

/// Walks the guest's tables for `page` (a virtual page number) from the table in `cr3_gfn`, of 4 or 5 `levels`, on behalf of an access that writes or executes, or only reads.
///
/// # Errors
/// [`GuestFault`]: what a CPU would raise in the guest.
pub fn walk_guest<P: Platform>(
    host: &dyn ShadowHost<P>,
    as_id: u8,
    cr3_gfn: u64,
    levels: u8,
    page: u64,
    write: bool,
    exec: bool,
) -> Result<GuestWalk, GuestFault> {
    if !(4..=MAX_LEVEL).contains(&levels) {
        return Err(GuestFault::Levels { levels });
    }
    let mut walk =
        GuestWalk { ptes: [0; 6], tables: [0; 6], levels, level: levels, page, gfn: 0, access: Access::ALL };
    let (mut table, mut level) = (cr3_gfn, levels);
    loop {
        let pte = GuestPte(host.read_guest(as_id, table, index(page, level) as u16));
        walk.ptes[usize::from(level)] = pte.0;
        walk.tables[usize::from(level)] = table;
        if !pte.is_present() {
            return Err(GuestFault::NotPresent { page, level });
        }
        walk.access = both(walk.access, pte.access());
        if pte.is_leaf(level) {
            let within = span(level) - 1;
            walk.level = level;
            walk.gfn = pte.gfn() & !within | page & within;
            break;
        }
        table = pte.gfn();
        level -= 1;
    }
    if write && !walk.access.write || exec && !walk.access.exec {
        return Err(GuestFault::Protection { page, level });
    }
    Ok(walk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_what_it_was_made_from() {
        let some = Access { write: false, exec: false, user: true };
        let leaf = GuestPte::leaf(0x12345, LEVEL_2M, some);
        assert!(leaf.is_leaf(LEVEL_2M) && leaf.is_leaf(LEVEL_4K) && !leaf.is_leaf(4));
        assert_eq!((leaf.gfn(), leaf.access()), (0x12200, some));
        let table = GuestPte::table(0x77);
        assert!(table.is_present() && !table.is_leaf(2) && table.is_leaf(1));
        assert_eq!((table.gfn(), table.access()), (0x77, Access::ALL));
        assert!(!GuestPte(0).is_present());
    }
}
