//! Which bit means what: EPT and NPT as values, and the predicates on one entry.
//!
//! # The guarantee
//!
//! A [`Format`] is a handful of masks. Every predicate is a mask and a compare on the entry, without a branch on the
//! format: they sit in loops over 10^9 entries. None of them panics or reads anything but its arguments.
//!
//! # Write permission: three bits, four reachable states
//!
//! *Host-writable* says that the host's own mapping is writable, and never changes while the entry is present.
//! *MMU-writable* says that the shadow MMU does not need the page write-protected; clearing it takes the exclusive
//! lock and a flush. *W* is what hardware sees, and implies both: [`Format::write_state`] names the four states and
//! refuses the other four combinations. The two software bits live at 57/58 on EPT and 9/10 on NPT.
//!
//! # Accessed and Dirty
//!
//! Bits 52-53 carry the A/D mode of the entry (EPT; always 0 on NPT): hardware A/D, no A/D, or hardware A/D on a
//! table that must be write-protected for dirty logging all the same. Without A/D the *accessed* state is kept by
//! taking R, W and X away (access tracking): R and X are saved in bits 54 and 56 so that a fault without
//! mmu_lock can restore them, and *dirty* is W.
//!
//! # Volatile
//!
//! Even the holder of the exclusive lock shares leafs with the CPU (A, D) and with the lockless fault path (W).
//! [`Format::is_volatile`] says whether either may still *add* a bit: then the entry must be exchanged, not stored.

use std::fmt;

use crate::spte::Spte;

/// Extended page tables (Intel) or nested page tables (AMD, the legacy x86 layout).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FormatKind {
    /// Intel EPT.
    Ept,
    /// AMD NPT.
    Npt,
}

impl FormatKind {
    /// `ept` or `npt`.
    pub const fn name(self) -> &'static str {
        match self {
            FormatKind::Ept => "ept",
            FormatKind::Npt => "npt",
        }
    }
}

impl fmt::Display for FormatKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How an entry's Accessed and Dirty state is kept: bits 52-53.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AdMode {
    /// Hardware sets A and D.
    #[default]
    Enabled,
    /// No hardware A/D: accessed by access tracking, dirty by W.
    Disabled,
    /// Hardware sets A and D, but dirty logging has to clear W (an L2 guest's entry while PML logs the L1's).
    WriteProtect,
}

impl AdMode {
    /// The mode as it stands in bits 52-53.
    #[inline]
    pub const fn bits(self) -> u64 {
        match self {
            AdMode::Enabled => 0,
            AdMode::Disabled => Format::AD_DISABLED,
            AdMode::WriteProtect => Format::AD_WRITE_PROTECT,
        }
    }
}

/// What an entry is, at its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The non-present value: nothing here.
    Empty,
    /// Owned by one thread in the middle of a change; everybody else tries again later.
    Frozen,
    /// A cached "no memory at this gfn".
    Mmio,
    /// Maps a page.
    Leaf,
    /// Points to a child table.
    Table,
    /// Not present, and no value that the MMU writes.
    Other,
}

/// The four write-permission states a present leaf can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriteState {
    /// (host, MMU, W) = (1,1,1).
    Writable,
    /// (1,1,0): write-protected for dirty logging, or access-tracked; a fault may set W without mmu_lock.
    Fixable,
    /// (1,0,0): write-protected because the shadow MMU shadows the gfn.
    Shadowed,
    /// (0,0,0): the memory is read-only.
    ReadOnly,
}

/// A leaf whose write-permission bits contradict each other (rule I13: W => MMU-W => host-W).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteViolation {
    /// The entry.
    pub spte: Spte,
    /// Its host-writable bit.
    pub host_writable: bool,
    /// Its MMU-writable bit.
    pub mmu_writable: bool,
    /// Its W bit.
    pub writable: bool,
}

impl fmt::Display for WriteViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rule = if self.writable && !self.mmu_writable {
            "W needs MMU-writable"
        } else {
            "MMU-writable needs host-writable"
        };
        write!(
            f,
            "SPTE {:#x}: (host, MMU, W) = ({}, {}, {}), but {rule}",
            self.spte, self.host_writable as u8, self.mmu_writable as u8, self.writable as u8
        )
    }
}

impl std::error::Error for WriteViolation {}

/// One entry format: all the masks that `Ept` and `Npt` and a kernel's constants decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// EPT or NPT.
    pub kind: FormatKind,
    /// The empty value, with which a new table is filled: 0, or bit 63 from 6.10 on.
    pub nonpresent: u64,
    /// The frozen value.
    pub frozen: u64,
    /// Bits every present entry has for hardware: P; or R (none with exec-only), and suppress-#VE where empty has it.
    pub present: u64,
    /// W.
    pub write: u64,
    /// U on NPT; R on EPT.
    pub user: u64,
    /// X on EPT; 0 on NPT.
    pub exec: u64,
    /// NX on NPT; 0 on EPT.
    pub nx: u64,
    /// Hardware Accessed; 0 if the EPT has no A/D bits.
    pub accessed: u64,
    /// Hardware Dirty; 0 if the EPT has no A/D bits.
    pub dirty: u64,
    /// Software: the host's mapping is writable.
    pub host_writable: u64,
    /// Software: the MMU does not need the page write-protected.
    pub mmu_writable: u64,
    /// Memory type bits of a leaf (EPT: write-back, ignore PAT); 0 on NPT.
    pub memtype: u64,
    /// Bits that access tracking takes away: R, W and X on EPT; 0 on NPT.
    pub acc_track: u64,
    /// Memory-encryption bit, set in every present entry; 0 without it.
    pub me: u64,
    /// An entry is MMIO if these bits ...
    pub mmio_mask: u64,
    /// ... have this value.
    pub mmio_value: u64,
    /// Access bits that an MMIO entry carries.
    pub mmio_access: u64,
    /// Can MMIO be cached in entries at all? Not on a CPU with 52 physical address bits (NPT).
    pub mmio_caching: bool,
    /// The five upper address bits that an MMIO entry sets against L1TF, and moves up by five; 0 without the bug.
    pub l1tf_mask: u64,
    /// Address bits that an MMIO entry keeps in place.
    pub mmio_gfn_mask: u64,
    /// Does hardware set A/D? Always on NPT.
    pub ad_bits: bool,
    /// Aging runs without mmu_lock (6.15 on), so every entry without A/D may change under the exclusive lock.
    pub lockless_aging: bool,
    /// An EPT without hardware A/D has the two bits all the same, set by software when a leaf is made or its tracking ends, and taken by aging (6.13 on).
    pub software_ad: bool,
}

impl Format {
    /// Bits 52-53: the A/D mode.
    pub const AD_MASK: u64 = 3 << 52;
    /// A/D mode 1: no hardware A/D.
    pub const AD_DISABLED: u64 = 1 << 52;
    /// A/D mode 2: hardware A/D, dirty logging by write protection.
    pub const AD_WRITE_PROTECT: u64 = 2 << 52;
    /// Distance from R and X to where access tracking saves them.
    pub const SAVED_SHIFT: u32 = 54;
    /// R and X: what access tracking saves. W is derived from MMU-writable instead.
    pub const SAVED_BITS: u64 = 0b101;
    /// Bit 63: suppress-#VE on EPT, NX on NPT, and the empty value from 6.10 on.
    pub const BIT63: u64 = 1 << 63;

    /// AMD's nested page tables, with the given empty and frozen values.
    pub const fn npt(nonpresent: u64, frozen: u64) -> Format {
        Format {
            kind: FormatKind::Npt,
            nonpresent,
            frozen,
            present: 1,
            write: Spte::WRITE,
            user: 1 << 2,
            exec: 0,
            nx: Self::BIT63,
            accessed: 1 << 5,
            dirty: 1 << 6,
            host_writable: 1 << 9,
            mmu_writable: 1 << 10,
            memtype: 0,
            acc_track: 0,
            me: 0,
            mmio_mask: 1 << 51 | 1,
            mmio_value: 1 << 51 | 1,
            mmio_access: 0b110,
            mmio_caching: true,
            l1tf_mask: 0,
            mmio_gfn_mask: Spte::PFN_MASK & !(1 << 51),
            ad_bits: true,
            lockless_aging: false,
            software_ad: false,
        }
    }

    /// Intel's extended page tables. `exec_only`: the CPU can map X without R. `ad_bits`: it sets A and D.
    pub const fn ept(nonpresent: u64, frozen: u64, exec_only: bool, ad_bits: bool) -> Format {
        // Where empty entries suppress #VE (6.10 on), present ones do too, and an MMIO entry is told by not doing so.
        let suppress_ve = nonpresent & Self::BIT63;
        Format {
            kind: FormatKind::Ept,
            nonpresent,
            frozen,
            present: (if exec_only { 0 } else { 1 }) | suppress_ve,
            write: Spte::WRITE,
            user: 1,
            exec: 1 << 2,
            nx: 0,
            accessed: if ad_bits { 1 << 8 } else { 0 },
            dirty: if ad_bits { 1 << 9 } else { 0 },
            host_writable: 1 << 57,
            mmu_writable: 1 << 58,
            memtype: 6 << 3 | 1 << 6,
            acc_track: 0b111,
            me: 0,
            mmio_mask: 0b111 | suppress_ve,
            mmio_value: 0b110,
            mmio_access: 0,
            mmio_caching: true,
            l1tf_mask: 0,
            mmio_gfn_mask: Spte::PFN_MASK,
            ad_bits,
            lockless_aging: false,
            software_ad: false,
        }
    }

    /// The same format with a memory-encryption bit in every present entry.
    pub const fn with_me(mut self, me: u64) -> Format {
        self.me = me;
        self
    }

    /// The same format for kernels whose aging takes no lock (6.15 on).
    pub const fn with_lockless_aging(mut self, lockless: bool) -> Format {
        self.lockless_aging = lockless;
        self
    }

    /// The same format for kernels that keep A and D in software where an EPT has none in hardware (6.13 on). Nothing changes where it has.
    pub const fn with_software_ad(mut self, software: bool) -> Format {
        if software && !self.ad_bits {
            self.software_ad = true;
            self.accessed = 1 << 8;
            self.dirty = 1 << 9;
        }
        self
    }

    /// The empty entry.
    #[inline]
    pub const fn empty(&self) -> Spte {
        Spte(self.nonpresent)
    }

    /// The frozen entry.
    #[inline]
    pub const fn frozen(&self) -> Spte {
        Spte(self.frozen)
    }

    /// Is it exactly the empty value?
    #[inline]
    pub const fn is_empty(&self, s: Spte) -> bool {
        s.0 == self.nonpresent
    }

    /// Is it exactly the frozen value? A frozen entry with one bit changed is *not* frozen (bug-history 31).
    #[inline]
    pub const fn is_frozen(&self, s: Spte) -> bool {
        s.0 == self.frozen
    }

    /// Is it a cached MMIO entry?
    #[inline]
    pub const fn is_mmio(&self, s: Spte) -> bool {
        (s.0 & self.mmio_mask == self.mmio_value) & self.mmio_caching
    }

    /// Is W set?
    #[inline]
    pub const fn is_writable(&self, s: Spte) -> bool {
        s.0 & self.write != 0
    }

    /// Is MMU-writable set: may a fault without mmu_lock set W?
    #[inline]
    pub const fn is_mmu_writable(&self, s: Spte) -> bool {
        s.0 & self.mmu_writable != 0
    }

    /// Is host-writable set?
    #[inline]
    pub const fn is_host_writable(&self, s: Spte) -> bool {
        s.0 & self.host_writable != 0
    }

    /// May the guest execute from it: X set, NX clear?
    #[inline]
    pub const fn is_executable(&self, s: Spte) -> bool {
        s.0 & (self.exec | self.nx) == self.exec
    }

    /// Does hardware set A/D on this entry? (Modes `Enabled` and `WriteProtect`.)
    #[inline]
    pub const fn ad_enabled(&self, s: Spte) -> bool {
        s.0 & Self::AD_MASK != Self::AD_DISABLED
    }

    /// Must dirty logging clear W rather than D on this entry? (Modes `Disabled` and `WriteProtect`.)
    #[inline]
    pub const fn needs_write_protect(&self, s: Spte) -> bool {
        s.0 & Self::AD_MASK != 0
    }

    /// The A/D mode of a present entry; the unused value 3 counts as `WriteProtect`, as the kernel's tests do.
    #[inline]
    pub const fn ad_mode(&self, s: Spte) -> AdMode {
        match s.0 & Self::AD_MASK {
            0 => AdMode::Enabled,
            Self::AD_DISABLED => AdMode::Disabled,
            _ => AdMode::WriteProtect,
        }
    }

    /// Was R/W/X taken away to notice the next access? Only present EPT entries without hardware A/D.
    #[inline]
    pub const fn is_access_tracked(&self, s: Spte) -> bool {
        let looked_at = Self::AD_MASK | Spte::PRESENT | self.acc_track;
        (s.0 & looked_at == Self::AD_DISABLED | Spte::PRESENT) & (self.acc_track != 0)
    }

    /// The bit that means Dirty on this entry: D with hardware A/D, else W.
    #[inline]
    pub const fn dirty_bit(&self, s: Spte) -> u64 {
        if self.ad_enabled(s) { self.dirty } else { self.write }
    }

    /// The bit that one round of dirty logging clears: W if `write_protect` or the mode demands it, else D.
    #[inline]
    pub const fn dirty_log_bit(&self, s: Spte, write_protect: bool) -> u64 {
        if write_protect | self.needs_write_protect(s) { self.write } else { self.dirty }
    }

    /// Has the page been accessed: A with hardware A/D, else not access-tracked.
    #[inline]
    pub const fn is_accessed(&self, s: Spte) -> bool {
        if self.ad_enabled(s) | self.software_ad {
            s.0 & self.accessed != 0
        } else {
            !self.is_access_tracked(s)
        }
    }

    /// Has the page been written: D with hardware A/D, else W.
    #[inline]
    pub const fn is_dirty(&self, s: Spte) -> bool {
        s.0 & self.dirty_bit(s) != 0
    }

    /// Does dropping this leaf owe the host page a Dirty? False for everything that is not present.
    #[inline]
    pub const fn leaf_needs_dirty(&self, s: Spte) -> bool {
        s.is_present() & self.is_dirty(s)
    }

    /// Does dropping this leaf owe the host page an Accessed? False for everything that is not present.
    #[inline]
    pub const fn leaf_needs_accessed(&self, s: Spte) -> bool {
        s.is_present() & self.is_accessed(s)
    }

    /// May a present *leaf* change without mmu_lock, so that the exclusive side must exchange it?
    ///
    /// W may be added by the lockless fault path, R/X by it as well, A and D by hardware. Bits that are all set
    /// already are stable: nobody without the lock takes one away, until aging went lockless (6.15). A loop over whole
    /// tables asks [`Format::is_settled`] first: it costs a quarter of this.
    #[inline]
    pub const fn is_volatile(&self, s: Spte) -> bool {
        let ad = self.ad_enabled(s);
        let fixable = s.0 & (self.write | self.mmu_writable) == self.mmu_writable;
        let unaccessed = ad & (s.0 & self.accessed == 0);
        let clean = ad & (s.0 & (self.write | self.dirty) == self.write);
        fixable | self.is_access_tracked(s) | unaccessed | clean | (self.lockless_aging & !ad)
    }

    /// Mask of the bits that [`Format::settled_value`] fixes.
    #[inline]
    pub const fn settled_mask(&self) -> u64 {
        Self::AD_MASK | self.settled_value()
    }

    /// Present, writable by all three bits, accessed and dirty, with hardware A/D: nobody can add a bit.
    ///
    /// For scans that fold a whole table: a leaf with `(raw ^ settled_value()) & settled_mask() == 0` is not volatile
    /// (the converse does not hold). Only where [`Format::ad_bits`].
    #[inline]
    pub const fn settled_value(&self) -> u64 {
        Spte::PRESENT | self.host_writable | self.mmu_writable | self.write | self.accessed | self.dirty
    }

    /// Has the entry every bit of [`Format::settled_value`]? Then it is not volatile.
    #[inline]
    pub const fn is_settled(&self, s: Spte) -> bool {
        (s.0 & self.settled_mask() == self.settled_value()) & self.ad_bits
    }

    /// Must the exclusive side exchange this entry? Only leafs; A on a table is volatile but nobody reads it.
    #[inline]
    pub const fn needs_atomic_write(&self, s: Spte, level: u8) -> bool {
        s.is_leaf(level) & self.is_volatile(s)
    }

    /// Does the entry already allow this access, as a fault sees it? A read asks for bit 0 (P or R).
    #[inline]
    pub const fn allows(&self, s: Spte, write: bool, exec: bool) -> bool {
        if !s.is_present() {
            false
        } else if exec {
            self.is_executable(s)
        } else if write {
            self.is_writable(s)
        } else {
            s.0 & 1 != 0
        }
    }

    /// Would the hardware walker use the entry at all: P on NPT, any of R, W, X on EPT? (MMIO entries: a fault.)
    #[inline]
    pub const fn hardware_present(&self, s: Spte) -> bool {
        let bits = match self.kind {
            FormatKind::Npt => 1,
            FormatKind::Ept => 0b111,
        };
        (s.0 & bits != 0) & !self.is_mmio(s)
    }

    /// The write-permission state of a present leaf.
    ///
    /// Errors: the combination is one of the four that no leaf may have.
    pub const fn write_state(&self, s: Spte) -> Result<WriteState, WriteViolation> {
        let (host, mmu, w) = (self.is_host_writable(s), self.is_mmu_writable(s), self.is_writable(s));
        match (host, mmu, w) {
            (true, true, true) => Ok(WriteState::Writable),
            (true, true, false) => Ok(WriteState::Fixable),
            (true, false, false) => Ok(WriteState::Shadowed),
            (false, false, false) => Ok(WriteState::ReadOnly),
            _ => Err(WriteViolation { spte: s, host_writable: host, mmu_writable: mmu, writable: w }),
        }
    }

    /// What the entry is at `level` (1..=5).
    #[inline]
    pub const fn classify(&self, s: Spte, level: u8) -> Class {
        if s.is_present() {
            if s.is_leaf(level) { Class::Leaf } else { Class::Table }
        } else if self.is_empty(s) {
            Class::Empty
        } else if self.is_frozen(s) {
            Class::Frozen
        } else if self.is_mmio(s) {
            Class::Mmio
        } else {
            Class::Other
        }
    }

    /// Write-protected for dirty logging: W goes, everything else stays.
    #[inline]
    pub const fn without_write(&self, s: Spte) -> Spte {
        Spte(s.0 & !self.write)
    }

    /// Write-protected for the shadow MMU, or by CLEAR on a huge page: W and MMU-writable go. Owes a flush even if
    /// W was clear.
    #[inline]
    pub const fn without_mmu_write(&self, s: Spte) -> Spte {
        Spte(s.0 & !(self.write | self.mmu_writable))
    }

    /// D cleared. No change where the entry has no hardware D.
    #[inline]
    pub const fn without_dirty(&self, s: Spte) -> Spte {
        Spte(s.0 & !self.dirty)
    }

    /// Aged: A cleared with hardware A/D, access-tracked without.
    #[inline]
    pub const fn without_accessed(&self, s: Spte) -> Spte {
        self.access_track(s)
    }

    /// W set, as the lockless fault path does. The caller has checked MMU-writable.
    #[inline]
    pub const fn with_write(&self, s: Spte) -> Spte {
        Spte(s.0 | self.write)
    }

    /// A set by the walker. No change on an entry without hardware A/D.
    #[inline]
    pub const fn with_accessed(&self, s: Spte) -> Spte {
        if self.ad_enabled(s) { Spte(s.0 | self.accessed) } else { s }
    }

    /// D and A set by the walker for a write. No change on an entry without hardware A/D.
    #[inline]
    pub const fn with_dirty(&self, s: Spte) -> Spte {
        if self.ad_enabled(s) { Spte(s.0 | self.accessed | self.dirty) } else { s }
    }

    /// Make the next access noticed: clear A with hardware A/D; else save R and X and take R, W, X away.
    #[inline]
    pub const fn access_track(&self, s: Spte) -> Spte {
        if self.ad_enabled(s) {
            return Spte(s.0 & !self.accessed);
        }
        if self.is_access_tracked(s) {
            return s;
        }
        let saved = (s.0 & Self::SAVED_BITS & self.acc_track) << Self::SAVED_SHIFT;
        // The software's own bit goes with the permissions.
        let own = if self.software_ad { self.accessed } else { 0 };
        Spte((s.0 & !self.acc_track & !self.saved_mask() & !own) | saved)
    }

    /// Give R and X back to an access-tracked entry; any other entry is unchanged. W is for the caller to add.
    #[inline]
    pub const fn restore_access_track(&self, s: Spte) -> Spte {
        if !self.is_access_tracked(s) {
            return s;
        }
        let saved = (s.0 >> Self::SAVED_SHIFT) & Self::SAVED_BITS;
        Spte((s.0 & !self.saved_mask()) | saved)
    }

    /// Where access tracking saves R and X; 0 where it is never used (bit 54 and 56 are then not ours to clear).
    const fn saved_mask(&self) -> u64 {
        if self.acc_track == 0 { 0 } else { Self::SAVED_BITS << Self::SAVED_SHIFT }
    }
}
