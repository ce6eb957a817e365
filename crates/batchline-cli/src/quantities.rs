//! Counts, bytes, times and rates as people read and write them.

use std::time::Duration;

/// `1234567` as `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count with what is counted: `1 batch`, `2 batches`.
pub(crate) fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// Bytes in units of 1024.
pub(crate) fn bytes(number: u64) -> String {
    scaled(number as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// Bytes per second, in units of 1000, as links are measured.
pub(crate) fn byte_rate(per_second: f64) -> String {
    scaled(per_second, 1000.0, &["B/s", "KB/s", "MB/s", "GB/s", "TB/s"])
}

/// Samples per second.
pub(crate) fn sample_rate(per_second: f64) -> String {
    if per_second < 100.0 {
        return format!("{per_second:.1} samples/s");
    }
    #[allow(clippy::cast_possible_truncation, reason = "a cast of floats saturates")]
    #[allow(clippy::cast_sign_loss, reason = "a rate is not negative")]
    let whole = per_second.round() as u64;
    format!("{} samples/s", count(whole))
}

/// A time, with three digits.
pub(crate) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds >= 999.5 {
        return format!("{seconds:.0} s");
    }
    if seconds >= 1.0 {
        return format!("{} s", three_digits(seconds));
    }
    scaled(seconds * 1e6, 1000.0, &["µs", "ms", "s"])
}

/// How much of `number` falls on one of `seconds`; 0 where there is no time.
pub(crate) fn per_second(number: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { number as f64 / seconds } else { 0.0 }
}

/// The share of `part`, in percent; 0 of nothing.
pub(crate) fn percent(part: Duration, whole: Duration) -> f64 {
    if whole.is_zero() { 0.0 } else { 100.0 * part.as_secs_f64() / whole.as_secs_f64() }
}

fn scaled(mut number: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // What would be rounded up to the next unit belongs to it.
    while number >= step - 0.5 && unit + 1 < units.len() {
        (number, unit) = (number / step, unit + 1);
    }
    if unit == 0 && number.fract() == 0.0 {
        return format!("{number} {}", units[0]);
    }
    format!("{} {}", three_digits(number), units[unit])
}

fn three_digits(number: f64) -> String {
    match number {
        99.95.. => format!("{number:.0}"),
        9.995.. => format!("{number:.1}"),
        _ => format!("{number:.2}"),
    }
}

/// Reads a number of bytes: `1000000`, `64KiB`, `512MiB`, `2GiB`, `2GB`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of bytes: write 1000000, 512MiB or 2GiB");
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let factor: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(factor).ok_or_else(|| format!("{text} is more than 64 bits hold"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let texts = [0, 999, 1000, 1_234_567, 12_345_678].map(count);
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567", "12,345,678"]);
        assert_eq!(counted(1, "batch", "batches"), "1 batch");
        assert_eq!(counted(2, "batch", "batches"), "2 batches");
    }

    #[test]
    fn units_fit_the_number() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(116_805), "114 KiB");
        assert_eq!(bytes(512 << 20), "512 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(byte_rate(999_900_000.0), "1.00 GB/s");
        assert_eq!(byte_rate(9_876_543_210.0), "9.88 GB/s");
        assert_eq!(sample_rate(12.34), "12.3 samples/s");
        assert_eq!(sample_rate(152_000.4), "152,000 samples/s");
    }

    #[test]
    fn times_have_three_digits() {
        let texts = [0.0, 3e-7, 1.5e-5, 0.001_234, 0.9999, 12.34, 12_345.0]
            .map(|seconds| time(Duration::from_secs_f64(seconds)));
        assert_eq!(texts, ["0 µs", "0.30 µs", "15 µs", "1.23 ms", "1.00 s", "12.3 s", "12345 s"]);
    }

    #[test]
    fn shares_of_nothing_are_nothing() {
        assert_eq!(percent(Duration::ZERO, Duration::ZERO), 0.0);
        assert_eq!(percent(Duration::from_secs(1), Duration::from_secs(4)), 25.0);
        assert_eq!(per_second(5, 0.0), 0.0);
    }

    #[test]
    fn bytes_are_read_in_several_spellings() {
        assert_eq!(parse_bytes("1000"), Ok(1000));
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("2 gib"), Ok(2 << 30));
        assert_eq!(parse_bytes("3GB"), Ok(3_000_000_000));
        for wrong in ["", "MiB", "-1", "1.5GiB", "5 apples", "99999999999999999999", "99999999TiB"]
        {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_of_bytes_are_exact_or_refused() {
        let units = [("", 1), ("b", 1), (" KiB", 1 << 10), ("gib", 1 << 30), ("TB", 10u64.pow(12))];
        for case in 0..10_000 {
            // Of all lengths.
            let number = batchline::mix(&[case]) >> (case % 64);
            let (unit, factor) = units[usize::try_from(case).unwrap() % units.len()];
            let read = parse_bytes(&format!("{number}{unit}"));
            assert_eq!(read.ok(), number.checked_mul(factor), "{number}{unit}");
        }
    }

    #[test]
    fn no_text_is_read_as_something_else() {
        for case in 0..20_000 {
            let text = crate::options::text_of("019 KkMGTiBb.-+e\u{e9}\0", case);
            let Ok(number) = parse_bytes(&text) else { continue };
            let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
            let given: u64 = digits.parse().unwrap();
            assert!(given == 0 && number == 0 || number % given == 0, "{text:?} as {number}");
        }
    }
}
