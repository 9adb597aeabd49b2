//! Every combination of the permission and software bits, against a model written down a second time in booleans;
//! every combination of facts for a leaf.

use tdpmmu_spte::{
    Access, AdMode, Aging, Class, Format, FormatKind, KernelProfile, MakeLeaf, RemakeDirty, Spte, WriteState,
};

/// Each profile's formats: NPT, and EPT with and without A/D bits and exec-only mappings.
fn formats() -> Vec<Format> {
    let mut all = Vec::new();
    for p in KernelProfile::ALL {
        all.push(p.format(FormatKind::Npt));
        let lockless = p.aging == Aging::LocklessRcu;
        for (exec_only, ad_bits) in [(true, true), (false, true), (true, false), (false, false)] {
            let ept = Format::ept(p.format_nonpresent, p.format_frozen, exec_only, ad_bits);
            all.push(ept.with_lockless_aging(lockless));
        }
    }
    all.dedup();
    all
}

/// The bits whose combinations matter, by number.
fn interesting(f: &Format) -> &'static [u32] {
    match f.kind {
        FormatKind::Npt => &[0, 1, 2, 5, 6, 7, 9, 10, 11, 63],
        FormatKind::Ept => &[0, 1, 2, 7, 8, 9, 11, 52, 53, 54, 56, 57, 58, 63],
    }
}

fn combinations(f: &Format) -> impl Iterator<Item = Spte> + use<> {
    let bits = interesting(f);
    (0..1u32 << bits.len())
        .map(move |n| Spte(bits.iter().enumerate().map(|(i, b)| u64::from(n >> i & 1) << b).sum::<u64>()))
}

/// An entry taken apart by bit numbers, independently of the masks in `Format`.
struct Parts {
    r: bool,
    w: bool,
    x: bool,
    a: bool,
    d: bool,
    ps: bool,
    present: bool,
    host: bool,
    mmu: bool,
    ad: u64,
}

fn parts(f: &Format, s: Spte) -> Parts {
    let bit = |n: u32| s.raw() >> n & 1 == 1;
    match f.kind {
        FormatKind::Npt => Parts {
            r: bit(0),
            w: bit(1),
            x: !bit(63),
            a: bit(5),
            d: bit(6),
            ps: bit(7),
            present: bit(11),
            host: bit(9),
            mmu: bit(10),
            ad: 0,
        },
        FormatKind::Ept => Parts {
            r: bit(0),
            w: bit(1),
            x: bit(2),
            a: f.ad_bits && bit(8),
            d: f.ad_bits && bit(9),
            ps: bit(7),
            present: bit(11),
            host: bit(57),
            mmu: bit(58),
            ad: s.raw() >> 52 & 3,
        },
    }
}

#[test]
fn predicates_agree_with_a_model_on_every_combination() {
    for f in formats() {
        for s in combinations(&f) {
            let p = parts(&f, s);
            let ad_on = p.ad != 1;
            let tracked = f.kind == FormatKind::Ept && p.present && p.ad == 1 && !p.r && !p.w && !p.x;
            assert_eq!(s.is_present(), p.present);
            for level in 1..=5 {
                assert_eq!(s.is_leaf(level), p.present && (level == 1 || p.ps));
                assert_eq!(s.is_table(level), p.present && !(level == 1 || p.ps));
            }
            assert_eq!(f.is_writable(s), p.w);
            assert_eq!(f.is_mmu_writable(s), p.mmu);
            assert_eq!(f.is_host_writable(s), p.host);
            assert_eq!(f.is_executable(s), p.x);
            assert_eq!(f.is_access_tracked(s), tracked, "{s:?}");
            let mode = [AdMode::Enabled, AdMode::Disabled, AdMode::WriteProtect, AdMode::WriteProtect];
            assert_eq!(f.ad_mode(s), mode[p.ad as usize]);
            assert_eq!(f.ad_enabled(s), ad_on);
            assert_eq!(f.needs_write_protect(s), p.ad != 0);
            let dirty = if ad_on { p.d } else { p.w };
            let accessed = if ad_on { p.a } else { !tracked };
            assert_eq!((f.is_dirty(s), f.is_accessed(s)), (dirty, accessed), "{s:?}");
            assert_eq!(f.leaf_needs_dirty(s), p.present && dirty);
            assert_eq!(f.leaf_needs_accessed(s), p.present && accessed);
            let volatile = (!p.w && p.mmu)
                || tracked
                || (ad_on && !p.a)
                || (ad_on && p.w && !p.d)
                || (f.lockless_aging && !ad_on);
            assert_eq!(f.is_volatile(s), volatile, "{f:?} {s:?}");
            let settled = f.ad_bits && p.present && p.host && p.mmu && p.w && p.a && p.d && p.ad == 0;
            assert_eq!(f.is_settled(s), settled);
            assert!(!(settled && volatile));
            assert_eq!(f.needs_atomic_write(s, 2), p.present && p.ps && volatile);
            for (write, exec, want) in
                [(false, false, p.r), (true, false, p.w), (false, true, p.x), (true, true, p.x)]
            {
                assert_eq!(f.allows(s, write, exec), p.present && want);
            }
            let log = if p.ad == 0 { f.dirty } else { f.write };
            assert_eq!((f.dirty_log_bit(s, false), f.dirty_log_bit(s, true)), (log, f.write));
        }
    }
}

#[test]
fn exactly_four_write_states_are_reachable() {
    for f in formats() {
        let mut seen = std::collections::HashMap::new();
        for s in combinations(&f) {
            let p = parts(&f, s);
            let legal = (!p.w || p.mmu) && (!p.mmu || p.host);
            match f.write_state(s) {
                Ok(state) => {
                    assert!(legal, "{s:?}");
                    *seen.entry(state).or_insert(0u32) += 1;
                }
                Err(e) => {
                    assert!(!legal, "{s:?}");
                    assert_eq!(
                        (e.spte, e.host_writable, e.mmu_writable, e.writable),
                        (s, p.host, p.mmu, p.w)
                    );
                    let rule = if p.w && !p.mmu { "W needs" } else { "MMU-writable needs" };
                    assert!(
                        e.to_string().contains(rule) && e.to_string().contains(&format!("{s:#x}")),
                        "{e}"
                    );
                }
            }
        }
        let states = [WriteState::Writable, WriteState::Fixable, WriteState::Shadowed, WriteState::ReadOnly];
        let each = 1 << (interesting(&f).len() - 3);
        assert!(states.iter().all(|s| seen[s] == each), "{seen:?}");
    }
}

#[test]
fn no_value_is_in_two_classes() {
    for f in formats() {
        for s in combinations(&f).chain([f.empty(), f.frozen(), f.mmio(0x280000, Access::ALL, 0x7ffff)]) {
            let classes =
                [s.is_leaf(2), s.is_table(2), f.is_empty(s), f.is_frozen(s), !s.is_present() && f.is_mmio(s)];
            let n = classes.iter().filter(|c| **c).count();
            assert!(n <= 1, "{s:?} {classes:?}");
            assert_eq!(n == 0, f.classify(s, 2) == Class::Other);
        }
        assert_eq!(f.classify(f.empty(), 1), Class::Empty);
        assert_eq!(f.classify(f.frozen(), 1), Class::Frozen);
        assert!(!f.hardware_present(f.empty()) && !f.hardware_present(f.frozen()));
    }
}

/// What may happen to a leaf without mmu_lock, before aging went lockless.
fn lockless_changes(f: &Format, s: Spte) -> Vec<Spte> {
    let mut to = Vec::new();
    if f.hardware_present(s) {
        to.push(f.with_accessed(s));
        if f.is_writable(s) {
            to.push(f.with_dirty(s));
        }
    }
    let open = f.restore_access_track(s);
    to.push(open);
    if f.is_mmu_writable(s) {
        to.push(f.with_write(open));
    }
    to.retain(|t| *t != s);
    to
}

#[test]
fn a_leaf_is_volatile_exactly_if_somebody_may_change_it_without_the_lock() {
    for f in formats().into_iter().filter(|f| !f.lockless_aging) {
        let mut both = [0u32; 2];
        for s in combinations(&f).filter(|s| s.is_leaf(2) && f.write_state(*s).is_ok()) {
            // An EPT without A/D bits has no entry that claims them; an entry nobody can use is nobody's to change.
            let usable = f.hardware_present(s) || f.restore_access_track(s) != s || f.is_mmu_writable(s);
            if !usable || (!f.ad_bits && f.ad_enabled(s)) {
                continue;
            }
            let changes = lockless_changes(&f, s);
            let unused_fixable = !f.hardware_present(s) && f.ad_enabled(s);
            if !unused_fixable {
                assert_eq!(f.is_volatile(s), !changes.is_empty(), "{f:?} {s:?} {changes:?}");
            }
            both[f.is_volatile(s) as usize] += 1;
            for t in changes {
                assert_eq!((t.pfn(), f.is_host_writable(t)), (s.pfn(), f.is_host_writable(s)));
                assert!(f.write_state(t).is_ok(), "{s:?} -> {t:?}");
            }
        }
        assert!(both[0] > 0 && both[1] > 0, "{both:?}");
    }
}

#[test]
fn access_tracking_is_undone_by_the_fault_path() {
    for f in formats() {
        for s in combinations(&f).filter(|s| s.is_leaf(2) && f.write_state(*s).is_ok()) {
            let aged = f.without_accessed(s);
            assert!(!f.is_accessed(aged) || (f.ad_enabled(s) && f.accessed == 0), "{s:?}");
            assert_eq!(f.without_accessed(aged), aged);
            if f.ad_enabled(s) {
                assert_eq!(aged, Spte(s.raw() & !f.accessed));
                assert_eq!(f.restore_access_track(s), s);
                continue;
            }
            assert!(!f.hardware_present(aged) && f.write_state(aged).is_ok());
            if f.is_access_tracked(s) {
                continue;
            }
            let back = f.restore_access_track(aged);
            let saved = Format::SAVED_BITS << Format::SAVED_SHIFT;
            let with_w = if f.is_writable(s) { f.with_write(back) } else { back };
            // A leaf with W alone has nothing to save: it stays tracked. No such leaf exists (R comes with user).
            if s.raw() & Format::SAVED_BITS != 0 {
                assert_eq!(with_w, Spte(s.raw() & !saved), "{s:?} -> {aged:?} -> {back:?}");
            }
        }
    }
}

#[test]
fn every_leaf_is_built_by_the_rules() {
    let olds = |f: &Format| {
        let mut olds =
            vec![f.empty(), f.mmio(5, Access::ALL, 1), f.mmio(5, Access::READ, 1), f.table(9, false)];
        for (host_writable, write_protected) in [(true, false), (true, true), (false, false)] {
            let m = MakeLeaf { host_writable, write_protected, level: 2, ..Default::default() };
            olds.push(f.make_leaf(&m).spte);
        }
        olds
    };
    let mut built = 0u32;
    for f in formats() {
        for n in 0..1u32 << 9 {
            let on = |i: u32| n >> i & 1 == 1;
            for (level, ad_mode) in (1..=3).flat_map(|l| {
                [AdMode::Enabled, AdMode::Disabled, AdMode::WriteProtect].into_iter().map(move |a| (l, a))
            }) {
                for old in olds(&f) {
                    let remake =
                        if on(8) { RemakeDirty::AlwaysSet } else { RemakeDirty::SkipWhenOldWritable };
                    let m = MakeLeaf {
                        pfn: 0x1234_5678,
                        level,
                        access: Access { write: on(0), exec: on(1), user: true },
                        prefetch: on(2),
                        host_writable: on(3),
                        write_protected: on(4),
                        old,
                        dirty_tracked: on(5),
                        ad_mode,
                        nx_mitigation: on(6),
                        remake,
                    };
                    if on(7) {
                        continue;
                    }
                    check_leaf(&f, &m);
                    built += 1;
                }
            }
        }
    }
    assert!(built > 100_000);
}

/// The steps of making a leaf, each as a statement about the result.
fn check_leaf(f: &Format, m: &MakeLeaf) {
    let made = f.make_leaf(m);
    let s = made.spte;
    let why = || format!("{f:?}\n{m:?}\n{made:?}");
    assert_eq!(f.classify(s, m.level), Class::Leaf);
    assert_eq!(s.pfn(), m.pfn & !((1 << (9 * (m.level - 1))) - 1));
    assert_eq!(s.raw() & Spte::PAGE_SIZE != 0, m.level > 1);
    assert!(!f.is_mmio(s), "{}", why());

    let hardware_ad = f.kind == FormatKind::Npt || (f.ad_bits && m.ad_mode != AdMode::Disabled);
    assert_eq!(f.ad_enabled(s), hardware_ad);
    assert_eq!(f.is_accessed(s), !m.prefetch, "{}", why());
    assert_eq!(f.is_access_tracked(s), m.prefetch && !hardware_ad);

    // Permissions, as they are once access tracking is undone.
    let mut open = f.restore_access_track(s);
    if f.is_mmu_writable(s) {
        open = f.with_write(open);
    }
    let old_w = m.old.raw() & 2 != 0 && (m.level == 1 || m.old.raw() & 0x80 != 0);
    let old_proves = match m.remake {
        RemakeDirty::SkipWhenOldWritable => old_w,
        RemakeDirty::AlwaysSet => old_w && m.old.is_leaf(m.level),
    };
    let wanted = m.access.write && m.host_writable;
    let refused = wanted && m.write_protected && !old_proves;
    assert_eq!(made.write_protected, refused, "{}", why());
    assert_eq!(f.is_writable(open), wanted && !refused, "{}", why());
    assert_eq!(f.is_executable(open), m.access.exec && !(m.nx_mitigation && m.level > 1), "{}", why());
    assert!(f.allows(open, false, false));
    assert_eq!(f.is_host_writable(s), m.host_writable);
    let state = f.write_state(s).unwrap_or_else(|e| panic!("{e}\n{}", why()));
    let expect = match (m.host_writable, f.is_writable(open), f.is_access_tracked(s)) {
        (false, ..) => WriteState::ReadOnly,
        (true, false, _) => WriteState::Shadowed,
        (true, true, false) => WriteState::Writable,
        (true, true, true) => WriteState::Fixable,
    };
    assert_eq!(state, expect, "{}", why());

    let skip = m.remake == RemakeDirty::SkipWhenOldWritable && old_w;
    assert_eq!(s.raw() & f.dirty != 0, hardware_ad && f.is_writable(s) && !skip, "{}", why());
    assert_eq!(made.mark_dirty, m.dirty_tracked && f.is_writable(s), "{}", why());
}

#[test]
fn splits_and_collapses_are_inverse_on_every_leaf() {
    for f in formats() {
        for level in [2u8, 3] {
            let step = 1u64 << (9 * (level - 2));
            let base = 5 * 512 * step;
            for s in combinations(&f).filter(|s| s.is_leaf(2) && s.raw() & Spte::PAGE_SIZE != 0) {
                let huge = s.with_pfn(base);
                for i in [0usize, 1, 255, 511] {
                    let child = f.split_child(huge, level, i, false);
                    assert!(child.is_leaf(level - 1));
                    assert_eq!(child.pfn(), base + i as u64 * step);
                    assert_eq!(f.write_state(child).is_ok(), f.write_state(huge).is_ok());
                    assert_eq!(f.collapse(child, level, false), huge, "{f:?}");
                }
            }
        }
    }
}

#[test]
fn the_nx_mitigation_opens_small_leafs_and_closes_huge_ones() {
    for f in formats() {
        for huge in combinations(&f).filter(|s| s.is_leaf(2) && s.raw() & Spte::PAGE_SIZE != 0) {
            let child = f.split_child(huge, 2, 0, true);
            let open = f.restore_access_track(child);
            // Without R and W, X alone decides whether an entry without A/D counts as tracked.
            let readable = f.restore_access_track(huge).raw() & 1 != 0;
            if readable {
                assert!(f.is_executable(open), "{f:?} {huge:?} {child:?}");
                assert_eq!(f.is_access_tracked(child), f.is_access_tracked(huge));
                let closed = f.collapse(child, 2, true);
                assert!(!f.is_executable(f.restore_access_track(closed)));
                assert_eq!(f.is_access_tracked(closed), f.is_access_tracked(huge));
            }
        }
    }
}

#[test]
fn a_table_never_restricts_and_is_never_a_leaf() {
    for f in formats() {
        for (pfn, ad_disabled) in [(1, false), (1, true), ((1 << 38) - 1, false)] {
            let s = f.table(pfn, ad_disabled);
            assert!((2..=5).all(|l| s.is_table(l)) && f.hardware_present(s) && !f.is_mmio(s));
            assert!(f.is_writable(s) && f.is_executable(s) && s.pfn() == pfn);
            let disabled = f.kind == FormatKind::Ept && (ad_disabled || !f.ad_bits);
            assert_eq!(f.ad_mode(s), if disabled { AdMode::Disabled } else { AdMode::Enabled });
        }
    }
}
