//! Reader-writer locks: taking and releasing them, shared alone, shared by two, and exclusive.
//!
//! `lock-shared-two` is two threads that do nothing else: the figure is the time of one thread's pair of calls while
//! the other does the same, so a lock that scaled perfectly would show the figure of `lock-shared`.

use crate::harness::{BenchError, Sample, Work, hammer, hammer_together};

const CALLS: u64 = 50_000;

/// The rows of one lock, the contended one only where two threads did run at once; `shared` and `exclusive` build a thread's take-and-release.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn lock_samples<S: FnMut(), E: FnMut()>(
    name: &'static str,
    reps: u32,
    shared: impl Fn() -> S + Sync,
    exclusive: impl Fn() -> E + Sync,
) -> Result<Vec<Sample>, BenchError> {
    let sample = |work, ns| Sample { work, name, ns, count: CALLS };
    let mut out = vec![
        sample(Work::LockShared, hammer(reps * 4, CALLS, &shared)),
        sample(Work::LockExclusive, hammer(reps * 4, CALLS, &exclusive)),
    ];
    match hammer_together(2, reps * 4, CALLS, &shared)? {
        Some(ns) => out.push(sample(Work::LockSharedTwo, ns)),
        None => eprintln!("peers: {name}: no lock-shared-two: two threads never ran at the same time"),
    }
    Ok(out)
}

/// The rows of the peers.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn samples(reps: u32) -> Result<Vec<Sample>, BenchError> {
    let parking = parking_lot::RwLock::new(0u64);
    let std = std::sync::RwLock::new(0u64);
    let mut out = Vec::new();
    out.extend(lock_samples("parking_lot", reps, || || drop(parking.read()), || || *parking.write() += 1)?);
    out.extend(lock_samples(
        "std",
        reps,
        || || drop(std.read()),
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
    fn every_lock_has_its_rows() {
        let rows = super::samples(1).unwrap();
        // The contended rows need two free CPUs.
        assert!((4..=6).contains(&rows.len()));
        assert!(rows.iter().all(|row| row.ns > 0.0));
    }
}
