//! # Exploration: schedules are chosen until a rule breaks
//!
//! **Guarantee.** What is found is found again: a failing run was replayed from its printed schedule, with the same hash, before it is reported, and its schedule was made as short as it gets. The same request finds the same,
//! whatever the number of threads. What was not found is not proved absent: the bound says what the number of schedules buys.
//!
//! **Mechanism.** [`search`] runs a program under schedules of a mix of strategies and stops at the first violation. [`protocols`] are the programs of the command line.
//!
//! | file | idea |
//! | --- | --- |
//! | `protocols.rs` | who meets: the programs by name |
//! | `shadow.rs` | those of the shadow MMU |
//! | `search.rs` | schedules in parallel, the first failure, its replay |
//! | `plan.rs` | which strategy the n-th schedule has |
//! | `bound.rs` | what the number of schedules buys |
//! | `seed.rs` | a run as a text that can be pasted |
//! | `command.rs` | JSON in, JSON out |

mod bound;
mod command;
mod plan;
mod protocols;
mod search;
mod seed;
mod shadow;

pub use bound::{Bound, Depth};
pub(crate) use command::asked_for;
pub use command::{command, protocols_json};
pub use plan::{Mix, Models};
pub use protocols::{
    Protocol, flawed_designs, is_shadow, natural_profile, protocol, protocols, sound_designs,
};
pub(crate) use search::oracle_of;
pub use search::{Failure, Found, Search, replay, search};
pub use seed::{Seed, SeedError};
