//! Makes text that came from the target safe to show on a terminal. A process chooses its own name, the names of its
//! files and its symbols; none of them may move the cursor, change colours, reorder or hide what stands around it.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The most columns that one string from the target takes, whatever the width of the terminal.
pub const MAX_COLUMNS: usize = 2048;

/// `text` with every character that does not print as itself written out (`\n`, `\u{1b}`, `\u{202e}`): control and
/// format characters, line separators, spaces other than the plain one, combining marks, unassigned code points. Cut at
/// [`MAX_COLUMNS`].
pub fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(MAX_COLUMNS));
    let mut columns = 0;
    for c in text.chars() {
        let start = out.len();
        // These would be escaped as for a string literal, although they are harmless.
        if matches!(c, '"' | '\'' | '\\') {
            out.push(c);
        } else if c.width().unwrap_or(0) == 0 {
            // Also what counts as printable but shows nothing of its own, such as conjoining jamo.
            if matches!(c, '\n' | '\r' | '\t') { out.extend(c.escape_debug()) } else { out.extend(c.escape_unicode()) }
        } else {
            out.extend(c.escape_debug());
        }
        columns += width(&out[start..]);
        if columns >= MAX_COLUMNS {
            out.truncate(start);
            out.push('…');
            break;
        }
    }
    out
}

/// [`safe`] for bytes that may not be UTF-8: what is not becomes `�`.
pub fn safe_bytes(bytes: &[u8]) -> String {
    // Bounded before the conversion, so that a huge string costs nothing.
    safe(&String::from_utf8_lossy(&bytes[..bytes.len().min(4 * MAX_COLUMNS)]))
}

/// Columns that `text` takes.
pub fn width(text: &str) -> usize {
    UnicodeWidthStr::width(text)
}

/// As much of the beginning of `text` as fits into `columns`, with an ellipsis where it was cut.
pub fn cut_end(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut out = take_columns(text.chars(), columns.saturating_sub(1));
    if columns > 0 {
        out.push('…');
    }
    out
}

/// As much of the end of `text` as fits into `columns`, with an ellipsis where it was cut.
pub fn cut_start(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut out = take_columns(text.chars().rev(), columns.saturating_sub(1));
    if columns > 0 {
        out.push('…');
    }
    out.chars().rev().collect()
}

/// Beginning and end of `text`, as much as fits into `columns`; the end, where a function's own name stands, gets more.
pub fn cut_middle(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let head = take_columns(text.chars(), columns.saturating_sub(1) / 3);
    let tail = cut_start(text, columns - width(&head));
    head + &tail
}

fn take_columns(chars: impl Iterator<Item = char>, columns: usize) -> String {
    let mut left = columns;
    chars
        .take_while(|c| {
            let width = c.width().unwrap_or(0);
            let fits = width <= left;
            left = left.saturating_sub(width);
            fits
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Escape sequences, newlines, bidi overrides and invisible characters are written out; plain text stays.
    #[test]
    fn nothing_acts_on_the_terminal() {
        for (raw, shown) in [
            ("plain_name<int>::operator\"\" 'x' \\", "plain_name<int>::operator\"\" 'x' \\"),
            ("größe_数", "größe_数"),
            ("\x1b[2J\x1b]0;owned\x07", "\\u{1b}[2J\\u{1b}]0;owned\\u{7}"),
            ("a\nb\r\tc", "a\\nb\\r\\tc"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\u{202e}b\u{2066}c", "a\\u{202e}b\\u{2066}c"),
            ("\u{200b}\u{feff}\u{2028}\u{e0041}", "\\u{200b}\\u{feff}\\u{2028}\\u{e0041}"),
            ("z\u{301}\u{301}", "z\\u{301}\\u{301}"),
            ("\u{d7b0}", "\\u{d7b0}"),
            ("no\u{a0}break", "no\\u{a0}break"),
        ] {
            assert_eq!(safe(raw), shown);
        }
    }

    /// Bytes that are no UTF-8 are shown as such, not refused.
    #[test]
    fn invalid_utf8() {
        assert_eq!(safe_bytes(b"a\xff\x1bb"), "a\u{fffd}\\u{1b}b");
    }

    /// A string of any length takes a bounded place.
    #[test]
    fn length_is_bounded() {
        for c in ["x", "数", "\x1b"] {
            let shown = safe(&c.repeat(100_000));
            assert!(width(&shown) <= MAX_COLUMNS && shown.ends_with('…'));
        }
    }

    /// Each cut keeps the side that it says.
    #[test]
    fn cuts() {
        assert_eq!(cut_end("abcdefgh", 5), "abcd…");
        assert_eq!(cut_start("abcdefgh", 5), "…efgh");
        assert_eq!(cut_middle("abcdefghij", 7), "ab…ghij");
        assert_eq!(cut_end("abc", 3), "abc");
        assert_eq!(cut_end("数数数", 4), "数…");
        assert_eq!(cut_end("abc", 0), "");
    }

    proptest! {
        /// No string leaves a character that is a control or takes no column, and cuts keep to their width.
        #[test]
        fn any_string(raw in any::<String>(), columns in 0_usize..40) {
            let shown = safe(&raw);
            prop_assert!(shown.chars().all(|c| !c.is_control() && c.width().is_some_and(|w| w > 0)), "{shown:?}");
            for cut in [cut_end(&shown, columns), cut_start(&shown, columns), cut_middle(&shown, columns)] {
                prop_assert!(width(&cut) <= columns, "{cut:?} in {columns}");
            }
        }
    }
}
