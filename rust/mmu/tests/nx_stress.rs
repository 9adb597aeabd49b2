//! NX candidates, aging and write protection beside faults and fast zaps, for real: the list never names a table that is not linked.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::{Cpu, Mmu, Setup, end, fast_zap};
use tdpmmu_mmu::{MapFault, MapOutcome};
use tdpmmu_platform::Role;

const REGIONS: u64 = 12;
const STEPS: u64 = 8000;

/// A small generator of its own per thread (xorshift), so that a failure repeats as far as threads can.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }
}

/// Loads a valid root when the one in hand is obsolete.
fn reload(cpu: &mut Cpu) {
    if cpu.mmu.is_obsolete(cpu.root) {
        cpu.drop_root();
        cpu.root = cpu.mmu.load_root(&cpu.task, &mut cpu.cache, cpu.mmu.root_role(false)).expect("a root");
    }
}

/// Runs for `STEPS`, and on until the others have done something too, but not for ever.
fn guest(mmu: &Arc<Mmu>, seed: u64, others: [&AtomicU64; 2]) -> u64 {
    let (mut cpu, mut dice, mut retries) = (Cpu::new(mmu), Dice(seed), 0);
    let idle = || others.iter().any(|done| done.load(Ordering::Relaxed) < 20);
    for step in 0..100 * STEPS {
        if step >= STEPS && !idle() {
            break;
        }
        reload(&mut cpu);
        let gfn = dice.roll(REGIONS) * 512 + dice.roll(512);
        let fault = match dice.roll(3) {
            0 => MapFault {
                write: false,
                exec: true,
                goal_level: 1,
                req_level: 2,
                huge_page_disallowed: true,
                ..MapFault::page(gfn, 0x10_0000 + gfn, 1)
            },
            1 => MapFault::page(gfn, 0x10_0000 + gfn, 2),
            _ => MapFault::page(gfn, 0x10_0000 + gfn, 1),
        };
        retries += u64::from(cpu.map(&fault) == MapOutcome::Retry);
    }
    cpu.drop_root();
    cpu.close();
    retries
}

/// Each candidate once, and each where its parent's entry says.
fn check_list(mmu: &Mmu) -> usize {
    let task = mmu.task("check", Role::Observer);
    let listed = mmu.nx_candidates();
    let roots = mmu.valid_roots(&task);
    assert!(roots.len() <= 1);
    let once: BTreeSet<_> = listed.iter().collect();
    assert_eq!(once.len(), listed.len(), "{listed:?}");
    for &(gfn, level) in &listed {
        let walk = mmu.walk_lockless(&task, roots[0], gfn);
        assert!(walk.sptes[level as usize + 1].is_table(level + 1), "{gfn:#x} is listed and not linked");
    }
    listed.len()
}

fn storm(profile: &'static str, zaps: bool) {
    let setup = Setup { profile, force_yield: Some(3), batch: 1, ..Setup::default() };
    let mmu = setup.build();
    mmu.set_nx_huge_pages(true);
    let over = AtomicBool::new(false);
    let (recovered, young) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let guests: Vec<_> = (1..=2)
            .map(|n| {
                let (mmu, others) = (&mmu, [&recovered, &young]);
                scope.spawn(move || guest(mmu, 0x9e37_79b9 * n, others))
            })
            .collect();
        scope.spawn(|| {
            let task = mmu.task("kvm-nx-lpage-re", Role::Worker);
            while !over.load(Ordering::Relaxed) {
                let done = mmu.recover_nx(&task, mmu.nx_splits().div_ceil(4), &|_, gfn| gfn % 1536 == 0);
                recovered.fetch_add(done, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        scope.spawn(|| {
            let task = mmu.task("notifier", Role::Caller);
            let mut dice = Dice(77);
            while !over.load(Ordering::Relaxed) {
                let at = dice.roll(REGIONS) * 512;
                young.fetch_add(u64::from(mmu.age(&task, 0, at..at + 700)), Ordering::Relaxed);
                mmu.write_protect(&task, 0, at..at + 512, 1);
                if zaps && dice.roll(20) == 0 {
                    fast_zap(&mmu, &task);
                }
                thread::yield_now();
            }
        });
        let ends: Vec<_> = guests.into_iter().map(|guest| guest.join()).collect();
        // First: a failed guest must not leave the others running.
        over.store(true, Ordering::Relaxed);
        assert!(ends.iter().all(|end| end.is_ok()), "{profile}: a guest failed");
    });
    assert!(recovered.into_inner() > 0 && young.into_inner() > 0, "{profile}: the others came to nothing");
    if mmu.profile().nx_flag_before_publish {
        assert_eq!(mmu.violations(), Vec::<String>::new(), "{profile}");
    } else {
        // Up to 6.1 the accounting after the link may come too late: told, if it happened.
        assert!(mmu.violations().iter().all(|told| told.contains("bug-history 9, 26")), "{profile}");
    }
    let listed = check_list(&mmu);
    assert_eq!(mmu.nx_splits(), listed as u64, "{profile}");
    let late = !mmu.violations().is_empty();
    let task = mmu.task("caller", Role::Caller);
    fast_zap(&mmu, &task);
    assert_eq!((mmu.nx_candidates(), mmu.nx_splits()), (vec![], 0), "{profile}");
    drop(task);
    if !late {
        end(&mmu);
    }
}

#[test]
fn candidates_stay_linked_under_fire_in_every_kernel() {
    for profile in ["5.18", "6.1", "6.6", "6.9", "6.12", "6.18", "7.2"] {
        storm(profile, false);
    }
}

#[test]
fn candidates_stay_linked_under_fire_and_fast_zaps() {
    for profile in ["6.1", "6.12", "6.18", "7.2"] {
        storm(profile, true);
    }
}
