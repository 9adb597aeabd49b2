//! # Stories: a recorded run as something a person reads
//!
//! **Guarantee.** The story is made from the run alone: what tasks told their observers and what the simulation logged, in its order; nothing is guessed. What is left out is counted where it was left out.
//!
//! **Mechanism.** [`story`] reads the lines of a recorded [`Outcome`] once, keeps the books that a reader would keep (which table is where, who holds which root), and makes a row of each step that matters. Text has a column for
//! each thread; HTML is the same table, in one file.
//!
//! | file | idea |
//! | --- | --- |
//! | `books.rs` | tables, roots and locks, as the story goes on |
//! | `words.rs` | an event in words; an SPTE decoded |
//! | `rows.rs` | which lines become rows, which are folded |
//! | `text.rs`, `html.rs` | the two forms |
//! | `command.rs` | a seed or a result file becomes a story |

mod books;
mod command;
mod html;
mod rows;
mod text;
mod words;

use serde::Serialize;
use tdpmmu_platform::Bug;

pub use command::{command, explain};

use crate::explore::{Seed, oracle_of};
use crate::program::{Outcome, Program, Who};

/// How a thread stands in the story.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// A step.
    Plain,
    /// An act of the program begins or ends.
    Act,
    /// The CPU was taken from the thread here, though it could have gone on.
    Preempted,
    /// A rule breaks.
    Violation,
    /// Steps that were left out.
    Folded,
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The step after which it was told.
    pub at: u64,
    /// Column; `None`: across all of them.
    pub column: Option<usize>,
    /// What it is.
    pub mark: Mark,
    /// In words.
    pub text: String,
}

/// A story.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Story {
    /// What it is about, in one line.
    pub title: String,
    /// The rule that broke; empty: none did.
    pub rule: String,
    /// What holds the reader up front: who, what, which obligation.
    pub header: Vec<String>,
    /// The threads that have a column.
    pub columns: Vec<String>,
    /// The steps.
    pub rows: Vec<Row>,
    /// To be pasted.
    pub seed: String,
    /// In columns of text.
    pub text: String,
    /// In one self-contained page.
    pub html: String,
}

/// Tells what happened in a recorded run.
pub fn story(program: &Program, bug: Option<Bug>, outcome: &Outcome) -> Story {
    let finding = outcome.finding();
    let seed = Seed::of(program, bug, &outcome.run.schedule).to_string();
    let machine = &program.machine;
    let design = machine.design_name().unwrap_or_default();
    let what = match &finding {
        Some(finding) => finding.rule.clone(),
        None => "no rule broke".to_owned(),
    };
    let title = format!("{}: {what} (design {design}, Linux {})", program.name, machine.profile);
    let mut header = Vec::new();
    if let Some(finding) = &finding {
        let oracle = oracle_of(&finding.rule);
        let by = if oracle.is_empty() { String::new() } else { format!(" [{oracle}]") };
        header.push(format!("rule        {}{by}: {}", finding.rule, finding.what));
        header.push(format!("obligation  {}", words::obligation(&finding.rule)));
        let who = finding.task.and_then(|task| outcome.run.tasks.get(task as usize));
        let mut place =
            vec![format!("shown by {}", who.map_or("the check at a quiet point", String::as_str))];
        place.extend(finding.root.map(|root| format!("root {root}")));
        place.extend(finding.gfn.map(|gfn| format!("gfn {gfn:#x}")));
        header.push(format!("where       {}", place.join(", ")));
    }
    if let Some(bug) = bug {
        header.push(format!("bug         {} is switched on", bug.id()));
    }
    for thread in &program.threads {
        let acts: Vec<_> = thread.acts.iter().map(|act| act.title()).collect();
        let who = match thread.who {
            Who::Vcpu(id) => format!(" (vCPU {id})"),
            Who::Caller | Who::Other(_) => String::new(),
        };
        header.push(format!("thread      {}{who}: {}", thread.name, acts.join("; ")));
    }
    if !program.setup.is_empty() {
        let acts: Vec<_> =
            program.setup.iter().map(|(who, act)| format!("{who:?} {}", act.title())).collect();
        header.push(format!("before      {}", acts.join("; ")));
    }
    let run = &outcome.run;
    header.push(format!(
        "schedule    {} ({} preemption{}, {} steps)",
        run.schedule,
        run.preemptions,
        if run.preemptions == 1 { "" } else { "s" },
        run.steps
    ));
    header.push(format!("seed        {seed}"));
    let (columns, rows) = rows::rows(program, outcome, finding.as_ref());
    let rule = finding.map(|finding| finding.rule).unwrap_or_default();
    let mut story =
        Story { title, rule, header, columns, rows, seed, text: String::new(), html: String::new() };
    story.text = text::text(&story);
    story.html = html::html(&story);
    story
}
