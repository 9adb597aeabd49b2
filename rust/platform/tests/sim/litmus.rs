//! What two CPUs may see: every schedule of small programs, against what sequential consistency and x86-TSO allow.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use tdpmmu_platform::{
    Platform, RcuConfig, RcuDomain, Sim, Site,
    sim::{DfsState, Memory, SimConfig, SimRcu, Strategy},
};

use crate::{Body, busy::Counting, run, together};

/// What a task does; the loads' results are the outcome, in the order of the tasks.
#[derive(Clone, Copy)]
enum Op {
    /// Word and value.
    Store(usize, u64),
    Load(usize),
    Swap(usize, u64),
    Fence,
    /// The two sides of the asymmetric barrier.
    Light,
    Heavy,
}
use Op::{Fence, Heavy, Light, Load, Store, Swap};

/// Every outcome of `tasks`; `finals` appends what the words hold in the end.
fn outcomes(memory: Memory, tasks: &[&'static [Op]], finals: bool) -> BTreeSet<Vec<u64>> {
    let mut all = BTreeSet::new();
    let mut state = Some(DfsState::new(40));
    let mut exhausted = false;
    while let Some(next) = state {
        let seen: Arc<Mutex<Vec<u64>>> = Arc::default();
        let (result, tasks) = (seen.clone(), tasks.to_vec());
        let config = SimConfig { strategy: Strategy::Dfs(next), memory, ..SimConfig::default() };
        let done = run(config, move || {
            let words: Arc<[AtomicU64; 2]> = Arc::default();
            let loads: Vec<Arc<Mutex<Vec<u64>>>> = tasks.iter().map(|_| Arc::default()).collect();
            let body = |(ops, loads): (&&'static [Op], &Arc<Mutex<Vec<u64>>>)| {
                let (ops, loads, words) = (*ops, loads.clone(), words.clone());
                Box::new(move || {
                    for op in ops {
                        match *op {
                            Store(word, value) => Sim::store(&words[word], value, Site::VcpuMode),
                            Swap(word, value) => {
                                Sim::swap(&words[word], value, Site::VcpuMode);
                            }
                            Load(word) => {
                                let value = Sim::load(&words[word], Site::VcpuMode);
                                loads.lock().unwrap().push(value);
                            }
                            Fence => Sim::fence(Site::VcpuMode),
                            Light => Sim::light_fence(Site::VcpuMode),
                            Heavy => Sim::heavy_fence(Site::VcpuMode),
                        }
                    }
                }) as Body
            };
            together(tasks.iter().zip(&loads).map(body).collect());
            let mut result = result.lock().unwrap();
            for loads in loads {
                result.extend(loads.lock().unwrap().iter());
            }
            if finals {
                result.extend(words.iter().map(|word| word.load(Ordering::SeqCst)));
            }
        });
        assert!(!done.failed(), "{:?}", done.end);
        let outcome = seen.lock().unwrap().clone();
        all.insert(outcome);
        let after = done.dfs.unwrap();
        exhausted = after.is_exhausted();
        assert!(after.runs() < 2_000_000);
        state = after.next();
    }
    assert!(exhausted, "not every schedule was run");
    all
}

fn set(outcomes: &[&[u64]]) -> BTreeSet<Vec<u64>> {
    outcomes.iter().map(|outcome| outcome.to_vec()).collect()
}

#[test]
fn store_buffering_is_seen_under_tso_only_and_not_through_fences() {
    let plain: [&[Op]; 2] = [&[Store(0, 1), Load(1)], &[Store(1, 1), Load(0)]];
    assert_eq!(outcomes(Memory::Sc, &plain, false), set(&[&[0, 1], &[1, 0], &[1, 1]]));
    assert_eq!(outcomes(Memory::Tso, &plain, false), set(&[&[0, 0], &[0, 1], &[1, 0], &[1, 1]]));
    let fenced: [&[Op]; 2] = [&[Store(0, 1), Fence, Load(1)], &[Store(1, 1), Fence, Load(0)]];
    assert_eq!(outcomes(Memory::Tso, &fenced, false), set(&[&[0, 1], &[1, 0], &[1, 1]]));
    let swapped: [&[Op]; 2] = [&[Swap(0, 1), Load(1)], &[Swap(1, 1), Load(0)]];
    assert_eq!(outcomes(Memory::Tso, &swapped, false), set(&[&[0, 1], &[1, 0], &[1, 1]]));
    // One side alone is not enough.
    let half: [&[Op]; 2] = [&[Store(0, 1), Fence, Load(1)], &[Store(1, 1), Load(0)]];
    assert!(outcomes(Memory::Tso, &half, false).contains(&vec![0, 0]));
}

#[test]
fn a_light_fence_orders_against_a_heavy_one_and_not_against_its_like() {
    let asymmetric: [&[Op]; 2] = [&[Store(0, 1), Light, Load(1)], &[Store(1, 1), Heavy, Load(0)]];
    assert_eq!(outcomes(Memory::Tso, &asymmetric, false), set(&[&[0, 1], &[1, 0], &[1, 1]]));
    let light: [&[Op]; 2] = [&[Store(0, 1), Light, Load(1)], &[Store(1, 1), Light, Load(0)]];
    assert!(outcomes(Memory::Tso, &light, false).contains(&vec![0, 0]));
}

#[test]
fn message_passing_holds_under_tso_since_stores_stay_in_order() {
    let tasks: [&[Op]; 2] = [&[Store(0, 1), Store(1, 1)], &[Load(1), Load(0)]];
    for memory in [Memory::Sc, Memory::Tso] {
        assert_eq!(outcomes(memory, &tasks, false), set(&[&[0, 0], &[0, 1], &[1, 1]]), "{memory:?}");
    }
}

#[test]
fn load_buffering_is_forbidden() {
    let tasks: [&[Op]; 2] = [&[Load(0), Store(1, 1)], &[Load(1), Store(0, 1)]];
    for memory in [Memory::Sc, Memory::Tso] {
        assert_eq!(outcomes(memory, &tasks, false), set(&[&[0, 0], &[0, 1], &[1, 0]]), "{memory:?}");
    }
}

#[test]
fn a_task_sees_its_own_buffer_before_others_do() {
    // Each reads its own store and not yet the other's: allowed by forwarding, forbidden by sequential consistency.
    let tasks: [&[Op]; 2] = [&[Store(0, 1), Load(0), Load(1)], &[Store(1, 1), Load(1), Load(0)]];
    assert!(outcomes(Memory::Tso, &tasks, false).contains(&vec![1, 0, 1, 0]));
    assert!(!outcomes(Memory::Sc, &tasks, false).contains(&vec![1, 0, 1, 0]));
    // Never its own past.
    assert!(outcomes(Memory::Tso, &tasks, false).iter().all(|seen| seen[0] == 1 && seen[2] == 1));
}

#[test]
fn two_writers_of_two_words_leave_no_cycle() {
    let tasks: [&[Op]; 2] = [&[Store(0, 1), Store(1, 2)], &[Store(1, 1), Store(0, 2)]];
    for memory in [Memory::Sc, Memory::Tso] {
        assert_eq!(outcomes(memory, &tasks, true), set(&[&[1, 2], &[2, 1], &[2, 2]]), "{memory:?}");
    }
}

/// Both tasks store, then load the other's word: 1 where both loads saw nothing.
fn store_buffering() {
    let words: Arc<[AtomicU64; 2]> = Arc::default();
    let missed: Arc<AtomicU64> = Arc::default();
    let body = |mine: usize| {
        let (words, missed) = (words.clone(), missed.clone());
        Box::new(move || {
            Sim::store(&words[mine], 1, Site::VcpuMode);
            if Sim::load(&words[1 - mine], Site::VcpuRequest) == 0 {
                missed.fetch_add(1, Ordering::SeqCst);
            }
        }) as Body
    };
    together(vec![body(0), body(1)]);
    if missed.load(Ordering::SeqCst) == 2 {
        tdpmmu_platform::sim::violation("store-buffering", String::new());
    }
}

#[test]
fn random_and_pct_schedules_find_store_buffering_under_tso_and_never_without() {
    for memory in [Memory::Sc, Memory::Tso] {
        for pct in [false, true] {
            let found = (0..300)
                .filter(|&seed| {
                    let strategy = if pct {
                        Strategy::Pct { seed, depth: 2, steps: 10 }
                    } else {
                        Strategy::Random { seed }
                    };
                    run(SimConfig { strategy, memory, ..SimConfig::default() }, store_buffering).failed()
                })
                .count();
            assert_eq!(found > 5, memory == Memory::Tso, "{memory:?}, PCT {pct}: {found}");
            assert!(memory == Memory::Tso || found == 0);
        }
    }
}

#[test]
fn a_grace_period_empties_every_store_buffer() {
    let stale = |grace: bool| {
        (0..200)
            .filter(|&seed| {
                let strategy = Strategy::Random { seed };
                let config = SimConfig { strategy, memory: Memory::Tso, ..SimConfig::default() };
                run(config, move || {
                    let rcu = SimRcu::try_new(Arc::new(Counting::default()), RcuConfig::default()).unwrap();
                    let (word, stored): (Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
                    let (theirs, told) = (word.clone(), stored.clone());
                    let storer: Body = Box::new(move || {
                        Sim::store(&theirs, 1, Site::VcpuMode);
                        told.store(1, Ordering::SeqCst);
                        for _ in 0..8 {
                            Sim::point(Site::Spin);
                        }
                    });
                    let domain = rcu.clone();
                    let looker: Body = Box::new(move || {
                        Sim::point(Site::Spin);
                        if stored.load(Ordering::SeqCst) == 1 {
                            if grace {
                                domain.synchronize();
                            }
                            if Sim::load(&word, Site::VcpuMode) == 0 {
                                tdpmmu_platform::sim::violation("stale", String::new());
                            }
                        }
                    });
                    together(vec![storer, looker]);
                    rcu.stop();
                })
                .failed()
            })
            .count()
    };
    assert!(stale(false) > 0, "no store was held back");
    assert_eq!(stale(true), 0);
}
