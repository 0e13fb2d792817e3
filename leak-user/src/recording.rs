//! A recorded stream: the ring's raw records, and whatever else the ledger was told, in the order in which it was told.
//! Played back, it brings a ledger to the same state.
//!
//! A file is a header of 16 bytes and entries. All numbers of the recording itself are little-endian; the raw records
//! are in the byte order of the machine that they were taken on, and the header says which.
//!
//! | bytes | header |
//! |---|---|
//! | 8 | [`MAGIC`] |
//! | 4 | [`FORMAT_VERSION`], in the machine's byte order |
//! | 4 | [`leak_common::ABI_VERSION`], in the machine's byte order |
//!
//! An entry is four bytes, of which the lower 24 bits are the length of what follows and the upper 8 its kind, and the
//! content. What the entries mean is left to [`crate::ledger`].

use std::io::{self, Read, Write};

use bytes::{Buf, BufMut};
use leak_common::{ABI_VERSION, MAX_FRAMES, StackHeader};

use crate::ledger::Ledger;

/// The first bytes of a recording.
pub const MAGIC: [u8; 8] = *b"leaktrc\n";

/// Changes whenever the layout of the recording changes.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes of the longest entry: a stack with all its frames, and room for records to grow.
pub const MAX_ENTRY: usize = 2 * (size_of::<StackHeader>() + 8 * MAX_FRAMES);

const HEADER: usize = 16;
const PREFIX: usize = 4;
/// How much is read at once.
const CHUNK: usize = 256 << 10;

mod tag {
    pub const RECORD: u8 = 1;
    pub const ADD_PROCESS: u8 = 2;
    pub const REMOVE_PROCESS: u8 = 3;
    pub const FORK_PROCESS: u8 = 4;
    pub const SET_BREAK: u8 = 5;
    pub const MISSED_FREE: u8 = 6;
    pub const DISTRUST: u8 = 7;
    pub const ROLL: u8 = 8;
    pub const MISSED_REALLOC_END: u8 = 9;
    pub const DISTRUST_PROCESS: u8 = 10;
    pub const DISTRUST_BLOCK: u8 = 11;
}

/// One thing that a ledger is told. But for the first they are the functions of [`Ledger`] of the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A raw record of the ring.
    Record(&'a [u8]),
    AddProcess {
        tgid: u32,
        start_time: u64,
        time: u64,
    },
    RemoveProcess {
        tgid: u32,
    },
    ForkProcess {
        parent: u32,
        child: u32,
        start_time: u64,
        time: u64,
    },
    SetBreak {
        tgid: u32,
        addr: u64,
    },
    MissedFree {
        tgid: u32,
        addr: u64,
        time: u64,
    },
    MissedReallocEnd {
        tgid: u32,
        tid: u32,
        time: u64,
    },
    Distrust {
        time: u64,
    },
    DistrustProcess {
        tgid: u32,
        time: u64,
    },
    DistrustBlock {
        tgid: u32,
        addr: u64,
        time: u64,
    },
    Roll {
        time: u64,
    },
}

/// Why a recording cannot be read, or be read further.
#[derive(Debug)]
pub enum Error {
    Io(io::Error),
    /// The file does not begin with [`MAGIC`].
    NotARecording,
    /// It was made on a machine of the other byte order.
    ByteOrder,
    /// It was made by a version with another layout.
    Format(u32),
    /// It holds records of another version of [`leak_common`].
    Abi(u32),
    /// An entry of a kind that this version does not know.
    UnknownEntry(u8),
    /// An entry that is longer than any can be.
    TooLong(usize),
    /// The file ends within an entry, or an entry is too short for its kind.
    Truncated,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(_) => write!(f, "read the recording"),
            Self::NotARecording => write!(f, "not a recording of leaktrace"),
            Self::ByteOrder => write!(f, "recording of a machine of the other byte order"),
            Self::Format(version) => write!(f, "recording of format {version}; this is format {FORMAT_VERSION}"),
            Self::Abi(version) => write!(f, "recording with records of version {version}; these are {ABI_VERSION}"),
            Self::UnknownEntry(kind) => write!(f, "unknown kind of entry {kind}"),
            Self::TooLong(bytes) => write!(f, "entry of {bytes} bytes, of at most {MAX_ENTRY}"),
            Self::Truncated => write!(f, "truncated recording"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Writes a recording. Entries are small, so `W` is best buffered.
pub struct Writer<W: Write> {
    to: W,
}

impl<W: Write> Writer<W> {
    /// Begins a recording.
    pub fn new(mut to: W) -> io::Result<Self> {
        to.write_all(&MAGIC)?;
        to.write_all(&FORMAT_VERSION.to_ne_bytes())?;
        to.write_all(&ABI_VERSION.to_ne_bytes())?;
        Ok(Self { to })
    }

    /// Adds an entry. A record longer than [`MAX_ENTRY`] is an error, and is not written.
    pub fn write(&mut self, entry: Entry<'_>) -> io::Result<()> {
        let mut content = Vec::with_capacity(32);
        let (tag, content) = match entry {
            Entry::Record(record) => (tag::RECORD, record),
            other => (put(&mut content, other), &content[..]),
        };
        if content.len() > MAX_ENTRY {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, Error::TooLong(content.len())));
        }
        self.to.write_all(&(content.len() as u32 | u32::from(tag) << 24).to_le_bytes())?;
        self.to.write_all(content)
    }

    /// Ends the recording: flushes it, and gives back what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.to.flush()?;
        Ok(self.to)
    }
}

/// Appends an entry's numbers and returns its tag.
fn put(to: &mut Vec<u8>, entry: Entry<'_>) -> u8 {
    match entry {
        Entry::Record(record) => {
            to.put_slice(record);
            tag::RECORD
        }
        Entry::AddProcess { tgid, start_time, time } => {
            to.put_u32_le(tgid);
            to.put_u64_le(start_time);
            to.put_u64_le(time);
            tag::ADD_PROCESS
        }
        Entry::RemoveProcess { tgid } => {
            to.put_u32_le(tgid);
            tag::REMOVE_PROCESS
        }
        Entry::ForkProcess { parent, child, start_time, time } => {
            to.put_u32_le(parent);
            to.put_u32_le(child);
            to.put_u64_le(start_time);
            to.put_u64_le(time);
            tag::FORK_PROCESS
        }
        Entry::SetBreak { tgid, addr } => {
            to.put_u32_le(tgid);
            to.put_u64_le(addr);
            tag::SET_BREAK
        }
        Entry::MissedFree { tgid, addr, time } => {
            to.put_u32_le(tgid);
            to.put_u64_le(addr);
            to.put_u64_le(time);
            tag::MISSED_FREE
        }
        Entry::MissedReallocEnd { tgid, tid, time } => {
            to.put_u32_le(tgid);
            to.put_u32_le(tid);
            to.put_u64_le(time);
            tag::MISSED_REALLOC_END
        }
        Entry::Distrust { time } => {
            to.put_u64_le(time);
            tag::DISTRUST
        }
        Entry::DistrustProcess { tgid, time } => {
            to.put_u32_le(tgid);
            to.put_u64_le(time);
            tag::DISTRUST_PROCESS
        }
        Entry::DistrustBlock { tgid, addr, time } => {
            to.put_u32_le(tgid);
            to.put_u64_le(addr);
            to.put_u64_le(time);
            tag::DISTRUST_BLOCK
        }
        Entry::Roll { time } => {
            to.put_u64_le(time);
            tag::ROLL
        }
    }
}

/// Reads an entry's content.
fn parse(tag: u8, mut content: &[u8]) -> Result<Entry<'_>, Error> {
    let r = &mut content;
    let number = |r: &mut &[u8]| r.try_get_u32_le().map_err(|_| Error::Truncated);
    let long = |r: &mut &[u8]| r.try_get_u64_le().map_err(|_| Error::Truncated);
    Ok(match tag {
        tag::RECORD => Entry::Record(r),
        tag::ADD_PROCESS => Entry::AddProcess { tgid: number(r)?, start_time: long(r)?, time: long(r)? },
        tag::REMOVE_PROCESS => Entry::RemoveProcess { tgid: number(r)? },
        tag::FORK_PROCESS => {
            Entry::ForkProcess { parent: number(r)?, child: number(r)?, start_time: long(r)?, time: long(r)? }
        }
        tag::SET_BREAK => Entry::SetBreak { tgid: number(r)?, addr: long(r)? },
        tag::MISSED_FREE => Entry::MissedFree { tgid: number(r)?, addr: long(r)?, time: long(r)? },
        tag::MISSED_REALLOC_END => Entry::MissedReallocEnd { tgid: number(r)?, tid: number(r)?, time: long(r)? },
        tag::DISTRUST => Entry::Distrust { time: long(r)? },
        tag::DISTRUST_PROCESS => Entry::DistrustProcess { tgid: number(r)?, time: long(r)? },
        tag::DISTRUST_BLOCK => Entry::DistrustBlock { tgid: number(r)?, addr: long(r)?, time: long(r)? },
        tag::ROLL => Entry::Roll { time: long(r)? },
        unknown => return Err(Error::UnknownEntry(unknown)),
    })
}

/// Reads a recording, in bounded memory.
pub struct Reader<R: Read> {
    from: R,
    /// What has been read and not yet been given out is at `begin..end`.
    buffer: Box<[u8]>,
    begin: usize,
    end: usize,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(mut from: R) -> Result<Self, Error> {
        let mut header = [0; HEADER];
        from.read_exact(&mut header).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::NotARecording,
            _ => Error::Io(error),
        })?;
        let mut header = &header[..];
        if header.copy_to_bytes(MAGIC.len()) != MAGIC[..] {
            return Err(Error::NotARecording);
        }
        match header.get_u32_ne() {
            FORMAT_VERSION => {}
            version if version.swap_bytes() == FORMAT_VERSION => return Err(Error::ByteOrder),
            version => return Err(Error::Format(version)),
        }
        match header.get_u32_ne() {
            ABI_VERSION => {}
            version => return Err(Error::Abi(version)),
        }
        Ok(Self { from, buffer: vec![0; CHUNK].into(), begin: 0, end: 0 })
    }

    /// The next entries, as many as there are in memory at once; `None` at the end. After an error there is nothing more
    /// to be had.
    pub fn next_entries(&mut self) -> Result<Option<Entries<'_>>, Error> {
        loop {
            let whole = whole_entries(&self.buffer[self.begin..self.end])?;
            if whole > 0 {
                let begin = self.begin;
                self.begin += whole;
                return Ok(Some(Entries { rest: &self.buffer[begin..begin + whole] }));
            }
            // Less than an entry is left.
            self.buffer.copy_within(self.begin..self.end, 0);
            self.end -= self.begin;
            self.begin = 0;
            match self.from.read(&mut self.buffer[self.end..]) {
                Ok(0) if self.end == 0 => return Ok(None),
                Ok(0) => return Err(Error::Truncated),
                Ok(bytes) => self.end += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Kind and length of the entry that begins here, if its prefix is here.
fn prefix(bytes: &[u8]) -> Option<(u8, usize)> {
    let prefix = u32::from_le_bytes(*bytes.first_chunk::<PREFIX>()?);
    Some(((prefix >> 24) as u8, (prefix & 0xff_ffff) as usize))
}

/// Bytes of the entries that are here from beginning to end.
fn whole_entries(bytes: &[u8]) -> Result<usize, Error> {
    let mut whole = 0;
    while let Some((_, length)) = prefix(&bytes[whole..]) {
        if length > MAX_ENTRY {
            // What comes before it is still good.
            return if whole > 0 { Ok(whole) } else { Err(Error::TooLong(length)) };
        }
        if bytes.len() - whole < PREFIX + length {
            break;
        }
        whole += PREFIX + length;
    }
    Ok(whole)
}

/// Entries in memory.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let (tag, length) = prefix(self.rest)?;
        let (content, rest) = self.rest[PREFIX..].split_at_checked(length)?;
        self.rest = rest;
        Some(parse(tag, content))
    }
}

/// What was played back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Raw records, decodable or not.
    pub records: u64,
    /// Of these, those that [`crate::decode`] refused.
    pub undecodable: u64,
    /// Entries of other kinds.
    pub others: u64,
}

/// Plays a recording back into a ledger, to its end or to the first error.
pub fn replay<R: Read>(reader: &mut Reader<R>, ledger: &mut Ledger) -> Result<Replayed, Error> {
    let mut replayed = Replayed::default();
    while let Some(entries) = reader.next_entries()? {
        let mut entries = entries.peekable();
        while let Some(entry) = entries.next() {
            match entry? {
                Entry::Record(first) => {
                    // All records up to the next entry of another kind go together.
                    let mut count = 1;
                    let more = std::iter::from_fn(|| {
                        let next = entries.next_if(|entry| matches!(entry, Ok(Entry::Record(_))))?;
                        count += 1;
                        match next {
                            Ok(Entry::Record(record)) => Some(record),
                            _ => None,
                        }
                    });
                    replayed.undecodable += ledger.apply_records(std::iter::once(first).chain(more));
                    replayed.records += count;
                }
                other => {
                    apply(ledger, other);
                    replayed.others += 1;
                }
            }
        }
    }
    Ok(replayed)
}

/// Tells a ledger one thing. A record that cannot be decoded is passed over.
pub fn apply(ledger: &mut Ledger, entry: Entry<'_>) {
    match entry {
        Entry::Record(record) => {
            ledger.apply_records([record]);
        }
        Entry::AddProcess { tgid, start_time, time } => ledger.add_process(tgid, start_time, time),
        Entry::RemoveProcess { tgid } => ledger.remove_process(tgid),
        Entry::ForkProcess { parent, child, start_time, time } => ledger.fork_process(parent, child, start_time, time),
        Entry::SetBreak { tgid, addr } => ledger.set_break(tgid, addr),
        Entry::MissedFree { tgid, addr, time } => ledger.missed_free(tgid, addr, time),
        Entry::MissedReallocEnd { tgid, tid, time } => ledger.missed_realloc_end(tgid, tid, time),
        Entry::Distrust { time } => ledger.distrust(time),
        Entry::DistrustProcess { tgid, time } => ledger.distrust_process(tgid, time),
        Entry::DistrustBlock { tgid, addr, time } => ledger.distrust_block(tgid, addr, time),
        Entry::Roll { time } => ledger.roll(time),
    }
}

#[cfg(test)]
mod tests {
    use leak_common::kind;
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::Config;

    fn alloc(tgid: u32, addr: u64, size: u64, time: u64) -> Vec<u8> {
        let mut record = vec![kind::ALLOC, 1, 0, 0];
        record.put_u32_ne(tgid);
        for number in [addr, size, 7, time] {
            record.put_u64_ne(number);
        }
        record
    }

    fn sample<'a>(record: &'a [u8], other: &'a [u8]) -> Vec<Entry<'a>> {
        vec![
            Entry::AddProcess { tgid: 1, start_time: 5, time: 1000 },
            Entry::SetBreak { tgid: 1, addr: 0x7000 },
            Entry::Record(record),
            Entry::Record(other),
            Entry::ForkProcess { parent: 1, child: 2, start_time: 6, time: 2000 },
            Entry::MissedFree { tgid: 2, addr: 0x10, time: 3000 },
            Entry::Record(&[99, 0, 0, 0, 1, 0, 0, 0]),
            Entry::Roll { time: 4_000_000_000 },
            Entry::MissedReallocEnd { tgid: 2, tid: 9, time: 3000 },
            Entry::DistrustProcess { tgid: 7, time: 1 },
            Entry::DistrustBlock { tgid: 7, addr: 0x20, time: 1 },
            Entry::Distrust { time: 1 },
            Entry::AddProcess { tgid: 3, start_time: 5, time: 1000 },
            Entry::RemoveProcess { tgid: 3 },
        ]
    }

    fn written(entries: &[Entry<'_>]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new()).expect("memory takes everything");
        for entry in entries {
            writer.write(*entry).expect("memory takes everything");
        }
        writer.finish().expect("memory takes everything")
    }

    /// Gives one byte at a time, so that every entry is split in every place.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            let length = to.len().min(1);
            self.0.read(&mut to[..length])
        }
    }

    fn read_all(from: impl Read, mut each: impl FnMut(Entry<'_>)) -> Result<(), Error> {
        let mut reader = Reader::new(from)?;
        while let Some(entries) = reader.next_entries()? {
            for entry in entries {
                each(entry?);
            }
        }
        Ok(())
    }

    /// Every kind of entry comes back as it was written, also when reads end anywhere.
    #[test]
    fn entries_come_back() {
        let (a, b) = (alloc(1, 0x10, 100, 1500), alloc(1, 0x20, 200, 1600));
        let entries = sample(&a, &b);
        let bytes = written(&entries);
        for trickle in [false, true] {
            let mut expected = entries.iter();
            let each = |entry: Entry<'_>| assert_eq!(Some(&entry), expected.next());
            if trickle {
                read_all(Trickle(&bytes), each).expect("a whole recording");
            } else {
                read_all(&bytes[..], each).expect("a whole recording");
            }
            assert_eq!(expected.next(), None);
        }
    }

    /// A replay tells the ledger everything, in order, and counts what cannot be decoded.
    #[test]
    fn replay_drives_the_ledger() {
        let (a, b) = (alloc(1, 0x10, 100, 1500), alloc(1, 0x20, 200, 1600));
        let bytes = written(&sample(&a, &b));
        let mut ledger = Ledger::new(Config::default());
        let replayed = replay(&mut Reader::new(&bytes[..]).expect("a header"), &mut ledger).expect("a whole recording");
        assert_eq!(replayed, Replayed { records: 3, undecodable: 1, others: 11 });
        let parent = ledger.process(1).expect("added");
        let child = ledger.process(2).expect("forked");
        assert!(ledger.process(3).is_none());
        // Everything was born in the tick that is distrusted, and the child's block at 0x10 had been freed.
        assert_eq!((parent.live().bytes, parent.distrusted().bytes), (0, 300));
        assert_eq!((child.live().bytes, child.distrusted().bytes), (0, 200));
        assert_eq!(ledger.counters().missed_free_applied, 1);
    }

    /// A header of something else, of another version or of another byte order is told apart.
    #[test]
    fn foreign_files_are_refused() {
        let good = written(&[]);
        assert!(Reader::new(&good[..]).is_ok());
        assert!(matches!(Reader::new(&b"PK\x03\x04"[..]), Err(Error::NotARecording)));
        assert!(matches!(Reader::new(&[0; 64][..]), Err(Error::NotARecording)));
        let mut bytes = good.clone();
        bytes[8..12].reverse();
        assert!(matches!(Reader::new(&bytes[..]), Err(Error::ByteOrder)));
        let mut bytes = good.clone();
        bytes[8..12].copy_from_slice(&9_u32.to_ne_bytes());
        assert!(matches!(Reader::new(&bytes[..]), Err(Error::Format(9))));
        let mut bytes = good;
        bytes[12..].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(matches!(Reader::new(&bytes[..]), Err(Error::Abi(u32::MAX))));
    }

    type IsExpected = fn(&Error) -> bool;

    /// What precedes a broken end is still played; the break itself is an error.
    #[test]
    fn a_cut_recording_gives_what_it_has() {
        let record = alloc(1, 0x10, 100, 1500);
        let mut bytes = written(&[Entry::AddProcess { tgid: 1, start_time: 5, time: 1000 }, Entry::Record(&record)]);
        let endings: [(&[u8], IsExpected); 5] = [
            (&[1], |error| matches!(error, Error::Truncated)),
            (&[40, 0, 0, 1, 0], |error| matches!(error, Error::Truncated)),
            (&[3, 0, 0, 7, 0, 0, 0], |error| matches!(error, Error::Truncated)),
            (&[0, 0, 0, 77], |error| matches!(error, Error::UnknownEntry(77))),
            (&[0xff, 0xff, 0xff, 1], |error| matches!(error, Error::TooLong(0xff_ffff))),
        ];
        let good = bytes.len();
        for (ending, expected) in endings {
            bytes.truncate(good);
            bytes.extend_from_slice(ending);
            let mut ledger = Ledger::new(Config::default());
            let error = replay(&mut Reader::new(&bytes[..]).expect("a header"), &mut ledger).expect_err("a bad end");
            assert!(expected(&error), "{error:?} for {ending:?}");
            assert_eq!(ledger.process(1).expect("added").live().bytes, 100);
        }
    }

    /// A record that could not be read back is not written.
    #[test]
    fn writer_refuses_what_reader_would() {
        let mut writer = Writer::new(Vec::new()).expect("memory takes everything");
        assert!(writer.write(Entry::Record(&[0; MAX_ENTRY])).is_ok());
        assert!(writer.write(Entry::Record(&[0; MAX_ENTRY + 1])).is_err());
        assert!(read_all(&writer.finish().expect("memory takes everything")[..], |_| ()).is_ok());
    }

    proptest! {
        /// Any bytes after a good header give entries or an error, never a panic, and so does the ledger.
        #[test]
        fn total_on_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let mut file = written(&[Entry::AddProcess { tgid: 1, start_time: 0, time: 0 }]);
            file.extend_from_slice(&bytes);
            let _ = replay(&mut Reader::new(&file[..]).expect("a header"), &mut Ledger::new(Config::default()));
        }

        /// The same for well-formed entries with any content, so that every event reaches the ledger with any numbers.
        #[test]
        fn ledger_is_total(
            records in prop::collection::vec((0_u8..17, 0_u16..4, prop::collection::vec(
                prop_oneof![0_u64..4, (0_u64..64).prop_map(|page| page << 12), any::<u64>()], 4..7)), 0..100),
        ) {
            let mut file = written(&[Entry::AddProcess { tgid: 1, start_time: 0, time: 0 }]);
            for (kind, flags, numbers) in records {
                let mut content = vec![kind, 0];
                content.put_u16_ne(flags);
                content.put_u32_ne(1);
                for number in numbers {
                    content.put_u64_ne(number);
                }
                file.put_u32_le(content.len() as u32 | 1 << 24);
                file.extend_from_slice(&content);
            }
            prop_assert!(replay(&mut Reader::new(&file[..])?, &mut Ledger::new(Config::default())).is_ok());
        }
    }
}
