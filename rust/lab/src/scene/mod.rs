//! The scenes: what happens to the VM, as data.
//!
//! **Guarantee.** A scene is a pure function from the plan to a [`Scenario`]; it runs nothing. Two designs meet the same operations in the same order.
//!
//! **Mechanism.** One file per family; the shared parts (the VM, the guests, the population) are in `parts.rs`.

mod drop;
mod memslot;
mod parts;

pub use drop::{LOOP_SPTES, drop_loop_scenario, drop_scenario};
pub use memslot::zap_scenario;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A memslot update.
    Zap,
    /// A vCPU drops its root.
    Drop,
}

impl Kind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Zap => "zap",
            Kind::Drop => "drop",
        }
    }
}
