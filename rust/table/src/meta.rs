//! What is known about a table beside its entries: 40 bytes, written before the table is published.
//!
//! Everything is an atomic with relaxed accesses: the fields are written by the one task that owns the unpublished table and
//! become visible with the release of the publishing compare-exchange (rule R9). After that only the reference count, the flags
//! and the links change, each under the rule named at the field.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// `parent_table` of a root, or of a table that is not linked yet.
pub const NO_PARENT: u32 = u32::MAX;

/// Bits of [`TableMeta::flags`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TableFlag {
    /// This root is invalid (mirrors role.invalid for quick tests); set under mmu_lock, never cleared.
    Invalid = 1,
    /// This root waits to be zapped by a fast zap (6.6+, 6.1.y); under slots_lock.
    Scheduled = 2,
    /// The table exists because of the NX huge-page mitigation.
    NxDisallowed = 4,
    /// On the root list; of a table that is no root: on the NX candidate list.
    Listed = 8,
    /// The last reference of this root was dropped while it was valid (design `defunct-flag`).
    Defunct = 16,
    /// Teardown of this table has begun (kept only for NX accounting that comes after the link, up to 6.1).
    Unlinked = 32,
    /// A shadow page that was handed over for freeing and waits for readers; counted by the pool until it is back.
    Waiting = 64,
}

/// One table's header. See the module text for who may write what.
#[repr(C)]
pub struct TableMeta {
    gfn: AtomicU64,
    role: AtomicU32,
    parent_table: AtomicU32,
    parent_index: AtomicU16,
    level: AtomicU8,
    flags: AtomicU8,
    /// Root reference count (roots only).
    pub refs: AtomicU32,
    /// Intrusive link of the RCU deferred list, and of the chain being built for it.
    pub rcu_link: AtomicU32,
    /// Root list or NX candidate list.
    pub next: AtomicU32,
    /// Back link of the same list.
    pub prev: AtomicU32,
    /// Link of a list that the zap design keeps of roots, beside the root list.
    pub second: AtomicU32,
}

const _: () = assert!(size_of::<TableMeta>() == 40, "memory beside the tables stays under 64 bytes a table");

impl TableMeta {
    /// Fills the header of a table that nobody else can see yet.
    pub fn init(&self, role: u32, gfn: u64, level: u8, parent: Option<(u32, u16)>) {
        let (table, index) = parent.unwrap_or((NO_PARENT, 0));
        self.gfn.store(gfn, Relaxed);
        self.role.store(role, Relaxed);
        self.level.store(level, Relaxed);
        self.parent_table.store(table, Relaxed);
        self.parent_index.store(index, Relaxed);
        self.flags.store(0, Relaxed);
        self.refs.store(0, Relaxed);
        self.next.store(u32::MAX, Relaxed);
        self.prev.store(u32::MAX, Relaxed);
        self.second.store(u32::MAX, Relaxed);
    }

    /// First gfn that the table covers.
    #[inline]
    pub fn gfn(&self) -> u64 {
        self.gfn.load(Relaxed)
    }

    /// Level of the table's entries' table: 1 holds 4 KiB leaves.
    #[inline]
    pub fn level(&self) -> u8 {
        self.level.load(Relaxed)
    }

    /// The role word (`tdpmmu_spte::role`).
    #[inline]
    pub fn role(&self) -> u32 {
        self.role.load(Relaxed)
    }

    /// Replaces the role word atomically and returns the old one (invalidation).
    #[inline]
    pub fn swap_role(&self, role: u32) -> u32 {
        self.role.swap(role, std::sync::atomic::Ordering::AcqRel)
    }

    /// The entry that links this table: (table, index); `None` for a root.
    #[inline]
    pub fn parent(&self) -> Option<(u32, u16)> {
        match self.parent_table.load(Relaxed) {
            NO_PARENT => None,
            table => Some((table, self.parent_index.load(Relaxed))),
        }
    }

    /// Is the flag set?
    #[inline]
    pub fn has(&self, flag: TableFlag) -> bool {
        self.flags.load(std::sync::atomic::Ordering::Acquire) & flag as u8 != 0
    }

    /// Sets the flag; returns whether it was set before.
    pub fn set(&self, flag: TableFlag) -> bool {
        self.flags.fetch_or(flag as u8, std::sync::atomic::Ordering::AcqRel) & flag as u8 != 0
    }

    /// Clears the flag; returns whether it was set before.
    pub fn clear(&self, flag: TableFlag) -> bool {
        self.flags.fetch_and(!(flag as u8), std::sync::atomic::Ordering::AcqRel) & flag as u8 != 0
    }
}
