//! What each thread did when, for pictures: a track per thread in ns since t0, few enough slices to draw.
//!
//! The whole recording is in the Perfetto trace ([`crate::export`]); this is its likeness. Slices that are too short to be seen are given to
//! their neighbour, so that a track has no gaps.

use serde::Serialize;
use tdpmmu_platform::timeline::{Hold, Slice, thinned};
use tdpmmu_platform::{Mark, Moment, Phase, Platform, Real, Recording};

use crate::attribution::{CLOSE, RCU, role_of, worker_name};
use crate::outcome::Outcome;

/// Most slices of a track, and most holds.
const MOST: usize = 2_000;
/// Most marks.
const MOST_MARKS: usize = 2_000;
/// Most points of the backlog.
const MOST_POINTS: usize = 512;

/// (begin, end, what), in ns since t0.
pub type Stretch = (u64, u64, &'static str);

/// One thread.
#[derive(Clone, Debug, Serialize)]
pub struct Track {
    /// As in the attribution.
    pub thread: String,
    /// As in the attribution.
    pub role: &'static str,
    /// Phases.
    pub slices: Vec<Stretch>,
    /// Holds of mmu_lock: shared or exclusive.
    pub locks: Vec<Stretch>,
}

/// A run's.
#[derive(Clone, Debug, Serialize)]
pub struct Timeline {
    /// Threads in the order of the attribution.
    pub tracks: Vec<Track>,
    /// (ns since t0, what happened to a root).
    pub marks: Vec<(u64, String)>,
}

/// What one thread recorded, and which stretches of it the attribution covers (`None`: all).
pub struct Recorded<'a> {
    /// Name of the row.
    pub thread: String,
    /// Role of the row.
    pub role: &'static str,
    /// The recording.
    pub recording: &'a Recording,
    /// In ticks.
    pub covers: Option<Vec<(u64, u64)>>,
}

impl Recorded<'_> {
    /// The phases that the attribution covers.
    pub fn slices(&self) -> Vec<Slice> {
        clipped(&self.recording.slices, self.covers.as_deref())
    }
}

/// The parts of `slices` that lie in one of `stretches`, which ascend.
pub fn clipped(slices: &[Slice], stretches: Option<&[(u64, u64)]>) -> Vec<Slice> {
    let Some(stretches) = stretches else { return slices.to_vec() };
    let mut kept = Vec::new();
    for &(begin, end) in stretches {
        let first = slices.partition_point(|slice| slice.to <= begin);
        for slice in slices[first..].iter().take_while(|slice| slice.from < end) {
            kept.push(Slice { from: slice.from.max(begin), to: slice.to.min(end), phase: slice.phase });
        }
    }
    kept
}

/// Every thread's recording, in the order of the attribution; the RCU thread's is not one of them.
pub fn recorded(outcome: &Outcome) -> Vec<Recorded<'_>> {
    let close = outcome.pays.is_none().then_some(outcome.close.recording.as_deref()).flatten();
    let end = outcome.close.begin + Real::ns_to_ticks(outcome.close.total_ns);
    let covers = Some(vec![(outcome.close.begin, end)]);
    let close = close.map(|recording| Recorded { thread: CLOSE.into(), role: "caller", recording, covers });
    let threads = outcome.threads.iter().filter_map(|thread| {
        Some(Recorded {
            thread: thread.name.clone(),
            role: role_of(thread.who),
            recording: thread.meter.recording.as_deref()?,
            covers: match &thread.request {
                Some(request) => Some(request.calls.clone()),
                None => thread.covers.map(|stretch| vec![stretch]),
            },
        })
    });
    let workers = outcome.workers.iter().enumerate().filter_map(|(n, (meter, _))| {
        let recording = meter.recording.as_deref()?;
        Some(Recorded { thread: worker_name(n), role: "worker", recording, covers: None })
    });
    close.into_iter().chain(threads).chain(workers).collect()
}

/// The RCU thread's phases in the window.
pub fn rcu_slices(outcome: &Outcome) -> Vec<Slice> {
    let slices = outcome.timeline.as_ref().map_or(&[][..], |timeline| &timeline.rcu);
    let mut kept = clipped(slices, Some(&[(outcome.t0, outcome.end)]));
    // The phase that it is in is not on record yet: it idles.
    let from = kept.last().map_or(outcome.t0, |slice| slice.to);
    if from < outcome.end {
        kept.push(Slice { from, to: outcome.end, phase: Phase::Other });
    }
    kept
}

/// What a mark says.
pub fn said(mark: &Mark) -> String {
    match mark.moment {
        Moment::FastZapBegin | Moment::FastZapEnd => mark.moment.verb().into(),
        // Not every design has a queue: `sync` only marks the root as one that its fast zap has to take down.
        Moment::RootSchedule => format!("root {} scheduled", mark.root),
        moment => format!("root {} {}", mark.root, moment.verb()),
    }
}

/// The timeline of a run whose tasks recorded; `None` if they did not.
pub fn timeline(outcome: &Outcome) -> Option<Timeline> {
    let shared = outcome.timeline.as_ref()?;
    let since = |at: u64| (outcome.to_ns)(at.saturating_sub(outcome.t0));
    let drawn = |slices: &[Slice]| {
        let after = slices.iter().filter(|slice| slice.to > outcome.t0);
        let stretches = after.map(|slice| (since(slice.from), since(slice.to), slice.phase.name()));
        coarse(stretches.collect(), true)
    };
    let mut tracks: Vec<Track> = recorded(outcome)
        .into_iter()
        .map(|thread| {
            let holds = thread.recording.holds.iter().filter(|hold| hold.to > outcome.t0);
            Track {
                slices: drawn(&thread.slices()),
                locks: coarse(
                    holds.map(|hold| (since(hold.from), since(hold.to), mode(hold))).collect(),
                    false,
                ),
                thread: thread.thread,
                role: thread.role,
            }
        })
        .collect();
    if tracks.is_empty() {
        return None;
    }
    tracks.push(Track {
        thread: RCU.into(),
        role: "rcu",
        slices: drawn(&rcu_slices(outcome)),
        locks: Vec::new(),
    });
    let after = shared.marks.iter().filter(|mark| mark.at >= outcome.t0);
    let marks = after.take(MOST_MARKS).map(|mark| (since(mark.at), said(mark))).collect();
    Some(Timeline { tracks, marks })
}

/// (ns since t0, pages that wait for a grace period): at most 512 points, the peak among them.
pub fn backlog(outcome: &Outcome) -> Vec<(u64, u64)> {
    let points = outcome.timeline.as_ref().map_or(&[][..], |timeline| &timeline.backlog);
    let after: Vec<(u64, u64)> = points
        .iter()
        .filter(|(at, _)| *at >= outcome.t0)
        .map(|(at, pages)| ((outcome.to_ns)(at - outcome.t0), *pages))
        .collect();
    thinned(&after, MOST_POINTS)
}

/// How a hold is called.
pub fn mode(hold: &Hold) -> &'static str {
    if hold.shared { "shared" } else { "exclusive" }
}

/// At most [`MOST`] stretches: ever longer ones are given to the stretch before them (`joins`: they follow each other), or joined with the next
/// of their kind across ever longer gaps.
fn coarse(mut stretches: Vec<Stretch>, joins: bool) -> Vec<Stretch> {
    let mut least = 100;
    while stretches.len() > MOST {
        let mut kept: Vec<Stretch> = Vec::with_capacity(stretches.len());
        for (begin, end, what) in stretches {
            match kept.last_mut() {
                Some(last) if joins && last.1 == begin && (last.2 == what || end - begin < least) => {
                    last.1 = end
                }
                // A short first one takes the name of what follows.
                Some(last) if joins && last.1 == begin && last.1 - last.0 < least => {
                    *last = (last.0, end, what);
                }
                Some(last) if !joins && last.2 == what && begin.saturating_sub(last.1) < least => {
                    last.1 = end.max(last.1);
                }
                _ => kept.push((begin, end, what)),
            }
        }
        if least > 1 << 50 {
            kept.truncate(MOST);
        }
        stretches = kept;
        least *= 2;
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coarse_track_has_no_gaps_and_the_same_ends() {
        let names = ["other", "spte_work", "yield"];
        let fine: Vec<Stretch> =
            (0..50_000u64).map(|n| (n * 100, (n + 1) * 100, names[(n % 3) as usize])).collect();
        let few = coarse(fine, true);
        assert!(few.len() <= MOST);
        assert_eq!((few[0].0, few[few.len() - 1].1), (0, 5_000_000));
        assert!(few.windows(2).all(|pair| pair[0].1 == pair[1].0));
    }

    #[test]
    fn holds_of_a_mode_are_joined_across_short_gaps_and_never_overlap_another_mode() {
        let fine: Vec<Stretch> = (0..30_000u64).map(|n| (n * 100, n * 100 + 60, "shared")).collect();
        let few = coarse(fine, false);
        assert!(few.len() <= MOST);
        assert_eq!(few[0].0, 0);
        assert_eq!(few[few.len() - 1].1, 2_999_960);
    }

    #[test]
    fn clipping_keeps_what_lies_in_the_stretches_to_the_tick() {
        let slice = |from, to| Slice { from, to, phase: Phase::SpteWork };
        let slices = [slice(0, 10), slice(10, 20), slice(20, 30)];
        assert_eq!(clipped(&slices, None), slices);
        let kept = clipped(&slices, Some(&[(5, 12), (25, 90)]));
        assert_eq!(kept, [slice(5, 10), slice(10, 12), slice(25, 30)]);
    }
}
