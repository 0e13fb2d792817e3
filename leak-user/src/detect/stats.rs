//! The statistics that verdicts rest on, each with its source. Plain functions over numbers; what they mean for memory is
//! [`super::judge`]'s business. Distribution functions come from statrs.

use statrs::distribution::{ContinuousCDF, Gamma, Normal};

/// A monotone trend test and a robust slope, over equally spaced values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Trend {
    /// Standardised Mann-Kendall statistic, positive for a rise; corrected for ties and continuity.
    pub z: f64,
    /// Theil-Sen slope per step: the median of the slopes between all pairs.
    pub slope: f64,
    /// Sen's 95 % interval of the slope. It holds for independent deviations from a line.
    pub ci95: (f64, f64),
}

/// Two-sided 95 % quantile of the standard normal distribution.
const Z95: f64 = 1.959_963_985;

/// Mann-Kendall test with the Theil-Sen slope and its interval.
///
/// Sources: H. B. Mann, "Nonparametric tests against trend", Econometrica 13 (1945) 245-259; M. G. Kendall, "Rank
/// correlation methods", 4th ed. (1975), for the variance with ties; H. Theil, "A rank-invariant method of linear and
/// polynomial regression analysis", Proc. K. Ned. Akad. Wet. 53 (1950); P. K. Sen, "Estimates of the regression
/// coefficient based on Kendall's tau", J. Am. Stat. Assoc. 63 (1968) 1379-1389, for the interval.
///
/// The cost is quadratic in the number of values; callers pass at most a few dozen. Fewer than three values have no
/// trend.
pub fn trend(values: &[f64]) -> Trend {
    let n = values.len();
    if n < 3 {
        return Trend::default();
    }
    let mut slopes = Vec::with_capacity(n * (n - 1) / 2);
    for (i, early) in values.iter().enumerate() {
        slopes.extend(values[i + 1..].iter().zip(1_u32..).map(|(late, steps)| (late - early) / f64::from(steps)));
    }
    slopes.sort_unstable_by(f64::total_cmp);
    let middle = slopes.len() as f64 / 2.0;
    let margin = Z95 * score_variance(values).sqrt() / 2.0;
    let low = (middle - margin).floor().max(1.0) as usize - 1;
    let high = ((middle + margin).ceil() as usize).min(slopes.len() - 1);
    Trend { z: rise(values), slope: median_of_sorted(&slopes), ci95: (slopes[low], slopes[high]) }
}

/// The Mann-Kendall statistic alone, at a fraction of the cost of [`trend`]; zero for fewer than three values.
pub fn rise(values: &[f64]) -> f64 {
    let mut score = 0_i32;
    for (i, early) in values.iter().enumerate() {
        for late in &values[i + 1..] {
            score += i32::from(late > early) - i32::from(late < early);
        }
    }
    if values.len() < 3 || score == 0 {
        return 0.0;
    }
    f64::from(score - score.signum()) / score_variance(values).sqrt()
}

/// Variance of Kendall's score where there is no trend, with ties.
fn score_variance(values: &[f64]) -> f64 {
    let term = |t: f64| t * (t - 1.0) * (2.0 * t + 5.0);
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let ties: f64 = sorted.chunk_by(|a, b| a.total_cmp(b).is_eq()).map(|tied| term(tied.len() as f64)).sum();
    (term(values.len() as f64) - ties) / 18.0
}

/// Median of values in order; zero of none.
fn median_of_sorted(sorted: &[f64]) -> f64 {
    let n = sorted.len();
    match n {
        0 => 0.0,
        _ if n % 2 == 1 => sorted[n / 2],
        _ => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The probability that a standard normal variable stays below `z`.
pub fn normal_below(z: f64) -> f64 {
    Normal::standard().cdf(z)
}

/// The probability that a Poisson variable with this mean exceeds `events`: how surely a mean as high is excluded by having
/// seen so few. At 0.95 the mean is the upper 95 % bound of Garwood's interval. Through the gamma distribution, which also
/// takes fractions of events. Source: F. Garwood, "Fiducial limits for the Poisson distribution", Biometrika 28 (1936)
/// 437-442.
pub fn poisson_above(events: f64, mean: f64) -> f64 {
    if mean <= 0.0 {
        return 0.0;
    }
    Gamma::new(events.max(0.0) + 1.0, 1.0).map_or(0.0, |gamma| gamma.cdf(mean))
}

/// Quantiles of the gamma distribution at 0.025 (`upper` false) and 0.975, scale one. Where the shape is large by the cube of
/// a normal variable, exact to a part in a thousand. Source: E. B. Wilson and M. M. Hilferty, "The distribution of
/// chi-square", Proc. Natl. Acad. Sci. 17 (1931) 684-688.
fn gamma_quantile95(shape: f64, upper: bool) -> f64 {
    if shape < 20.0 {
        let probability = if upper { 0.975 } else { 0.025 };
        return Gamma::new(shape, 1.0).map_or(f64::INFINITY, |gamma| gamma.inverse_cdf(probability));
    }
    let z = if upper { Z95 } else { -Z95 };
    shape * (1.0 - 1.0 / (9.0 * shape) + z / (3.0 * shape.sqrt())).powi(3)
}

/// Mean of amounts per window, with a 95 % interval.
///
/// The amounts are taken for sums of random events (blocks that arrive and stay) which differ in number and in size: a
/// compound Poisson sum. It is matched to a plain Poisson sum with the same mean and variance, of `k` = mean^2 * n /
/// variance equal events (the effective number), whose interval is Garwood's. The variance is the one between windows, so
/// bursts widen the interval, and it is widened for being estimated from `n` windows. Evenly spaced events narrow it.
pub fn mean_with_interval(amounts: &[f64]) -> (f64, (f64, f64)) {
    let n = amounts.len() as f64;
    if amounts.len() < 2 {
        return (amounts.first().copied().unwrap_or(0.0), (0.0, f64::INFINITY));
    }
    let mean = amounts.iter().sum::<f64>() / n;
    if mean <= 0.0 {
        return (mean, (0.0, 0.0));
    }
    let variance = amounts.iter().map(|amount| (amount - mean).powi(2)).sum::<f64>() / (n - 1.0);
    // Student's quantile over the normal one, squared, to first order: (1 + (z^2 + 1) / (4 (n - 1)))^2.
    let widening = (1.0 + (Z95 * Z95 + 1.0) / (4.0 * (n - 1.0))).powi(2);
    let events = mean * mean * n / (variance * widening).max(f64::MIN_POSITIVE);
    if events > 1e12 {
        return (mean, (mean, mean));
    }
    let low = gamma_quantile95(events, false) / events;
    let high = gamma_quantile95(events + 1.0, true) / events;
    (mean, (mean * low, mean * high))
}

/// 95 % interval of a total of which `estimate` is estimated from samples, with this variance, and the rest is known.
///
/// The estimate is a sum over independently drawn blocks that weigh differently. As in [`mean_with_interval`] it is matched to a
/// plain Poisson sum with the same mean and variance, of `k` = estimate^2 / variance equal events. Of that the interval is the one
/// that H. Jeffreys' prior gives: quantiles of the gamma distribution with shape k + 1/2. Its coverage stays about 95 % down to a
/// handful of events, where a normal interval covers too little and Garwood's exact one too much (L. D. Brown, T. T. Cai and
/// A. `DasGupta`, "Interval estimation in exponential families", Statistica Sinica 13 (2003) 19-49).
pub fn around(total: u64, estimate: f64, variance: f64) -> [u64; 2] {
    if estimate <= 0.0 || variance <= 0.0 {
        return [total, total];
    }
    let known = total as f64 - estimate;
    let events = estimate * estimate / variance;
    if events > 1e12 {
        return [total, total];
    }
    let bound = |upper| (known + estimate * gamma_quantile95(events + 0.5, upper) / events).max(0.0).round() as u64;
    [bound(false).min(total), bound(true).max(total)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-3 * b.abs().max(1.0)
    }

    /// Score, variance and slope agree with values worked out by hand.
    #[test]
    fn trend_of_small_samples() {
        let rising = trend(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        // S = 10, var = 5 * 4 * 15 / 18.
        assert!(close(rising.z, 9.0 / (300.0_f64 / 18.0).sqrt()), "{rising:?}");
        assert!(close(rising.slope, 1.0));
        // One outlier does not move the median slope, ties shrink the variance: S = 7 - 2, ties of two.
        let tied = trend(&[1.0, 1.0, 2.0, 100.0, 3.0]);
        assert!(close(tied.z, 6.0 / ((300.0_f64 - 18.0) / 18.0).sqrt()), "{tied:?}");
        assert_eq!(trend(&[7.0; 10]), Trend { z: 0.0, slope: 0.0, ci95: (0.0, 0.0) });
        assert_eq!(trend(&[1.0, 9.0]), Trend::default());
        assert!(trend(&[5.0, 4.0, 3.0, 1.0]).z < 0.0);
    }

    /// Sen's interval contains the slope of a line with independent noise in about 95 of 100 cases.
    #[test]
    fn slope_interval_covers() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        let hits = (0..1000).filter(|_| {
            let values: Vec<f64> = (0..20).map(|x| 3.0 * f64::from(x) + rng.random_range(-20.0..20.0)).collect();
            let (low, high) = trend(&values).ci95;
            (low..=high).contains(&3.0)
        });
        let hits = hits.count();
        assert!((920..=985).contains(&hits), "{hits} of 1000");
    }

    /// Poisson bounds agree with published values (Garwood's table).
    #[test]
    fn poisson_bounds() {
        assert!(close(poisson_above(0.0, 2.996), 0.95));
        assert!(close(poisson_above(5.0, 10.513), 0.95));
        assert!(close(poisson_above(0.0, 0.0), 0.0));
        // 2.5 % and 97.5 % of chi-square with twice as many degrees of freedom, halved: 10, 40 and 200.
        assert!(close(gamma_quantile95(5.0, false), 1.6235) && close(gamma_quantile95(5.0, true), 10.2416));
        assert!(close(gamma_quantile95(20.0, false), 12.2165) && close(gamma_quantile95(20.0, true), 29.6709));
        assert!(close(gamma_quantile95(100.0, false), 81.364) && close(gamma_quantile95(100.0, true), 120.529));
    }

    /// The interval of a mean is the Poisson one for single events, tight for even amounts and empty for nothing.
    #[test]
    fn intervals_of_means() {
        let (mean, (low, high)) = mean_with_interval(&[100.0; 10]);
        assert!(close(mean, 100.0) && close(low, 100.0) && close(high, 100.0));
        assert_eq!(mean_with_interval(&[0.0; 5]), (0.0, (0.0, 0.0)));
        let (mean, (low, high)) = mean_with_interval(&[0.0, 3.0, 1.0, 0.0, 2.0, 0.0, 1.0, 2.0, 1.0, 0.0]);
        assert!(close(mean, 1.0) && low > 0.3 && low < 0.55 && high > 1.6 && high < 2.2, "{low} {high}");
    }
}
