//! Dirty logging under guests that never stop writing, by every protocol (O-DIRTY), and aging under guests that never stop touching. Bounded by work, not by time;
//! `TDPMMU_STRESS` multiplies it.

#[path = "common/stress.rs"]
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Random, rounds};
use tdpmmu_platform::{Real, Role as TaskRole, Task, TaskConfig};
use tdpmmu_spte::{Format, FormatKind, KernelProfile};
use tdpmmu_vm::{AccessOutcome, DirtyMode, GuestAccess, Region, SlotFlags, Vm, VmConfig, VmError};

const PAGES: u64 = 3 * 512;

/// Where main is: collections that have returned (the first: logging was turned on), and collections that were called.
#[derive(Default)]
struct Clock {
    returned: AtomicU64,
    called: AtomicU64,
    writes: AtomicU64,
}

/// Does vCPU `id` alone write this page?
fn is_own(gfn: u64, id: usize) -> bool {
    gfn % 4 == id as u64
}

/// Writes until stopped; per gfn a bit for each collection that owes it: the write began after the one before it had returned and ended before it was called. A page that
/// nobody else writes is reported by that very one. One that others write, too, by that or a later one: another vCPU's fast fault may have set W, which let this write
/// through, and be preempted before it marks the page (so in KVM, too).
fn writer(vm: &Vm<Real>, id: usize, clock: &Clock) -> Vec<u64> {
    let mut vcpu = vm.vcpu(id).expect("free");
    let mut random = Random(11 + id as u64);
    let mut owed = vec![0; PAGES as usize];
    loop {
        let gfn = random.below(PAGES);
        if is_own(gfn, 1 - id) {
            continue;
        }
        let returned = clock.returned.load(Ordering::SeqCst);
        match vcpu.access(GuestAccess::write(gfn)) {
            Ok(AccessOutcome::Stopped) => return owed,
            Ok(_) => {}
            // The exit that asks for a harvest. The write is not made, and who waits for writes must not wait for it.
            Err(VmError::RingFull { .. }) => {
                clock.writes.fetch_add(1, Ordering::SeqCst);
                thread::yield_now();
                continue;
            }
            Err(error) => panic!("{error}"),
        }
        if clock.called.load(Ordering::SeqCst) == returned && returned != 0 {
            owed[gfn as usize] |= 1 << returned;
        }
        clock.writes.fetch_add(1, Ordering::SeqCst);
    }
}

/// How the log is kept and taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Get,
    /// Manual protection, cleared in pieces of so many pages.
    Clear {
        all_set: bool,
        pages: u64,
    },
    Ring,
}

impl Protocol {
    /// Takes the log: the gfns reported.
    fn harvest(self, vm: &Vm<Real>, task: &Task<Real>) -> Vec<u64> {
        match self {
            Protocol::Get => vm.take_dirty_log(task, 0, 0).expect("logs"),
            Protocol::Clear { pages, .. } => {
                let log = vm.get_dirty_log(task, 0, 0).expect("logs");
                for (n, words) in log.words.chunks(pages as usize / 64).enumerate() {
                    let (first, len) = (n as u64 * pages, words.len() as u64 * 64);
                    vm.clear_dirty_log(task, 0, 0, first, len, words).expect("inside the slot");
                }
                log.gfns().collect()
            }
            Protocol::Ring => {
                let rings = (0..2).flat_map(|vcpu| vm.dirty_ring(vcpu).expect("rings"));
                let gfns = rings.map(|entry| entry.offset).collect();
                vm.reset_dirty_rings(task).expect("rings");
                gfns
            }
        }
    }
}

fn log_under_fire(profile: &str, design: &str, force_yield: Option<u32>) {
    fire(profile, design, force_yield, Protocol::Get, DirtyMode::WriteProtect, true);
}

fn fire(
    profile: &str,
    design: &str,
    force_yield: Option<u32>,
    protocol: Protocol,
    dirty_mode: DirtyMode,
    eager_page_split: bool,
) {
    let kernel = KernelProfile::named(profile).expect("known");
    let vm = Vm::<Real>::new(VmConfig {
        design: Some(design.into()),
        vcpus: 2,
        max_tables: 2_000,
        hugepages: false,
        host_pages: 1 << 22,
        check_frames: true,
        task: TaskConfig { force_yield, ..TaskConfig::default() },
        dirty_mode,
        eager_page_split,
        // 320 of 1024 stay for the guests where hardware logs too.
        dirty_ring: (protocol == Protocol::Ring).then_some(1024),
        ..VmConfig::new(kernel)
    })
    .expect("a small VM");
    let task = vm.task("vmm", TaskRole::Caller);
    if let Protocol::Clear { all_set, .. } = protocol {
        vm.enable_dirty_log_protect(&task, true, all_set).expect("both or manual alone");
    }
    let hva = vm.side().primary.region(PAGES, 0, 2, true).expect("room");
    let plain = Region { id: 0, as_id: 0, base: 0, pages: PAGES, hva, flags: SlotFlags::default() };
    vm.set_memslot(&task, &plain).expect("room");
    let clock = Clock::default();
    let mut reported = vec![0u64; PAGES as usize];
    let owed = thread::scope(|scope| {
        let (vm, clock) = (&vm, &clock);
        let guests: Vec<_> = (0..2).map(|id| scope.spawn(move || writer(vm, id, clock))).collect();
        let progress = |n: u64| {
            let until = clock.writes.load(Ordering::SeqCst) + n;
            while clock.writes.load(Ordering::SeqCst) < until {
                thread::yield_now();
            }
        };
        progress(50);
        let flags = SlotFlags { log_dirty: true, readonly: false };
        clock.called.store(1, Ordering::SeqCst);
        vm.set_memslot(&task, &Region { flags, ..plain }).expect("flags");
        for n in 1..=12 {
            clock.returned.store(n, Ordering::SeqCst);
            progress(20);
            clock.called.store(n + 1, Ordering::SeqCst);
            for gfn in protocol.harvest(vm, &task) {
                reported[gfn as usize] |= 1u64 << n;
            }
        }
        vm.stop_vcpus(&task);
        let owed = guests.into_iter().map(|guest| guest.join().expect("no panic")).collect::<Vec<_>>();
        for gfn in protocol.harvest(vm, &task) {
            reported[gfn as usize] |= 1u64 << 13;
        }
        owed
    });
    assert!(
        owed.iter().flatten().any(|&rounds| rounds != 0),
        "{profile}: no write fell between two collections"
    );
    for (id, owed) in owed.into_iter().enumerate() {
        for (gfn, (owed, &reported)) in (0..).zip(owed.iter().zip(&reported)) {
            // Bit n: reported by collection n, or, of a shared page, by n or a later one.
            let until_last = u64::MAX.checked_shr(reported.leading_zeros()).unwrap_or(0);
            let missed = owed & !if is_own(gfn, id) { reported } else { until_last };
            assert_eq!(
                missed, 0,
                "{profile} {protocol:?} {dirty_mode:?}: gfn {gfn} was written and not reported in these collections"
            );
        }
    }
    vm.resume();
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{profile}: {report:?}");
}

#[test]
fn a_write_that_begins_after_logging_was_turned_on_is_never_missed() {
    for (profile, design) in
        [("5.15", "inline"), ("5.18", "async-worker"), ("6.1", "sync"), ("6.12", "sync"), ("7.2", "sync")]
    {
        for force_yield in [None, Some(1)] {
            for _ in 0..rounds(2) {
                log_under_fire(profile, design, force_yield);
            }
        }
    }
}

#[test]
fn no_write_is_lost_by_any_protocol_whatever_tells_dirty_pages() {
    use DirtyMode::{DBits, WriteProtect};
    let protocols = [
        Protocol::Get,
        Protocol::Clear { all_set: false, pages: PAGES },
        Protocol::Clear { all_set: true, pages: 64 },
        Protocol::Ring,
    ];
    for _ in 0..rounds(1) {
        for profile in ["6.1", "6.12", "7.2"] {
            for protocol in protocols {
                for (mode, eager) in
                    [(WriteProtect, true), (WriteProtect, false), (DBits, true), (DBits, false)]
                {
                    fire(profile, "sync", eager.then_some(1), protocol, mode, eager);
                }
            }
        }
    }
}

/// Accesses until stopped; returns how many.
fn toucher(vm: &Vm<Real>, id: usize) -> u64 {
    let mut vcpu = vm.vcpu(id).expect("free");
    let mut random = Random(77 + id as u64);
    for n in 0.. {
        let (gfn, write) = (random.below(PAGES), random.below(3) == 0);
        if vcpu.access(GuestAccess { gfn, write, exec: false }).expect("memory") == AccessOutcome::Stopped {
            return n;
        }
    }
    unreachable!("a guest is stopped before it has counted to 2^64")
}

#[test]
fn aging_beside_faults_unmaps_and_fast_zaps_loses_no_page_and_no_dirty_bit() {
    for profile in ["6.1", "6.12", "7.2"] {
        // With hardware A/D, and with the EPT entries that are access-tracked by software.
        for ad_bits in [true, false] {
            let kernel = KernelProfile::named(profile).expect("known");
            let ept = Format::ept(kernel.format_nonpresent, kernel.format_frozen, true, false);
            let lockless = kernel.format(FormatKind::Npt);
            let vm = Vm::<Real>::new(VmConfig {
                format: if ad_bits { lockless } else { ept.with_lockless_aging(profile == "7.2") },
                vcpus: 2,
                max_tables: 2_000,
                hugepages: false,
                host_pages: 1 << 22,
                check_frames: true,
                ..VmConfig::new(kernel)
            })
            .expect("a small VM");
            let task = vm.task("vmm", TaskRole::Caller);
            let hva = vm.side().primary.region(PAGES, 0, 1, true).expect("room");
            let region = Region { id: 0, as_id: 0, base: 0, pages: PAGES, hva, flags: SlotFlags::default() };
            vm.set_memslot(&task, &region).expect("room");
            // Both go on until the pages have been found young while the host took some away: on a quiet machine sixty unmaps end sooner.
            let (mut young, aged) = (0, AtomicBool::new(false));
            thread::scope(|scope| {
                let (vm, aged) = (&vm, &aged);
                let guests: Vec<_> = (0..2).map(|id| scope.spawn(move || toucher(vm, id))).collect();
                let host = scope.spawn(move || {
                    let task = vm.task("host", TaskRole::Caller);
                    let mut random = Random(9);
                    for n in 0.. {
                        if n >= rounds(60) && aged.load(Ordering::Relaxed) {
                            break;
                        }
                        let start = random.below(PAGES - 64);
                        vm.unmap_gfns(&task, start..start + 64, true).expect("open");
                        if n % 8 == 0 {
                            vm.fast_zap(&task).expect("open");
                        }
                    }
                });
                let begin = Instant::now();
                while !host.is_finished() {
                    young += u64::from(vm.age_gfns(&task, 0..PAGES).expect("open"));
                    vm.test_age_gfns(&task, 0..PAGES).expect("open");
                    aged.store(young >= 8 || begin.elapsed() > Duration::from_secs(60), Ordering::Relaxed);
                }
                host.join().expect("no panic");
                // Everything is old now, and what is touched is young again.
                while !vm.notifier_age_flush(&task, hva..hva + PAGES).expect("open") {}
                vm.stop_vcpus(&task);
                let touched: u64 = guests.into_iter().map(|guest| guest.join().expect("no panic")).sum();
                assert!(touched > 0, "{profile}");
            });
            assert!(young >= 8, "{profile}: no page was found young");
            vm.resume();
            let report = vm.close().expect("no handle is left");
            assert!(report.is_clean(), "{profile} {ad_bits}: {report:?}");
        }
    }
}

#[test]
fn harvesting_takes_one_flush_if_anything_was_dirty_and_none_otherwise() {
    for profile in ["5.15", "6.12"] {
        let kernel = KernelProfile::named(profile).expect("known");
        let vm = Vm::<Real>::new(VmConfig {
            design: Some("inline".into()),
            max_tables: 2_000,
            hugepages: false,
            host_pages: 1 << 22,
            ..VmConfig::new(kernel)
        })
        .expect("a small VM");
        let task = vm.task("vmm", TaskRole::Caller);
        let hva = vm.side().primary.region(PAGES, 0, 1, true).expect("room");
        let flags = SlotFlags { log_dirty: true, readonly: false };
        vm.set_memslot(&task, &Region { id: 0, as_id: 0, base: 0, pages: PAGES, hva, flags }).expect("room");
        {
            let mut vcpu = vm.vcpu(0).expect("free");
            for gfn in (0..PAGES).step_by(3) {
                vcpu.access(GuestAccess::write(gfn)).expect("memory");
            }
        }
        let before = vm.mmu().flushes();
        let writes = task.meter().entry_writes.get();
        let log = vm.take_dirty_log(&task, 0, 0).expect("logs");
        assert_eq!(log, (0..PAGES).step_by(3).collect::<Vec<_>>(), "{profile}");
        assert_eq!(vm.mmu().flushes() - before, 1, "{profile}");
        assert_eq!(task.meter().entry_writes.get() - writes, log.len() as u64, "{profile}: what was dirty");
        assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(Vec::new()));
        assert_eq!(vm.mmu().flushes() - before, 1, "{profile}: nothing dirty, nothing to flush");
        assert!(vm.close().expect("no handle").is_clean());
    }
}
