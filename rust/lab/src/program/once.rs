//! One run of a program under the judges: what is asked of it, and what it came to.

use tdpmmu_oracle::{Rule, Violation};

/// Which judges listen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JudgeSet {
    /// Rules whose breach is not heard: what shows that an oracle is needed.
    pub silenced: Vec<Rule>,
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What the judges found, oldest first.
    pub violations: Vec<Violation>,
}
