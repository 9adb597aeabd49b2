//! Canaries of the books that look at who did what, and when: histories fed by hand, each event with its task, in true order.

pub mod audit;
pub mod shadow;

use std::collections::BTreeSet;
use std::sync::Arc;

use tdpmmu_oracle::{Answer, Call, Check, Judge, Order, Rule, Rules};
use tdpmmu_platform::{Event, LockClass, Observer, Owner, Platform, Real, Role, Site};
use tdpmmu_spte::geometry::index;
use tdpmmu_spte::{KernelProfile, Spte};
use tdpmmu_vm::{GuestAccess, Vm, VmConfig};

use super::common::silenced;
use super::{Canary, ROOT, empty, format, leaf, rules, spte};

/// The rules that a judge who looks at everything finds broken.
fn heard(events: &[(u32, Event)]) -> BTreeSet<Rule> {
    let judge = Judge::new(Rules { order: Order::True, check: Check::Full, ..rules("sync") });
    assert!(judge.wants_detail());
    for (task, event) in events {
        judge.event(*task, event);
    }
    let found = judge.violations();
    assert!(found.iter().all(|v| !v.what.is_empty()));
    found.into_iter().map(|v| v.rule).collect()
}

fn root() -> Vec<(u32, Event)> {
    vec![
        (1, Event::TableAlloc { table: ROOT, level: 4, gfn: 0 }),
        (1, Event::RootAlloc { root: ROOT, role: 0, refs: 2 }),
    ]
}

fn after_root(events: impl IntoIterator<Item = (u32, Event)>) -> Vec<(u32, Event)> {
    root().into_iter().chain(events).collect()
}

fn on(task: u32, events: impl IntoIterator<Item = Event>) -> Vec<(u32, Event)> {
    events.into_iter().map(|event| (task, event)).collect()
}

const SHARED: Event = Event::Lock { shared: true };
const EXCLUSIVE: Event = Event::Lock { shared: false };
const UNLOCK: Event = Event::Unlock { shared: false, debt: false };
const ASK: Event = Event::FlushBegin { start: 0, end: u64::MAX };
const DELIVERED: Event = Event::FlushEnd { start: 0, end: u64::MAX };

/// An exclusive change of the leaf at `gfn`.
fn changed(gfn: u64, old: u64, new: u64) -> Event {
    Event::SpteChanged { as_id: 0, root: ROOT, gfn, level: 1, old, new, shared: false }
}

fn table(pfn: u64) -> u64 {
    format().table(pfn, false).raw()
}

/// The entry of level 2 at gfn 0.
fn linked(old: u64, new: u64) -> Event {
    Event::SpteChanged { as_id: 0, root: ROOT, gfn: 0, level: 2, old, new, shared: true }
}

fn without_dirty(pfn: u64) -> u64 {
    leaf(pfn) & !format().dirty
}

/// A task zaps 600 leaves of a 2 MiB piece after the other, without a check.
fn long_work() -> impl Iterator<Item = Event> {
    (0..3000).map(|gfn| changed(gfn, leaf(gfn), empty()))
}

fn fills() -> Vec<Event> {
    vec![
        Event::TlbFill { vcpu: 0, root: ROOT, gfn: 5, level: 1, spte: leaf(9) },
        Event::StructureFill { vcpu: 0, root: ROOT, gfn: 5, level: 1, table: 101 },
    ]
}

const ENTER: Event = Event::GuestEnter { vcpu: 0, root: ROOT };

/// A small VM with the page at gfn 5 mapped, and its judge.
fn machine() -> (Vm<Real>, Arc<Judge>) {
    let profile = KernelProfile::named("6.12").expect("known");
    let mut config =
        VmConfig { max_tables: 256, hugepages: false, host_pages: 1 << 18, ..VmConfig::new(profile) };
    let rules = Rules::of(&profile, config.format.with_maxphyaddr(config.maxphyaddr), "sync");
    let judge = Judge::new(Rules { silenced: silenced(), order: Order::True, check: Check::Full, ..rules });
    config.observer = Some(judge.clone());
    let vm = Vm::new(config).expect("a small VM");
    vm.add_memory(&vm.task("setup", Role::Caller), 0, 100, 1).expect("memory");
    vm.vcpu(0).expect("free").access(GuestAccess::write(5)).expect("memory");
    (vm, judge)
}

/// What the check of a whole VM finds after `damage`; nothing before.
fn checked(damage: impl FnOnce(&Vm<Real>, &Judge)) -> BTreeSet<Rule> {
    let (vm, judge) = machine();
    let task = vm.task("judge", Role::Observer);
    judge.check_vm(&vm, &task);
    assert_eq!(judge.violations(), [], "before the damage");
    damage(&vm, &judge);
    judge.check_vm(&vm, &task);
    judge.violations().into_iter().map(|v| v.rule).collect()
}

/// Puts `value` into the small entry of `gfn`, beside the one of gfn 5.
fn poke(vm: &Vm<Real>, gfn: u64, value: impl FnOnce(u64) -> u64) {
    let mmu = vm.mmu();
    let (mut at, mut level) = (mmu.first_root().expect("loaded"), mmu.root_level());
    let cell = |table, level| &mmu.pool().entries(table)[index(gfn, level)];
    while level > 1 {
        at = Spte(Real::load(cell(at, level), Site::SpteRead)).pfn() as u32;
        level -= 1;
    }
    let cell = cell(at, 1);
    Real::store(cell, value(Real::load(cell, Site::SpteRead)), Site::SpteZap);
}

fn answers(answers: &[(u32, Call, Answer)]) -> BTreeSet<Rule> {
    checked(|_, judge| {
        for (task, call, answer) in answers {
            let call = judge.called(*task, call.clone());
            judge.answered(call, *answer);
        }
    })
}

pub const TOLD: &[Canary] = &[
    ("a leaf goes, and mmu_lock with it, unflushed", Rule::FlushMissing, || {
        heard(&after_root(on(2, [EXCLUSIVE, changed(5, leaf(9), empty()), UNLOCK])))
    }),
    ("a flush that began before the change does not pay", Rule::FlushMissing, || {
        heard(&after_root(on(2, [EXCLUSIVE, ASK, changed(5, leaf(9), empty()), DELIVERED, UNLOCK])))
    }),
    ("a flush that begins behind the change does not cover it", Rule::FlushMissing, || {
        let (begin, end) = (Event::FlushBegin { start: 6, end: 99 }, Event::FlushEnd { start: 6, end: 99 });
        heard(&after_root(on(2, [EXCLUSIVE, changed(5, leaf(9), empty()), begin, end, UNLOCK])))
    }),
    ("an invalidation ends before the flush", Rule::FlushMissing, || {
        let ending = Event::NotifierEnding { start: 0, end: 10 };
        heard(&after_root([(2, EXCLUSIVE), (2, changed(5, leaf(9), empty())), (3, ending)]))
    }),
    ("a table goes, and the read section ends unflushed", Rule::FlushLate, || {
        heard(&after_root(on(2, [SHARED, Event::RcuEnter, linked(table(101), empty()), Event::RcuLeave])))
    }),
    ("a flush leaves a vCPU alone", Rule::FlushUndelivered, || {
        heard(&after_root([(9, ENTER), (1, ASK), (1, DELIVERED)]))
    }),
    ("a table is freed under a walker's cache", Rule::FreedWhileCached, || {
        let end = [Event::TableUnlink { table: 101, level: 1, gfn: 0 }, Event::TableFree { table: 101 }];
        heard(&after_root(on(9, [ENTER].into_iter().chain(fills()).chain(end))))
    }),
    ("a frame is released under a TLB", Rule::ReleasedWhileCached, || {
        let end = Event::FrameRelease { pfn: 8, count: 2 };
        heard(&after_root(on(9, [ENTER].into_iter().chain(fills()).chain([end]))))
    }),
    ("a root's page comes back, and its translations with it", Rule::StaleTag, || {
        heard(&on(9, fills()).into_iter().chain(root()).chain([(9, ENTER)]).collect::<Vec<_>>())
    }),
    ("a guest reads another's frame", Rule::StaleAccess, || {
        heard(&[(9, Event::FrameStale { pfn: 9, what: "a guest's access" })])
    }),
    ("a zap marks another's frame dirty", Rule::StaleWriteBack, || {
        heard(&[(9, Event::FrameStale { pfn: 9, what: "a write-back of Dirty" })])
    }),
    ("hardware walks a freed table", Rule::WalkedFreed, || {
        let walk = Event::StructureUse { vcpu: 0, root: ROOT, gfn: 5, level: 1, table: 101 };
        heard(&after_root([(1, Event::TableFree { table: 101 }), (9, walk)]))
    }),
    ("a frame is released, and a leaf maps it", Rule::MappedAfterRelease, || {
        heard(&after_root(on(
            2,
            [SHARED, spte(5, empty(), leaf(9)), Event::FrameRelease { pfn: 9, count: 1 }],
        )))
    }),
    ("a table is freed under a reader", Rule::FreedUnderReader, || {
        let unlink = Event::TableUnlink { table: 101, level: 1, gfn: 0 };
        heard(&after_root([(3, Event::RcuEnter), (1, unlink), (1, Event::TableFree { table: 101 })]))
    }),
    ("the root list is read without protection", Rule::ReadUnprotected, || {
        heard(&on(3, [SHARED, Event::RcuRead { what: "the list of roots" }]))
    }),
    ("a zap never checks", Rule::StepTooLong, || {
        let begin = [EXCLUSIVE, Event::RootZapBegin { root: ROOT }];
        heard(&after_root(on(3, begin.into_iter().chain(long_work()))))
    }),
    ("a section never ends", Rule::SectionTooLong, || {
        let begin = [Event::RcuEnter, Event::RootZapBegin { root: ROOT }];
        heard(&after_root(on(3, begin.into_iter().chain(long_work()))))
    }),
    ("a fault goes round and round", Rule::RetryWithoutCause, || {
        heard(&on(3, std::iter::repeat_n(Event::FaultRetry { as_id: 0, gfn: 5 }, 9)))
    }),
    ("a store overwrites what hardware has set", Rule::DirtyLost, || {
        let (old, new) = (without_dirty(9), without_dirty(9) | format().dirty);
        let marked = Event::SpteMarked { root: ROOT, table: 101, gfn: 5, level: 1, old, new };
        heard(&after_root([(9, marked), (2, EXCLUSIVE), (2, changed(5, old, empty()))]))
    }),
    ("a dirty leaf goes, and the host is not told", Rule::WriteBackMissing, || {
        let dirty = leaf(9) | format().dirty;
        let begin = [Event::VmBegin { vcpus: 1, writes_back: true }, EXCLUSIVE];
        heard(&after_root(on(
            2,
            begin.into_iter().chain([changed(5, dirty, empty()), ASK, DELIVERED, UNLOCK]),
        )))
    }),
    ("a log is returned before the flush", Rule::WriteUnflushed, || {
        let read_only = format().without_write(Spte(leaf(9))).raw();
        let take =
            [Event::DirtyTake { as_id: 0, base: 0, mask: 1 << 5 }, EXCLUSIVE, changed(5, leaf(9), read_only)];
        let returned = Event::LogReturn { as_id: 0, start: 0, end: 64 };
        heard(&after_root(on(2, take.into_iter().chain([UNLOCK, returned]))))
    }),
    ("a protected gfn can be made writable", Rule::WriteTrackLeft, || {
        let read_only = format().without_write(Spte(leaf(9))).raw();
        let events =
            [SHARED, spte(5, empty(), read_only), Event::WriteProtected { as_id: 0, gfn: 5, level: 1 }];
        heard(&after_root(on(2, events)))
    }),
    ("a table's entry loses W", Rule::TableProtected, || {
        let lost = table(101) & !format().write;
        heard(&after_root(on(2, [SHARED, linked(empty(), table(101)), linked(table(101), lost)])))
    }),
    ("a fault maps another frame than it was told", Rule::MappedElsewhere, || {
        let told =
            [Event::LookUp { as_id: 0, gfn: 5 }, Event::Resolved { as_id: 0, gfn: 5, pfn: 8, level: 1 }];
        heard(&after_root(on(2, told.into_iter().chain([SHARED, spte(5, empty(), leaf(9))]))))
    }),
    ("a table is an NX candidate twice", Rule::NxList, || {
        heard(&on(2, [Event::NxListed { table: 101 }, Event::NxListed { table: 101 }]))
    }),
    ("a table is freed as an NX candidate", Rule::NxList, || {
        heard(&on(2, [Event::NxListed { table: 101 }, Event::TableFree { table: 101 }]))
    }),
    ("a table is unlinked before it was linked", Rule::UnlinkedEarly, || {
        let unlink = Event::TableUnlink { table: 101, level: 1, gfn: 0 };
        heard(&after_root([(1, Event::TableAlloc { table: 101, level: 1, gfn: 0 }), (2, unlink)]))
    }),
    ("mmu_lock is held shared for an exclusive write", Rule::WrongLockMode, || {
        heard(&after_root(on(2, [SHARED, changed(5, empty(), leaf(9))])))
    }),
    ("an entry changes without mmu_lock", Rule::ChangedUnlocked, || {
        heard(&after_root(on(2, [EXCLUSIVE, UNLOCK, changed(5, empty(), leaf(9))])))
    }),
    ("two tasks take two locks in two orders", Rule::LockOrder, || {
        let take = |lock| Event::Acquire { lock, shared: false };
        let give = |lock| Event::Release { lock };
        let (slots, mmap) = (LockClass::Slots, LockClass::Mmap);
        let mut events = on(2, [take(slots), take(mmap), give(mmap), give(slots)]);
        events.extend(on(3, [take(mmap), take(slots)]));
        heard(&events)
    }),
    ("a task sleeps under mmu_lock", Rule::SleptAtomic, || {
        heard(&on(2, [SHARED, Event::MightSleep { what: "an allocation" }]))
    }),
    ("a task sleeps inside a read section", Rule::SleptAtomic, || {
        heard(&on(2, [Event::RcuEnter, Event::Acquire { lock: LockClass::Slots, shared: false }]))
    }),
    ("a page that was looked up before an invalidation is mapped after it", Rule::StaleLookUp, || {
        let (start, end) = (0, 10);
        let invalidation = [Event::NotifierActive { start, end }, Event::NotifierEnding { start, end }];
        let mut events = on(2, [Event::LookUp { as_id: 0, gfn: 5 }]);
        events.extend(on(3, invalidation));
        events.extend(on(2, [SHARED, spte(5, empty(), leaf(9))]));
        heard(&after_root(events))
    }),
    ("a page is mapped while it is being taken away", Rule::StaleLookUp, || {
        let mut events = on(3, [Event::NotifierActive { start: 0, end: 10 }]);
        events.extend(on(2, [Event::LookUp { as_id: 0, gfn: 5 }, SHARED, spte(5, empty(), leaf(9))]));
        heard(&after_root(events))
    }),
    ("a work item outlives its VM", Rule::WorkAfterEnd, || {
        heard(&on(2, [Event::VmGone, Event::WorkBegin { root: ROOT, waited_ns: 0 }]))
    }),
    ("a work item has no user reference", Rule::WorkUnreferenced, || {
        let begin = Event::WorkBegin { root: ROOT, waited_ns: 0 };
        heard(&on(2, [Event::Users { users: 2 }, Event::Users { users: 0 }, begin]))
    }),
    ("an entry changes below a root that is none", Rule::UnknownRoot, || {
        heard(&on(2, [spte(5, empty(), leaf(9))]))
    }),
    ("a guest's write is in no log", Rule::WriteLost, || {
        checked(|_, judge| {
            judge.event(1, &Event::LogBegin { as_id: 0, start: 0, end: 100, all_set: false });
            let access = Event::GuestAccess { vcpu: 0, as_id: 0, root: ROOT, gfn: 5, pfn: 9, write: true };
            judge.event(9, &access);
        })
    }),
    ("a leaf beyond its slot", Rule::SlotDiffers, || checked(|vm, _| poke(vm, 200, |_| leaf(9)))),
    ("a leaf maps what the host does not", Rule::HostDiffers, || {
        checked(|vm, _| poke(vm, 5, |old| old + (1 << 12)))
    }),
    ("a stale answer after a zap", Rule::NotLinearizable, || {
        let zap = (2, Call::Zap(0..10), Answer::Done);
        answers(&[(1, Call::Fault(5), Answer::Mapped(9)), zap, (1, Call::LookUp(5), Answer::Mapped(9))])
    }),
];

/// Histories in which all that is owed is paid.
pub const SOUND: &[(&str, fn() -> BTreeSet<Rule>)] = &[
    ("a flush before the unlock", || {
        heard(&after_root(on(2, [EXCLUSIVE, changed(5, leaf(9), empty()), ASK, DELIVERED, UNLOCK])))
    }),
    ("two flushes that cover it together", || {
        let half = |start, end| [Event::FlushBegin { start, end }, Event::FlushEnd { start, end }];
        let zap = [EXCLUSIVE, changed(5, leaf(9), empty()), changed(6, leaf(10), empty())];
        heard(&after_root(on(2, zap.into_iter().chain(half(0, 6)).chain(half(6, 9)).chain([UNLOCK]))))
    }),
    ("a zap under a root that is invalid", || {
        let begin = [EXCLUSIVE, Event::RootSchedule { root: ROOT }, Event::RootInvalidate { root: ROOT }];
        heard(&after_root(on(2, begin.into_iter().chain([changed(5, leaf(9), empty()), UNLOCK]))))
    }),
    ("what was frozen was flushed before it is told", || {
        let frozen = Event::SpteFrozen { as_id: 0, root: ROOT, gfn: 5, level: 1, old: leaf(9) };
        heard(&after_root(on(2, [EXCLUSIVE, frozen, ASK, DELIVERED, changed(5, leaf(9), empty()), UNLOCK])))
    }),
    ("a vCPU that has answered", || {
        let answer = [Event::GuestExit { vcpu: 0 }, Event::TlbFlush { vcpu: 0 }, ENTER];
        let mut events = vec![(9, ENTER), (1, ASK)];
        events.extend(on(9, answer));
        events.push((1, DELIVERED));
        heard(&after_root(events))
    }),
    ("a reader that came after the unlink", || {
        let unlink = Event::TableUnlink { table: 101, level: 1, gfn: 0 };
        let alloc = Event::TableAlloc { table: 101, level: 1, gfn: 0 };
        let link = Event::TableLink { table: 101, parent: ROOT, index: 0 };
        let late = [(3, Event::RcuEnter), (1, Event::TableFree { table: 101 })];
        heard(&after_root(on(1, [alloc, link, unlink]).into_iter().chain(late)))
    }),
    ("a fault that looked again", || {
        let (start, end) = (0, 10);
        let mut events = on(3, [Event::NotifierActive { start, end }, Event::NotifierEnding { start, end }]);
        let told =
            [Event::LookUp { as_id: 0, gfn: 5 }, Event::Resolved { as_id: 0, gfn: 5, pfn: 9, level: 1 }];
        events.extend(on(2, told.into_iter().chain([SHARED, spte(5, empty(), leaf(9))])));
        heard(&after_root(events))
    }),
    ("retries while another holds mmu_lock", || {
        let retries = on(3, std::iter::repeat_n(Event::FaultRetry { as_id: 0, gfn: 5 }, 20));
        heard(&[(2, SHARED)].into_iter().chain(retries).collect::<Vec<_>>())
    }),
    ("answers in order", || {
        let zap = (2, Call::Zap(0..10), Answer::Done);
        answers(&[(1, Call::Fault(5), Answer::Mapped(9)), zap, (1, Call::LookUp(5), Answer::Absent)])
    }),
    ("references go, and nobody is accused", || {
        let put = |refs, owner| Event::RootPut { root: ROOT, refs, owner };
        heard(&after_root(on(2, [SHARED, put(1, Owner::Vcpu)])))
    }),
];
