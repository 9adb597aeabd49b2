//! The host kernel's own first-stage tables: what it takes to populate and to unmap zero-page 4K PTEs.

use crate::harness::{Sample, Work};
use crate::limits::Limits;

/// Two rows, from the figures that the limits already hold.
pub fn samples(limits: &Limits) -> Vec<Sample> {
    let count = limits.munmap_ptes as u64;
    vec![
        Sample { work: Work::Map, name: "host (populate zero page)", ns: limits.host_populate_ns, count },
        Sample { work: Work::Teardown, name: "host (munmap)", ns: limits.munmap_ns, count },
    ]
}
