//! The bits: what one 64-bit page-table entry of KVM's TDP MMU says, and how one is built.
//!
//! # The guarantee
//!
//! Everything here is a pure function of its arguments: no state, no `unsafe`, no dependency, no panic on any
//! 64-bit value. Two programs that agree on a [`Format`] agree on every predicate and every constructed entry,
//! bit for bit, with a recording of the real kernel.
//!
//! # The parts
//!
//! * [`geometry`]: levels, spans, indices, the end of the guest-physical space.
//! * [`Spte`]: the entry itself, and the three questions that no format can answer differently (present, leaf, pfn).
//! * [`Format`]: which bit means what on EPT (Intel) and NPT (AMD); predicates, the three write-permission bits,
//!   A/D modes, access tracking; [`make`] builds leafs, tables and their splits; [`mmio`] the cached MMIO entry.
//! * [`role`]: the 32-bit word that names a page table, in its two layouts.
//! * [`Passes`] and [`KernelProfile`]: the ways in which kernels differ, as values.
//!
//! # How an entry is classified
//!
//! Bit 11 (`MMU_PRESENT`) is ignored by hardware in every format and is the only test for "this entry maps
//! something" (since 5.13; 5.10 used "non-zero and not MMIO", which comes to the same for the entries built here).
//! What is not present is exactly one of: *empty* (the format's non-present value), *frozen* (owned by one thread
//! in the middle of a change), *MMIO* (a cached "no memory here"), or nothing the MMU ever writes.
//!
//! The empty value must not be assumed to be 0: from 6.10 on it is bit 63, which is *suppress #VE* on EPT and NX on
//! NPT, and a new table has to be filled with it.

pub mod format;
pub mod geometry;
pub mod make;
pub mod mmio;
pub mod passes;
pub mod profile;
pub mod role;
mod spte;
mod suggest;
pub mod switch;

pub use format::{AdMode, Class, Format, FormatKind, WriteState, WriteViolation};
pub use geometry::{ENTRIES, LEVEL_1G, LEVEL_2M, LEVEL_4K};
pub use make::{Access, MadeLeaf, MakeLeaf, RemakeDirty};
pub use passes::{Passes, PassesError};
pub use profile::{KernelProfile, ProfileError, UnknownProfile};
pub use role::{Role, RoleFields, RoleLayout};
pub use spte::Spte;
pub use suggest::closest;
pub use switch::{
    Aging, AgingWrite, AtomicZapOrder, ClearDirty, Collapse, DirtyOrWrite, EagerSplit, ExclusiveWrite, Grace,
    LockMode, MarkDirty, NotifierUnit, NxZap, Ownership, ReplaceFlushSpan, RootSet, SplitInFault, WriteBack,
    YieldStyle,
};
