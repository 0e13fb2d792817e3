//! A report file that is there whole or not at all. What cannot be written is found out before tracing starts, and
//! until the report is complete nothing of it has a name: a killed tracer leaves nothing behind.

use std::fs::{self, File, Permissions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::{Builder, NamedTempFile, tempfile_in};

/// A file being written.
#[derive(Debug)]
pub enum ReportFile {
    /// A regular file: written to one without a name, which at the end is copied and renamed into place.
    Whole { spool: File, to: PathBuf },
    /// A device or pipe, such as `/dev/null`: renaming over it would replace it, so it is written directly.
    Direct { file: File, to: PathBuf },
}

impl ReportFile {
    /// Finds out whether `path` can be written, and leaves it as it is. Errors name the file.
    pub fn create(path: &Path) -> Result<Self> {
        let failed = || format!("write the report to {}", shown(path));
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => bail!("{}: is a directory", failed()),
            Ok(meta) if !meta.is_file() => {
                let file = File::options().write(true).open(path).with_context(failed)?;
                return Ok(Self::Direct { file, to: path.to_owned() });
            }
            Ok(_) => {
                // Opened only to see whether that is allowed: a rename would get around a file's own permissions.
                File::options().write(true).open(path).with_context(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if path.is_symlink() {
                    bail!("{}: is a symbolic link to nothing", failed());
                }
            }
            Err(error) => return Err(error).with_context(failed),
        }
        // The link stays, what it points to is replaced, as when a file is opened for writing.
        let to = if path.is_symlink() { path.canonicalize().with_context(failed)? } else { path.to_owned() };
        // Both that a name can be made there and, for the mode, that it is done as at the end.
        drop(named(&to).with_context(failed)?);
        let spool = tempfile_in(folder(&to)).with_context(failed)?;
        Ok(Self::Whole { spool, to })
    }

    /// What has failed when this cannot be written.
    pub fn what_failed(&self) -> String {
        let (Self::Whole { to, .. } | Self::Direct { to, .. }) = self;
        format!("write the report to {}", shown(to))
    }

    /// Puts the file in its place. On failure nothing is left behind and an earlier file stays as it was.
    pub fn finish(self) -> Result<()> {
        let failed = self.what_failed();
        let failed = || failed.clone();
        match self {
            Self::Direct { mut file, .. } => file.flush().with_context(failed),
            Self::Whole { mut spool, to } => {
                let mut file = named(&to).with_context(failed)?;
                spool.rewind().with_context(failed)?;
                io::copy(&mut spool, &mut file).with_context(failed)?;
                if let Ok(old) = fs::metadata(&to) {
                    file.as_file().set_permissions(Permissions::from_mode(old.mode() & 0o7777)).with_context(failed)?;
                    // Only root may give a file away; anybody else would own it by writing it anew.
                    let _ = fchown(file.as_file(), Some(old.uid()), Some(old.gid()));
                }
                file.as_file().sync_all().with_context(failed)?;
                file.persist(&to).map_err(|error| error.error).with_context(failed)?;
                Ok(())
            }
        }
    }
}

impl Write for ReportFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Whole { spool: file, .. } | Self::Direct { file, .. } => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Whole { spool: file, .. } | Self::Direct { file, .. } => file.flush(),
        }
    }
}

/// A file beside `to`, with the mode that a plain create gives (0666 less the umask); removed when dropped.
fn named(to: &Path) -> io::Result<NamedTempFile> {
    Builder::new().prefix(".leaktrace-").permissions(Permissions::from_mode(0o666)).tempfile_in(folder(to))
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn shown(path: &Path) -> String {
    super::safe(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    /// Nothing is to be seen before the end, then the whole file, with the mode of a plain create.
    #[test]
    fn whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let mut file = ReportFile::create(&path).unwrap();
        file.write_all(b"all of it").unwrap();
        assert_eq!(entries(folder.path()), 0);
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"all of it");
        assert_eq!(entries(folder.path()), 1);
        let plain = folder.path().join("plain");
        File::create(&plain).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode(), fs::metadata(&plain).unwrap().mode());
    }

    /// A run that fails leaves the earlier report, and nothing else.
    #[test]
    fn failure_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        fs::write(&path, "earlier").unwrap();
        let mut file = ReportFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"earlier");
        assert_eq!(entries(folder.path()), 1);
    }

    /// A file that is replaced keeps its mode, and a link to it stays a link.
    #[test]
    fn replacing_keeps_mode_and_link() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("report"), folder.path().join("link"));
        fs::write(&path, "earlier").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        symlink("report", &link).unwrap();
        let mut file = ReportFile::create(&link).unwrap();
        file.write_all(b"new").unwrap();
        file.finish().unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    }

    /// Each file that cannot be written is refused at once, by its name.
    #[test]
    fn refused_before_tracing() {
        let folder = tempfile::tempdir().unwrap();
        let dangling = folder.path().join("dangling");
        symlink("nowhere/at/all", &dangling).unwrap();
        let plain = folder.path().join("plain");
        File::create(&plain).unwrap();
        for path in [folder.path().to_owned(), folder.path().join("no/such/folder/x"), dangling, plain.join("x")] {
            let error = format!("{:#}", ReportFile::create(&path).unwrap_err());
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        assert_eq!(entries(folder.path()), 2);
    }

    /// A device is written, not replaced.
    #[test]
    fn devices_stay() {
        let mut file = ReportFile::create(Path::new("/dev/null")).unwrap();
        assert!(matches!(file, ReportFile::Direct { .. }));
        file.write_all(b"x").unwrap();
        file.finish().unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}
