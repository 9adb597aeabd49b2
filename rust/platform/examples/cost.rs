//! What the ground costs: ns per operation, the least of many rounds, alone on one thread.
//!
//! `cargo run --release -p tdpmmu-platform --example cost`

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use tdpmmu_platform::{
    Flavour, MmuLock, NIL, Phase, Platform, RcuConfig, RcuDomain, Real, Reclaim, Role, Task, TaskConfig,
};

struct Links(Vec<AtomicU32>);

impl Reclaim for Links {
    fn reclaim(&self, head: u32) -> usize {
        let (mut id, mut n) = (head, 0);
        while id != NIL {
            n += 1;
            id = self.0[id as usize].load(Ordering::Relaxed);
        }
        n
    }
}

#[inline(always)]
fn for_each_of_eight(mut body: impl FnMut()) {
    body();
    body();
    body();
    body();
    body();
    body();
    body();
    body();
}

/// ns per call: the best of `rounds` rounds of `calls`.
fn cost(what: &str, rounds: u32, calls: u64, body: impl FnMut()) {
    cost_of(what, rounds, calls, 1, body);
}

/// The same for a body that does the thing `times` times.
fn cost_of(what: &str, rounds: u32, calls: u64, times: u64, mut body: impl FnMut()) {
    let best = (0..rounds)
        .map(|_| {
            let start = Real::ticks();
            for _ in 0..calls {
                body();
            }
            Real::ticks() - start
        })
        .min()
        .unwrap();
    println!(
        "{what:<44} {:>10.2} ns",
        Real::ticks_to_ns(best * 1_000) as f64 / 1_000.0 / (calls * times) as f64
    );
}

fn main() {
    println!("{:?}", tdpmmu_platform::clock::info());
    let links = Arc::new(Links((0..1 << 16).map(|_| AtomicU32::new(NIL)).collect()));
    let word = AtomicU64::new(0);
    cost("locked RMW (the limit of a lock operation)", 50, 10_000, || {
        black_box(word.fetch_add(1, Ordering::SeqCst));
    });
    cost("ticks", 50, 10_000, || {
        black_box(Real::ticks());
    });
    for flavour in [Flavour::Membarrier, Flavour::Fence] {
        let domain = <Real as Platform>::Rcu::new(
            links.clone(),
            RcuConfig { flavour: Some(flavour), ..RcuConfig::default() },
        );
        let used = domain.stats().flavour.name();
        let task = Task::<Real>::new(&domain, "cost", Role::Caller, TaskConfig::default());
        // Eight at a time: a loop of one would measure the loop's branch beside the section's two.
        cost_of(&format!("rcu_read enter + leave ({used})"), 50, 20_000, 8, || {
            for_each_of_eight(|| {
                let _section = task.rcu_read();
                black_box(());
            });
        });
        cost(&format!("rcu_read nested ({used})"), 50, 100_000, {
            let task = &task;
            let outer = task.rcu_read();
            move || {
                let _section = task.rcu_read();
                black_box(outer.task());
            }
        });
        cost(&format!("synchronize ({used})"), 20, 100, || domain.synchronize());
        let mut next = 0;
        cost(&format!("defer of one id ({used})"), 20, 1_000, || {
            domain.defer(next, &links.0[next as usize], 1);
            next = (next + 1) % (1 << 16);
        });
        cost(&format!("barrier ({used})"), 20, 20, || domain.barrier());
    }
    let domain = <Real as Platform>::Rcu::new(links, RcuConfig::default());
    let lock = MmuLock::<Real>::new();
    for measure in [false, true] {
        // A tick so long that the slice never ends: a check then is what it is between two looks.
        let config = TaskConfig { measure, tick_ns: 1_000_000_000_000, ..TaskConfig::default() };
        let task = Task::<Real>::new(&domain, "cost", Role::Caller, config);
        let with = if measure { ", measuring" } else { "" };
        cost(&format!("mmu_lock read + release{with}"), 50, 10_000, || drop(lock.read(&task)));
        cost(&format!("mmu_lock write + release{with}"), 50, 10_000, || drop(lock.write(&task)));
        let mut guard = lock.write(&task);
        cost(&format!("should_yield{with}"), 50, 10_000, || {
            task.count(512, 512);
            black_box(guard.should_yield());
        });
        cost(&format!("relock, nobody waits{with}"), 50, 1_000, || guard.relock());
        drop(guard);
        cost(&format!("phase begin + end{with}"), 50, 10_000, || drop(black_box(task.phase(Phase::Flush))));
        cost(&format!("rcu_read{with}"), 50, 10_000, || {
            let _section = task.rcu_read();
            black_box(());
        });
    }
}
