//! Sampling by bytes: how often, and after how many bytes the next time.
//!
//! Each thread counts down a number of bytes that is drawn from an exponential distribution. The allocation whose size takes
//! it to zero is sampled, and the number is drawn anew. Since that distribution has no memory, every allocation is sampled by
//! itself with the probability 1 - exp(-size / interval), whatever came before it, and also where the interval changes and
//! the number is drawn anew for that. tcmalloc and jemalloc sample so
//! (<https://github.com/google/tcmalloc/blob/master/docs/sampling.md>,
//! <https://github.com/jemalloc/jemalloc/blob/dev/doc_internal/PROFILING_INTERNALS.md>).
//!
//! The same code runs in the kernel and in the tests of user space, which look at what it draws.

/// The mean number of bytes between samples, in eight bits: none, or three bits after the leading one and five bits of exponent.
/// So it is at most 1/16 away from what was asked for; powers of two are exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Interval(u8);

impl Interval {
    /// Every allocation is followed.
    pub const EXACT: Self = Self(0);
    /// The shortest: 9 bytes.
    pub const SHORTEST: Self = Self(1);
    /// The longest: 30 GiB.
    pub const LONGEST: Self = Self(u8::MAX);

    #[inline]
    pub const fn from_code(code: u8) -> Self {
        Self(code)
    }

    #[inline]
    pub const fn code(self) -> u8 {
        self.0
    }

    #[inline]
    pub const fn is_exact(self) -> bool {
        self.0 == 0
    }

    /// The interval next to so many bytes, within the shortest and the longest.
    #[must_use]
    pub const fn near(bytes: u64) -> Self {
        if bytes <= Self::SHORTEST.bytes() {
            return Self::SHORTEST;
        }
        if bytes >= Self::LONGEST.bytes() {
            return Self::LONGEST;
        }
        // Nine or more, so the leading one stands at bit 3 or higher.
        let exponent = bytes.ilog2() - 3;
        let low = Self(((exponent << 3) | ((bytes >> exponent) as u32 & 7)) as u8);
        let high = Self(low.0.saturating_add(1));
        if high.bytes() - bytes < bytes - low.bytes() { high } else { low }
    }

    /// In bytes; zero where every allocation is followed.
    #[inline]
    #[must_use]
    pub const fn bytes(self) -> u64 {
        if self.0 == 0 { 0 } else { self.mantissa() << self.exponent() }
    }

    #[inline]
    const fn mantissa(self) -> u64 {
        8 + (self.0 as u64 & 7)
    }

    #[inline]
    const fn exponent(self) -> u32 {
        self.0 as u32 >> 3
    }

    /// How many bytes to count down until the next sample, from 32 random bits: -ln(u) times the interval, rounded up, where
    /// u is uniform in (0, 1]. Rounded up because an allocation of `size` bytes is sampled if that is at least what is left:
    /// rounded down, small ones would be sampled too often.
    #[inline]
    #[must_use]
    pub const fn draw(self, random: u32) -> u64 {
        // At most 15 * 32 * ln 2 in 32 binary places: 41 bits. With 22 of the places there is room for an exponent of up to 31.
        let scaled = (self.mantissa() * negative_ln(random)) >> 10;
        ((scaled << self.exponent()) >> 22) + 1
    }
}

/// ln 2 in 32 binary places.
const LN_2: u64 = 2_977_044_472;

/// Binary places of the fraction of a logarithm that are computed.
const PLACES: u32 = 26;

/// -ln((random + 1) / 2^32) in 32 binary places: from 0 to 22.2.
///
/// The logarithm to base two comes bit by bit: squaring a number doubles its logarithm, so whether the square of a number between
/// one and two is above two is the next bit (D. E. Knuth, "The Art of Computer Programming", vol. 1, 1.2.2, exercise 25 and the
/// text before it). No table and no branch, which would cost the verifier more than this costs the processor.
#[inline]
#[must_use]
pub const fn negative_ln(random: u32) -> u64 {
    let value = random as u64 + 1;
    let whole = value.ilog2();
    // Between one and two, in 31 places.
    let mut number = (value << 31) >> whole;
    let mut log2 = whole as u64;
    let mut place = 0;
    while place < PLACES {
        number = (number * number) >> 31;
        let bit = number >> 32;
        number >>= bit;
        log2 = (log2 << 1) | bit;
        place += 1;
    }
    // At most 32 in 26 places, times 32 bits of ln 2: 63 bits.
    let negative = (32 << PLACES) - log2;
    (negative * LN_2) >> PLACES
}

/// How a process is sampled, as one word that user space changes while programs read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sampling(pub u64);

impl Sampling {
    const FILTERED: u64 = 1 << 8;
    const ATTACHMENT_BIT: u32 = 16;

    /// Of process `tgid`, which the word names so that a thread that remembers the place of another one's notices.
    #[inline]
    #[must_use]
    pub const fn new(tgid: u32, interval: Interval, frees_filtered: bool) -> Self {
        Self((tgid as u64) << 32 | interval.0 as u64 | if frees_filtered { Self::FILTERED } else { 0 })
    }

    /// The same, at the attachment of this number.
    #[inline]
    #[must_use]
    pub const fn at_attachment(self, number: u16) -> Self {
        Self(self.0 & !((u16::MAX as u64) << Self::ATTACHMENT_BIT) | (number as u64) << Self::ATTACHMENT_BIT)
    }

    /// How often the process's breakpoints were set again, from zero after the last. A call that a thread was in when they were
    /// removed has ended unseen: it says nothing of those that are made since.
    #[inline]
    #[must_use]
    pub const fn attachment(self) -> u16 {
        (self.0 >> Self::ATTACHMENT_BIT) as u16
    }

    #[inline]
    #[must_use]
    pub const fn tgid(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline]
    #[must_use]
    pub const fn interval(self) -> Interval {
        Interval(self.0 as u8)
    }

    /// Whether frees of addresses that are not in the map of sampled ones end in the kernel.
    #[inline]
    #[must_use]
    pub const fn frees_filtered(self) -> bool {
        self.0 & Self::FILTERED != 0
    }
}

/// Key of the map of sampled blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    pub tgid: u32,
    pub reserved: u32,
    pub addr: u64,
}
const _: () = assert!(size_of::<Address>() == 16);

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    /// xorshift* (G. Marsaglia, "Xorshift RNGs", J. Stat. Softw. 8, 2003): any source of even bits will do.
    fn random(seed: u64) -> impl FnMut() -> u32 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
        }
    }

    /// An attachment's number changes nothing else in the word.
    #[test]
    fn attachments_leave_the_rest_alone() {
        let word = Sampling::new(u32::MAX, Interval::LONGEST, true);
        for number in [0, 1, u16::MAX] {
            let at = word.at_attachment(u16::MAX).at_attachment(number);
            assert_eq!(at.attachment(), number);
            assert_eq!((at.tgid(), at.interval(), at.frees_filtered()), (u32::MAX, Interval::LONGEST, true));
        }
    }

    /// Every interval is found again by its bytes; others are at most a sixteenth away; the ends hold what is beyond.
    #[test]
    fn intervals_in_eight_bits() {
        let all: Vec<_> = (1..=u8::MAX).map(Interval::from_code).collect();
        assert!(all.windows(2).all(|pair| pair[0].bytes() < pair[1].bytes()));
        assert!(all.iter().all(|interval| Interval::near(interval.bytes()) == *interval));
        for bytes in (9..100_000).chain((0..35).map(|bit| (1_u64 << bit) + 12_345).filter(|bytes| *bytes < 30 << 30)) {
            let near = Interval::near(bytes).bytes();
            assert!(near.abs_diff(bytes) * 16 <= bytes, "{bytes} is told as {near}");
        }
        assert_eq!(Interval::near(512 << 10).bytes(), 512 << 10);
        assert_eq!([0, 9, u64::MAX].map(|bytes| Interval::near(bytes).bytes()), [9, 9, 30 << 30]);
        assert_eq!(Interval::EXACT.bytes(), 0);
    }

    /// The logarithm agrees with that of the standard library to a ten-millionth, everywhere.
    #[test]
    fn logarithms() {
        let mut random = random(1);
        let ends = [0, 1, 2, 3, 1 << 31, (1 << 31) - 1, u32::MAX - 1, u32::MAX];
        for bits in ends.into_iter().chain((0..200_000).map(|_| random())) {
            let expected = -((f64::from(bits) + 1.0) / 4_294_967_296.0).ln();
            let found = negative_ln(bits) as f64 / 4_294_967_296.0;
            assert!((found - expected).abs() < 1e-7, "{bits}: {found}, not {expected}");
        }
    }

    /// What is drawn is exponentially distributed: the mean is the interval, and the largest distance of the distribution
    /// functions is what Kolmogorov's test allows (1.95 / sqrt(n) at one in a thousand).
    #[test]
    fn draws_are_exponential() {
        for (seed, interval) in
            [9, 4096, 100_000, 512 << 10, 1 << 30, 30 << 30].map(Interval::near).into_iter().enumerate()
        {
            let mut random = random(seed as u64 + 1);
            let draws = 200_000;
            let mut drawn: Vec<f64> = (0..draws).map(|_| interval.draw(random()) as f64).collect();
            let mean = drawn.iter().sum::<f64>() / f64::from(draws);
            let expected = interval.bytes() as f64;
            // Rounding up adds half a byte, or what the distribution of whole bytes has more: 1 / (1 - exp(-1 / interval)).
            let whole = 1.0 / -(-1.0 / expected).exp_m1();
            assert!((mean / whole - 1.0).abs() < 0.01, "mean {mean}, interval {expected}");
            drawn.sort_by(f64::total_cmp);
            let distance = drawn.iter().enumerate().map(|(below, draw)| {
                let probability = -(-draw / expected).exp_m1();
                // Whole bytes: compared where the function jumps, at the last of equal ones.
                let last = drawn.get(below + 1).is_none_or(|next| next > draw);
                if last { ((below + 1) as f64 / f64::from(draws) - probability).abs() } else { 0.0 }
            });
            let distance = distance.fold(0.0, f64::max);
            assert!(distance < 1.95 / f64::from(draws).sqrt(), "distance {distance} at {expected}");
        }
    }

    /// The parts of the word are read back.
    #[test]
    fn a_word_of_settings() {
        for filtered in [false, true] {
            let word = Sampling::new(u32::MAX - 1, Interval::near(4096), filtered);
            assert_eq!(
                (word.tgid(), word.interval(), word.frees_filtered()),
                (u32::MAX - 1, Interval::near(4096), filtered)
            );
        }
    }
}
