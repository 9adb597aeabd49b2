//! Our own rows: one function per group of works, named `tdpmmu` so that the peers are set against them.

use crate::harness::{BenchError, Sample};

/// Every row of ours. `pages` and `reps` as for the peers.
///
/// # Errors
/// As the single functions.
pub fn samples(_pages: u64, _reps: u32) -> Result<Vec<Sample>, BenchError> {
    Ok(Vec::new())
}
