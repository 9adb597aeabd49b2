//! What the batched calls of the Python face do, done by its library alone: the native side of `benches/python`.
//!
//! The same engine with the settings that the face gives it (measuring tasks), the same accesses in the same order, and a
//! result of the same size written for each: the difference to the call from Python is the call.

use std::hint::black_box;
use std::time::{Duration, Instant};

use serde::Serialize;
use tdpmmu_lab::guest::Random;
use tdpmmu_platform::{Real, Role};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{AccessOutcome, AdMix, GuestAccess, Vm, VmConfig};

use super::zap::{close, populate};
use crate::harness::BenchError;

/// Pages of the guest, and accesses of a round of faults: 512 leaf tables. As in `benches/python`.
const PAGES: u64 = 1 << 18;
/// Pages that are looked up: eight leaf tables.
const LOOKED_UP: u64 = 8 * 512;
/// Look-ups of a round: their result is 2 MiB, which the allocator keeps.
const LOOKUPS: usize = 1 << 16;
/// TLB hits of a round.
const HITS: usize = 1 << 20;

/// ns an operation, the least of the rounds.
#[derive(Debug, Serialize)]
pub struct Native {
    schema: &'static str,
    /// An access that the TLB answers.
    hit_ns: f64,
    /// A write access to a page that is not mapped, its table there: walk, fault, walk.
    fault_ns: f64,
    /// A look-up of a random page, independent of the last.
    lookup_ns: f64,
}

/// Measures all three.
///
/// # Errors
/// [`BenchError::Engine`].
pub fn run(reps: u32) -> Result<Native, BenchError> {
    let config = VmConfig::new(KernelProfile::named("6.12").map_err(BenchError::engine)?);
    let vm = Vm::<Real>::new(config).map_err(BenchError::engine)?;
    let task = vm.task("setup", Role::Caller);
    vm.add_memory(&task, 0, PAGES, 1).map_err(BenchError::engine)?;
    populate(&vm, PAGES, AdMix::Dirty)?;
    let hits = vec![7; HITS];
    let mut random = Random::new(1);
    let scattered: Vec<u64> = (0..LOOKUPS).map(|_| random.draw() % LOOKED_UP).collect();
    let all: Vec<u64> = (0..PAGES).collect();
    let (mut hit, mut fault, mut lookup) = (Duration::MAX, Duration::MAX, Duration::MAX);
    for _ in 0..reps.max(2) {
        hit = hit.min(accesses(&vm, &hits, AccessOutcome::TlbHit)?);
        for _ in 0..20 {
            lookup = lookup.min(lookups(&vm, &scattered)?);
        }
        vm.unmap_gfns(&task, 0..PAGES, true).map_err(BenchError::engine)?;
        fault = fault.min(accesses(&vm, &all, AccessOutcome::SlowFault)?);
    }
    drop(task);
    close(&vm)?;
    let each = |time: Duration, n: usize| time.as_nanos() as f64 / n as f64;
    Ok(Native {
        schema: "tdpmmu.native/1",
        hit_ns: each(hit, HITS),
        fault_ns: each(fault, PAGES as usize),
        lookup_ns: each(lookup, LOOKUPS),
    })
}

fn accesses(vm: &Vm<Real>, gfns: &[u64], expected: AccessOutcome) -> Result<Duration, BenchError> {
    let mut vcpu = vm.vcpu(0).map_err(BenchError::engine)?;
    let start = Instant::now();
    let mut outcomes = Vec::with_capacity(gfns.len());
    for &gfn in gfns {
        let access = GuestAccess { gfn, write: true, exec: false };
        outcomes.push(vcpu.access(access).map_err(BenchError::engine)? as u8);
    }
    let took = start.elapsed();
    // The first one enters the guest and may have to walk.
    match outcomes.iter().skip(1).find(|&&outcome| outcome != expected as u8) {
        Some(other) => Err(BenchError::engine(format!("an access ended as {other}, not as {expected:?}"))),
        None => Ok(took),
    }
}

fn lookups(vm: &Vm<Real>, gfns: &[u64]) -> Result<Duration, BenchError> {
    let root = vm.vcpu(0).and_then(|mut vcpu| vcpu.root()).map_err(BenchError::engine)?;
    let task = vm.task("lookup", Role::Observer);
    let start = Instant::now();
    let mut rows: Vec<[u64; 4]> = Vec::with_capacity(gfns.len());
    rows.extend(gfns.iter().map(|&gfn| match vm.mmu().lookup(&task, root, gfn) {
        Some((spte, level)) => [gfn, spte.raw(), spte.pfn(), u64::from(level)],
        None => [gfn, 0, 0, 0],
    }));
    let took = start.elapsed();
    if black_box(rows).iter().any(|row| row[3] != 1) {
        return Err(BenchError::engine("a page that is mapped was not found"));
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_time() {
        let native = run(1).unwrap();
        assert!(native.hit_ns > 0.0 && native.fault_ns > native.hit_ns && native.lookup_ns > 0.0);
    }
}
