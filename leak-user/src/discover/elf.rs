//! Reads from an ELF file which functions of an allocator it defines, and where they are.
//!
//! Files come from the traced process and may hold anything. They are read piecewise with bounds, not mapped into memory: a
//! mapped file that its owner cuts short would end this program with a signal.

use super::breakpoint::{self, Emulation, Placement};
use leak_common::op;
use object::elf;
use object::read::elf::{Dyn as _, FileHeader, NoteIterator, ProgramHeader, SectionHeader, Sym};
use object::{Endianness, ReadCache, ReadRef};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A function that hands out memory or takes it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Function {
    Malloc,
    Calloc,
    Realloc,
    Reallocarray,
    PosixMemalign,
    AlignedAlloc,
    Memalign,
    Valloc,
    Pvalloc,
    Free,
    Cfree,
    FreeSized,
    FreeAlignedSized,
}

impl Function {
    pub const ALL: [Self; 13] = [
        Self::Malloc,
        Self::Calloc,
        Self::Realloc,
        Self::Reallocarray,
        Self::PosixMemalign,
        Self::AlignedAlloc,
        Self::Memalign,
        Self::Valloc,
        Self::Pvalloc,
        Self::Free,
        Self::Cfree,
        Self::FreeSized,
        Self::FreeAlignedSized,
    ];

    /// The symbol's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malloc => "malloc",
            Self::Calloc => "calloc",
            Self::Realloc => "realloc",
            Self::Reallocarray => "reallocarray",
            Self::PosixMemalign => "posix_memalign",
            Self::AlignedAlloc => "aligned_alloc",
            Self::Memalign => "memalign",
            Self::Valloc => "valloc",
            Self::Pvalloc => "pvalloc",
            Self::Free => "free",
            Self::Cfree => "cfree",
            Self::FreeSized => "free_sized",
            Self::FreeAlignedSized => "free_aligned_sized",
        }
    }

    /// What its arguments mean, one of [`leak_common::op`].
    pub fn op(self) -> u8 {
        match self {
            Self::Malloc | Self::Valloc | Self::Pvalloc => op::MALLOC,
            Self::Calloc => op::CALLOC,
            Self::Realloc => op::REALLOC,
            Self::Reallocarray => op::REALLOCARRAY,
            Self::PosixMemalign => op::POSIX_MEMALIGN,
            Self::AlignedAlloc | Self::Memalign => op::ALIGNED,
            Self::Free | Self::Cfree | Self::FreeSized | Self::FreeAlignedSized => op::FREE,
        }
    }

    fn of_symbol(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name().as_bytes() == name)
    }
}

/// A place for a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbePoint {
    pub function: Function,
    /// Other names of the same code with the same arguments.
    pub aliases: Vec<Function>,
    /// File offset of the function's first instruction.
    pub entry: u64,
    /// File offset of the breakpoint.
    pub offset: u64,
    /// How the breakpoint got there.
    pub placement: Placement,
}

impl ProbePoint {
    /// See [`Function::op`].
    pub fn op(&self) -> u8 {
        self.function.op()
    }

    /// Whether the breakpoint stands on the function's first instruction.
    pub fn at_entry(&self) -> bool {
        self.offset == self.entry
    }
}

/// What an ELF file says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// By file offset.
    pub points: Vec<ProbePoint>,
    /// Functions that are there but cannot be probed, and why.
    pub unprobed: Vec<(Function, &'static str)>,
    /// Lower-case hexadecimal digits.
    pub build_id: Option<String>,
    /// The release of the C library, such as `2.36`, if it is glibc and tells.
    pub glibc: Option<String>,
}

impl Contents {
    /// Whether a program can get memory here and give it back. A lone `cfree` or `valloc` is somebody's function of that name.
    pub fn is_allocator(&self) -> bool {
        let has = |f| self.points.iter().any(|p| p.function == f || p.aliases.contains(&f));
        has(Function::Malloc) && has(Function::Free)
    }
}

/// Why a file was not looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    NotElf,
    /// 32-bit, or for another machine than this.
    OtherMachine,
    Malformed(&'static str),
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotElf => write!(f, "not an ELF file"),
            Self::OtherMachine => write!(f, "code for another kind of machine, or 32-bit code"),
            Self::Malformed(what) => write!(f, "malformed ELF file: {what}"),
        }
    }
}

impl std::error::Error for Unusable {}

/// The largest piece of a file that is read at once, in bytes: a table of five million symbols.
const MAX_PIECE: u64 = 128 << 20;

/// A build id is 20 bytes as a rule; longer ones are cut off.
const MAX_BUILD_ID: usize = 64;

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

    fn read_bytes_at_until(self, range: std::ops::Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        self.0.read_bytes_at_until(range, delimiter)
    }
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = elf::EM_AARCH64;

type Header = elf::FileHeader64<Endianness>;
type Segment = elf::ProgramHeader64<Endianness>;
type Section = elf::SectionHeader64<Endianness>;
type Symbol = elf::Sym64<Endianness>;

/// A file that has been opened as ELF.
struct Elf<'a> {
    file: &'a File,
    data: Bounded<'a>,
    endian: Endianness,
    header: &'a Header,
    segments: &'a [Segment],
}

/// Reads what the file defines.
pub fn read(file: &File, kernel: Emulation) -> Result<Contents, Unusable> {
    let cache = ReadCache::new(file);
    let elf = Elf::open(file, Bounded(&cache))?;
    let mut contents = Contents { build_id: elf.build_id(), ..Contents::default() };
    let Some(SymbolTable { symbols, strings }) = elf.symbols()? else { return Ok(contents) };
    let mut candidates = Vec::new();
    for symbol in symbols.iter().filter(|s| !s.is_undefined(elf.endian)) {
        let name = name(symbol, strings, elf.endian);
        if name == b"gnu_get_libc_version" {
            contents.glibc = elf.glibc_release(symbol);
        }
        candidates.extend(Function::of_symbol(name).map(|function| (function, symbol)));
    }
    // By place and kind of arguments: several names, and several versions of a name, may share code.
    let mut found: BTreeMap<(u64, u8), ProbePoint> = BTreeMap::new();
    for &(function, symbol) in candidates.iter().filter(|c| is_principal(**c, &candidates)) {
        match elf.locate(symbol) {
            Err(why) => contents.unprobed.push((function, why)),
            Ok(entry) => {
                let placement = elf.place(entry, symbol.st_size(elf.endian), kernel);
                let offset = entry.offset + placement.skipped;
                let point = ProbePoint { function, aliases: Vec::new(), entry: entry.offset, offset, placement };
                let known = found.entry((entry.offset, function.op())).or_insert(point);
                if known.function != function && !known.aliases.contains(&function) {
                    known.aliases.push(function);
                }
            }
        }
    }
    contents.points = found.into_values().map(with_principal_name).collect();
    Ok(contents)
}

/// Whether a symbol is the program's function of that name. Linking a static program makes hidden functions such as glibc's
/// malloc local; so is anybody's `static void free(...)`. A local one counts if it is the only one.
fn is_principal((function, symbol): (Function, &Symbol), all: &[(Function, &Symbol)]) -> bool {
    symbol.st_bind() != elf::STB_LOCAL || all.iter().filter(|(f, _)| *f == function).count() == 1
}

/// The build id of an ELF file, in hexadecimal digits.
pub fn build_id(file: &File) -> Option<String> {
    let cache = ReadCache::new(file);
    Elf::open(file, Bounded(&cache)).ok()?.build_id()
}

/// Calls the function by the first of its names in [`Function::ALL`].
fn with_principal_name(mut point: ProbePoint) -> ProbePoint {
    point.aliases.push(point.function);
    point.aliases.sort_unstable();
    point.function = point.aliases.remove(0);
    point
}

fn name<'a>(symbol: &Symbol, strings: &'a [u8], endian: Endianness) -> &'a [u8] {
    let rest = strings.get(symbol.st_name(endian) as usize..).unwrap_or_default();
    // All names that are looked for are shorter.
    let rest = &rest[..rest.len().min(32)];
    rest.iter().position(|&b| b == 0).map_or(&[], |end| &rest[..end])
}

/// Symbols and their names.
struct SymbolTable<'a> {
    symbols: &'a [Symbol],
    /// Each ends in a NUL byte.
    strings: &'a [u8],
}

/// A place in the code of a file.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    /// The end of the segment's part of the file.
    limit: u64,
}

impl<'a> Elf<'a> {
    fn open(file: &'a File, data: Bounded<'a>) -> Result<Self, Unusable> {
        let ident = data.read_bytes_at(0, 16).map_err(|()| Unusable::NotElf)?;
        if !ident.starts_with(&elf::ELFMAG) {
            return Err(Unusable::NotElf);
        }
        let little = cfg!(target_endian = "little");
        let (class, order) = (ident[4], ident[5]);
        if class != elf::ELFCLASS64 || order != if little { elf::ELFDATA2LSB } else { elf::ELFDATA2MSB } {
            return Err(Unusable::OtherMachine);
        }
        let header = Header::parse(data).map_err(|_| Unusable::Malformed("header"))?;
        let endian = header.endian().map_err(|_| Unusable::Malformed("header"))?;
        if header.e_machine(endian) != MACHINE {
            return Err(Unusable::OtherMachine);
        }
        let segments = header.program_headers(endian, data).map_err(|_| Unusable::Malformed("program headers"))?;
        Ok(Self { file, data, endian, header, segments })
    }

    fn build_id(&self) -> Option<String> {
        let find = |mut notes: NoteIterator<'a, Header>| {
            while let Ok(Some(note)) = notes.next() {
                if note.name() == elf::ELF_NOTE_GNU && note.n_type(self.endian) == elf::NT_GNU_BUILD_ID {
                    return Some(note.desc());
                }
            }
            None
        };
        let in_segments = self.segments.iter().find_map(|s| find(s.notes(self.endian, self.data).ok()??));
        let id = in_segments.or_else(|| {
            let sections = self.header.section_headers(self.endian, self.data).ok()?;
            sections.iter().find_map(|s| find(s.notes(self.endian, self.data).ok()??))
        })?;
        (!id.is_empty()).then(|| hex(&id[..id.len().min(MAX_BUILD_ID)]))
    }

    /// The symbols that other files can bind to, or all of a program that is linked statically, and their names.
    fn symbols(&self) -> Result<Option<SymbolTable<'a>>, Unusable> {
        let sections = self.header.section_headers(self.endian, self.data);
        let sections = sections.map_err(|_| Unusable::Malformed("section headers"))?;
        let wanted = if self.is_static() { elf::SHT_SYMTAB } else { elf::SHT_DYNSYM };
        let Some(table) = sections.iter().find(|s| s.sh_type(self.endian) == wanted) else { return Ok(None) };
        let symbols = table.data_as_array(self.endian, self.data).map_err(|_| Unusable::Malformed("symbol table"))?;
        let strings: Option<&Section> = sections.get(table.sh_link(self.endian) as usize);
        let strings = strings.and_then(|s| s.data(self.endian, self.data).ok());
        Ok(Some(SymbolTable { symbols, strings: strings.ok_or(Unusable::Malformed("string table"))? }))
    }

    /// Whether this is a program that needs no loader. The loader itself needs none either, but is no program: its local
    /// malloc serves it alone.
    fn is_static(&self) -> bool {
        let of_type = |kind| self.segments.iter().find(|s| s.p_type(self.endian) == kind);
        if of_type(elf::PT_INTERP).is_some() {
            return false;
        }
        let Some(dynamic) = of_type(elf::PT_DYNAMIC) else { return true };
        let entries = dynamic.dynamic(self.endian, self.data).ok().flatten().unwrap_or_default();
        let is_pie = |d: &elf::Dyn64<Endianness>| {
            d.d_tag(self.endian) == u64::from(elf::DT_FLAGS_1) && d.d_val(self.endian) & u64::from(elf::DF_1_PIE) != 0
        };
        self.header.e_type(self.endian) == elf::ET_EXEC || entries.iter().any(is_pie)
    }

    /// Where the function of a symbol is, or why it cannot be probed.
    fn locate(&self, symbol: &Symbol) -> Result<Place, &'static str> {
        match symbol.st_type() {
            elf::STT_FUNC | elf::STT_NOTYPE => self.place_of(symbol.st_value(self.endian)),
            elf::STT_GNU_IFUNC => Err("an indirect function: chosen among several when the program starts"),
            _ => Err("not a function"),
        }
    }

    /// The file offset of an address in executable code.
    fn place_of(&self, address: u64) -> Result<Place, &'static str> {
        for s in self.segments.iter().filter(|s| s.p_type(self.endian) == elf::PT_LOAD) {
            let (start, size, offset) = (s.p_vaddr(self.endian), s.p_filesz(self.endian), s.p_offset(self.endian));
            let Some(inside) = address.checked_sub(start).filter(|&i| i < size) else { continue };
            let (Some(limit), true) = (offset.checked_add(size), s.p_flags(self.endian) & elf::PF_X != 0) else {
                break;
            };
            return Ok(Place { offset: offset + inside, limit });
        }
        Err("not in the file's code")
    }

    fn place(&self, entry: Place, size: u64, kernel: Emulation) -> Placement {
        let size = usize::try_from(size).ok().filter(|&s| s > 0);
        let wanted = size.filter(|&s| s <= breakpoint::MAX_FUNCTION).unwrap_or(breakpoint::UNKNOWN_SIZE_SCAN);
        breakpoint::place(&self.code(entry, wanted), size, kernel)
    }

    /// As many bytes of code as there are, up to `wanted`.
    fn code(&self, at: Place, wanted: usize) -> Vec<u8> {
        let available = usize::try_from(at.limit - at.offset).unwrap_or(usize::MAX);
        let mut code = vec![0; wanted.min(available)];
        let mut filled = 0;
        while filled < code.len() {
            match self.file.read_at(&mut code[filled..], at.offset + filled as u64) {
                Ok(0) | Err(_) => break,
                Ok(n) => filled += n,
            }
        }
        code.truncate(filled);
        code
    }

    /// What `gnu_get_libc_version` returns: it loads the address of a string and is done.
    fn glibc_release(&self, symbol: &Symbol) -> Option<String> {
        let address = symbol.st_value(self.endian);
        let code = self.code(self.place_of(address).ok()?, 32);
        let string = loaded_address(&code, address)?;
        let segment = self.segments.iter().find(|s| {
            let inside = string.checked_sub(s.p_vaddr(self.endian));
            s.p_type(self.endian) == elf::PT_LOAD && inside.is_some_and(|i| i < s.p_filesz(self.endian))
        })?;
        let offset = segment.p_offset(self.endian).checked_add(string - segment.p_vaddr(self.endian))?;
        let mut text = [0; 16];
        let len = self.file.read_at(&mut text, offset).ok()?;
        let text = std::str::from_utf8(text[..len].split(|&b| b == 0).next()?).ok()?;
        let plausible =
            text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(|c| c.is_ascii_digit() || c == '.');
        plausible.then(|| text.to_owned())
    }
}

/// The address that the first instructions of a function load, relative to themselves. The second may be that: the first
/// is then a landing pad.
#[cfg(target_arch = "x86_64")]
fn loaded_address(code: &[u8], address: u64) -> Option<u64> {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};
    let decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    let load = decoder.into_iter().take(2).find(|i| i.mnemonic() == Mnemonic::Lea && i.is_ip_rel_memory_operand())?;
    Some(load.ip_rel_memory_address())
}

#[cfg(target_arch = "aarch64")]
fn loaded_address(code: &[u8], address: u64) -> Option<u64> {
    breakpoint::loaded_address(code, address)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
