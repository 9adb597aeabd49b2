//! # The judges
//!
//! **Guarantee.** A [`Judge`] that listens to an MMU, and is asked at quiet points, has no opinion of its own about how the MMU works: it knows
//! what was *reported* (every SPTE change, every table and root from birth to death) and what is *there* (a full read of every tree), and
//! says where the two differ, or where the reports themselves break a rule. A violation names the rule, who owed and who should have paid, the root, the gfn and what was owed.
//! It knows no workload. Absent, it costs nothing.
//!
//! **Mechanism.** Books, each of which can be used alone and fed by hand:
//!
//! | file | book | oracles |
//! | --- | --- | --- |
//! | `model.rs` | [`ReferenceModel`]: what every entry should hold | O-MODEL, O-INV |
//! | `pool.rs` | [`CountingPool`]: each page linked once, unlinked once, freed once | O-LIST, O-RCU, O-END |
//! | `ledger.rs` | [`RootLedger`]: who holds each root | O-REF, O-FZ |
//! | `flush.rs` | [`FlushLedger`]: what must be flushed before whom | O-TLB, O-DEBT |
//! | `caches.rs` | [`Caches`]: what each vCPU may still use | O-TLB |
//! | `rcu.rs` | [`Sections`]: who reads, and how much one step does | O-RCU, O-PROG, O-RCULEN |
//! | `dirty.rs` | [`DirtyBook`]: what was written, and who knows | O-DIRTY |
//! | `notifier.rs` | [`Notifier`]: look-ups and invalidations | O-SEQ, O-TLB |
//! | `locks.rs` | [`Locks`]: modes, order, sleeping | O-LOCK |
//! | `lists.rs` | [`Lists`]: NX candidates, publication, work items | O-LIST, O-WORK |
//! | `progress.rs` | [`Progress`]: faults that begin again for nothing | O-PROG |
//! | `shadow.rs` | [`ShadowBook`]: the life of shadow pages, walks without a lock, progress of a zap | O-LIST, O-RCU, O-PROG, O-TLB |
//! | `history.rs` | [`History`]: answers gfn by gfn | O-LIN |
//! | `shadow_tree.rs` | [`ShadowView`]: a full read of the shadow MMU: hash, lists, parents, reverse maps, unsync marks, lpage_info | O-LIST, O-STAT, O-INV, O-RCU |
//! | `against.rs` | the tree against memslots and host | O-MODEL |
//!
//! `judge.rs` joins them, `tree.rs` reads what is there, `chain.rs` is how reports are put back in order, `rule.rs` names what can be broken, `rules.rs` says in what kernels, designs and platforms
//! differ and how much is looked at. [`Sequential`] is another kind of oracle: it predicts from *operations*, not from reports, and serves tests in lockstep. `docs/oracles.md` has every rule.
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
mod shadow;
mod shadow_tree;
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
pub use shadow::ShadowBook;
pub use shadow_tree::{ShadowView, SlotView};
pub use tree::{SeenTable, Tree};
pub use verdict::{Verdict, Violation};
