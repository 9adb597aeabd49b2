//! One binary for all tests of this crate: each binary of its own would build the whole engine again.

// What tests share is a module of each.
#![allow(clippy::duplicate_mod)]

#[path = "corruption.rs"]
mod corruption;
#[path = "dat.rs"]
mod dat;
#[path = "fuzz.rs"]
mod fuzz;
#[path = "hlog.rs"]
mod hlog;
#[path = "losses.rs"]
mod losses;
#[path = "perfetto.rs"]
mod perfetto;
#[path = "reader.rs"]
mod reader;
#[path = "recordings.rs"]
mod recordings;
#[path = "summary.rs"]
mod summary;
