//! Files that settings name: tokens and certificates. Whoever asks says which key named them.

use std::fmt::Display;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;

/// Characters of a token; a longer one is another file.
const LONGEST_TOKEN: usize = 16 << 10;

/// The one token in a file, without what is blank around it, or what is wrong; never what is in the file.
pub fn token(path: &Path, least: usize) -> Result<String, String> {
    let failed = |what: &dyn Display| format!("{}: {what}", path.display());
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST_TOKEN as u64 + 1).read_to_end(&mut bytes))
        .map_err(|error| failed(&format_args!("cannot be read: {error}")))?;
    let token = bytes.trim_ascii();
    // Signs alone, so that it fits into a header as it is.
    match str::from_utf8(token) {
        Ok(text) if bytes.len() <= LONGEST_TOKEN && token.len() >= least && token.iter().all(u8::is_ascii_graphic) => {
            Ok(text.to_owned())
        }
        _ => Err(failed(&format_args!("must hold one token of {least} to {LONGEST_TOKEN} letters, digits and signs"))),
    }
}

/// The certificates of a PEM file, of which there is one at least.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(format!("{}: holds no certificate in PEM form", path.display())),
        Ok(found) => Ok(found),
        Err(error) => Err(format!("{}: cannot be read: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files that hold no token are refused by their name and not by what they hold; a token is taken without its line end.
    #[test]
    fn tokens() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let long = "x".repeat(LONGEST_TOKEN + 1);
        for text in ["", "\n", "short", "two words of some length", "ünïcödé-ünïcödé", &long, &format!("{long}\n")]
        {
            std::fs::write(&file, text).unwrap();
            let Err(mistake) = token(&file, 16) else { panic!("{text:?} is no token") };
            assert!(mistake.contains(file.to_str().unwrap()) && mistake.contains("16"), "{mistake:?}");
            assert!(text.len() < 5 || !mistake.contains(text), "{mistake:?}");
        }
        assert!(token(&folder.path().join("none"), 1).is_err_and(|mistake| mistake.contains("none")));
        std::fs::write(&file, "0123456789abcdef\n").unwrap();
        assert_eq!(token(&file, 16).unwrap(), "0123456789abcdef");
        std::fs::write(&file, &long[1..]).unwrap();
        assert_eq!(token(&file, 1).unwrap().len(), LONGEST_TOKEN);
    }
}
