//! What the engine did, written down as it happened.
//!
//! **Guarantee.** Every SPTE change, and every birth and death of a table, is written once, with the input that caused it. The same inputs give the same text.
//!
//! **Mechanism.** The scribe is the engine's observer. A report from one of the stage's threads belongs to the input that this thread is at; one from a worker of the engine
//! belongs to the root it works on, and nothing else is known of its place.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tdpmmu_platform::{Event, Observer};
use tdpmmu_spte::Role;
use tdpmmu_vm::VmStats;

use super::inputs::NO_OP;
use super::load::Case;
use super::names::{Change, NO_ROOT, NO_TABLE, Names, is_table, root_name, root_text, table_of};
use super::thread::{count_change, current};

/// Not an input: a worker's.
pub const NO_INPUT: u32 = u32::MAX;

/// One predicted transition.
#[derive(Clone, Copy, Debug)]
pub struct Predicted {
    /// The input that caused it, an index; [`NO_INPUT`] for a worker's.
    pub input: u32,
    /// The change.
    pub change: Change,
    /// It happens only if hardware has set Accessed meanwhile.
    pub optional: bool,
}

/// A table that came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PredictedLife {
    /// The input that caused it, an index; [`NO_INPUT`] for a worker's.
    pub input: u32,
    /// It came; else it was torn down.
    pub birth: bool,
    /// Level of its entries.
    pub level: u8,
    /// First gfn.
    pub gfn: u64,
}

/// What an operation came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Pages in the bitmap that was read.
    pub dirty_pages: Option<u64>,
    /// First dirty page, relative to the slot; -1 without one.
    pub first: Option<i64>,
    /// Last dirty page, relative to the slot; -1 without one.
    pub last: Option<i64>,
    /// Ring entries collected.
    pub collected: Option<u64>,
    /// Ring entries reset.
    pub reset: Option<u64>,
    /// The engine refused.
    pub refused: Option<String>,
    /// Leaves per level before the VM went.
    pub pages: Option<[i64; 3]>,
}

/// Everything that was written.
#[derive(Default)]
pub struct Book {
    /// Transitions, in the order in which they happened.
    pub transitions: Vec<Predicted>,
    /// Tables that came and went.
    pub lives: Vec<PredictedLife>,
    /// (line of the input, number of the operation, statistics).
    pub stats: Vec<(u64, u64, VmStats)>,
    /// What operations came to, by index.
    pub outcomes: HashMap<u32, Outcome>,
    /// Inputs that an earlier one has carried out already, and that one.
    pub covered: HashMap<u32, u32>,
    /// Yields that were taken.
    pub yields: u64,
    /// Notes of the driver: inputs it could not carry out.
    pub notes: Vec<(u32, String)>,
    names: Names,
    roots: HashMap<(u64, u32), u32>,
    root_counts: [u32; 2],
    /// Places whose Accessed bit was set by the driver, for the input at hand.
    forced: HashSet<(u8, u8, u64)>,
}

/// Works of the zap queue: how many were queued, begun, ended, and how many may begin.
#[derive(Default)]
struct Works {
    queued: u64,
    ended: u64,
    permits: u64,
    /// No work is held back.
    free: bool,
}

/// The engine's observer.
pub struct Scribe {
    book: Mutex<Book>,
    works: Mutex<Works>,
    moved: Condvar,
}

impl Default for Scribe {
    fn default() -> Self {
        Self { book: Mutex::default(), works: Mutex::default(), moved: Condvar::new() }
    }
}

impl Scribe {
    /// What is written so far.
    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the book away.
    pub fn take_book(&self) -> Book {
        std::mem::take(&mut *self.book())
    }

    fn works(&self) -> MutexGuard<'_, Works> {
        self.works.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The Accessed bits of these places were set by the driver: an aging event of theirs depends on hardware.
    pub fn force(&self, places: impl Iterator<Item = (u8, u8, u64)>) {
        let mut book = self.book();
        book.forced.clear();
        book.forced.extend(places);
    }

    /// Lets works begin freely, or not.
    pub fn free_works(&self, free: bool) {
        self.works().free = free;
        self.moved.notify_all();
    }

    /// Lets one waiting work run and waits for its end. False: none waits, or it does not end.
    pub fn run_a_work(&self, patience: Duration) -> bool {
        let mut works = self.works();
        if works.ended + works.permits >= works.queued {
            return false;
        }
        works.permits += 1;
        let until = works.ended + 1;
        self.moved.notify_all();
        let deadline = Instant::now() + patience;
        while works.ended < until {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            works = self.moved.wait_timeout(works, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn work_begins(&self) {
        let mut works = self.works();
        while !works.free && works.permits == 0 {
            works = self.moved.wait(works).unwrap_or_else(PoisonError::into_inner);
        }
        if !works.free {
            works.permits -= 1;
        }
    }
}

/// The scribe's ear in one VM: page numbers mean something within one only.
pub struct Ear {
    /// Who writes.
    pub scribe: Arc<Scribe>,
    /// Unique among the VMs of a case.
    pub vm: u64,
}

impl Observer for Ear {
    fn event(&self, _task: u32, event: &Event) {
        self.scribe.hear(self.vm, event);
    }
}

impl Scribe {
    fn hear(&self, vm: u64, event: &Event) {
        match *event {
            Event::SpteChanged { as_id, root, gfn, level, old, new, .. } => {
                let mut book = self.book();
                let book = &mut *book;
                let root = book.roots.get(&(vm, root)).copied().unwrap_or(NO_ROOT);
                let change = book.names.change(vm, root, (as_id, gfn, level), old, new);
                let optional = !book.forced.is_empty() && book.forced.contains(&(as_id, level, gfn));
                let input = current().map_or(NO_INPUT, |(_, input)| input);
                book.transitions.push(Predicted { input, change, optional });
                count_change();
            }
            Event::RootAlloc { root, role, .. } => {
                let mut book = self.book();
                let as_id = Role(role).as_id();
                let n = book.root_counts[usize::from(as_id)];
                book.root_counts[usize::from(as_id)] += 1;
                book.roots.insert((vm, root), root_name(as_id, n));
            }
            Event::TableAlloc { level, gfn, .. } => {
                let input = current().map_or(NO_INPUT, |(_, input)| input);
                let mut book = self.book();
                book.lives.push(PredictedLife { input, birth: true, level, gfn });
            }
            Event::TableUnlink { level, gfn, .. } => {
                let input = current().map_or(NO_INPUT, |(_, input)| input);
                self.book().lives.push(PredictedLife { input, birth: false, level, gfn });
            }
            Event::RootSchedule { .. } => self.works().queued += 1,
            Event::WorkBegin { .. } => self.work_begins(),
            Event::WorkEnd { .. } => {
                self.works().ended += 1;
                self.moved.notify_all();
            }
            _ => {}
        }
    }
}

/// A prediction, as a file: one line a transition, stable.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// `tdpmmu.predict/1`.
    pub schema: &'static str,
    /// The case.
    pub name: String,
    /// The kernel's folder.
    pub kernel: String,
    /// The profile used.
    pub profile: String,
    /// Threads by index.
    pub threads: Vec<String>,
    /// `thread operation cause root as:gfn/level old > new`, one per transition, thread by thread; workers' last, root by root.
    pub transitions: Vec<String>,
    /// `+` or `-`, level and gfn of tables that came and went, thread by thread.
    pub tables: Vec<String>,
    /// KVM's statistics after each operation, by number.
    pub statistics: Vec<(u64, [i64; 3], u64, u64)>,
}

impl Prediction {
    /// Puts the book in an order that does not depend on workers.
    pub fn new(case: &Case, profile: String, book: &Book) -> Self {
        let thread_of = |input: u32| case.inputs.get(input as usize).map_or(u32::MAX, |input| input.thread);
        let mut order: Vec<usize> = (0..book.transitions.len()).collect();
        order.sort_by_key(|&at| {
            let one = &book.transitions[at];
            let thread = thread_of(one.input);
            (thread, if thread == u32::MAX { one.change.root } else { 0 })
        });
        let transitions = order.iter().map(|&at| text_of(case, &book.transitions[at])).collect();
        let mut lives: Vec<&PredictedLife> = book.lives.iter().collect();
        lives.sort_by_key(|life| thread_of(life.input));
        let workers: BTreeSet<String> =
            lives.iter().filter(|life| life.input == NO_INPUT).map(|life| life_text(life)).collect();
        let own = lives.iter().filter(|life| life.input != NO_INPUT).map(|life| life_text(life));
        let tables = own.chain(workers).collect();
        let statistics = book
            .stats
            .iter()
            .map(|(_, number, s)| {
                (*number, [s.pages_4k, s.pages_2m, s.pages_1g], s.pf_fixed, s.nx_lpage_splits)
            })
            .collect();
        Self {
            schema: "tdpmmu.predict/1",
            name: case.name.clone(),
            kernel: case.kernel.clone(),
            profile,
            threads: case.threads.clone(),
            transitions,
            tables,
            statistics,
        }
    }
}

fn life_text(life: &PredictedLife) -> String {
    format!("{}{}/{:x}", if life.birth { '+' } else { '-' }, life.level, life.gfn)
}

fn text_of(case: &Case, one: &Predicted) -> String {
    let mut text = String::with_capacity(64);
    match case.inputs.get(one.input as usize) {
        Some(input) => {
            let op = if input.op == NO_OP { 0 } else { case.script.operations[input.op as usize].number };
            let _ = write!(text, "{} {op} {} ", input.thread, input.what.name());
        }
        None => text.push_str("worker "),
    }
    text.push_str(&change_text(&one.change));
    if one.optional {
        text.push_str(" if accessed");
    }
    text
}

/// A change for people.
pub fn change_text(change: &Change) -> String {
    let Change { root, as_id, level, gfn, old, new } = *change;
    format!(
        "{} as {as_id} gfn {gfn:x} level {level}: {} -> {}",
        root_text(root),
        value_text(old, level),
        value_text(new, level)
    )
}

fn value_text(value: u64, level: u8) -> String {
    if !is_table(value, level) {
        return format!("{value:x}");
    }
    match table_of(value) {
        NO_TABLE => format!("table ?|{:x}", value & 0xfff),
        n => format!("table {n}|{:x}", value & 0xfff),
    }
}
