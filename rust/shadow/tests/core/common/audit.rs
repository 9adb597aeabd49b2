//! The books of a shadow MMU against what its tables say: everything is recounted from the entries.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_shadow::{LpageInfo, PageInfo, ShadowDesign};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::span;

use super::{Lock, World};

/// What does not add up; empty when everything does.
pub fn audit(world: &World, guard: &Lock<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let pages = world.mmu.pages(guard);
    let by_table: BTreeMap<u32, &PageInfo> = pages.iter().map(|page| (page.table, page)).collect();
    let format = *world.mmu.format();
    let mut rmaps: BTreeMap<(u8, u8, u64), BTreeSet<(u32, u16)>> = BTreeMap::new();
    let mut parents: BTreeMap<u32, Vec<(u32, u16)>> = BTreeMap::new();
    let mut leaves = [0u64; 4];
    let mut writable = BTreeSet::new();
    for page in &pages {
        let level = page.role.level();
        let mut marks = 0;
        for (index, entry) in world.pool.entries(page.table).iter().enumerate() {
            let (index, spte) = (index as u16, Spte(entry.load(Relaxed)));
            let marked = world.mmu.unsync_mark(guard, page.table, index);
            marks += u32::from(marked);
            let mut unsync = false;
            if spte.is_leaf(level) {
                let gfn = world.mmu.gfn_at(guard, page.table, index);
                leaves[usize::from(level)] += 1;
                rmaps.entry((page.as_id, level, gfn / span(level))).or_default().insert((page.table, index));
                if format.is_writable(spte) {
                    writable.insert((page.as_id, gfn, level));
                }
            } else if spte.is_table(level) {
                let child = spte.pfn() as u32;
                parents.entry(child).or_default().push((page.table, index));
                match by_table.get(&child) {
                    None => wrong.push(format!("{}[{index}] names {child}, which is no page", page.table)),
                    Some(child) => {
                        unsync = child.unsync || child.unsync_children != 0;
                        if child.role.level() + 1 != level
                            || child.invalid
                            || child.obsolete && !page.obsolete
                        {
                            wrong.push(format!("{}[{index}] of level {level} names {child:?}", page.table));
                        }
                    }
                }
            }
            if spte.is_present() && page.invalid {
                wrong.push(format!("invalid page {} has entry {index}", page.table));
            }
            if marked != unsync {
                wrong.push(format!("{}[{index}]: marked {marked}, unsync below {unsync}", page.table));
            }
        }
        if marks != page.unsync_children {
            wrong.push(format!("{} counts {} marks, has {marks}", page.table, page.unsync_children));
        }
        if page.unsync && (level != 1 || page.role.direct() || page.invalid) {
            wrong.push(format!("{page:?} is unsync"));
        }
        if page.listed == page.invalid || !page.in_hash {
            wrong.push(format!("{page:?}: listed, or not, and hashed, or not"));
        }
    }
    for page in &pages {
        let mut named = parents.remove(&page.table).unwrap_or_default();
        named.sort_unstable();
        if named != page.parents {
            wrong.push(format!("{} has parents {named:?}, knows {:?}", page.table, page.parents));
        }
    }
    usable_pages_are_one_of_a_kind(&pages, &mut wrong);
    in_order(world, guard, &by_table, &mut wrong);
    shadowed_gfns_are_protected(&pages, &writable, &mut wrong);
    let books = world.mmu.books();
    for slot in books.iter() {
        for level in 1..=3u8 {
            for frame in slot.base / span(level)..=(slot.base + slot.pages - 1) / span(level) {
                let gfn = (frame * span(level)).max(slot.base);
                let said = world.mmu.rmap_of(guard, slot.as_id, gfn, level);
                let is = rmaps.remove(&(slot.as_id, level, frame)).unwrap_or_default();
                if !said.iter().copied().eq(is.iter().copied()) {
                    wrong.push(format!("gfn {gfn:#x} level {level}: reverse map {said:?}, leaves {is:?}"));
                }
            }
        }
        lpage_adds_up(world, slot, &pages, &mut wrong);
    }
    if !rmaps.is_empty() {
        wrong.push(format!("leaves without a memslot: {rmaps:x?}"));
    }
    let counts = world.mmu.counts();
    let held = pages.iter().filter(|page| page.invalid && page.root_count != 0).count() as u64;
    let waiting = pages.iter().filter(|page| page.invalid && page.root_count == 0).count() as u64;
    let obsolete = pages.iter().filter(|page| page.obsolete && page.listed).count() as u64;
    let expected = (pages.len() as u64 - waiting, held, obsolete, leaves);
    let said = (counts.pages, counts.zapped_held, counts.obsolete, counts.leaves);
    if said != expected {
        wrong.push(format!("(pages, held, obsolete, leaves): counted {said:?}, are {expected:?}"));
    }
    wrong.extend(world.mmu.violations());
    wrong
}

fn usable_pages_are_one_of_a_kind(pages: &[PageInfo], wrong: &mut Vec<String>) {
    let mut seen = BTreeSet::new();
    for page in pages.iter().filter(|page| !page.obsolete) {
        if !seen.insert((page.gfn, page.role.raw())) {
            wrong.push(format!("a second page like {page:?}"));
        }
    }
}

/// Oldest first: everything obsolete before anything that is not, and the list has exactly the listed.
fn in_order(world: &World, guard: &Lock<'_>, by_table: &BTreeMap<u32, &PageInfo>, wrong: &mut Vec<String>) {
    let listed = world.mmu.active_pages(guard);
    let obsolete: Vec<bool> = listed.iter().map(|table| by_table[table].obsolete).collect();
    if !obsolete.is_sorted_by(|older, newer| older >= newer) {
        wrong.push(format!("obsolete pages among the newer ones: {obsolete:?}"));
    }
    let flagged = by_table.values().filter(|page| page.listed).count();
    if listed.len() != flagged {
        wrong.push(format!("{} pages on the list, {flagged} say so", listed.len()));
    }
}

/// No leaf lets the guest write a table that a page shadows in step with it.
fn shadowed_gfns_are_protected(
    pages: &[PageInfo],
    writable: &BTreeSet<(u8, u64, u8)>,
    wrong: &mut Vec<String>,
) {
    for page in pages.iter().filter(|page| !page.role.direct() && !page.obsolete && !page.unsync) {
        for level in 1..=3 {
            let frame = page.gfn / span(level) * span(level);
            if writable.contains(&(page.as_id, frame, level)) {
                wrong.push(format!("gfn {:#x} may be written at level {level} behind {page:?}", page.gfn));
            }
        }
    }
}

fn lpage_adds_up(
    world: &World,
    slot: &tdpmmu_shadow::SlotBooks,
    pages: &[PageInfo],
    wrong: &mut Vec<String>,
) {
    let kept = world.mmu.design() == ShadowDesign::GenKept;
    let bare = LpageInfo::new(slot.base, slot.pages, slot.base).expect("small");
    for level in [2, 3] {
        for frame in slot.base / span(level)..=(slot.base + slot.pages - 1) / span(level) {
            let gfn = (frame * span(level)).max(slot.base);
            let shadowing = pages.iter().filter(|page| {
                page.gfn / span(level) == frame
                    && slot.gfns().contains(&page.gfn)
                    && page.as_id == slot.as_id
                    && !page.role.direct()
                    && !page.invalid
                    && !(kept && page.obsolete)
            });
            let is = bare.reasons(gfn, level) + shadowing.count() as u32;
            let said = slot.lpage.reasons(gfn, level);
            if said != is {
                wrong.push(format!(
                    "gfn {gfn:#x} level {level}: {said} reasons against a huge page, {is} are"
                ));
            }
        }
    }
}
