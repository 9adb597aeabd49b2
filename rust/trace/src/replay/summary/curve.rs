//! Pages by level and table memory over time, in a fixed number of points.
//!
//! A point is taken where the counts have changed and the last point is at least a step away. When the points run out, every
//! second one goes and the step doubles: a recording of a second and one of a day take the same memory, and the last point
//! is always the end.

use serde::Serialize;

/// Most points of the timeline.
pub const TIMELINE_POINTS: usize = 2000;
/// Bytes of a page-table page.
const TABLE_BYTES: u64 = 4096;
/// The first step in ns.
const FIRST_STEP_NS: u64 = 1_000;

/// Curves over one time axis, as equally long lists.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Timeline {
    /// Time of each point, ns of the recording's clock; rising.
    pub t_ns: Vec<u64>,
    /// Leafs of 4 KiB, over all VMs.
    pub pages_4k: Vec<u64>,
    /// Leafs of 2 MiB.
    pub pages_2m: Vec<u64>,
    /// Leafs of 1 GiB.
    pub pages_1g: Vec<u64>,
    /// Page-table pages, roots included.
    pub tables: Vec<u64>,
    /// Their size in bytes.
    pub table_bytes: Vec<u64>,
}

/// Leafs of levels 1 to 3, and tables.
type Counts = [u64; 4];

pub(crate) struct Curve {
    points: Vec<(u64, Counts)>,
    step: u64,
    next: u64,
    last: Counts,
}

impl Curve {
    pub(crate) fn new() -> Self {
        Self { points: Vec::new(), step: FIRST_STEP_NS, next: 0, last: [0; 4] }
    }

    /// The counts before the event at `ns`.
    #[inline]
    pub(crate) fn at(&mut self, ns: u64, leafs: &[i64; 4], tables: u64) {
        if ns >= self.next {
            self.sample(ns, Self::counts(leafs, tables));
        }
    }

    fn counts(leafs: &[i64; 4], tables: u64) -> Counts {
        let leaf = |level: usize| u64::try_from(leafs[level]).unwrap_or(0);
        [leaf(1), leaf(2), leaf(3), tables]
    }

    fn sample(&mut self, ns: u64, now: Counts) {
        if now == self.last && !self.points.is_empty() {
            return;
        }
        self.last = now;
        // The last place is kept for the end.
        if self.points.len() >= TIMELINE_POINTS - 1 {
            let mut keep = false;
            self.points.retain(|_| {
                keep = !keep;
                keep
            });
            self.step *= 2;
        }
        self.points.push((ns, now));
        self.next = ns.saturating_add(self.step);
    }

    /// The curve, ended at `ns`.
    pub(crate) fn finish(mut self, ns: u64, leafs: &[i64; 4], tables: u64) -> Timeline {
        let end = Self::counts(leafs, tables);
        match self.points.last_mut() {
            Some(last) if last.0 >= ns => last.1 = end,
            _ => self.points.push((ns, end)),
        }
        let column = |k: usize| self.points.iter().map(|p| p.1[k]).collect::<Vec<_>>();
        let tables = column(3);
        Timeline {
            t_ns: self.points.iter().map(|p| p.0).collect(),
            pages_4k: column(0),
            pages_2m: column(1),
            pages_1g: column(2),
            table_bytes: tables.iter().map(|n| n * TABLE_BYTES).collect(),
            tables,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_of_recording_fits_and_ends_with_its_last_count() {
        for events in [0u64, 1, 1999, 2000, 100_000] {
            let mut curve = Curve::new();
            for n in 0..events {
                curve.at(n * 10_000, &[0, n as i64, 0, 0], n / 512);
            }
            let t = curve.finish(events * 10_000, &[0, events as i64, 0, 0], 7);
            assert!(t.t_ns.len() <= TIMELINE_POINTS && !t.t_ns.is_empty());
            assert!(t.t_ns.windows(2).all(|w| w[0] < w[1]), "time rises");
            assert_eq!((t.pages_4k.last(), t.tables.last()), (Some(&events), Some(&7)));
            assert!(t.pages_4k.windows(2).all(|w| w[0] <= w[1]), "the curve keeps its order");
        }
    }

    #[test]
    fn what_does_not_change_takes_no_point() {
        let mut curve = Curve::new();
        (0..1_000_000u64).for_each(|n| curve.at(n * 2_000, &[0, 5, 0, 0], 1));
        assert_eq!(curve.finish(2_000_000_000, &[0, 5, 0, 0], 1).t_ns, [0, 2_000_000_000]);
    }
}
