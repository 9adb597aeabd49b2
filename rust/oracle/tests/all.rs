//! One binary for all tests of this crate: each binary of its own would build the whole engine again.

// What tests share is a module of each.
#![allow(clippy::duplicate_mod)]

#[path = "canary.rs"]
mod canary;
#[path = "churns.rs"]
mod churns;
#[path = "dirty.rs"]
mod dirty;
#[path = "exhaustion.rs"]
mod exhaustion;
#[path = "flawed.rs"]
mod flawed;
#[path = "lockstep.rs"]
mod lockstep;
#[path = "nx.rs"]
mod nx;
#[path = "own_design.rs"]
mod own_design;
#[path = "populate.rs"]
mod populate;
#[path = "racing.rs"]
mod racing;
#[path = "simulated.rs"]
mod simulated;
#[path = "vm.rs"]
mod vm;
