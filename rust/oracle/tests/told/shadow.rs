//! Canaries of the shadow MMU's book: the life of shadow pages, told by hand, with one thing wrong.

use std::collections::BTreeSet;

use tdpmmu_oracle::Rule;
use tdpmmu_platform::Event;

use super::super::{Canary, empty, leaf};
use super::{ASK, DELIVERED, ENTER, EXCLUSIVE, SHARED, UNLOCK, heard, on};

const TOP: u32 = 50;
const BELOW: u32 = 51;

const LINK: Event = Event::ShadowLink { parent: TOP, index: 0, child: BELOW };
const UNLINK: Event = Event::ShadowUnlink { parent: TOP, index: 0, child: BELOW };
const TOGGLE: Event = Event::ShadowToggle { generation: 1 };
const ZAP: Event = Event::ShadowZap { table: BELOW };
const FREE: Event = Event::ShadowFree { table: BELOW };
const BACK: Event = Event::TableFree { table: BELOW };

const fn made(table: u32, level: u8) -> Event {
    Event::ShadowAlloc { table, as_id: 0, gfn: 0, role: level as u32, level }
}

fn change(old: u64, new: u64) -> Event {
    Event::ShadowLeaf { as_id: 0, table: BELOW, index: 5, gfn: 5, level: 1, old, new }
}

/// A root and a page below it that maps gfn 5.
fn born() -> Vec<Event> {
    vec![EXCLUSIVE, made(TOP, 2), made(BELOW, 1), LINK, change(empty(), leaf(9)), UNLOCK]
}

/// They become obsolete and are zapped by a fast zap, flushed for, and freed.
fn life() -> Vec<Event> {
    let mut events = born();
    events.extend([
        EXCLUSIVE,
        TOGGLE,
        Event::FastZapBegin,
        change(leaf(9), empty()),
        UNLINK,
        ZAP,
        Event::ShadowZap { table: TOP },
        ASK,
        DELIVERED,
        FREE,
        BACK,
        Event::ShadowFree { table: TOP },
        Event::TableFree { table: TOP },
        UNLOCK,
        Event::FastZapEnd,
    ]);
    events
}

fn without(out: &[Event]) -> BTreeSet<Rule> {
    let events: Vec<Event> = life().into_iter().filter(|event| !out.contains(event)).collect();
    heard(&on(2, events))
}

fn after(event: &Event, more: impl IntoIterator<Item = Event>) -> BTreeSet<Rule> {
    let mut events = life();
    let at = events.iter().position(|e| e == event).expect("part of the life") + 1;
    events.splice(at..at, more);
    heard(&on(2, events))
}

/// One task walks without a lock while another does `work`.
fn walked(begin: Event, work: impl IntoIterator<Item = Event>) -> BTreeSet<Rule> {
    let mut events = on(2, born());
    events.extend(on(3, [begin, Event::ShadowWalked { table: TOP }]));
    events.extend(on(2, work));
    heard(&events)
}

fn zap_of_one() -> [Event; 9] {
    [EXCLUSIVE, change(leaf(9), empty()), UNLINK, ZAP, ASK, DELIVERED, FREE, BACK, UNLOCK]
}

/// Pages without parents, made one by one.
fn many(count: u32) -> impl Iterator<Item = Event> {
    (0..count).map(|n| Event::ShadowAlloc {
        table: 100 + n,
        as_id: 0,
        gfn: u64::from(n) << 9,
        role: 1,
        level: 1,
    })
}

fn zaps(from: u32, to: u32) -> impl Iterator<Item = Event> {
    (from..to).map(|n| Event::ShadowZap { table: 100 + n })
}

pub const TOLD: &[Canary] = &[
    ("a shadow page is zapped twice", Rule::ShadowLife, || after(&ZAP, [ZAP])),
    ("a shadow page is freed that nobody zapped", Rule::ShadowLife, || without(&[ZAP])),
    ("a shadow page is freed behind reclamation's back", Rule::ShadowLife, || without(&[FREE])),
    ("a shadow page is handed out twice", Rule::HandedOutTwice, || after(&LINK, [made(BELOW, 1)])),
    ("a shadow page is linked twice at one place", Rule::LinkedTwice, || after(&LINK, [LINK])),
    ("a shadow page is unlinked where it was not", Rule::UnlinkedTwice, || after(&UNLINK, [UNLINK])),
    ("a shadow page is zapped and linked", Rule::FreedWhileLinked, || without(&[UNLINK])),
    ("a shadow page is zapped with a leaf in it", Rule::FreedUnzapped, || {
        without(&[change(leaf(9), empty())])
    }),
    ("shadow pages are freed without a flush", Rule::FreedUnflushed, || without(&[ASK, DELIVERED])),
    ("a flush that began before the zap does not serve", Rule::FreedUnflushed, || {
        let zap = [EXCLUSIVE, ASK, change(leaf(9), empty()), UNLINK, ZAP, DELIVERED, FREE, BACK, UNLOCK];
        heard(&on(2, born().into_iter().chain(zap)))
    }),
    ("a shadow page is zapped with mmu_lock held shared", Rule::WrongLockMode, || {
        let zap = [SHARED, change(leaf(9), empty()), UNLINK, ZAP];
        heard(&on(2, born().into_iter().chain(zap)))
    }),
    ("a shadow page is linked without mmu_lock", Rule::ChangedUnlocked, || {
        heard(&on(2, [EXCLUSIVE, made(TOP, 2), made(BELOW, 1), UNLOCK, LINK]))
    }),
    ("a child inherits role.invalid", Rule::CreatedUnderInvalid, || {
        let role = 1 << 11 | 1;
        heard(&on(2, [EXCLUSIVE, Event::ShadowAlloc { table: BELOW, as_id: 0, gfn: 0, role, level: 1 }]))
    }),
    ("a leaf is made in a zapped page", Rule::CreatedUnderInvalid, || {
        after(&ZAP, [change(empty(), leaf(9))])
    }),
    ("a table is linked below an obsolete page", Rule::CreatedUnderInvalid, || {
        after(&TOGGLE, [made(52, 1), Event::ShadowLink { parent: TOP, index: 1, child: 52 }])
    }),
    ("a leaf of the shadow MMU goes twice", Rule::BrokenHistory, || {
        after(&change(leaf(9), empty()), [change(leaf(9), empty())])
    }),
    ("a leaf of the shadow MMU moves", Rule::LeafMoved, || {
        let moved = change(leaf(9), leaf(10));
        heard(&on(2, born().into_iter().chain([EXCLUSIVE, moved])))
    }),
    ("a leaf of a page in use goes unflushed", Rule::FlushMissing, || {
        heard(&on(2, born().into_iter().chain([EXCLUSIVE, change(leaf(9), empty()), UNLOCK])))
    }),
    ("a frame is released that a shadow leaf maps", Rule::MappedAfterRelease, || {
        heard(&on(2, born().into_iter().chain([Event::FrameRelease { pfn: 9, count: 1 }])))
    }),
    ("D of a shadow leaf is stored over", Rule::DirtyLost, || {
        let dirty = super::super::format().dirty;
        let clean = leaf(9) & !dirty;
        let mark =
            Event::SpteMarked { root: TOP, table: BELOW, gfn: 5, level: 1, old: clean, new: clean | dirty };
        let made = [EXCLUSIVE, made(TOP, 2), made(BELOW, 1), LINK, change(empty(), clean)];
        heard(&on(2, made.into_iter().chain([mark, change(clean, empty())])))
    }),
    ("a fast zap leaves a shadow page that it met", Rule::FastZapLeft, || {
        without(&[UNLINK, ZAP, FREE, BACK, change(leaf(9), empty())])
    }),
    ("a fast zap yields before it comes anywhere", Rule::ZapProgress, || {
        let begin = [EXCLUSIVE].into_iter().chain(many(30)).chain([TOGGLE, Event::FastZapBegin]);
        let yielding = [Event::YieldCheck, UNLOCK, EXCLUSIVE];
        heard(&on(2, begin.chain(zaps(0, 4)).chain(yielding).chain(zaps(4, 30))))
    }),
    ("shadow pages are zapped and nobody looks up", Rule::StepTooLong, || {
        heard(&on(2, [EXCLUSIVE].into_iter().chain(many(70)).chain([TOGGLE]).chain(zaps(0, 70))))
    }),
    ("a page is freed under a vCPU that reads shadow page tables", Rule::FreedUnderReader, || {
        walked(Event::ReadingBegin { vcpu: 1 }, zap_of_one())
    }),
    ("a page is freed under a walk in a read section", Rule::FreedUnderReader, || {
        walked(Event::RcuEnter, zap_of_one())
    }),
    ("a walk stands on a page that was freed", Rule::WalkedFreed, || {
        let walk = [Event::ReadingBegin { vcpu: 1 }, Event::ShadowWalked { table: BELOW }];
        heard(&on(2, born().into_iter().chain(zap_of_one()).chain(walk)))
    }),
    ("a shadow page goes that a vCPU has in its paging-structure cache", Rule::FreedWhileCached, || {
        let fill = Event::StructureFill { vcpu: 0, root: TOP, gfn: 5, level: 1, table: BELOW };
        let mut events = on(2, born());
        events.extend(on(9, [Event::GuestEnter { vcpu: 0, root: TOP }, fill]));
        events.extend(on(2, zap_of_one()));
        heard(&events)
    }),
    ("a shadow leaf is made from a look-up before an invalidation", Rule::StaleLookUp, || {
        let look = Event::LookUp { as_id: 0, gfn: 5 };
        let gone = [
            EXCLUSIVE,
            Event::NotifierActive { start: 0, end: 10 },
            Event::NotifierEnding { start: 0, end: 10 },
            UNLOCK,
        ];
        let mut events = on(2, [EXCLUSIVE, made(TOP, 2), made(BELOW, 1), LINK, UNLOCK, look]);
        events.extend(on(3, gone));
        events.extend(on(2, [EXCLUSIVE, change(empty(), leaf(9))]));
        heard(&events)
    }),
];

pub const SOUND: &[(&str, fn() -> BTreeSet<Rule>)] = &[
    ("the life of two shadow pages", || heard(&on(2, life()))),
    ("obsolete pages are zapped across a yield, and flushed for at the end", || {
        let begin = [EXCLUSIVE].into_iter().chain(many(30)).chain([TOGGLE, Event::FastZapBegin]);
        let yielding = || [Event::YieldCheck, UNLOCK, EXCLUSIVE];
        let zap = begin.chain(zaps(0, 10)).chain(yielding()).chain(zaps(10, 27)).chain(yielding());
        heard(&on(2, zap.chain(zaps(27, 30)).chain([ASK, DELIVERED, UNLOCK, Event::FastZapEnd])))
    }),
    ("a walk that began after the zap may stay", || {
        let mut events = on(2, born());
        let [zap @ .., free, back, unlock] = zap_of_one();
        events.extend(on(2, zap));
        events.extend(on(3, [Event::ReadingBegin { vcpu: 1 }, Event::ShadowWalked { table: TOP }]));
        events.extend(on(2, [free, back, unlock]));
        heard(&events)
    }),
    ("a read section that walks no shadow page keeps none", || {
        let mut events = on(2, born());
        events.extend(on(3, [Event::RcuEnter]));
        events.extend(on(2, zap_of_one()));
        heard(&events)
    }),
    ("a page of the pool serves one MMU after the other", || {
        let table = Event::TableAlloc { table: BELOW, level: 1, gfn: 0 };
        heard(&on(2, life().into_iter().chain([table, ENTER])))
    }),
];
