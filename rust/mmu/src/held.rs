//! Zaps of leaf tables that are held by count: one event instead of 512, where nobody can tell.
//!
//! **Guarantee.** The ledger, the counts and the time that passes are those of the words one by one ([`crate::change`]). What differs is the grain: others see all of the table's
//! entries change at the end of that time. So it is done only under an invalid root with nobody listening: every vCPU has left such a root before the first of its entries
//! goes, its walks begin under others, and no two tasks zap one root at once. Under a valid root (`in-place`, a notifier) the table becomes a page, and its words go one by one.

use tdpmmu_platform::{Bulk, Mode, Platform, Task};
use tdpmmu_spte::geometry::ENTRIES;
use tdpmmu_spte::{Format, Spte};
use tdpmmu_table::Held;

use crate::TdpMmu;
use crate::change::At;
use crate::ledger::Ledger;

const ALL: u64 = ENTRIES as u64;

/// The table, if it may go in one event.
fn whole<P: Platform>(mmu: &TdpMmu<P>, table: u32, at: At) -> Option<Held> {
    let held = mmu.pool().by_count()?.get(table)?;
    let first = Spte(held.first);
    // One value, or leaves of consecutive frames.
    let plain = if first.is_present() { held.step == 1 << 12 } else { held.step == 0 };
    (plain && mmu.observer().is_none() && mmu.is_obsolete(at.root)).then_some(held)
}

/// The entries of `table` are taken out, and `new` stands in each that was present, or in all. `None`: word by word, please.
fn take_out<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    table: u32,
    at: At,
    new: Spte,
    swaps: bool,
) -> Option<u64> {
    let held = whole(mmu, table, at)?;
    let (first, format) = (Spte(held.first), mmu.format());
    let present = first.is_present();
    let (work, reads, writes) = match (M::SHARED, present) {
        (true, _) if swaps => (Bulk::Swap, 0, ALL),
        (true, true) => (Bulk::Cmpxchg, ALL, ALL),
        (_, false) => (Bulk::Read, ALL, 0),
        (false, true) if format.is_volatile(first) => (Bulk::Swap, ALL, ALL),
        (false, true) => (Bulk::Write, ALL, ALL),
    };
    P::charge_entries(work, ALL);
    // Time has passed: is it still what it was?
    if whole(mmu, table, at) != Some(held) {
        return None;
    }
    if writes != 0 && first != new {
        mmu.pool().by_count()?.set_all(table, new.raw());
    }
    if present {
        ledger.leaf(1, -(ALL as i64));
        if mmu.writes_back() {
            let owed =
                [Format::leaf_needs_dirty, Format::leaf_needs_accessed].map(|owes| owes(format, first));
            ledger.write_back(mmu, first.pfn(), ALL, owed[0], owed[1]);
        }
    }
    task.count(reads, writes);
    Some(if present { ALL } else { 0 })
}

/// Teardown of a dead leaf table.
pub(crate) fn freeze<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    table: u32,
    at: At,
) -> bool {
    take_out::<P, M>(mmu, task, ledger, table, at, mmu.format().frozen(), true).is_some()
}

/// The 4 KiB pass over a whole table; returns how many leaves it removed.
pub(crate) fn zap<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    table: u32,
    at: At,
) -> Option<u64> {
    take_out::<P, M>(mmu, task, ledger, table, at, mmu.format().empty(), false)
}

/// The words of a table have gone one by one: perhaps it need be no page any more.
pub(crate) fn settle<P: Platform>(mmu: &TdpMmu<P>, table: u32) {
    if let Some(uniform) = mmu.pool().by_count() {
        uniform.settle(table);
    }
}
