//! How each test went on each kernel, as a table for a terminal that is one for Markdown too.

use std::collections::BTreeSet;

use super::kernels::Kernel;
use super::machine::{MEANS, Outcome};

/// A column for each kernel, a row for each test.
pub fn table(results: &[(Kernel, Outcome)]) -> String {
    let row = |name: &str, cell: &dyn Fn(&Outcome) -> String| -> Vec<String> {
        std::iter::once(name.to_owned()).chain(results.iter().map(|(_, outcome)| cell(outcome))).collect()
    };
    let tests: BTreeSet<&String> = results.iter().flat_map(|(_, outcome)| outcome.tests.keys()).collect();
    let mut rows = vec![
        std::iter::once(String::new())
            .chain(results.iter().map(|(kernel, _)| format!("{} {}", kernel.arch.name(), kernel.version)))
            .collect(),
        vec!["---".to_owned(); results.len() + 1],
    ];
    for name in MEANS {
        rows.push(row(name, &|outcome| outcome.means.get(name).cloned().unwrap_or_else(|| "?".to_owned())));
    }
    for test in tests {
        rows.push(row(test, &|outcome| {
            match outcome.tests.get(test) {
                Some(Some(true)) => "ok",
                Some(Some(false)) => "FAILED",
                Some(None) => "NO END",
                None => "NOT RUN",
            }
            .to_owned()
        }));
    }
    rows.push(row("no complaint of the kernel", &|outcome| {
        if !outcome.complete {
            "NO END".to_owned()
        } else if outcome.complaints.is_empty() {
            "ok".to_owned()
        } else {
            format!("{} FOUND", outcome.complaints.len())
        }
    }));
    rows.push(row("seconds to boot, in all", &|outcome| {
        let boot = outcome.boot.map_or_else(|| "?".to_owned(), |boot| boot.as_secs().to_string());
        format!("{boot}, {}", outcome.total.as_secs())
    }));

    let widths: Vec<usize> =
        (0..=results.len()).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| if cell == "---" { "-".repeat(*width) } else { format!("{cell:width$}") });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::arch::Arch;

    /// Each result stands in its own cell, and what did not run or end is not taken for good.
    #[test]
    fn cells() {
        let kernels = Kernel::choose(&["5.10".to_owned(), "6.1".to_owned()], &[Arch::X86_64]);
        let good = Outcome { tests: [("one".to_owned(), Some(true))].into(), complete: true, ..Outcome::default() };
        let bad =
            Outcome { tests: [("one".to_owned(), Some(false)), ("two".to_owned(), None)].into(), ..Outcome::default() };
        let text = table(&kernels.into_iter().zip([good, bad]).collect::<Vec<_>>());
        let cells = |row: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with(&format!("| {row} "))).expect("a row");
            line.split('|').skip(2).map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).collect()
        };
        assert_eq!(cells("one"), ["ok", "FAILED"]);
        assert_eq!(cells("two"), ["NOT RUN", "NO END"]);
        assert_eq!(cells("no complaint of the kernel"), ["ok", "NO END"]);
        assert!(text.starts_with('|'), "{text}");
        assert!(text.lines().next().is_some_and(|line| line.contains("x86_64 5.10") && line.contains("x86_64 6.1")));
    }
}
