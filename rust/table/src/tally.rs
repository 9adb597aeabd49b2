//! A counter with one writer: what a vCPU adds to page statistics without a locked instruction.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// Leaves by level (index 1..=3), written by the owner of one [`crate::TableCache`], read by anybody.
#[repr(align(128))]
#[derive(Debug, Default)]
pub struct Tally([AtomicI64; 4]);

impl Tally {
    /// Adds; only the owner may (two writers would lose counts).
    #[inline]
    pub(crate) fn add(&self, level: u8, count: i64) {
        let cell = &self.0[level as usize];
        cell.store(cell.load(Relaxed) + count, Relaxed);
    }

    /// The count now; exact when the owner rests.
    pub fn get(&self, level: u8) -> i64 {
        self.0[level as usize].load(Relaxed)
    }
}
