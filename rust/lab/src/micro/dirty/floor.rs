//! The least that a phase can cost, from the host's own limits.

use std::borrow::Cow;

use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Collapse, LEVEL_4K};

use super::Setting;
use crate::config::Protocol;
use crate::limits::EntryLimits;

/// SPTEs in a cache line.
const LINE: u64 = 8;

/// A limit for one operation.
#[derive(Clone)]
pub(super) struct Limit {
    /// Its name, in terms of the limits' own.
    pub(super) name: Cow<'static, str>,
    /// ns.
    pub(super) ns: f64,
    /// The ratio that we want to be within.
    pub(super) goal: Option<f64>,
}

fn limit(name: impl Into<Cow<'static, str>>, ns: f64, goal: Option<f64>) -> Option<Limit> {
    Some(Limit { name: name.into(), ns, goal })
}

/// Turning logging on, in a guest of `pages` mapped at `level`: how many operations, and the limit of one.
pub(super) fn enable(l: &EntryLimits, setting: Setting, level: u8, pages: u64) -> (u64, Option<Limit>) {
    let (leaves, goal) = (pages / span(level), Some(1.4));
    match (setting.protocol, setting.eager) {
        (Protocol::InitSet, _) => (pages, limit("write_ns / 64", l.write_ns / 64.0, None)),
        (_, Some(true)) => (pages, limit("write_ns + cmpxchg_ns", l.write_ns + l.cmpxchg_ns, goal)),
        // A leaf that stays huge loses D, and W in a walk of its own.
        (Protocol::DBits, Some(false)) => (leaves, limit("2 cmpxchg_ns", 2.0 * l.cmpxchg_ns, goal)),
        (_, Some(false) | None) => (leaves, limit("cmpxchg_ns", l.cmpxchg_ns, goal)),
    }
}

/// A CLEAR of everything where nothing was protected yet.
pub(super) fn first_clear(l: &EntryLimits, setting: Setting) -> Option<Limit> {
    match setting.eager {
        Some(true) => limit("write_ns + swap_ns", l.write_ns + l.swap_ns, Some(1.5)),
        // One huge leaf is asked about eight times, once for each 64 pages, and changes once: no limit of memory.
        Some(false) => None,
        None => limit("swap_ns", l.swap_ns, Some(1.5)),
    }
}

/// A write that gets W or D back; `splits`: those that come first in a huge page fill its table.
pub(super) fn write(l: &EntryLimits, setting: Setting, splits: bool) -> Option<Limit> {
    if !splits {
        return limit("cmpxchg_ns", l.cmpxchg_ns, None);
    }
    // Of the table's entries, each written page pays its share.
    let share = setting.density.min(512);
    let name =
        if share == 1 { "cmpxchg_ns + write_ns".into() } else { format!("cmpxchg_ns + {share} write_ns") };
    limit(name, l.cmpxchg_ns + share as f64 * l.write_ns, None)
}

/// A word of the bitmap, copied.
pub(super) fn copy(l: &EntryLimits) -> Option<Limit> {
    limit("read_ns + write_ns", l.read_ns + l.write_ns, None)
}

/// An entry of a ring, read.
pub(super) fn collect(l: &EntryLimits) -> Option<Limit> {
    limit("2 read_ns", 2.0 * l.read_ns, None)
}

/// A page that was found dirty is taken for clean.
pub(super) fn clear(l: &EntryLimits, setting: Setting) -> Option<Limit> {
    if setting.density < LINE {
        limit("swap_ns", l.swap_ns, Some(1.5))
    } else {
        limit("swap_ns + 7 read_ns", l.swap_ns + 7.0 * l.read_ns, None)
    }
}

/// What the end of logging took away.
#[derive(Clone, Copy)]
pub(super) struct Gone {
    /// Entries of the tables that went, empty ones too.
    pub(super) entries: u64,
    /// 4 KiB leaves that there were.
    pub(super) leaves: u64,
}

/// The end of logging in a guest of `pages` mapped at `level` at first: how many operations, and the limit of one.
pub(super) fn disable(
    l: &EntryLimits,
    collapse: Collapse,
    level: u8,
    pages: u64,
    gone: Gone,
) -> (u64, Option<Limit>) {
    if level == LEVEL_4K {
        return (pages, None);
    }
    match collapse {
        // Frozen, flushed, emptied, one by one; the tables stay.
        Collapse::ZapLeaf => (gone.leaves, limit("cmpxchg_ns + write_ns", l.cmpxchg_ns + l.write_ns, None)),
        // A removed table's entries are all swapped out: a fault may be about to fill an empty one.
        Collapse::ZapFreeze | Collapse::RecoverInPlace => {
            (gone.entries, limit("swap_ns", l.swap_ns, Some(1.5)))
        }
    }
}
