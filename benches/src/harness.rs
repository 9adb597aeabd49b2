//! Rows, their ratios, and the two ways a figure is taken: once over a whole work, or by hammering one operation.
//!
//! Both report the minimum over repetitions: what disturbs a run on a shared machine only ever adds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Instant;

use serde::Serialize;

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
    /// The limits could not be taken.
    #[error(transparent)]
    Limits(#[from] LimitsError),
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

/// Time of one call in ns, made back to back on `threads` threads; `make` builds each thread's operation on it.
///
/// Alone, the least of `rounds` counts. Together, threads start when all of them are running and go on until all have
/// made their `calls`, so that every counted call had company; a round's figure is the mean over the threads, and the
/// median of the rounds counts, because the least would be the round with the least contention.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn hammer<F: FnMut()>(
    threads: usize,
    rounds: u32,
    calls: u64,
    make: impl Fn() -> F + Sync,
) -> Result<f64, BenchError> {
    let timed = |operation: &mut F| {
        let start = Instant::now();
        for _ in 0..calls {
            operation();
        }
        start.elapsed().as_nanos() as f64 / calls as f64
    };
    if threads == 1 {
        let mut operation = make();
        return Ok((0..=rounds).map(|_| timed(&mut operation)).fold(f64::INFINITY, f64::min));
    }
    let mut figures = Vec::with_capacity(rounds as usize);
    for _ in 0..rounds {
        let (arrived, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let sum = std::thread::scope(|scope| {
            let (make, timed, arrived, done) = (&make, &timed, &arrived, &done);
            let mut handles = Vec::with_capacity(threads);
            for index in 0..threads {
                let body = move || {
                    let mut operation = make();
                    meet(arrived, threads);
                    if done.load(Ordering::Relaxed) >= GIVEN_UP {
                        return 0.0;
                    }
                    let ns = timed(&mut operation);
                    done.fetch_add(1, Ordering::Relaxed);
                    while done.load(Ordering::Relaxed) < threads {
                        (0..64).for_each(|_| operation());
                    }
                    ns
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
            let join = |handle: ScopedJoinHandle<'_, f64>| {
                handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            Ok(handles.into_iter().map(join).sum::<f64>())
        })?;
        figures.push(sum / threads as f64);
    }
    figures.sort_unstable_by(f64::total_cmp);
    Ok(figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN))
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
mod tests {
    use super::*;
    use crate::limits::{LimitOptions, measure};

    fn limits() -> Limits {
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
    fn together_means_that_every_thread_makes_its_calls() {
        for threads in [1usize, 2, 3] {
            let calls = AtomicUsize::new(0);
            let ns = hammer(threads, 2, 1000, || {
                || {
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(ns.unwrap() > 0.0);
            assert!(calls.into_inner() >= 2000 * threads);
        }
    }
}
