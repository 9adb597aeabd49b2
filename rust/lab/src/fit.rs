//! A line through what was measured, and what it says beyond: least squares, with the errors that go with it.
//!
//! **Guarantee.** Points are measurements, none is invented. A value off the line is marked `extrapolated` and carries the 95 % interval in which a *single new
//! measurement* would be expected (prediction interval), which widens with the distance. It knows the scatter of the points, not whether the line goes on.

use serde::Serialize;

/// A fit of nanoseconds over SPTEs.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// The field that is fitted.
    pub of: &'static str,
    /// What was measured: (SPTEs, ns).
    pub points: Vec<(u64, u64)>,
    /// How many points.
    pub n: usize,
    /// Slope.
    pub ns_per_spte: f64,
    /// Its standard error; `None` below three points.
    pub ns_per_spte_se: Option<f64>,
    /// Where the line meets 0 SPTEs.
    pub intercept_ns: f64,
    /// Part of the variance that the line explains; `None` when all values are equal.
    pub r2: Option<f64>,
    /// What the line says elsewhere.
    pub at: Vec<At>,
}

/// The line at one size.
#[derive(Clone, Debug, Serialize)]
pub struct At {
    /// Guest memory.
    pub memory_bytes: u64,
    /// SPTEs of it.
    pub sptes: u64,
    /// The line's value.
    pub ns: f64,
    /// In which a new measurement would lie, 95 %; `None` below three points.
    pub ci95: Option<(f64, f64)>,
    /// Beyond what was measured.
    pub extrapolated: bool,
}

/// Two-sided 95 % quantiles of Student's t, by degrees of freedom from 1.
const T95: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

fn t95(degrees: usize) -> f64 {
    // Beyond the table: t is 1.96 + 2.4 / degrees to three digits.
    T95.get(degrees - 1).copied().unwrap_or_else(|| 1.960 + 2.4 / degrees as f64)
}

impl Fit {
    /// The line through `points`, and its value at each (memory, SPTEs) of `at`. `None` where fewer than two sizes were measured.
    pub fn new(of: &'static str, points: Vec<(u64, u64)>, at: &[(u64, u64)]) -> Option<Self> {
        let n = points.len() as f64;
        let (xs, ys): (Vec<f64>, Vec<f64>) = points.iter().map(|&(x, y)| (x as f64, y as f64)).unzip();
        let mean = |v: &[f64]| v.iter().sum::<f64>() / n;
        let (mx, my) = (mean(&xs), mean(&ys));
        let sxx: f64 = xs.iter().map(|x| (x - mx).powi(2)).sum();
        if points.len() < 2 || sxx == 0.0 {
            return None;
        }
        let sxy: f64 = xs.iter().zip(&ys).map(|(x, y)| (x - mx) * (y - my)).sum();
        let syy: f64 = ys.iter().map(|y| (y - my).powi(2)).sum();
        let slope = sxy / sxx;
        let intercept = my - slope * mx;
        let residuals: f64 = xs.iter().zip(&ys).map(|(x, y)| (y - intercept - slope * x).powi(2)).sum();
        let degrees = points.len() - 2;
        let sigma = (degrees > 0).then(|| (residuals / degrees as f64).sqrt());
        let largest = points.iter().map(|p| p.0).max().unwrap_or(0);
        let at = at
            .iter()
            .map(|&(memory_bytes, sptes)| {
                let x = sptes as f64;
                let ns = intercept + slope * x;
                let half = sigma.map(|s| t95(degrees) * s * (1.0 + 1.0 / n + (x - mx).powi(2) / sxx).sqrt());
                let ci95 = half.map(|h| (ns - h, ns + h));
                At { memory_bytes, sptes, ns, ci95, extrapolated: sptes > largest }
            })
            .collect();
        Some(Self {
            of,
            n: points.len(),
            points,
            ns_per_spte: slope,
            ns_per_spte_se: sigma.map(|s| s / sxx.sqrt()),
            intercept_ns: intercept,
            r2: (syy > 0.0).then(|| 1.0 - residuals / syy),
            at,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_recovered_without_error() {
        let points = (1..=4u64).map(|n| (n * 1_000_000, 5_000 + n * 7_000_000)).collect();
        let fit = Fit::new("update_ns.total", points, &[(64 << 40, 1 << 34)]).expect("a line");
        assert!((fit.ns_per_spte - 7.0).abs() < 1e-9 && (fit.intercept_ns - 5_000.0).abs() < 1e-3, "{fit:?}");
        assert!(fit.ns_per_spte_se.expect("four points") < 1e-9);
        let at = &fit.at[0];
        assert!(at.extrapolated && (at.ns / (5_000.0 + 7.0 * (1u64 << 34) as f64) - 1.0).abs() < 1e-9);
    }

    /// Worked by hand: x 1 2 3 4, y 2 4 5 8: slope 1.9, intercept 0, residual sum 0.7, s^2 0.35, Sxx 5.
    #[test]
    fn errors_are_those_of_least_squares() {
        let fit = Fit::new("x", vec![(1, 2), (2, 4), (3, 5), (4, 8)], &[(0, 10), (0, 2)]).expect("a line");
        let near = |a: f64, b: f64| (a - b).abs() < 1e-3;
        assert!(near(fit.ns_per_spte, 1.9) && near(fit.intercept_ns, 0.0), "{fit:?}");
        assert!(near(fit.ns_per_spte_se.expect("four points"), 0.264_575));
        assert!(near(fit.r2.expect("scatter"), 1.0 - 0.7 / 18.75), "{fit:?}");
        let (low, high) = fit.at[0].ci95.expect("four points");
        // 4.303 * sqrt(0.35) * sqrt(1 + 1/4 + 7.5^2 / 5) = 9.0004
        assert!(near(high - 19.0, 9.0004) && near(19.0 - low, 9.0004), "{low} {high}");
        assert!(fit.at[0].extrapolated && !fit.at[1].extrapolated);
    }

    #[test]
    fn two_points_have_no_error_and_one_no_line() {
        let fit = Fit::new("x", vec![(1, 2), (2, 4)], &[(0, 3)]).expect("a line");
        assert!(fit.ns_per_spte_se.is_none() && fit.at[0].ci95.is_none());
        assert!(Fit::new("x", vec![(1, 2), (1, 4)], &[]).is_none());
    }

    #[test]
    fn a_flat_line_says_so_by_its_error() {
        let fit = Fit::new("x", vec![(1, 100), (2, 90), (4, 110), (8, 98)], &[]).expect("a line");
        assert!(fit.ns_per_spte.abs() < 2.0 * fit.ns_per_spte_se.expect("four points"), "{fit:?}");
    }
}
