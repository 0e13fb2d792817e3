//! Numbers as people read them: binary units of bytes, rates in the unit of time that reads best, durations, counts.

/// Units of bytes, each 1024 times the one before.
const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Bytes with three digits: `512 B`, `1.20 MiB`, `12.3 MiB`, `123 GiB`.
pub fn bytes(bytes: u64) -> String {
    let (value, unit) = scale(bytes as f64);
    format!("{} {}", digits(value / unit.0), unit.1)
}

/// Bytes with their 95 % interval where they are an estimate: `~1.20 MiB [1.05, 1.37]`, in one unit.
pub fn estimated_bytes(value: u64, ci95: Option<[u64; 2]>) -> String {
    let Some([low, high]) = ci95 else { return bytes(value) };
    let (value, (divisor, unit)) = scale(value as f64);
    let [low, high] = [low, high].map(|bound| digits(bound as f64 / divisor));
    format!("~{} {unit} [{low}, {high}]", digits(value / divisor))
}

/// A number of things with its interval where it is an estimate: `~1,234 blocks [1,100, 1,380]`.
pub fn estimated_plural(n: u64, ci95: Option<[u64; 2]>, word: &str) -> String {
    match ci95 {
        Some([low, high]) => format!("~{} [{}, {}]", plural(n, word), count(low), count(high)),
        None => plural(n, word),
    }
}

/// The divisor and name of the unit that fits `value`.
fn scale(value: f64) -> (f64, (f64, &'static str)) {
    let mut divisor = 1.0;
    let mut names = UNITS.iter();
    let mut name = names.next().copied().unwrap_or("B");
    // From 1000 on, so that no number has four digits.
    while value.abs() / divisor >= 999.5 {
        let Some(next) = names.next() else { break };
        divisor *= 1024.0;
        name = next;
    }
    (value, (divisor, name))
}

/// Three digits; whole bytes have none after the point.
fn digits(value: f64) -> String {
    let size = value.abs();
    let whole = size.fract() == 0.0 && (size >= 10.0 || size == 0.0);
    if whole || size >= 99.95 {
        format!("{value:.0}")
    } else if size >= 9.995 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A rate and its unit, chosen so that the number is neither tiny nor long: a second, a minute or an hour.
pub struct Rate {
    /// Multiplies bytes a second.
    factor: f64,
    unit: &'static str,
    per: &'static str,
}

impl Rate {
    /// The unit that suits `bytes_per_s`.
    pub fn of(bytes_per_s: f64) -> Self {
        let size = bytes_per_s.abs();
        let (seconds, per) = if size >= 100.0 * 1024.0 {
            (1.0, "s")
        } else if size * 60.0 >= 1024.0 {
            (60.0, "min")
        } else {
            (3600.0, "h")
        };
        let (_, (divisor, unit)) = scale(bytes_per_s * seconds);
        Self { factor: seconds / divisor, unit, per }
    }

    fn number(&self, bytes_per_s: f64) -> String {
        let text = digits(bytes_per_s * self.factor);
        if text.trim_matches(['-', '0', '.']).is_empty() { "0".to_owned() } else { text }
    }

    /// Such as `1.20 MiB/min`, or `1.20 MiB/min [1.10, 1.30]` with the interval in the same unit.
    pub fn show(&self, bytes_per_s: f64, interval: Option<[f64; 2]>) -> String {
        let value = format!("{} {}/{}", self.number(bytes_per_s), self.unit, self.per);
        match interval {
            Some([low, high]) => {
                let (mut from, mut to) = (self.number(low), self.number(high));
                if from == to && low < high {
                    // A narrow interval needs more digits, or it would look like none.
                    (from, to) = (format!("{:.2}", low * self.factor), format!("{:.2}", high * self.factor));
                }
                format!("{value} [{from}, {to}]")
            }
            None => value,
        }
    }
}

/// Bytes a second in the unit that suits them.
pub fn rate(bytes_per_s: f64) -> String {
    Rate::of(bytes_per_s).show(bytes_per_s, None)
}

/// Seconds in the two largest units: `0.5 s`, `45 s`, `3 min 20 s`, `3 h 20 min`, `2 d 4 h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".to_owned();
    }
    if seconds < 9.95 && seconds.fract() != 0.0 {
        return format!("{seconds:.1} s");
    }
    let total = seconds.round().min(u64::MAX as f64) as u64;
    let (large, small) = match total {
        0..60 => return format!("{total} s"),
        60..3600 => ((total / 60, "min"), (total % 60, "s")),
        3600..86_400 => ((total / 3600, "h"), (total % 3600 / 60, "min")),
        _ => ((total / 86_400, "d"), (total % 86_400 / 3600, "h")),
    };
    if small.0 == 0 {
        format!("{} {}", large.0, large.1)
    } else {
        format!("{} {} {} {}", large.0, large.1, small.0, small.1)
    }
}

/// A time to come, as far as an estimate is worth saying: two digits of it.
pub fn about(seconds: f64) -> String {
    let step = match seconds {
        s if s < 60.0 => 5.0,
        s if s < 600.0 => 30.0,
        s if s < 3600.0 => 60.0,
        s if s < 10.0 * 3600.0 => 600.0,
        s if s < 48.0 * 3600.0 => 3600.0,
        _ => 86_400.0,
    };
    duration(((seconds / step).round() * step).max(step))
}

/// A count with its thousands apart: `1,234,567`.
pub fn count(count: u64) -> String {
    let text = count.to_string();
    let mut out = String::with_capacity(text.len() + text.len() / 3);
    for (i, digit) in text.chars().enumerate() {
        if i > 0 && (text.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Events a second: `950`, `42.3k`, `1.20M`.
pub fn events(per_s: f64) -> String {
    match per_s {
        n if n < 999.5 => format!("{n:.0}"),
        n if n < 999_500.0 => format!("{}k", digits(n / 1e3)),
        n => format!("{}M", digits(n / 1e6)),
    }
}

/// `1 block`, `2 blocks`, `1,234 blocks`.
pub fn plural(n: u64, word: &str) -> String {
    format!("{} {word}{}", count(n), if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three digits and a binary unit at every magnitude.
    #[test]
    fn bytes_read_well() {
        for (n, text) in [
            (0, "0 B"),
            (7, "7.00 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (12 << 20, "12 MiB"),
            (12_900_000, "12.3 MiB"),
            (1023 << 20, "1.00 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(n), text, "{n}");
        }
    }

    /// An estimate is marked and has its interval in its own unit; what is known has neither.
    #[test]
    fn estimates_read_well() {
        assert_eq!(estimated_bytes(1 << 20, None), "1.00 MiB");
        assert_eq!(estimated_bytes(1_258_291, Some([1_101_004, 1_436_549])), "~1.20 MiB [1.05, 1.37]");
        assert_eq!(estimated_bytes(600 << 10, Some([0, 2 << 20])), "~600 KiB [0, 2048]");
        assert_eq!(estimated_plural(1234, Some([1100, 1380]), "block"), "~1,234 blocks [1,100, 1,380]");
        assert_eq!(estimated_plural(1, None, "block"), "1 block");
    }

    /// The unit of time follows the rate, and the interval keeps the unit of its value.
    #[test]
    fn rates_read_well() {
        assert_eq!(rate(20_972.0), "1.20 MiB/min");
        assert_eq!(Rate::of(20_972.0).show(20_972.0, Some([19_900.0, 22_100.0])), "1.20 MiB/min [1.14, 1.26]");
        assert_eq!(Rate::of(2e5).show(2e5, Some([199_900.0, 200_100.0])), "195 KiB/s [195.21, 195.41]");
        assert_eq!(rate(2048.0), "120 KiB/min");
        assert_eq!(rate(5.0 * 1_048_576.0), "5.00 MiB/s");
        assert_eq!(rate(3.0), "10.5 KiB/h");
        assert_eq!(rate(-20_972.0), "-1.20 MiB/min");
        assert_eq!(rate(0.0), "0 B/h");
        assert_eq!(Rate::of(128.0).show(128.0, Some([-0.0001, 160.0])), "7.50 KiB/min [0, 9.38]");
    }

    /// Durations have at most two units, and an estimate claims no more than it knows.
    #[test]
    fn durations_read_well() {
        for (s, text) in [
            (0.0, "0 s"),
            (0.52, "0.5 s"),
            (29.5, "30 s"),
            (200.0, "3 min 20 s"),
            (3600.0, "1 h"),
            (12_000.0, "3 h 20 min"),
            (187_200.0, "2 d 4 h"),
            (f64::NAN, "?"),
            (-1.0, "?"),
        ] {
            assert_eq!(duration(s), text, "{s}");
        }
        for (s, text) in [(0.5, "5 s"), (47.0, "45 s"), (12_345.0, "3 h 30 min"), (90_000.0, "1 d 1 h"), (1e6, "12 d")]
        {
            assert_eq!(about(s), text, "{s}");
        }
    }

    /// Counts and event rates.
    #[test]
    fn counts_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.4, 950.0, 42_300.0, 1_200_000.0].map(events), ["0", "950", "42.3k", "1.20M"]);
        assert_eq!([1, 2].map(|n| plural(n, "block")), ["1 block", "2 blocks"]);
    }
}
