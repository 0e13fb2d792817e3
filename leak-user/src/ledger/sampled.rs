//! What sampled blocks stand for.
//!
//! A block of `size` bytes was sampled with the probability P = 1 - exp(-size / interval), so it stands for 1 / P blocks and
//! size / P bytes. Summed over the sampled blocks that is the estimate of D. G. Horvitz and D. J. Thompson ("A generalization of
//! sampling without replacement from a finite universe", J. Am. Stat. Assoc. 47 (1952) 663-685): without bias whatever the sizes
//! are and however the interval changes from block to block. Since blocks are drawn independently, its variance is estimated,
//! without bias as well, by the sum of size^2 (1 - P) / P^2 over the same blocks.

use leak_common::sampling::Interval;

/// What one sampled block stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Weight {
    pub bytes: f64,
    pub count: f64,
    /// Its share of the variances of the sums of both.
    pub bytes_variance: f64,
    pub count_variance: f64,
}

impl Weight {
    /// Of a block of so many bytes.
    pub fn of(interval: Interval, size: u64) -> Self {
        let mean = interval.bytes();
        if mean == 0 {
            return Self { bytes: size as f64, count: 1.0, bytes_variance: 0.0, count_variance: 0.0 };
        }
        // An empty block is sampled as one of a byte.
        let probability = -(-(size.max(1) as f64) / mean as f64).exp_m1();
        let count = 1.0 / probability;
        let count_variance = (1.0 - probability) * count * count;
        let size = size as f64;
        Self { bytes: size * count, count, bytes_variance: size * size * count_variance, count_variance }
    }

    /// Bytes as they are counted: whole ones. What that changes is less than half a byte in more than an interval.
    pub fn whole_bytes(&self) -> u64 {
        self.bytes.round() as u64
    }
}

/// Of sampled blocks: how many there are, what they stand for, and the variance of that.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampled {
    /// Blocks that were seen.
    pub seen: u64,
    pub bytes: f64,
    pub bytes_variance: f64,
    pub count: f64,
    pub count_variance: f64,
}

impl Sampled {
    pub(crate) fn add(&mut self, weight: &Weight) {
        self.seen += 1;
        self.bytes += weight.bytes;
        self.bytes_variance += weight.bytes_variance;
        self.count += weight.count;
        self.count_variance += weight.count_variance;
    }

    /// Takes out a block that was added.
    pub(crate) fn remove(&mut self, weight: &Weight) {
        self.seen = self.seen.saturating_sub(1);
        if self.seen == 0 {
            // What rounding has left over goes as well.
            *self = Self::default();
            return;
        }
        self.bytes = (self.bytes - weight.bytes).max(0.0);
        self.bytes_variance = (self.bytes_variance - weight.bytes_variance).max(0.0);
        self.count = (self.count - weight.count).max(0.0);
        self.count_variance = (self.count_variance - weight.count_variance).max(0.0);
    }

    /// Both together: blocks are drawn independently of each other.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            seen: self.seen + other.seen,
            bytes: self.bytes + other.bytes,
            bytes_variance: self.bytes_variance + other.bytes_variance,
            count: self.count + other.count,
            count_variance: self.count_variance + other.count_variance,
        }
    }
}

/// The sampled part of what a history counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SampledTotals {
    pub live: Sampled,
    pub allocated: Sampled,
    pub freed: Sampled,
}

impl SampledTotals {
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            live: self.live.and(&other.live),
            allocated: self.allocated.and(&other.allocated),
            freed: self.freed.and(&other.freed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights at the ends of the range of sizes: small blocks stand for the interval, large ones for themselves.
    #[test]
    fn weights() {
        let interval = Interval::near(512 << 10);
        let small = Weight::of(interval, 16);
        assert!((small.bytes - 524_296.0).abs() < 0.1 && (small.count - 32_768.5).abs() < 0.1, "{small:?}");
        let large = Weight::of(interval, 64 << 20);
        assert!((large.count - 1.0).abs() < 1e-9 && large.bytes_variance < 1.0, "{large:?}");
        let even = Weight::of(interval, 512 << 10);
        assert!((even.count - 1.581_976_7).abs() < 1e-6, "{even:?}");
        let empty = Weight::of(interval, 0);
        assert!(empty.bytes == 0.0 && empty.count > 500_000.0, "{empty:?}");
        let exact = Weight::of(Interval::EXACT, 7);
        assert!(exact.bytes_variance <= 0.0 && exact.count_variance <= 0.0 && exact.whole_bytes() == 7, "{exact:?}");
    }

    /// What is added and removed again leaves nothing, whatever was rounded.
    #[test]
    fn sums_end_at_zero() {
        let weights: Vec<_> = (1..2000_u64).map(|size| Weight::of(Interval::near(4096), size * 37)).collect();
        let mut sum = Sampled::default();
        for weight in &weights {
            sum.add(weight);
        }
        assert_eq!(sum.seen, 1999);
        for weight in weights.iter().rev() {
            sum.remove(weight);
        }
        assert_eq!(sum, Sampled::default());
    }
}
