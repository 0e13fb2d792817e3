//! The files that may have names for a module's code: itself, its debug information in a file of its own, and the symbols
//! packed into it (`MiniDebugInfo`).
//!
//! Separate debug files are looked for as gdb does
//! (<https://sourceware.org/gdb/current/onlinedocs/gdb.html/Separate-Debug-Files.html>): by build id under
//! `/usr/lib/debug/.build-id`, then by the name in `.gnu_debuglink` beside the file, in `.debug` there, and in the same folder
//! under `/usr/lib/debug`; each in the process's root and in this program's. One is used only if it has the same build id,
//! and, found by its name, the CRC that the link tells. Where a file has debug information of its own, none is looked for.

use super::image::Image;
use super::root::Root;
use crate::discover::FileId;
use lzma_rust2::XzReader;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where distributions put debug files.
const DEBUG_FOLDER: &str = "/usr/lib/debug";

/// Larger debug files are not used, bytes: their CRC alone would take many seconds.
const MAX_DEBUG_FILE: u64 = 4 << 30;

/// Larger files are not copied, bytes.
const MAX_COPY: u64 = 256 << 20;

/// Packed symbols over this are not used, bytes, packed and unpacked: Fedora's are below a megabyte.
const MAX_PACKED: u64 = 32 << 20;
const MAX_UNPACKED: u64 = 128 << 20;

/// What unpacking may use beside its output, KiB. `xz -9` takes 64 MiB.
const MAX_UNPACK_MEMORY: u32 = 96 << 10;

/// A file to look names up in.
#[derive(Debug)]
pub struct Source {
    file: File,
    /// Whether to read its debug information; else only its symbols.
    pub debug_info: bool,
    pub supplement: Option<Supplement>,
}

impl Source {
    fn symbols_of(file: File) -> Self {
        Self { file, debug_info: false, supplement: None }
    }

    /// A path by which this program can open the file as long as this lives.
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }
}

/// Debug information that several files share.
#[derive(Debug)]
pub struct Supplement {
    file: File,
    pub build_id: Vec<u8>,
}

impl Supplement {
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }
}

fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// All that may have names for a module's code.
#[derive(Debug, Default)]
pub struct Sources {
    /// None if the module is no ELF file.
    pub image: Option<Image>,
    /// The best first.
    pub files: Vec<Source>,
    /// Why a separate debug file that is there was not used.
    pub rejected: Option<&'static str>,
}

impl Sources {
    /// Looks for the sources of a module's file. `path` is where the process sees it, `roots` are where to look, in this
    /// order.
    pub fn find(file: &File, path: &Path, roots: &[&Root]) -> Self {
        let mut sources = Self { image: Image::read(file), ..Self::default() };
        let Some(image) = &sources.image else { return sources };
        let mut search = Search { file, image, path, roots, rejected: None };
        let separate = if image.has_debug_info { file.try_clone().ok() } else { search.debug_file() };
        sources.rejected = search.rejected;
        let found = separate.is_some();
        if let Some(separate) = separate {
            // Where its debug information has no name, its symbols may.
            let symbols = separate.try_clone().ok().filter(|_| !image.has_debug_info).map(Source::symbols_of);
            sources.files.extend(with_debug_info(separate, roots).into_iter().chain(symbols));
        }
        sources.files.extend(file.try_clone().ok().map(Source::symbols_of));
        if let Some(range) = &image.mini
            && !found
            && !image.has_symtab
        {
            match unpack(file, range) {
                Ok(symbols) => sources.files.push(Source::symbols_of(symbols)),
                Err(error) => {
                    log::debug!("failed to unpack the symbols in {}: {error}", path.display());
                    sources.rejected = sources.rejected.or(Some("the symbols packed into it cannot be unpacked"));
                }
            }
        }
        sources
    }
}

/// An ELF file with the symbols that a module's own file was stripped of: its debug file, or what is packed into it. None where it
/// was not stripped.
pub fn symbols_apart(file: &File, path: &Path, roots: &[&Root]) -> Option<File> {
    let image = Image::read(file).filter(|image| !image.has_symtab)?;
    let mut search = Search { file, image: &image, path, roots, rejected: None };
    search.debug_file().or_else(|| unpack(file, image.mini.as_ref()?).ok())
}

/// For what one module's debug file is looked for.
struct Search<'a> {
    file: &'a File,
    image: &'a Image,
    path: &'a Path,
    roots: &'a [&'a Root],
    rejected: Option<&'static str>,
}

impl Search<'_> {
    fn debug_file(&mut self) -> Option<File> {
        let by_id = self.image.build_id.as_deref().and_then(|id| path_by_build_id(DEBUG_FOLDER.as_ref(), id));
        let by_id = by_id.and_then(|path| self.roots.iter().find_map(|root| self.open(root, &path, None)));
        by_id.or_else(|| self.by_link())
    }

    fn by_link(&mut self) -> Option<File> {
        let (name, crc) = self.image.link.as_ref()?;
        self.roots.iter().find_map(|root| {
            let path = root.inside(self.path);
            let folder = path.parent()?;
            let under_debug = Path::new(DEBUG_FOLDER).join(folder.strip_prefix("/").unwrap_or(folder));
            let places = [folder.join(name), folder.join(".debug").join(name), under_debug.join(name)];
            places.iter().find_map(|path| self.open(root, path, Some(*crc)))
        })
    }

    /// The file at this path in a root, if it is there and belongs to the module.
    fn open(&mut self, root: &Root, path: &Path, crc: Option<u32>) -> Option<File> {
        let candidate = root.open_regular(path).ok()?;
        // A link to itself.
        if FileId::of(&candidate).ok() == FileId::of(self.file).ok() {
            return None;
        }
        match self.check(&candidate, crc) {
            Ok(()) => Some(candidate),
            Err(why) => {
                log::debug!("{} is not used for {}: {why}", path.display(), self.path.display());
                self.rejected = self.rejected.or(Some(why));
                None
            }
        }
    }

    /// Whether a debug file belongs to the module.
    fn check(&self, candidate: &File, crc: Option<u32>) -> Result<(), &'static str> {
        let len = candidate.metadata().map_or(u64::MAX, |meta| meta.len());
        if len > MAX_DEBUG_FILE {
            return Err("its debug file is over 4 GiB");
        }
        let image = Image::read(candidate).filter(|image| image.has_debug_info || image.has_symtab);
        let image = image.ok_or("its debug file has nothing in it that could be read")?;
        match (&self.image.build_id, &image.build_id) {
            (Some(wanted), Some(found)) if wanted != found => return Err("its debug file is of another build"),
            // Then the CRC is all there is to go by.
            (None, _) | (_, None) if crc.is_none() => return Err("its debug file has no build id"),
            _ => {}
        }
        match crc {
            Some(wanted) if crc_of(candidate, len) != Some(wanted) => Err("its debug file is of another build"),
            _ => Ok(()),
        }
    }
}

/// Where in a folder of debug files the one with a build id is; none for ids too short to be told apart.
pub fn path_by_build_id(folder: &Path, id: &[u8]) -> Option<PathBuf> {
    let (first, rest) = id.split_first().filter(|(_, rest)| !rest.is_empty())?;
    let mut name = String::with_capacity(id.len() * 2 + 6);
    for byte in rest {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    Some(folder.join(".build-id").join(format!("{first:02x}")).join(name + ".debug"))
}

/// The CRC of a file's first `len` bytes, as `.gnu_debuglink` has it; none if it cannot be read or is shorter.
fn crc_of(file: &File, len: u64) -> Option<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let wanted = piece.len().min(usize::try_from(len - at).unwrap_or(usize::MAX));
        let read = file.read_at(&mut piece[..wanted], at).ok().filter(|&read| read > 0)?;
        hasher.update(&piece[..read]);
        at += read as u64;
    }
    Some(hasher.finalize())
}

/// A file whose debug information is to be read. blazesym opens what such a file refers to by itself, wherever that leads and
/// whatever it is, so it gets only files that refer to nothing but what was found and checked here.
fn with_debug_info(file: File, roots: &[&Root]) -> Option<Source> {
    let image = Image::read(&file)?;
    let supplement = image.supplement.as_ref().and_then(|(name, id)| supplement(&file, name, id, roots));
    if image.links_at.len() == usize::from(supplement.is_some()) {
        return Some(Source { file, debug_info: true, supplement });
    }
    // Without what it shares with others its debug information has holes: names come from the symbols alone then.
    let whole = image.supplement.is_none();
    match whole.then(|| copy_without_links(&file, &image)).flatten() {
        Some(copy) => Some(Source { file: copy, debug_info: true, supplement: None }),
        None => Some(Source::symbols_of(file)),
    }
}

/// The file that a debug file shares information with, by build id or by its path, which may be relative to the debug file's.
fn supplement(file: &File, name: &Path, id: &[u8], roots: &[&Root]) -> Option<Supplement> {
    let beside = || Some(std::fs::read_link(path_of(file)).ok()?.parent()?.join(name));
    let places = [path_by_build_id(DEBUG_FOLDER.as_ref(), id), beside()];
    places.iter().flatten().flat_map(|path| roots.iter().map(move |root| (root, path))).find_map(|(root, path)| {
        let file = root.open_regular(path).ok()?;
        (Image::read(&file)?.build_id.as_deref() == Some(id)).then(|| Supplement { file, build_id: id.to_vec() })
    })
}

/// A copy, in memory, of a file in which the sections that refer to other files have lost their names.
fn copy_without_links(file: &File, image: &Image) -> Option<File> {
    let len = file.metadata().ok()?.len();
    if len > MAX_COPY {
        return None;
    }
    let copy = File::from(memfd_create("debug-info", MFdFlags::MFD_CLOEXEC).ok()?);
    let mut from = file.try_clone().ok()?;
    from.seek(SeekFrom::Start(0)).ok()?;
    io::copy(&mut from.take(len), &mut &copy).ok()?;
    for at in &image.links_at {
        copy.write_all_at(&[0; 4], *at).ok()?;
    }
    Some(copy)
}

/// Unpacks an ELF file that is xz-compressed in `range` of a file, into memory.
fn unpack(file: &File, range: &Range<u64>) -> io::Result<File> {
    let len = range.end - range.start;
    if len > MAX_PACKED {
        return Err(io::Error::other("it is too large"));
    }
    let mut packed = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.read_exact_at(&mut packed, range.start)?;
    let mut unpacked = File::from(memfd_create("symbols", MFdFlags::MFD_CLOEXEC)?);
    let reader = XzReader::new_mem_limit(&packed[..], true, MAX_UNPACK_MEMORY);
    if io::copy(&mut reader.take(MAX_UNPACKED + 1), &mut unpacked)? > MAX_UNPACKED {
        return Err(io::Error::other("it unpacks to too much"));
    }
    unpacked.flush()?;
    Ok(unpacked)
}
