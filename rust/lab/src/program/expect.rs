//! What one program's acts must come to: the subject of that program, which no judge can know.
//!
//! Judges know what must hold of every program. That a page is mapped *huge* again, that a guest does *not* fault again, is right or wrong only for who set the scene: such things are said beside the act.

use std::fmt;

use serde::{Deserialize, Serialize};
use tdpmmu_vm::AccessOutcome;

use super::{Done, Performed, Program, ProgramError};

/// One act, and what it must come to whenever it is carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Thread, by its place in the program.
    pub thread: usize,
    /// Act, by its place in the thread.
    pub act: usize,
    /// What it must come to.
    pub want: Want,
}

/// What an act must come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "want", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Want {
    /// A look-up finds a leaf of this level at least.
    Level {
        /// 1 to 3.
        level: u8,
    },
    /// An access goes through without a fault.
    NoFault,
    /// A count is not above this.
    AtMost {
        /// The most.
        count: u64,
    },
    /// No refusal: the act does what it was asked to.
    Success,
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Want::Level { level } => write!(f, "a leaf of level {level} at least"),
            Want::NoFault => f.write_str("no fault"),
            Want::AtMost { count } => write!(f, "{count} at most"),
            Want::Success => f.write_str("no refusal"),
        }
    }
}

impl Want {
    /// Does `done` do?
    fn met_by(&self, done: &Done) -> bool {
        match (self, done) {
            (Want::Level { level }, Done::Found(found)) => found.is_some_and(|(_, at)| at >= *level),
            (Want::NoFault, Done::Access(outcome)) => *outcome <= AccessOutcome::Walk,
            (Want::AtMost { count }, Done::Count(was)) => was <= count,
            (Want::Success, _) => true,
            _ => false,
        }
    }

    /// Of an act that can come to such a thing?
    fn fits(&self, act: &super::Act) -> bool {
        use super::Act;
        match self {
            Want::Level { .. } => matches!(act, Act::LookUp { .. } | Act::WalkShadow { .. }),
            Want::NoFault => matches!(act, Act::Access { .. }),
            Want::AtMost { .. } => {
                !matches!(act, Act::LookUp { .. } | Act::WalkShadow { .. } | Act::Access { .. })
            }
            Want::Success => true,
        }
    }
}

impl Program {
    /// What was expected of the acts in `performed` and did not come true, in words. An act that was not carried out is not missed.
    pub fn unmet(&self, performed: &[Performed]) -> Vec<String> {
        let of = |expect: &Expect| {
            let was = performed.iter().find(|done| (done.thread, done.act) == (expect.thread, expect.act))?;
            let text = match &was.result {
                Ok(done) if expect.want.met_by(done) => return None,
                Ok(done) => done.to_string(),
                Err(error) => error.to_string(),
            };
            let thread = &self.threads[expect.thread];
            let act = thread.acts[expect.act].title();
            Some(format!("{}, act {} ({act}): {text}; expected: {}", thread.name, expect.act, expect.want))
        };
        self.expect.iter().filter_map(of).collect()
    }

    /// Every expectation names an act that can come to it.
    pub(super) fn check_expectations(&self) -> Result<(), ProgramError> {
        for expect in &self.expect {
            let thread = self.threads.get(expect.thread);
            let act = thread.and_then(|thread| thread.acts.get(expect.act));
            let name = thread.map_or_else(|| expect.thread.to_string(), |thread| thread.name.clone());
            match act {
                Some(act) if expect.want.fits(act) => {}
                Some(act) => {
                    return Err(ProgramError::Act {
                        thread: name,
                        act: expect.act,
                        what: act.title(),
                        rule: format!("it cannot come to {}", expect.want),
                    });
                }
                None => {
                    let rule = format!("it has no act {}, of which something is expected", expect.act);
                    return Err(ProgramError::Thread { thread: name, rule });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Act, ThreadSpec};
    use super::*;

    fn program(want: Want) -> Program {
        let threads = vec![ThreadSpec::vcpu(0, [Act::LookUp { gfn: 0 }])];
        Program { expect: vec![Expect { thread: 0, act: 0, want }], ..Program::new("one", threads) }
    }

    #[test]
    fn what_an_act_came_to_is_held_against_what_was_expected_of_it() {
        let program = program(Want::Level { level: 2 });
        let came_to = |found| vec![Performed { thread: 0, act: 0, result: Ok(Done::Found(found)) }];
        assert_eq!(program.unmet(&came_to(Some((1, 2)))), Vec::<String>::new());
        assert_eq!(program.unmet(&came_to(Some((1, 1)))).len(), 1);
        assert_eq!(program.unmet(&came_to(None)).len(), 1);
        assert_eq!(program.unmet(&[]).len(), 0, "not carried out");
    }

    #[test]
    fn an_expectation_of_nobody_is_refused() {
        assert!(program(Want::Level { level: 2 }).check_expectations().is_ok());
        assert!(program(Want::NoFault).check_expectations().is_err());
        let mut other = program(Want::Success);
        other.expect[0].act = 7;
        assert!(other.check_expectations().is_err());
    }
}
