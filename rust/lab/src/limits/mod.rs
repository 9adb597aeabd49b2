//! What this host can do at best, per eight-byte entry: the yardstick every ratio is taken against.
//!
//! # Guarantee
//!
//! A limit is a time that no loop over page-table entries on this host, on the same backing, can be expected to
//! beat: the loop has no bookkeeping, is unrolled, comes in every vector width the CPU has, with and without
//! prefetch, and the figure is the minimum over all variants and rounds. The set is larger than the private caches,
//! so a limit holds for tables that were not just touched. Noise can only make a limit too slow, which flatters the
//! engine; that is why a caller brackets its run with two measurements ([`Limits::bracket`]) and publishes `stable`.
//!
//! # Mechanism
//!
//! One anonymous mapping, huge-page advised or not as the run's pool is, is touched in full before any clock starts.
//! Each operation has candidates. Every candidate runs a round, then the quickest takes the operation's share of the
//! time budget. A round covers one window; consecutive rounds move through the mapping, so a window is cold again
//! when its turn comes back. With several threads each owns a disjoint part of the mapping, and a round's time is from
//! the first start to the last end: the figure is wall time over all entries, so that perfect scaling halves it.
//!
//! Beside the memory limits stand the prices of the host's own machinery: unmapping and populating zero-page 4K PTEs,
//! an asymmetric barrier with and without a running sibling, and a full fence.

mod host;
mod loops;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use host::{MUNMAP_PAGES, Mapping, fence_price, host_prices, membarrier_prices};
use loops::{Loop, Op};

const PAGE: usize = 4096;
/// Two measurements further apart than this are not one machine's.
const STABLE_WITHIN: f64 = 0.10;

/// What to measure, and how long it may take.
#[derive(Debug, Clone)]
pub struct LimitOptions {
    /// Size of the set in bytes, rounded up to 2 MiB. Must exceed the private caches to mean anything.
    pub bytes: usize,
    /// Advise huge pages, as the table pool does. Without it the mapping is kept on 4 KiB pages.
    pub hugepages: bool,
    /// Thread counts beside one. Ones and repetitions are ignored.
    pub threads: Vec<usize>,
    /// Time for everything, in milliseconds. Two rounds per operation are made however short it is.
    pub budget_ms: u64,
}

impl Default for LimitOptions {
    /// 256 MiB on huge pages, one thread and all CPUs, about a second.
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { bytes: 256 << 20, hugepages: true, threads: vec![1, cpus], budget_ms: 1000 }
    }
}

/// Why there are no limits.
#[derive(Debug, thiserror::Error)]
pub enum LimitsError {
    /// The set cannot be divided among the threads.
    #[error("limits: bytes = {bytes} is too small for {threads} threads (at least one 4 KiB page each)")]
    TooSmall { bytes: usize, threads: usize },
    /// A thread count of zero.
    #[error("limits: threads = 0 (a thread count is at least 1)")]
    NoThreads,
    /// More than the address space or the memory allows.
    #[error("limits: cannot map {bytes} bytes of anonymous memory: {source}")]
    Map { bytes: usize, source: std::io::Error },
    /// A measuring thread could not be started.
    #[error("limits: cannot start measuring thread {index}: {source}")]
    Spawn { index: usize, source: std::io::Error },
}

/// Memory limits for one thread count, ns of wall time per 8-byte entry over all threads.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct EntryLimits {
    /// `xchg` on each entry.
    pub swap_ns: f64,
    /// A load and a `lock cmpxchg` that succeeds, on each entry.
    pub cmpxchg_ns: f64,
    /// Loads only, folded.
    pub read_ns: f64,
    /// Plain stores through the caches.
    pub write_ns: f64,
    /// Stores around the caches, fenced at the end. Equals a slow `write_ns` where the CPU has none.
    pub write_nt_ns: f64,
    /// Which candidate won, by operation.
    pub variants: BTreeMap<&'static str, &'static str>,
}

/// The physical limits of the host. All fields named `_ns` are nanoseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Limits {
    /// One thread.
    #[serde(flatten)]
    pub one: EntryLimits,
    /// `munmap` of zero-page 4 KiB PTEs, per PTE, one thread.
    pub munmap_ns: f64,
    /// Populating those PTEs for reading, per PTE, one thread.
    pub host_populate_ns: f64,
    /// Private expedited `membarrier`, siblings off CPU, median. None where the kernel or a filter forbids it.
    pub membarrier_ns: Option<f64>,
    /// The same with one sibling running, median. None as above, or on a single CPU.
    pub membarrier_busy_ns: Option<f64>,
    /// A store and a sequentially consistent fence.
    pub fence_ns: f64,
    /// Further thread counts, by count.
    pub threads: BTreeMap<usize, EntryLimits>,
    /// How many PTEs the two host figures were taken over.
    pub munmap_ptes: usize,
    /// Size of the measured set.
    pub bytes: usize,
    /// Of these, how many stood on huge pages.
    pub huge_bytes: usize,
    /// Whether a second measurement agreed; None before there was one.
    pub stable: Option<bool>,
}

impl Limits {
    /// Limits for `threads` threads, if they were measured.
    pub fn for_threads(&self, threads: usize) -> Option<&EntryLimits> {
        if threads == 1 { Some(&self.one) } else { self.threads.get(&threads) }
    }

    /// Whether every memory limit of `after` is within 10 % of this one's, for each thread count of either.
    ///
    /// The host's own prices (munmap, membarrier) do not count: no goal is a ratio to them.
    pub fn stable_against(&self, after: &Limits) -> bool {
        self.threads.keys().eq(after.threads.keys())
            && close(&self.one, &after.one)
            && self
                .threads
                .iter()
                .all(|(count, mine)| after.threads.get(count).is_some_and(|b| close(mine, b)))
    }

    /// The limits of a run measured before and after it: the smaller of each figure, and whether they agreed.
    pub fn bracket(self, after: &Limits) -> Limits {
        let stable = Some(self.stable_against(after));
        let mut threads = self.threads;
        for (count, later) in &after.threads {
            let merged = threads.get(count).map_or_else(|| later.clone(), |mine| lower(mine, later));
            threads.insert(*count, merged);
        }
        Limits {
            one: lower(&self.one, &after.one),
            munmap_ns: self.munmap_ns.min(after.munmap_ns),
            host_populate_ns: self.host_populate_ns.min(after.host_populate_ns),
            membarrier_ns: lower_option(self.membarrier_ns, after.membarrier_ns),
            membarrier_busy_ns: lower_option(self.membarrier_busy_ns, after.membarrier_busy_ns),
            fence_ns: self.fence_ns.min(after.fence_ns),
            threads,
            stable,
            ..self
        }
    }
}

fn close(a: &EntryLimits, b: &EntryLimits) -> bool {
    let pairs = [
        (a.swap_ns, b.swap_ns),
        (a.cmpxchg_ns, b.cmpxchg_ns),
        (a.read_ns, b.read_ns),
        (a.write_ns, b.write_ns),
    ];
    pairs.iter().all(|&(x, y)| (x - y).abs() <= STABLE_WITHIN * x.min(y))
}

fn lower(a: &EntryLimits, b: &EntryLimits) -> EntryLimits {
    let mut out = a.clone();
    for op in Op::ALL {
        if b.figure(op) < a.figure(op) {
            out.record(op, b.figure(op), b.variants.get(op.name()).copied());
        }
    }
    out
}

fn lower_option(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(x), Some(y)) => Some(x.min(y)),
        (x, y) => x.or(y),
    }
}

impl EntryLimits {
    fn figure(&self, op: Op) -> f64 {
        match op {
            Op::Swap => self.swap_ns,
            Op::Cmpxchg => self.cmpxchg_ns,
            Op::Read => self.read_ns,
            Op::Write => self.write_ns,
            Op::WriteNt => self.write_nt_ns,
        }
    }

    fn record(&mut self, op: Op, ns: f64, variant: Option<&'static str>) {
        *match op {
            Op::Swap => &mut self.swap_ns,
            Op::Cmpxchg => &mut self.cmpxchg_ns,
            Op::Read => &mut self.read_ns,
            Op::Write => &mut self.write_ns,
            Op::WriteNt => &mut self.write_nt_ns,
        } = ns;
        if let Some(variant) = variant {
            self.variants.insert(op.name(), variant);
        }
    }
}

/// Measures the limits of this host. Costs about `opts.budget_ms` plus the first touch of `opts.bytes`.
///
/// # Errors
/// [`LimitsError`] when a thread count is zero, the set is too small to share, or memory or threads are refused.
pub fn measure(opts: &LimitOptions) -> Result<Limits, LimitsError> {
    let begun = Instant::now();
    let widest = opts.threads.iter().copied().max().unwrap_or(1).max(1);
    if opts.threads.contains(&0) {
        return Err(LimitsError::NoThreads);
    }
    if opts.bytes / PAGE < widest {
        return Err(LimitsError::TooSmall { bytes: opts.bytes, threads: widest });
    }
    let mut set = Mapping::new(opts.bytes, opts.hugepages)?;
    set.entries().iter_mut().step_by(PAGE / 8).for_each(|entry| *entry = 1);
    let huge_bytes = set.huge_bytes();

    let (munmap_ns, host_populate_ns) = host_prices()?;
    let (membarrier_ns, membarrier_busy_ns) = membarrier_prices();
    let fence_ns = fence_price();

    let mut counts: Vec<usize> = opts.threads.iter().copied().filter(|&n| n > 1).collect();
    counts.sort_unstable();
    counts.dedup();
    let left = Duration::from_millis(opts.budget_ms).saturating_sub(begun.elapsed());
    // The two locked operations matter most and have the longest rounds: twice the share of the others.
    let unit = left / (7 * (1 + counts.len() as u32));
    let one = entry_limits(set.entries(), 1, unit)?;
    let mut threads = BTreeMap::new();
    for count in counts {
        threads.insert(count, entry_limits(set.entries(), count, unit)?);
    }
    Ok(Limits {
        one,
        munmap_ns,
        host_populate_ns,
        membarrier_ns,
        membarrier_busy_ns,
        fence_ns,
        threads,
        munmap_ptes: MUNMAP_PAGES,
        bytes: set.bytes,
        huge_bytes,
        stable: None,
    })
}

fn entry_limits(set: &mut [u64], threads: usize, unit: Duration) -> Result<EntryLimits, LimitsError> {
    let mut out = EntryLimits::default();
    for op in Op::ALL {
        let (ns, variant) = best_of(set, threads, op, unit * op.weight())?;
        out.record(op, ns, Some(variant));
    }
    Ok(out)
}

/// One round of each candidate, then the quickest until the share is used up, at least once more.
fn best_of(
    set: &mut [u64],
    threads: usize,
    op: Op,
    share: Duration,
) -> Result<(f64, &'static str), LimitsError> {
    let begun = Instant::now();
    let mut turn = 0;
    let mut best: Option<(f64, Loop)> = None;
    for candidate in op.candidates() {
        let ns = round(set, threads, op, candidate, &mut turn)?;
        if best.is_none_or(|(least, _)| ns < least) {
            best = Some((ns, candidate));
        }
    }
    let Some((mut least, winner)) = best else { return Ok((f64::NAN, "none")) };
    loop {
        least = least.min(round(set, threads, op, winner, &mut turn)?);
        if begun.elapsed() >= share {
            return Ok((least, winner.name));
        }
    }
}

/// Runs `body` once over one window of each thread's part; ns of wall time per entry.
fn round(set: &mut [u64], threads: usize, op: Op, body: Loop, turn: &mut usize) -> Result<f64, LimitsError> {
    // Whole cache lines per thread, so that vector loops have no tail to speak of and no line is shared.
    let part = (set.len() / threads) & !(PAGE / 8 - 1);
    let window = part.min(op.window_bytes() / 8);
    let windows = part / window;
    let from = (*turn % windows) * window;
    let value = *turn as u64 | 1 << 63;
    *turn += 1;
    let mut parts: Vec<&mut [u64]> =
        set.chunks_exact_mut(part).take(threads).map(|part| &mut part[from..from + window]).collect();
    let entries = (threads * window) as f64;
    let run = |part: &mut [u64]| {
        // SAFETY: `candidates` lists a loop only when the CPU has the features it was compiled for.
        black_box(unsafe { (body.run)(part, value) });
    };
    if let [only] = parts.as_mut_slice() {
        let start = Instant::now();
        run(only);
        return Ok(start.elapsed().as_nanos() as f64 / entries);
    }

    // A failed spawn must not leave the others at the barrier: they wait for a verdict before they run.
    let go = Barrier::new(threads);
    let spans: Mutex<Vec<(Instant, Instant)>> = Mutex::new(Vec::with_capacity(threads));
    let timed = |part: &mut [u64]| {
        go.wait();
        let start = Instant::now();
        run(part);
        let end = Instant::now();
        spans.lock().unwrap_or_else(PoisonError::into_inner).push((start, end));
    };
    let (verdict, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let own = parts.pop();
    let outcome = std::thread::scope(|scope| {
        for (index, part) in parts.into_iter().enumerate() {
            let (timed, verdict, failed) = (&timed, &verdict, &failed);
            let spawned =
                std::thread::Builder::new().name(format!("limits-{index}")).spawn_scoped(scope, move || {
                    while verdict.load(Ordering::Acquire) == 0 {
                        std::thread::yield_now();
                    }
                    if !failed.load(Ordering::Relaxed) {
                        timed(part);
                    }
                });
            if let Err(source) = spawned {
                failed.store(true, Ordering::Relaxed);
                verdict.store(1, Ordering::Release);
                return Err(LimitsError::Spawn { index, source });
            }
        }
        verdict.store(1, Ordering::Release);
        if let Some(part) = own {
            timed(part);
        }
        Ok(())
    });
    outcome?;
    let spans = spans.into_inner().unwrap_or_else(PoisonError::into_inner);
    let first = spans.iter().map(|span| span.0).min();
    let last = spans.iter().map(|span| span.1).max();
    let wall = last.zip(first).map_or(Duration::ZERO, |(last, first)| last - first);
    Ok(wall.as_nanos() as f64 / entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quick(bytes: usize, threads: Vec<usize>) -> LimitOptions {
        LimitOptions { bytes, hugepages: false, threads, budget_ms: 0 }
    }

    #[test]
    fn every_figure_is_measured_for_every_thread_count() {
        let limits = measure(&quick(4 << 20, vec![1, 3, 2, 2])).unwrap();
        assert_eq!(limits.threads.keys().copied().collect::<Vec<_>>(), [2, 3]);
        for count in [1, 2, 3] {
            let entry = limits.for_threads(count).unwrap();
            for op in Op::ALL {
                let ns = entry.figure(op);
                assert!(ns.is_finite() && ns > 0.0, "{op:?} with {count} threads: {ns}");
                assert!(entry.variants.contains_key(op.name()));
            }
        }
        assert!(limits.munmap_ns > 0.0 && limits.host_populate_ns > 0.0 && limits.fence_ns > 0.0);
        assert!(limits.for_threads(4).is_none());
        assert_eq!(limits.stable, None);
    }

    #[test]
    fn json_has_the_one_thread_figures_at_the_top() {
        let limits = measure(&quick(2 << 20, vec![2])).unwrap();
        let json = serde_json::to_value(&limits).unwrap();
        for key in ["swap_ns", "cmpxchg_ns", "read_ns", "write_ns", "write_nt_ns", "munmap_ns"] {
            assert!(json[key].is_f64(), "{key}: {}", json[key]);
        }
        assert!(json["threads"]["2"]["swap_ns"].is_f64());
    }

    #[test]
    fn a_tenth_apart_is_stable_and_more_is_not() {
        let base = measure(&quick(2 << 20, vec![2])).unwrap();
        assert!(base.stable_against(&base));
        for op in Op::ALL.into_iter().filter(|&op| op != Op::WriteNt) {
            for (factor, stable) in [(1.09, true), (1.12, false), (0.95, true), (0.88, false)] {
                let mut one = base.clone();
                let ns = one.one.figure(op) * factor;
                one.one.record(op, ns, None);
                assert_eq!(base.stable_against(&one), stable, "{op:?} x {factor}");
                let mut two = base.clone();
                let entry = two.threads.get_mut(&2).unwrap();
                entry.record(op, entry.figure(op) * factor, None);
                assert_eq!(base.stable_against(&two), stable, "{op:?} x {factor}, 2 threads");
            }
        }
        let mut fewer = base.clone();
        fewer.threads.clear();
        assert!(!base.stable_against(&fewer));
    }

    #[test]
    fn a_bracket_keeps_the_lower_figure_and_says_whether_it_held() {
        let before = measure(&quick(2 << 20, vec![])).unwrap();
        let mut after = before.clone();
        after.one.record(Op::Swap, before.one.swap_ns / 2.0, Some("later"));
        after.one.record(Op::Read, before.one.read_ns * 3.0, Some("later"));
        let both = before.clone().bracket(&after);
        assert_eq!(both.one.swap_ns, after.one.swap_ns);
        assert_eq!(both.one.variants["swap"], "later");
        assert_eq!(both.one.read_ns, before.one.read_ns);
        assert_eq!(both.stable, Some(false));
        assert_eq!(before.clone().bracket(&before).stable, Some(true));
    }

    #[test]
    fn bad_options_are_named() {
        let zero = measure(&quick(2 << 20, vec![1, 0])).unwrap_err();
        assert!(matches!(zero, LimitsError::NoThreads));
        let small = measure(&quick(8192, vec![3])).unwrap_err().to_string();
        assert!(small.contains("8192") && small.contains("3 threads"), "{small}");
        let huge = measure(&quick(usize::MAX - 5, vec![1])).unwrap_err().to_string();
        assert!(huge.contains(&(usize::MAX - 5).to_string()), "{huge}");
        let wide = measure(&quick(1 << 60, vec![1])).unwrap_err();
        assert!(matches!(wide, LimitsError::Map { bytes, .. } if bytes == 1 << 60));
    }
}
