//! Reader-writer locks: taking and releasing them, shared alone, shared by two, and exclusive.
//!
//! `lock-shared-two` is two threads that do nothing else: the figure is the time of one thread's pair of calls while
//! the other does the same, so a lock that scaled perfectly would show the figure of `lock-shared`.

use std::hint::black_box;

use crate::harness::{BenchError, Sample, Work, hammer};

const CALLS: u64 = 50_000;

/// The three rows of one lock; `shared` and `exclusive` build a thread's take-and-release.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn lock_samples<S: FnMut(), E: FnMut()>(
    name: &'static str,
    reps: u32,
    shared: impl Fn() -> S + Sync,
    exclusive: impl Fn() -> E + Sync,
) -> Result<[Sample; 3], BenchError> {
    let sample = |work, ns| Sample { work, name, ns, count: CALLS };
    Ok([
        sample(Work::LockShared, hammer(1, reps * 4, CALLS, &shared)?),
        sample(Work::LockSharedTwo, hammer(2, reps * 4, CALLS, &shared)?),
        sample(Work::LockExclusive, hammer(1, reps * 4, CALLS, &exclusive)?),
    ])
}

/// The rows of the peers.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn samples(reps: u32) -> Result<Vec<Sample>, BenchError> {
    let parking = parking_lot::RwLock::new(0u64);
    let std = std::sync::RwLock::new(0u64);
    let mut out = Vec::new();
    out.extend(lock_samples(
        "parking_lot",
        reps,
        || || drop(black_box(parking.read())),
        || || *parking.write() += 1,
    )?);
    out.extend(lock_samples(
        "std",
        reps,
        || || drop(black_box(std.read())),
        || || *std.write().unwrap_or_else(std::sync::PoisonError::into_inner) += 1,
    )?);
    // Every exclusive call of every round counted, or the lock did not exclude.
    let expected = CALLS * u64::from(reps * 4 + 1);
    let std = *std.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (name, got) in [("parking_lot", *parking.read()), ("std", std)] {
        if got != expected {
            let (work, what) = (Work::LockExclusive, "exclusive sections");
            return Err(BenchError::WorkNotDone { work, name, what, got, expected });
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_lock_has_three_rows() {
        let rows = super::samples(1).unwrap();
        assert_eq!(rows.len(), 6);
        assert!(rows.iter().all(|row| row.ns > 0.0));
    }
}
