//! One binary for all tests of this crate: each binary of its own would build the whole engine again.

// What tests share is a module of each.
#![allow(clippy::duplicate_mod)]

#[path = "beside.rs"]
mod beside;
#[path = "callbacks.rs"]
mod callbacks;
#[path = "designs.rs"]
mod designs;
#[path = "dirty_log.rs"]
mod dirty_log;
#[path = "faults.rs"]
mod faults;
#[path = "huge.rs"]
mod huge;
#[path = "life.rs"]
mod life;
#[path = "logging.rs"]
mod logging;
#[path = "memslots.rs"]
mod memslots;
#[path = "rings.rs"]
mod rings;
#[path = "shadow_guest.rs"]
mod shadow_guest;
#[path = "shadow_life.rs"]
mod shadow_life;
#[path = "shadow_nested.rs"]
mod shadow_nested;
#[path = "shadow_simulated.rs"]
mod shadow_simulated;
#[path = "shadow_stress.rs"]
mod shadow_stress;
#[path = "simulated.rs"]
mod simulated;
#[path = "spaces.rs"]
mod spaces;
#[path = "stress.rs"]
mod stress;
#[path = "times.rs"]
mod times;
#[path = "workers.rs"]
mod workers;
