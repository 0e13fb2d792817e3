//! The report as JSON, as [`crate::report`] models it.

use std::io::{self, Write};

use crate::report::Report;

/// One indented document.
pub fn write_pretty(out: &mut (impl Write + ?Sized), report: &Report) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(report)?;
    text.push(b'\n');
    out.write_all(&text)
}

/// One document on one line.
pub fn write_line(out: &mut (impl Write + ?Sized), report: &Report) -> io::Result<()> {
    let mut text = serde_json::to_vec(report)?;
    text.push(b'\n');
    out.write_all(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    /// Both forms hold the whole report; the compact one is one line, also with newlines in names.
    #[test]
    fn both_forms() {
        let mut report = sample::leaking();
        "a\nb\u{2028}".clone_into(&mut report.processes[0].comm);
        let (mut pretty, mut line) = (Vec::new(), Vec::new());
        write_pretty(&mut pretty, &report).unwrap();
        write_line(&mut line, &report).unwrap();
        assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1));
        for text in [pretty, line] {
            assert_eq!(serde_json::from_slice::<Report>(&text).unwrap(), report);
        }
    }
}
