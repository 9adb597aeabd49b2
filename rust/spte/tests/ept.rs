//! EPT values, worked out by hand from the bit table. No recording has any: the ground truth is NPT only.

use tdpmmu_spte::{AdMode, Aging, Format, FormatKind, KernelProfile, MakeLeaf, Spte};

const HOST: u64 = 1 << 57;
const MMU: u64 = 1 << 58;
const NO_AD: u64 = 1 << 52;

/// 6.1's EPT: no bit 63 in the empty value.
fn ept(exec_only: bool, ad_bits: bool) -> Format {
    Format::ept(0, 0x5a0, exec_only, ad_bits)
}

fn leaf(f: &Format, ad_mode: AdMode, prefetch: bool) -> Spte {
    f.make_leaf(&MakeLeaf { pfn: 0x1000, ad_mode, prefetch, ..Default::default() }).spte
}

#[test]
fn leafs_and_tables_have_the_bits_of_the_table() {
    let f = ept(true, true);
    // RWX, write-back with ignore-PAT, A, D, present.
    assert_eq!(leaf(&f, AdMode::Enabled, false), Spte(HOST | MMU | 0x100_0000 | 0xb77));
    assert_eq!(leaf(&f, AdMode::WriteProtect, false), Spte(2 << 52 | HOST | MMU | 0x100_0000 | 0xb77));
    assert_eq!(leaf(&f, AdMode::Disabled, false), Spte(NO_AD | HOST | MMU | 0x100_0000 | 0x877));
    assert_eq!(f.table(0x1000, false), Spte(0x100_0000 | 0x907));
    assert_eq!(f.table(0x1000, true), Spte(NO_AD | 0x100_0000 | 0x807));
}

#[test]
fn an_ept_without_ad_bits_never_claims_them() {
    let f = ept(false, false);
    for mode in [AdMode::Enabled, AdMode::Disabled, AdMode::WriteProtect] {
        assert_eq!(leaf(&f, mode, false), Spte(NO_AD | HOST | MMU | 0x100_0000 | 0x877));
    }
    assert_eq!(f.table(1, false), Spte(NO_AD | 0x1807));
}

#[test]
fn access_tracking_saves_r_and_x_but_not_w() {
    let f = ept(true, true);
    let s = leaf(&f, AdMode::Disabled, false);
    let tracked = f.access_track(s);
    assert_eq!(tracked, Spte(1 << 54 | 1 << 56 | NO_AD | HOST | MMU | 0x100_0000 | 0x870));
    assert_eq!(f.restore_access_track(tracked), Spte(s.raw() & !2));
    assert_eq!(leaf(&f, AdMode::Disabled, true), tracked, "a prefetched leaf begins tracked");
    // Read-only: no W comes back, and R alone is saved where X was never granted.
    let r = Spte(NO_AD | 1 << 11 | 1);
    assert_eq!(f.access_track(r), Spte(1 << 54 | NO_AD | 1 << 11));
    assert_eq!(f.restore_access_track(f.access_track(r)), r);
}

#[test]
fn a_hardware_write_sets_a_and_d_where_there_are_any() {
    let f = ept(true, true);
    let clean = Spte(HOST | MMU | 0x807);
    assert_eq!(f.with_dirty(clean), Spte(HOST | MMU | 0xb07));
    assert_eq!(f.with_accessed(clean), Spte(HOST | MMU | 0x907));
    let no_ad = Spte(NO_AD | HOST | MMU | 0x807);
    assert_eq!((f.with_dirty(no_ad), f.with_accessed(no_ad)), (no_ad, no_ad));
    assert_eq!(f.without_dirty(Spte(HOST | MMU | 0xb07)), Spte(HOST | MMU | 0x907));
}

#[test]
fn where_empty_suppresses_ve_present_entries_do_and_mmio_does_not() {
    let f = Format::ept(Format::BIT63, Format::BIT63 | 0x5a0, true, true);
    assert_eq!(leaf(&f, AdMode::Enabled, false), Spte(Format::BIT63 | HOST | MMU | 0x100_0000 | 0xb77));
    assert_eq!(f.table(1, false), Spte(Format::BIT63 | 0x1907));
    let mmio = f.mmio(0x280000, tdpmmu_spte::Access::ALL, 0xa);
    assert_eq!(mmio, Spte(0x2_8000_0056));
    assert!(f.is_mmio(mmio) && !f.is_mmio(Spte(mmio.raw() | Format::BIT63)));
}

#[test]
fn change_pte_moves_a_page_read_only() {
    let f = ept(true, true);
    let moved = f.change_pte(leaf(&f, AdMode::Enabled, false), 0x2000);
    // W and both software bits go; D stays, A is cleared.
    assert_eq!(moved, Spte(0x200_0000 | 0xa75));
    let npt = KernelProfile::named("6.1").unwrap().format(FormatKind::Npt);
    assert_eq!(npt.change_pte(Spte(0x100_0e67), 0x2000), Spte(0x200_0845));
    assert!(npt.write_state(Spte(0x200_0845)).is_ok());
}

#[test]
fn entries_without_ad_are_volatile_once_aging_takes_no_lock() {
    for p in KernelProfile::ALL {
        let f = p.format(FormatKind::Ept);
        let s = leaf(&f, AdMode::Disabled, false);
        assert_eq!(f.needs_atomic_write(s, 1), p.aging == Aging::LocklessRcu, "{p}");
        assert!(!f.needs_atomic_write(leaf(&f, AdMode::Enabled, false), 1));
    }
}

#[test]
fn exec_only_needs_no_r() {
    let x_only = |exec_only| {
        let access = tdpmmu_spte::Access { write: false, exec: true, user: false };
        ept(exec_only, true).make_leaf(&MakeLeaf { access, ..Default::default() }).spte.raw() & 7
    };
    assert_eq!((x_only(true), x_only(false)), (4, 5));
}

#[test]
fn the_memory_encryption_bit_is_in_every_present_entry_and_in_no_other() {
    let me = 1 << 47;
    let f = Format::npt(0, 0x5a0).with_me(me);
    assert_eq!(leaf(&f, AdMode::Enabled, false), Spte(me | 0x100_0000 | 0xe67));
    assert_eq!(f.table(1, false), Spte(me | 0x1827));
    assert_eq!((f.empty(), f.mmio(1, tdpmmu_spte::Access::READ, 0).raw() & me), (Spte(0), 0));
}
