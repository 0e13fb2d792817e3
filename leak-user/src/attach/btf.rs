//! The few things that leaktrace asks of the running kernel's type information: ids of functions and types, offsets of members.
//!
//! One pass over `/sys/kernel/btf/vmlinux` that looks for the wanted names only, a few milliseconds at each start. The libraries
//! build all of its hundred thousand types first (over 100 ms measured), aya-obj's keeps members to itself.
//! The format: Documentation/bpf/btf.rst.

use std::collections::HashMap;
use std::fs;
use std::io;

use bytes::Buf;

const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

const KIND_STRUCT: u32 = 4;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNC: u32 = 12;

/// What was found; a name that the kernel does not have is absent.
#[derive(Debug, Default)]
pub struct Btf {
    /// Functions and type names, which share no names that are asked for.
    ids: HashMap<String, u32>,
    members: HashMap<(String, String), u64>,
}

impl Btf {
    /// Looks for these functions and type names, and these members as (structure, member).
    pub fn of_this_kernel(names: &[&str], members: &[(&str, &str)]) -> io::Result<Self> {
        let data = fs::read(PATH).map_err(|e| io::Error::new(e.kind(), format!("failed to read {PATH}: {e}")))?;
        Self::find(&data, names, members)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{PATH} is not in the known format")))
    }

    /// `None` where the data ends early or is of another format.
    fn find(data: &[u8], names: &[&str], members: &[(&str, &str)]) -> Option<Self> {
        let mut header = data.get(..24)?;
        if header.get_u16_ne() != MAGIC {
            return None;
        }
        header.advance(2);
        let header_length = header.get_u32_ne() as usize;
        let mut part = || {
            let (offset, length) = (header.get_u32_ne() as usize, header.get_u32_ne() as usize);
            let start = header_length.checked_add(offset)?;
            data.get(start..start.checked_add(length)?)
        };
        let (mut types, strings) = (part()?, part()?);
        let name = |offset: u32| {
            let rest = strings.get(offset as usize..)?;
            std::str::from_utf8(&rest[..rest.iter().position(|&byte| byte == 0)?]).ok()
        };
        let mut found = Self::default();
        let mut id = 0;
        while !types.is_empty() {
            id += 1;
            let mut head = take(&mut types, 12)?;
            let (name_offset, info) = (head.get_u32_ne(), head.get_u32_ne());
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            // Bytes behind the head, by kind (enum btf_kind).
            let mut rest = take(
                &mut types,
                match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    KIND_STRUCT | 5 | 15 | 19 => count * 12,
                    6 | 13 => count * 8,
                    2 | 7..=12 | 16 | 18 => 0,
                    _ => return None,
                },
            )?;
            match kind {
                KIND_FUNC | KIND_TYPEDEF => {
                    let name = name(name_offset)?;
                    if names.contains(&name) {
                        found.ids.entry(name.to_owned()).or_insert(id);
                    }
                }
                KIND_STRUCT => {
                    let name_of_struct = name(name_offset)?;
                    if !members.iter().any(|(of, _)| *of == name_of_struct) {
                        continue;
                    }
                    // With this bit the upper eight of an offset are the width of a bit field.
                    let mask = if info >> 31 == 1 { 0x00ff_ffff } else { u32::MAX };
                    while !rest.is_empty() {
                        let (member, _type, offset) = (rest.get_u32_ne(), rest.get_u32_ne(), rest.get_u32_ne() & mask);
                        let member = name(member)?;
                        if members.contains(&(name_of_struct, member)) {
                            let key = (name_of_struct.to_owned(), member.to_owned());
                            found.members.entry(key).or_insert(u64::from(offset / 8));
                        }
                    }
                }
                _ => {}
            }
        }
        Some(found)
    }

    /// The id of a function or a type name.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    /// Offset of a structure's member, bytes.
    pub fn member(&self, of: &str, member: &str) -> Option<u64> {
        self.members.get(&(of.to_owned(), member.to_owned())).copied()
    }
}

fn take<'a>(from: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(length)?;
    *from = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// On the running kernel: a function and members that every kernel has, in their order; what there is not is absent.
    #[test]
    fn finds_what_this_kernel_has() {
        if !std::path::Path::new(PATH).exists() {
            return;
        }
        let members = [("list_head", "next"), ("list_head", "prev"), ("list_head", "middle")];
        let btf = Btf::of_this_kernel(&["vfs_read", "no_such_function"], &members).expect("the kernel's own data");
        assert!(btf.id("vfs_read").is_some());
        assert_eq!(btf.id("no_such_function"), None);
        assert_eq!((btf.member("list_head", "next"), btf.member("list_head", "prev")), (Some(0), Some(8)));
        assert_eq!(btf.member("list_head", "middle"), None);
    }

    proptest! {
        /// Any bytes behind a header give an answer, never a panic.
        #[test]
        fn total_on_arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..512), lengths in any::<[u8; 4]>()) {
            let mut data = MAGIC.to_ne_bytes().to_vec();
            data.extend_from_slice(&[1, 0]);
            data.extend_from_slice(&24_u32.to_ne_bytes());
            for length in lengths {
                data.extend_from_slice(&u32::from(length).to_ne_bytes());
            }
            data.extend_from_slice(&bytes);
            let _ = Btf::find(&data, &["a"], &[("", "")]);
        }
    }
}
