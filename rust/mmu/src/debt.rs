//! A TLB flush that is owed, as a value that cannot be forgotten.
//!
//! Bugs 1, 2, 3, 7 and 8 of KVM's history are one mistake: a debt dropped, overwritten or paid too late. Here a debt can only be merged
//! with another or paid; dropping an open one panics in debug builds. (Designs that are flawed on purpose use [`FlushDebt::forget`].)

use std::ops::Range;

/// Gfns whose old translations may still be cached. Pay it before mmu_lock is released, and before the RCU section ends if
/// tables were freed.
#[must_use = "an owed TLB flush must be paid, merged or returned to the caller"]
#[derive(Debug, Default)]
pub struct FlushDebt {
    range: Option<Range<u64>>,
}

impl FlushDebt {
    /// Nothing owed.
    pub fn none() -> Self {
        Self::default()
    }

    /// A flush of `range` is owed on top of what is owed already.
    pub fn owe(&mut self, range: Range<u64>) {
        self.range = Some(match self.range.take() {
            None => range,
            Some(r) => r.start.min(range.start)..r.end.max(range.end),
        });
    }

    /// Takes over another debt.
    pub fn merge(&mut self, mut other: FlushDebt) {
        if let Some(range) = other.range.take() {
            self.owe(range);
        }
    }

    /// Is anything owed?
    pub fn is_owed(&self) -> bool {
        self.range.is_some()
    }

    /// The range to flush, discharging the debt: the caller flushes at once.
    pub fn take(&mut self) -> Option<Range<u64>> {
        self.range.take()
    }

    /// Drops the debt unpaid. Only for designs that are wrong on purpose.
    pub fn forget(mut self) {
        self.range = None;
    }
}

impl Drop for FlushDebt {
    fn drop(&mut self) {
        debug_assert!(
            self.range.is_none() || std::thread::panicking(),
            "a TLB flush of {:x?} was owed and dropped",
            self.range
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debts_add_up_to_the_covering_range() {
        let mut a = FlushDebt::none();
        a.owe(10..20);
        let mut b = FlushDebt::none();
        b.owe(5..6);
        a.merge(b);
        assert_eq!(a.take(), Some(5..20));
        assert!(!a.is_owed());
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "owed and dropped")]
    fn a_dropped_debt_goes_off() {
        let mut debt = FlushDebt::none();
        debt.owe(0..1);
    }
}
