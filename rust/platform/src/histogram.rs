//! Histograms whose percentiles are only given where they mean something.

use hdrhistogram::Histogram as Hdr;

/// See [`Histogram::CEILING`].
const CEILING: u64 = 3_600_000_000_000;
/// Significant decimal digits: values up to 2,048 are exact.
const DIGITS: u8 = 3;

/// Counts of values in ns or units. Three significant digits, exact minimum and maximum.
#[derive(Clone, Debug)]
pub struct Histogram {
    hdr: Hdr<u64>,
    min: u64,
    max: u64,
}

/// Count, extremes and percentiles; a percentile q is `None` below 10 / (1 - q) samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Samples.
    pub count: u64,
    /// The smallest; `None` without samples.
    pub min: Option<u64>,
    /// The median; from 20 samples on.
    pub p50: Option<u64>,
    /// From 100 samples on.
    pub p90: Option<u64>,
    /// From 1,000 samples on.
    pub p99: Option<u64>,
    /// From 10,000 samples on.
    pub p999: Option<u64>,
    /// The largest, exact; `None` without samples.
    pub max: Option<u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// The largest value told apart: an hour in ns. Larger ones count as this, their exact maximum is kept.
    pub const CEILING: u64 = CEILING;
    /// Significant decimal digits of values.
    pub const DIGITS: u8 = DIGITS;

    /// An empty histogram. Its counters are touched, hence backed by memory, only where values fall.
    pub fn new() -> Self {
        let hdr = Hdr::new_with_bounds(1, CEILING, DIGITS)
            .expect("the bounds are constants that hdrhistogram accepts");
        Histogram { hdr, min: u64::MAX, max: 0 }
    }

    /// Counts one value.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts `count` equal values.
    #[inline]
    pub fn record_n(&mut self, value: u64, count: u64) {
        if count == 0 {
            return;
        }
        self.hdr.saturating_record_n(value, count);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Adds the other's samples.
    pub fn merge(&mut self, other: &Histogram) {
        self.hdr.add(&other.hdr).expect("both have the same bounds");
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Samples counted.
    pub fn count(&self) -> u64 {
        self.hdr.len()
    }

    /// The value at quantile `q` in 0..=1, within three digits, however few the samples; `None` without any.
    pub fn quantile(&self, q: f64) -> Option<u64> {
        (self.count() > 0).then(|| self.hdr.value_at_quantile(q).clamp(self.min, self.max))
    }

    /// The sum of the samples, within three digits.
    pub fn sum(&self) -> u128 {
        self.hdr
            .iter_recorded()
            .map(|v| u128::from(v.value_iterated_to()) * u128::from(v.count_at_value()))
            .sum()
    }

    /// Each recorded bucket as (highest value, count), ascending: what an HdrHistogram log is written from.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.hdr.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value()))
    }

    /// The summary of DESIGN's `H`.
    pub fn summary(&self) -> Summary {
        let count = self.count();
        let percentile = |q: f64, needed: u64| if count >= needed { self.quantile(q) } else { None };
        Summary {
            count,
            min: (count > 0).then_some(self.min),
            p50: percentile(0.5, 20),
            p90: percentile(0.9, 100),
            p99: percentile(0.99, 1_000),
            p999: percentile(0.999, 10_000),
            max: (count > 0).then_some(self.max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_null_below_ten_over_one_minus_q_samples() {
        let mut h = Histogram::new();
        assert_eq!(h.summary(), Summary::default());
        for (samples, has) in
            [(19, 0), (20, 1), (99, 1), (100, 2), (999, 2), (1_000, 3), (9_999, 3), (10_000, 4)]
        {
            while h.count() < samples {
                h.record(7);
            }
            let s = h.summary();
            let given = [s.p50, s.p90, s.p99, s.p999].iter().flatten().count();
            assert_eq!(given, has, "{samples} samples");
        }
    }

    #[test]
    fn extremes_are_exact_even_beyond_the_ceiling() {
        let mut h = Histogram::new();
        h.record(0);
        h.record(CEILING * 3 + 1);
        let s = h.summary();
        assert_eq!((s.count, s.min, s.max), (2, Some(0), Some(CEILING * 3 + 1)));
    }

    #[test]
    fn small_values_are_exact_and_large_ones_within_a_thousandth() {
        let mut h = Histogram::new();
        for v in 1..=2_000u64 {
            h.record(v);
        }
        assert_eq!(h.summary().p50, Some(1_000));
        let mut big = Histogram::new();
        big.record_n(123_456_789, 20);
        big.record(1_000_000_000);
        assert!(big.quantile(0.5).unwrap().abs_diff(123_456_789) <= 123_456_789 / 1_000);
    }

    #[test]
    fn a_merge_is_the_histogram_of_both() {
        let (mut a, mut b, mut both) = (Histogram::new(), Histogram::new(), Histogram::new());
        for v in 0..1_000u64 {
            let h = if v % 3 == 0 { &mut a } else { &mut b };
            h.record(v * v);
            both.record(v * v);
        }
        a.merge(&b);
        assert_eq!(a.summary(), both.summary());
    }
}
