//! Files beside the result: a Perfetto trace of all runs, and an HdrHistogram log of all distributions.
//!
//! Both files are opened before the first run, so that a path that cannot be written is refused at once. In the trace each run is a process, and t0
//! of each is the same instant: designs lie below each other as they are to be compared. The slices of a thread's own track add up to its
//! row in the attribution.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tdpmmu_platform::timeline::{Batch, Slice};
use tdpmmu_platform::{Histogram, Mark, Moment, Platform, Real};
use tdpmmu_trace::hlog::{self, Interval};
use tdpmmu_trace::perfetto::{Counter, Flows, Instant, Lane, Process, Span, Thread, Writer};

use crate::LabError;
use crate::attribution::RCU;
use crate::config::BenchConfig;
use crate::outcome::Outcome;
use crate::result::Run;
use crate::timeline::{Recorded, mode, rcu_slices, recorded, said};

/// Where t0 of each run is in the trace: guests have begun before.
const T0_NS: u64 = 10_000_000_000;

/// Most holds or read sections that a track shows.
const MOST_SPANS: usize = 10_000;

/// The files that are being written.
#[derive(Default)]
pub struct Export {
    perfetto: Option<(PathBuf, Writer<BufWriter<File>>)>,
    hlog: Option<(PathBuf, BufWriter<File>)>,
    intervals: Vec<(String, Duration, Duration, Histogram)>,
    begun: Option<SystemTime>,
    flows: u64,
}

fn refused(path: &Path) -> impl Fn(io::Error) -> LabError + '_ {
    move |error| LabError::Usage(format!("{}: {error}", path.display()))
}

impl Export {
    /// Opens what the request asks for.
    ///
    /// # Errors
    /// [`LabError::Usage`]: a path that cannot be written.
    pub fn open(config: &BenchConfig) -> Result<Self, LabError> {
        let file = |path: &Option<String>| {
            path.as_ref().map(|path| {
                let path = PathBuf::from(path);
                let file = File::create(&path).map_err(refused(&path))?;
                Ok::<_, LabError>((path, BufWriter::new(file)))
            })
        };
        let perfetto = file(&config.perfetto).transpose()?;
        Ok(Self {
            perfetto: perfetto.map(|(path, file)| (path, Writer::new(file))),
            hlog: file(&config.hlog).transpose()?,
            intervals: Vec::new(),
            begun: Some(SystemTime::now()),
            flows: 0,
        })
    }

    /// One more run, which began at `began`.
    ///
    /// # Errors
    /// [`LabError::Usage`]: the file takes no more.
    pub fn add(&mut self, row: &Run, outcome: &Outcome, began: SystemTime) -> Result<(), LabError> {
        if let Some((path, writer)) = &mut self.perfetto {
            writer.process(&process(row, outcome, &mut self.flows)).map_err(refused(path))?;
        }
        if self.hlog.is_some() {
            let since = self.begun.and_then(|begun| began.duration_since(begun).ok()).unwrap_or_default();
            let length = Duration::from_nanos(Real::ticks_to_ns(outcome.end.saturating_sub(outcome.t0)));
            for (field, curve) in &row.curves {
                let mut histogram = Histogram::new();
                for &(value, count) in curve {
                    histogram.record_n(value, count);
                }
                self.intervals.push((format!("{}/{field}", title(row, "/")), since, length, histogram));
            }
        }
        Ok(())
    }

    /// Ends the files; `about` goes on top of the log.
    ///
    /// # Errors
    /// [`LabError::Usage`]: a file takes no more.
    pub fn finish(self, about: &str) -> Result<(), LabError> {
        if let Some((path, writer)) = self.perfetto {
            writer.into_inner().flush().map_err(refused(&path))?;
        }
        if let Some((path, mut file)) = self.hlog {
            let intervals: Vec<Interval<'_>> = self
                .intervals
                .iter()
                .map(|(tag, begin, length, histogram)| Interval {
                    tag: tag.clone(),
                    begin: *begin,
                    length: *length,
                    histogram,
                })
                .collect();
            let begun = self.begun.unwrap_or(SystemTime::UNIX_EPOCH);
            hlog::write(&mut file, begun, about, &intervals)
                .and_then(|()| file.flush())
                .map_err(refused(&path))?;
        }
        Ok(())
    }
}

/// What tells a run from the others of its file.
fn title(row: &Run, between: &str) -> String {
    let memory = crate::units::bytes(row.memory_bytes);
    let rep = format!("rep{}", row.rep);
    [&row.scene, &row.design, &row.passes, &row.preempt, &memory, &row.page, &rep].map(|s| &**s).join(between)
}

/// Ticks to the trace's ns.
#[derive(Clone, Copy)]
struct Clock {
    t0: u64,
}

impl Clock {
    fn ns(self, at: u64) -> u64 {
        if at >= self.t0 {
            T0_NS + Real::ticks_to_ns(at - self.t0)
        } else {
            T0_NS.saturating_sub(Real::ticks_to_ns(self.t0 - at))
        }
    }

    fn phases(self, slices: &[Slice]) -> Vec<Span> {
        slices
            .iter()
            .map(|slice| Span {
                begin: self.ns(slice.from),
                end: self.ns(slice.to),
                name: slice.phase.name().into(),
                category: "phase",
                flows: Flows::default(),
            })
            .collect()
    }
}

fn process(row: &Run, outcome: &Outcome, flows: &mut u64) -> Process {
    let clock = Clock { t0: outcome.t0 };
    let nothing = Default::default();
    let shared = outcome.timeline.as_ref().unwrap_or(&nothing);
    let recorded = recorded(outcome);
    // A task without a track (the judge's, say) has no place for its marks.
    let shown = |mark: &&Mark| recorded.iter().any(|thread| thread.recording.task == mark.task);
    let marks: Vec<Mark> = shared.marks.iter().filter(shown).copied().collect();
    let mut lives = Lives::of(&marks, &shared.batches, flows);
    let mut threads: Vec<Thread> = recorded
        .into_iter()
        .map(|thread| {
            let roots = roots_lane(clock, thread.recording.task, &marks, &mut lives);
            of_thread(clock, &thread, roots)
        })
        .collect();
    let freed = shared.batches.iter().enumerate().map(|(n, batch)| Span {
        begin: clock.ns(batch.freeing),
        end: clock.ns(batch.freed),
        name: "free".into(),
        category: "rcu",
        flows: lives.at_batch(n),
    });
    threads.push(Thread {
        name: RCU.into(),
        main: Lane { spans: clock.phases(&rcu_slices(outcome)), ..Lane::default() },
        lanes: vec![Lane { name: "batches freed".into(), spans: freed.collect(), ..Lane::default() }],
    });
    let waiting = Counter {
        name: "pages waiting for a grace period".into(),
        unit: "pages",
        points: shared
            .backlog
            .iter()
            .map(|(at, pages)| (clock.ns(*at), i64::try_from(*pages).unwrap_or(i64::MAX)))
            .collect(),
    };
    Process { name: title(row, " "), threads, counters: vec![waiting] }
}

fn of_thread(clock: Clock, thread: &Recorded<'_>, roots: Lane) -> Thread {
    let recording = thread.recording;
    let holds = recording.holds.iter().map(|hold| Span {
        begin: clock.ns(hold.from),
        end: clock.ns(hold.to),
        name: mode(hold).into(),
        category: "lock",
        flows: Flows::default(),
    });
    let sections = recording.sections.iter().map(|section| Span {
        begin: clock.ns(section.from),
        end: clock.ns(section.to),
        name: "read section".into(),
        category: "rcu",
        flows: Flows::default(),
    });
    let lost = recording.lost.span.map(|(from, _)| Instant {
        at: clock.ns(from),
        name: format!("{} slices did not fit", recording.lost.slices).into(),
        category: "phase",
        flows: Flows::default(),
    });
    let mut lanes = vec![
        Lane { name: "mmu_lock".into(), spans: holds.collect(), ..Lane::default() },
        Lane { name: "RCU".into(), spans: sections.collect(), ..Lane::default() },
        roots,
    ];
    lanes.iter_mut().for_each(longest);
    lanes.retain(|lane| !(lane.spans.is_empty() && lane.instants.is_empty()));
    Thread {
        name: thread.thread.clone(),
        main: Lane {
            spans: clock.phases(&thread.slices()),
            instants: lost.into_iter().collect(),
            ..Lane::default()
        },
        lanes,
    }
}

/// Keeps the longest spans of a lane that has more than can be looked at: read sections of a tenth of a microsecond by the million
/// make a file that nobody opens.
fn longest(lane: &mut Lane) {
    let Some(left_out) = lane.spans.len().checked_sub(MOST_SPANS).filter(|n| *n > 0) else { return };
    lane.spans.sort_by_key(|span| std::cmp::Reverse(span.end - span.begin));
    lane.spans.truncate(MOST_SPANS);
    if let Some(at) = lane.spans.iter().map(|span| span.begin).min() {
        let category = lane.spans[0].category;
        let name = format!("{left_out} shorter ones are left out").into();
        lane.instants.push(Instant { at, name, category, flows: Flows::default() });
    }
}

/// What one task did to roots: fast zaps and zaps as slices, the rest as instants.
fn roots_lane(clock: Clock, task: u32, marks: &[Mark], lives: &mut Lives) -> Lane {
    let mut lane = Lane { name: "roots".into(), ..Lane::default() };
    // Begin marks whose end is still to come.
    let mut open: Vec<(usize, Mark)> = Vec::new();
    for (n, mark) in marks.iter().enumerate().filter(|(_, mark)| mark.task == task) {
        let begun_by = match mark.moment {
            Moment::FastZapBegin | Moment::RootZapBegin => {
                open.push((n, *mark));
                continue;
            }
            Moment::FastZapEnd => Moment::FastZapBegin,
            Moment::RootZapEnd => Moment::RootZapBegin,
            _ => {
                lane.instants.push(Instant {
                    at: clock.ns(mark.at),
                    name: said(mark).into(),
                    category: "root",
                    flows: lives.at_mark(n),
                });
                continue;
            }
        };
        let begin = open.iter().rposition(|(_, b)| (b.moment, b.root) == (begun_by, mark.root));
        if let Some(begin) = begin {
            let (n, begin) = open.remove(begin);
            let name = match begin.moment {
                Moment::FastZapBegin => "fast zap".into(),
                _ => format!("zap root {}", begin.root),
            };
            lane.spans.push(Span {
                begin: clock.ns(begin.at),
                end: clock.ns(mark.at),
                name: name.into(),
                category: "root",
                flows: lives.at_mark(n),
            });
        }
    }
    lane
}

/// Flows through the lives of roots: from the invalidation (or the first zap) over each zap to the batch that frees the page.
struct Lives {
    /// Flow of each mark, and whether it ends there.
    marks: HashMap<usize, (u64, bool)>,
    /// Flows that end at a batch.
    batches: HashMap<usize, Vec<u64>>,
}

impl Lives {
    fn of(marks: &[Mark], batches: &[Batch], last_flow: &mut u64) -> Self {
        let mut lives = Self { marks: HashMap::new(), batches: HashMap::new() };
        // What has happened to a root since its page became one.
        let mut young: HashMap<u32, Vec<usize>> = HashMap::new();
        for (n, mark) in marks.iter().enumerate() {
            match mark.moment {
                Moment::RootInvalidate | Moment::RootSchedule | Moment::RootZapBegin => {
                    young.entry(mark.root).or_default().push(n);
                }
                Moment::RootFree => {
                    let mut life = young.remove(&mark.root).unwrap_or_default();
                    life.push(n);
                    // The first batch closed after the page was handed over has it.
                    let batch = batches
                        .iter()
                        .enumerate()
                        .filter(|(_, batch)| batch.taken >= mark.at)
                        .min_by_key(|(_, batch)| batch.taken);
                    lives.book(&life, batch.map(|(n, _)| n), last_flow);
                }
                Moment::FastZapBegin | Moment::FastZapEnd | Moment::RootZapEnd => {}
            }
        }
        for life in young.into_values() {
            lives.book(&life, None, last_flow);
        }
        lives
    }

    fn book(&mut self, life: &[usize], batch: Option<usize>, last_flow: &mut u64) {
        if life.len() + usize::from(batch.is_some()) < 2 {
            return;
        }
        *last_flow += 1;
        for (at, mark) in life.iter().enumerate() {
            let ends = batch.is_none() && at + 1 == life.len();
            self.marks.insert(*mark, (*last_flow, ends));
        }
        if let Some(batch) = batch {
            self.batches.entry(batch).or_default().push(*last_flow);
        }
    }

    fn at_mark(&mut self, mark: usize) -> Flows {
        match self.marks.remove(&mark) {
            Some((flow, true)) => Flows { through: Vec::new(), ending: vec![flow] },
            Some((flow, false)) => Flows { through: vec![flow], ending: Vec::new() },
            None => Flows::default(),
        }
    }

    fn at_batch(&mut self, batch: usize) -> Flows {
        Flows { through: Vec::new(), ending: self.batches.remove(&batch).unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_goes_from_the_invalidation_over_the_zap_to_the_batch_that_frees_the_page() {
        let mark = |at, moment, root| Mark { at, task: 1, moment, root };
        let marks = [
            mark(10, Moment::RootInvalidate, 5),
            mark(20, Moment::RootZapBegin, 5),
            mark(30, Moment::RootZapEnd, 5),
            mark(40, Moment::RootFree, 5),
            // The page is a root again, and is only invalidated.
            mark(90, Moment::RootInvalidate, 5),
        ];
        let batch = |taken| Batch { queued: 0, taken, freeing: taken + 1, freed: taken + 2, pages: 1 };
        let mut last = 7;
        let mut lives = Lives::of(&marks, &[batch(35), batch(60), batch(50)], &mut last);
        assert_eq!(last, 8);
        for n in [0, 1, 3] {
            assert_eq!(lives.at_mark(n), Flows { through: vec![8], ending: vec![] }, "mark {n}");
        }
        assert_eq!(lives.at_mark(2), Flows::default());
        assert_eq!(lives.at_mark(4), Flows::default());
        assert_eq!(lives.at_batch(2), Flows { through: vec![], ending: vec![8] });
        assert_eq!((lives.at_batch(0), lives.at_batch(1)), (Flows::default(), Flows::default()));
    }

    #[test]
    fn a_crowded_lane_keeps_its_longest_spans_and_says_how_many_it_lost() {
        let span =
            |n: u64| Span { begin: n * 100, end: n * 100 + n % 97, category: "rcu", ..Span::default() };
        let mut lane = Lane { spans: (0..MOST_SPANS as u64 + 5_000).map(span).collect(), ..Lane::default() };
        let sum = |lane: &Lane| lane.spans.iter().map(|span| span.end - span.begin).sum::<u64>();
        let all = sum(&lane);
        longest(&mut lane);
        assert_eq!(lane.spans.len(), MOST_SPANS);
        assert_eq!(lane.instants[0].name, "5000 shorter ones are left out");
        assert!(sum(&lane) * 3 > all * 2, "two thirds of the spans, more than two thirds of the time");
        longest(&mut lane);
        assert_eq!((lane.spans.len(), lane.instants.len()), (MOST_SPANS, 1));
    }

    #[test]
    fn without_a_batch_a_flow_ends_at_its_last_mark() {
        let mark = |at, moment| Mark { at, task: 1, moment, root: 2 };
        let marks = [mark(1, Moment::RootInvalidate), mark(2, Moment::RootZapBegin)];
        let mut lives = Lives::of(&marks, &[], &mut 0);
        assert_eq!(lives.at_mark(0), Flows { through: vec![1], ending: vec![] });
        assert_eq!(lives.at_mark(1), Flows { through: vec![], ending: vec![1] });
    }
}
