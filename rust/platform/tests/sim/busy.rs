//! A program that uses all of the ground: the lock in both modes, yields, RCU, the queue, the mutex, plain words.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use tdpmmu_platform::{
    Fault, Faults, MmuLock, Mutex, Platform, RcuConfig, RcuDomain, Reclaim, Role, Sim, Site, Task,
    TaskConfig, WorkQueue, sim::SimRcu,
};

use crate::{Body, together};

/// Counts what it is given back.
#[derive(Default)]
pub struct Counting {
    pub reclaimed: AtomicU64,
    /// Links of up to 32 deferred ids.
    pub links: [AtomicU32; 32],
}

impl Reclaim for Counting {
    fn reclaim(&self, head: u32) -> usize {
        let mut id = head;
        let mut count = 0;
        while id != tdpmmu_platform::NIL {
            count += 1;
            id = self.links[id as usize].load(Ordering::SeqCst);
        }
        self.reclaimed.fetch_add(count, Ordering::SeqCst);
        count as usize
    }
}

/// Every third question for a lost exchange is a yes, and some checks yield.
#[derive(Debug)]
pub struct Some3;

impl Faults for Some3 {
    fn inject(&self, fault: Fault, _site: Site, nth: u64, dice: &mut dyn FnMut(u32) -> u32) -> u32 {
        match fault {
            Fault::Cmpxchg => u32::from(nth % 3 == 2),
            Fault::GraceDelay => dice(4),
            Fault::Pause => u32::from(dice(50) == 0) * 3,
            _ => 0,
        }
    }
}

/// Three tasks, a worker and RCU; ends with the sums it must have.
pub fn busy() {
    let reclaim = Arc::new(Counting::default());
    let rcu = SimRcu::try_new(reclaim.clone(), RcuConfig::default()).unwrap();
    let lock = Arc::new(MmuLock::<Sim>::new());
    let total = Arc::new(Mutex::<Sim, u64>::new(0));
    let word = Arc::new(AtomicU64::new(0));
    let (sum, worked) = (total.clone(), word.clone());
    let queue = Arc::new(
        WorkQueue::<Sim, u64>::new("work", 1, move |item| {
            *sum.lock() += item;
            Sim::fetch_add(&worked, 1 << 32, Site::TableMeta);
        })
        .unwrap(),
    );
    let next = Arc::new(AtomicU32::new(0));
    let body = |n: u32| {
        let (rcu, lock, total, word, queue) =
            (rcu.clone(), lock.clone(), total.clone(), word.clone(), queue.clone());
        let (reclaim, next) = (reclaim.clone(), next.clone());
        Box::new(move || {
            let task = Task::<Sim>::new(&rcu, &format!("task{n}"), Role::Vcpu, TaskConfig::default());
            for round in 0..3u64 {
                if (u64::from(n) + round) % 3 == 0 {
                    let mut guard = lock.write(&task);
                    if guard.should_yield() {
                        guard.relock();
                    }
                    let seen = Sim::load(&word, Site::SpteRead);
                    Sim::store(&word, seen, Site::SpteInstall);
                    // Another task adds without the lock: what was stored is put right by an exchange.
                    drop(guard);
                } else {
                    let _guard = lock.read(&task);
                    let _section = task.rcu_read();
                    let mut seen = Sim::load(&word, Site::SpteRead);
                    while let Err(now) = Sim::cmpxchg(&word, seen, seen + 1, Site::SpteZap) {
                        seen = now;
                    }
                    let id = next.fetch_add(1, Ordering::SeqCst);
                    rcu.defer(id, &reclaim.links[id as usize], 1);
                }
                queue.queue(round);
                *total.lock() += 1;
            }
            queue.flush();
        }) as Body
    };
    together((0..3).map(body).collect());
    queue.shutdown();
    rcu.barrier();
    assert_eq!(*total.lock(), 9 + 9);
    assert_eq!(reclaim.reclaimed.load(Ordering::SeqCst), 6);
    rcu.stop();
}
