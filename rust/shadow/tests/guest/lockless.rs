//! Walks and fast faults without mmu_lock, on a tree that others change.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::machine::{Host, Machine, PFN};
use tdpmmu_platform::{Platform, Real, Role, Site, Task, TaskConfig};
use tdpmmu_shadow::{FastOutcome, ModeWord, ReclaimKind, ShadowFault, ShadowOutcome};
use tdpmmu_spte::{Access, Spte};

#[derive(Default)]
struct Word(AtomicU64);

impl ModeWord for Word {
    fn begin_reading<P: Platform>(&self) {
        let word = P::load(&self.0, Site::VcpuMode);
        P::store(&self.0, (word + 2) | 1, Site::VcpuMode);
    }
    fn end_reading<P: Platform>(&self) {
        let word = P::load(&self.0, Site::VcpuMode);
        P::store(&self.0, word & !1, Site::VcpuMode);
    }
}

fn fast(m: &Machine, root: u32, page: u64, write: bool) -> (FastOutcome, Vec<u64>) {
    let word = Word::default();
    let walker = m.mmu.reclamation().walker(Some(&word)).expect("a vCPU");
    let section = walker.begin(&m.task);
    let mut marked = Vec::new();
    let outcome = m.mmu.fast_page_fault(&section, root, page, write, false, false, |gfn| marked.push(gfn));
    (outcome, marked)
}

#[test]
fn a_walk_names_each_entry_on_the_path() {
    let mut m = Machine::new();
    let root = m.load_direct();
    m.host_level = 1;
    m.write(root, 0, 0x77).expect("memory");
    let word = Word::default();
    let walker = m.mmu.reclamation().walker(Some(&word)).expect("a vCPU");
    let section = walker.begin(&m.task);
    let walk = m.mmu.walk_lockless(&section, root, 0x77);
    assert_eq!(walk.leaf().map(|(leaf, level)| (leaf.pfn(), level)), Some((0x77 + PFN, 1)));
    assert!((2..=4).all(|level: u8| walk.sptes[usize::from(level)].is_table(level)));
    assert_eq!(walk.sptes[2].pfn(), u64::from(walk.table));
    let short = m.mmu.walk_lockless(&section, root, 0x4_0000_0000);
    assert_eq!((short.level, short.leaf()), (4, None));
    drop(section);
    drop(walker);
    m.finish(&[root]);
}

#[test]
fn write_access_that_logging_took_comes_back_without_the_lock_and_is_told() {
    let mut m = Machine::new();
    let root = m.load_direct();
    m.host_level = 1;
    m.write(root, 0, 0x77).expect("memory");
    assert_eq!(fast(&m, root, 0x77, true).0, FastOutcome::Spurious);
    assert!(m.locked(|mmu, guard, _| mmu.write_protect(guard, 0, 0x77..0x78, 1)));
    assert_eq!(m.translate(root, 0x77, true, false), None);
    let (outcome, marked) = fast(&m, root, 0x77, true);
    assert!(matches!(outcome, FastOutcome::Fixed(spte) if m.mmu.format().is_writable(spte)));
    assert_eq!(marked, [0x77]);
    assert_eq!(m.translate(root, 0x77, true, false), Some(0x77 + PFN));
    assert_eq!(fast(&m, root, 0x78, true).0, FastOutcome::Declined, "nothing there");
    m.finish(&[root]);
}

#[test]
fn under_a_guests_own_tables_the_fast_fault_declines() {
    let mut m = Machine::new();
    let cr3 = m.process();
    m.map_raw(cr3, 0x1000, 0x100, 1, Access::ALL);
    let root = m.load(cr3);
    m.write(root, cr3, 0x1000).expect("memory");
    m.locked(|mmu, guard, _| mmu.write_protect(guard, 0, 0x100..0x101, 1));
    assert_eq!(fast(&m, root, 0x1000, true), (FastOutcome::Declined, vec![]));
    assert!(m.write(root, cr3, 0x1000).is_ok(), "under the lock it is given");
    m.finish(&[root]);
}

#[test]
fn walkers_never_meet_a_recycled_page_while_everything_is_zapped_and_made_again_in_every_kind() {
    static WORDS: [Word; 2] = [Word(AtomicU64::new(0)), Word(AtomicU64::new(0))];
    for kind in ReclaimKind::ALL {
        let mut m = Machine::reclaiming("6.12", 4, kind);
        *m.host.on_flush.lock().expect("no panic") = Some(Box::new(|_: &Host| {
            for word in &WORDS {
                let seen = word.0.load(Ordering::Acquire);
                while seen & 1 != 0 && word.0.load(Ordering::Acquire) == seen {
                    std::thread::yield_now();
                }
            }
        }));
        let root = m.load_direct();
        m.host_level = 1;
        let stop = AtomicBool::new(false);
        let (mmu, rcu) = (m.mmu.clone(), m.rcu.clone());
        std::thread::scope(|s| {
            let (mmu, rcu, stop) = (&mmu, &rcu, &stop);
            let walkers: Vec<_> = WORDS
                .iter()
                .map(|word| {
                    s.spawn(move || {
                        let task = Task::<Real>::new(rcu, "walker", Role::Vcpu, TaskConfig::default());
                        let walker = mmu.reclamation().walker(Some(word)).expect("a vCPU");
                        let (mut hits, mut page) = (0u64, 0u64);
                        while !stop.load(Ordering::Relaxed) {
                            page = (page + 0x201) % 0x4000;
                            let section = walker.begin(&task);
                            let walk = mmu.walk_lockless(&section, root, page);
                            assert!(
                                !walk.sptes.contains(&Spte(Spte::POISON)),
                                "{kind}: a walk in a freed page: {walk:?}"
                            );
                            if let Some((leaf, 1)) = walk.leaf() {
                                assert_eq!(leaf.pfn(), page + PFN, "{kind}: a walk in somebody else's page");
                                hits += 1;
                            }
                            drop(section);
                        }
                        hits
                    })
                })
                .collect();
            for round in 0..6u64 {
                for n in 0..32 {
                    let page = (n * 0x201 + round * 7) % 0x4000;
                    let fault = ShadowFault::page(page, page + PFN, 1);
                    let outcome = m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
                    assert!(matches!(outcome, ShadowOutcome::Fixed { .. } | ShadowOutcome::Spurious));
                }
                // The tables below the root go, the root stays: a huge leaf takes the place of each.
                for n in 0..32u64 {
                    let page = n * 0x200;
                    let fault = ShadowFault::page(page, page + PFN, 2);
                    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
                }
                m.locked(|mmu, guard, _| {
                    mmu.unmap(guard, 0, 0..0x4000, false);
                });
                m.locked(|mmu, guard, _| mmu.shrink(guard, 64));
            }
            stop.store(true, Ordering::Relaxed);
            for walker in walkers {
                walker.join().expect("a walk met a recycled page");
            }
        });
        m.finish(&[root]);
    }
}
