//! Yields as an input: every walk gives mmu_lock up where its pace says so and nowhere else, goes on at the entry it stood on, and ends with the
//! same tables, whatever the pace.

mod common;
#[path = "common/heard.rs"]
mod heard;

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use common::{Cpu, Setup};
use heard::{Ear, Heard};
use tdpmmu_mmu::{FlushDebt, MapOutcome, TdpMmu};
use tdpmmu_platform::{Event, Observer, Pace, Real, Role, Task, TaskConfig, YieldPoint};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::span;

type Mmu = TdpMmu<Real>;

const PROFILES: [&str; 6] = ["5.18", "6.1", "6.6", "6.12", "6.18", "7.2"];

/// Yields where `wanted` says so, and notes what it was asked and told.
struct Says<F> {
    wanted: F,
    asked: Mutex<Vec<YieldPoint>>,
    yielded: Mutex<Vec<YieldPoint>>,
    unlocked: Mutex<usize>,
}

impl<F: Fn(YieldPoint) -> bool + Send + Sync + 'static> Says<F> {
    fn new(wanted: F) -> Arc<Self> {
        Arc::new(Self {
            wanted,
            asked: Mutex::default(),
            yielded: Mutex::default(),
            unlocked: Mutex::default(),
        })
    }

    fn asked(&self) -> Vec<YieldPoint> {
        self.asked.lock().expect("unpoisoned").clone()
    }

    fn yielded(&self) -> Vec<YieldPoint> {
        self.yielded.lock().expect("unpoisoned").clone()
    }

    fn unlocked_times(&self) -> usize {
        *self.unlocked.lock().expect("unpoisoned")
    }
}

impl<F: Fn(YieldPoint) -> bool + Send + Sync> Pace for Says<F> {
    fn wants_yield(&self, _task: u32, at: YieldPoint) -> bool {
        self.asked.lock().expect("unpoisoned").push(at);
        let wanted = (self.wanted)(at);
        if wanted {
            self.yielded.lock().expect("unpoisoned").push(at);
        }
        wanted
    }

    fn unlocked(&self, _task: u32) {
        *self.unlocked.lock().expect("unpoisoned") += 1;
    }
}

fn paced(mmu: &Mmu, pace: Arc<dyn Pace>) -> Task<Real> {
    let config = TaskConfig { pace: Some(pace), force_yield: Some(1), ..TaskConfig::default() };
    Task::new(mmu.rcu(), "paced", Role::Caller, config)
}

fn of(profile: &'static str, batch: u16) -> (Arc<Mmu>, Arc<Ear>) {
    let ear = Ear::new();
    let setup = Setup { profile, batch, observer: Some(ear.clone()), ..Setup::default() };
    (setup.build_on::<Real>(ear.clone()).expect("a small pool"), ear)
}

fn map(cpu: &mut Cpu, gfns: impl IntoIterator<Item = u64>, level: u8) {
    for gfn in gfns {
        let outcome = cpu.fault(gfn, level);
        assert!(matches!(outcome, MapOutcome::Fixed { .. }), "gfn {gfn:#x}: {outcome:?}");
    }
}

/// Small leaves dense and sparse, huge leaves, a whole gibibyte and far top-level entries.
fn populated(mmu: &Arc<Mmu>) -> Cpu {
    let mut cpu = Cpu::new(mmu);
    map(&mut cpu, (0..20).chain(500..530).chain([1000, 1023]), 1);
    map(&mut cpu, [1024, 2048], 2);
    map(&mut cpu, [span(3)], 3);
    map(&mut cpu, [2 * span(3) + 5, span(4) + 9], 1);
    cpu
}

fn leaves(cpu: &Cpu) -> Vec<(u64, u8, Spte)> {
    let mut found = Vec::new();
    let all = 0..cpu.mmu.max_gfn();
    cpu.mmu.leaves(&cpu.task, cpu.root, all, &mut |gfn, level, spte| found.push((gfn, level, spte)));
    found
}

fn close(mut cpu: Cpu, mmu: &Arc<Mmu>) {
    cpu.drop_root();
    cpu.close();
    let task = mmu.task("caller", Role::Caller);
    common::fast_zap(mmu, &task);
    drop(task);
    common::end(mmu);
}

/// Every operation that walks and may yield.
#[derive(Clone, Copy, Debug)]
enum Walks {
    Unmap,
    ZapRange,
    WriteProtect,
    ClearDirty,
    Split,
    SplitExclusive,
    Collapse,
    FastZap,
    ZapAll,
}

const WALKS: [Walks; 9] = [
    Walks::Unmap,
    Walks::ZapRange,
    Walks::WriteProtect,
    Walks::ClearDirty,
    Walks::Split,
    Walks::SplitExclusive,
    Walks::Collapse,
    Walks::FastZap,
    Walks::ZapAll,
];

impl Walks {
    /// Runs it on the whole tree, or the part that is worth it. Returns what it counts.
    fn run(self, mmu: &Mmu, task: &Task<Real>) -> u64 {
        let all = 0..2 * span(4);
        let pay = |mut debt: FlushDebt| {
            let owed = debt.is_owed();
            mmu.pay(task, &mut debt);
            u64::from(owed)
        };
        match self {
            Walks::Unmap => {
                let mut guard = mmu.lock.write(task);
                pay(mmu.unmap(&mut guard, 0, 7..3000, true))
            }
            Walks::ZapRange => {
                let mut guard = mmu.lock.write(task);
                pay(mmu.zap_gfn_range(&mut guard, 7..3000))
            }
            Walks::WriteProtect => mmu.write_protect(task, 0, all, 1),
            Walks::ClearDirty => mmu.clear_dirty(task, 0, all),
            // 1 GiB to 2 MiB, and the first of these to 4 KiB.
            Walks::Split => {
                mmu.split_huge_pages(task, 0, all, 2).expect("tables")
                    + mmu.split_huge_pages(task, 0, 0..span(3) + 1, 1).expect("tables")
            }
            Walks::SplitExclusive => {
                let mut guard = mmu.lock.write(task);
                mmu.split_huge_pages_exclusive(&mut guard, 0, 0..span(3) + 1, 1).expect("tables")
            }
            Walks::Collapse => mmu.collapse(task, 0, all, &|gfn| if gfn < span(3) { 2 } else { 1 }),
            Walks::FastZap => {
                common::fast_zap(mmu, task);
                0
            }
            Walks::ZapAll => {
                mmu.zap_all(&mut mmu.lock.write(task));
                0
            }
        }
    }
}

/// What became of the tree, and what was told on the way without the flushes (a yield pays early).
#[derive(Debug, PartialEq)]
struct Outcome {
    leaves: Vec<(u64, u8, Spte)>,
    pages: [i64; 3],
    told: Vec<Heard>,
}

/// Runs one walk under a pace. The flush owed at the end is part of the count, so it may differ: the count is returned beside.
fn run(profile: &'static str, batch: u16, walks: Walks, pace: Arc<dyn Pace>) -> (Outcome, u64) {
    let (mmu, ear) = of(profile, batch);
    let cpu = populated(&mmu);
    let task = paced(&mmu, pace);
    ear.take();
    let count = walks.run(&mmu, &task);
    let told = ear.take().into_iter().filter(|h| matches!(h, Heard::Spte(..))).collect();
    let outcome = Outcome { leaves: leaves(&cpu), pages: mmu.leaf_pages(), told };
    drop(task);
    close(cpu, &mmu);
    (outcome, count)
}

#[test]
fn a_pace_that_never_yields_is_never_overruled_and_one_that_always_does_changes_nothing() {
    for profile in PROFILES {
        for batch in [1, 7, 512] {
            for walks in WALKS {
                let (never, always) = (Says::new(|_| false), Says::new(|_| true));
                let (calm, calm_count) = run(profile, batch, walks, never.clone());
                let (jumpy, jumpy_count) = run(profile, batch, walks, always.clone());
                let name = format!("{profile}, batch {batch}, {walks:?}");
                assert!(!calm.told.is_empty(), "{name}: it did something");
                assert_eq!(jumpy, calm, "{name}: the same entries in the same order");
                if !matches!(walks, Walks::Unmap | Walks::ZapRange) {
                    assert_eq!(jumpy_count, calm_count, "{name}");
                }
                let yielded = always.yielded();
                let allocated = match (walks, profile) {
                    (Walks::Split, "6.12" | "6.18" | "7.2") => 1 + 3,
                    (Walks::SplitExclusive, "6.12" | "6.18" | "7.2") => 3 + 1,
                    _ => 0,
                };
                assert_eq!(never.unlocked_times(), allocated, "{name}: neither contention nor the tick");
                assert!(yielded.len() > 2, "{name}: {yielded:?}");
                assert_eq!(always.unlocked_times(), yielded.len() + allocated, "{name}: once a yield");
            }
        }
    }
}

#[test]
fn a_walk_is_asked_once_for_each_gfn_that_it_reaches() {
    for profile in PROFILES {
        for walks in [Walks::WriteProtect, Walks::Unmap, Walks::Split, Walks::Collapse] {
            let always = Says::new(|_| true);
            run(profile, 1, walks, always.clone());
            let asked = always.asked();
            // Two ranges in `Split`: each goes forward by itself.
            let steps = asked.windows(2).filter(|pair| pair[1].gfn <= pair[0].gfn).count();
            let walks_made = if matches!(walks, Walks::Split) { 2 } else { 1 };
            assert!(steps < walks_made, "{profile} {walks:?}: a yield, then progress: {asked:x?}");
        }
    }
}

#[test]
fn the_pace_is_told_where_the_walk_stands() {
    let (mmu, _ear) = of("6.12", 1);
    let mut cpu = Cpu::new(&mmu);
    map(&mut cpu, 0..4, 1);
    let (root, pace) = (cpu.root, Says::new(|at| at.gfn == 2));
    let task = paced(&mmu, pace.clone());
    assert_eq!(mmu.write_protect(&task, 0, 1..4, 1), 3);
    let at = |gfn, level| YieldPoint { root, gfn, level };
    assert_eq!(pace.yielded(), [at(2, 1)]);
    // The upper entries on the way to gfn 1 are no progress, nor are those on the way back to 2, nor 2 itself a second time.
    assert_eq!(pace.asked(), [at(2, 1), at(3, 1)]);
    drop(task);
    close(cpu, &mmu);
}

#[test]
fn only_present_leaves_are_checks_of_a_slot_wide_clearing() {
    for profile in ["6.1", "6.12", "7.2"] {
        let (mmu, _ear) = of(profile, 1);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [3, 9], 1);
        let never = Says::new(|_| false);
        let task = paced(&mmu, never.clone());
        mmu.clear_dirty(&task, 0, 0..512);
        let gfns: Vec<_> = never.asked().iter().map(|at| (at.gfn, at.level)).collect();
        assert_eq!(gfns, [(3, 1), (9, 1)], "{profile}: an empty stretch has no check (section 24)");
        drop(task);
        let every = Says::new(|_| false);
        let task = paced(&mmu, every.clone());
        mmu.write_protect(&task, 0, 0..512, 1);
        assert_eq!(
            every.asked().len(),
            511,
            "{profile}: write protection checks at each entry but the first"
        );
        drop(task);
        close(cpu, &mmu);
    }
}

/// Yields at one gfn, and waits there until another thread has had the lock.
struct HandsOver {
    gfn: u64,
    begin: Mutex<Sender<()>>,
    end: Mutex<Receiver<()>>,
}

impl Pace for HandsOver {
    fn wants_yield(&self, _task: u32, at: YieldPoint) -> bool {
        at.gfn == self.gfn
    }

    fn unlocked(&self, _task: u32) {
        self.begin.lock().expect("unpoisoned").send(()).expect("somebody waits");
        self.end.lock().expect("unpoisoned").recv().expect("it is done");
    }
}

/// Runs `walk` with one yield at `gfn`, in which another thread runs `meanwhile`.
fn with_a_gap(
    mmu: &Arc<Mmu>,
    gfn: u64,
    walk: impl FnOnce(&Task<Real>) + Send,
    meanwhile: impl FnOnce(&Task<Real>) + Send,
) {
    let ((begin, began), (end, ended)) = (channel(), channel());
    let pace = Arc::new(HandsOver { gfn, begin: Mutex::new(begin), end: Mutex::new(ended) });
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let task = mmu.task("meanwhile", Role::Caller);
            began.recv().expect("the walk comes to its yield");
            meanwhile(&task);
            end.send(()).expect("the walk waits");
        });
        scope.spawn(move || {
            let task = paced(mmu, pace);
            walk(&task);
        });
    });
}

#[test]
fn what_is_done_while_the_lock_is_given_up_is_seen_at_the_entry_where_the_walk_stood() {
    for profile in PROFILES {
        // The leaf at the yield goes; one behind the walk comes back with W; one ahead appears.
        let (mmu, ear) = of(profile, 1);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [10, 20, 30], 1);
        let (root, other) = (cpu.root, Mutex::new(Some(cpu)));
        ear.take();
        with_a_gap(
            &mmu,
            20,
            |task| assert_eq!(mmu.write_protect(task, 0, 0..512, 1), 3, "{profile}: 10, 25 and 30"),
            |task| {
                {
                    let mut guard = mmu.lock.write(task);
                    let mut debt = mmu.unmap(&mut guard, 0, 20..21, true);
                    mmu.pay(task, &mut debt);
                }
                mmu.fast_page_fault(task, root, 0, 10, true, false, false);
                let mut cpu = other.lock().expect("unpoisoned").take().expect("a vCPU");
                map(&mut cpu, [25], 1);
                *other.lock().expect("unpoisoned") = Some(cpu);
            },
        );
        let cpu = other.into_inner().expect("unpoisoned").expect("a vCPU");
        let writable: Vec<_> =
            leaves(&cpu).iter().map(|&(gfn, _, spte)| (gfn, mmu.format().is_writable(spte))).collect();
        assert_eq!(writable, [(10, true), (25, false), (30, false)], "{profile}");
        close(cpu, &mmu);
    }
}

#[test]
fn a_table_that_goes_while_the_lock_is_given_up_is_not_walked_into() {
    for profile in PROFILES {
        let (mmu, _ear) = of(profile, 1);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, 0..512, 1);
        map(&mut cpu, [600], 1);
        let other = Mutex::new(Some(cpu));
        with_a_gap(
            &mmu,
            100,
            // The second half is under the huge leaf by then: it is met as a whole, and loses D once.
            |task| assert_eq!(mmu.clear_dirty(task, 0, 0..1024), 100 + 1 + 1, "{profile}"),
            |_task| {
                let mut cpu = other.lock().expect("unpoisoned").take().expect("a vCPU");
                map(&mut cpu, [0], 2);
                *other.lock().expect("unpoisoned") = Some(cpu);
            },
        );
        let cpu = other.into_inner().expect("unpoisoned").expect("a vCPU");
        let places: BTreeSet<_> = leaves(&cpu).iter().map(|&(gfn, level, _)| (gfn, level)).collect();
        assert_eq!(places, BTreeSet::from([(0, 2), (600, 1)]), "{profile}");
        close(cpu, &mmu);
    }
}

/// Releases of mmu_lock by one task, and those with a flush owed.
#[derive(Default)]
struct Releases(Mutex<(usize, usize)>);

impl Observer for Releases {
    fn event(&self, _task: u32, event: &Event) {
        if let Event::Unlock { debt, .. } = event {
            let mut seen = self.0.lock().expect("unpoisoned");
            *seen = (seen.0 + 1, seen.1 + usize::from(*debt));
        }
    }
}

#[test]
fn no_walk_gives_the_lock_up_with_a_flush_owed() {
    for profile in PROFILES {
        for walks in WALKS {
            let (mmu, _ear) = of(profile, 1);
            let cpu = populated(&mmu);
            let releases = Arc::new(Releases::default());
            let config = TaskConfig { pace: Some(Says::new(|_| true)), ..TaskConfig::default() };
            let task = Task::with_observer(mmu.rcu(), "paced", Role::Caller, config, Some(releases.clone()));
            walks.run(&mmu, &task);
            let (all, owing) = *releases.0.lock().expect("unpoisoned");
            assert!(all > 5 && owing == 0, "{profile} {walks:?}: {owing} of {all}");
            drop(task);
            close(cpu, &mmu);
        }
    }
}
