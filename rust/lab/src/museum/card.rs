//! The catalogue as data: what `bugs list` and `bugs show` print.

use std::fmt;

use serde::Serialize;

use super::mutation::mutation;
use super::{Entry, entries};
use crate::program::Program;

/// One exhibit, for readers and programs.
#[derive(Clone, Debug, Serialize)]
pub struct Card {
    /// Its name on the command line.
    pub id: &'static str,
    /// What it is.
    pub title: &'static str,
    /// What the world saw.
    pub class: &'static str,
    /// The kernels that had it.
    pub kernels: &'static str,
    /// What catches it.
    pub catcher: &'static str,
    /// Where history tells of it.
    pub reference: &'static str,
    /// What was wrong.
    pub cause: &'static str,
    /// How it comes to pass.
    pub interleaving: &'static str,
    /// Where it sits in the engine: a file.
    pub file: &'static str,
    /// The line that it changes there, in words.
    pub mutation: &'static str,
    /// The program whose schedules are searched.
    pub program: Program,
}

impl From<&Entry> for Card {
    fn from(entry: &Entry) -> Self {
        let (file, does) = mutation(entry.bug).map_or(("", ""), |place| (place.file, place.does));
        Self {
            file,
            mutation: does,
            id: entry.id(),
            title: entry.title,
            class: entry.class.name(),
            kernels: entry.kernels,
            catcher: entry.catcher.name(),
            reference: entry.reference,
            cause: entry.cause,
            interleaving: entry.interleaving,
            program: (entry.program)(),
        }
    }
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}  {}", self.id, self.title)?;
        writeln!(f, "    {} · Linux {} · caught by {}", self.class, self.kernels, self.catcher)?;
        writeln!(f, "\nReference\n    {}", self.reference)?;
        writeln!(f, "\nCause\n    {}", self.cause)?;
        writeln!(f, "\nHow it comes to pass\n    {}", self.interleaving)?;
        writeln!(f, "\nMutation\n    {}: {}", self.file, self.mutation)?;
        let program = &self.program;
        writeln!(f, "\nProgram {} ({})", program.name, program.machine.profile)?;
        for (who, act) in &program.setup {
            writeln!(f, "    before   {who:?}: {}", act.title())?;
        }
        for thread in &program.threads {
            let acts: Vec<String> = thread.acts.iter().map(crate::program::Act::title).collect();
            writeln!(f, "    {:<8} {}", thread.name, acts.join("; "))?;
        }
        Ok(())
    }
}

/// Every exhibit's card, in the catalogue's order.
pub fn cards() -> Vec<Card> {
    entries().into_iter().map(Card::from).collect()
}
