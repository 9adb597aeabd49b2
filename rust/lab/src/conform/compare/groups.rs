//! Which transitions are compared with which.

use std::collections::BTreeMap;

use super::Entry;
use crate::conform::inputs::{NO_OP, What};
use crate::conform::load::Case;
use crate::conform::names::NO_ROOT;
use crate::conform::predict::{Book, NO_INPUT};
use crate::conform::recorded::Span;

/// What a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// One input of one thread, an index.
    Input(u32),
    /// What a thread did before its first input.
    Before(u32),
    /// An epoch in which vCPUs race.
    Race(u32),
    /// A root that a worker zapped.
    Root(u32),
}

impl Key {
    /// How the group is compared.
    pub fn rule(&self) -> &'static str {
        match self {
            Key::Input(_) | Key::Before(_) => "transitions of one thread, in order",
            Key::Race(_) => "transitions of an epoch in which vCPUs race, as a multiset",
            Key::Root(_) => "transitions of a worker under one root, in order",
        }
    }
}

/// Both sides of a comparison.
#[derive(Clone, Debug)]
pub struct Group {
    /// What it is.
    pub key: Key,
    /// Operation it belongs to.
    pub op: u32,
    /// Kind of input.
    pub cause: String,
    /// Thread, by name.
    pub thread: String,
    /// Line at which it begins.
    pub line: u64,
    /// An aging: some may be absent.
    pub aging: bool,
    /// What KVM did.
    pub recorded: Vec<Entry>,
    /// What the engine did.
    pub predicted: Vec<Entry>,
}

/// Stretches of lines in which some operation is open and two threads are in one at once.
pub fn races(spans: &[Span]) -> Vec<(u64, u64)> {
    let mut spans = spans.to_vec();
    spans.sort_unstable();
    let mut found = Vec::new();
    let mut epoch: Option<(u64, u64, u32, bool)> = None;
    for Span { begin, end, thread, .. } in spans {
        match &mut epoch {
            Some((_, until, first, racing)) if begin < *until => {
                *racing |= thread != *first;
                *until = (*until).max(end);
            }
            _ => {
                if let Some((from, until, _, true)) = epoch {
                    found.push((from, until));
                }
                epoch = Some((begin, end, thread, false));
            }
        }
    }
    if let Some((from, until, _, true)) = epoch {
        found.push((from, until));
    }
    found
}

/// Puts both sides into groups.
pub fn build(case: &Case, book: &Book) -> BTreeMap<Key, Group> {
    let races = races(&case.recorded.spans);
    let race_at = |line: u64| {
        let at = races.partition_point(|&(_, end)| end < line);
        races.get(at).filter(|&&(begin, _)| begin <= line).map(|_| at as u32)
    };
    let by_thread = inputs_by_thread(case);
    let heads = heads_of_walks(case);
    let key_of_input = |input: u32| {
        // One run of the recovery thread is announced once for each table.
        let input = book.covered.get(&input).copied().unwrap_or(input);
        let input = heads[input as usize];
        let it = &case.inputs[input as usize];
        match race_at(it.line) {
            Some(race) if !matches!(it.what, What::Age { .. }) => Key::Race(race),
            _ => Key::Input(input),
        }
    };
    let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
    let put = |groups: &mut BTreeMap<Key, Group>, key: Key, op: u32, thread: &str, line: u64| {
        groups.entry(key).or_insert_with(|| {
            let (cause, aging) = match key {
                Key::Input(input) => {
                    let what = case.inputs[input as usize].what;
                    (what.name(), matches!(what, What::Age { .. }))
                }
                Key::Before(_) => ("before", false),
                Key::Race(_) => ("race", false),
                Key::Root(_) => ("worker", false),
            };
            let (cause, thread) = (cause.to_owned(), thread.to_owned());
            Group { key, op, cause, thread, line, aging, recorded: Vec::new(), predicted: Vec::new() }
        });
    };
    for one in &case.recorded.transitions {
        let own = &by_thread[one.thread as usize];
        let before = own.partition_point(|&input| case.inputs[input as usize].line <= one.line);
        let worker = case.recorded.workers.contains(&one.thread);
        let input = before.checked_sub(1).map(|at| own[at]);
        let key = match input {
            _ if worker => Key::Root(one.change.root),
            Some(input) => key_of_input(input),
            None => match race_at(one.line) {
                Some(race) => Key::Race(race),
                None => Key::Before(one.thread),
            },
        };
        put(&mut groups, key, one.op, &case.threads[one.thread as usize], one.line);
        let entry = Entry { change: one.change, line: one.line, optional: false };
        if let Some(group) = groups.get_mut(&key) {
            group.recorded.push(entry);
        }
    }
    // A worker's roots may have no names on the recorded side; then all of them are one group.
    let nameless = groups.contains_key(&Key::Root(NO_ROOT));
    for one in &book.transitions {
        let (key, op, thread, line) = if one.input == NO_INPUT {
            let root = if nameless { NO_ROOT } else { one.change.root };
            (Key::Root(root), NO_OP, "worker", 0)
        } else {
            let input = &case.inputs[one.input as usize];
            let key = key_of_input(one.input);
            (key, input.op, case.threads[input.thread as usize].as_str(), input.line)
        };
        put(&mut groups, key, op, thread, line);
        let entry = Entry { change: one.change, line, optional: one.optional };
        if let Some(group) = groups.get_mut(&key) {
            group.predicted.push(entry);
        }
    }
    groups
}

/// Without fault events nothing tells a walk that only looks (a fast fault, an MMIO exit) from the one that maps after it: the walks of a thread that follow each other are
/// one sequence. For each input the first of those it belongs to, itself if it is no such walk.
fn heads_of_walks(case: &Case) -> Vec<u32> {
    let mut last: Vec<Option<u32>> = vec![None; case.threads.len()];
    let mut heads = Vec::with_capacity(case.inputs.len());
    for (at, input) in case.inputs.iter().enumerate() {
        let before = &mut last[input.thread as usize];
        let walks = matches!(input.what, What::Walk { .. });
        let head = before.filter(|_| walks).unwrap_or(at as u32);
        *before = walks.then_some(head);
        heads.push(head);
    }
    heads
}

fn inputs_by_thread(case: &Case) -> Vec<Vec<u32>> {
    let mut by_thread = vec![Vec::new(); case.threads.len()];
    for (at, input) in case.inputs.iter().enumerate() {
        by_thread[input.thread as usize].push(at as u32);
    }
    by_thread
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_races_when_two_threads_have_operations_open_at_once() {
        let races = |spans: &[(u64, u64, u32)]| {
            let span = |&(begin, end, thread)| Span { begin, end, thread, runs: true };
            races(&spans.iter().map(span).collect::<Vec<_>>())
        };
        assert!(races(&[(1, 5, 0), (6, 9, 1)]).is_empty());
        assert_eq!(races(&[(1, 5, 0), (4, 9, 1), (8, 12, 0), (20, 30, 0)]), vec![(1, 12)]);
        assert!(races(&[(1, 9, 0), (2, 3, 0)]).is_empty(), "nested in one thread");
    }
}
