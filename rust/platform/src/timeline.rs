//! Recordings: when each task was in which phase, what it held, when roots lived and died, what waited for RCU.
//!
//! **Guarantee.** The phase slices of a [`Recording`], with what did not fit, add up to the task's phase ticks to the tick, phase by
//! phase. The backlog's local peaks are exact.
//!
//! **Mechanism.** A task records into vectors of its own, filled by the two hooks that exist anyway: the change of a phase and the
//! end of a hold (or of a timed read section). Off, that is one predictable branch at each. What many tasks share is
//! rare and goes into the [`Timeline`] of the RCU domain: a mark where a root is invalidated, queued, zapped, freed; the RCU thread's own
//! slices; a point of the backlog at most every [`Timeline::INTERVAL_NS`] while it grows, and one just before and one just after each batch is booked as freed.
//! It only falls there, hence nothing between the points is higher than the next of them.
//! Every list is bounded; what comes after the bound is counted, and slices are still summed.

use std::{
    mem,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{meter::Phase, task::Role};

const PHASES: usize = Phase::ALL.len();

/// A stretch of time in one phase. Ticks; `to` is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Begin.
    pub from: u64,
    /// End.
    pub to: u64,
    /// Phase.
    pub phase: Phase,
}

/// A hold of mmu_lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Begin, in ticks.
    pub from: u64,
    /// End.
    pub to: u64,
    /// In which mode.
    pub shared: bool,
}

/// An outermost RCU read section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Begin, in ticks.
    pub from: u64,
    /// End.
    pub to: u64,
}

/// What did not fit into a recording.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Slices.
    pub slices: u64,
    /// Their ticks by phase.
    pub phase_ticks: [u64; PHASES],
    /// Begin of the first lost slice and end of the last, in ticks.
    pub span: Option<(u64, u64)>,
    /// Holds.
    pub holds: u64,
    /// Read sections.
    pub sections: u64,
}

/// What one task did, in the order in which it did it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// The task's id.
    pub task: u32,
    /// Its name.
    pub name: Box<str>,
    /// What it is for.
    pub role: Role,
    /// Phases: each begins where the one before ends, but where something was left out between two recordings.
    pub slices: Vec<Slice>,
    /// Holds of mmu_lock, by their end.
    pub holds: Vec<Hold>,
    /// RCU read sections, by their end.
    pub sections: Vec<Section>,
    /// What did not fit.
    pub lost: Lost,
}

impl Recording {
    /// Most records of each kind that are kept.
    pub const MOST: usize = 1 << 18;

    /// An empty recording of the task.
    pub fn new(task: u32, name: &str, role: Role) -> Self {
        Self {
            task,
            name: name.into(),
            role,
            slices: Vec::new(),
            holds: Vec::new(),
            sections: Vec::new(),
            lost: Lost::default(),
        }
    }

    /// Ticks by phase: those of the slices and those lost.
    pub fn phase_ticks(&self) -> [u64; PHASES] {
        let mut ticks = self.lost.phase_ticks;
        for slice in &self.slices {
            ticks[slice.phase as usize] += slice.to - slice.from;
        }
        ticks
    }

    /// A phase ends; nothing if it took no time.
    pub(crate) fn slice(&mut self, phase: Phase, from: u64, to: u64) {
        if from == to {
            return;
        }
        if !append(&mut self.slices, Self::MOST, Slice { from, to, phase }) {
            self.lost.slices += 1;
            self.lost.phase_ticks[phase as usize] += to - from;
            self.lost.span = Some((self.lost.span.map_or(from, |(begin, _)| begin), to));
        }
    }

    /// A hold ends.
    pub(crate) fn hold(&mut self, shared: bool, from: u64, to: u64) {
        if self.holds.len() < Self::MOST {
            self.holds.push(Hold { from, to, shared });
        } else {
            self.lost.holds += 1;
        }
    }

    /// A read section ends.
    pub(crate) fn section(&mut self, from: u64, to: u64) {
        if self.sections.len() < Self::MOST {
            self.sections.push(Section { from, to });
        } else {
            self.lost.sections += 1;
        }
    }

    /// Adds what the same task did later.
    pub fn append(&mut self, later: &Self) {
        for slice in &later.slices {
            self.slice(slice.phase, slice.from, slice.to);
        }
        for hold in &later.holds {
            self.hold(hold.shared, hold.from, hold.to);
        }
        for section in &later.sections {
            self.section(section.from, section.to);
        }
        self.lost.slices += later.lost.slices;
        self.lost.holds += later.lost.holds;
        self.lost.sections += later.lost.sections;
        for (mine, ticks) in self.lost.phase_ticks.iter_mut().zip(later.lost.phase_ticks) {
            *mine += ticks;
        }
        self.lost.span = match (self.lost.span, later.lost.span) {
            (Some((begin, _)), Some((_, end))) => Some((begin, end)),
            (mine, theirs) => mine.or(theirs),
        };
    }

    /// Hands over what there is and starts anew.
    pub(crate) fn take(&mut self) -> Self {
        let fresh = Self::new(self.task, &self.name, self.role);
        mem::replace(self, fresh)
    }
}

/// A moment in the life of a root, or of a fast zap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moment {
    /// A fast zap begins; no root.
    FastZapBegin,
    /// ... and has done what it waits for.
    FastZapEnd,
    /// role.invalid was set.
    RootInvalidate,
    /// Queued or marked for its zap.
    RootSchedule,
    /// Its zap begins.
    RootZapBegin,
    /// Its zap ends.
    RootZapEnd,
    /// Its page is handed to RCU.
    RootFree,
}

impl Moment {
    /// What a reader is told: `root 5 invalidated`.
    pub const fn verb(self) -> &'static str {
        match self {
            Moment::FastZapBegin => "fast zap begins",
            Moment::FastZapEnd => "fast zap ends",
            Moment::RootInvalidate => "invalidated",
            Moment::RootSchedule => "queued",
            Moment::RootZapBegin => "zap begins",
            Moment::RootZapEnd => "zap ends",
            Moment::RootFree => "handed to RCU",
        }
    }
}

/// A moment, and whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// When, in ticks.
    pub at: u64,
    /// Id of the task.
    pub task: u32,
    /// What.
    pub moment: Moment,
    /// The root's page; [`NIL`](crate::NIL) where there is none.
    pub root: u32,
}

/// A batch of pages that was freed. Times in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its first page was deferred.
    pub queued: u64,
    /// Closed: what is deferred later is part of the next one.
    pub taken: u64,
    /// Its grace period is over, its pages are being freed.
    pub freeing: u64,
    /// All of them are free.
    pub freed: u64,
    /// How many.
    pub pages: u64,
}

/// What tasks and the RCU thread have put on a [`Timeline`].
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// Marks by time.
    pub marks: Vec<Mark>,
    /// Batches freed by the RCU thread, and by whoever frees after its end.
    pub batches: Vec<Batch>,
    /// The RCU thread's phases: waiting for a grace period, freeing, neither.
    pub rcu: Vec<Slice>,
    /// (ticks, pages deferred and not freed) by time; see [`thinned`].
    pub backlog: Vec<(u64, u64)>,
    /// Records of any kind that did not fit.
    pub lost: u64,
}

/// What an RCU domain and its tasks record together. On only if [`RcuConfig::log`](crate::RcuConfig::log).
#[derive(Debug)]
pub struct Timeline {
    shared: Mutex<Shared>,
    /// Before this no further point of a growing backlog is taken, in ticks.
    next_point: AtomicU64,
    interval: u64,
}

impl Timeline {
    /// Most records of each kind.
    pub const MOST: usize = 1 << 16;
    /// Between two points of a growing backlog.
    pub const INTERVAL_NS: u64 = 20_000;

    /// Empty; `interval` is [`Timeline::INTERVAL_NS`] in ticks.
    pub(crate) fn new(interval: u64) -> Self {
        Self { shared: Mutex::default(), next_point: AtomicU64::new(0), interval }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // Lists are whole after each push.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a mark.
    #[cold]
    pub fn mark(&self, mark: Mark) {
        let mut shared = self.shared();
        if shared.marks.len() < Self::MOST {
            shared.marks.push(mark);
        } else {
            shared.lost += 1;
        }
    }

    /// The backlog has grown to `pages`.
    #[inline]
    pub(crate) fn grown(&self, now: u64, pages: u64) {
        let due = self.next_point.load(Ordering::Relaxed);
        if now >= due
            && self
                .next_point
                .compare_exchange(due, now + self.interval, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            self.point(now, pages);
        }
    }

    /// The backlog is `pages`.
    #[cold]
    pub(crate) fn point(&self, now: u64, pages: u64) {
        let mut shared = self.shared();
        if shared.backlog.len() >= Self::MOST {
            // Half of them, the peaks among them: a long run has fewer points, not a missing end.
            shared.backlog.sort_unstable();
            let kept = thinned(&shared.backlog, Self::MOST / 2);
            shared.lost += (shared.backlog.len() - kept.len()) as u64;
            shared.backlog = kept;
        }
        shared.backlog.push((now, pages));
    }

    pub(crate) fn batch(&self, batch: Batch) {
        let mut shared = self.shared();
        if shared.batches.len() < Self::MOST {
            shared.batches.push(batch);
        } else {
            shared.lost += 1;
        }
    }

    /// A phase of the RCU thread ends.
    pub(crate) fn rcu_slice(&self, phase: Phase, from: u64, to: u64) {
        let mut shared = self.shared();
        if !append(&mut shared.rcu, Self::MOST, Slice { from, to, phase }) {
            shared.lost += 1;
        }
    }

    /// Hands over what there is, sorted by time, and starts anew. The RCU thread's current phase is part of the next.
    pub fn take(&self) -> Shared {
        let mut shared = mem::take(&mut *self.shared());
        shared.marks.sort_by_key(|mark| mark.at);
        shared.batches.sort_by_key(|batch| batch.freeing);
        shared.backlog.sort_by_key(|point| point.0);
        shared
    }
}

/// Appends a slice, or lengthens the last one that it goes on; false: there is no room.
fn append(slices: &mut Vec<Slice>, most: usize, slice: Slice) -> bool {
    if let Some(last) = slices.last_mut()
        && (last.phase, last.to) == (slice.phase, slice.from)
    {
        last.to = slice.to;
        return true;
    }
    let room = slices.len() < most;
    if room {
        slices.push(slice);
    }
    room
}

/// At most `most` of the points of a series that is sorted by time: the first, the last, and the lowest and highest of each of the
/// equal stretches of points between, so that the peak stays.
pub fn thinned(points: &[(u64, u64)], most: usize) -> Vec<(u64, u64)> {
    if points.len() <= most || most < 4 {
        return points.to_vec();
    }
    let inner = &points[1..points.len() - 1];
    let stretch = inner.len().div_ceil((most - 2) / 2);
    let mut kept = vec![points[0]];
    for some in inner.chunks(stretch) {
        let low = (0..some.len()).min_by_key(|&i| some[i].1).unwrap_or(0);
        let high = (0..some.len()).max_by_key(|&i| some[i].1).unwrap_or(0);
        kept.push(some[low.min(high)]);
        if low != high {
            kept.push(some[low.max(high)]);
        }
    }
    kept.push(points[points.len() - 1]);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_still_summed() {
        let mut recording = Recording::new(7, "t", Role::Caller);
        let records = Recording::MOST as u64 + 10;
        for n in 0..records {
            let phase = if n % 2 == 0 { Phase::Other } else { Phase::LockWait };
            recording.slice(phase, n * 3, n * 3 + 3);
            recording.hold(true, n, n + 1);
        }
        assert_eq!((recording.slices.len(), recording.lost.slices), (Recording::MOST, 10));
        assert_eq!((recording.holds.len(), recording.lost.holds), (Recording::MOST, 10));
        assert_eq!(recording.phase_ticks().iter().sum::<u64>(), records * 3);
        assert_eq!(recording.lost.span, Some((Recording::MOST as u64 * 3, records * 3)));
        let taken = recording.take();
        assert_eq!((taken.task, &*taken.name), (7, "t"));
        assert_eq!(recording, Recording::new(7, "t", Role::Caller));
    }

    #[test]
    fn a_phase_that_goes_on_is_one_slice_and_an_empty_one_none() {
        let mut recording = Recording::new(0, "t", Role::Caller);
        recording.slice(Phase::Other, 5, 8);
        recording.slice(Phase::Flush, 8, 8);
        recording.slice(Phase::Other, 8, 9);
        assert_eq!(recording.slices, [Slice { from: 5, to: 9, phase: Phase::Other }]);
    }

    #[test]
    fn thinning_keeps_the_ends_and_the_peak() {
        let series: Vec<(u64, u64)> = (0..10_000u64).map(|n| (n, n * 7919 % 1_000)).collect();
        let mut with_peak = series.clone();
        with_peak[6_543].1 = 5_000;
        for most in [4, 5, 64, 512] {
            let kept = thinned(&with_peak, most);
            assert!(kept.len() <= most, "{} of {most}", kept.len());
            assert_eq!((kept[0], kept[kept.len() - 1]), (with_peak[0], with_peak[9_999]));
            assert!(kept.contains(&(6_543, 5_000)), "{most}");
            assert!(kept.is_sorted_by_key(|point| point.0));
        }
        assert_eq!(thinned(&series, 20_000), series);
    }

    #[test]
    fn a_backlog_that_outgrows_its_bound_keeps_its_peak_and_its_end() {
        let timeline = Timeline::new(10);
        let last = Timeline::MOST as u64 * 3;
        for n in 0..=last {
            timeline.point(n, if n == 12_345 { 9_999 } else { n % 50 });
        }
        let shared = timeline.take();
        assert!(shared.backlog.len() <= Timeline::MOST);
        assert!(shared.backlog.contains(&(12_345, 9_999)));
        assert_eq!(shared.backlog.last().unwrap().0, last);
        assert_eq!(shared.backlog.len() as u64 + shared.lost, last + 1);
        assert!(timeline.take().backlog.is_empty());
    }
}
