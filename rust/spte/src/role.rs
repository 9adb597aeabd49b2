//! The role word: 32 bits that say what a page table is for.
//!
//! # The guarantee
//!
//! A root may be shared by every vCPU that wants the same *whole word*. The `invalid` bit is part of it, so an
//! invalidated root can never match again, whatever else it agrees on. A child's role is its parent's with one level
//! less, `invalid` included.
//!
//! # The two layouts
//!
//! Up to 6.12 `access` has three bits and `invalid` is bit 11; 7.2 has a fourth access bit (it prints `rwux`), and
//! everything from `invalid` to `passthrough` moves up by one. `level`, `direct` and `smm` stay where they are.
//! A valid four-level root is 0x3784 in the first and 0x6f84 in the second.

use std::fmt;

/// A role word. What its middle bits mean depends on the [`RoleLayout`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Role(pub u32);

/// Where a kernel keeps the fields of a role word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoleLayout {
    /// Three access bits, `invalid` at bit 11 (recorded: 6.1, 6.12).
    Access3,
    /// Four access bits, `invalid` at bit 12 (recorded: 7.2).
    Access4,
}

const LEVEL_MASK: u32 = 0xf;
const FOUR_BYTE_SHIFT: u32 = 4;
const QUADRANT_SHIFT: u32 = 5;
const DIRECT: u32 = 1 << 7;
const ACCESS_SHIFT: u32 = 8;
const SMM_SHIFT: u32 = 24;

/// The fields of a role word, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct RoleFields {
    /// Level of the table, 1..=5 (four bits).
    pub level: u8,
    /// The guest's entries have four bytes (shadow MMU).
    pub has_4_byte_gpte: bool,
    /// Which part of a guest table a shadow table covers (two bits, shadow MMU).
    pub quadrant: u8,
    /// Maps guest-physical addresses directly: true for every TDP table.
    pub direct: bool,
    /// Access mask: 3 or 4 bits by layout.
    pub access: u8,
    /// Never to be reused.
    pub invalid: bool,
    /// The guest has NX enabled.
    pub efer_nx: bool,
    /// The guest has CR0.WP set.
    pub cr0_wp: bool,
    /// SMEP without CR0.WP (shadow MMU).
    pub smep_andnot_wp: bool,
    /// SMAP without CR0.WP (shadow MMU).
    pub smap_andnot_wp: bool,
    /// Entries have no hardware A/D.
    pub ad_disabled: bool,
    /// Belongs to an L2 guest.
    pub guest_mode: bool,
    /// A table that shadows nothing (shadow MMU).
    pub passthrough: bool,
    /// System management mode: address space 1 (eight bits, 0 or 1 in practice).
    pub smm: u8,
}

impl RoleLayout {
    /// Number of access bits.
    pub const fn access_bits(self) -> u32 {
        match self {
            RoleLayout::Access3 => 3,
            RoleLayout::Access4 => 4,
        }
    }

    /// Number of the `invalid` bit.
    pub const fn invalid_bit(self) -> u32 {
        ACCESS_SHIFT + self.access_bits()
    }

    /// Every access bit set: what a direct root grants.
    pub const fn access_all(self) -> u8 {
        (1 << self.access_bits()) - 1
    }

    /// Fields to word. Values too wide for their field lose their upper bits.
    pub const fn pack(self, f: &RoleFields) -> Role {
        let base = self.invalid_bit();
        Role(
            f.level as u32 & LEVEL_MASK
                | (f.has_4_byte_gpte as u32) << FOUR_BYTE_SHIFT
                | (f.quadrant as u32 & 3) << QUADRANT_SHIFT
                | if f.direct { DIRECT } else { 0 }
                | ((f.access & self.access_all()) as u32) << ACCESS_SHIFT
                | (f.invalid as u32) << base
                | (f.efer_nx as u32) << (base + 1)
                | (f.cr0_wp as u32) << (base + 2)
                | (f.smep_andnot_wp as u32) << (base + 3)
                | (f.smap_andnot_wp as u32) << (base + 4)
                | (f.ad_disabled as u32) << (base + 5)
                | (f.guest_mode as u32) << (base + 6)
                | (f.passthrough as u32) << (base + 7)
                | (f.smm as u32) << SMM_SHIFT,
        )
    }

    /// Word to fields. Padding bits are dropped.
    pub const fn unpack(self, role: Role) -> RoleFields {
        let base = self.invalid_bit();
        RoleFields {
            level: role.level(),
            has_4_byte_gpte: role.bit(FOUR_BYTE_SHIFT),
            quadrant: (role.0 >> QUADRANT_SHIFT & 3) as u8,
            direct: role.direct(),
            access: role.access(self),
            invalid: role.bit(base),
            efer_nx: role.bit(base + 1),
            cr0_wp: role.bit(base + 2),
            smep_andnot_wp: role.bit(base + 3),
            smap_andnot_wp: role.bit(base + 4),
            ad_disabled: role.bit(base + 5),
            guest_mode: role.bit(base + 6),
            passthrough: role.bit(base + 7),
            smm: (role.0 >> SMM_SHIFT) as u8,
        }
    }

    /// The role of a direct root of `root_level` as a 64-bit guest asks for it: all access, NX and WP on.
    pub const fn tdp_root(self, root_level: u8, smm: bool, ad_disabled: bool, guest_mode: bool) -> Role {
        self.pack(&RoleFields {
            level: root_level,
            has_4_byte_gpte: false,
            quadrant: 0,
            direct: true,
            access: self.access_all(),
            invalid: false,
            efer_nx: true,
            cr0_wp: true,
            smep_andnot_wp: false,
            smap_andnot_wp: false,
            ad_disabled,
            guest_mode,
            passthrough: false,
            smm: smm as u8,
        })
    }
}

impl Role {
    const fn bit(self, n: u32) -> bool {
        self.0 >> n & 1 != 0
    }

    /// The word.
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// Level of the table.
    #[inline]
    pub const fn level(self) -> u8 {
        (self.0 & LEVEL_MASK) as u8
    }

    /// Maps guest-physical addresses directly.
    pub const fn direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    /// The access mask.
    pub const fn access(self, layout: RoleLayout) -> u8 {
        (self.0 >> ACCESS_SHIFT) as u8 & layout.access_all()
    }

    /// Never to be reused?
    #[inline]
    pub const fn invalid(self, layout: RoleLayout) -> bool {
        self.bit(layout.invalid_bit())
    }

    /// The guest has NX enabled.
    pub const fn efer_nx(self, layout: RoleLayout) -> bool {
        self.bit(layout.invalid_bit() + 1)
    }

    /// The guest has CR0.WP set.
    pub const fn cr0_wp(self, layout: RoleLayout) -> bool {
        self.bit(layout.invalid_bit() + 2)
    }

    /// Entries have no hardware A/D.
    #[inline]
    pub const fn ad_disabled(self, layout: RoleLayout) -> bool {
        self.bit(layout.invalid_bit() + 5)
    }

    /// Belongs to an L2 guest.
    #[inline]
    pub const fn guest_mode(self, layout: RoleLayout) -> bool {
        self.bit(layout.invalid_bit() + 6)
    }

    /// In system management mode.
    #[inline]
    pub const fn smm(self) -> bool {
        self.0 >> SMM_SHIFT != 0
    }

    /// Address space: 1 in system management mode, else 0.
    #[inline]
    pub const fn as_id(self) -> u8 {
        self.smm() as u8
    }

    /// The role of a child: one level less, everything else inherited, `invalid` too. Level 0 and 1 have no child:
    /// the level stays.
    pub const fn child(self) -> Role {
        if self.level() <= 1 { self } else { Role(self.0 - 1) }
    }

    /// The same role, invalidated.
    #[inline]
    pub const fn with_invalid(self, layout: RoleLayout) -> Role {
        Role(self.0 | 1 << layout.invalid_bit())
    }
}

impl fmt::Debug for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Role({:#x})", self.0)
    }
}

impl fmt::LowerHex for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUTS: [RoleLayout; 2] = [RoleLayout::Access3, RoleLayout::Access4];

    #[test]
    fn recorded_role_words_are_built_and_read() {
        let (old, new) = LAYOUTS.into();
        assert_eq!(old.tdp_root(4, false, false, false), Role(0x3784));
        assert_eq!(old.tdp_root(4, true, false, false), Role(0x1003784));
        assert_eq!(new.tdp_root(4, false, false, false), Role(0x6f84));
        assert_eq!(Role(0x3784).with_invalid(old), Role(0x3f84));
        assert_eq!(Role(0x6f84).with_invalid(new), Role(0x7f84));
        assert!(Role(0x3f84).invalid(old) && !Role(0x3784).invalid(old));
        assert!(Role(0x7f84).invalid(new) && !Role(0x6f84).invalid(new));
        assert_eq!((Role(0x1003784).as_id(), Role(0x3784).as_id()), (1, 0));
        for (layout, word) in [(old, 0x3784), (new, 0x6f84)] {
            let f = layout.unpack(Role(word));
            assert!(f.direct && f.efer_nx && f.cr0_wp && !f.invalid && !f.ad_disabled && !f.guest_mode);
            assert_eq!((f.level, f.access), (4, layout.access_all()));
        }
    }

    #[test]
    fn a_child_inherits_all_but_the_level() {
        for layout in LAYOUTS {
            let root = layout.tdp_root(5, true, true, true).with_invalid(layout);
            let mut role = root;
            for level in (1..5).rev() {
                role = role.child();
                assert_eq!(layout.unpack(role), RoleFields { level, ..layout.unpack(root) });
            }
            assert_eq!(role.child(), role);
            assert_eq!(Role(0x7f80).child(), Role(0x7f80));
        }
    }

    #[test]
    fn the_accessors_agree_with_unpack_on_every_low_word() {
        for layout in LAYOUTS {
            for word in (0..=u32::from(u16::MAX) * 32).step_by(37) {
                let (r, f) = (Role(word), layout.unpack(Role(word)));
                assert_eq!(r.access(layout), f.access);
                assert_eq!(r.invalid(layout), f.invalid);
                assert_eq!(r.efer_nx(layout), f.efer_nx);
                assert_eq!(r.cr0_wp(layout), f.cr0_wp);
                assert_eq!(r.ad_disabled(layout), f.ad_disabled);
                assert_eq!(r.guest_mode(layout), f.guest_mode);
            }
        }
    }

    proptest! {
        #[test]
        fn words_round_trip_up_to_padding(word: u32) {
            for layout in LAYOUTS {
                let padding = 0xff_ffff & !((1 << (layout.invalid_bit() + 8)) - 1);
                prop_assert_eq!(layout.pack(&layout.unpack(Role(word))), Role(word & !padding));
            }
        }

        #[test]
        fn invalidating_is_idempotent_and_changes_one_bit(word: u32) {
            for layout in LAYOUTS {
                let once = Role(word).with_invalid(layout);
                prop_assert_eq!(once.with_invalid(layout), once);
                prop_assert!((once.0 ^ word).count_ones() <= 1 && once.invalid(layout));
            }
        }
    }
}
