//! Entries that recordings of real KVM contain (AMD NPT with A/D), built from the facts that led to them.

use tdpmmu_spte::{Access, Class, Format, FormatKind, KernelProfile, MadeLeaf, MakeLeaf, Spte, WriteState};

const RECORDED: [&str; 4] = ["6.1-async", "6.1", "6.12", "7.2"];
const PFN: u64 = 0x103a00;
const NX: u64 = 1 << 63;

fn npt(name: &str) -> (KernelProfile, Format) {
    let profile = KernelProfile::named(name).unwrap();
    (profile, profile.format(FormatKind::Npt))
}

fn make(name: &str, level: u8, change: impl Fn(&mut MakeLeaf)) -> MadeLeaf {
    let (profile, format) = npt(name);
    let mut leaf =
        MakeLeaf { pfn: PFN, level, remake: profile.remake_dirty, old: format.empty(), ..Default::default() };
    change(&mut leaf);
    format.make_leaf(&leaf)
}

/// The entry without its frame: what the recordings' tables list.
fn bits(s: Spte) -> u64 {
    assert_eq!(s.pfn(), PFN);
    s.raw() & !Spte::PFN_MASK
}

#[test]
fn a_table_is_827() {
    for name in RECORDED {
        let s = npt(name).1.table(PFN, false);
        assert_eq!(bits(s), 0x827);
        assert!(s.is_table(2) && s.is_table(3) && s.is_table(4));
    }
}

#[test]
fn a_writable_leaf_is_e67_or_ee7() {
    for name in RECORDED {
        assert_eq!(bits(make(name, 1, |_| ()).spte), 0xe67);
        assert_eq!(bits(make(name, 2, |_| ()).spte), 0xee7);
    }
}

#[test]
fn a_leaf_of_a_read_only_host_page_is_825_or_8a5() {
    for name in RECORDED {
        for (level, want) in [(1, 0x825), (2, 0x8a5)] {
            let made = make(name, level, |m| m.host_writable = false);
            assert_eq!(bits(made.spte), want);
            assert_eq!(npt(name).1.write_state(made.spte), Ok(WriteState::ReadOnly));
            assert!(!made.write_protected, "nobody refused: the memory is read-only");
        }
    }
}

#[test]
fn a_prefetched_leaf_lacks_a() {
    for name in ["6.12", "7.2"] {
        let zero_page = |m: &mut MakeLeaf| (m.prefetch, m.host_writable) = (true, false);
        assert_eq!(bits(make(name, 1, zero_page).spte), 0x805);
        assert_eq!(bits(make(name, 2, zero_page).spte), 0x885);
    }
}

#[test]
fn prefetching_over_what_is_mapped_drops_a_and_skips_d_only_over_w() {
    let over =
        |old: u64| bits(make("6.12", 1, |m| (m.prefetch, m.old) = (true, Spte(old).with_pfn(PFN))).spte);
    assert_eq!(over(0xe67), 0xe07);
    assert_eq!(over(0xe05), 0xe47);
    let made =
        make("6.12", 1, |m| (m.prefetch, m.old, m.dirty_tracked) = (true, Spte(0xe05).with_pfn(PFN), true));
    assert!(made.mark_dirty, "and the page is dirty in the log");
}

#[test]
fn the_loser_of_a_write_race_drops_d_up_to_6_12() {
    for (name, small, huge) in [("6.1", 0xe27, 0xea7), ("6.12", 0xe27, 0xea7), ("7.2", 0xe67, 0xee7)] {
        assert_eq!(bits(make(name, 1, |m| m.old = Spte(0xe67).with_pfn(PFN)).spte), small);
        assert_eq!(bits(make(name, 2, |m| m.old = Spte(0xee7).with_pfn(PFN)).spte), huge);
    }
}

#[test]
fn a_mapping_that_replaces_mmio_drops_d_up_to_6_12() {
    for (name, want) in [("6.1", 0xe27), ("6.12", 0xe27), ("7.2", 0xe67)] {
        let mmio = npt(name).1.mmio(0x280000, Access::ALL, 0xa);
        assert_eq!(bits(make(name, 1, |m| m.old = mmio).spte), want);
    }
}

#[test]
fn a_huge_leaf_over_a_table_has_d_although_the_table_has_w() {
    for name in RECORDED {
        assert_eq!(bits(make(name, 2, |m| m.old = npt(name).1.table(PFN, false)).spte), 0xee7);
    }
}

#[test]
fn replacing_a_write_protected_child_sets_d() {
    for name in RECORDED {
        for old in [0xe65, 0xa65, 0x825] {
            assert_eq!(bits(make(name, 1, |m| m.old = Spte(old).with_pfn(PFN)).spte), 0xe67);
        }
    }
}

#[test]
fn an_nx_huge_page_has_bit_63() {
    for name in RECORDED {
        assert_eq!(bits(make(name, 2, |m| m.nx_mitigation = true).spte), NX | 0xee7);
        assert_eq!(bits(make(name, 1, |m| m.nx_mitigation = true).spte), 0xe67);
    }
}

#[test]
fn write_protection_and_aging_take_the_recorded_bits() {
    for name in RECORDED {
        let f = npt(name).1;
        assert_eq!(f.without_write(Spte(0xe67)), Spte(0xe65));
        assert_eq!(f.without_write(Spte(0xee7)), Spte(0xee5));
        assert_eq!(f.without_write(Spte(0xe27)), Spte(0xe25));
        assert_eq!(f.without_write(Spte(0xe07)), Spte(0xe05));
        assert_eq!(f.without_mmu_write(Spte(0xee7)), Spte(0xae5));
        assert_eq!(f.without_accessed(Spte(0xe67)), Spte(0xe47));
        assert_eq!(f.without_accessed(Spte(0xee7)), Spte(0xec7));
        assert_eq!(f.without_accessed(Spte(0x825)), Spte(0x805));
        assert_eq!(f.with_write(Spte(0xe65)), Spte(0xe67));
        assert_eq!(f.with_write(Spte(0xe25)), Spte(0xe27));
        assert_eq!(f.with_dirty(Spte(0xe27)), Spte(0xe67));
        assert_eq!(f.with_accessed(Spte(0xe47)), Spte(0xe67));
    }
}

#[test]
fn a_split_leaves_the_recorded_children() {
    for name in RECORDED {
        let f = npt(name).1;
        let child = |huge: u64, i, nx| f.split_child(Spte(huge).with_pfn(PFN), 2, i, nx);
        for (huge, small) in
            [(0xee7, 0xe67), (0xee5, 0xe65), (0xae5, 0xa65), (0x8a5, 0x825), (NX | 0xee7, NX | 0xe67)]
        {
            for i in [0, 1, 511] {
                let s = child(huge, i, false);
                assert_eq!((s.pfn(), s.raw() & !Spte::PFN_MASK), (PFN + i as u64, small));
            }
        }
        assert_eq!(bits(child(NX | 0xee7, 0, true)), 0xe67, "4K children get X back");
        // 1G -> 2M: the large-page bit stays, and so does NX.
        let s = f.split_child(Spte(NX | 0xee7).with_pfn(1 << 18), 3, 3, true);
        assert_eq!((s.pfn(), s.raw() & !Spte::PFN_MASK), ((1 << 18) + 3 * 512, NX | 0xee7));
    }
}

#[test]
fn recovery_in_place_takes_w_from_the_small_leaf() {
    let f = npt("7.2").1;
    let huge = |small: u64| f.collapse(Spte(small).with_pfn(PFN + 7), 2, false);
    assert_eq!(huge(0xe67), Spte(0xee7).with_pfn(PFN));
    assert_eq!(huge(0xe65), Spte(0xee5).with_pfn(PFN));
    assert_eq!(f.collapse(Spte(0xe67).with_pfn(PFN), 2, true), Spte(NX | 0xee7).with_pfn(PFN));
}

#[test]
fn only_a_writable_accessed_dirty_leaf_is_settled() {
    for name in RECORDED {
        let f = npt(name).1;
        assert!(
            [0xe67, 0xee7, NX | 0xee7].iter().all(|s| f.is_settled(Spte(*s)) && !f.is_volatile(Spte(*s)))
        );
        for raw in [0xe65, 0xe27, 0xe47, 0xe07, 0x825, 0x8a5, 0xa65, 0x827, f.frozen, f.nonpresent] {
            assert!(!f.is_settled(Spte(raw)), "{raw:#x}");
        }
        assert!(
            !f.is_volatile(Spte(0x825)) && !f.is_volatile(Spte(0xa65)),
            "nothing can be added to these either"
        );
        assert!(f.is_volatile(Spte(0xe65)) && f.is_volatile(Spte(0xe47)) && f.is_volatile(Spte(0xe27)));
    }
}

#[test]
fn empty_and_frozen_have_the_recorded_values() {
    for (name, empty, frozen) in
        [("6.1-async", 0, 0x5a0), ("6.1", 0, 0x5a0), ("6.12", NX, NX | 0x5a0), ("7.2", NX, NX | 0x1a0)]
    {
        let f = npt(name).1;
        assert_eq!((f.empty(), f.frozen()), (Spte(empty), Spte(frozen)));
    }
}

#[test]
fn every_recorded_leaf_is_in_a_reachable_write_state() {
    use WriteState::{Fixable, ReadOnly, Shadowed, Writable};
    let leafs = [
        (ReadOnly, &[0x805, 0x825, 0x885, 0x8a5][..]),
        (Shadowed, &[0xae5, 0xa65][..]),
        (Fixable, &[0xe05, 0xe25, 0xe45, 0xe65, 0xee5][..]),
        (Writable, &[0xe07, 0xe27, 0xe47, 0xe67, 0xea7, 0xec7, 0xee7, NX | 0xee7][..]),
    ];
    for name in RECORDED {
        let f = npt(name).1;
        for (state, values) in leafs {
            for &raw in values {
                assert_eq!(f.write_state(Spte(raw)), Ok(state), "{raw:#x}");
                assert_eq!(f.classify(Spte(raw), 1), Class::Leaf);
                let at_2m = if raw & 0x80 != 0 { Class::Leaf } else { Class::Table };
                assert_eq!(f.classify(Spte(raw), 2), at_2m);
            }
        }
    }
}

#[test]
fn an_aged_frozen_entry_is_no_longer_frozen() {
    // The trap of bug-history 31: 0x5a0 contains the NPT Accessed bit.
    for name in RECORDED {
        let f = npt(name).1;
        let aged = Spte(f.frozen().raw() & !f.accessed);
        assert!(f.is_frozen(f.frozen()) && !f.is_frozen(aged));
        assert_eq!(f.classify(aged, 1), Class::Other);
    }
}
