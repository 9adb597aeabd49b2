//! Canaries: an oracle that cannot sing is no oracle. Each rule is broken here at least once, by a wrong history fed by hand, by damage done to
//! a living tree, or by a design that is wrong on purpose; and the judge must say so. Beside them, histories that look wrong and are not.

mod common;
mod told;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock};

use common::{Cpu, Setup, World, fast_zap, page_fault};
use tdpmmu_mmu::{Held, TdpMmu, Which, Yield, ZapDesign};
use tdpmmu_oracle::{Judge, Rule, Rules};
use tdpmmu_platform::{Event, Exclusive, Guard, Observer, Owner, Platform, Real, Role, Task};
use tdpmmu_spte::geometry::{index, span};
use tdpmmu_spte::{Format, FormatKind, KernelProfile, MakeLeaf, Spte};

fn rules(design: &str) -> Rules {
    let profile = KernelProfile::named("6.12").expect("known");
    Rules { silenced: common::silenced(), ..Rules::of(&profile, profile.format(FormatKind::Npt), design) }
}

fn format() -> Format {
    rules("sync").format
}

/// The rules that a judge finds broken in a history.
fn fed(events: &[Event]) -> BTreeSet<Rule> {
    let judge = Judge::new(rules("sync"));
    for event in events {
        judge.event(7, event);
    }
    let found = judge.violations();
    assert!(found.iter().all(|v| v.task == 7 && !v.what.is_empty()));
    found.into_iter().map(|v| v.rule).collect()
}

const ROOT: u32 = 100;

fn leaf(pfn: u64) -> u64 {
    format().make_leaf(&MakeLeaf { pfn, level: 1, old: format().empty(), ..MakeLeaf::default() }).spte.raw()
}

fn empty() -> u64 {
    format().empty().raw()
}

fn frozen() -> u64 {
    format().frozen().raw()
}

fn spte(gfn: u64, old: u64, new: u64) -> Event {
    Event::SpteChanged { as_id: 0, root: ROOT, gfn, level: 1, old, new, shared: true }
}

fn root_born() -> Vec<Event> {
    vec![
        Event::TableAlloc { table: ROOT, level: 4, gfn: 0 },
        Event::RootAlloc { root: ROOT, role: 0, refs: 2 },
    ]
}

/// A whole life under `sync`, from which the canaries leave something out or put something in.
fn life() -> Vec<Event> {
    let mut events = root_born();
    events.extend([
        Event::TableAlloc { table: 101, level: 3, gfn: 0 },
        Event::TableLink { table: 101, parent: ROOT, index: 0 },
        spte(5, empty(), leaf(9)),
        Event::FastZapBegin,
        Event::RootSchedule { root: ROOT },
        Event::RootInvalidate { root: ROOT },
        Event::RootGet { root: ROOT, refs: 3, owner: Owner::Iterator },
        Event::RootZapBegin { root: ROOT },
        Event::TableUnlink { table: 101, level: 3, gfn: 0 },
        spte(5, leaf(9), frozen()),
        Event::RootZapEnd { root: ROOT },
        Event::RootPut { root: ROOT, refs: 2, owner: Owner::Mmu },
        Event::RootPut { root: ROOT, refs: 1, owner: Owner::Iterator },
        Event::FastZapEnd,
        Event::TableFree { table: 101 },
        Event::RootPut { root: ROOT, refs: 0, owner: Owner::Vcpu },
        Event::RootFree { root: ROOT },
        Event::TableFree { table: ROOT },
    ]);
    events
}

fn without(mut events: Vec<Event>, event: &Event) -> Vec<Event> {
    let i = events.iter().position(|e| e == event).expect("part of the life");
    events.remove(i);
    events
}

fn with_after(mut events: Vec<Event>, after: &Event, event: Event) -> Vec<Event> {
    let i = events.iter().position(|e| e == after).expect("part of the life");
    events.insert(i + 1, event);
    events
}

type Canary = (&'static str, Rule, fn() -> BTreeSet<Rule>);

/// Histories fed by hand.
const FED: &[Canary] = &[
    ("the frozen value is replaced by another than its owner", Rule::FrozenChanged, || {
        fed(&[spte(1, empty(), leaf(3)), spte(1, leaf(3), frozen()), spte(1, frozen(), leaf(4))])
    }),
    ("a leaf changes its frame", Rule::LeafMoved, || {
        fed(&[spte(1, empty(), leaf(3)), spte(1, leaf(3), leaf(4))])
    }),
    ("a leaf is writable and the host says no", Rule::MalformedSpte, || {
        fed(&[spte(1, empty(), leaf(3) & !format().host_writable)])
    }),
    ("a 2 MiB entry at an odd gfn", Rule::MalformedSpte, || {
        let event =
            Event::SpteChanged { as_id: 0, root: ROOT, gfn: 3, level: 2, old: 0, new: 0, shared: true };
        fed(&[event])
    }),
    ("nothing becomes another nothing", Rule::IdleChange, || fed(&[spte(1, empty(), 0x40)])),
    ("a leaf is removed twice", Rule::BrokenHistory, || {
        let twice = with_after(life(), &spte(5, leaf(9), frozen()), spte(5, leaf(9), frozen()));
        fed(&twice)
    }),
    ("a page is handed out while linked", Rule::HandedOutTwice, || {
        let link = Event::TableLink { table: 101, parent: ROOT, index: 0 };
        fed(&with_after(life(), &link, Event::TableAlloc { table: 101, level: 1, gfn: 0 }))
    }),
    ("a table is linked at two places", Rule::LinkedTwice, || {
        let link = Event::TableLink { table: 101, parent: ROOT, index: 0 };
        fed(&with_after(life(), &link, Event::TableLink { table: 101, parent: ROOT, index: 1 }))
    }),
    ("a table is unlinked twice", Rule::UnlinkedTwice, || {
        let unlink = Event::TableUnlink { table: 101, level: 3, gfn: 0 };
        fed(&with_after(life(), &unlink, unlink))
    }),
    ("a dead table is linked again", Rule::UsedAfterUnlink, || {
        let unlink = Event::TableUnlink { table: 101, level: 3, gfn: 0 };
        fed(&with_after(life(), &unlink, Event::TableLink { table: 101, parent: ROOT, index: 0 }))
    }),
    ("a table goes below a page that is free", Rule::UsedAfterUnlink, || {
        let free = Event::TableFree { table: 101 };
        let late = with_after(life(), &free, Event::TableLink { table: 102, parent: 101, index: 0 });
        fed(&with_after(late, &free, Event::TableAlloc { table: 102, level: 1, gfn: 0 }))
    }),
    ("a table is freed while linked", Rule::FreedWhileLinked, || {
        fed(&without(life(), &Event::TableUnlink { table: 101, level: 3, gfn: 0 }))
    }),
    ("a table is freed twice", Rule::FreedTwice, || {
        let free = Event::TableFree { table: 101 };
        fed(&with_after(life(), &free, free))
    }),
    ("an unlink names another place than the allocation", Rule::HeaderDiffers, || {
        let wrong = Event::TableUnlink { table: 101, level: 2, gfn: 512 };
        let mut events = life();
        let i = events.iter().position(|e| matches!(e, Event::TableUnlink { .. })).expect("one");
        events[i] = wrong;
        fed(&events)
    }),
    ("a gift is put that was not given", Rule::PutByNonOwner, || {
        let end = Event::RootZapEnd { root: ROOT };
        fed(&with_after(life(), &end, Event::RootPut { root: ROOT, refs: 2, owner: Owner::Gift }))
    }),
    ("a reference is passed on by who has none", Rule::PutByNonOwner, || {
        let end = Event::RootZapEnd { root: ROOT };
        fed(&with_after(life(), &end, Event::RootPass { root: ROOT, from: Owner::Gift, to: Owner::Work }))
    }),
    ("a root begins with three references", Rule::RefsDiffer, || {
        fed(&[Event::RootAlloc { root: ROOT, role: 0, refs: 3 }])
    }),
    ("a count leaves zero", Rule::Resurrected, || {
        let put = Event::RootPut { root: ROOT, refs: 0, owner: Owner::Vcpu };
        fed(&with_after(life(), &put, Event::RootGet { root: ROOT, refs: 1, owner: Owner::Iterator }))
    }),
    ("a valid root is re-armed", Rule::Resurrected, || {
        let mut events = root_born();
        events.extend([
            Event::RootPut { root: ROOT, refs: 1, owner: Owner::Vcpu },
            Event::RootPut { root: ROOT, refs: 0, owner: Owner::Mmu },
            Event::RootGet { root: ROOT, refs: 1, owner: Owner::Work },
        ]);
        fed(&events)
    }),
    ("a root that was freed is referenced", Rule::UnknownRoot, || {
        let free = Event::TableFree { table: ROOT };
        fed(&with_after(life(), &free, Event::RootGet { root: ROOT, refs: 2, owner: Owner::Vcpu }))
    }),
    ("a root is freed while a vCPU holds it", Rule::FreedReferenced, || {
        fed(&without(life(), &Event::RootPut { root: ROOT, refs: 0, owner: Owner::Vcpu }))
    }),
    ("a valid root is freed", Rule::FreedValid, || {
        fed(&without(life(), &Event::RootInvalidate { root: ROOT }))
    }),
    ("a root is freed with a leaf in it", Rule::FreedUnzapped, || {
        fed(&without(life(), &spte(5, leaf(9), frozen())))
    }),
    ("a root is freed without a zap", Rule::FreedUnzapped, || {
        let begin = Event::RootZapBegin { root: ROOT };
        fed(&without(without(life(), &begin), &Event::RootZapEnd { root: ROOT }))
    }),
    ("a zap without a reference", Rule::ZapUnreferenced, || {
        let put = Event::RootPut { root: ROOT, refs: 0, owner: Owner::Vcpu };
        fed(&with_after(life(), &put, Event::RootZapBegin { root: ROOT }))
    }),
    ("a root turns invalid twice", Rule::InvalidatedTwice, || {
        let invalid = Event::RootInvalidate { root: ROOT };
        fed(&with_after(life(), &invalid, invalid))
    }),
    ("one transition is queued twice", Rule::ScheduledTwice, || {
        let schedule = Event::RootSchedule { root: ROOT };
        fed(&with_after(life(), &schedule, schedule))
    }),
    ("a transition is not scheduled", Rule::NeverScheduled, || {
        fed(&without(life(), &Event::RootSchedule { root: ROOT }))
    }),
    ("a fault maps under an invalid root", Rule::CreatedUnderInvalid, || {
        let invalid = Event::RootInvalidate { root: ROOT };
        fed(&with_after(life(), &invalid, spte(6, empty(), leaf(1))))
    }),
    ("a fast zap ends with a leaf left", Rule::FastZapLeft, || {
        fed(&without(life(), &spte(5, leaf(9), frozen())))
    }),
    ("a fast zap ends with a root still valid", Rule::FastZapLeft, || {
        fed(&without(life(), &Event::RootInvalidate { root: ROOT }))
    }),
    ("a fast zap keeps the MMU's reference", Rule::GiftKept, || {
        fed(&without(life(), &Event::RootPut { root: ROOT, refs: 2, owner: Owner::Mmu }))
    }),
    ("two fast zaps at once", Rule::FastZapOverlap, || {
        fed(&with_after(life(), &Event::FastZapBegin, Event::FastZapBegin))
    }),
    ("a fast zap ends that never began", Rule::FastZapOverlap, || {
        fed(&without(life(), &Event::FastZapBegin))
    }),
    ("mmu_lock is released with a flush owed", Rule::FlushOwed, || {
        fed(&[Event::Unlock { shared: false, debt: true }])
    }),
];

/// Damage done to a living tree.
const DAMAGED: &[Canary] = &[
    ("a leaf disappears behind the engine's back", Rule::TreeDiffers, || {
        damaged(|d| d.cell(5, 1, |_| empty()))
    }),
    ("a leaf appears behind the engine's back", Rule::TreeDiffers, || damaged(|d| d.cell(6, 1, |_| leaf(6)))),
    ("a Dirty bit is lost", Rule::TreeDiffers, || damaged(|d| d.cell(5, 1, |raw| raw & !format().dirty))),
    ("W appears on a leaf that may not have it", Rule::TreeDiffers, || {
        damaged(|d| d.cell(7, 1, |raw| raw | format().write))
    }),
    ("two entries name one table", Rule::TreeDiffers, || {
        damaged(|d| {
            let first = d.read(5, 2);
            d.cell(5 + span(2), 2, |_| first);
        })
    }),
    ("an entry stays frozen", Rule::FrozenLeft, || damaged(|d| d.cell(6, 1, |_| frozen()))),
    ("the statistics miss a leaf", Rule::StatsDiffer, || damaged(|d| d.cell(5, 1, |_| empty()))),
    ("a header names another gfn", Rule::HeaderDiffers, || {
        damaged(|d| {
            let table = d.table_below(5, 2);
            let old = d.world.mmu.pool().meta(table);
            old.init(old.role(), 512, 1, old.parent());
        })
    }),
    ("a subtree is cut off and forgotten", Rule::TableLeaked, || damaged(|d| d.cell(5, 2, |_| empty()))),
    ("a subtree's top is cut off and its tables linked below a dead one", Rule::UsedAfterUnlink, || {
        damaged(|d| {
            let parent = d.table_below(5, 3);
            d.cell(5, 3, |_| empty());
            d.world.judge.event(1, &Event::TableUnlink { table: parent, level: 2, gfn: 0 });
        })
    }),
    ("a linked page is given back to the pool", Rule::FreedTwice, || {
        damaged(|d| {
            let table = d.table_below(5, 2);
            d.world.mmu.pool().free_unpublished(table);
            // The zap frees it once more.
            fast_zap(&d.world.mmu, &d.world.task());
        })
    }),
    ("a reference that nobody reported", Rule::RefsDiffer, || {
        damaged(|d| {
            let root = d.cpu.root.expect("loaded");
            let refs = &d.world.mmu.pool().meta(root).refs;
            refs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        })
    }),
    ("a walk that never puts its reference", Rule::RefsDiffer, || {
        damaged(|d| {
            let root = d.cpu.root.expect("loaded");
            assert!(d.world.mmu.get_root(&d.world.task(), root, Owner::Iterator));
        })
    }),
    ("a listed root is not what the reports know", Rule::ListDiffers, || {
        damaged(|d| {
            let root = d.cpu.root.expect("loaded");
            d.world.mmu.unlist_root(root);
        })
    }),
    ("the engine complains", Rule::Engine, || damaged(|d| d.world.mmu.violation("a canary"))),
    ("a root is left at the end", Rule::RootLeaked, || {
        damaged(|d| d.world.judge.finish(&d.world.mmu, &d.world.task()))
    }),
    ("pages are left at the end", Rule::PoolCount, || {
        damaged(|d| d.world.judge.finish(&d.world.mmu, &d.world.task()))
    }),
    ("tables are left at the end", Rule::TableLeaked, || {
        damaged(|d| d.world.judge.finish(&d.world.mmu, &d.world.task()))
    }),
];

struct Damage {
    world: World,
    cpu: Cpu,
}

impl Damage {
    /// The cell of `gfn` at `level`.
    fn find(&self, gfn: u64, level: u8) -> (u32, usize) {
        let (mut table, mut at) = (self.cpu.root.expect("loaded"), self.world.mmu.root_level());
        while at > level {
            table = Spte(self.load(table, index(gfn, at))).pfn() as u32;
            at -= 1;
        }
        (table, index(gfn, level))
    }

    fn load(&self, table: u32, index: usize) -> u64 {
        Real::load(&self.world.mmu.pool().entries(table)[index], tdpmmu_platform::Site::SpteRead)
    }

    /// The table that the entry of `gfn` at `level` links.
    fn table_below(&self, gfn: u64, level: u8) -> u32 {
        Spte(self.read(gfn, level)).pfn() as u32
    }

    fn read(&self, gfn: u64, level: u8) -> u64 {
        let (table, index) = self.find(gfn, level);
        self.load(table, index)
    }

    fn cell(&self, gfn: u64, level: u8, change: impl FnOnce(u64) -> u64) {
        let (table, index) = self.find(gfn, level);
        let new = change(self.load(table, index));
        Real::store(&self.world.mmu.pool().entries(table)[index], new, tdpmmu_platform::Site::SpteZap);
    }

    fn cpu_fast(&self, gfn: u64) -> tdpmmu_mmu::FastOutcome {
        let task = self.world.mmu.task("other", Role::Vcpu);
        self.world.mmu.fast_page_fault(&task, self.cpu.root.expect("loaded"), 0, gfn, true, false, false)
    }
}

/// What the judge finds in a small tree after `damage`; it found nothing before.
fn damaged(damage: impl FnOnce(&Damage)) -> BTreeSet<Rule> {
    let world = Setup::default().build();
    let mut cpu = Cpu::new(&world, 0);
    cpu.access(5, 1, true);
    let mut fault = page_fault(0, 7, 1, false);
    fault.frame = tdpmmu_mmu::Frame::Page { pfn: 77, writable: false };
    cpu.fault(&fault).expect("room");
    let task = world.task();
    world.check(&task, "before the damage");
    let it = Damage { world, cpu };
    damage(&it);
    it.world.judge.check_quiet(&it.world.mmu, &task);
    it.world.judge.violations().into_iter().map(|v| v.rule).collect()
}

/// Designs that are wrong on purpose.
const FLAWED: &[Canary] = &[
    ("bug-history 21: every invalid root is put, gifted or not", Rule::PutByNonOwner, || {
        flawed(Flaw::PutsEveryInvalidRoot)
    }),
    ("bug-history 22: the fast zap does not wait", Rule::FastZapLeft, || flawed(Flaw::DoesNotZap)),
    ("the gift is forgotten", Rule::GiftKept, || flawed(Flaw::KeepsTheGift)),
    ("bug-history 23: one root is queued twice", Rule::ScheduledTwice, || flawed(Flaw::QueuesTwice)),
    ("the last put frees without a zap", Rule::FreedUnzapped, || flawed(Flaw::FreesUnzapped)),
    ("bug-history 11: a fault does not test for staleness", Rule::CreatedUnderInvalid, || {
        flawed(Flaw::FaultsIntoInvalidRoot)
    }),
    ("an invalid root is forgotten at the end", Rule::RootLeaked, || flawed(Flaw::KeepsTheGift)),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    PutsEveryInvalidRoot,
    DoesNotZap,
    KeepsTheGift,
    QueuesTwice,
    FreesUnzapped,
    FaultsIntoInvalidRoot,
}

/// The v3 patch of 2022 (never merged), in the flesh: gifts at invalidation, a work list for defunct roots; with one flaw, or none.
struct Gifting {
    flaw: Flaw,
    work: Mutex<Vec<u32>>,
    gifted: Mutex<BTreeSet<u32>>,
    judge: OnceLock<Arc<Judge>>,
}

impl Gifting {
    fn schedule(&self, task: &Task<Real>, root: u32) {
        if let Some(judge) = self.judge.get() {
            judge.event(task.id(), &Event::RootSchedule { root });
        }
    }

    fn run_work(&self, mmu: &TdpMmu<Real>, task: &Task<Real>) {
        for root in std::mem::take(&mut *self.work.lock().expect("one thread")) {
            let mut guard = mmu.lock.read(task);
            mmu.zap_root(&mut guard, root, Yield::Allowed);
            mmu.put_root(task, root, Owner::Work, Held::Shared(&mut guard));
        }
    }
}

impl ZapDesign<Real> for Gifting {
    fn name(&self) -> &'static str {
        "gifting"
    }

    fn last_put(&self, mmu: &TdpMmu<Real>, task: &Task<Real>, root: u32, _held: Held<'_, '_, Real>) {
        if mmu.invalidate_root(task, root) && self.flaw != Flaw::FreesUnzapped {
            mmu.rearm_root(task, root);
            self.schedule(task, root);
            self.work.lock().expect("one thread").push(root);
        } else {
            mmu.retire_root(task, root);
        }
    }

    fn invalidate(&self, mmu: &TdpMmu<Real>, guard: &mut Guard<'_, Real, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if (!mmu.is_obsolete(root) || self.flaw == Flaw::QueuesTwice)
                && mmu.get_root(task, root, Owner::Gift)
            {
                mmu.invalidate_root(task, root);
                self.schedule(task, root);
                self.gifted.lock().expect("one thread").insert(root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<Real>, task: &Task<Real>) {
        if self.flaw == Flaw::DoesNotZap {
            return;
        }
        if self.flaw != Flaw::PutsEveryInvalidRoot {
            self.run_work(mmu, task);
        }
        let mut guard = mmu.lock.read(task);
        mmu.for_each_root(&mut guard, Which::All, |guard, root| {
            let gifted = self.gifted.lock().expect("one thread").remove(&root);
            if gifted || (self.flaw == Flaw::PutsEveryInvalidRoot && mmu.is_obsolete(root)) {
                mmu.zap_root(guard, root, Yield::Allowed);
                if self.flaw != Flaw::KeepsTheGift {
                    mmu.put_root(task, root, Owner::Gift, Held::Shared(guard));
                }
            }
        });
    }

    fn drain(&self, mmu: &TdpMmu<Real>, task: &Task<Real>) {
        self.run_work(mmu, task);
    }
}

fn flawed(flaw: Flaw) -> BTreeSet<Rule> {
    let design =
        Arc::new(Gifting { flaw, work: Mutex::default(), gifted: Mutex::default(), judge: OnceLock::new() });
    // The vCPU alone owns the first reference, as in 5.18.
    let setup = Setup { profile: "6.1-async", design: "async-worker", ..Setup::default() };
    let world = setup.build_with(design.clone(), "gifting");
    let _ = design.judge.set(world.judge.clone());
    let task = world.task();
    let mut a = Cpu::new(&world, 0);
    let mut b = Cpu::new(&world, 1);
    a.access(5, 1, true);
    b.access(6, 1, true);
    {
        let mut guard = world.mmu.lock.write(&task);
        world.mmu.fast_zap_invalidate(&mut guard);
        world.mmu.fast_zap_in_lock(&mut guard);
    }
    // Between the two phases a vCPU reloads, and loses its new root while it is still valid.
    b.drop_root();
    b.access(6, 1, true);
    b.drop_root();
    if flaw == Flaw::FaultsIntoInvalidRoot {
        world.mmu.top_up(&a.task, &mut a.cache).expect("room");
        let mut guard = world.mmu.lock.read(&a.task);
        let fault = page_fault(0, 600, 1, true);
        world.mmu.map(&mut guard, &mut a.cache, a.root.expect("loaded"), &fault);
    }
    world.mmu.fast_zap_finish(&task);
    fast_zap(&world.mmu, &task);
    a.close();
    b.close();
    let left = world.mmu.uninit(&task);
    world.judge.finish(&world.mmu, &task);
    if flaw == Flaw::None {
        assert_eq!(left, tdpmmu_mmu::Leftovers::default());
    }
    world.judge.violations().into_iter().map(|v| v.rule).collect()
}

#[test]
fn every_canary_sings_and_every_rule_has_one() {
    let mut silent: BTreeSet<Rule> = Rule::ALL.iter().copied().collect();
    for (story, rule, canary) in canaries() {
        let found = canary();
        assert!(found.contains(rule), "{story}: expected {rule}, found {found:?}");
        silent.remove(rule);
    }
    assert_eq!(silent, BTreeSet::new(), "rules that nothing breaks");
}

fn canaries() -> impl Iterator<Item = &'static Canary> {
    FED.iter()
        .chain(DAMAGED)
        .chain(FLAWED)
        .chain(told::TOLD)
        .chain(told::shadow::TOLD)
        .chain(told::audit::TOLD)
}

#[test]
fn a_rule_that_is_silenced_lets_its_canaries_pass_unheard() {
    for (story, rule, canary) in canaries() {
        let found = common::silencing(*rule, canary);
        assert!(!found.contains(rule), "{story}: {rule} was silenced, found {found:?}");
    }
}

#[test]
fn what_is_owed_and_paid_breaks_no_rule() {
    for (story, history) in told::SOUND.iter().chain(told::shadow::SOUND) {
        assert_eq!(history(), BTreeSet::new(), "{story}");
    }
}

#[test]
fn each_rule_has_a_name_and_an_oracle_of_its_own() {
    let names: BTreeSet<&str> = Rule::ALL.iter().map(|rule| rule.name()).collect();
    assert_eq!(names.len(), Rule::ALL.len());
    for &rule in Rule::ALL {
        assert_eq!(Rule::named(rule.name()), Some(rule));
    }
    let oracles: BTreeSet<&str> = Rule::ALL.iter().map(|rule| rule.oracle()).collect();
    let asked = [
        "O-TLB", "O-DEBT", "O-RCU", "O-REF", "O-FZ", "O-DIRTY", "O-STAT", "O-PROG", "O-RCULEN", "O-INV",
        "O-LIST", "O-END",
    ];
    let beside = ["O-MODEL", "O-LIN", "O-LOCK", "O-SEQ", "O-WORK"];
    assert_eq!(oracles, asked.into_iter().chain(beside).collect());
}

#[test]
fn a_violation_names_both_tasks_and_what_was_owed_and_is_told_at_once() {
    let judge = Judge::new(Rules { check: tdpmmu_oracle::Check::Books, ..rules("sync") });
    let told = Arc::new(Mutex::new(Vec::new()));
    let ear = told.clone();
    judge.on_violation(move |violation| ear.lock().expect("one thread").push(violation.clone()));
    for event in root_born() {
        judge.event(1, &event);
    }
    let gone = Event::SpteChanged {
        as_id: 0,
        root: ROOT,
        gfn: 5,
        level: 1,
        old: leaf(9),
        new: empty(),
        shared: false,
    };
    judge.event(2, &gone);
    judge.event(3, &Event::NotifierEnding { start: 0, end: 9 });
    let told = told.lock().expect("one thread");
    let [violation] = &told[..] else { panic!("{told:?}") };
    assert_eq!((violation.rule, violation.task, violation.made_by), (Rule::FlushMissing, 3, Some(2)));
    assert_eq!((violation.root, violation.gfn), (Some(ROOT), Some(5)));
    assert!(violation.obligation.as_deref().is_some_and(|owed| owed.contains("0x5..0x6")), "{violation}");
    assert_eq!(judge.violations(), *told);
}

#[test]
fn a_sound_life_breaks_no_rule() {
    assert_eq!(fed(&life()), BTreeSet::new());
    assert_eq!(flawed(Flaw::None), BTreeSet::new());
    assert_eq!(damaged(|_| {}), BTreeSet::new());
}

#[test]
fn what_hardware_and_the_fast_fault_add_is_no_violation() {
    let world = Setup::default().build();
    let mut cpu = Cpu::new(&world, 0);
    let fixable = common::template(&world.mmu, 1, true);
    let clean = Spte(fixable.raw() & !(format().accessed | format().dirty));
    let map = tdpmmu_mmu::BulkMap { gfns: 0..4, first_pfn: 64, level: 1, template: clean };
    cpu.bulk(&map).expect("room");
    let task = world.task();
    world.check(&task, "before");
    let it = Damage { world, cpu };
    it.cell(0, 1, |raw| raw | format().accessed);
    it.cell(1, 1, |raw| raw | format().write | format().accessed | format().dirty);
    assert!(matches!(it.cpu_fast(2), tdpmmu_mmu::FastOutcome::Fixed(_)));
    it.world.check(&task, "after silent additions");
    let Damage { world, cpu } = it;
    world.unmap(&task, 0, 0..2);
    world.check(&task, "and their removal");
    cpu.close();
    drop(task);
    world.end();
}

#[test]
fn reports_that_overtake_each_other_are_put_in_order() {
    let (a, b) = (leaf(9), leaf(10));
    // Mapped and zapped by two threads, heard the wrong way round, twice.
    assert_eq!(
        fed(&[spte(1, a, empty()), spte(1, b, empty()), spte(1, empty(), b), spte(1, empty(), a),]),
        BTreeSet::new()
    );
    // The last-but-one put is told after the free.
    let vcpu = Event::RootPut { root: ROOT, refs: 0, owner: Owner::Vcpu };
    let late = Event::RootPut { root: ROOT, refs: 1, owner: Owner::Iterator };
    let events = with_after(without(life(), &late), &Event::TableFree { table: ROOT }, late);
    assert!(events.contains(&vcpu));
    assert_eq!(fed(&events), BTreeSet::new());
    // A zap meets a table before its linker has told.
    let link = Event::TableLink { table: 101, parent: ROOT, index: 0 };
    let unlink = Event::TableUnlink { table: 101, level: 3, gfn: 0 };
    assert_eq!(fed(&with_after(without(life(), &link), &unlink, link)), BTreeSet::new());
}

#[test]
fn violations_are_counted_beyond_those_that_are_kept() {
    let judge = Judge::new(rules("sync"));
    for _ in 0..1000 {
        judge.event(1, &Event::FastZapEnd);
    }
    assert_eq!(judge.count(), 1000);
    assert_eq!(judge.violations().len(), tdpmmu_oracle::Verdict::KEPT);
    let first = judge.violations().remove(0).to_string();
    assert!(first.starts_with("fast-zap-overlap: "), "{first}");
}
