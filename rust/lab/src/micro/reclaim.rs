//! `bench walk --reclaim …`: what keeping freed pages from lockless walkers costs whom, kind by kind, on the same tree and the same work.
//!
//! **Guarantee.** Everything is measured in one run, kind after kind; a ratio is to kind `ipi` of that run. A walk is a whole one: begin, four reads that depend on each other, end. The freer frees
//! nothing but what a fast zap of a small tree frees.
//!
//! **Mechanism.** Readers are vCPU threads that walk and do nothing else; the freer is one thread, the VMM and vCPU 0 in turn: vCPU 0 maps a few pages, a fast zap takes them away, vCPU 0 puts its root.
//!
//! | `what` | is | `ns` |
//! | --- | --- | --- |
//! | `walk` | `readers` threads walk, nobody frees | of one walk; `scaling`: over that of a single reader |
//! | `free` | one tree after the other, each when the one before is free, beside walking readers | from the call to the last page free: median, with `p99` and `max` |
//! | `waiting` | trees as fast as they come, beside walking readers | none: `pages` waited at most |
//! | `stalled-free` | the same while one reader has lost its CPU inside a walk for `stall_ms` | from the first call to its pages free, the longest stall |
//! | `stalled-call` | | the longest fast zap: as long does it hold mmu_lock, or keep slots_lock |
//! | `stalled-waiting` | | none: `pages` waited at most |

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use serde::Serialize;
use tdpmmu_platform::{Histogram, Platform, Role as TaskRole, Site, Task};
use tdpmmu_shadow::ShadowMmu;
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_vm::{GuestAccess, Vcpu, Vm};

use super::{Bench, P, ROUNDS, Row, clean, fail};
use crate::LabError;
use crate::config::ShadowCase;

/// Walks of a reader in a round.
const WALKS: u64 = 1 << 18;
/// Walks go over so many gfns: eight leaf tables, hot.
const GFNS: u64 = 8 * 512;
/// Leaf tables of a tree that is freed.
const TREE: u64 = 16;
/// Trees freed one by one, and as fast as they come.
const FREES: u64 = 1_000;
const BURST: u64 = 2_000;
/// Of each no more than fit into so long, but a few: where a freer waits for readers that have no CPU, many take for ever.
const LONG_NS: u64 = 2_000_000_000;
const FEW: u64 = 20;
/// Who waits for pages to be free helps after so long.
const PATIENCE_NS: u64 = 2_000_000;
/// A reader loses its CPU for so long, so often.
const STALL: Duration = Duration::from_millis(20);
const STALLS: u32 = 5;

/// What only rows of `bench walk --reclaim` have.
#[derive(Clone, Debug, Serialize)]
pub struct ReclaimRow {
    /// The kind.
    pub reclaim: &'static str,
    /// See the module text.
    pub what: &'static str,
    /// Threads that walked.
    pub readers: usize,
    /// Over a single reader's.
    pub scaling: Option<f64>,
    /// Of `count` samples.
    pub p99: Option<u64>,
    /// The largest.
    pub max: Option<u64>,
    /// Pages that waited for readers, at most.
    pub pages: Option<u64>,
    /// A reader was without its CPU for so long.
    pub stall_ms: Option<u64>,
}

/// The freer: the VMM, and vCPU 0.
struct Freer<'v> {
    vm: &'v Vm<P>,
    task: Task<P>,
    vcpu: Vcpu<'v, P>,
    shadow: &'v ShadowMmu<P>,
}

impl<'v> Freer<'v> {
    fn new(vm: &'v Vm<P>) -> Result<Self, LabError> {
        let shadow = shadow_of(vm)?;
        Ok(Self {
            vm,
            task: vm.task("freer", TaskRole::Caller),
            vcpu: vm.vcpu(0).map_err(fail("a vCPU"))?,
            shadow,
        })
    }

    fn waiting(&self) -> u64 {
        self.shadow.reclamation().waiting()
    }

    fn freed(&self) -> u64 {
        self.vm.mmu().pool().stats().frees
    }

    /// vCPU 0 maps a tree, a fast zap takes it away, vCPU 0 puts its root; the ticks at the call and at its return.
    fn tree(&mut self) -> Result<(u64, u64), LabError> {
        for n in 0..TREE {
            let access = GuestAccess { gfn: n * span(2), write: true, exec: false };
            self.vcpu.access(access).map_err(fail("an access"))?;
        }
        self.vcpu.leave();
        let begin = P::ticks();
        self.vm.fast_zap(&self.task).map_err(fail("a fast zap"))?;
        let end = P::ticks();
        self.vcpu.reload().map_err(fail("a root"))?;
        Ok((begin, end))
    }

    /// An epoch library collects when somebody pins: readers do, and who has waited for long enough.
    fn until_free(&self) {
        let until = P::ticks() + P::ns_to_ticks(PATIENCE_NS);
        while self.waiting() != 0 && P::ticks() < until {
            P::yield_cpu(Site::ShadowFree);
        }
        if self.waiting() != 0 {
            self.shadow.reclamation().drain(&self.task);
        }
    }
}

/// So many, or as many as there is time for.
struct Budget {
    done: u64,
    most: u64,
    until: u64,
}

impl Budget {
    fn new(most: u64) -> Self {
        Self { done: 0, most, until: P::ticks() + P::ns_to_ticks(LONG_NS) }
    }

    /// One more, if there may be.
    fn more(&mut self) -> bool {
        let may = self.done < self.most && (self.done < FEW || P::ticks() < self.until);
        self.done += u64::from(may);
        may
    }
}

fn shadow_of(vm: &Vm<P>) -> Result<&ShadowMmu<P>, LabError> {
    vm.shadow().ok_or_else(|| LabError::Internal("the VM has no shadow MMU".into()))
}

/// Walks to pseudo-random gfns, each in a section of its own, the next one's gfn from the last one's answer.
fn walks(vm: &Vm<P>, vcpu: &mut Vcpu<'_, P>, count: u64) -> Result<u64, LabError> {
    let shadow = shadow_of(vm)?;
    let root = vcpu.root().map_err(fail("a root"))?;
    let walker = shadow
        .reclamation()
        .walker(vm.vcpu_state(vcpu.id()))
        .map_err(|e| LabError::Internal(e.to_string()))?;
    let (mut at, mut fold) = (0, 0u64);
    let shift = 64 - GFNS.ilog2();
    let begin = P::ticks();
    for n in 0..count {
        let walk = shadow.walk_lockless(&walker.begin(vcpu.task()), root, at);
        let Some((leaf, _)) = walk.leaf() else {
            // The tree has gone meanwhile, or is not there yet.
            continue;
        };
        let leaf = leaf.raw();
        fold ^= leaf;
        at = (leaf + n).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> shift;
    }
    black_box(fold);
    Ok(P::ticks() - begin)
}

/// A reader beside the freer: walks under whatever root it has, until told to stop.
fn walk_on(vm: &Vm<P>, id: usize, stop: &AtomicBool) -> Result<(), LabError> {
    let mut vcpu = vm.vcpu(id).map_err(fail("a vCPU"))?;
    while !stop.load(Ordering::Relaxed) {
        if !vcpu.reload().map_err(fail("a root"))? {
            break;
        }
        walks(vm, &mut vcpu, 64)?;
    }
    Ok(())
}

/// Runs `work` beside `readers` threads that walk.
fn beside<R>(vm: &Vm<P>, readers: usize, work: impl FnOnce() -> Result<R, LabError>) -> Result<R, LabError> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let walking: Vec<_> = (1..=readers)
            .map(|id| {
                scope.spawn({
                    let stop = &stop;
                    move || walk_on(vm, id, stop)
                })
            })
            .collect();
        let done = work();
        stop.store(true, Ordering::Relaxed);
        for thread in walking {
            thread.join().map_err(|_| LabError::Internal("a reader panicked".into()))??;
        }
        done
    })
}

impl Bench<'_> {
    /// `bench walk --reclaim`.
    pub(super) fn reclaim(&mut self) -> Result<(), LabError> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let cases = self.plan.shadow.clone();
        for case in &cases {
            let vm = self.reclaim_vm(case, cpus + 1)?;
            self.walk_rows(&vm, case, cpus)?;
            // The tree of the walks goes; vCPU 0's small ones come.
            self.free_rows(&vm, case, cpus)?;
            self.stall_rows(&vm, case)?;
            clean(&vm)?;
        }
        self.ratios();
        Ok(())
    }

    fn reclaim_vm(&self, case: &ShadowCase, vcpus: usize) -> Result<Vm<P>, LabError> {
        let memory = self.plan.config.memory_bytes.min(TREE * page_bytes(2)).max(GFNS * page_bytes(1));
        self.shadow_vm(case, memory, 1, |config| config.vcpus = vcpus)
    }

    fn push(&mut self, case: &ShadowCase, what: &'static str, ns: Option<f64>, count: u64, more: ReclaimRow) {
        let name = match what {
            "walk" => {
                format!("lockless walk, {}, {} reader{}", case.reclaim, more.readers, plural(more.readers))
            }
            "free" => format!("zap of a tree to its pages free, {}", case.reclaim),
            "waiting" => format!("pages waiting, {}", case.reclaim),
            "stalled-free" => format!("a reader stalled: zap to pages free, {}", case.reclaim),
            "stalled-call" => format!("a reader stalled: the zap's call, {}", case.reclaim),
            _ => format!("a reader stalled: pages waiting, {}", case.reclaim),
        };
        self.rows.push(Row {
            name,
            // Null in JSON, where there is no time.
            ns: ns.unwrap_or(f64::NAN),
            ratio: None,
            of: None,
            count,
            goal: None,
            dirty: None,
            reclaim: Some(ReclaimRow { reclaim: case.reclaim.name(), what, ..more }),
        });
    }

    /// Nobody frees: 1 reader, and one per CPU.
    fn walk_rows(&mut self, vm: &Vm<P>, case: &ShadowCase, cpus: usize) -> Result<(), LabError> {
        {
            let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
            for gfn in 0..GFNS {
                vcpu.access(GuestAccess { gfn, write: true, exec: false }).map_err(fail("an access"))?;
            }
        }
        let mut alone = None;
        let mut counts = vec![1, cpus];
        counts.dedup();
        for readers in counts {
            let mut best = f64::INFINITY;
            for round in 0..ROUNDS {
                self.control.check()?;
                self.control
                    .report(&format!("walks, {}, {readers}", case.reclaim), round as f64 / ROUNDS as f64);
                let start = Barrier::new(readers);
                let ticks = std::thread::scope(|scope| {
                    let reader = |id| {
                        let start = &start;
                        scope.spawn(move || {
                            let vcpu = vm.vcpu(id).map_err(fail("a vCPU"));
                            start.wait();
                            walks(vm, &mut vcpu?, WALKS)
                        })
                    };
                    let all: Vec<_> = (0..readers).map(reader).collect();
                    let mut sum = 0;
                    for thread in all {
                        sum +=
                            thread.join().map_err(|_| LabError::Internal("a reader panicked".into()))??;
                    }
                    Ok::<u64, LabError>(sum)
                })?;
                best = best.min(P::ticks_to_ns(ticks) as f64 / (WALKS * readers as u64) as f64);
            }
            let one = *alone.get_or_insert(best);
            let more = ReclaimRow { scaling: Some(best / one), ..none(readers) };
            self.push(case, "walk", Some(best), WALKS * readers as u64, more);
        }
        Ok(())
    }

    /// Readers walk on all CPUs but the freer's.
    fn free_rows(&mut self, vm: &Vm<P>, case: &ShadowCase, cpus: usize) -> Result<(), LabError> {
        let readers = (cpus - 1).max(1);
        self.control.report(&format!("frees, {}", case.reclaim), 0.0);
        let mut freer = Freer::new(vm)?;
        freer.tree()?;
        freer.until_free();
        let (latency, peak, burst) = beside(vm, readers, || {
            let mut latency = Histogram::new();
            let mut budget = Budget::new(FREES);
            while budget.more() {
                self.control.check()?;
                let (begin, end) = freer.tree()?;
                freer.until_free();
                // Who frees at once has freed when the call returns, or when vCPU 0 put its root.
                let last = vm.mmu().last_table_free().max(begin);
                latency.record(P::ticks_to_ns(last.max(end.min(last)) - begin));
            }
            let (mut peak, mut burst) = (0, Budget::new(BURST));
            while burst.more() {
                self.control.check()?;
                freer.tree()?;
                peak = peak.max(freer.waiting());
            }
            freer.until_free();
            Ok((latency, peak, burst.done))
        })?;
        let of = latency.summary();
        let more = ReclaimRow { p99: of.p99, max: of.max, ..none(readers) };
        self.push(case, "free", of.p50.map(|ns| ns as f64), of.count, more);
        self.push(case, "waiting", None, burst, ReclaimRow { pages: Some(peak), ..none(readers) });
        Ok(())
    }

    /// One reader is inside a walk and has lost its CPU.
    fn stall_rows(&mut self, vm: &Vm<P>, case: &ShadowCase) -> Result<(), LabError> {
        self.control.report(&format!("a stalled reader, {}", case.reclaim), 0.0);
        let mut freer = Freer::new(vm)?;
        freer.tree()?;
        freer.until_free();
        let (mut free, mut call, mut peak) = (0, 0, 0);
        for _ in 0..STALLS {
            self.control.check()?;
            // 1: inside; 2: outside again.
            let state = AtomicU32::new(0);
            std::thread::scope(|scope| {
                let stalled = scope.spawn(|| -> Result<(), LabError> {
                    let shadow = shadow_of(vm)?;
                    let mut vcpu = vm.vcpu(1).map_err(fail("a vCPU"))?;
                    let inside = (|| {
                        let root = vcpu.root().map_err(fail("a root"))?;
                        let walker = shadow
                            .reclamation()
                            .walker(vm.vcpu_state(1))
                            .map_err(|e| LabError::Internal(e.to_string()))?;
                        let section = walker.begin(vcpu.task());
                        state.store(1, Ordering::Release);
                        std::thread::sleep(STALL);
                        black_box(shadow.walk_lockless(&section, root, 0));
                        drop(section);
                        Ok(())
                    })();
                    state.store(2, Ordering::Release);
                    inside
                });
                while state.load(Ordering::Acquire) == 0 {
                    std::thread::yield_now();
                }
                let before = freer.freed();
                let zapped = freer.shadow.counts().zapped;
                let (mut first, mut is_free) = (None, None);
                while state.load(Ordering::Acquire) < 2 || first.is_none() {
                    let (begin, end) = freer.tree()?;
                    call = call.max(P::ticks_to_ns(end - begin));
                    peak = peak.max(freer.waiting());
                    let (at, pages) = *first.get_or_insert((begin, freer.shadow.counts().zapped - zapped));
                    if is_free.is_none() && freer.freed() >= before + pages {
                        is_free = Some(P::ticks() - at);
                    }
                }
                freer.until_free();
                let (at, _) = first.unwrap_or((P::ticks(), 0));
                free = free.max(P::ticks_to_ns(is_free.unwrap_or_else(|| P::ticks() - at)));
                stalled.join().map_err(|_| LabError::Internal("the stalled reader panicked".into()))?
            })?;
        }
        let stall_ms = Some(STALL.as_millis() as u64);
        let times = u64::from(STALLS);
        self.push(case, "stalled-free", Some(free as f64), times, ReclaimRow { stall_ms, ..none(1) });
        self.push(case, "stalled-call", Some(call as f64), times, ReclaimRow { stall_ms, ..none(1) });
        let more = ReclaimRow { stall_ms, pages: Some(peak), ..none(1) };
        self.push(case, "stalled-waiting", None, times, more);
        Ok(())
    }

    /// Each row over the one of kind `ipi`, if that was asked for too.
    fn ratios(&mut self) {
        let of_ipi: Vec<_> = self
            .rows
            .iter()
            .filter_map(|row| Some((row.reclaim.as_ref().filter(|r| r.reclaim == "ipi")?, row.ns)))
            .map(|(r, ns)| (r.what, r.readers, ns))
            .collect();
        for row in &mut self.rows {
            let Some(own) = &row.reclaim else { continue };
            let ipi = of_ipi.iter().find(|(what, readers, _)| (*what, *readers) == (own.what, own.readers));
            row.ratio = ipi.map(|ipi| row.ns / ipi.2).filter(|ratio| ratio.is_finite());
            row.of = row.ratio.map(|_| "ipi".into());
        }
    }
}

fn none(readers: usize) -> ReclaimRow {
    ReclaimRow {
        reclaim: "",
        what: "",
        readers,
        scaling: None,
        p99: None,
        max: None,
        pages: None,
        stall_ms: None,
    }
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}
