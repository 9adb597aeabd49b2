//! Profiles: the recorded facts, the parser, its errors.

use proptest::prelude::*;
use tdpmmu_spte::profile::DESIGNS;
use tdpmmu_spte::{
    Collapse, FormatKind, KernelProfile, LockMode, Ownership, Passes, ProfileError, RoleLayout, RootSet,
    Spte, WriteBack,
};

fn named(text: &str) -> KernelProfile {
    KernelProfile::named(text).unwrap()
}

#[test]
fn every_profile_is_found_by_its_name_and_is_sound() {
    assert_eq!(KernelProfile::ALL.iter().map(|p| p.name).collect::<Vec<_>>(), KernelProfile::NAMES);
    for p in KernelProfile::ALL {
        assert_eq!(named(p.name), *p);
        assert_eq!(p.to_string(), p.name);
        p.check().unwrap();
        assert!(DESIGNS.contains(&p.design));
        // "sync" tears nothing down at the last put, so somebody else must own a root.
        assert_eq!(p.design == "sync", p.ownership == Ownership::Mmu);
    }
}

#[test]
fn no_profile_has_a_table_that_holds_poison() {
    let poison = Spte(Spte::POISON);
    for profile in KernelProfile::ALL {
        for kind in [FormatKind::Npt, FormatKind::Ept] {
            let format = profile.format(kind);
            assert!(!poison.is_present() && !format.hardware_present(poison), "{profile} {kind:?}");
            assert!(!format.is_mmio(poison) && !format.is_frozen(poison) && poison != format.empty());
        }
    }
}

#[test]
fn the_recorded_kernels_differ_as_recorded() {
    let (async_, stable, v12, v72) = (named("6.1-async"), named("6.1"), named("6.12"), named("7.2"));
    assert_eq!((async_.design, async_.ownership), ("async-worker", Ownership::Vcpu));
    assert_eq!((stable.design, stable.ownership), ("sync", Ownership::Mmu));
    assert_eq!((async_.passes, stable.passes), (Passes::ROOT_1G, Passes::ROOT_1G));
    assert_eq!((v12.passes, v72.passes), (Passes::ALL, Passes::ALL));
    assert_eq!((stable.root_load_lock, v12.root_load_lock), (LockMode::Exclusive, LockMode::Shared));
    assert_eq!((v12.role_layout, v72.role_layout), (RoleLayout::Access3, RoleLayout::Access4));
    assert_eq!((v12.collapse, v72.collapse), (Collapse::ZapFreeze, Collapse::RecoverInPlace));
    assert_eq!((v12.write_back, v72.write_back), (WriteBack::AtZap, WriteBack::AtCreation));
    assert!(v72.children_before_parent_events && !v12.children_before_parent_events);
    assert!(stable.set_spte_gfn && !v72.set_spte_gfn);
}

#[test]
fn the_kernels_between_the_recorded_ones_change_what_they_are_known_to_have_changed() {
    let changed = |from: &str, to: &str| -> Vec<&'static str> {
        let pairs = named(from).switches().into_iter().zip(named(to).switches());
        pairs.filter(|(a, b)| a != b).map(|(a, _)| a.0).collect()
    };
    assert_eq!(named("6.6").passes, Passes::ROOT_1G);
    assert_eq!(
        changed("6.1", "6.6"),
        [
            "split-in-fault",
            "mark-dirty",
            "level-mismatch-retries",
            "aging-write",
            "nx-skips-dirty-slots",
            "nx-adjust-flag-test",
            "nx-flag-before-publish",
            "clear-dirty-write",
            "zap-range-by-space",
            "replace-flush",
        ]
    );
    assert_eq!(
        changed("6.9", "6.12"),
        [
            "nonpresent",
            "frozen",
            "atomic-zap",
            "eager-split",
            "clear-split-inclusive",
            "write-protected-result",
            "set-spte-gfn",
            "slot-zap-quirk",
        ]
    );
    assert_eq!(changed("6.18", "7.2"), ["frozen", "role", "children-first"]);
    // 6.6 to 6.9 and 6.12 to 6.18 never go back to what an older kernel did.
    for profile in ["6.9", "6.12", "6.18", "7.2"] {
        let p = named(profile);
        assert_eq!((p.root_load_lock, p.zap_range_roots), (LockMode::Shared, RootSet::Valid), "{profile}");
        assert!(p.nx_adjust_flag_test && p.nx_flag_before_publish && !p.invalid_root_owes_flush, "{profile}");
    }
}

#[test]
fn a_switch_changes_one_thing() {
    let p = named("6.12, passes=1G+root , ownership=vcpu");
    assert_eq!((p.passes, p.ownership), (Passes::ROOT_1G, Ownership::Vcpu));
    assert_eq!(KernelProfile { passes: Passes::ALL, ownership: Ownership::Mmu, ..p }, named("6.12"));
    assert_eq!(p.to_string(), "6.12,passes=1G+root,ownership=vcpu");
    assert_eq!(named("6.1,frozen=0x1a0").format(FormatKind::Npt).frozen().raw(), 0x1a0);
    assert_eq!(named("6.1,design=reap").design, "reap");
    assert_eq!(named("6.1,passes=1G+root"), named("6.1"), "setting what is set is nothing");
}

#[test]
fn every_value_of_every_switch_survives_printing() {
    let mut changed = 0;
    for base in KernelProfile::ALL {
        for donor in KernelProfile::ALL {
            for (switch, value) in donor.switches() {
                let mut p = *base;
                p.set(switch, &value).unwrap();
                assert_eq!(named(&p.to_string()), p, "{p}");
                changed += u32::from(p != *base);
            }
        }
    }
    assert!(changed > 300, "{changed}");
    assert_eq!(named("6.12").switches().len(), KernelProfile::SWITCHES.len());
}

#[test]
fn every_switch_is_explained_in_order_and_names_a_kernel_or_a_source() {
    let names: Vec<_> = KernelProfile::EXPLAINED.iter().map(|(switch, _)| *switch).collect();
    assert_eq!(names, KernelProfile::SWITCHES);
    for (switch, text) in &KernelProfile::EXPLAINED[1..] {
        let sourced = text.contains(|c: char| c.is_ascii_digit());
        assert!(sourced && text.ends_with('.') && !text.contains("  "), "{switch}: {text:?}");
    }
}

#[test]
fn switches_have_one_name_each() {
    let mut names = KernelProfile::SWITCHES.to_vec();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), KernelProfile::SWITCHES.len());
}

#[test]
fn bad_profiles_name_the_value_and_the_rule() {
    for (text, part) in [
        ("6.13", "did you mean 6.12"),
        ("", "profile \"\": must be one of 5.10"),
        ("zebra", "must be one of 5.10, 5.15"),
        ("6.1async", "did you mean 6.1-async"),
        ("6.12,pases=root", "did you mean passes"),
        ("6.12,zzzzzzzz=1", "must be one of design"),
        ("6.12,passes=4K+2M", "passes=\"4K+2M\": must be rising levels"),
        ("6.12,passes", "must be written switch=value"),
        ("6.12,", "must be written switch=value"),
        ("6.12,ownership=host", "must be vcpu, mmu"),
        ("6.12,design=snyc", "must be in-place"),
        ("6.12,frozen=0x+5", "must be a 64-bit number"),
        ("6.12,frozen=0x10000000000000000", "must be a 64-bit number"),
        ("6.12,frozen=0x9a0", "frozen=0x9a0: must have neither"),
        ("6.12,frozen=0x5a1", "must have neither bits 0-2"),
        ("6.12,frozen=0x15a0", "nor frame bits"),
        ("6.12,frozen=0", "must differ from the empty values"),
        ("6.12,frozen=0x8000000000000000", "must differ from the empty values"),
        ("6.12,nonpresent=0x800", "nonpresent=0x800: must be 0 or bit 63"),
        ("6.12,set-spte-gfn=maybe", "must be on, off"),
    ] {
        let error = KernelProfile::named(text).unwrap_err();
        assert!(error.to_string().contains(part), "{text:?}: {error}");
    }
    assert!(matches!(KernelProfile::named("6.13"), Err(ProfileError::UnknownProfile(u)) if u.name == "6.13"));
}

proptest! {
    #[test]
    fn no_text_panics(text in ".{0,60}") {
        let _ = KernelProfile::named(&text);
    }

    #[test]
    fn no_switch_text_panics(
        switch in proptest::sample::select(KernelProfile::SWITCHES),
        value in "[ -~]{0,24}",
    ) {
        let text = format!("7.2,{switch}={value}");
        if let Ok(p) = KernelProfile::named(&text) {
            prop_assert_eq!(named(&p.to_string()), p);
        }
    }
}
