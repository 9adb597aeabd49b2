//! Schedules as text.
//!
//! **Guarantee.** A run given its own schedule to replay is the same run, step by step.
//!
//! **Mechanism.** Nothing is written down where the default was taken: the running task goes on; when it cannot, the next one by number, round robin;
//! a store reaches memory at once; no check yields; no fault strikes. What is left is short, and each turn names its place in its task's own
//! count, so that a turn taken out does not move those of other tasks.
//!
//! `0@12>1` task 0's 12th point: task 1 runs; `0@12~1` there the oldest store of task 1 reaches memory; `0@3h` its 3rd store is held back;
//! `0@4y` its 4th reschedule check yields; `0@7f2` the 7th question for a fault is answered 2.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::config::Memory;

/// What was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Choice {
    /// At a point: this task runs next.
    Run(u32),
    /// At a point: the oldest buffered store of this task reaches memory.
    Drain(u32),
    /// At a store: it stays in the buffer.
    Hold,
    /// At a reschedule check: it yields.
    Yield,
    /// At a question for a fault: the answer.
    Fault(u32),
}

/// A choice that was not the default, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Turn {
    /// Whose count `at` is.
    pub task: u32,
    /// The task's own count of points, stores, checks or questions, from 0.
    pub at: u32,
    /// What was chosen.
    pub choice: Choice,
}

/// What a run chose against the defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// The seed that it was drawn from, if it was drawn: for people, the turns say it all.
    pub seed: Option<u64>,
    /// How memory behaves.
    pub memory: Memory,
    /// In the order of the run.
    pub turns: Vec<Turn>,
}

impl Schedule {
    /// Faults are part of it.
    pub fn has_faults(&self) -> bool {
        self.turns.iter().any(|turn| matches!(turn.choice, Choice::Fault(_)))
    }

    /// How many turns take the CPU, hold a store back, yield or inject a fault.
    pub fn len(&self) -> usize {
        self.turns.len()
    }

    /// All defaults.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.task, self.at)?;
        match self.choice {
            Choice::Run(task) => write!(f, ">{task}"),
            Choice::Drain(task) => write!(f, "~{task}"),
            Choice::Hold => f.write_str("h"),
            Choice::Yield => f.write_str("y"),
            Choice::Fault(answer) => write!(f, "f{answer}"),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.memory {
            Memory::Sc => "sc",
            Memory::Tso => "tso",
        })?;
        if let Some(seed) = self.seed {
            write!(f, ":{seed}")?;
        }
        for turn in &self.turns {
            write!(f, " {turn}")?;
        }
        Ok(())
    }
}

/// A text that is no schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleError {
    /// The word that does not fit.
    pub word: String,
}

impl fmt::Display for ScheduleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "schedule: {:?} is not `sc`, `tso`, `sc:SEED`, `tso:SEED` (first), nor TASK@COUNT followed by >TASK, ~TASK, h, y or fANSWER",
            self.word
        )
    }
}

impl std::error::Error for ScheduleError {}

impl FromStr for Schedule {
    type Err = ScheduleError;

    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        let mut words = text.split_ascii_whitespace();
        let head = words.next().unwrap_or("");
        let bad = || ScheduleError { word: head.to_owned() };
        let (memory, seed) = head.split_once(':').map_or((head, None), |(memory, seed)| (memory, Some(seed)));
        let memory = match memory {
            "sc" => Memory::Sc,
            "tso" => Memory::Tso,
            _ => return Err(bad()),
        };
        let seed = seed.map(str::parse).transpose().map_err(|_| bad())?;
        let turns = words
            .map(|word| turn(word).ok_or_else(|| ScheduleError { word: word.to_owned() }))
            .collect::<Result<_, _>>()?;
        Ok(Schedule { seed, memory, turns })
    }
}

fn turn(word: &str) -> Option<Turn> {
    let (task, rest) = word.split_once('@')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
    let (at, what) = rest.split_at(digits);
    let mut letters = what.chars();
    let choice = match (letters.next()?, letters.as_str()) {
        ('>', task) => Choice::Run(task.parse().ok()?),
        ('~', task) => Choice::Drain(task.parse().ok()?),
        ('h', "") => Choice::Hold,
        ('y', "") => Choice::Yield,
        ('f', answer) => Choice::Fault(answer.parse().ok()?),
        _ => return None,
    };
    Some(Turn { task: task.parse().ok()?, at: at.parse().ok()?, choice })
}

impl Serialize for Schedule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_reads_as_it_is_written() {
        let text = "tso:77 0@12>1 0@12~1 3@0h 10@4y 2@7f4294967295";
        let schedule: Schedule = text.parse().unwrap();
        assert_eq!(schedule.to_string(), text);
        assert_eq!(schedule.turns.len(), 5);
        assert_eq!(schedule.turns[1], Turn { task: 0, at: 12, choice: Choice::Drain(1) });
        assert_eq!("sc".parse::<Schedule>().unwrap(), Schedule::default());
    }

    #[test]
    fn what_is_no_schedule_is_named() {
        for (text, word) in [
            ("", ""),
            ("x", "x"),
            ("sc:x", "sc:x"),
            ("sc 0@1", "0@1"),
            ("sc 0@1>2 1@>3", "1@>3"),
            ("tso 0@1hh", "0@1hh"),
            ("sc 0@9é", "0@9é"),
        ] {
            assert_eq!(text.parse::<Schedule>().unwrap_err().word, word, "{text}");
        }
    }
}
