//! Where a walk of one thread and the faults of another fall between each other.
//!
//! **Guarantee.** A fault that was recorded between two changes of a walk is carried out between them, whether the walk gave mmu_lock up there or holds it shared beside the fault.
//!
//! **Mechanism.** The order of lines is an input; what a line's entry held is not, and is not looked at. Two things are worked out from it when a recording is read:
//!
//! * A walk under the shared lock does not stop for a fault. So that it can be carried out around it, a [`What::Resume`] is put after the fault: the walk hands the baton on at its first check after as
//!   many changed entries, keeping its lock, and goes on there. Only where nothing but faults stands in between: whoever wants the lock exclusively was not let in.
//! * A yield without its place recorded stands after as many changed entries, which leaves a stretch of entries that the walk did not change. If another thread faulted on one
//!   of these meanwhile and the walk did not change it afterwards, the walk had passed it; if it did, it had not.

use super::inputs::{Input, NO_OP, What};
use super::script::Script;

/// An entry changed: thread, line, level, first gfn.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Thread, an index.
    pub thread: u32,
    /// Line of the trace.
    pub line: u64,
    /// Level of the entry.
    pub level: u8,
    /// First gfn of the entry.
    pub gfn: u64,
}

impl Place {
    fn covers(&self, gfn: u64) -> bool {
        gfn >> (9 * u32::from(self.level - 1)) == self.gfn >> (9 * u32::from(self.level - 1))
    }
}

/// Works both out. `changes` are those of the recording, by line.
pub fn interleave(
    script: &Script,
    inputs: &mut Vec<Input>,
    changes: &[Place],
    threads: usize,
    entries: bool,
) {
    let mut by_thread: Vec<Vec<Place>> = vec![Vec::new(); threads];
    for place in changes {
        by_thread[place.thread as usize].push(*place);
    }
    place_yields(inputs, &by_thread);
    if entries {
        let resumes = resumes(script, inputs, &by_thread);
        merge(inputs, resumes);
    }
}

/// Entries of `thread` that changed between two lines, both exclusive.
fn between(by_thread: &[Vec<Place>], thread: u32, from: u64, to: u64) -> &[Place] {
    let own = &by_thread[thread as usize];
    let first = own.partition_point(|place| place.line <= from);
    let last = own.partition_point(|place| place.line < to);
    &own[first.min(last)..last]
}

fn place_yields(inputs: &mut [Input], by_thread: &[Vec<Place>]) {
    for at in 0..inputs.len() {
        let Input { line, thread, what: What::Restart { after, gfn: None }, .. } = inputs[at] else {
            continue;
        };
        let own = &by_thread[thread as usize];
        let done = own.partition_point(|place| place.line < line);
        let Some(last) = done.checked_sub(1).map(|n| own[n]) else { continue };
        let until = inputs[at + 1..]
            .iter()
            .find(|next| next.thread == thread && !matches!(next.what, What::Restart { .. }))
            .map_or(u64::MAX, |next| next.line);
        let later = between(by_thread, thread, line, until);
        let passed = inputs[..at]
            .iter()
            .rev()
            .take_while(|earlier| earlier.line > last.line)
            .filter_map(|earlier| match earlier.what {
                What::Map { gfn, .. } if earlier.thread != thread => Some(gfn),
                _ => None,
            })
            .filter(|&gfn| gfn > last.gfn && !later.iter().any(|place| place.covers(gfn)))
            // Only what the walk could have reached before its next change.
            .filter(|&gfn| later.first().is_some_and(|next| gfn < next.gfn))
            .max();
        if let Some(gfn) = passed {
            inputs[at].what = What::Restart { after, gfn: Some(gfn + 1) };
        }
    }
}

fn resumes(script: &Script, inputs: &[Input], by_thread: &[Vec<Place>]) -> Vec<(usize, Input)> {
    let mut found: Vec<(usize, Input)> = Vec::new();
    let threads = by_thread.len();
    // Per thread: its walk at hand (index of the input), and whether only faults of others have come since.
    let mut walks: Vec<Option<(usize, bool)>> = vec![None; threads];
    let mut nexts = vec![u64::MAX; threads];
    let mut until = vec![u64::MAX; inputs.len()];
    for (at, input) in inputs.iter().enumerate().rev() {
        until[at] = nexts[input.thread as usize];
        nexts[input.thread as usize] = input.line;
    }
    for (at, input) in inputs.iter().enumerate() {
        let own = input.thread as usize;
        let fault = matches!(input.what, What::Map { .. } | What::Fault { .. });
        for (thread, walk) in walks.iter_mut().enumerate() {
            let Some((begin, quiet)) = walk else { continue };
            if thread == own {
                continue;
            }
            *quiet &= fault;
            let (begin, thread) = (*begin, thread as u32);
            if !*quiet || !matches!(input.what, What::Map { .. }) {
                continue;
            }
            let before = between(by_thread, thread, inputs[begin].line, input.line).len();
            if between(by_thread, thread, input.line, until[begin]).is_empty() {
                continue;
            }
            let base = match inputs[begin].what {
                What::Restart { after, .. } => after,
                _ => 0,
            };
            let what = What::Resume { after: base + before as u32 };
            found.push((at, Input { line: input.line, thread, op: inputs[begin].op, what }));
        }
        let walks_shared = match input.what {
            What::Script => {
                script.operations.get(input.op as usize).is_some_and(|op| op.kind == "set_memslot")
            }
            What::NxZap => true,
            // It goes on as it was.
            What::Restart { .. } => walks[own].is_some(),
            _ => false,
        };
        walks[own] =
            (walks_shared && input.op != NO_OP || matches!(input.what, What::NxZap)).then_some((at, true));
    }
    found
}

/// Puts each new input after the one it belongs to; of several for one stretch of a thread the last is enough.
fn merge(inputs: &mut Vec<Input>, resumes: Vec<(usize, Input)>) {
    if resumes.is_empty() {
        return;
    }
    let mut keep = vec![true; resumes.len()];
    for n in 0..resumes.len() {
        let (_, one) = resumes[n];
        keep[n] = !resumes[n + 1..]
            .iter()
            .take_while(|(_, next)| next.thread != one.thread || next.what == one.what)
            .any(|(_, next)| next.thread == one.thread && next.what == one.what && next.op == one.op);
    }
    let mut pending = resumes.into_iter().zip(keep).filter(|(_, keep)| *keep).map(|(one, _)| one).peekable();
    let old = std::mem::take(inputs);
    inputs.reserve(old.len() + 16);
    for (at, input) in old.into_iter().enumerate() {
        inputs.push(input);
        while let Some((_, resume)) = pending.next_if(|(after, _)| *after == at) {
            inputs.push(resume);
        }
    }
}
