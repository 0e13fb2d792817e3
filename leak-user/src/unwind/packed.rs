//! A file's rows as they are put into the kernel's map.
//!
//! Most functions need a row of their own, so neighbours say different things, but all of a file's rows together say few:
//! python3's 8,600 have 188 different rules. Where it takes less, the rules are written down once each, two a word, and behind them
//! rows that hold two pieces of code each ([`leak_common::unwind::pair`]). A table of more than a thousand different rules keeps
//! one in each row.

use super::lookup;
use leak_common::unwind::{PAIR_REACH, PAIR_RULES, Rule, pair, rule_index, rule_of_word};
use std::collections::HashMap;

/// What is written to the map for one file, in one piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Rules, then rows.
    words: Vec<u64>,
    /// How many of the words are rules.
    rules: u32,
}

impl Packed {
    /// Packs the rows of a [`super::Table`]: sorted, each neighbour with another rule. As pairs if that is less.
    pub fn new(rows: &[u64]) -> Self {
        Self::as_pairs(rows).unwrap_or_else(|| Self { words: rows.to_vec(), rules: 0 })
    }

    fn as_pairs(rows: &[u64]) -> Option<Self> {
        let mut indices: HashMap<u32, u32> = HashMap::new();
        let mut words: Vec<u64> = Vec::new();
        for &row in rows {
            let next = indices.len() as u32;
            indices.entry(row as u32).or_insert_with(|| {
                match next % 2 {
                    0 => words.push(row & 0xffff_ffff),
                    _ => *words.last_mut().expect("the word of the even one before") |= row << 32,
                }
                next
            });
            if indices.len() > PAIR_RULES {
                return None;
            }
        }
        let rules = words.len() as u32;
        words.reserve(rows.len() / 2);
        let mut left = rows;
        while let [row, rest @ ..] = left {
            let address = (row >> 32) as u32;
            let index = |row: &u64| indices[&(*row as u32)];
            let reach = rest.first().map(|next| (next >> 32) as u32 - address).filter(|&reach| reach <= PAIR_REACH);
            let packed = if let (Some(reach), [next, behind @ ..]) = (reach, rest) {
                left = behind;
                pair(address, reach, index(row), index(next))?
            } else {
                left = rest;
                pair(address, 0, 0, index(row))?
            };
            words.push(packed);
        }
        (words.len() < rows.len()).then_some(Self { words, rules })
    }

    /// All that is to be written, and takes memory.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many of the words come before the rows; zero if each row holds its rule.
    pub fn rules(&self) -> u32 {
        self.rules
    }

    /// The rows, in which the kernel side searches.
    pub fn rows(&self) -> &[u64] {
        &self.words[self.rules as usize..]
    }

    /// The rule for an address, less the file's lowest one; as the BPF side finds it. None before the first row.
    pub fn lookup(&self, address: u32) -> Option<Rule> {
        lookup_packed(&self.words, self.rules, address)
    }
}

/// The same for words that are in the kernel's map.
pub fn lookup_packed(words: &[u64], rules: u32, address: u32) -> Option<Rule> {
    let (rule_words, rows) = words.split_at_checked(rules as usize)?;
    if rules == 0 {
        return lookup(rows, address);
    }
    let behind = rows.partition_point(|&row| (row >> 32) as u32 <= address);
    let index = rule_index(*rows.get(behind.checked_sub(1)?)?, address);
    rule_words.get(index as usize / 2).map(|&word| rule_of_word(word, index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use leak_common::unwind::{cfa, fp, row};
    use proptest::prelude::*;

    fn sp(words: u32) -> Rule {
        Rule::new(cfa::SP, i64::from(words), fp::SAME, 0).expect("it fits")
    }

    /// Two pieces make a row, unless the second begins too far away.
    #[test]
    fn pieces_share_rows() {
        let rows: Vec<u64> = [0, 10, 20, 20 + PAIR_REACH, 21 + 2 * PAIR_REACH, 3 * PAIR_REACH, 1 << 20]
            .into_iter()
            .enumerate()
            .map(|(i, address)| row(address, sp(i as u32 % 2)))
            .collect();
        let packed = Packed::new(&rows);
        assert_eq!((packed.rules(), packed.rows().len(), packed.words().len()), (1, 4, 5));
        // Alone, it is less to keep the rule in the row.
        assert_eq!(Packed::new(&rows[..1]).words(), &rows[..1]);
        assert_eq!(Packed::new(&[]), Packed::default());
        assert_eq!(Packed::default().lookup(7), None);
    }

    /// As many rules as an index can tell apart, and one more.
    #[test]
    fn too_many_rules() {
        for (rules, packs) in [(PAIR_RULES as u32, true), (PAIR_RULES as u32 + 1, false)] {
            let rows: Vec<u64> = (0..rules * 4).map(|i| row(16 * i, sp(i % rules))).collect();
            let packed = Packed::new(&rows);
            assert_eq!(packed.rules() > 0, packs);
            for i in 0..rules * 4 {
                assert_eq!(packed.lookup(16 * i + 5), Some(sp(i % rules)));
            }
        }
    }

    proptest! {
        /// Whatever the rows: packed ones say the same of each address around each border, and take no more.
        #[test]
        fn packed_rows_say_the_same(pieces in proptest::collection::vec((1_u32..6000, 0_u32..40), 0..200), start in 0_u32..9000) {
            let mut at = start;
            let mut rows: Vec<u64> = Vec::new();
            for (len, rule) in pieces {
                if rows.last().is_none_or(|&last| last as u32 != sp(rule).0) {
                    rows.push(row(at, sp(rule)));
                }
                at += len;
            }
            let packed = Packed::new(&rows);
            prop_assert!(packed.words().len() <= rows.len());
            prop_assert!(packed.rows().is_sorted_by(|a, b| a >> 32 < b >> 32));
            for &row in &rows {
                let border = (row >> 32) as u32;
                for address in [border.saturating_sub(1), border, border + 1, border + PAIR_REACH, border + PAIR_REACH + 1] {
                    prop_assert_eq!(packed.lookup(address), lookup(&rows, address));
                }
            }
        }
    }
}
