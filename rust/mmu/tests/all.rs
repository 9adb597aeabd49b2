//! One binary for all tests of this crate: each binary of its own would build the whole engine again.

// What tests share is a module of each.
#![allow(clippy::duplicate_mod)]

#[path = "age.rs"]
mod age;
#[path = "bulk.rs"]
mod bulk;
#[path = "debts.rs"]
mod debts;
#[path = "dirty_log.rs"]
mod dirty_log;
#[path = "essays.rs"]
mod essays;
#[path = "fault.rs"]
mod fault;
#[path = "gaps.rs"]
mod gaps;
#[path = "harvest.rs"]
mod harvest;
#[path = "hosting.rs"]
mod hosting;
#[path = "lost.rs"]
mod lost;
#[path = "nx.rs"]
mod nx;
#[path = "nx_stress.rs"]
mod nx_stress;
#[path = "pace.rs"]
mod pace;
#[path = "registry.rs"]
mod registry;
#[path = "shared_put.rs"]
mod shared_put;
#[path = "split_collapse.rs"]
mod split_collapse;
#[path = "unlocked_put.rs"]
mod unlocked_put;
#[path = "workers.rs"]
mod workers;
#[path = "zap.rs"]
mod zap;
