//! Building entries: leafs, tables, and what a split or a collapse makes of a leaf.
//!
//! # The guarantee
//!
//! [`Format::make_leaf`] gives the value that the kernel's `make_spte` gives for the same facts, step by step, and
//! says beside it what the caller owes: whether the gfn had to stay write-protected, and whether it must be marked
//! dirty in its slot's bitmap. Every leaf it builds is in one of the four write-permission states.
//!
//! # The surprise
//!
//! Up to 6.12, re-making an entry over one whose W is set skips the step that sets D (what is writable is assumed to
//! be dirty already). The loser of two racing write faults therefore installs an entry *without* D over one with it,
//! and so does a real mapping that replaces an MMIO entry, whose access mask happens to have the W bit. 7.2 sets D
//! whenever it grants W. [`RemakeDirty`] is that difference.

use crate::format::{AdMode, Format, FormatKind};
use crate::geometry::{LEVEL_4K, round_down, span};
use crate::spte::Spte;

/// What the guest may do with a page. Reading is implied by `user`, and on NPT by presence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// May write.
    pub write: bool,
    /// May execute.
    pub exec: bool,
    /// May be reached from user mode; always true for a TDP mapping. On EPT this is R, and an entry with W or X but
    /// without R would be a misconfiguration.
    pub user: bool,
}

impl Access {
    /// Everything: what a TDP root grants.
    pub const ALL: Access = Access { write: true, exec: true, user: true };
    /// Read and execute.
    pub const READ: Access = Access { write: false, exec: true, user: true };

    /// As the kernel's access mask: exec 1, write 2, user 4.
    pub const fn bits(self) -> u64 {
        self.exec as u64 | (self.write as u64) << 1 | (self.user as u64) << 2
    }

    /// From an access mask; bits from 3 up are ignored.
    pub const fn from_bits(bits: u64) -> Access {
        Access { exec: bits & 1 != 0, write: bits & 2 != 0, user: bits & 4 != 0 }
    }
}

impl Default for Access {
    fn default() -> Access {
        Access::ALL
    }
}

/// When a re-made writable entry gets its D bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum RemakeDirty {
    /// Not if the old entry's W bit is set, even in an MMIO entry (up to 6.12).
    #[default]
    SkipWhenOldWritable,
    /// Whenever W is granted (7.2).
    AlwaysSet,
}

/// The facts that decide a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MakeLeaf {
    /// Frame of the host page, aligned to `level` (low bits below the level's alignment are dropped).
    pub pfn: u64,
    /// 1, 2 or 3.
    pub level: u8,
    /// What the mapping should allow.
    pub access: Access,
    /// The page was not touched, only foreseen: no A, or access-tracked.
    pub prefetch: bool,
    /// The host's own mapping is writable and the slot is not read-only.
    pub host_writable: bool,
    /// The shadow MMU needs the gfn write-protected.
    pub write_protected: bool,
    /// The entry that is replaced.
    pub old: Spte,
    /// The slot logs dirty pages.
    pub dirty_tracked: bool,
    /// A/D mode of the table, from its role.
    pub ad_mode: AdMode,
    /// Huge pages must not be executable (the iTLB multihit mitigation).
    pub nx_mitigation: bool,
    /// The kernel's rule for D on a re-make.
    pub remake: RemakeDirty,
}

impl Default for MakeLeaf {
    fn default() -> MakeLeaf {
        MakeLeaf {
            pfn: 0,
            level: LEVEL_4K,
            access: Access::ALL,
            prefetch: false,
            host_writable: true,
            write_protected: false,
            old: Spte(0),
            dirty_tracked: false,
            ad_mode: AdMode::Enabled,
            nx_mitigation: false,
            remake: RemakeDirty::SkipWhenOldWritable,
        }
    }
}

/// A leaf, and what its maker owes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MadeLeaf {
    /// The entry.
    pub spte: Spte,
    /// Write was wanted and refused by the shadow MMU: a write fault must be emulated.
    pub write_protected: bool,
    /// The gfn must be marked dirty in its slot's bitmap, because W is granted on a tracked slot.
    pub mark_dirty: bool,
}

impl Format {
    /// An entry that points to the child table in frame `child_pfn`. A is set from the start; nobody reads it.
    pub const fn table(&self, child_pfn: u64, ad_disabled: bool) -> Spte {
        let all = Spte::PRESENT | self.present | self.write | self.user | self.exec | self.me;
        let ad = match self.effective_ad(if ad_disabled { AdMode::Disabled } else { AdMode::Enabled }) {
            AdMode::Disabled => Self::AD_DISABLED,
            _ => self.accessed,
        };
        Spte(all | ad | ((child_pfn << Spte::PFN_SHIFT) & Spte::PFN_MASK))
    }

    /// A leaf from its facts.
    pub const fn make_leaf(&self, m: &MakeLeaf) -> MadeLeaf {
        let ad_mode = self.effective_ad(m.ad_mode);
        let hardware_ad = !matches!(ad_mode, AdMode::Disabled);
        let mut raw = Spte::PRESENT | self.present | ad_mode.bits() | self.memtype | self.me;
        // In software too, where the kernel keeps the bits there.
        let has_ad = hardware_ad || self.software_ad;
        if has_ad && !m.prefetch {
            raw |= self.accessed;
        }

        let exec = m.access.exec && !(m.level > LEVEL_4K && m.nx_mitigation);
        raw |= if exec { self.exec } else { self.nx };
        if m.access.user {
            raw |= self.user;
        }
        if m.level > LEVEL_4K {
            raw |= Spte::PAGE_SIZE;
        }
        if m.host_writable {
            raw |= self.host_writable;
        }
        raw |= (round_down(m.pfn, m.level) << Spte::PFN_SHIFT) & Spte::PFN_MASK;

        let mut write_protected = false;
        if m.access.write && m.host_writable {
            // A writable old leaf proves that the shadow MMU had no objection; up to 6.12 its bare W bit did.
            let (known_writable, with_dirty) = match m.remake {
                RemakeDirty::SkipWhenOldWritable => {
                    // "Last level" without a test for presence: a 4K MMIO entry passes, a table does not.
                    let old_w =
                        m.old.0 & self.write != 0 && (m.level == LEVEL_4K || m.old.0 & Spte::PAGE_SIZE != 0);
                    (old_w, !old_w)
                }
                RemakeDirty::AlwaysSet => (m.old.is_leaf(m.level) && self.is_writable(m.old), true),
            };
            if m.write_protected && !known_writable {
                write_protected = true;
            } else {
                raw |= self.write | self.mmu_writable;
                if with_dirty && has_ad {
                    raw |= self.dirty;
                }
            }
        }

        let mut spte = Spte(raw);
        let mark_dirty = m.dirty_tracked && self.is_writable(spte);
        if m.prefetch {
            spte = self.access_track(spte);
        }
        // Tracking takes W away, and with it the reason to mark.
        let mark_dirty = mark_dirty && self.is_writable(spte);
        MadeLeaf { spte, write_protected, mark_dirty }
    }

    /// Child `index` (0..512) of the huge leaf `huge` at `huge_level` (2 or 3), when it is split into a table.
    ///
    /// Same permissions, A and D; its own part of the frame. A 4K child gets X back under the NX mitigation.
    pub const fn split_child(&self, huge: Spte, huge_level: u8, index: usize, nx_mitigation: bool) -> Spte {
        let level = huge_level - 1;
        let mut child = huge.with_pfn(huge.pfn() + index as u64 * span(level));
        if level == LEVEL_4K {
            child = Spte(child.0 & !Spte::PAGE_SIZE);
            if nx_mitigation {
                child = self.with_exec(child, true);
            }
        }
        child
    }

    /// The huge leaf at `huge_level` (2 or 3) that takes the place of a table holding the leaf `small` (6.13 on).
    ///
    /// Same permissions, A and D as `small`; the frame is aligned down, X goes under the NX mitigation.
    pub const fn collapse(&self, small: Spte, huge_level: u8, nx_mitigation: bool) -> Spte {
        let huge = Spte(small.0 | Spte::PAGE_SIZE).with_pfn(round_down(small.pfn(), huge_level));
        if nx_mitigation { self.with_exec(huge, false) } else { huge }
    }

    /// The 4K leaf that change_pte (up to 6.9) installs when the host moved a page to `pfn` read-only.
    ///
    /// The caller has made the entry empty first: the frame of a present leaf never changes in one step.
    pub const fn change_pte(&self, old: Spte, pfn: u64) -> Spte {
        let read_only = old.0 & !(self.write | self.mmu_writable | self.host_writable);
        self.access_track(Spte(read_only).with_pfn(pfn))
    }

    /// The same leaf, executable or not, also while R and X are saved away by access tracking.
    pub const fn with_exec(&self, s: Spte, exec: bool) -> Spte {
        let tracked = self.is_access_tracked(s);
        let open = self.restore_access_track(s);
        let changed =
            if exec { Spte((open.0 & !self.nx) | self.exec) } else { Spte((open.0 & !self.exec) | self.nx) };
        if tracked { self.access_track(changed) } else { changed }
    }

    /// The A/D mode this format can have: NPT always sets A/D, an EPT without A/D bits never does.
    const fn effective_ad(&self, wanted: AdMode) -> AdMode {
        match (self.kind, self.ad_bits) {
            (FormatKind::Npt, _) => AdMode::Enabled,
            (FormatKind::Ept, false) => AdMode::Disabled,
            (FormatKind::Ept, true) => wanted,
        }
    }
}
