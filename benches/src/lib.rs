//! tdpmmu beside its peers: the same work, in the same run, against the limits of the same host.
//!
//! A row is one implementation doing one work. Rows of one work are comparable with each other: they have the same
//! count, the same order, the same backing memory, and each checks afterwards that the work was done. The ratio is to
//! a figure of [`limits`], so that rows of different machines compare too. `README.md` says what each work means.
//!
//! `cli` is what the programs share. `goals` holds our own figures, each beside the limit that it has to come near.
//!
//! `paging`, `reclaim` and `locks` hold the peers and `host` the kernel's own page tables. Our rows are in `engine`, one
//! function per group of works, and in `tree`, those of the page tables.

pub mod arena;
pub mod cli;
pub mod engine;
pub mod goals;
pub mod harness;
pub mod host;
pub mod locks;
pub mod paging;
pub mod reclaim;
pub mod tree;

pub use tdpmmu_lab::limits;
