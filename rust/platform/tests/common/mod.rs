//! Shared by the tests: a pool of ids as the owner of deferred chains, and how long to stress.
#![allow(dead_code)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tdpmmu_platform::{NIL, RcuConfig, RcuDomain, Real, Reclaim};

pub type Domain = <Real as tdpmmu_platform::Platform>::Rcu;

/// Slots that are live, deferred or free; `state` tells which, and counts how often each was freed.
pub struct Pool {
    pub links: Vec<AtomicU32>,
    pub state: Vec<AtomicU32>,
    pub freed: AtomicU64,
}

pub const LIVE: u32 = 1;
pub const FREED: u32 = 2;

impl Pool {
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Pool {
            links: (0..size).map(|_| AtomicU32::new(NIL)).collect(),
            state: (0..size).map(|_| AtomicU32::new(LIVE)).collect(),
            freed: AtomicU64::new(0),
        })
    }

    pub fn domain(self: &Arc<Self>, config: RcuConfig) -> Arc<Domain> {
        Domain::try_new(self.clone(), config).unwrap()
    }

    /// Links `ids` into a chain and defers it.
    pub fn defer(&self, domain: &Domain, ids: &[u32]) {
        for pair in ids.windows(2) {
            self.links[pair[0] as usize].store(pair[1], Ordering::Relaxed);
        }
        let tail = *ids.last().unwrap() as usize;
        domain.defer(ids[0], &self.links[tail], ids.len() as u32);
    }

    pub fn is_freed(&self, id: u32) -> bool {
        self.state[id as usize].load(Ordering::Acquire) == FREED
    }
}

impl Reclaim for Pool {
    fn reclaim(&self, head: u32) -> usize {
        let mut n = 0;
        let mut id = head;
        while id != NIL {
            let next = self.links[id as usize].load(Ordering::Relaxed);
            let before = self.state[id as usize].swap(FREED, Ordering::AcqRel);
            assert_eq!(before, LIVE, "id {id} reclaimed twice");
            n += 1;
            id = next;
        }
        self.freed.fetch_add(n, Ordering::Relaxed);
        n as usize
    }
}

/// A stress of a moment, times TDPMMU_STRESS.
pub fn stress_time() -> Duration {
    let scale: f64 = std::env::var("TDPMMU_STRESS").ok().and_then(|v| v.parse().ok()).unwrap_or(1.0);
    Duration::from_millis(300).mul_f64(scale.clamp(0.01, 10_000.0))
}

pub fn until(deadline: Instant, mut body: impl FnMut()) {
    while Instant::now() < deadline {
        body();
    }
}

/// Waits for a condition that another thread brings about; a minute means never.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < limit, "never happened: {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}
