//! The choke point: every SPTE change passes here, one at a time or a leaf table at a time.
//!
//! **Guarantee.** For each change, exactly once: the observer is told, page statistics move, a removed leaf's Dirty and Accessed bits are
//! written back (kernels up to 6.12), and a table that was replaced or removed is torn down, each of its children once, and goes to RCU.
//!
//! **Mechanism.** A table is unlinked before it is torn down (rule R7). In shared mode teardown swaps the frozen value into *all* 512 entries, empty ones
//! too: a fault that saw the table linked may be about to install there, and would resurrect an entry in a dead table. Who
//! swaps a frozen value out has met another owner and waits for that owner's final store (rule R1). In exclusive mode only hardware and
//! the lockless fast fault still write, so only volatile leaves need the swap.
//!
//! **The batch.** Between two locked instructions bookkeeping costs about 3 ns an entry, more than a third of the swap. So a leaf
//! table is handled in blocks of 64: exchange them back to back into an array, then account for the array. Tables filled by one
//! memslot are uniform (same bits, consecutive frames), and for these the account is a handful of instructions a block.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use tdpmmu_platform::{Bug, Event, Mode, Platform, Site, Task};
use tdpmmu_spte::geometry::{ENTRIES, span};
use tdpmmu_spte::{Format, Spte};

use tdpmmu_table::prefetch::{Intent, LINE, prefetch};

use crate::ledger::Ledger;
use crate::{TdpMmu, held};

/// Where a change happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub as_id: u8,
    pub root: u32,
    pub gfn: u64,
    pub level: u8,
}

/// Exclusive write: exchange where something outside mmu_lock may still set bits, else a plain store. Returns the true old value.
#[inline]
pub(crate) fn exchange<P: Platform>(
    mmu: &TdpMmu<P>,
    cell: &AtomicU64,
    old: Spte,
    new: Spte,
    level: u8,
) -> Spte {
    // Up to 5.17 every leaf was stored over under the exclusive lock.
    if old.is_leaf(level) && mmu.format().is_volatile(old) && !P::bug(Bug::B14) {
        Spte(P::swap(cell, new.raw(), Site::SpteZap))
    } else {
        P::store(cell, new.raw(), Site::SpteZap);
        old
    }
}

/// Reports one change to the observer, if there is one.
#[inline]
pub(crate) fn tell<P: Platform, M: Mode>(mmu: &TdpMmu<P>, task: &Task<P>, at: At, old: Spte, new: Spte) {
    if let Some(observer) = mmu.observer() {
        observer.event(
            task.id(),
            &Event::SpteChanged {
                as_id: at.as_id,
                root: at.root,
                gfn: at.gfn,
                level: at.level,
                old: old.raw(),
                new: new.raw(),
                shared: M::SHARED,
            },
        );
    }
}

/// Reports that the entry was frozen for a change that is told when it is complete.
#[inline]
pub(crate) fn tell_frozen<P: Platform>(mmu: &TdpMmu<P>, task: &Task<P>, at: At, old: Spte) {
    let At { as_id, root, gfn, level } = at;
    mmu.tell(task, || Event::SpteFrozen { as_id, root, gfn, level, old: old.raw() });
}

/// Everything that follows from the change `old -> new` at `at`.
pub(crate) fn changed<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    at: At,
    old: Spte,
    new: Spte,
) {
    if old == new {
        return;
    }
    let format = mmu.format();
    let (was_leaf, is_leaf) = (old.is_leaf(at.level), new.is_leaf(at.level));
    debug_assert!(
        !(was_leaf && is_leaf) || old.pfn() == new.pfn(),
        "a present leaf never changes its frame (rule R5)"
    );
    debug_assert!(!is_leaf || format.write_state(new).is_ok(), "{new:?} is no legal leaf");
    let removed = old.is_table(at.level) && !new.is_table(at.level);
    let children_first = removed && mmu.profile().children_before_parent_events;
    if !children_first {
        tell::<P, M>(mmu, task, at, old, new);
    }
    if was_leaf != is_leaf {
        ledger.leaf(at.level, if is_leaf { 1 } else { -1 });
    }
    if was_leaf && mmu.writes_back() {
        let lost = |owes: fn(&Format, Spte) -> bool| owes(format, old) && !(is_leaf && owes(format, new));
        ledger.write_back(
            mmu,
            old.pfn(),
            // A huge page is one folio: its head carries the state, as in KVM (one set_pfn_dirty a leaf).
            1,
            lost(Format::leaf_needs_dirty),
            lost(Format::leaf_needs_accessed),
        );
    }
    if removed {
        removed_table::<P, M>(mmu, task, ledger, At { level: at.level - 1, ..at }, old.pfn() as u32);
    }
    if children_first {
        tell::<P, M>(mmu, task, at, old, new);
    }
}

/// What follows from the aging of a leaf, `old -> new`: Dirty that went with it (W, where hardware sets no D) belongs to the host's page. Accessed does not:
/// whoever ages is about to be told.
pub(crate) fn aged<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    at: At,
    old: Spte,
    new: Spte,
) {
    if old == new {
        return;
    }
    tell::<P, M>(mmu, task, at, old, new);
    if mmu.writes_back() {
        let dirty = mmu.format().leaf_needs_dirty(old) && !mmu.format().leaf_needs_dirty(new);
        ledger.write_back(mmu, old.pfn(), 1, dirty, false);
    }
}

/// Tears down a table that is no longer reachable from its parent. `at` is its first gfn and its own level.
fn removed_table<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    at: At,
    table: u32,
) {
    if let Some(observer) = mmu.observer() {
        observer.event(task.id(), &Event::TableUnlink { table, level: at.level, gfn: at.gfn });
    }
    mmu.nx_unlinked(table);
    let base = mmu.pool().meta(table).gfn();
    if at.level == 1 {
        freeze_leaf_table::<P, M>(mmu, task, ledger, table, At { gfn: base, ..at });
    } else {
        for index in 0..ENTRIES {
            let at = At { gfn: base + index as u64 * span(at.level), ..at };
            let cells = mmu.pool().entries(table);
            if !M::SHARED && at.level == 2 {
                // Exclusive teardown is as fast as memory: it asks for the next table while it empties this one. (Shared
                // teardown waits for its own locked instructions: a prefetch buys nothing there.)
                ledger.upcoming = cells.get(index + 1).map(|next| Spte(P::load(next, Site::SpteTeardown)));
            }
            if let Some(old) = freeze::<P, M>(mmu, task, &cells[index], at.level) {
                changed::<P, M>(mmu, task, ledger, at, old, mmu.format().frozen());
            }
        }
    }
    ledger.bury(mmu, table);
}

/// Freezes one entry of a dead table; `None` when there was nothing to take out (exclusive mode only).
fn freeze<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    cell: &AtomicU64,
    level: u8,
) -> Option<Spte> {
    let frozen = mmu.format().frozen();
    if M::SHARED {
        task.count(0, 1);
        return Some(swap_out::<P>(cell, frozen));
    }
    let old = Spte(P::load(cell, Site::SpteTeardown));
    task.count(1, 0);
    if !old.is_present() {
        return None;
    }
    task.count(0, 1);
    Some(exchange::<P>(mmu, cell, old, frozen, level))
}

/// Swaps the frozen value in and returns the final value that was there, waiting out another owner.
#[inline]
fn swap_out<P: Platform>(cell: &AtomicU64, frozen: Spte) -> Spte {
    loop {
        let old = P::swap(cell, frozen.raw(), Site::SpteTeardown);
        if old != frozen.raw() {
            return Spte(old);
        }
        P::relax(Site::SpteTeardown);
    }
}

/// Entries exchanged back to back before they are accounted for.
const BLOCK: usize = 64;

/// Teardown of a dead leaf table.
fn freeze_leaf_table<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    table: u32,
    at: At,
) {
    if P::BY_COUNT && held::freeze::<P, M>(mmu, task, ledger, table, at) {
        ledger.upcoming = None;
        return;
    }
    let frozen = mmu.format().frozen();
    let entries = mmu.pool().entries(table);
    let next =
        ledger.upcoming.take().filter(|next| next.is_table(2)).map(|next| mmu.pool().child_entries(next));
    let mut olds = [0u64; BLOCK];
    let mut writes = 0;
    for (block, cells) in entries.as_chunks::<BLOCK>().0.iter().enumerate() {
        if let Some(next) = next {
            for line in (0..BLOCK).step_by(LINE) {
                prefetch(next, block * BLOCK + line, Intent::Write);
            }
        }
        let mut shape = None;
        if M::SHARED {
            for (old, cell) in olds.iter_mut().zip(cells) {
                *old = P::swap(cell, frozen.raw(), Site::SpteTeardown);
            }
            if olds.contains(&frozen.raw()) {
                for (old, cell) in olds.iter_mut().zip(cells) {
                    if *old == frozen.raw() {
                        *old = swap_out::<P>(cell, frozen).raw();
                    }
                }
            }
            writes += BLOCK as u64;
        } else {
            let (written, known) = take_out_exclusive::<P>(mmu, cells, &mut olds, frozen);
            writes += written;
            shape = known;
        }
        let gfn = at.gfn + (block * BLOCK) as u64;
        account::<P, M>(mmu, task, ledger, At { gfn, ..at }, &olds, shape, frozen);
    }
    task.count(if M::SHARED { 0 } else { ENTRIES as u64 }, writes);
    if P::BY_COUNT {
        held::settle(mmu, table);
    }
}

/// Exclusive mode: takes the present entries of a block out; `olds` gets their true old values, the others their present ones.
/// Returns how many entries were written, and the shape of `olds` where it is known.
fn take_out_exclusive<P: Platform>(
    mmu: &TdpMmu<P>,
    cells: &[AtomicU64; BLOCK],
    olds: &mut [u64; BLOCK],
    new: Spte,
) -> (u64, Option<Shape>) {
    let shape = read_block::<P>(cells, olds);
    let format = mmu.format();
    let first = Spte(olds[0]);
    if shape.same_bits && first.is_present() {
        if format.is_volatile(first) {
            // Back to back, as in shared mode: bookkeeping between two locked instructions costs more than it does.
            for (old, cell) in olds.iter_mut().zip(cells) {
                *old = P::swap(cell, new.raw(), Site::SpteTeardown);
            }
            return (BLOCK as u64, None);
        }
        for cell in cells {
            P::store(cell, new.raw(), Site::SpteTeardown);
        }
        return (BLOCK as u64, Some(shape));
    }
    let mut writes = 0;
    for (old, cell) in olds.iter_mut().zip(cells) {
        if Spte(*old).is_present() {
            *old = exchange::<P>(mmu, cell, Spte(*old), new, 1).raw();
            writes += 1;
        }
    }
    (writes, None)
}

/// What a block of snapshots looks like.
#[derive(Clone, Copy)]
struct Shape {
    /// All entries have the same bits outside the frame number.
    same_bits: bool,
    /// ... and their frames are consecutive.
    run: bool,
}

const PFN_BITS: u64 = ((1 << 52) - 1) & !0xfff;

#[inline]
fn shape_of(values: &[u64; BLOCK]) -> Shape {
    let mut differ = 0;
    for (i, value) in values.iter().enumerate() {
        differ |= value ^ values[0].wrapping_add((i as u64) << 12);
    }
    if differ == 0 {
        return Shape { same_bits: true, run: true };
    }
    let mut bits = 0;
    for value in values {
        bits |= value ^ values[0];
    }
    Shape { same_bits: bits & !PFN_BITS == 0, run: false }
}

#[inline]
fn read_block<P: Platform>(cells: &[AtomicU64; BLOCK], olds: &mut [u64; BLOCK]) -> Shape {
    for (old, cell) in olds.iter_mut().zip(cells) {
        *old = P::load(cell, Site::SpteRead);
    }
    shape_of(olds)
}

/// Accounts for a block of level-1 changes `olds[i] -> new`, `new` not being a leaf. Entries equal to `new` did not change.
fn account<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    at: At,
    olds: &[u64; BLOCK],
    shape: Option<Shape>,
    new: Spte,
) {
    if mmu.observer().is_some() {
        for (i, &old) in olds.iter().enumerate() {
            // Exclusive teardown leaves empty and MMIO entries alone: no change, no event.
            if old != new.raw() && (M::SHARED || Spte(old).is_present()) {
                tell::<P, M>(mmu, task, At { gfn: at.gfn + i as u64, ..at }, Spte(old), new);
            }
        }
    }
    let shape = shape.unwrap_or_else(|| shape_of(olds));
    let format = mmu.format();
    let first = Spte(olds[0]);
    if shape.same_bits {
        if first.is_present() {
            ledger.leaf(1, -(BLOCK as i64));
            if mmu.writes_back() {
                let (dirty, accessed) = (format.leaf_needs_dirty(first), format.leaf_needs_accessed(first));
                if shape.run {
                    ledger.write_back(mmu, first.pfn(), BLOCK as u64, dirty, accessed);
                } else if dirty || accessed {
                    for &old in olds {
                        ledger.write_back(mmu, Spte(old).pfn(), 1, dirty, accessed);
                    }
                }
            }
        }
        return;
    }
    for &old in olds {
        let old = Spte(old);
        if old.is_present() {
            ledger.leaf(1, -1);
            if mmu.writes_back() {
                ledger.write_back(
                    mmu,
                    old.pfn(),
                    1,
                    format.leaf_needs_dirty(old),
                    format.leaf_needs_accessed(old),
                );
            }
        }
    }
}

/// Removes the present entries `range` of the live level-1 table `table`: 4 KiB pass and range zaps. Can stop at any index; the caller
/// resumes with the next range. Returns how many were removed.
pub(crate) fn zap_leaf_batch<P: Platform, M: Mode>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    table: u32,
    at: At,
    range: Range<u16>,
) -> u64 {
    if P::BY_COUNT
        && range.len() == ENTRIES
        && let Some(zapped) = held::zap::<P, M>(mmu, task, ledger, table, at)
    {
        return zapped;
    }
    let empty = mmu.format().empty();
    let cells = &mmu.pool().entries(table)[range.start as usize..range.end as usize];
    let (blocks, rest) = cells.as_chunks::<BLOCK>();
    let mut gfn = at.gfn;
    let mut writes = 0;
    let mut olds = [0u64; BLOCK];
    for block in blocks {
        writes += if M::SHARED {
            take_out_shared::<P>(task, block, &mut olds, empty)
        } else {
            take_out_exclusive::<P>(mmu, block, &mut olds, empty).0
        };
        // What was not present was left alone: it counts as unchanged.
        for old in &mut olds {
            *old = if Spte(*old).is_present() { *old } else { empty.raw() };
        }
        account::<P, M>(mmu, task, ledger, At { gfn, ..at }, &olds, None, empty);
        gfn += BLOCK as u64;
    }
    for cell in rest {
        let mut old = Spte(P::load(cell, Site::SpteRead));
        while old.is_present() {
            if M::SHARED {
                match P::cmpxchg(cell, old.raw(), empty.raw(), Site::SpteZap) {
                    Ok(_) => {}
                    Err(seen) => {
                        task.meter().count_retries(1);
                        old = Spte(seen);
                        continue;
                    }
                }
            } else {
                old = exchange::<P>(mmu, cell, old, empty, 1);
            }
            writes += 1;
            changed::<P, M>(mmu, task, ledger, At { gfn, ..at }, old, empty);
            break;
        }
        gfn += 1;
    }
    task.count(cells.len() as u64, writes);
    if P::BY_COUNT {
        held::settle(mmu, table);
    }
    writes
}

/// Shared mode: compare-exchanges the present entries of a block to `new`, retrying the lost ones. Returns the writes.
fn take_out_shared<P: Platform>(
    task: &Task<P>,
    cells: &[AtomicU64; BLOCK],
    olds: &mut [u64; BLOCK],
    new: Spte,
) -> u64 {
    let mut writes = 0;
    for (old, cell) in olds.iter_mut().zip(cells) {
        let mut seen = P::load(cell, Site::SpteRead);
        while Spte(seen).is_present() {
            match P::cmpxchg(cell, seen, new.raw(), Site::SpteZap) {
                Ok(_) => {
                    writes += 1;
                    break;
                }
                Err(now) => {
                    task.meter().count_retries(1);
                    seen = now;
                }
            }
        }
        *old = seen;
    }
    writes
}
