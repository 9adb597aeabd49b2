//! Rows, their ratios, and the two ways a figure is taken: once over a whole work, or by hammering one operation.
//!
//! Both report the minimum over repetitions: what disturbs a run on a shared machine only ever adds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

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

/// The least time of `reps` runs, each of which times the part that counts itself.
///
/// # Errors
/// The first error of a run.
pub fn least<E>(reps: u32, mut run: impl FnMut() -> Result<Duration, E>) -> Result<Duration, E> {
    let mut best = run()?;
    for _ in 1..reps {
        best = best.min(run()?);
    }
    Ok(best)
}

/// Time of one call in ns, made back to back on `threads` threads; `make` builds each thread's operation on it.
///
/// A round is `calls` calls on each thread, from the first start to the last end, and the least of `rounds` counts.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn hammer<F: FnMut()>(
    threads: usize,
    rounds: u32,
    calls: u64,
    make: impl Fn() -> F + Sync,
) -> Result<f64, BenchError> {
    let one_round = |operation: &mut F| {
        let start = Instant::now();
        for _ in 0..calls {
            operation();
        }
        (start, Instant::now())
    };
    let mut best = f64::INFINITY;
    if threads == 1 {
        let mut operation = make();
        for _ in 0..=rounds {
            let (start, end) = one_round(&mut operation);
            best = best.min((end - start).as_nanos() as f64);
        }
        return Ok(best / calls as f64);
    }
    for _ in 0..rounds {
        let go = Barrier::new(threads);
        let spans = Mutex::new(Vec::with_capacity(threads));
        // Threads wait for the word, so that a refused spawn does not leave them at the barrier.
        let word = Mutex::new(false);
        std::thread::scope(|scope| {
            let mut failed = None;
            let mut held = word.lock().unwrap_or_else(PoisonError::into_inner);
            let mut handles = Vec::with_capacity(threads);
            let (word, go, spans, make, one_round) = (&word, &go, &spans, &make, &one_round);
            for index in 0..threads {
                let body = move || {
                    if *word.lock().unwrap_or_else(PoisonError::into_inner) {
                        let mut operation = make();
                        go.wait();
                        let span = one_round(&mut operation);
                        spans.lock().unwrap_or_else(PoisonError::into_inner).push(span);
                    }
                };
                match std::thread::Builder::new().spawn_scoped(scope, body) {
                    Ok(handle) => handles.push(handle),
                    Err(source) => {
                        failed = Some(BenchError::Spawn { index, source });
                        break;
                    }
                }
            }
            *held = failed.is_none();
            drop(held);
            for handle in handles {
                if let Err(panic) = handle.join() {
                    std::panic::resume_unwind(panic);
                }
            }
            failed.map_or(Ok(()), Err)
        })?;
        let spans = spans.into_inner().unwrap_or_else(PoisonError::into_inner);
        let start = spans.iter().map(|span| span.0).min();
        let end = spans.iter().map(|span| span.1).max();
        if let (Some(start), Some(end)) = (start, end) {
            best = best.min((end - start).as_nanos() as f64);
        }
    }
    Ok(best / calls as f64)
}
