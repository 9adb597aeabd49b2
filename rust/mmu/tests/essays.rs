//! The same few steps under each design, and numbers that say what its essay says. (For each pair of designs: `pairs/`.)

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::{Cpu, Mmu, Setup, end, fast_zap};
use tdpmmu_mmu::DESIGNS;
use tdpmmu_platform::{Event, Observer, Real, Role, Task};
use tdpmmu_spte::geometry::span;

/// Counts what is told, by the name of what it tells.
#[derive(Default)]
struct Counter(Mutex<BTreeMap<&'static str, u64>>);

impl Counter {
    fn take(&self) -> BTreeMap<&'static str, u64> {
        std::mem::take(&mut self.0.lock().expect("unpoisoned"))
    }
}

impl Observer for Counter {
    fn event(&self, _task: u32, event: &Event) {
        let name = match event {
            Event::SpteChanged { shared: false, .. } => "exclusive changes",
            Event::RootSchedule { .. } => "scheduled",
            _ => return,
        };
        *self.0.lock().expect("unpoisoned").entry(name).or_default() += 1;
    }
}

type Seen = BTreeMap<&'static str, u64>;

struct Bench {
    mmu: Arc<Mmu>,
    cpu: Cpu,
    task: Task<Real>,
    counter: Arc<Counter>,
}

/// Workers held back; 20 leaves in 20 top-level entries; every check yields.
fn bench(design: &'static str) -> Bench {
    let counter = Arc::<Counter>::default();
    let setup = Setup {
        profile: "6.12",
        design,
        force_yield: Some(1),
        observer: Some(counter.clone()),
        passes: Some("root"),
        ..Setup::default()
    };
    let mmu = setup.build();
    let mut cpu = Cpu::new(&mmu);
    for slot in 0..20 {
        cpu.fault(slot * span(4), 1);
    }
    if let Some(queue) = mmu.design().queue() {
        queue.hold();
    }
    counter.take();
    let task = mmu.task("caller", Role::Caller);
    Bench { mmu, cpu, task, counter }
}

fn release(mmu: &Mmu) {
    if let Some(queue) = mmu.design().queue() {
        queue.release();
    }
}

fn waiting(mmu: &Mmu) -> u64 {
    mmu.design().queue().map_or(0, |queue| queue.waiting() as u64)
}

/// A vCPU drops its root, twice.
fn drops(design: &'static str, seen: &mut Seen) {
    let Bench { mmu, mut cpu, task, counter } = bench(design);
    cpu.task.meter().take();
    cpu.drop_root();
    let meter = cpu.task.meter().take();
    seen.insert("drop: leaves left to others", mmu.leaf_pages()[0] as u64);
    seen.insert("drop: it yields", u64::from(meter.yields > 0));
    seen.insert(
        "drop: the root stays valid",
        u64::from(mmu.listed_roots().any(|root| !mmu.is_obsolete(root))),
    );
    cpu.root = mmu.load_root(&cpu.task, &mut cpu.cache, mmu.root_role(false)).expect("room");
    cpu.fault(1, 1);
    cpu.drop_root();
    seen.insert("drop: work items of two lost roots", waiting(&mmu));
    seen.insert("drop: scheduled", counter.take().get("scheduled").copied().unwrap_or(0));
    release(&mmu);
    drop(task);
    finish(&mmu, cpu);
}

/// A fast zap beside a vCPU that keeps its root, as a halted one does; then another.
fn zaps(design: &'static str, seen: &mut Seen) {
    let Bench { mmu, mut cpu, task, counter } = bench(design);
    {
        let mut guard = mmu.lock.write(&task);
        mmu.fast_zap_invalidate(&mut guard);
        seen.insert("zap: items queued by the invalidation", waiting(&mmu));
        seen.insert("zap: it gives roots a reference", u64::from(mmu.refs(cpu.root) > baseline(&mmu)));
        mmu.fast_zap_in_lock(&mut guard);
    }
    seen.insert(
        "zap: done under the exclusive lock",
        u64::from(counter.take().contains_key("exclusive changes")),
    );
    seen.insert("zap: the root stays valid", u64::from(!mmu.is_obsolete(cpu.root)));
    if DESIGNS.iter().any(|d| d.name == design && d.flawed) {
        mmu.fast_zap_finish(&task);
        seen.insert("zap: leaves mapped when it returned", mmu.leaf_pages()[0] as u64);
        release(&mmu);
    } else {
        release(&mmu);
        mmu.fast_zap_finish(&task);
        seen.insert("zap: leaves mapped when it returned", mmu.leaf_pages()[0] as u64);
    }
    seen.insert("zap: the caller wrote entries", u64::from(task.meter().take().entry_writes > 0));
    mmu.design().quiesce();
    fast_zap(&mmu, &task);
    let again = task.meter().take();
    seen.insert("second zap: locks taken", again.acquisitions - again.yields);
    seen.insert("second zap: it walks the halted vCPU's root", u64::from(again.entry_reads > 0));
    cpu.drop_root();
    drop(task);
    finish(&mmu, cpu);
}

/// References of a root that one vCPU holds.
fn baseline(mmu: &Mmu) -> u32 {
    if mmu.ownership().to_string() == "mmu" { 2 } else { 1 }
}

fn finish(mmu: &Arc<Mmu>, cpu: Cpu) {
    cpu.close();
    end(mmu);
}

fn seen_of(design: &'static str) -> Seen {
    let mut seen = Seen::new();
    drops(design, &mut seen);
    zaps(design, &mut seen);
    seen
}

#[test]
fn each_design_is_what_its_essay_says() {
    let of = |design, name| seen_of(design)[name];
    for (design, name, expected) in [
        ("in-place", "zap: done under the exclusive lock", 1),
        ("inline", "zap: done under the exclusive lock", 0),
        ("in-place", "zap: the root stays valid", 1),
        ("in-place", "drop: it yields", 0),
        ("inline", "drop: it yields", 0),
        ("defunct-flag", "drop: it yields", 1),
        ("defunct-flag", "drop: leaves left to others", 0),
        ("defunct-flag", "drop: scheduled", 0),
        ("second-list", "drop: it yields", 1),
        ("second-list", "drop: scheduled", 2),
        ("system-workqueue", "zap: the caller wrote entries", 1),
        ("system-workqueue", "drop: leaves left to others", 20),
        ("no-second-phase", "zap: leaves mapped when it returned", 20),
        ("second-list-worker", "drop: work items of two lost roots", 1),
        ("async-worker", "drop: work items of two lost roots", 2),
        ("async-worker", "zap: leaves mapped when it returned", 0),
        ("async-worker", "zap: the caller wrote entries", 0),
        ("async-worker-owned", "drop: the root stays valid", 1),
        ("async-worker-owned", "zap: it gives roots a reference", 0),
        ("sync", "drop: the root stays valid", 1),
        ("sync", "zap: the caller wrote entries", 1),
        ("sync", "second zap: it walks the halted vCPU's root", 0),
        ("second-list", "second zap: it walks the halted vCPU's root", 1),
    ] {
        assert_eq!(of(design, name), expected, "{design}: {name}");
    }
}

#[test]
fn in_place_pays_its_flush_before_each_yield() {
    let Bench { mmu, mut cpu, task, .. } = bench("in-place");
    fast_zap(&mmu, &task);
    let meter = task.meter().take();
    assert!(meter.yields >= 20 && meter.flushes >= 20, "{} yields, {} flushes", meter.yields, meter.flushes);
    assert_eq!(mmu.leaf_pages(), [0; 3]);
    cpu.drop_root();
    drop(task);
    finish(&mmu, cpu);
}
