//! # The judges
//!
//! **Guarantee.** A [`Judge`] that listens to an MMU, and is asked at quiet points, has no opinion of its own about how the MMU works: it knows
//! what was *reported* (every SPTE change, every table and root from birth to death) and what is *there* (a full read of every tree), and
//! says where the two differ, or where the reports themselves break a rule. It knows no workload. Absent, it costs nothing.
//!
//! **Mechanism.** Three books, each of which can be used alone and fed by hand:
//!
//! | file | book | rules |
//! | --- | --- | --- |
//! | `model.rs` | [`ReferenceModel`]: what every entry should hold | I5, I8, I10, P-FZ, R5 |
//! | `pool.rs` | [`CountingPool`]: each page linked once, unlinked once, freed once | I7, I9 |
//! | `ledger.rs` | [`RootLedger`]: who holds each root | I1-I4, P-1 |
//!
//! `judge.rs` joins them, `tree.rs` reads what is there, `chain.rs` is how reports are put back in order, `rule.rs` names what can be
//! broken. [`Sequential`] is another kind of oracle: it predicts from *operations*, not from reports, and serves tests in lockstep.
//!
//! **Order of reports.** An event is told after the atomic operation that it tells of. Two threads that change one word may therefore be
//! heard in the wrong order. Nothing here takes the order of arrival for the order of things, except where a lock, a
//! reference or a grace period makes them the same; each such place says which.
//!
//! **When is it quiet?** Whenever mmu_lock is held exclusively: every task tells of its SPTE changes, and settles its statistics,
//! before it releases mmu_lock. So [`Judge::check_locked`] may sample in the middle of a race. [`Judge::check_quiet`] asks for more
//! (no walk in progress, nothing waiting for RCU), [`Judge::finish`] for an empty house.

#![warn(missing_docs)]

mod against;
mod caches;
mod chain;
mod dirty;
mod flush;
mod history;
mod judge;
mod ledger;
mod lists;
mod locks;
mod model;
mod notifier;
mod pool;
mod progress;
mod rcu;
mod rule;
mod rules;
mod sequential;
mod tree;
mod verdict;

pub use caches::Caches;
pub use dirty::{DirtyBook, PendingWrite};
pub use flush::FlushLedger;
pub use history::{Answer, Call, Counterexample, History, Operation};
pub use judge::{Judge, OnViolation};
pub use ledger::RootLedger;
pub use lists::Lists;
pub use locks::Locks;
pub use model::{Key, ReferenceModel};
pub use notifier::Notifier;
pub use pool::{CountingPool, Leak};
pub use progress::Progress;
pub use rcu::Sections;
pub use rule::{Rule, RuleSet};
pub use rules::{Check, Order, Rules};
pub use sequential::{Node, Sequential};
pub use tree::{SeenTable, Tree};
pub use verdict::{Verdict, Violation};
