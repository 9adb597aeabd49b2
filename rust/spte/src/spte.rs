//! One entry, and what is true of it in every format.

use std::fmt;

use crate::geometry::LEVEL_4K;

/// A shadow page-table entry: 64 bits as hardware and KVM see them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Spte(pub u64);

impl Spte {
    /// Number of the software bit that means "this entry maps something" (since 5.13).
    pub const PRESENT_BIT: u32 = 11;
    /// `MMU_PRESENT` as a mask.
    pub const PRESENT: u64 = 1 << Self::PRESENT_BIT;
    /// Number of the large-page bit: a leaf above level 1.
    pub const PAGE_SIZE_BIT: u32 = 7;
    /// The large-page bit as a mask.
    pub const PAGE_SIZE: u64 = 1 << Self::PAGE_SIZE_BIT;
    /// The writable bit, bit 1 in both formats.
    pub const WRITE: u64 = 1 << 1;
    /// Lowest bit of the page frame number.
    pub const PFN_SHIFT: u32 = 12;
    /// Bits 12..=51: the page frame number.
    pub const PFN_MASK: u64 = ((1 << 52) - 1) & !((1 << Self::PFN_SHIFT) - 1);
    /// What every entry of a table in quarantine holds: not present to hardware or software, neither empty nor frozen nor MMIO in any profile, and the name of no frame.
    pub const POISON: u64 = 0xdead_0000_0000_05e0;
    /// Exclusive end of the frame numbers that fit.
    pub const PFN_END: u64 = 1 << 40;

    /// The 64 bits.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Does the entry map something, be it a page or a table? (Not empty, frozen or MMIO.)
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Is it a present entry that maps a page at `level`? At level 1 every present entry is one.
    #[inline]
    pub const fn is_leaf(self, level: u8) -> bool {
        self.is_present() & ((level == LEVEL_4K) | (self.0 & Self::PAGE_SIZE != 0))
    }

    /// Is it a present entry that points to a table of `level - 1`?
    #[inline]
    pub const fn is_table(self, level: u8) -> bool {
        self.is_present() & (level != LEVEL_4K) & (self.0 & Self::PAGE_SIZE == 0)
    }

    /// The page frame number in bits 12..=51: of the page for a leaf, of the child table otherwise.
    #[inline]
    pub const fn pfn(self) -> u64 {
        (self.0 & Self::PFN_MASK) >> Self::PFN_SHIFT
    }

    /// The same entry with another frame; bits of `pfn` from 40 up do not fit and are dropped.
    #[inline]
    pub const fn with_pfn(self, pfn: u64) -> Spte {
        Spte((self.0 & !Self::PFN_MASK) | ((pfn << Self::PFN_SHIFT) & Self::PFN_MASK))
    }
}

impl fmt::Debug for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spte({:#x})", self.0)
    }
}

impl fmt::LowerHex for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl From<u64> for Spte {
    fn from(raw: u64) -> Spte {
        Spte(raw)
    }
}

impl From<Spte> for u64 {
    fn from(spte: Spte) -> u64 {
        spte.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prints_in_hex() {
        assert_eq!(format!("{:?}", Spte(0xe67)), "Spte(0xe67)");
        assert_eq!(format!("{:x} {:#x}", Spte(0xe67), Spte(0x827)), "e67 0x827");
    }

    proptest! {
        #[test]
        fn an_entry_is_at_most_one_of_leaf_and_table(raw: u64, level in 1u8..=5) {
            let s = Spte(raw);
            prop_assert!(!(s.is_leaf(level) && s.is_table(level)));
            prop_assert_eq!(s.is_present(), s.is_leaf(level) || s.is_table(level));
            prop_assert!(level != 1 || !s.is_table(level));
        }

        #[test]
        fn the_frame_is_independent_of_every_other_bit(raw: u64, pfn in 0..Spte::PFN_END) {
            let s = Spte(raw).with_pfn(pfn);
            prop_assert_eq!(s.pfn(), pfn);
            prop_assert_eq!(s.raw() & !Spte::PFN_MASK, raw & !Spte::PFN_MASK);
            prop_assert_eq!(s.with_pfn(Spte(raw).pfn()), Spte(raw));
        }

        #[test]
        fn a_frame_too_wide_never_spills(raw: u64, pfn: u64) {
            let s = Spte(raw).with_pfn(pfn);
            prop_assert_eq!(s.raw() & !Spte::PFN_MASK, raw & !Spte::PFN_MASK);
        }
    }
}
