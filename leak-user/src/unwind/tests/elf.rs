//! Makes ELF files with unwind information of one's choice.

/// Where the code is, in the file and in memory.
pub const CODE_OFFSET: u64 = 0x1000;
pub const CODE: u64 = 0x40_1000;
/// The lowest address.
pub const BASE: u64 = 0x40_0000;
const FRAMES_OFFSET: u64 = 0x20_0000;
const FRAMES: u64 = 0x80_0000;

/// Common instructions: CFA = rsp + 8, the return address is at CFA - 8.
pub const USUAL: &[u8] = b"\x0c\x07\x08\x90\x01";

/// Unwind information as bytes.
#[derive(Clone, Default)]
pub struct Frames(pub Vec<u8>);

impl Frames {
    /// Adds what entries have in common; `augmentation` is `zR` or `zRS`. Returns where it is.
    pub fn common(&mut self, augmentation: &str, instructions: &[u8]) -> usize {
        let at = self.0.len();
        let mut body = b"\0\0\0\0\x01".to_vec();
        body.extend_from_slice(augmentation.as_bytes());
        // Alignment of code 1, of data -8, return address 16; absolute pointers.
        body.extend_from_slice(b"\0\x01\x78\x10\x01\x00");
        body.extend_from_slice(instructions);
        self.sized(body);
        at
    }

    /// Adds an entry for `len` bytes of code.
    pub fn entry(&mut self, common: usize, start: u64, len: u64, instructions: &[u8]) {
        let mut body = ((self.0.len() + 4 - common) as u32).to_le_bytes().to_vec();
        body.extend_from_slice(&start.to_le_bytes());
        body.extend_from_slice(&len.to_le_bytes());
        body.push(0);
        body.extend_from_slice(instructions);
        self.sized(body);
    }

    fn sized(&mut self, mut body: Vec<u8>) {
        body.resize(body.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(&(body.len() as u32).to_le_bytes());
        self.0.extend_from_slice(&body);
    }

    /// One entry for 64 bytes of code with these instructions.
    pub fn one(instructions: &[u8]) -> Self {
        let mut frames = Self::default();
        let common = frames.common("zR", USUAL);
        frames.entry(common, CODE, 64, instructions);
        frames
    }
}

/// A section besides the code.
pub struct Section<'a> {
    pub name: &'a str,
    pub flags: u64,
    pub bytes: &'a [u8],
}

/// An ELF file.
pub struct Elf<'a> {
    pub code: &'a [u8],
    pub sections: Vec<Section<'a>>,
    /// A note: name, type, content.
    pub note: Option<(&'a str, u32, &'a [u8])>,
    /// Without section headers, but with a search table for the first section.
    pub stripped: bool,
}

impl<'a> Elf<'a> {
    pub fn new(code: &'a [u8], eh_frame: &'a [u8]) -> Self {
        let sections = vec![Section { name: ".eh_frame", flags: 2, bytes: eh_frame }];
        Self { code, sections, note: None, stripped: false }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0; FRAMES_OFFSET as usize];
        assert!(self.code.len() as u64 <= FRAMES_OFFSET - CODE_OFFSET);
        file[CODE_OFFSET as usize..][..self.code.len()].copy_from_slice(self.code);
        let mut names = b"\0".to_vec();
        let mut headers = vec![[0; 64]];
        let mut add = |name: &str, kind: u32, flags: u64, address: u64, offset: usize, size: usize| {
            let mut header = [0; 64];
            header[0..4].copy_from_slice(&(names.len() as u32).to_le_bytes());
            header[4..8].copy_from_slice(&kind.to_le_bytes());
            for (i, value) in [flags, address, offset as u64, size as u64].into_iter().enumerate() {
                header[8 + 8 * i..16 + 8 * i].copy_from_slice(&value.to_le_bytes());
            }
            header[48..56].copy_from_slice(&1_u64.to_le_bytes());
            headers.push(header);
            names.extend_from_slice(name.as_bytes());
            names.push(0);
        };
        for section in &self.sections {
            let offset = file.len();
            let address = if section.flags & 2 == 0 { 0 } else { FRAMES + (offset as u64 - FRAMES_OFFSET) };
            add(section.name, 1, section.flags, address, offset, section.bytes.len());
            file.extend_from_slice(section.bytes);
        }
        // A search table: version 1, absolute pointers, no entries.
        let table = file.len();
        file.extend_from_slice(b"\x01\x00\xff\xff");
        file.extend_from_slice(&FRAMES.to_le_bytes());
        let note = file.len();
        if let Some((name, kind, content)) = self.note {
            for field in [name.len() as u32 + 1, content.len() as u32, kind] {
                file.extend_from_slice(&field.to_le_bytes());
            }
            for part in [name.as_bytes(), b"\0"].concat().chunks(4) {
                file.extend_from_slice(part);
            }
            file.resize(file.len().next_multiple_of(4), 0);
            file.extend_from_slice(content);
        }
        let loaded_end = file.len() as u64;
        let strings = file.len();
        add(".shstrtab", 3, 0, 0, strings, 0);
        let last = headers.len() - 1;
        headers[last][32..40].copy_from_slice(&(names.len() as u64).to_le_bytes());
        file.extend_from_slice(&names);
        let section_headers = file.len().next_multiple_of(8);
        file.resize(section_headers, 0);
        for header in &headers {
            file.extend_from_slice(header);
        }

        let rest = loaded_end - FRAMES_OFFSET;
        let mut segments = vec![
            // Headers, code, and the rest that is loaded: kind, flags, offset, address, size.
            (1_u32, 4_u32, 0, BASE, 0x1000),
            (1, 5, CODE_OFFSET, CODE, self.code.len() as u64),
            (1, 4, FRAMES_OFFSET, FRAMES, rest),
        ];
        if self.note.is_some() {
            let offset = note as u64;
            segments.push((4, 4, offset, FRAMES + (offset - FRAMES_OFFSET), loaded_end - offset));
        }
        if self.stripped {
            let offset = table as u64;
            segments.push((0x6474_e550, 4, offset, FRAMES + (offset - FRAMES_OFFSET), 12));
        }
        let mut header = b"\x7fELF\x02\x01\x01".to_vec();
        header.resize(16, 0);
        header.extend_from_slice(&[3, 0, 62, 0, 1, 0, 0, 0]);
        let (sections_at, count) = if self.stripped { (0, 0) } else { (section_headers as u64, headers.len() as u16) };
        for value in [0, 64, sections_at] {
            header.extend_from_slice(&value.to_le_bytes());
        }
        header.extend_from_slice(&[0; 4]);
        let names_at = count.saturating_sub(1);
        for value in [64, 56, segments.len() as u16, 64, count, names_at] {
            header.extend_from_slice(&value.to_le_bytes());
        }
        for (kind, flags, offset, address, size) in segments {
            header.extend_from_slice(&kind.to_le_bytes());
            header.extend_from_slice(&flags.to_le_bytes());
            let align = if kind == 4 { 4 } else { 0x1000 };
            for value in [offset, address, address, size, size, align] {
                header.extend_from_slice(&value.to_le_bytes());
            }
        }
        file[..header.len()].copy_from_slice(&header);
        file
    }
}
