//! Reads ELF files: their symbols, where those are in the file, and what calls through the global offset table lead to. Which
//! of the symbols matter is [`super::choice`]'s business.
//!
//! Files come from the traced process and may hold anything. They are read piecewise with bounds, not mapped into memory: a
//! mapped file that its owner cuts short would end this program with a signal.

use super::breakpoint::{self, Emulation, Placement};
use super::names::MAX_NAME;
use object::elf;
use object::read::elf::{Dyn as _, FileHeader, NoteIterator, ProgramHeader, Rela as _, SectionHeader, Sym};
use object::{Endianness, ReadCache, ReadRef};
use std::fs::File;
use std::os::unix::fs::FileExt;

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

/// More slots of one file are not looked at.
const MAX_SLOTS: usize = 1 << 20;

/// A build id is 20 bytes as a rule; longer ones are cut off.
const MAX_BUILD_ID: usize = 64;

/// Reads of a file that refuse pieces over [`MAX_PIECE`].
#[derive(Clone, Copy)]
pub struct Bounded<'a>(pub &'a ReadCache<&'a File>);

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
type RawSymbol = elf::Sym64<Endianness>;

/// Relocations that put a function's address into a slot: calls through the procedure linkage table, and other uses.
#[cfg(target_arch = "x86_64")]
const SLOT_RELOCATIONS: [u32; 2] = [elf::R_X86_64_JUMP_SLOT, elf::R_X86_64_GLOB_DAT];
#[cfg(target_arch = "x86_64")]
const OWN_RELOCATION: u32 = elf::R_X86_64_RELATIVE;
#[cfg(target_arch = "aarch64")]
const SLOT_RELOCATIONS: [u32; 2] = [elf::R_AARCH64_JUMP_SLOT, elf::R_AARCH64_GLOB_DAT];
#[cfg(target_arch = "aarch64")]
const OWN_RELOCATION: u32 = elf::R_AARCH64_RELATIVE;

/// What the dynamic linker puts into a slot.
#[derive(Clone, Copy, Debug)]
pub enum Slot<'a> {
    /// The address of what has this name.
    Symbol(Symbol<'a>),
    /// An address in this file.
    Own(u64),
}

/// A file that has been opened as ELF.
pub struct Elf<'a> {
    file: &'a File,
    data: Bounded<'a>,
    endian: Endianness,
    header: &'a Header,
    segments: &'a [Segment],
}

/// The build id of an ELF file, in hexadecimal digits.
pub fn build_id(file: &File) -> Option<String> {
    let cache = ReadCache::new(file);
    Elf::open(file, Bounded(&cache)).ok()?.build_id()
}

/// A symbol of a table.
#[derive(Clone, Copy, Debug)]
pub struct Symbol<'a> {
    /// Untrusted; cut off at [`MAX_NAME`] and so none of those that are looked for if it is longer.
    pub name: &'a [u8],
    pub address: u64,
    /// Of the function, bytes; zero where it is not known.
    pub size: u64,
    /// `STT_FUNC` and the like.
    kind: u8,
    /// Only this file's own code can mean it.
    pub local: bool,
    /// Whether it is defined in this file.
    pub defined: bool,
}

/// Symbols and their names.
pub struct SymbolTable<'a> {
    symbols: &'a [RawSymbol],
    /// Each ends in a NUL byte.
    strings: &'a [u8],
    endian: Endianness,
}

impl<'a> SymbolTable<'a> {
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'a>> {
        self.symbols.iter().map(|symbol| self.read(symbol))
    }

    fn get(&self, index: u32) -> Option<Symbol<'a>> {
        self.symbols.get(index as usize).map(|symbol| self.read(symbol))
    }

    fn read(&self, symbol: &RawSymbol) -> Symbol<'a> {
        let rest = self.strings.get(symbol.st_name(self.endian) as usize..).unwrap_or_default();
        let rest = &rest[..rest.len().min(MAX_NAME)];
        Symbol {
            name: rest.iter().position(|&b| b == 0).map_or(&[], |end| &rest[..end]),
            address: symbol.st_value(self.endian),
            size: symbol.st_size(self.endian),
            kind: symbol.st_type(),
            local: symbol.st_bind() == elf::STB_LOCAL,
            defined: !symbol.is_undefined(self.endian),
        }
    }
}

/// A place in the code of a file.
#[derive(Clone, Copy)]
pub struct Place {
    pub offset: u64,
    /// The end of the segment's part of the file.
    limit: u64,
}

impl<'a> Elf<'a> {
    pub fn open(file: &'a File, data: Bounded<'a>) -> Result<Self, Unusable> {
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

    pub fn build_id(&self) -> Option<String> {
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

    fn sections(&self) -> Result<&'a [Section], Unusable> {
        self.header.section_headers(self.endian, self.data).map_err(|_| Unusable::Malformed("section headers"))
    }

    /// The symbols that other files can bind to.
    pub fn dynamic_symbols(&self) -> Result<Option<SymbolTable<'a>>, Unusable> {
        self.symbols(elf::SHT_DYNSYM)
    }

    /// All symbols, of a file that has not been stripped of them.
    pub fn all_symbols(&self) -> Result<Option<SymbolTable<'a>>, Unusable> {
        self.symbols(elf::SHT_SYMTAB)
    }

    fn symbols(&self, kind: u32) -> Result<Option<SymbolTable<'a>>, Unusable> {
        let sections = self.sections()?;
        let Some(table) = sections.iter().find(|s| s.sh_type(self.endian) == kind) else { return Ok(None) };
        let symbols = table.data_as_array(self.endian, self.data).map_err(|_| Unusable::Malformed("symbol table"))?;
        let strings: Option<&Section> = sections.get(table.sh_link(self.endian) as usize);
        let strings = strings.and_then(|s| s.data(self.endian, self.data).ok());
        let strings = strings.ok_or(Unusable::Malformed("string table"))?;
        Ok(Some(SymbolTable { symbols, strings, endian: self.endian }))
    }

    /// The slots that the dynamic linker fills with the addresses of functions: where they are, and with which. At most
    /// [`MAX_SLOTS`].
    pub fn slots(&self) -> Vec<(u64, Slot<'a>)> {
        let symbols = self.dynamic_symbols().ok().flatten();
        let mut slots = Vec::new();
        for section in self.sections().unwrap_or_default() {
            let Ok(Some((relocations, _))) = section.rela(self.endian, self.data) else { continue };
            let filled = relocations.iter().filter_map(|relocation| {
                let at = relocation.r_offset(self.endian);
                let kind = relocation.r_type(self.endian, false);
                if SLOT_RELOCATIONS.contains(&kind) {
                    let symbol = symbols.as_ref()?.get(relocation.r_sym(self.endian, false))?;
                    return Some((at, Slot::Symbol(symbol)));
                }
                let address = u64::try_from(relocation.r_addend(self.endian)).ok()?;
                let own = kind == OWN_RELOCATION && self.place_of(address).is_ok();
                own.then_some((at, Slot::Own(address)))
            });
            slots.extend(filled.take(MAX_SLOTS - slots.len()));
        }
        slots
    }

    /// Whether this is a program that needs no loader. The loader itself needs none either, but is no program: its local
    /// malloc serves it alone.
    pub fn is_static(&self) -> bool {
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
    pub fn locate(&self, symbol: &Symbol<'_>) -> Result<Place, &'static str> {
        match symbol.kind {
            elf::STT_FUNC | elf::STT_NOTYPE => self.place_of(symbol.address),
            elf::STT_GNU_IFUNC => Err("an indirect function: chosen among several when the program starts"),
            _ => Err("not a function"),
        }
    }

    /// The file offset of an address in executable code.
    pub fn place_of(&self, address: u64) -> Result<Place, &'static str> {
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

    /// Where in the function that begins at `entry` the breakpoint goes; `size` is zero where it is unknown.
    pub fn place(&self, entry: Place, size: u64, kernel: Emulation) -> Placement {
        let size = usize::try_from(size).ok().filter(|&s| s > 0);
        let wanted = size.filter(|&s| s <= breakpoint::MAX_FUNCTION).unwrap_or(breakpoint::UNKNOWN_SIZE_SCAN);
        breakpoint::place(&self.code(entry, wanted), size, kernel)
    }

    /// As many bytes of code as there are, up to `wanted`.
    pub fn code(&self, at: Place, wanted: usize) -> Vec<u8> {
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
    pub fn glibc_release(&self, symbol: &Symbol<'_>) -> Option<String> {
        let address = symbol.address;
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
