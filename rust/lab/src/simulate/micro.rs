//! The loops behind the prices: one operation each, over and over, on threads of their own.
//!
//! Every figure is a median or a minimum of many, so that what else the host does in between is seldom in it. What is generic over the platform runs in virtual time as well: the difference
//! between the two is the price of what lies between an operation's words.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tdpmmu_platform::{Platform, Real, Role as TaskRole, Site};
use tdpmmu_vm::{AdMix, BulkOptions, GuestAccess, Progress, Vm, VmError};

use crate::LabError;
use crate::run::vm_config;
use crate::scenario::VmSpec;

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(0.0)
}

/// The least time an iteration of `body` takes, over rounds of `times`.
fn least(rounds: u32, times: u32, mut body: impl FnMut()) -> f64 {
    let round = |_| {
        let begun = Instant::now();
        (0..times).for_each(|_| body());
        begun.elapsed().as_nanos() as f64 / f64::from(times)
    };
    (0..rounds).map(round).fold(f64::INFINITY, f64::min)
}

pub(super) fn locked() -> f64 {
    let word = AtomicU64::new(0);
    least(20, 20_000, || {
        std::hint::black_box(word.fetch_add(1, Ordering::SeqCst));
    })
}

pub(super) fn relax() -> f64 {
    let word = AtomicU64::new(0);
    least(20, 5_000, || {
        std::hint::black_box(word.load(Ordering::Acquire));
        Real::relax(Site::Spin);
    })
}

pub(super) fn syscall() -> f64 {
    let word = AtomicU32::new(0);
    least(20, 2_000, || {
        Real::futex_wake(&word, 1);
    })
}

/// What a thread pays for questions about itself: its CPU time, its switches, its time without a CPU.
pub(super) fn questions() -> [f64; 3] {
    let ask = |question: fn()| least(10, 200, question);
    [
        ask(|| {
            std::hint::black_box(Real::thread_cpu_ns());
        }),
        ask(|| {
            std::hint::black_box(Real::switches());
        }),
        ask(|| {
            std::hint::black_box(Real::run_delay_ns());
        }),
    ]
}

pub(super) fn spawn() -> f64 {
    let one = |_| {
        let begun = Instant::now();
        let handle = Real::spawn("calibrate", Box::new(|| ()));
        let took = begun.elapsed().as_nanos() as f64;
        if let Ok(handle) = handle {
            let _ = handle.join();
        }
        took
    };
    median((0..50).map(one).collect())
}

/// From a change of a line on one CPU until another CPU has seen it.
pub(super) fn transfer() -> f64 {
    const ROUNDS: u64 = 2_000;
    let (word, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let seen = word.load(Ordering::Acquire);
                if seen % 2 == 1 {
                    word.store(seen + 1, Ordering::Release);
                }
                std::hint::spin_loop();
            }
        });
        let mut best = f64::INFINITY;
        for _ in 0..30 {
            let begun = Instant::now();
            for _ in 0..ROUNDS {
                let asked = word.fetch_add(1, Ordering::AcqRel) + 1;
                while word.load(Ordering::Acquire) == asked {
                    std::hint::spin_loop();
                }
            }
            best = best.min(begun.elapsed().as_nanos() as f64 / ROUNDS as f64 / 2.0);
        }
        stop.store(true, Ordering::Relaxed);
        best
    })
}

/// (price of waking a sleeper, from the begin of that until it runs).
pub(super) fn wake() -> (f64, f64) {
    const ROUNDS: usize = 200;
    let (bell, stamp) = (AtomicU32::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS as u32 {
                while bell.load(Ordering::Acquire) == round {
                    Real::futex_wait(&bell, round, None);
                }
                stamp.store(Real::ticks(), Ordering::Release);
            }
        });
        let (mut costs, mut latencies) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            std::thread::sleep(Duration::from_micros(300));
            stamp.store(0, Ordering::Release);
            let begun = Real::ticks();
            bell.fetch_add(1, Ordering::AcqRel);
            Real::futex_wake(&bell, 1);
            costs.push(Real::ticks_to_ns(Real::ticks() - begun) as f64);
            let seen = loop {
                match stamp.load(Ordering::Acquire) {
                    0 => std::hint::spin_loop(),
                    seen => break seen,
                }
            };
            latencies.push(Real::ticks_to_ns(seen.saturating_sub(begun)) as f64);
        }
        (median(costs), median(latencies))
    })
}

/// Two threads on one CPU: (how long one runs before the other does, what a change costs).
pub(super) fn sharing() -> (f64, f64) {
    let Some(&cpu) = Real::cpus().first() else { return (3e6, 1e3) };
    let stop = AtomicBool::new(false);
    let slice = std::thread::scope(|scope| {
        let spin = || {
            let _ = Real::pin(cpu);
            let (mut begun, mut last) = (Real::ticks(), Real::ticks());
            let mut stretches = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let now = Real::ticks();
                if Real::ticks_to_ns(now - last) > 100_000 {
                    stretches.push(Real::ticks_to_ns(last - begun) as f64);
                    begun = now;
                }
                last = now;
            }
            stretches
        };
        let both = [scope.spawn(spin), scope.spawn(spin)];
        std::thread::sleep(Duration::from_millis(400));
        stop.store(true, Ordering::Relaxed);
        median(both.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect())
    });
    const YIELDS: u32 = 2_000;
    let yielding = || {
        let _ = Real::pin(cpu);
        let begun = Instant::now();
        (0..YIELDS).for_each(|_| Real::yield_cpu(Site::Spin));
        begun.elapsed().as_nanos() as f64 / f64::from(YIELDS)
    };
    let turn = std::thread::scope(|scope| {
        let both = [scope.spawn(yielding), scope.spawn(yielding)];
        both.into_iter().filter_map(|thread| thread.join().ok()).fold(f64::INFINITY, f64::min)
    });
    // One turn of a thread is its change to the other and back.
    (if slice > 0.0 { slice } else { 3e6 }, turn / 2.0)
}

fn failed(error: VmError) -> LabError {
    LabError::Internal(format!("calibration: {error}"))
}

fn vm<P: Platform>(spec: &VmSpec, pages: u64) -> Result<Vm<P>, LabError> {
    let vm = Vm::<P>::new(vm_config(spec, None)?).map_err(failed)?;
    let task = vm.task("calibrate", TaskRole::Caller);
    vm.add_memory(&task, 0, pages, 1).map_err(failed)?;
    Ok(vm)
}

/// ns of a slow fault, one every `stride` pages of `pages`; the tables' pages have been touched.
pub(super) fn fault<P: Platform>(spec: &VmSpec, pages: u64, stride: u64) -> Result<f64, LabError> {
    let vm = P::quiet(|| vm::<P>(spec, pages))?;
    vm.mmu().pool().prefault(pages / 512 + 64).map_err(|e| LabError::Internal(e.to_string()))?;
    let mut vcpu = vm.vcpu(0).map_err(failed)?;
    // The root and its path are there.
    vcpu.access(GuestAccess { gfn: 0, write: true, exec: false }).map_err(failed)?;
    let mut batches = Vec::new();
    let gfns: Vec<u64> = (1..pages / stride).map(|n| n * stride).collect();
    for batch in gfns.chunks(64) {
        let begun = P::ticks();
        for &gfn in batch {
            vcpu.access(GuestAccess { gfn, write: true, exec: false }).map_err(failed)?;
        }
        batches.push(P::ticks_to_ns(P::ticks() - begun) as f64 / batch.len() as f64);
    }
    vcpu.leave();
    drop(vcpu);
    Ok(median(batches))
}

/// ns of a vCPU that unloads a root which others hold and loads it again.
pub(super) fn reload<P: Platform>(spec: &VmSpec) -> Result<f64, LabError> {
    let vm = P::quiet(|| vm::<P>(spec, 1 << 10))?;
    let mut holder = vm.vcpu(1).map_err(failed)?;
    holder.root().map_err(failed)?;
    let mut vcpu = vm.vcpu(0).map_err(failed)?;
    let mut samples = Vec::new();
    for _ in 0..500 {
        let begun = P::ticks();
        vcpu.drop_root().map_err(failed)?;
        samples.push(P::ticks_to_ns(P::ticks() - begun) as f64);
    }
    Ok(median(samples))
}

/// ns of a read section, enter and leave, of a task that measures.
pub(super) fn section(spec: &VmSpec) -> Result<f64, LabError> {
    let vm = vm::<Real>(spec, 1 << 10)?;
    let task = vm.task("calibrate", TaskRole::Caller);
    Ok(least(20, 2_000, || drop(task.rcu_read())))
}

/// ns of a reschedule check of a task that measures.
pub(super) fn check(spec: &VmSpec) -> Result<f64, LabError> {
    let vm = vm::<Real>(spec, 1 << 10)?;
    let task = vm.task("calibrate", TaskRole::Caller);
    Ok(least(20, 2_000, || {
        std::hint::black_box(task.should_yield(&vm.mmu().lock));
    }))
}

/// ns a level of a walk over eight leaf tables.
pub(super) fn walk(spec: &VmSpec) -> Result<f64, LabError> {
    let pages = 8 * 512;
    let vm = vm::<Real>(spec, pages)?;
    let mut vcpu = vm.vcpu(0).map_err(failed)?;
    vm.populate_bulk(&mut vcpu, 0..pages, &BulkOptions::default(), &Progress::default()).map_err(failed)?;
    let root = vcpu.root().map_err(failed)?;
    let task = vcpu.task();
    let inside = task.rcu_read();
    let mut gfn = 0u64;
    Ok(least(20, 20_000, || {
        let found = vm.mmu().lookup_within(&inside, root, gfn);
        gfn = (gfn * 5 + 1 + found.map_or(0, |(spte, _)| spte.raw() & 1)) % pages;
    }) / f64::from(spec.levels))
}

/// ns of an access that the TLB answers.
pub(super) fn access(spec: &VmSpec) -> Result<f64, LabError> {
    let vm = vm::<Real>(spec, 1 << 10)?;
    let mut vcpu = vm.vcpu(0).map_err(failed)?;
    let hit = GuestAccess { gfn: 7, write: true, exec: false };
    vcpu.access(hit).map_err(failed)?;
    let ns = least(20, 20_000, || {
        std::hint::black_box(vcpu.access(hit).is_ok());
    });
    vcpu.leave();
    Ok(ns)
}

/// What zapping `pages` pages took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Zapped {
    /// CPU time in the walk, ns per SPTE.
    pub(super) per_spte: f64,
    /// Entries written.
    pub(super) writes_per_spte: f64,
    /// RCU's CPU time, ns per table.
    pub(super) free: f64,
}

/// A fast zap that nobody disturbs.
pub(super) fn zap(spec: &VmSpec, pages: u64, ad: AdMix) -> Result<Zapped, LabError> {
    let mut best: Option<Zapped> = None;
    for _ in 0..4 {
        let vm = vm::<Real>(spec, pages)?;
        vm.mmu().pool().prefault(pages / 512 + 64).map_err(|e| LabError::Internal(e.to_string()))?;
        let mut vcpu = vm.vcpu(0).map_err(failed)?;
        let options = BulkOptions { ad, ..BulkOptions::default() };
        let sptes = vm.populate_bulk(&mut vcpu, 0..pages, &options, &Progress::default()).map_err(failed)?;
        drop(vcpu);
        let task = vm.task("calibrate", TaskRole::Caller);
        let before = vm.mmu().rcu_stats_cpu();
        let _ = task.meter().take();
        vm.fast_zap(&task).map_err(failed)?;
        let meter = task.meter().take();
        vm.mmu().rcu_barrier();
        let rcu = vm.mmu().rcu_stats_cpu().saturating_sub(before);
        let now = Zapped {
            per_spte: meter.walk_cpu_ns as f64 / sptes as f64,
            writes_per_spte: meter.entry_writes as f64 / sptes as f64,
            free: rcu as f64 / (sptes / 512).max(1) as f64,
        };
        best = Some(best.map_or(now, |best: Zapped| Zapped {
            per_spte: best.per_spte.min(now.per_spte),
            writes_per_spte: now.writes_per_spte,
            free: best.free.min(now.free),
        }));
    }
    Ok(best.unwrap_or_default())
}

trait RcuCpu {
    fn rcu_stats_cpu(&self) -> u64;
    fn rcu_barrier(&self);
}

impl RcuCpu for tdpmmu_mmu::TdpMmu<Real> {
    fn rcu_stats_cpu(&self) -> u64 {
        tdpmmu_platform::RcuDomain::stats(&**self.rcu()).thread_cpu_ns
    }

    fn rcu_barrier(&self) {
        tdpmmu_platform::RcuDomain::barrier(&**self.rcu());
    }
}
