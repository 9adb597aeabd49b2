//! # Page-table pages: the pool and what is known about each page
//!
//! **Guarantee.** A table is 512 `AtomicU64`, 4 KiB aligned, named by a `u32` index. Whoever holds an index may read and
//! write its entries for ever without `unsafe`: the address space is reserved once and never unmapped while the pool lives,
//! so a stale index reaches a recycled table, never a fault. *When* an index may be recycled is the business of RCU, above.
//! Every page is in exactly one of three states, counted exactly: free (its bit in [`FreeMap`] is set, or it waits in quarantine), cached
//! (taken by a [`TableCache`], not yet a table), in use. Handing out beyond the cap fails; a second free of one page is
//! detected at the free, by the bit that was already set.
//!
//! **Mechanism.** One anonymous reservation holds the tables, huge-page backed, touched before the clock runs
//! ([`TablePool::prefault`]); a second one holds 40 bytes of [`TableMeta`] a table. Entry -> table -> metadata is arithmetic.
//! Free pages are bits in a map, 64 neighbours to a word, so runs re-form by themselves however they are given back: a 1 GiB
//! chunk of leaf tables is eight words, taken as one item. That order is worth a factor of two to whoever scans
//! tables later (`docs/performance.md`).
//!
//! | file | idea |
//! | --- | --- |
//! | `arena.rs` | reserved, never-moving memory |
//! | `freemap.rs` | which pages are free; runs |
//! | `lazy.rs` | arrays of atomics, committed when touched |
//! | `meta.rs` | what is known about a table |
//! | `pool.rs` | the pool: alloc, free, cap, counts, per-task caches |
//! | `quarantine.rs` | freed pages, poisoned and kept from their next user |
//! | `uniform.rs` | leaf tables held by count, in virtual time |
//! | `fill.rs` | whole tables written around the caches |
//! | `tally.rs` | counters with one writer |
//! | `prefetch.rs` | hints about the next table |

mod arena;
mod fill;
mod freemap;
mod lazy;
mod meta;
mod pool;
pub mod prefetch;
mod quarantine;
mod tally;
pub mod uniform;

pub use freemap::FreeMap;
pub use lazy::{Lazy, ZeroAtomic};
pub use meta::{NO_PARENT, TableFlag, TableMeta};
pub use pool::{DeadChain, PoolConfig, PoolError, PoolStats, TableCache, TablePool};
pub use tally::Tally;
pub use uniform::{Held, Uniform, UniformStats};

/// Bytes of a page-table page.
pub const TABLE_BYTES: usize = 4096;

/// The entries of one table.
pub type Entries = [std::sync::atomic::AtomicU64; tdpmmu_spte::geometry::ENTRIES];
