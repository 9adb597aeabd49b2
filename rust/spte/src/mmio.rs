//! The cached MMIO entry: "no memory at this gfn, as of generation g".
//!
//! # The guarantee
//!
//! An MMIO entry is never present (its generation skips bit 11), faults in hardware in a way that nothing else does,
//! and gives back the gfn and the 19-bit generation it was made with. It is never zapped when memslots change: a
//! generation that differs from the current one makes it stale, and the next fault replaces it.
//!
//! # The mechanism
//!
//! EPT makes the entry a misconfiguration (W and X without R), NPT sets the reserved bit 51 together with P.
//! Generation bits 0-7 stand in bits 3-10, bits 8-18 in bits 52-62. The memslot generation is wider: only the low 19
//! bits are kept, and when those wrap to 0 the whole MMU is zapped. On CPUs with L1TF the five highest
//! address bits that the cache uses are set in the entry, so that no speculative load hits, and their true values move
//! up by five.

use crate::format::{Format, FormatKind};
use crate::make::Access;
use crate::spte::Spte;

/// Bits of the memslot generation that an MMIO entry keeps.
pub const GENERATION_BITS: u32 = 19;
/// Mask of those bits.
pub const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;

const LOW_BITS: u32 = 8;
const LOW_SHIFT: u32 = 3;
const LOW_MASK: u64 = ((1 << LOW_BITS) - 1) << LOW_SHIFT;
const HIGH_SHIFT: u32 = 52;
const HIGH_MASK: u64 = ((1 << (GENERATION_BITS - LOW_BITS)) - 1) << HIGH_SHIFT;
/// How far, and how many bits, the L1TF relocation moves.
const L1TF_BITS: u32 = 5;

impl Format {
    /// The same format on a CPU with `maxphyaddr` physical address bits.
    ///
    /// With 52 the NPT has no reserved address bit left: MMIO is not cached, every access takes the slow path.
    pub const fn with_maxphyaddr(mut self, maxphyaddr: u8) -> Format {
        if matches!(self.kind, FormatKind::Npt) && maxphyaddr >= 52 {
            self.mmio_caching = false;
            self.mmio_mask = 0;
            self.mmio_value = 0;
        }
        self
    }

    /// The same format on a CPU with L1TF whose L1 cache looks at `cache_bits` address bits.
    ///
    /// No relocation below 18 bits, where no five bits above the page offset are left, nor from 47 up, where there is
    /// no room to move five bits up.
    pub const fn with_l1tf(mut self, cache_bits: u8) -> Format {
        if cache_bits > 12 + L1TF_BITS as u8 && cache_bits < 52 - L1TF_BITS as u8 {
            let low = cache_bits as u32 - L1TF_BITS;
            self.l1tf_mask = ((1 << L1TF_BITS) - 1) << low;
            self.mmio_gfn_mask = Spte::PFN_MASK & ((1 << low) - 1);
        }
        self
    }

    /// Exclusive end of the gfns an MMIO entry of this format can carry.
    pub const fn mmio_gfn_end(&self) -> u64 {
        let address_bits = 64 - (self.mmio_gfn_mask | self.l1tf_mask).leading_zeros();
        1 << (address_bits - 12)
    }

    /// The MMIO entry for `gfn`, made under memslot `generation` (only its low 19 bits are kept).
    ///
    /// Address bits from [`Format::mmio_gfn_end`] up do not fit and are dropped.
    pub const fn mmio(&self, gfn: u64, access: Access, generation: u64) -> Spte {
        let address = (gfn << Spte::PFN_SHIFT) & (self.mmio_gfn_mask | self.l1tf_mask);
        let kept = address | self.l1tf_mask;
        let moved = (address & self.l1tf_mask) << L1TF_BITS;
        let low = (generation << LOW_SHIFT) & LOW_MASK;
        let high = ((generation & GENERATION_MASK) >> LOW_BITS) << HIGH_SHIFT;
        Spte(self.mmio_value | (access.bits() & self.mmio_access) | kept | moved | low | high)
    }

    /// The 19-bit generation in an MMIO entry.
    #[inline]
    pub const fn mmio_generation(&self, s: Spte) -> u32 {
        let low = (s.0 & LOW_MASK) >> LOW_SHIFT;
        let high = (s.0 & HIGH_MASK) >> HIGH_SHIFT;
        (low | high << LOW_BITS) as u32
    }

    /// Was the MMIO entry made under this memslot generation (compared in 19 bits)?
    #[inline]
    pub const fn mmio_is_current(&self, s: Spte, generation: u64) -> bool {
        self.mmio_generation(s) as u64 == generation & GENERATION_MASK
    }

    /// The gfn in an MMIO entry.
    #[inline]
    pub const fn mmio_gfn(&self, s: Spte) -> u64 {
        let low = s.0 & self.mmio_gfn_mask;
        let high = (s.0 >> L1TF_BITS) & self.l1tf_mask;
        (low | high) >> Spte::PFN_SHIFT
    }

    /// The access bits an MMIO entry carries: `None` where the format stores none (EPT).
    pub const fn mmio_access(&self, s: Spte) -> Option<Access> {
        if self.mmio_access == 0 { None } else { Some(Access::from_bits(s.0 & self.mmio_access)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::KernelProfile;
    use proptest::prelude::*;

    #[test]
    fn the_recorded_mmio_entry_is_built_bit_for_bit() {
        for name in ["6.1", "6.12", "7.2"] {
            let f = KernelProfile::named(name).unwrap().format(FormatKind::Npt);
            let s = f.mmio(0x280000, Access::ALL, 0xa);
            assert_eq!(s, Spte(0x8_0002_8000_0057), "{name}");
            assert_eq!((f.mmio_gfn(s), f.mmio_generation(s)), (0x280000, 0xa));
            assert!(f.is_mmio(s) && !s.is_present());
        }
    }

    #[test]
    fn all_generations_round_trip_and_stay_out_of_the_present_bit() {
        for f in formats() {
            for generation in 0..1u64 << GENERATION_BITS {
                let s = f.mmio(0x12345, Access::ALL, generation);
                assert_eq!(f.mmio_generation(s) as u64, generation);
                assert!(!s.is_present() && f.is_mmio(s) && !f.is_empty(s) && !f.is_frozen(s));
            }
        }
    }

    #[test]
    fn each_address_bit_round_trips_alone() {
        for f in formats() {
            let mut gfn = 1;
            while gfn < f.mmio_gfn_end() {
                assert_eq!(f.mmio_gfn(f.mmio(gfn, Access::READ, 3)), gfn, "{f:?}");
                gfn <<= 1;
            }
        }
    }

    #[test]
    fn l1tf_sets_the_cached_upper_bits_whatever_the_gfn() {
        let f = Format::ept(0, 0x5a0, true, true).with_l1tf(46);
        assert_eq!(f.l1tf_mask, 0x1f << 41);
        for gfn in [0, 1, (1 << 34) - 1, 0x15 << 29] {
            assert_eq!(f.mmio(gfn, Access::ALL, 0).0 & f.l1tf_mask, f.l1tf_mask);
            assert_eq!(f.mmio_gfn(f.mmio(gfn, Access::ALL, 0)), gfn);
        }
        assert_eq!(f.mmio_gfn_end(), 1 << 34);
        // A CPU that caches by 47 bits or more has no room for the move: no relocation.
        assert_eq!(Format::ept(0, 0x5a0, true, true).with_l1tf(47).l1tf_mask, 0);
        assert_eq!(Format::ept(0, 0x5a0, true, true).with_l1tf(0).l1tf_mask, 0);
    }

    #[test]
    fn no_mmio_caching_with_52_address_bits() {
        let f = Format::npt(0, 0x5a0).with_maxphyaddr(52);
        for raw in [0, 1 << 51 | 1, u64::MAX, 0x8_0002_8000_0057] {
            assert!(!f.is_mmio(Spte(raw)));
        }
        assert!(Format::npt(0, 0x5a0).with_maxphyaddr(51).is_mmio(Spte(0x8_0002_8000_0057)));
    }

    fn formats() -> Vec<Format> {
        let mut all = Vec::new();
        for (nonpresent, frozen) in [(0, 0x5a0), (1 << 63, 1 << 63 | 0x5a0), (1 << 63, 1 << 63 | 0x1a0)] {
            all.push(Format::npt(nonpresent, frozen));
            for exec_only in [false, true] {
                all.push(Format::ept(nonpresent, frozen, exec_only, true));
                all.push(Format::ept(nonpresent, frozen, exec_only, true).with_l1tf(44));
            }
        }
        all
    }

    proptest! {
        #[test]
        fn gfn_generation_and_access_round_trip(gfn: u64, generation: u64, bits in 0u64..8) {
            for f in formats() {
                let gfn = gfn % f.mmio_gfn_end();
                let access = Access::from_bits(bits);
                let s = f.mmio(gfn, access, generation);
                prop_assert_eq!(f.mmio_gfn(s), gfn);
                prop_assert_eq!(f.mmio_generation(s) as u64, generation & GENERATION_MASK);
                prop_assert!(f.mmio_is_current(s, generation) && !f.mmio_is_current(s, generation ^ 1));
                prop_assert!(f.mmio_is_current(s, generation.wrapping_add(1 << GENERATION_BITS)));
                prop_assert_eq!(f.classify(s, 1), crate::Class::Mmio);
                prop_assert!(!f.hardware_present(s));
                if let Some(kept) = f.mmio_access(s) {
                    prop_assert_eq!((kept.write, kept.user), (access.write, access.user));
                }
            }
        }

        // User (R on EPT) is always granted: W and X without R is what makes an EPT entry MMIO.
        #[test]
        fn no_present_entry_that_the_mmu_builds_is_mmio(pfn in 0u64..1 << 39, bits in 0u64..8, level in 1u8..=3) {
            for f in formats() {
                let leaf = crate::MakeLeaf { pfn, level, access: Access::from_bits(bits | 4), ..Default::default() };
                prop_assert!(!f.is_mmio(f.make_leaf(&leaf).spte));
                prop_assert!(!f.is_mmio(f.table(pfn, false)));
            }
        }
    }
}
