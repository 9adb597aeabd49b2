//! RCU on real threads, in both flavours. Scaled by TDPMMU_STRESS.

mod common;

use std::{
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{LIVE, Pool, eventually, stress_time};
use tdpmmu_platform::{
    Event, Flavour, Moment, Observer, Phase, Platform, RcuConfig, RcuDomain, RcuReader, Real, Reclaim, Role,
    Task, TaskConfig,
};

fn flavours() -> impl Iterator<Item = RcuConfig> {
    [Some(Flavour::Fence), None].into_iter().map(|flavour| RcuConfig { flavour, ..RcuConfig::default() })
}

#[test]
fn the_wished_flavour_is_used_and_reported() {
    let fence = Pool::new(0).domain(RcuConfig { flavour: Some(Flavour::Fence), ..RcuConfig::default() });
    assert_eq!(fence.stats().flavour.name(), "fence");
    let detected = Pool::new(0).domain(RcuConfig::default());
    assert_eq!(detected.stats().flavour, Flavour::detect());
}

#[test]
fn a_barrier_returns_after_everything_deferred_before_is_reclaimed() {
    for config in flavours() {
        let pool = Pool::new(1_000);
        let domain = pool.domain(RcuConfig { batch_delay_ns: 60_000_000_000, ..config });
        for chunk in (0..1_000).collect::<Vec<u32>>().chunks(7) {
            pool.defer(&domain, chunk);
        }
        // The gathering delay of a minute does not hold a barrier up.
        domain.barrier();
        assert_eq!(pool.freed.load(Ordering::SeqCst), 1_000);
        let stats = domain.stats();
        assert_eq!((stats.callbacks, stats.backlog), (1_000, 0));
        assert!(stats.backlog_peak >= 7 && stats.backlog_peak <= 1_000);
        assert!(stats.grace_period_ns.count() >= 1);
    }
}

/// Defers each id again as soon as it is reclaimed, so many times.
struct Stream {
    domain: OnceLock<Weak<common::Domain>>,
    link: AtomicU32,
    rounds: AtomicU64,
    most: u64,
}

impl Reclaim for Stream {
    fn reclaim(&self, head: u32) -> usize {
        if self.rounds.fetch_add(1, Ordering::SeqCst) < self.most
            && let Some(domain) = self.domain.get().and_then(Weak::upgrade)
        {
            thread::sleep(Duration::from_millis(1));
            domain.defer(head, &self.link, 1);
        }
        1
    }
}

#[test]
fn a_barrier_does_not_wait_for_a_stream_of_callbacks_to_dry_up() {
    let most = 10_000;
    let stream = Arc::new(Stream {
        domain: OnceLock::new(),
        link: AtomicU32::new(tdpmmu_platform::NIL),
        rounds: AtomicU64::new(0),
        most,
    });
    let config = RcuConfig { batch_delay_ns: 0, ..RcuConfig::default() };
    let domain = common::Domain::try_new(stream.clone(), config).unwrap();
    stream.domain.set(Arc::downgrade(&domain)).unwrap();
    domain.defer(0, &stream.link, 1);
    domain.barrier();
    assert!(stream.rounds.swap(most, Ordering::SeqCst) < most, "the barrier saw the end of the stream");
}

#[test]
fn the_log_has_the_peak_though_callbacks_come_while_a_batch_is_freed() {
    let stream = Arc::new(Stream {
        domain: OnceLock::new(),
        link: AtomicU32::new(tdpmmu_platform::NIL),
        rounds: AtomicU64::new(0),
        most: 1,
    });
    let config = RcuConfig { batch_delay_ns: 0, log: true, ..RcuConfig::default() };
    let domain = common::Domain::try_new(stream.clone(), config).unwrap();
    stream.domain.set(Arc::downgrade(&domain)).unwrap();
    domain.defer(0, &stream.link, 1);
    domain.barrier();
    domain.barrier();
    let peak = domain.timeline().unwrap().take().backlog.iter().map(|point| point.1).max();
    assert_eq!((peak, domain.stats().backlog_peak), (Some(2), 2));
}

#[test]
fn nothing_is_reclaimed_while_a_reader_is_inside() {
    for config in flavours() {
        let pool = Pool::new(8);
        let domain = pool.domain(RcuConfig { batch_delay_ns: 0, ..config });
        let reader = domain.register("inside");
        reader.enter();
        reader.enter();
        pool.defer(&domain, &[0, 1, 2]);
        thread::sleep(Duration::from_millis(20));
        assert!(!pool.is_freed(0));
        reader.leave();
        thread::sleep(Duration::from_millis(5));
        assert!(!pool.is_freed(0), "the outer section still lasts");
        assert_eq!(reader.depth(), 1);
        reader.leave();
        domain.barrier();
        assert!(pool.is_freed(0) && pool.is_freed(1) && pool.is_freed(2));
    }
}

#[test]
fn a_section_that_began_later_is_not_waited_for() {
    let pool = Pool::new(1);
    let config = RcuConfig { batch_delay_ns: 0, stall_ns: 1, ..RcuConfig::default() };
    let domain = pool.domain(config);
    let early = domain.register("early");
    early.enter();
    pool.defer(&domain, &[0]);
    // A reported stall says that the grace period has begun and waits. Then another section begins, and stays.
    eventually("the grace period waits", || domain.stats().stall_count > 0);
    let late = domain.register("late");
    late.enter();
    early.leave();
    eventually("the early reader's end lets the page go", || pool.is_freed(0));
    late.leave();
}

#[test]
fn synchronize_waits_for_the_reader_that_was_inside() {
    for config in flavours() {
        let domain = Pool::new(0).domain(config);
        let left = Arc::new(AtomicBool::new(false));
        let inside = Arc::new(AtomicBool::new(false));
        let reader = {
            let (domain, left, inside) = (domain.clone(), left.clone(), inside.clone());
            thread::spawn(move || {
                let reader = domain.register("slow");
                reader.enter();
                inside.store(true, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(10));
                left.store(true, Ordering::SeqCst);
                reader.leave();
            })
        };
        eventually("the reader is inside", || inside.load(Ordering::SeqCst));
        domain.synchronize();
        assert!(left.load(Ordering::SeqCst));
        reader.join().unwrap();
    }
}

#[derive(Default)]
struct Stalls(AtomicU32);

impl Observer for Stalls {
    fn event(&self, _task: u32, event: &Event) {
        if matches!(event, Event::Stall { ns, .. } if *ns > 0) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[test]
fn a_stall_is_reported_with_the_name_of_the_reader() {
    let observer = Arc::new(Stalls::default());
    let pool = Pool::new(1);
    let domain = pool.domain(RcuConfig {
        batch_delay_ns: 0,
        stall_ns: 2_000_000,
        observer: Some(observer.clone()),
        ..RcuConfig::default()
    });
    let _idle = domain.register("idle");
    let reader = domain.register("vcpu 7");
    reader.enter();
    pool.defer(&domain, &[0]);
    eventually("the stall is seen", || observer.0.load(Ordering::SeqCst) > 0);
    reader.leave();
    domain.barrier();
    let stats = domain.stats();
    assert_eq!(stats.stall_count, 1);
    assert_eq!(stats.stalls[0].reader, "vcpu 7");
    assert!(stats.stalls[0].ns >= 2_000_000);
}

#[test]
fn a_short_section_is_no_stall() {
    let pool = Pool::new(1);
    let domain = pool.domain(RcuConfig { batch_delay_ns: 0, ..RcuConfig::default() });
    let reader = domain.register("quick");
    reader.enter();
    pool.defer(&domain, &[0]);
    reader.leave();
    domain.barrier();
    assert_eq!(domain.stats().stall_count, 0);
}

#[test]
fn what_is_deferred_after_stop_is_still_reclaimed_and_never_too_early() {
    let pool = Pool::new(6);
    let domain = pool.domain(RcuConfig::default());
    pool.defer(&domain, &[0]);
    domain.stop();
    domain.stop();
    assert!(pool.is_freed(0));
    pool.defer(&domain, &[1]);
    assert!(pool.is_freed(1), "nobody inside: reclaimed by the caller");
    let reader = domain.register("inside");
    reader.enter();
    // The deferring thread is itself inside: neither a deadlock nor a free.
    pool.defer(&domain, &[2, 3]);
    pool.defer(&domain, &[4]);
    assert!(!pool.is_freed(2) && !pool.is_freed(4));
    reader.leave();
    domain.barrier();
    assert!(pool.is_freed(2) && pool.is_freed(3) && pool.is_freed(4));
    pool.defer(&domain, &[5]);
    drop(domain);
    assert_eq!(pool.freed.load(Ordering::SeqCst), 6);
}

#[test]
fn barriers_and_a_stop_at_the_same_time_all_return() {
    for _ in 0..50 {
        let pool = Pool::new(64);
        let domain = pool.domain(RcuConfig::default());
        thread::scope(|s| {
            for i in 0..3u32 {
                let (pool, domain) = (&pool, &domain);
                s.spawn(move || {
                    for j in 0..16 {
                        let id = i * 16 + j;
                        pool.defer(domain, &[id]);
                        domain.barrier();
                        assert!(pool.is_freed(id));
                    }
                });
            }
            s.spawn(|| domain.stop());
        });
        assert_eq!(pool.freed.load(Ordering::SeqCst), 48);
    }
}

struct Panics;
impl Reclaim for Panics {
    fn reclaim(&self, _head: u32) -> usize {
        panic!("the owner's reclaim is broken");
    }
}

#[test]
fn a_panic_in_reclaim_reaches_whoever_stops_the_domain() {
    let domain = common::Domain::new(Arc::new(Panics), RcuConfig::default());
    let link = AtomicU32::new(0);
    domain.defer(0, &link, 1);
    domain.barrier();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| domain.stop())).unwrap_err();
    assert_eq!(*caught.downcast_ref::<&str>().unwrap(), "the owner's reclaim is broken");
}

/// Readers look an object up and use it; a writer replaces it and defers the old one, which the pool marks freed.
#[test]
fn readers_never_meet_a_reclaimed_object_under_stress() {
    const SIZE: u32 = 4_096;
    for config in flavours() {
        let pool = Pool::new(SIZE as usize);
        let domain = pool.domain(RcuConfig { batch_delay_ns: 20_000, ..config });
        let current = Arc::new(AtomicU64::new(0));
        let deadline = Instant::now() + stress_time();
        let looked = AtomicU64::new(0);
        thread::scope(|s| {
            for i in 0..3 {
                let (pool, domain, current, looked) = (&pool, &domain, &current, &looked);
                s.spawn(move || {
                    let task =
                        Task::<Real>::new(domain, &format!("reader {i}"), Role::Vcpu, TaskConfig::default());
                    let mut n = 0u64;
                    while Instant::now() < deadline {
                        for _ in 0..100 {
                            let section = task.rcu_read();
                            let id = current.load(Ordering::Acquire) as usize;
                            for _ in 0..4 {
                                assert_eq!(pool.state[id].load(Ordering::Relaxed), LIVE, "id {id}");
                            }
                            drop(section);
                            n += 1;
                        }
                    }
                    looked.fetch_add(n, Ordering::Relaxed);
                });
            }
            let mut next = 1u32;
            while Instant::now() < deadline {
                let old = current.swap(u64::from(next), Ordering::AcqRel) as u32;
                pool.defer(&domain, &[old]);
                next = (next + 1) % SIZE;
                if next.is_multiple_of(512) {
                    domain.barrier();
                    // Everything but the current one is free again.
                    for id in 0..SIZE {
                        if id != current.load(Ordering::Relaxed) as u32 {
                            pool.state[id as usize].store(LIVE, Ordering::Relaxed);
                        }
                    }
                }
            }
        });
        domain.barrier();
        assert!(looked.load(Ordering::Relaxed) > 0);
        assert_eq!(domain.stats().backlog, 0);
    }
}

#[test]
fn a_log_tells_what_waited_and_when_it_was_freed() {
    let pool = Pool::new(600);
    let domain = pool.domain(RcuConfig { log: true, batch_delay_ns: 0, ..RcuConfig::default() });
    let timeline = domain.timeline().expect("it logs").clone();
    let task = Task::<Real>::new(&domain, "marks", Role::Caller, TaskConfig::default());
    task.mark(Moment::RootInvalidate, 5);
    let ids: Vec<u32> = (0..600).collect();
    for some in ids.chunks(3) {
        pool.defer(&domain, some);
    }
    domain.barrier();
    task.mark(Moment::RootFree, 5);
    domain.stop();
    let log = timeline.take();
    assert_eq!(log.batches.iter().map(|batch| batch.pages).sum::<u64>(), 600);
    for batch in &log.batches {
        assert!(batch.queued <= batch.taken && batch.taken <= batch.freeing && batch.freeing <= batch.freed);
    }
    let stats = domain.stats();
    let peak = log.backlog.iter().map(|point| point.1).max();
    assert!(peak.unwrap() <= stats.backlog_peak);
    assert_eq!(log.backlog.last().unwrap().1, 0, "all of it was freed");
    assert!(log.backlog.is_sorted_by_key(|point| point.0));
    let phase_ns = |phase| {
        let slices = log.rcu.iter().filter(|slice| slice.phase == phase);
        Real::ticks_to_ns(slices.map(|slice| slice.to - slice.from).sum())
    };
    assert!(log.rcu.windows(2).all(|pair| pair[0].to == pair[1].from));
    assert!(phase_ns(Phase::GracePeriod).abs_diff(stats.waiting_ns) <= 1);
    assert!(phase_ns(Phase::Free).abs_diff(stats.freeing_ns) <= 1 && stats.freeing_ns > 0);
    let marks: Vec<_> = log.marks.iter().map(|mark| (mark.moment, mark.root, mark.task)).collect();
    assert_eq!(marks, [(Moment::RootInvalidate, 5, task.id()), (Moment::RootFree, 5, task.id())]);
    assert_eq!(log.lost, 0);
    assert!(pool.domain(RcuConfig::default()).timeline().is_none());
}
