//! Whatever is done, in whatever order: reverse maps, parents, marks, lists, lpage_info and counts say what the tables say.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};

use crate::common::{Setup, World, audit::audit, books};
use proptest::prelude::*;
use tdpmmu_platform::{Real, Task, TaskConfig};
use tdpmmu_shadow::{
    GuestPte, PageInfo, SHADOW_DESIGNS, ShadowFault, ShadowFrame, ShadowOutcome, SlotBooks, SlotPages,
    walk_guest,
};
use tdpmmu_spte::Access;
use tdpmmu_table::TableCache;

/// The slot that stays: data, and the guest's tables from `TABLES` on. It does not begin or end on a huge frame.
const STAYS: std::ops::Range<u64> = 3..2050;
/// The slot that comes and goes.
const GOES: std::ops::Range<u64> = 4096..4096 + 1024;
const TABLES: u64 = 1536;
/// Level of each of the guest's tables: two of each, the level 1 ones in the slot that goes as well.
const LEVELS: [(u64, u8); 10] = [
    (TABLES, 4),
    (TABLES + 1, 4),
    (TABLES + 2, 3),
    (TABLES + 3, 3),
    (TABLES + 4, 2),
    (TABLES + 5, 2),
    (TABLES + 6, 1),
    (TABLES + 7, 1),
    (GOES.start + 1, 2),
    (GOES.start + 2, 1),
];

#[derive(Clone, Debug)]
enum Op {
    /// A fault of context `root` (0, 1: a process; 2: direct) on a page, by its four indices.
    Fault {
        root: usize,
        at: [bool; 4],
        gfn: u64,
        level: u8,
        write: bool,
    },
    /// The guest writes one of its tables: a link, a leaf, or nothing.
    Store {
        table: usize,
        index: bool,
        what: usize,
        leaf: bool,
    },
    Put {
        root: usize,
    },
    Sync,
    Invlpg {
        root: usize,
        at: [bool; 4],
    },
    Unmap {
        from: u64,
        pages: u64,
        may_yield: bool,
    },
    Protect {
        from: u64,
        pages: u64,
        what: u8,
    },
    FastZap,
    DeleteSlot,
    AddSlot,
    ZapSlot,
    Room,
    Shrink {
        pages: u64,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let gfn = prop_oneof![STAYS, GOES];
    let fault = (0usize..3, any::<[bool; 4]>(), gfn, 1u8..=3, any::<bool>())
        .prop_map(|(root, at, gfn, level, write)| Op::Fault { root, at, gfn, level, write });
    let store = (0..LEVELS.len(), any::<bool>(), 0usize..40, any::<bool>())
        .prop_map(|(table, index, what, leaf)| Op::Store { table, index, what, leaf });
    let range = (prop_oneof![Just(0u64), STAYS, GOES], 1u64..600);
    let op = prop_oneof![
        30 => fault,
        6 => store,
        1 => (0usize..3).prop_map(|root| Op::Put { root }),
        1 => Just(Op::Sync),
        1 => (0usize..3, any::<[bool; 4]>()).prop_map(|(root, at)| Op::Invlpg { root, at }),
        2 => (range.clone(), any::<bool>())
            .prop_map(|((from, pages), may_yield)| Op::Unmap { from, pages, may_yield }),
        1 => (range, 0u8..4).prop_map(|((from, pages), what)| Op::Protect { from, pages, what }),
        1 => Just(Op::FastZap),
        1 => Just(Op::DeleteSlot),
        3 => Just(Op::AddSlot),
        1 => Just(Op::ZapSlot),
        1 => Just(Op::Room),
        1 => (1u64..20).prop_map(|pages| Op::Shrink { pages }),
    ];
    prop::collection::vec(op, 1..120)
}

/// A virtual page by four indices of 0 or 1.
fn page(at: [bool; 4]) -> u64 {
    at.iter().fold(0, |page, &bit| page << 9 | u64::from(bit))
}

struct Guest {
    world: World,
    task: Task<Real>,
    cache: TableCache,
    roots: [Option<u32>; 3],
    stays: Arc<SlotBooks>,
    goes: Option<Arc<SlotBooks>>,
}

impl Guest {
    fn new(setup: Setup, force_yield: Option<u32>) -> Self {
        let world = World::new(setup);
        let stays = books(0, STAYS.start, STAYS.end - STAYS.start);
        world.host.set_books([Arc::clone(&stays)]);
        let task = world.task_with(TaskConfig { force_yield, ..TaskConfig::default() });
        let guest = Self { world, task, cache: TableCache::default(), roots: [None; 3], stays, goes: None };
        for (n, &(table, level)) in LEVELS.iter().enumerate() {
            // A tree to begin with: each table leads to one of the next level.
            let below = LEVELS.iter().filter(|(_, l)| l + 1 == level).map(|(gfn, _)| *gfn);
            for (index, child) in below.take(2).enumerate() {
                guest.world.host.set_word(table, index as u16, GuestPte::table(child).0);
            }
            if level == 1 {
                // Its first page is a table of level 1, which the guest may write: pages go unsync.
                guest.world.host.set_word(
                    table,
                    0,
                    GuestPte::leaf(TABLES + 6 + n as u64 % 2, 1, Access::ALL).0,
                );
                guest.world.host.set_word(table, 1, GuestPte::leaf(8 + n as u64, 1, Access::ALL).0);
            }
        }
        guest
    }

    fn backed(&self, gfn: u64) -> bool {
        STAYS.contains(&gfn) || self.goes.is_some() && GOES.contains(&gfn)
    }

    /// The root of a context, loaded anew if it is obsolete, as a vCPU does before it enters the guest. `None`: no room.
    fn root(&mut self, which: usize) -> Option<u32> {
        let stale = self.roots[which].filter(|&root| self.world.mmu.is_obsolete(root));
        let mut guard = self.world.lock.write(&self.task);
        if let Some(root) = stale {
            self.world.mmu.put_root(&mut guard, root);
            self.roots[which] = None;
        }
        if self.roots[which].is_none() {
            let (gfn, role) = match which {
                2 => (0, self.world.role(true)),
                n if self.world.mmu.config().tdp_enabled => (TABLES + n as u64, self.world.nested_role(4)),
                n => (TABLES + n as u64, self.world.role(false)),
            };
            self.roots[which] = self.world.mmu.load_root(&mut guard, &mut self.cache, 0, gfn, role).ok();
        }
        self.roots[which]
    }

    fn fault(&mut self, which: usize, at: [bool; 4], gfn: u64, level: u8, write: bool) {
        let Some(root) = self.root(which) else { return };
        let host = &*self.world.host;
        let (gva, gfn, guest) = if which == 2 {
            (gfn, gfn, None)
        } else {
            let walk = walk_guest::<Real>(host, 0, TABLES + which as u64, 4, page(at), write, false);
            let Ok(walk) = walk else { return };
            (page(at), walk.gfn, Some(walk))
        };
        let tables = guest.iter().flat_map(|walk| walk.tables).filter(|&table| table != 0);
        // The guest's tables must be memory, which the guest sees to.
        if !self.backed(gfn) || tables.into_iter().any(|table| !self.backed(table)) {
            return;
        }
        let frame = ShadowFrame::Page { pfn: 1 << 20 | gfn, writable: true };
        let fault =
            ShadowFault { gva, gfn, frame, goal_level: level, write, guest, ..ShadowFault::page(gva, 0, 1) };
        let mut guard = self.world.lock.write(&self.task);
        if !self.world.mmu.make_pages_available(&mut guard) || self.world.mmu.is_obsolete(root) {
            return;
        }
        let outcome = self.world.mmu.map(&mut guard, &mut self.cache, root, &fault);
        if outcome == ShadowOutcome::WriteProtected {
            self.world.mmu.page_track_write(&mut guard, 0, gfn, 8, 8);
        }
    }

    fn store(&mut self, table: usize, index: bool, what: usize, leaf: bool) {
        let (gfn, level) = LEVELS[table];
        let below: Vec<u64> = LEVELS.iter().filter(|(_, l)| l + 1 == level).map(|(gfn, _)| *gfn).collect();
        let pte = match () {
            () if what == 0 => 0,
            // A leaf anywhere, at a table too.
            () if level == 1 || leaf && level == 2 => {
                let to = [5, 600, TABLES + 6, TABLES, GOES.start + 2, GOES.start + 700, 1024][what % 7];
                GuestPte::leaf(to, level, Access { write: !what.is_multiple_of(3), ..Access::ALL }).0
            }
            () => GuestPte::table(below[what % below.len()]).0,
        };
        self.world.host.set_word(gfn, u16::from(index), pte);
        let mut guard = self.world.lock.write(&self.task);
        let pages = self.world.mmu.pages(&guard);
        let synced = pages.iter().any(|p| p.gfn == gfn && !p.role.direct() && !p.obsolete && !p.unsync);
        // Else the guest may write it unseen, or nothing shadows it.
        if synced {
            self.world.mmu.page_track_write(&mut guard, 0, gfn, u16::from(index) * 8, 8);
        }
    }

    fn step(&mut self, op: &Op) {
        self.world.mmu.top_up(&self.task, &mut self.cache).expect("room");
        match *op {
            Op::Fault { root, at, gfn, level, write } => return self.fault(root, at, gfn, level, write),
            Op::Store { table, index, what, leaf } => return self.store(table, index, what, leaf),
            Op::AddSlot if self.goes.is_none() => {
                self.goes = Some(books(0, GOES.start, GOES.end - GOES.start));
                let all = [Some(Arc::clone(&self.stays)), self.goes.clone()];
                return self.world.host.set_books(all.into_iter().flatten());
            }
            Op::FastZap => return self.world.fast_zap(&self.task, None),
            Op::DeleteSlot => {
                if let Some(slot) = self.goes.take() {
                    self.world.fast_zap(&self.task, Some(&slot));
                    self.world.host.set_books([Arc::clone(&self.stays)]);
                }
                return;
            }
            _ => {}
        }
        let mmu = &self.world.mmu;
        let mut guard = self.world.lock.write(&self.task);
        match *op {
            Op::Put { root } => {
                if let Some(root) = self.roots[root].take() {
                    mmu.put_root(&mut guard, root);
                }
            }
            Op::Sync => {
                let roots: Vec<u32> = self.roots.iter().flatten().copied().collect();
                mmu.sync_roots(&mut guard, &roots);
            }
            Op::Invlpg { root, at } => {
                if let Some(root) = self.roots[root] {
                    mmu.invlpg(&mut guard, root, page(at));
                }
            }
            Op::Unmap { from, pages, may_yield } => {
                mmu.unmap(&mut guard, 0, from..from + pages, may_yield);
                let gone = (from..from + pages)
                    .all(|gfn| (1..4).all(|level| mmu.rmap_of(&guard, 0, gfn, level).is_empty()));
                assert!(gone);
            }
            Op::Protect { from, pages, what } => {
                let gfns = from..from + pages;
                match what {
                    0 => drop(mmu.write_protect(&guard, 0, gfns, 1)),
                    1 => drop(mmu.clear_dirty(&guard, 0, gfns)),
                    2 => drop(mmu.age(&guard, 0, gfns)),
                    _ => drop(mmu.test_age(&guard, 0, gfns)),
                }
            }
            Op::ZapSlot => mmu.zap_slot(&mut guard, &self.stays, SlotPages::Shadowing),
            Op::Room => drop(mmu.make_pages_available(&mut guard)),
            Op::Shrink { pages } => drop(mmu.shrink(&mut guard, pages)),
            _ => {}
        }
    }

    fn end(mut self) {
        self.cache.drain(&self.world.pool);
        let roots: Vec<u32> = self.roots.iter().flatten().copied().collect();
        self.world.end(&self.task, &roots);
    }
}

/// What the random operations have met, summed over all cases: who never meets it tests nothing.
#[derive(Default)]
struct Met {
    unsync: AtomicU64,
    marks: AtomicU64,
    shared_pages: AtomicU64,
    long_lists: AtomicU64,
    obsolete: AtomicU64,
    held: AtomicU64,
    reclaimed: AtomicU64,
    restarts: AtomicU64,
    huge: AtomicU64,
}

static MET: LazyLock<Met> = LazyLock::new(Met::default);

impl Met {
    fn note(&self, guest: &Guest, pages: &[PageInfo]) {
        let counts = guest.world.mmu.counts();
        let some = |cell: &AtomicU64, met: bool| {
            cell.fetch_add(u64::from(met), Relaxed);
        };
        some(&self.unsync, pages.iter().any(|page| page.unsync));
        some(&self.marks, pages.iter().any(|page| page.unsync_children > 1));
        some(&self.shared_pages, pages.iter().any(|page| page.parents.len() > 1));
        some(&self.obsolete, counts.obsolete != 0);
        some(&self.held, counts.zapped_held != 0);
        some(&self.reclaimed, counts.reclaimed != 0);
        some(&self.restarts, counts.restarts != 0);
        some(&self.huge, counts.leaves[2] != 0);
        some(&self.long_lists, guest.world.mmu.memory().list_bytes != 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    fn the_books_say_what_the_tables_say_after_every_operation(
        design in 0..SHADOW_DESIGNS.len(),
        quota in prop_oneof![Just(u32::MAX), 14u32..40],
        yields in prop_oneof![Just(None), Just(Some(1u32)), Just(Some(3))],
        // The guest's tables are a nested guest's, and its pages go with their last parent.
        tdp_enabled in any::<bool>(),
        ops in ops(),
    ) {
        let setup = Setup { design: SHADOW_DESIGNS[design].design, quota, tdp_enabled, batch: 2, ..Setup::default() };
        let mut guest = Guest::new(setup, yields);
        for op in &ops {
            guest.step(op);
            let guard = guest.world.lock.write(&guest.task);
            prop_assert_eq!(audit(&guest.world, &guard), Vec::<String>::new(), "after {:?}", op);
            MET.note(&guest, &guest.world.mmu.pages(&guard));
        }
        guest.end();
    }
}

#[test]
fn reverse_maps_parents_marks_lists_lpage_and_counts_balance_after_random_operations() {
    the_books_say_what_the_tables_say_after_every_operation();
    let met = &*MET;
    let met = [
        &met.unsync,
        &met.marks,
        &met.shared_pages,
        &met.long_lists,
        &met.obsolete,
        &met.held,
        &met.reclaimed,
        &met.restarts,
        &met.huge,
    ];
    let met = met.map(|cell| cell.load(Relaxed));
    assert!(met.iter().all(|&steps| steps >= 10), "steps with each: {met:?}");
}
