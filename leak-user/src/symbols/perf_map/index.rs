//! The text of a perf map: lines of a start address and a size, both hexadecimal, and a name that is all the rest.

use std::collections::BTreeMap;
use std::sync::Arc;

/// How many functions are kept. Further ones take the place of those that they overlap, or are left out.
const MAX_FUNCTIONS: usize = 1 << 20;

/// The rest of longer lines is left out, bytes. The bound on what is shown is lower.
const MAX_LINE: usize = 8 << 10;

/// Functions by address. None overlaps another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index(BTreeMap<u64, Function>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Function {
    /// The first address behind it.
    end: u64,
    /// Untrusted.
    name: Arc<str>,
}

impl Index {
    /// The function that an address is in.
    pub fn find(&self, address: u64) -> Option<&Arc<str>> {
        let (_, function) = self.0.range(..=address).next_back()?;
        (address < function.end).then_some(&function.name)
    }

    /// Whether no function overlaps another, which always holds.
    pub fn is_disjoint(&self) -> bool {
        self.0.values().zip(self.0.keys().skip(1)).all(|(function, &next)| function.end <= next)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes in a function. Older ones that it overlaps are gone: their memory has been used again.
    fn insert(&mut self, start: u64, end: u64, name: Arc<str>) {
        while let Some((&older, function)) = self.0.range(..end).next_back()
            && function.end > start
        {
            self.0.remove(&older);
        }
        if self.0.len() < MAX_FUNCTIONS {
            self.0.insert(start, Function { end, name });
        }
    }
}

/// Reads a map piece by piece. Any bytes will do; lines of another form are left out.
#[derive(Clone, Debug, Default)]
pub struct Parser {
    index: Index,
    /// The beginning of a line whose end has not come yet, up to [`MAX_LINE`].
    line: Vec<u8>,
}

impl Parser {
    pub fn feed(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let text = piece.strip_suffix(b"\n");
            let rest = text.unwrap_or(piece);
            let room = MAX_LINE - self.line.len();
            self.line.extend_from_slice(&rest[..rest.len().min(room)]);
            if text.is_some() {
                if let Some((start, end, name)) = parse_line(&self.line) {
                    self.index.insert(start, end, name);
                }
                self.line.clear();
            }
        }
    }

    /// All functions whose lines were whole.
    pub fn index(&self) -> &Index {
        &self.index
    }
}

/// Start, end and name.
fn parse_line(line: &[u8]) -> Option<(u64, u64, Arc<str>)> {
    let (start, rest) = number(line)?;
    let (size, name) = number(rest)?;
    let end = start.checked_add(size).filter(|&end| end > start)?;
    let name = name.trim_ascii();
    (!name.is_empty()).then(|| (start, end, Arc::from(&*String::from_utf8_lossy(name))))
}

/// A hexadecimal number, with or without `0x`, and what follows the space behind it.
fn number(text: &[u8]) -> Option<(u64, &[u8])> {
    let text = text.trim_ascii_start();
    let end = text.iter().position(|&byte| byte == b' ' || byte == b'\t')?;
    let digits = text[..end].strip_prefix(b"0x").unwrap_or(&text[..end]);
    // from_str_radix takes a sign.
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let number = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    Some((number, &text[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8]) -> Index {
        let mut parser = Parser::default();
        parser.feed(text);
        parser.index
    }

    /// Names with spaces, numbers with and without `0x`, ends of lines of either kind.
    #[test]
    fn lines() {
        let index = read(b"7f00 10 JS:*a /b c.js:1:2\n0x8000 0x8 two\r\n  9000  1  three\n");
        let name = |address| index.find(address).map(|name| &**name);
        assert_eq!(name(0x7f00), Some("JS:*a /b c.js:1:2"));
        assert_eq!((name(0x7eff), name(0x7f0f), name(0x7f10)), (None, Some("JS:*a /b c.js:1:2"), None));
        assert_eq!((name(0x8007), name(0x8008), name(0x9000)), (Some("two"), None, Some("three")));
        assert_eq!(index.len(), 3);
    }

    /// Lines that are none: no size, no name, an empty range, one past the end of memory, signs, no numbers.
    #[test]
    fn other_lines() {
        let bad =
            ["", "1000", "1000 10", "1000 10 ", "1000 0 a", "ffffffffffffffff 2 a", "+1000 10 a", "-1 1 a", "x 10 a"];
        for line in bad {
            assert!(read(format!("{line}\n").as_bytes()).is_empty(), "{line:?}");
        }
        assert_eq!(read(b"ffffffffffffffff 2 a\n1000 10 b\nnonsense\n2000 10 c").len(), 1);
    }

    /// Code that is generated where older code was takes its place, whole.
    #[test]
    fn later_lines_win() {
        let index = read(b"1000 100 old\n1100 100 neighbour\n2000 10 apart\n1080 10 new\n");
        assert_eq!(index.find(0x1080).map(|name| &**name), Some("new"));
        assert_eq!(index.find(0x1000), None);
        assert_eq!(index.find(0x1100).map(|name| &**name), Some("neighbour"));
        assert_eq!(read(b"1000 10 a\n1010 10 b\n1020 10 c\n0 ffff all\n").len(), 1);
    }

    /// A line of any length takes bounded memory, and the next one is read.
    #[test]
    fn long_lines() {
        let mut text = b"1000 10 ".to_vec();
        text.resize(100_000, b'n');
        text.extend_from_slice(b"\n2000 10 next\n");
        let index = read(&text);
        assert!(index.find(0x1000).is_some_and(|name| name.len() < MAX_LINE));
        assert!(index.find(0x2000).is_some());
    }

    fn map() -> impl Strategy<Value = Vec<u8>> {
        let line =
            (0..64_u64, 0..16_u64, "[a-c]{0,3}").prop_map(|(start, size, name)| format!("{start:x} {size:x} {name}\n"));
        let odd = proptest::collection::vec(any::<u8>(), 0..40)
            .prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let lines = prop_oneof![8 => line, 1 => odd];
        proptest::collection::vec(lines, 0..40).prop_map(|lines| lines.concat().into_bytes())
    }

    proptest! {
        /// However a map is cut into pieces, the outcome is the same.
        #[test]
        fn pieces_do_not_matter(text in map(), sizes in proptest::collection::vec(1..9_usize, 1..9)) {
            let mut parser = Parser::default();
            let (mut rest, mut sizes) = (&text[..], sizes.iter().cycle());
            while !rest.is_empty() {
                let (piece, behind) = rest.split_at(rest.len().min(*sizes.next().expect("it goes round")));
                parser.feed(piece);
                rest = behind;
            }
            prop_assert_eq!(parser.index, read(&text));
        }

        /// The same answers as going through all lines backwards, where a line counts until a later one overlaps it.
        #[test]
        fn like_a_plain_search(text in map(), address in 0..96_u64) {
            let mut live: Vec<(u64, u64, Arc<str>)> = Vec::new();
            for line in text.split_inclusive(|&byte| byte == b'\n').filter_map(|line| line.strip_suffix(b"\n")) {
                if let Some((start, end, name)) = parse_line(line) {
                    live.retain(|older| older.1 <= start || end <= older.0);
                    live.push((start, end, name));
                }
            }
            let plain = live.iter().find(|function| function.0 <= address && address < function.1).map(|f| &f.2);
            let index = read(&text);
            prop_assert_eq!(index.find(address), plain);
            prop_assert!(index.is_disjoint());
        }

        /// Any bytes at all give an index.
        #[test]
        fn total(text in proptest::collection::vec(any::<u8>(), 0..512)) {
            let index = read(&text);
            prop_assert!(index.len() <= text.len() && index.is_disjoint());
        }
    }
}
