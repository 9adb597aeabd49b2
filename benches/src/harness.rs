//! Rows, their ratios, and the two ways a figure is taken: once over a whole work, or by hammering one operation.
//!
//! Both report the minimum over repetitions: what disturbs a run on a shared machine only ever adds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use tdpmmu_lab::LabError;

use crate::limits::{EntryLimits, Limits, LimitsError};

/// What stops a benchmark.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The implementation did not do the work: its figure would mean nothing.
    #[error("{name}: {work}: {what}: got {got}, expected {expected}")]
    WorkNotDone { work: Work, name: &'static str, what: &'static str, got: u64, expected: u64 },
    /// No memory for the tables.
    #[error("cannot map {bytes} bytes for tables: {source}")]
    NoMemory { bytes: usize, source: std::io::Error },
    /// A benchmark thread could not be started.
    #[error("cannot start benchmark thread {index}: {source}")]
    Spawn { index: usize, source: std::io::Error },
    /// Our engine refused, or found one of its rules broken.
    #[error("tdpmmu: {what}")]
    Engine { what: String },
    /// The limits could not be taken.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// An experiment of the laboratory gave no result.
    #[error("{experiment}: {source}")]
    Lab { experiment: &'static str, source: LabError },
}

impl BenchError {
    /// The exit code that it deserves.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::WorkNotDone { .. } | Self::Engine { .. } => 1,
            Self::NoMemory { .. } | Self::Spawn { .. } | Self::Limits(_) => 4,
            Self::Lab { source, .. } => match source {
                LabError::Check { .. } => 1,
                LabError::Usage(_) => 2,
                LabError::Memory { .. } => 4,
                LabError::Internal(_) => 5,
                LabError::Cancelled => 130,
            },
        }
    }

    /// Our engine refused, and this is what it said.
    pub(crate) fn engine(what: impl std::fmt::Display) -> Self {
        Self::Engine { what: what.to_string() }
    }
}

/// A work that several implementations do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    Map,
    Translate,
    TranslateRandom,
    Unmap,
    Teardown,
    ReadSection,
    DeferPut,
    DeferReclaimed,
    LockShared,
    LockSharedTwo,
    LockExclusive,
}

impl Work {
    /// Every work, in the order of the table.
    pub const ALL: [Work; 11] = [
        Work::Map,
        Work::Translate,
        Work::TranslateRandom,
        Work::Unmap,
        Work::Teardown,
        Work::ReadSection,
        Work::DeferPut,
        Work::DeferReclaimed,
        Work::LockShared,
        Work::LockSharedTwo,
        Work::LockExclusive,
    ];

    /// The name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Work::Map => "map",
            Work::Translate => "translate",
            Work::TranslateRandom => "translate-random",
            Work::Unmap => "unmap",
            Work::Teardown => "teardown",
            Work::ReadSection => "read-section",
            Work::DeferPut => "defer-put",
            Work::DeferReclaimed => "defer-reclaimed",
            Work::LockShared => "lock-shared",
            Work::LockSharedTwo => "lock-shared-two",
            Work::LockExclusive => "lock-exclusive",
        }
    }

    /// One line on what an operation is.
    pub fn what(self) -> &'static str {
        match self {
            Work::Map => "map one 4K page, ascending, tables allocated as needed",
            Work::Translate => "translate one page's address, ascending",
            Work::TranslateRandom => "translate one page's address, each page once, scattered",
            Work::Unmap => "unmap one 4K page, ascending, tables kept",
            Work::Teardown => "unmap and free every table, per page",
            Work::ReadSection => "enter and leave a read section",
            Work::DeferPut => "hand one item to deferred reclamation, caller's time",
            Work::DeferReclaimed => "from handing over to reclaimed, wall time per item",
            Work::LockShared => "lock and unlock shared, nobody else",
            Work::LockSharedTwo => "lock and unlock shared, two threads at once",
            Work::LockExclusive => "lock and unlock exclusive, nobody else",
        }
    }

    /// The limit that the ratio is to: its name, its value, and how many of them an operation is set against.
    pub fn basis(self, limits: &Limits) -> (&'static str, f64) {
        let one: &EntryLimits = &limits.one;
        match self {
            Work::Map => ("cmpxchg_ns", one.cmpxchg_ns),
            Work::Unmap | Work::Teardown => ("swap_ns", one.swap_ns),
            Work::Translate | Work::TranslateRandom => ("read_ns", one.read_ns),
            Work::ReadSection => ("fence_ns", limits.fence_ns),
            Work::DeferPut | Work::DeferReclaimed => ("swap_ns", one.swap_ns),
            // Taking and releasing a shared lock word is two locked operations at best.
            Work::LockShared | Work::LockSharedTwo | Work::LockExclusive => ("2 swap_ns", 2.0 * one.swap_ns),
        }
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// One implementation doing one work, before there are limits to set it against.
#[derive(Debug, Clone)]
pub struct Sample {
    pub work: Work,
    /// The implementation.
    pub name: &'static str,
    /// Nanoseconds per operation.
    pub ns: f64,
    /// Operations that one repetition made.
    pub count: u64,
}

/// A row of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub work: Work,
    /// The implementation.
    pub name: &'static str,
    /// Nanoseconds per operation, minimum over repetitions.
    pub ns: f64,
    /// `ns` over the limit `of`.
    pub ratio: f64,
    /// Name of the limit.
    pub of: &'static str,
    /// `ns` over the figure of tdpmmu for the same work, where there is one.
    pub to_tdpmmu: Option<f64>,
    /// Operations that one repetition made.
    pub count: u64,
}

/// The name our own rows carry; the others are set against the quickest row that starts with it.
pub const OURS: &str = "tdpmmu";

/// Turns samples into rows, ordered by work and then by time.
pub fn rows(samples: &[Sample], limits: &Limits) -> Vec<Row> {
    let mut ours: BTreeMap<Work, f64> = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.name.starts_with(OURS)) {
        let least = ours.entry(sample.work).or_insert(f64::INFINITY);
        *least = least.min(sample.ns);
    }
    let mut rows: Vec<Row> = samples
        .iter()
        .map(|sample| {
            let (of, basis) = sample.work.basis(limits);
            let to_tdpmmu = ours.get(&sample.work).map(|ours| sample.ns / ours);
            let Sample { work, name, ns, count } = *sample;
            Row { work, name, ns, ratio: ns / basis, of, to_tdpmmu, count }
        })
        .collect();
    rows.sort_by(|a, b| a.work.cmp(&b.work).then(a.ns.total_cmp(&b.ns)));
    rows
}

/// The table for people.
pub fn table(rows: &[Row], limits: &Limits) -> String {
    let mut out = String::new();
    for work in Work::ALL {
        let of_work: Vec<&Row> = rows.iter().filter(|row| row.work == work).collect();
        let Some(first) = of_work.first() else { continue };
        let (of, basis) = work.basis(limits);
        let _ = writeln!(out, "{work}: {} (x{}; {of} = {basis:.2} ns)", work.what(), first.count);
        for row in of_work {
            let ours = row.to_tdpmmu.map_or_else(String::new, |ratio| format!("{ratio:>9.2} x tdpmmu"));
            let _ = writeln!(out, "  {:<32}{:>10.2} ns{:>9.2} x{ours}", row.name, row.ns, row.ratio);
        }
    }
    out
}

/// Time of one call in ns, made back to back by one thread: the least of `rounds` rounds of `calls` after a first.
pub fn hammer<F: FnMut()>(rounds: u32, calls: u64, make: impl Fn() -> F) -> f64 {
    let mut operation = make();
    (0..=rounds).map(|_| timed(&mut operation, calls).1).fold(f64::INFINITY, f64::min)
}

/// The same on `threads` threads at once, each with its own `make`; None if they never ran at the same time.
///
/// Threads start when all of them are running and go on until all have made their `calls`. A round counts only if
/// they did start together and none was off its CPU meanwhile: on a busy machine two threads may well take turns, and
/// then there is no contention to measure. Rounds that do not count are repeated, up to [`PATIENCE`] times as many.
/// A round's figure is the mean over the threads, and the median of the rounds is the result, because the least would
/// be the round with the least contention.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn hammer_together<F: FnMut()>(
    threads: usize,
    rounds: u32,
    calls: u64,
    make: impl Fn() -> F + Sync,
) -> Result<Option<f64>, BenchError> {
    let mut figures = Vec::with_capacity(rounds as usize);
    for _ in 0..rounds.saturating_mul(PATIENCE) {
        let turns = one_round(threads, calls, &make)?;
        let first = turns.iter().map(|turn| turn.start).min();
        let last = turns.iter().map(|turn| turn.start).max();
        let apart = last.zip(first).map_or(Duration::ZERO, |(last, first)| last - first);
        if turns.len() == threads && apart <= TOGETHER && turns.iter().all(|turn| turn.on_cpu) {
            figures.push(turns.iter().map(|turn| turn.ns).sum::<f64>() / threads as f64);
        }
        if figures.len() == rounds as usize {
            break;
        }
    }
    figures.sort_unstable_by(f64::total_cmp);
    Ok(figures.get(figures.len() / 2).copied())
}

/// Rounds that are tried for each that is wanted.
const PATIENCE: u32 = 20;
/// Starts closer than this are together: a percent or so of a round.
const TOGETHER: Duration = Duration::from_micros(20);

/// One thread's part of a round.
struct Turn {
    start: Instant,
    ns: f64,
    /// It was running all the time: its CPU time is its wall time but for a fiftieth.
    on_cpu: bool,
}

fn timed(operation: &mut impl FnMut(), calls: u64) -> (Instant, f64) {
    let start = Instant::now();
    for _ in 0..calls {
        operation();
    }
    (start, start.elapsed().as_nanos() as f64 / calls as f64)
}

fn one_round<F: FnMut()>(
    threads: usize,
    calls: u64,
    make: &(impl Fn() -> F + Sync),
) -> Result<Vec<Turn>, BenchError> {
    let (arrived, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (arrived, done) = (&arrived, &done);
        let mut handles = Vec::with_capacity(threads);
        for index in 0..threads {
            let body = move || {
                let mut operation = make();
                meet(arrived, threads);
                if done.load(Ordering::Relaxed) >= GIVEN_UP {
                    return None;
                }
                let cpu = thread_cpu();
                let (start, ns) = timed(&mut operation, calls);
                let cpu = thread_cpu().saturating_sub(cpu);
                let on_cpu = cpu >= start.elapsed() * 49 / 50;
                done.fetch_add(1, Ordering::Relaxed);
                while done.load(Ordering::Relaxed) < threads {
                    (0..64).for_each(|_| operation());
                }
                Some(Turn { start, ns, on_cpu })
            };
            match std::thread::Builder::new().spawn_scoped(scope, body) {
                Ok(handle) => handles.push(handle),
                Err(source) => {
                    // Those already there must not wait for one that never comes.
                    done.store(GIVEN_UP, Ordering::Relaxed);
                    arrived.fetch_add(threads, Ordering::Release);
                    return Err(BenchError::Spawn { index, source });
                }
            }
        }
        let join = |handle: ScopedJoinHandle<'_, Option<Turn>>| {
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        Ok(handles.into_iter().filter_map(join).collect())
    })
}

/// CPU time of the calling thread.
fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, which `time` is.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// More threads than there are: the round is off.
const GIVEN_UP: usize = usize::MAX / 2;

/// Spins until `threads` have come; gives the CPU away now and then in case there are fewer CPUs.
fn meet(arrived: &AtomicUsize, threads: usize) {
    arrived.fetch_add(1, Ordering::AcqRel);
    let mut spins = 0u32;
    while arrived.load(Ordering::Acquire) < threads {
        spins += 1;
        if spins.is_multiple_of(1 << 14) {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::limits::{LimitOptions, measure};

    pub(crate) fn limits() -> Limits {
        let mut opts = LimitOptions { bytes: 2 << 20, hugepages: false, threads: vec![], budget_ms: 0 };
        opts.threads.push(1);
        let mut limits = measure(&opts).unwrap();
        (limits.one.swap_ns, limits.one.cmpxchg_ns, limits.one.read_ns, limits.fence_ns) =
            (4.0, 5.0, 0.5, 8.0);
        limits
    }

    fn sample(work: Work, name: &'static str, ns: f64) -> Sample {
        Sample { work, name, ns, count: 3 }
    }

    #[test]
    fn a_ratio_is_to_the_limit_of_its_work_and_to_our_best_row() {
        let samples = [
            sample(Work::LockShared, "peer", 16.0),
            sample(Work::Map, "peer", 20.0),
            sample(Work::Map, "tdpmmu (fault)", 10.0),
            sample(Work::Map, "tdpmmu (bulk)", 2.5),
        ];
        let rows = rows(&samples, &limits());
        let got: Vec<_> = rows.iter().map(|row| (row.name, row.ratio, row.of, row.to_tdpmmu)).collect();
        assert_eq!(
            got,
            [
                ("tdpmmu (bulk)", 0.5, "cmpxchg_ns", Some(1.0)),
                ("tdpmmu (fault)", 2.0, "cmpxchg_ns", Some(4.0)),
                ("peer", 4.0, "cmpxchg_ns", Some(8.0)),
                ("peer", 2.0, "2 swap_ns", None),
            ]
        );
        let text = table(&rows, &limits());
        for part in ["map: ", "lock-shared: ", "8.00 x tdpmmu", "2.00 x\n"] {
            assert!(text.contains(part), "{part:?} not in {text}");
        }
        assert!(!text.contains("unmap"), "{text}");
    }

    #[test]
    fn every_work_has_a_basis_and_its_json_name() {
        for work in Work::ALL {
            assert!(work.basis(&limits()).1 > 0.0);
            assert_eq!(serde_json::to_value(work).unwrap(), work.name());
        }
    }

    #[test]
    fn every_thread_makes_its_calls() {
        for threads in [1usize, 2, 3] {
            let calls = AtomicUsize::new(0);
            let make = || {
                || {
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            };
            let turns = one_round(threads, 1000, &make).unwrap();
            assert_eq!(turns.len(), threads);
            assert!(turns.iter().all(|turn| turn.ns > 0.0));
            assert!(calls.load(Ordering::Relaxed) >= 1000 * threads);
            assert!(hammer(2, 1000, make) > 0.0);
        }
    }

    #[test]
    fn threads_that_sleep_were_not_together() {
        let make = || || std::thread::sleep(Duration::from_micros(50));
        assert_eq!(hammer_together(2, 1, 4, make).unwrap(), None);
    }
}
