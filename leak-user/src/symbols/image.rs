//! What an ELF file says of where its code is and where its debug information is, 32-bit ones included.
//!
//! Files come from the traced process and may hold anything. They are read piecewise with bounds, not mapped into memory.

use object::elf;
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader, SectionHeader, SectionTable};
use object::{Endianness, FileKind, ReadCache, ReadRef};
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The largest piece of a file that is read at once, in bytes: a table of a quarter of a million sections.
const MAX_PIECE: u64 = 16 << 20;

/// A build id is 20 bytes as a rule. Longer ones are none.
const MAX_BUILD_ID: usize = 64;

/// An ELF file's layout.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    pub build_id: Option<Vec<u8>>,
    /// Segments of code.
    code: Vec<Segment>,
    /// Addresses of sections of code.
    sections: Vec<Range<u64>>,
    /// Whether it has debug information of its own.
    pub has_debug_info: bool,
    /// Whether it has the symbols that the dynamic linker has no use for.
    pub has_symtab: bool,
    /// `.gnu_debuglink`: a file name without folders, and the CRC of that file.
    pub link: Option<(PathBuf, u32)>,
    /// `.gnu_debugaltlink`: a path and the build id of what several files share (dwz).
    pub supplement: Option<(PathBuf, Vec<u8>)>,
    /// Where in the file an xz-compressed ELF file with further symbols is (`.gnu_debugdata`, `MiniDebugInfo`).
    pub mini: Option<Range<u64>>,
    /// Where in the file the names are of the sections that refer to other files.
    pub links_at: Vec<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    /// In the file.
    offsets: Range<u64>,
    address: u64,
}

/// Reads of a file that refuse pieces over [`MAX_PIECE`].
#[derive(Clone, Copy)]
struct Bounded<'a>(&'a ReadCache<&'a File>);

impl<'a> ReadRef<'a> for Bounded<'a> {
    fn len(self) -> Result<u64, ()> {
        self.0.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        if size > MAX_PIECE { Err(()) } else { self.0.read_bytes_at(offset, size) }
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        self.0.read_bytes_at_until(range, delimiter)
    }
}

impl Image {
    /// Reads the layout; none if the file is no ELF file, or its headers cannot be read.
    pub fn read(file: &File) -> Option<Self> {
        let cache = ReadCache::new(file);
        let data = Bounded(&cache);
        match FileKind::parse(data).ok()? {
            FileKind::Elf64 => Self::read_as::<elf::FileHeader64<Endianness>>(data),
            FileKind::Elf32 => Self::read_as::<elf::FileHeader32<Endianness>>(data),
            _ => None,
        }
    }

    fn read_as<H: FileHeader<Endian = Endianness>>(data: Bounded) -> Option<Self> {
        let header = H::parse(data).ok()?;
        let endian = header.endian().ok()?;
        let mut image = Self::default();
        let segments = header.program_headers(endian, data).unwrap_or_default();
        for segment in segments {
            let (offset, size) = (segment.p_offset(endian).into(), segment.p_filesz(endian).into());
            if segment.p_type(endian) == elf::PT_LOAD && segment.p_flags(endian) & elf::PF_X != 0 {
                let offsets = offset..offset.saturating_add(size);
                image.code.push(Segment { offsets, address: segment.p_vaddr(endian).into() });
            }
        }
        if let Ok(sections) = header.sections(endian, data) {
            image.read_sections(header, &sections, endian, data);
        }
        if image.build_id.is_none() {
            let in_segment = |s: &H::ProgramHeader| build_id::<H>(s.notes(endian, data).ok()??, endian);
            image.build_id = segments.iter().find_map(in_segment);
        }
        Some(image)
    }

    fn read_sections<'a, H: FileHeader<Endian = Endianness>>(
        &mut self,
        header: &H,
        sections: &SectionTable<'a, H, Bounded<'a>>,
        endian: Endianness,
        data: Bounded<'a>,
    ) {
        for (index, section) in sections.enumerate() {
            let (address, size) = (section.sh_addr(endian).into(), section.sh_size(endian).into());
            let kind = section.sh_type(endian);
            if section.sh_flags(endian).into() & u64::from(elf::SHF_EXECINSTR) != 0 {
                self.sections.push(address..address.saturating_add(size));
            }
            if kind == elf::SHT_NOTE && self.build_id.is_none() {
                let notes = section.notes(endian, data).ok().flatten();
                self.build_id = notes.and_then(|notes| build_id::<H>(notes, endian));
            }
            let there = kind != elf::SHT_NOBITS && size > 0;
            self.has_symtab |= kind == elf::SHT_SYMTAB && there;
            let Ok(name) = sections.section_name(endian, section) else { continue };
            let contents = || section.data(endian, data).ok();
            match name {
                b".debug_info" | b".zdebug_info" => self.has_debug_info |= there,
                b".gnu_debuglink" => self.link = contents().and_then(|bytes| parse_link(bytes, endian)),
                b".gnu_debugaltlink" => self.supplement = contents().and_then(parse_supplement),
                b".gnu_debugdata" if there => {
                    let offset: u64 = section.sh_offset(endian).into();
                    self.mini = Some(offset..offset.saturating_add(size));
                }
                _ => {}
            }
            if matches!(name, b".gnu_debuglink" | b".gnu_debugaltlink" | b".debug_sup") {
                // The name is the first field of a section's header.
                let at = u64::from(header.e_shentsize(endian)) * index.0 as u64;
                self.links_at.push(header.e_shoff(endian).into().saturating_add(at));
            }
        }
    }

    /// The address, before relocation, of the code at an offset of the file.
    pub fn address_of(&self, offset: u64) -> Option<u64> {
        let segment = self.code.iter().find(|segment| segment.offsets.contains(&offset))?;
        segment.address.checked_add(offset - segment.offsets.start)
    }

    /// Whether both addresses are in one section of code. True of any two where the file does not tell its sections.
    pub fn in_one_section(&self, first: u64, second: u64) -> bool {
        self.sections.is_empty() || self.sections.iter().any(|s| s.contains(&first) && s.contains(&second))
    }
}

fn build_id<H: FileHeader<Endian = Endianness>>(mut notes: NoteIterator<'_, H>, endian: Endianness) -> Option<Vec<u8>> {
    while let Ok(Some(note)) = notes.next() {
        if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
            let id = note.desc();
            return (!id.is_empty() && id.len() <= MAX_BUILD_ID).then(|| id.to_vec());
        }
    }
    None
}

/// A name, a zero byte, up to three bytes to the next multiple of four, and a CRC in the file's byte order
/// (<https://sourceware.org/gdb/current/onlinedocs/gdb.html/Separate-Debug-Files.html>).
fn parse_link(section: &[u8], endian: Endianness) -> Option<(PathBuf, u32)> {
    use object::endian::Endian;
    let len = section.iter().position(|&b| b == 0)?;
    let at = (len + 1).next_multiple_of(4);
    let crc = section.get(at..at.checked_add(4)?)?.try_into().ok()?;
    let name = &section[..len];
    // Nothing but a name: a path could lead anywhere.
    let plain = !name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..";
    plain.then(|| (PathBuf::from(OsStr::from_bytes(name)), endian.read_u32_bytes(crc)))
}

/// A path, a zero byte, and a build id up to the end.
fn parse_supplement(section: &[u8]) -> Option<(PathBuf, Vec<u8>)> {
    let len = section.iter().position(|&b| b == 0)?;
    let id = &section[len + 1..];
    let usable = len > 0 && !id.is_empty() && id.len() <= MAX_BUILD_ID;
    usable.then(|| (PathBuf::from(OsStr::from_bytes(&section[..len])), id.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// Links as objcopy and dwz write them; and none where one leads to another folder or is cut short.
    #[test]
    fn links() {
        let little = Endianness::Little;
        let link = parse_link(b"a.debug\0\x01\x02\x03\x04", little);
        assert_eq!(link, Some(("a.debug".into(), 0x0403_0201)));
        let padded = parse_link(b"ab.debug\0\0\0\0\x01\x02\x03\x04", Endianness::Big);
        assert_eq!(padded, Some(("ab.debug".into(), 0x0102_0304)));
        for bad in
            [&b"a.debug"[..], b"a.debug\0\x01\x02\x03", b"/abcdef\0\x01\x02\x03\x04", b"..\0\0\x01\x02\x03\x04", b""]
        {
            assert_eq!(parse_link(bad, little), None, "{bad:?}");
        }
        assert_eq!(parse_supplement(b"/x/y\0\x01\x02"), Some(("/x/y".into(), vec![1, 2])));
        assert_eq!(parse_supplement(b"/x/y\0"), None);
        assert_eq!(parse_supplement(b"/x/y"), None);
    }

    /// This very program: code at the offset of a function, with debug information and symbols.
    #[test]
    fn own_image() {
        let file = File::open("/proc/self/exe").expect("the own program can be opened");
        let image = Image::read(&file).expect("an ELF file");
        assert!(image.has_debug_info && image.has_symtab && image.mini.is_none() && image.links_at.is_empty());
        let segment = image.code.first().expect("code");
        assert_eq!(image.address_of(segment.offsets.start + 1), Some(segment.address + 1));
        assert_eq!(image.address_of(u64::MAX), None);
        let text = image.sections.iter().max_by_key(|s| s.end - s.start).expect("a section");
        assert!(image.in_one_section(text.start, text.end - 1));
        assert!(!image.in_one_section(text.start, text.end));
    }

    proptest! {
        /// Damage anywhere in the headers gives a layout or none, never a panic, and no addresses from beyond.
        #[test]
        fn total_on_damaged_headers(damage in proptest::collection::vec((0..2048_usize, any::<u8>()), 1..64)) {
            let mut bytes = std::fs::read("/bin/true").expect("a program");
            let from_end = bytes.len() - 1024;
            for (at, value) in damage {
                // Half of them in the header and the segments, half in the sections, which are at the end.
                bytes[if at < 1024 { at } else { from_end + at - 1024 }] = value;
            }
            let mut file = tempfile::tempfile().expect("a temporary file");
            file.write_all(&bytes).expect("the file can be written");
            if let Some(image) = Image::read(&file) {
                let _ = image.address_of(0x1000);
                prop_assert!(image.build_id.is_none_or(|id| id.len() <= MAX_BUILD_ID));
            }
        }
    }
}
