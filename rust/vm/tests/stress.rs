//! The protocols under real threads. Bounded by work, not by time; `TDPMMU_STRESS` multiplies it.

#[path = "common/stress.rs"]
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::{Random, rounds};
use tdpmmu_mmu::DESIGNS;
use tdpmmu_platform::{Real, Role as TaskRole, TaskConfig};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::request::{FREE_OBSOLETE_ROOTS, NO_WAKEUP, OUTSIDE_GUEST, WAIT};
use tdpmmu_vm::{
    AccessOutcome, GuestAccess, Progress, Region, SlotFlags, SlotUpdate, VcpuProbe, Vm, VmConfig, VmError,
};

/// Every design that is meant to be right.
fn sound() -> impl Iterator<Item = &'static str> {
    DESIGNS.iter().filter(|design| !design.flawed).map(|design| design.name)
}

const GIG: u64 = 512 * 512;

fn vm(design: &str, profile: &str, vcpus: usize) -> Vm<Real> {
    Vm::new(VmConfig {
        design: Some(design.into()),
        vcpus,
        max_tables: 20_000,
        hugepages: false,
        host_pages: 64 * GIG,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named(profile).expect("known"))
    })
    .expect("a small VM")
}

/// Waits until each of the first `vcpus` vCPUs has entered the guest more than `entries` times.
fn wait_running(vm: &Vm<Real>, vcpus: usize, entries: u64) {
    for id in 0..vcpus {
        while vm.vcpu_state(id).expect("there").mode::<Real>().0 <= entries {
            thread::yield_now();
        }
    }
}

fn assert_clean(vm: &Vm<Real>) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?} {:?}", vm.side().primary.frames().violations());
}

/// A guest that reads and writes at random until stopped. Returns how many accesses of each outcome it made.
fn guest(vm: &Vm<Real>, id: usize, pages: u64, config: TaskConfig) -> [u64; 7] {
    let mut vcpu = vm.vcpu_with(id, config).expect("free");
    let mut random = Random(0x9e37_79b9 + id as u64);
    let mut outcomes = [0; 7];
    loop {
        let access = GuestAccess { gfn: random.below(pages), write: random.below(2) == 0, exec: false };
        let outcome = vcpu.access(access).expect("memory is there, or it is MMIO");
        outcomes[outcome as usize] += 1;
        if outcome == AccessOutcome::Stopped {
            return outcomes;
        }
        if random.below(64) == 0 {
            vcpu.speculate(random.below(pages));
        }
    }
}

#[test]
fn no_guest_touches_a_frame_that_the_host_took_back() {
    for (design, profile) in [("inline", "6.12"), ("async-worker", "6.1"), ("sync", "7.2")] {
        let vm = vm(design, profile, 2);
        let task = vm.task("host", TaskRole::Caller);
        let pages = 4096;
        vm.add_memory(&task, 0, pages, 2).expect("memory");
        thread::scope(|scope| {
            let guests: Vec<_> = (0..2)
                .map(|id| {
                    scope.spawn({
                        let vm = &vm;
                        move || guest(vm, id, pages, TaskConfig::default())
                    })
                })
                .collect();
            wait_running(&vm, 2, 0);
            let mut random = Random(7);
            for _ in 0..rounds(400) {
                // However the threads are scheduled, the guests have something to lose.
                while vm.mmu().leaf_pages().iter().sum::<i64>() < 4 {
                    thread::yield_now();
                }
                let start = random.below(pages);
                let end = (start + 1 + random.below(700)).min(pages);
                vm.unmap_gfns(&task, start..end, random.below(2) == 0).expect("open");
            }
            vm.stop_vcpus(&task);
            let faults: u64 = guests
                .into_iter()
                .map(|guest| guest.join().expect("no panic")[AccessOutcome::SlowFault as usize])
                .sum();
            assert!(faults > 4, "{design}: {faults}");
        });
        let stats = vm.side().primary.frames().stats();
        assert!(stats.released > 0 && stats.violations == 0, "{design} {stats:?}");
        vm.resume();
        assert_clean(&vm);
    }
}

#[test]
fn a_host_that_releases_frames_without_a_notifier_is_found_out() {
    let vm = vm("sync", "6.12", 1);
    let task = vm.task("host", TaskRole::Caller);
    vm.add_memory(&task, 0, 512, 1).expect("memory");
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in 0..4 {
        vcpu.access(GuestAccess::write(gfn)).expect("mapped");
    }
    let hva = vm.slots().find(0, 0).expect("there").hva_of(0);
    vm.side().primary.unmap(hva..hva + 2);
    let frames = vm.side().primary.frames();
    assert_eq!(vcpu.access(GuestAccess::write(2)), Ok(AccessOutcome::TlbHit));
    assert_eq!(frames.stats().violations, 0, "its frame was not released");
    assert_eq!(vcpu.access(GuestAccess::write(1)), Ok(AccessOutcome::TlbHit));
    assert_eq!(frames.stats().violations, 1, "a guest wrote to somebody else's frame");
    drop(vcpu);
    // The zap writes Dirty and Accessed back to both frames, too late for two of four.
    vm.fast_zap(&task).expect("open");
    assert_eq!(frames.stats().violations, 1 + 2 + 2, "{:?}", frames.violations());
    assert!(!vm.close().expect("no handle").is_clean());
}

#[test]
fn after_a_memslot_delete_nothing_of_it_is_mapped_although_guests_keep_faulting() {
    for design in sound() {
        let vm = vm(design, "6.12", 2);
        let task = vm.task("vmm", TaskRole::Caller);
        let pages = 2048;
        let hva = vm.side().primary.region(pages, 0, 1, true).expect("room");
        let region = Region { id: 0, as_id: 0, base: 0, pages, hva, flags: SlotFlags::default() };
        thread::scope(|scope| {
            for id in 0..2 {
                let vm = &vm;
                scope.spawn(move || guest(vm, id, pages, TaskConfig::default()));
            }
            for _ in 0..rounds(60) {
                assert_eq!(vm.set_memslot(&task, &region), Ok(SlotUpdate::Created));
                // Let some faults in, however the threads are scheduled.
                while vm.mmu().leaf_pages()[0] < 20 {
                    thread::yield_now();
                }
                vm.delete_memslot(&task, 0, 0).expect("there");
                assert_eq!(vm.mmu().leaf_pages(), [0, 0, 0], "{design}: P-FZ");
            }
            vm.stop_vcpus(&task);
        });
        assert_eq!(vm.side().primary.frames().stats().violations, 0);
        vm.resume();
        assert_clean(&vm);
    }
}

#[test]
fn fast_zaps_notifiers_and_root_drops_at_once_leak_nothing_even_when_every_check_yields() {
    for design in sound() {
        let vm = vm(design, "6.12", 3);
        let yielding = || TaskConfig { force_yield: Some(1), ..TaskConfig::default() };
        let task = vm.task_with("vmm", TaskRole::Caller, yielding());
        let pages = 3 * 512;
        vm.add_memory(&task, 0, pages, 2).expect("memory");
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (vm, stop) = (&vm, &stop);
            for id in 0..2 {
                scope.spawn(move || guest(vm, id, pages, yielding()));
            }
            scope.spawn(move || {
                let mut vcpu = vm.vcpu(2).expect("free");
                let mut random = Random(3);
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..50 {
                        vcpu.access(GuestAccess::write(random.below(pages))).expect("memory");
                    }
                    vcpu.drop_root().expect("a page");
                }
            });
            scope.spawn(move || {
                let task = vm.task_with("host", TaskRole::Caller, yielding());
                let mut random = Random(5);
                while !stop.load(Ordering::Relaxed) {
                    let start = random.below(pages - 8);
                    vm.unmap_gfns(&task, start..start + 8, true).expect("open");
                }
            });
            wait_running(vm, 3, 0);
            for _ in 0..rounds(40) {
                let times = vm.fast_zap(&task).expect("open");
                assert!(times.total_ns >= times.lock_wait_ns + times.exclusive_hold_ns);
            }
            stop.store(true, Ordering::Relaxed);
            vm.stop_vcpus(&task);
        });
        vm.resume();
        assert_clean(&vm);
    }
}

#[test]
fn a_request_that_waits_returns_only_after_the_guest_entry_it_found_has_ended() {
    let vm = vm("sync", "6.12", 1);
    let task = vm.task("setup", TaskRole::Caller);
    vm.add_memory(&task, 0, 512, 1).expect("memory");
    let (entered, is_in) = mpsc::channel();
    let (leave, may_leave) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let vm = &vm;
        scope.spawn(move || {
            let mut vcpu = vm.vcpu(0).expect("free");
            vcpu.access(GuestAccess::read(1)).expect("mapped");
            entered.send(()).expect("main waits");
            // In the guest, and not polling: a host-preempted vCPU thread.
            may_leave.recv().expect("main sends");
            vcpu.poll().expect("a page");
            entered.send(()).expect("main waits");
        });
        is_in.recv().expect("the vCPU sends");
        let before = vm.vcpu_state(0).expect("there").mode::<Real>();
        assert_eq!(before.1, tdpmmu_vm::request::IN_GUEST);
        let (returned, has_returned) = mpsc::channel();
        scope.spawn(move || {
            let task = vm.task("kicker", TaskRole::Caller);
            let kicks = vm.side().request_all(&task, OUTSIDE_GUEST | WAIT | NO_WAKEUP);
            returned.send(kicks).expect("main waits");
        });
        let early = has_returned.recv_timeout(Duration::from_millis(50));
        assert!(early.is_err(), "the vCPU is still in the guest: {early:?}");
        leave.send(()).expect("the vCPU waits");
        assert_eq!(has_returned.recv().expect("the kicker sends").kicked, 1);
        is_in.recv().expect("the vCPU sends");
        assert!(vm.vcpu_state(0).expect("there").mode::<Real>().0 > before.0, "it went in again");
    });
    assert_clean(&vm);
}

#[test]
fn a_halted_vcpu_is_neither_waited_for_nor_woken_and_reloads_before_it_runs_again() {
    let vm = vm("sync", "6.12", 1);
    let task = vm.task("vmm", TaskRole::Caller);
    vm.add_memory(&task, 0, 512, 1).expect("memory");
    thread::scope(|scope| {
        let vm = &vm;
        let (sender, outcome) = mpsc::channel();
        scope.spawn(move || {
            let mut vcpu = vm.vcpu(0).expect("free");
            vcpu.access(GuestAccess::read(1)).expect("mapped");
            let root = vcpu.current_root();
            assert!(vcpu.halt(None));
            let outcome = vcpu.access(GuestAccess::read(1)).expect("mapped again");
            sender.send((root, vcpu.current_root(), outcome)).expect("main waits");
        });
        let state = vm.vcpu_state(0).expect("there");
        while !state.halted() {
            thread::yield_now();
        }
        vm.fast_zap(&task).expect("returns although the vCPU never services the request");
        assert!(state.halted() && state.is_requested::<Real>(FREE_OBSOLETE_ROOTS));
        vm.wake(0);
        let (old, new, outcome) = outcome.recv().expect("the vCPU sends");
        assert_ne!(old, new, "the old root was obsolete, and its page still held");
        assert_eq!(outcome, AccessOutcome::SlowFault);
    });
    assert_clean(&vm);
}

#[test]
fn racing_faults_populate_each_page_once() {
    let vm = vm("sync", "6.12", 3);
    let task = vm.task("test", TaskRole::Caller);
    let pages = 8 * 512;
    vm.add_memory(&task, 0, pages, 1).expect("memory");
    let (fixed, meters) = vm.populate_by_faults(0..3, 0..pages, true, &Progress::default()).expect("room");
    assert!(fixed >= pages, "a fault that lost a race may re-make the winner's leaf: {fixed}");
    assert_eq!(vm.mmu().leaf_pages(), [pages as i64, 0, 0]);
    assert_eq!(meters.len(), 3);
    let cancelled = Progress::default();
    cancelled.cancel.store(true, Ordering::Relaxed);
    let error = vm.populate_by_faults(0..3, 0..pages, true, &cancelled).expect_err("cancelled");
    assert_eq!(error, VmError::Cancelled);
    assert_clean(&vm);
}

#[test]
fn every_write_reaches_the_dirty_log() {
    let vm = vm("sync", "6.12", 1);
    let task = vm.task("vmm", TaskRole::Caller);
    let pages = 300;
    let hva = vm.side().primary.region(pages, 0, 1, true).expect("room");
    let flags = SlotFlags { log_dirty: true, readonly: false };
    vm.set_memslot(&task, &Region { id: 0, as_id: 0, base: 0, pages, hva, flags }).expect("room");
    // Per gfn: the round in which the guest last wrote it, and the last round that reported it.
    let (round, writes) = (AtomicU64::new(1), AtomicU64::new(0));
    thread::scope(|scope| {
        let (vm, round, writes) = (&vm, &round, &writes);
        let writer = scope.spawn(move || {
            let mut vcpu = vm.vcpu(0).expect("free");
            let mut random = Random(11);
            let mut written = vec![0; pages as usize];
            loop {
                let gfn = random.below(pages);
                let now = round.load(Ordering::SeqCst);
                if vcpu.access(GuestAccess::write(gfn)).expect("memory") == AccessOutcome::Stopped {
                    return written;
                }
                written[gfn as usize] = now;
                writes.fetch_add(1, Ordering::SeqCst);
            }
        });
        let mut reported = vec![0; pages as usize];
        let collect = |reported: &mut Vec<u64>, as_of: u64| {
            for gfn in vm.take_dirty_log(&task, 0, 0).expect("logs") {
                reported[gfn as usize] = as_of;
            }
        };
        wait_running(vm, 1, 0);
        for n in 1..=rounds(60) {
            collect(&mut reported, n);
            // A write stamped n + 1 began after this, hence after collection n.
            round.store(n + 1, Ordering::SeqCst);
            let before = writes.load(Ordering::SeqCst);
            while writes.load(Ordering::SeqCst) < before + 10 {
                thread::yield_now();
            }
        }
        let rounds_seen = reported.iter().max().copied();
        assert!(rounds_seen > Some(1), "the log was read while the guest wrote: {rounds_seen:?}");
        vm.stop_vcpus(&task);
        let written = writer.join().expect("no panic");
        collect(&mut reported, u64::MAX);
        for (gfn, (&written, &reported)) in written.iter().zip(&reported).enumerate() {
            assert!(
                reported >= written,
                "gfn {gfn}: written in round {written}, last reported in {reported}"
            );
        }
    });
    vm.resume();
    assert_clean(&vm);
}

#[derive(Default)]
struct Stamps {
    blocks: u64,
    faults: u64,
}

struct Probe(std::sync::Arc<std::sync::Mutex<Stamps>>);

impl VcpuProbe for Probe {
    fn reentered(&mut self, bits: u64, seen_at: u64, entered_at: u64) {
        assert!(entered_at >= seen_at);
        if bits & FREE_OBSOLETE_ROOTS != 0 {
            self.0.lock().expect("unpoisoned").blocks += 1;
        }
    }

    fn slow_fault(&mut self, _root: u32, loaded_at: u64, began: u64, ended: u64) {
        assert!(loaded_at <= began && began <= ended);
        self.0.lock().expect("unpoisoned").faults += 1;
    }
}

#[test]
fn a_probe_sees_each_block_and_the_first_fault_after_it() {
    let vm = vm("sync", "6.12", 1);
    let task = vm.task("vmm", TaskRole::Caller);
    vm.add_memory(&task, 0, 512, 1).expect("memory");
    let stamps = std::sync::Arc::<std::sync::Mutex<Stamps>>::default();
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_probe(Some(Box::new(Probe(stamps.clone()))));
    vcpu.access(GuestAccess::read(1)).expect("mapped");
    for _ in 0..3 {
        vcpu.leave();
        vm.fast_zap(&task).expect("open");
        vcpu.access(GuestAccess::read(1)).expect("mapped");
    }
    let stamps = stamps.lock().expect("unpoisoned");
    assert_eq!((stamps.blocks, stamps.faults), (3, 4));
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn closing_waits_for_what_is_under_way_and_nothing_begins_after_it() {
    for design in sound() {
        for _ in 0..rounds(40) {
            let vm = vm(design, "6.12", 1);
            let task = vm.task("test", TaskRole::Caller);
            vm.add_memory(&task, 0, GIG, 1).expect("memory");
            {
                let mut vcpu = vm.vcpu(0).expect("free");
                for gfn in 0..600 {
                    vcpu.access(GuestAccess::write(gfn * 7)).expect("memory");
                }
            }
            let begun = AtomicU64::new(0);
            let until_closed = |operation: &dyn Fn() -> Result<(), VmError>| {
                loop {
                    match operation() {
                        Ok(()) => begun.fetch_add(1, Ordering::Relaxed),
                        Err(VmError::Closed) => break,
                        Err(other) => panic!("{other}"),
                    };
                }
            };
            let report = thread::scope(|scope| {
                scope.spawn(|| {
                    let task = vm.task("zapper", TaskRole::Caller);
                    until_closed(&|| vm.fast_zap(&task).map(drop));
                });
                scope.spawn(|| {
                    let task = vm.task("host", TaskRole::Caller);
                    until_closed(&|| vm.unmap_gfns(&task, 0..700, true).map(drop));
                });
                scope.spawn(|| {
                    until_closed(&|| match vm.vcpu(0) {
                        Ok(mut vcpu) => vcpu.access(GuestAccess::write(3)).map(drop),
                        Err(VmError::Busy { .. }) => Ok(()),
                        Err(other) => Err(other),
                    });
                });
                while begun.load(Ordering::Relaxed) < 20 {
                    thread::yield_now();
                }
                loop {
                    match vm.close() {
                        Ok(report) => break report,
                        Err(VmError::Busy { .. }) => thread::yield_now(),
                        Err(other) => panic!("{other}"),
                    }
                }
            });
            assert!(report.is_clean(), "{design}: {report:?}");
            assert_eq!(vm.mmu().pool().stats().taken, 0, "{design}: something ran on the closed VM");
            assert_eq!(vm.mmu().violations(), Vec::<String>::new(), "{design}");
        }
    }
}
