//! What an ELF image has to say about its code: where it is, and how its frames are left.
//!
//! Files come from the traced process and may hold anything. They are read piecewise with bounds, not mapped into memory: a
//! mapped file that its owner cuts short would end this program with a signal. Nothing is read that the file does not have,
//! so one that claims terabytes costs nothing.

use super::pointers;
use super::table::Why;
use gimli::{BaseAddresses, EhFrameHdr, NativeEndian};
use object::elf;
use object::read::elf::{CompressionHeader as _, Dyn as _, FileHeader, NoteIterator, ProgramHeader, SectionHeader};
use object::read::{CompressedData, CompressionFormat};
use object::{Endianness, ReadCache, ReadRef};
use std::borrow::Cow;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::FileExt;

/// The largest piece that is read at once, in bytes; also the largest section. The largest known, of browsers and machine
/// learning, have about 60 MB of unwind information.
const MAX_PIECE: u64 = 128 << 20;

/// The most code in a file that is looked at, in bytes.
const MAX_CODE: u64 = 1 << 30;

/// The most pieces of code in a file; linkers make one, post-link optimisers a few more.
const MAX_SEGMENTS: usize = 64;

/// A build id is 20 bytes as a rule; longer ones are cut off.
const MAX_BUILD_ID: usize = 64;

/// The largest page of any machine that Linux runs on, arm64's. Mappings begin at a page; where pages are smaller, what is asked for
/// lies nearer to its segment and the answer is the same.
const LARGEST_PAGE: u64 = 64 << 10;

/// The image's bytes: a file's, or those of memory.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    File(&'a ReadCache<&'a File>, &'a File),
    Bytes(&'a [u8]),
}

impl Data<'_> {
    /// Fills the buffer from an offset on, without keeping a copy.
    pub fn copy_to(self, offset: u64, buffer: &mut [u8]) -> Result<(), Why> {
        match self {
            Self::File(_, file) => file.read_exact_at(buffer, offset).map_err(|e| Why::Unreadable(e.to_string())),
            Self::Bytes(bytes) => {
                let bytes = bytes.read_bytes_at(offset, buffer.len() as u64);
                buffer.copy_from_slice(bytes.map_err(|()| Why::Malformed("code"))?);
                Ok(())
            }
        }
    }
}

impl<'a> ReadRef<'a> for Data<'a> {
    fn len(self) -> Result<u64, ()> {
        match self {
            Self::File(cache, _) => cache.len(),
            Self::Bytes(bytes) => Ok(bytes.len() as u64),
        }
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        if size > MAX_PIECE || offset.checked_add(size).ok_or(())? > self.len()? {
            return Err(());
        }
        match self {
            Self::File(cache, _) => cache.read_bytes_at(offset, size),
            Self::Bytes(bytes) => bytes.read_bytes_at(offset, size),
        }
    }

    fn read_bytes_at_until(self, range: std::ops::Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        match self {
            Self::File(cache, _) => cache.read_bytes_at_until(range, delimiter),
            Self::Bytes(bytes) => bytes.read_bytes_at_until(range, delimiter),
        }
    }
}

type Header = elf::FileHeader64<Endianness>;
type Segment = elf::ProgramHeader64<Endianness>;
type Section = elf::SectionHeader64<Endianness>;

/// A part of the file that is mapped as code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Code {
    /// Where in the file.
    pub offset: u64,
    /// Where in memory, as the file has it.
    pub address: u64,
    /// Bytes, of those in the file.
    pub size: u64,
}

impl Code {
    /// Whether an address of the file is in it.
    pub fn contains(&self, address: u64) -> bool {
        address.checked_sub(self.address).is_some_and(|inside| inside < self.size)
    }

    /// The address behind it.
    pub fn end(&self) -> u64 {
        self.address + self.size
    }
}

/// How the entries of a section refer to each other and to code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    EhFrame,
    DebugFrame,
}

/// A section of unwind information.
pub struct Frames<'a> {
    pub form: Form,
    pub bytes: Cow<'a, [u8]>,
    /// What its addresses are relative to.
    pub bases: BaseAddresses,
}

/// An ELF image that has been opened.
pub struct Image<'a> {
    pub data: Data<'a>,
    /// The lowest address of the file; rows are relative to it.
    pub base: u64,
    /// By address.
    pub code: Vec<Code>,
    pub build_id: Option<Vec<u8>>,
    /// Compiled Go, wholly or in part: that part has frame pointers and no unwind information.
    pub go: bool,
    /// No unwind information speaks of the code, but it has frame pointers, by the looks of it.
    pub bare_with_frame_pointers: bool,
    /// The code is changed when it is loaded, so that calls in it may lead anywhere.
    pub relocated_code: bool,
    /// Those that come first are to be believed.
    pub frames: Vec<Frames<'a>>,
}

impl<'a> Image<'a> {
    /// Reads headers and unwind information, but code only where there is none of that.
    pub fn open(data: Data<'a>) -> Result<Self, Why> {
        let ident = data.read_bytes_at(0, 16).map_err(|()| Why::NotElf)?;
        if !ident.starts_with(&elf::ELFMAG) {
            return Err(Why::NotElf);
        }
        if ident[4] != elf::ELFCLASS64 || ident[5] != elf::ELFDATA2LSB {
            return Err(Why::OtherMachine);
        }
        let header = Header::parse(data).map_err(|_| Why::Malformed("header"))?;
        let endian = header.endian().map_err(|_| Why::Malformed("header"))?;
        if header.e_machine(endian) != super::x86_64::MACHINE {
            return Err(Why::OtherMachine);
        }
        let segments = header.program_headers(endian, data).map_err(|_| Why::Malformed("program headers"))?;
        let loaded = || segments.iter().filter(|s| s.p_type(endian) == elf::PT_LOAD);
        let base = loaded().map(|s| s.p_vaddr(endian)).min().ok_or(Why::Malformed("nothing to load"))?;
        let code = code(loaded(), endian, base, data.len().map_err(|()| Why::NotElf)?)?;
        // Section headers may be stripped, or cut off; what is loaded says enough then.
        let sections = Sections::of(header, endian, data);
        let bytes_of = |s: &Segment| s.data(endian, data).ok();
        let mut image = Self {
            data,
            base,
            code,
            build_id: None,
            go: false,
            bare_with_frame_pointers: false,
            relocated_code: false,
            frames: Vec::new(),
        };
        for segment in segments {
            if let Ok(Some(notes)) = segment.notes(endian, data) {
                image.note(notes, endian);
            }
            if let Ok(Some(entries)) = segment.dynamic(endian, data) {
                image.relocated_code |= entries.iter().any(|d| {
                    let (tag, value) = (d.d_tag(endian), d.d_val(endian));
                    tag == u64::from(elf::DT_TEXTREL)
                        || tag == u64::from(elf::DT_FLAGS) && value & u64::from(elf::DF_TEXTREL) != 0
                });
            }
        }
        if let Some(sections) = &sections {
            for notes in sections.all.iter().filter_map(|s| s.notes(endian, data).ok().flatten()) {
                image.note(notes, endian);
            }
            image.go |= sections.named(b".gopclntab").is_some() || sections.named(b".go.buildinfo").is_some();
            image.frames_by_section(sections)?;
        }
        if image.frames.iter().all(|f| f.form != Form::EhFrame) {
            let table = segments.iter().find(|s| s.p_type(endian) == elf::PT_GNU_EH_FRAME);
            let found = table.and_then(|table| {
                let address = table.p_vaddr(endian);
                let start = eh_frame_of(address, bytes_of(table)?)?;
                let segment = loaded()
                    .find(|s| start.checked_sub(s.p_vaddr(endian)).is_some_and(|inside| inside < s.p_filesz(endian)))?;
                // How long it is nobody says; it ends with an entry of length zero.
                let inside = start - segment.p_vaddr(endian);
                let offset = segment.p_offset(endian).checked_add(inside)?;
                let rest = (segment.p_filesz(endian) - inside).min(data.len().ok()?.checked_sub(offset)?);
                let bytes = data.read_bytes_at(offset, rest.min(MAX_PIECE)).ok()?;
                let bases = BaseAddresses::default().set_eh_frame(start).set_eh_frame_hdr(address);
                Some(Frames { form: Form::EhFrame, bytes: Cow::Borrowed(bytes), bases })
            });
            image.frames.splice(0..0, found);
        }
        image.bare_with_frame_pointers = image.frames.is_empty() && !image.go && pointers::are_kept(data, &image.code);
        Ok(image)
    }

    /// What of unwind information the sections have, the best first.
    fn frames_by_section(&mut self, sections: &Sections<'a>) -> Result<(), Why> {
        let endian = sections.endian;
        let address = |name: &[u8]| sections.named(name).map(|s| s.sh_addr(endian));
        let mut bases = BaseAddresses::default();
        bases = address(b".text").map_or(bases.clone(), |a| bases.set_text(a));
        bases = address(b".got").map_or(bases.clone(), |a| bases.set_got(a));
        // BOLT, which rewrites finished programs, leaves what it did not touch in the old section.
        let names: [(&[u8], Form); 3] = [
            (b".eh_frame", Form::EhFrame),
            (b".bolt.org.eh_frame", Form::EhFrame),
            (b".debug_frame", Form::DebugFrame),
        ];
        for (name, form) in names {
            // Go's names no frame pointers, though its code has them.
            if form == Form::DebugFrame && (self.go || !self.frames.is_empty()) {
                continue;
            }
            for section in sections.all.iter().filter(|s| sections.name(s) == name) {
                // A file of debug information alone has the section without its bytes.
                if section.sh_type(endian) == elf::SHT_NOBITS || section.sh_size(endian) == 0 {
                    continue;
                }
                let bytes = contents(section, endian, self.data)?;
                let bases = bases.clone().set_eh_frame(section.sh_addr(endian));
                self.frames.push(Frames { form, bytes, bases });
            }
        }
        Ok(())
    }

    fn note(&mut self, mut notes: NoteIterator<'a, Header>, endian: Endianness) {
        // Go writes a build id of its own: name "Go", type 4 (cmd/internal/buildid).
        const GO_BUILD_ID: u32 = 4;
        while let Ok(Some(note)) = notes.next() {
            match (note.name(), note.n_type(endian)) {
                (elf::ELF_NOTE_GNU, elf::NT_GNU_BUILD_ID) if self.build_id.is_none() && !note.desc().is_empty() => {
                    self.build_id = Some(note.desc()[..note.desc().len().min(MAX_BUILD_ID)].to_vec());
                }
                (b"Go", GO_BUILD_ID) => self.go = true,
                _ => {}
            }
        }
    }

    /// Whether an address of the file is in its code.
    pub fn is_code(&self, address: u64) -> bool {
        self.code.iter().any(|c| c.contains(address))
    }

    /// Feeds all that decides about the rows, but for the places of calls, to a hasher: what a copy of the file has in common with it.
    pub fn hash_unwind_information(&self, hasher: &mut impl Hasher) {
        (self.base, &self.code, &self.build_id, self.go, self.bare_with_frame_pointers, self.relocated_code)
            .hash(hasher);
        for frames in &self.frames {
            (frames.form, &frames.bytes).hash(hasher);
        }
    }
}

/// The executable segments, as far as the file has them.
fn code<'s>(
    loaded: impl Iterator<Item = &'s Segment>,
    endian: Endianness,
    base: u64,
    len: u64,
) -> Result<Vec<Code>, Why> {
    let mut code = Vec::new();
    let mut total = 0;
    for s in loaded.filter(|s| s.p_flags(endian) & elf::PF_X != 0) {
        let (offset, address) = (s.p_offset(endian), s.p_vaddr(endian));
        let size = s.p_filesz(endian);
        if size == 0 {
            continue;
        }
        let in_file = offset.checked_add(size).is_some_and(|end| end <= len);
        if !in_file {
            return Err(Why::Malformed("code outside the file"));
        }
        let end = (address - base).checked_add(size).ok_or(Why::Malformed("addresses"))?;
        // Rows have 32 bits for an address.
        if end > u64::from(u32::MAX) {
            return Err(Why::TooLarge("address space"));
        }
        address.checked_add(size).ok_or(Why::Malformed("addresses"))?;
        total += size;
        code.push(Code { offset, address, size });
        if total > MAX_CODE || code.len() > MAX_SEGMENTS {
            return Err(Why::TooLarge("code"));
        }
    }
    code.sort_by_key(|c| c.address);
    Ok(code)
}

/// Where the unwind information begins, as its search table says.
fn eh_frame_of(address: u64, table: &[u8]) -> Option<u64> {
    let bases = BaseAddresses::default().set_eh_frame_hdr(address);
    let parsed = EhFrameHdr::new(table, NativeEndian).parse(&bases, 8).ok()?;
    match parsed.eh_frame_ptr() {
        gimli::Pointer::Direct(start) => Some(start),
        gimli::Pointer::Indirect(_) => None,
    }
}

/// A section's bytes, inflated if need be.
fn contents<'a>(section: &Section, endian: Endianness, data: Data<'a>) -> Result<Cow<'a, [u8]>, Why> {
    let malformed = Why::Malformed("unwind information");
    let too_large = Why::TooLarge("unwind information");
    if section.sh_size(endian) > MAX_PIECE {
        return Err(too_large);
    }
    let Some((header, offset, size)) = section.compression(endian, data).map_err(|_| malformed.clone())? else {
        return section.data(endian, data).map(Cow::Borrowed).map_err(|_| malformed);
    };
    let format = match header.ch_type(endian) {
        elf::ELFCOMPRESS_ZLIB => CompressionFormat::Zlib,
        elf::ELFCOMPRESS_ZSTD => CompressionFormat::Zstandard,
        _ => return Err(malformed),
    };
    let uncompressed_size = header.ch_size(endian);
    if uncompressed_size > MAX_PIECE {
        return Err(too_large);
    }
    let compressed = data.read_bytes_at(offset, size).map_err(|()| malformed.clone())?;
    let inflated = CompressedData { format, data: compressed, uncompressed_size }.decompress();
    inflated.map_err(|_| malformed)
}

/// The section headers and their names.
struct Sections<'a> {
    endian: Endianness,
    all: &'a [Section],
    names: &'a [u8],
}

impl<'a> Sections<'a> {
    fn of(header: &Header, endian: Endianness, data: Data<'a>) -> Option<Self> {
        let all = header.section_headers(endian, data).ok()?;
        let names = all.get(header.shstrndx(endian, data).ok()? as usize)?;
        Some(Self { endian, all, names: names.data(endian, data).ok()? })
    }

    fn name(&self, section: &Section) -> &'a [u8] {
        let name = self.names.get(section.sh_name(self.endian) as usize..).unwrap_or_default();
        // Longer ones are not looked for.
        name.iter().take(64).position(|&b| b == 0).map_or(b"", |len| &name[..len])
    }

    fn named(&self, name: &[u8]) -> Option<&'a Section> {
        self.all.iter().find(|s| self.name(s) == name)
    }
}

/// What is taken off an address of a process to get the one in the rows, for a mapping that begins at `start` with the
/// file's `offset`. None if the file says that there is no code.
pub fn bias(code: &[Code], base: u64, start: u64, offset: u64) -> Option<u64> {
    // A segment is mapped from the beginning of its first page on.
    let in_it = |c: &&Code| offset >= c.offset && offset - c.offset < c.size;
    let in_first_page = |c: &&Code| c.offset > offset && c.offset - offset < LARGEST_PAGE;
    let next = || code.iter().filter(in_first_page).min_by_key(|c| c.offset);
    let code = code.iter().find(in_it).or_else(next)?;
    let address = code.address.wrapping_add(offset).wrapping_sub(code.offset);
    Some(start.wrapping_sub(address.wrapping_sub(base)))
}
