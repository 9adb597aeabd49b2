//! The two questions about one transition, as functions of values alone.
//!
//! [`drifted`]: can the rebuilt value have become the recorded old value by a write that has no event?
//! [`lawful`]: is old -> new a step this kernel makes? It catches what a chain of values cannot: a corrupted bit that the
//! next event would excuse as an A or D set by hardware.

use tdpmmu_spte::geometry::round_down;
use tdpmmu_spte::{Class, Format, FormatKind, KernelProfile, RemakeDirty, Spte};

/// How a value can change without an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drift {
    /// Not at all.
    Same,
    /// A, or A and D of a writable leaf, set by the hardware.
    Hardware,
    /// W added by the fast page fault (and perhaps A and D by the hardware).
    FastFault,
}

/// From the rebuilt `value` to the recorded `old`.
pub(crate) fn drifted(f: &Format, level: u8, value: u64, old: u64) -> Option<Drift> {
    if value == old {
        return Some(Drift::Same);
    }
    let (v, o) = (Spte(value), Spte(old));
    if !v.is_leaf(level) || !o.is_leaf(level) {
        return None;
    }
    if hardware_set(f, value, old) {
        return Some(Drift::Hardware);
    }
    let fixable = !f.is_writable(v) && f.is_mmu_writable(v) && f.is_host_writable(v);
    let fixed = f.with_write(v);
    if fixable && f.is_writable(o) && (fixed.0 == old || hardware_set(f, fixed.0, old)) {
        return Some(Drift::FastFault);
    }
    None
}

/// Did the hardware turn `before` into `after`? It adds A; it adds D only with A and only under W; it never takes any.
fn hardware_set(f: &Format, before: u64, after: u64) -> bool {
    let added = after & !before;
    before & !after == 0
        && added != 0
        && added & !(f.accessed | f.dirty) == 0
        && f.ad_enabled(Spte(before))
        && (added & f.dirty == 0 || (f.is_writable(Spte(before)) && after & f.accessed != 0))
}

/// One transition, for judgement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) gfn: u64,
    pub(crate) level: u8,
    pub(crate) old: u64,
    pub(crate) new: u64,
    /// The thread is known to serve a guest's fault on this entry, so the leaf is no prefetch.
    pub(crate) demand_fault: bool,
}

/// Is this a step the kernel makes? `Err` is the rule.
pub(crate) fn lawful(p: &KernelProfile, f: &Format, s: &Step) -> Result<(), &'static str> {
    let (old, new) = (Spte(s.old), Spte(s.new));
    if s.old == s.new {
        return Err("an event must change the entry");
    }
    if s.gfn != round_down(s.gfn, s.level) {
        return Err("the gfn of an entry must be aligned to its level");
    }
    let (from, to) = (f.classify(old, s.level), f.classify(new, s.level));
    match to {
        Class::Other => return Err("the new value is none that this kernel writes"),
        Class::Leaf => shape_of_leaf(f, new, s.level)?,
        Class::Table => shape_of_table(f, new, s.level)?,
        Class::Mmio if s.level != 1 => return Err("an MMIO entry is at level 1 only"),
        Class::Mmio if f.kind == FormatKind::Npt && f.mmio_gfn(new) != s.gfn => {
            return Err("an MMIO entry must name its own gfn");
        }
        _ => {}
    }
    if to == Class::Leaf && s.demand_fault && f.ad_enabled(new) && s.new & f.accessed == 0 {
        return Err("a leaf made for a fault has A set");
    }
    match (from, to) {
        (Class::Other, _) => Err("the old value is none that this kernel writes"),
        (Class::Frozen, _) => Err("a frozen entry may only be changed, without event, by who froze it"),
        (Class::Table, Class::Table) => Err("a table entry must not change the table it points to"),
        (Class::Table, Class::Mmio) => Err("a table must not become an MMIO entry"),
        (Class::Empty, Class::Empty) => Err("an event must change the entry"),
        (Class::Mmio, Class::Table) => Err("an MMIO entry is at level 1 only"),
        (Class::Leaf, Class::Leaf) => leaf_to_leaf(p, f, old, new),
        (Class::Empty | Class::Mmio, Class::Leaf) => fresh_leaf(p, f, s),
        _ => Ok(()),
    }
}

fn shape_of_leaf(f: &Format, leaf: Spte, level: u8) -> Result<(), &'static str> {
    if level > 3 {
        return Err("a leaf is at level 1, 2 or 3");
    }
    if f.write_state(leaf).is_err() {
        return Err("the leaf's W, MMU-writable and host-writable bits contradict each other");
    }
    if leaf.pfn() != round_down(leaf.pfn(), level) {
        return Err("the frame of a huge leaf must be aligned to its level");
    }
    if f.kind == FormatKind::Npt {
        let must = Spte::PRESENT | f.present | f.user;
        let page_size = if level > 1 { Spte::PAGE_SIZE } else { 0 };
        let may = must
            | page_size
            | f.write
            | f.accessed
            | f.dirty
            | f.host_writable
            | f.mmu_writable
            | f.nx
            | Spte::PFN_MASK;
        if leaf.0 & must != must || leaf.0 & !may != 0 {
            return Err("the leaf has a bit too many or too few");
        }
    }
    Ok(())
}

fn shape_of_table(f: &Format, table: Spte, level: u8) -> Result<(), &'static str> {
    if level < 2 {
        return Err("a table entry is at level 2 or above");
    }
    let plain = [f.table(table.pfn(), false), f.table(table.pfn(), true)];
    let ok = match f.kind {
        FormatKind::Npt => plain.contains(&table),
        // Without exec-only support bit 0 comes from elsewhere; R, W and X are set in any case.
        FormatKind::Ept => {
            plain.iter().any(|p| (p.0 | f.accessed | 7) & 0xfff == (table.0 | f.accessed) & 0xfff)
        }
    };
    if ok { Ok(()) } else { Err("the table entry has a bit too many or too few") }
}

fn fresh_leaf(p: &KernelProfile, f: &Format, s: &Step) -> Result<(), &'static str> {
    let new = Spte(s.new);
    if !f.ad_enabled(new) {
        return Ok(());
    }
    let (w, d) = (f.is_writable(new), s.new & f.dirty != 0);
    // Re-making over any entry with its W bit set skips D up to 6.12, MMIO entries included.
    let skips = matches!(p.remake_dirty, RemakeDirty::SkipWhenOldWritable) && s.old & f.write != 0;
    if w && !skips && !d {
        return Err("a writable leaf is made with D set");
    }
    if w && skips && d {
        return Err("a leaf made over a writable entry is made without D");
    }
    if !w && d {
        return Err("a read-only leaf is made without D");
    }
    Ok(())
}

fn leaf_to_leaf(p: &KernelProfile, f: &Format, old: Spte, new: Spte) -> Result<(), &'static str> {
    if old.pfn() != new.pfn() {
        return Err("the frame of a leaf must not change without going through non-present");
    }
    if f.kind == FormatKind::Ept {
        // Access tracking and the A/D modes move more bits, and there is no ground truth to be stricter by.
        return Ok(());
    }
    let changed = old.0 ^ new.0;
    let (w, m, a, d) = (f.write, f.mmu_writable, f.accessed, f.dirty);
    if changed & !(w | m | a | d | f.host_writable) != 0 {
        return Err("only W, A, D and the writable marks of a leaf may change in place");
    }
    let skips = matches!(p.remake_dirty, RemakeDirty::SkipWhenOldWritable);
    match (f.is_writable(old), f.is_writable(new)) {
        (false, true) if new.0 & d == 0 => Err("a leaf that becomes writable gets D"),
        (false, true) => Ok(()),
        (true, false) if changed == w || changed == w | m => Ok(()),
        (true, false) => Err("write protection takes W, or W and MMU-writable, and nothing else"),
        (true, true) if changed & !(a | d) != 0 => Err("the writable marks of a writable leaf must stay"),
        (true, true) if skips && new.0 & !old.0 & d != 0 => Err("re-making a writable leaf does not set D"),
        (true, true) if !skips && old.0 & !new.0 & d != 0 => {
            Err("re-making a writable leaf does not clear D")
        }
        (true, true) => Ok(()),
        (false, false) if changed == a => Ok(()),
        (false, false) if changed == m && old.0 & m != 0 => Ok(()),
        (false, false) => Err("of a read-only leaf only A, or MMU-writable when it goes, may change"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npt(name: &str) -> (KernelProfile, Format) {
        let p = KernelProfile::named(name).unwrap();
        (p, p.format(FormatKind::Npt))
    }

    fn judge(name: &str, level: u8, old: u64, new: u64) -> Result<(), &'static str> {
        let (p, f) = npt(name);
        lawful(&p, &f, &Step { gfn: 0x200, level, old, new, demand_fault: false })
    }

    #[test]
    fn hardware_adds_a_and_d_but_takes_nothing_and_writes_only_under_w() {
        let (_, f) = npt("6.1");
        assert_eq!(drifted(&f, 1, 0x1000e47, 0x1000e67), Some(Drift::Hardware));
        assert_eq!(drifted(&f, 1, 0x1000e27, 0x1000e67), Some(Drift::Hardware));
        assert_eq!(drifted(&f, 1, 0x1000e67, 0x1000e47), None);
        assert_eq!(drifted(&f, 1, 0x1000825, 0x1000865), None);
        assert_eq!(drifted(&f, 1, 0x1000e07, 0x1000e47), None);
        assert_eq!(drifted(&f, 2, 0x1000827, 0x1000867), None);
    }

    #[test]
    fn the_fast_page_fault_needs_the_mmu_writable_mark() {
        let (_, f) = npt("6.1");
        assert_eq!(drifted(&f, 1, 0x1000e65, 0x1000e67), Some(Drift::FastFault));
        assert_eq!(drifted(&f, 1, 0x1000a65, 0x1000a67), None);
        assert_eq!(drifted(&f, 1, 0x1000825, 0x1000827), None);
    }

    #[test]
    fn a_leaf_keeps_its_frame_and_write_protection_takes_w_only() {
        assert!(judge("6.1", 1, 0x1000e67, 0x1000e65).is_ok());
        assert!(judge("6.1", 1, 0x1000e67, 0x1000e45).is_err());
        assert!(judge("6.1", 1, 0x1000e67, 0x2000e65).is_err());
        assert!(judge("6.1", 2, 0x20_0000_0ee7, 0x20_0000_0ae5).is_ok());
    }

    #[test]
    fn a_re_made_leaf_loses_d_up_to_6_12_only() {
        assert!(judge("6.12", 1, 0x1000e67, 0x1000e27).is_ok());
        assert!(judge("7.2", 1, 0x1000e67, 0x1000e27).is_err());
    }

    #[test]
    fn empty_and_frozen_values_of_another_kernel_are_refused() {
        assert!(judge("6.1", 1, 0x1000e67, 0x5a0).is_ok());
        assert!(judge("6.12", 1, 0x1000e67, 0x5a0).is_err());
        assert!(judge("6.12", 1, 0x1000e67, 0).is_err());
    }
}
