//! # What KVM's two MMUs share
//!
//! **Guarantee.** A guest memory access completes only through a translation that was valid in the guest entry in which it was made; a memslot, a root or a host frame
//! that is taken away is out of every vCPU's reach when the call that takes it away returns. Everything that KVM waits for is waited for here, by the
//! same protocol, and everything that it does not wait for is not.
//!
//! **Mechanism.** Four parties: vCPUs that translate and fault, the owner of slots_lock that changes memslots, the host that takes frames back, and the MMU
//! below. They meet in three protocols: requests and kicks (`request.rs`), the notifier sequence (`notifier.rs`), the publication of memslots (`slots.rs`).
//!
//! | file | idea |
//! | --- | --- |
//! | `vm.rs` | the VM: fast zap, teardown |
//! | `config.rs` | what a VM is made from |
//! | `update.rs` | memslot updates |
//! | `dirty.rs`, `ring.rs`, `hwlog.rs` | dirty logging: bitmaps, GET and CLEAR; rings; D bits |
//! | `nx.rs` | the NX huge-page mitigation |
//! | `range.rs` | zaps and protects a few gfns, prefaults |
//! | `stats.rs` | KVM's statistics |
//! | `vcpu.rs` | the run loop: entry, exit, requests, roots, accesses |
//! | `fault.rs` | the fault pipeline |
//! | `request.rs` | vCPU mode, requests, kicks |
//! | `root_cache.rs` | current and previous roots |
//! | `tlb.rs`, `walker.rs` | translation caches and the hardware walker |
//! | `slot.rs`, `slots.rs` | a memslot; the set, its rules and its publication |
//! | `notifier.rs`, `notify.rs` | mmu_notifier: its sequence; its callbacks |
//! | `invalidate.rs` | the modelled host takes pages away, or maps larger ones |
//! | `host.rs`, `frames.rs`, `mmap_lock.rs` | the host's primary MMU; frames and their owners; its lock |
//! | `populate.rs` | filling memory, in bulk or by racing faults |
//! | `side.rs` | the MMUs' upcalls |
//! | `both.rs` | what is done to leaves in both MMUs |
//! | `design.rs` | zap designs of both MMUs by name |
//! | `shadow_fault.rs` | the fault pipeline of a vCPU on shadow pages |
//! | `shadow_populate.rs` | filling them in bulk |
//! | `guest_paging.rs` | a guest that loads, writes and flushes its own tables; L2 |
//! | `guest_memory.rs`, `guest_os.rs` | the pages with contents: guest tables; who builds these |
//!
//! What is modelled, and not done: guest memory has no contents but the guest's tables, host page tables are one word per 2 MiB, interrupts are polls. What is real: threads, locks, waits,
//! every SPTE, every TLB entry, every reference.

#![warn(missing_docs)]

mod both;
mod config;
mod design;
mod dirty;
mod error;
mod fault;
pub mod frames;
pub mod guest_memory;
mod guest_os;
mod guest_paging;
pub mod host;
mod hwlog;
mod invalidate;
mod mmap_lock;
pub mod notifier;
mod notify;
mod nx;
mod populate;
mod range;
pub mod request;
mod ring;
pub mod root_cache;
mod shadow_fault;
mod shadow_populate;
mod side;
pub mod slot;
pub mod slots;
mod stats;
pub mod tlb;
mod told;
mod update;
mod vcpu;
mod vm;
pub mod walker;

pub use config::{HostLevel, MAX_HOST_PAGES, MIN_QUOTA, Paging, ShadowSpec, VmConfig};
pub use design::{all_design_names, design_info};
pub use dirty::{DirtyLog, DirtyMode};
pub use error::VmError;
pub use fault::{FaultOutcome, HostAnswer};
pub use guest_memory::GuestMemory;
pub use guest_os::GuestOs;
pub use populate::{AdMix, BulkOptions, Progress};
pub use ring::RingEntry;
pub use side::HostSide;
pub use slot::SlotFlags;
pub use slots::Region;
pub use stats::VmStats;
pub use update::SlotUpdate;
pub use vcpu::{AccessOutcome, Vcpu, VcpuProbe, VcpuStats};
pub use vm::{CloseReport, FastZapTimes, Vm};
pub use walker::GuestAccess;
