//! What a vCPU pays all the time: a page fault, complete, and an RCU read section.
//!
//! The fault is the whole pipeline from the slot lookup to the unlock, under 8 leaf tables that are there and hot; the
//! leaves are taken out before each round, outside the time.

use std::sync::Arc;
use std::time::Instant;

use tdpmmu_platform::{RcuConfig, RcuDomain, Role};
use tdpmmu_vm::{FaultOutcome, GuestAccess};

use super::zap::{close, idle_guest};
use super::{Figure, Goal};
use crate::engine::{Nothing, Rcu, section_rows};
use crate::harness::BenchError;

/// Pages of 8 leaf tables.
const HOT: u64 = 8 * 512;
/// Rounds for each repetition: a round is a fifth of a millisecond.
const ROUNDS: u32 = 40;

pub(super) fn figures(reps: u32) -> Result<Vec<Figure>, BenchError> {
    let mut out = faults(reps)?;
    let rcu = Rcu::new(Arc::new(Nothing), RcuConfig::default());
    let flavour = rcu.stats().flavour.name();
    for sample in section_rows(&rcu, reps) {
        let who = sample.name.trim_start_matches("tdpmmu ");
        let name = format!("read section, enter + leave {who}, {flavour}");
        out.push(Figure::ns(name, sample.ns, sample.count).goal(Goal::AtMost(0.5)));
    }
    rcu.stop();
    Ok(out)
}

fn faults(reps: u32) -> Result<Vec<Figure>, BenchError> {
    let vm = idle_guest(HOT << 12, "1G,root", true)?;
    let task = vm.task("unmap", Role::Caller);
    let mut vcpu = vm.vcpu(0).map_err(BenchError::engine)?;
    let mut out = Vec::new();
    for (name, write) in [("page fault, write, tables hot", true), ("page fault, read, tables hot", false)] {
        let mut least = f64::INFINITY;
        // One round more: the first links the tables.
        for _ in 0..=reps * ROUNDS {
            let mut guard = vm.mmu().lock.write(&task);
            let mut debt = vm.mmu().unmap(&mut guard, 0, 0..HOT, true);
            vm.mmu().pay(&task, &mut debt);
            drop(guard);
            let mut fixed = 0;
            let start = Instant::now();
            for gfn in 0..HOT {
                let access = GuestAccess { gfn, write, exec: false };
                let outcome = vcpu.fault(access, false).map_err(BenchError::engine)?;
                fixed += u64::from(matches!(outcome, FaultOutcome::Fixed { level: 1, .. }));
            }
            least = least.min(start.elapsed().as_nanos() as f64 / HOT as f64);
            if fixed != HOT {
                return Err(BenchError::Engine { what: format!("{name}: {fixed} faults fixed of {HOT}") });
            }
        }
        out.push(Figure::ns(name, least, HOT).goal(Goal::AtMost(50.0)));
    }
    drop(vcpu);
    drop(task);
    close(&vm)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_and_sections_have_their_figures() {
        let figures = figures(1).unwrap();
        assert_eq!(figures.len(), 4);
        assert!(figures.iter().all(|figure| figure.value > 0.0 && figure.goal != Goal::None));
    }
}
