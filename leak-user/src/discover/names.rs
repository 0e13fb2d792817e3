//! The functions of allocators by their symbols, and what the arguments of each mean.
//!
//! The names of C's functions, and of jemalloc's own on top of them, are the same in many allocators but for a prefix: `je_`,
//! `_rjem_`, `tc_`, `mi_`. What a name means is therefore asked with its prefix taken off ([`of_api`]); which prefixes a file
//! uses, and whether its functions are an allocator, is [`super::choice`]'s business.
//!
//! Sources: the C and POSIX standards, glibc's manual, jemalloc(3), gperftools' `tcmalloc.h`, `mimalloc.h`, the Itanium C++ ABI
//! (mangling), and the symbols of rustc's allocator shim. What only asks (`nallocx`, `malloc_usable_size`) is not in the tables.

use leak_common::op;

/// Functions that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Api {
    /// malloc, free and what else C, POSIX and old systems have.
    C,
    /// operator new and delete; they often call those of C.
    Cxx,
    /// mallocx and the like.
    Jemalloc,
    /// What tcmalloc has beyond C, behind `tc_`.
    Tcmalloc,
    /// What mimalloc has beyond C, behind `mi_`.
    Mimalloc,
    /// What Rust programs call; it mostly calls those of C.
    Rust,
}

impl Api {
    /// Whether its functions may be there only to call those of another allocator.
    pub fn wraps(self) -> bool {
        matches!(self, Self::Cxx | Self::Rust)
    }
}

/// What tcmalloc's names begin with.
pub const TCMALLOC: &str = "tc_";

/// What mimalloc's names begin with.
pub const MIMALLOC: &str = "mi_";

/// By which jemalloc is known, whatever its prefix.
pub const OF_JEMALLOC: &str = "mallocx";

/// Longer names are not looked at, bytes. The longest here are those of Rust, with a crate's hash.
pub const MAX_NAME: usize = 96;

/// C's functions. Those that a message should name first come first.
pub const C: [(&str, u8); 13] = [
    ("malloc", op::MALLOC),
    ("calloc", op::CALLOC),
    ("realloc", op::REALLOC),
    ("reallocarray", op::REALLOCARRAY),
    ("posix_memalign", op::POSIX_MEMALIGN),
    ("aligned_alloc", op::ALIGNED),
    ("memalign", op::ALIGNED),
    ("valloc", op::MALLOC),
    ("pvalloc", op::MALLOC),
    ("free", op::FREE),
    ("cfree", op::FREE),
    ("free_sized", op::FREE),
    ("free_aligned_sized", op::FREE),
];

/// Beyond the standards, in several libraries.
const MORE_C: [(&str, u8); 2] = [("reallocf", op::REALLOCF), ("vfree", op::FREE)];

const JEMALLOC_API: [(&str, u8); 7] = [
    (OF_JEMALLOC, op::MALLOC),
    ("rallocx", op::REALLOC),
    ("xallocx", op::XALLOCX),
    ("dallocx", op::FREE),
    ("sdallocx", op::FREE),
    ("mallctl", op::CONTROL),
    ("mallctlbymib", op::CONTROL_BY_MIB),
];

const TCMALLOC_API: [(&str, u8); 21] = [
    ("malloc_skip_new_handler", op::MALLOC),
    ("new", op::MALLOC),
    ("new_nothrow", op::MALLOC),
    ("new_aligned", op::MALLOC),
    ("new_aligned_nothrow", op::MALLOC),
    ("newarray", op::MALLOC),
    ("newarray_nothrow", op::MALLOC),
    ("newarray_aligned", op::MALLOC),
    ("newarray_aligned_nothrow", op::MALLOC),
    ("delete", op::FREE),
    ("delete_nothrow", op::FREE),
    ("delete_sized", op::FREE),
    ("delete_aligned", op::FREE),
    ("delete_aligned_nothrow", op::FREE),
    ("delete_sized_aligned", op::FREE),
    ("deletearray", op::FREE),
    ("deletearray_nothrow", op::FREE),
    ("deletearray_sized", op::FREE),
    ("deletearray_aligned", op::FREE),
    ("deletearray_aligned_nothrow", op::FREE),
    ("deletearray_sized_aligned", op::FREE),
];

const MIMALLOC_API: [(&str, u8); 44] = [
    ("malloc_small", op::MALLOC),
    ("zalloc", op::MALLOC),
    ("zalloc_small", op::MALLOC),
    ("malloc_aligned", op::MALLOC),
    ("malloc_aligned_at", op::MALLOC),
    ("zalloc_aligned", op::MALLOC),
    ("zalloc_aligned_at", op::MALLOC),
    ("umalloc", op::MALLOC),
    ("umalloc_small", op::MALLOC),
    ("umalloc_aligned", op::MALLOC),
    ("uzalloc_aligned", op::MALLOC),
    ("new", op::MALLOC),
    ("new_nothrow", op::MALLOC),
    ("new_aligned", op::MALLOC),
    ("new_aligned_nothrow", op::MALLOC),
    ("mallocn", op::CALLOC),
    ("calloc_aligned", op::CALLOC),
    ("calloc_aligned_at", op::CALLOC),
    ("ucalloc", op::CALLOC),
    ("new_n", op::CALLOC),
    ("rezalloc", op::REALLOC),
    ("realloc_aligned", op::REALLOC),
    ("realloc_aligned_at", op::REALLOC),
    ("rezalloc_aligned", op::REALLOC),
    ("rezalloc_aligned_at", op::REALLOC),
    ("urealloc", op::REALLOC),
    ("new_realloc", op::REALLOC),
    // The block or nothing, where it is then as it was.
    ("expand", op::REALLOC),
    ("_expand", op::REALLOC),
    ("reallocn", op::REALLOCARRAY),
    ("recalloc", op::REALLOCARRAY),
    ("recalloc_aligned", op::REALLOCARRAY),
    ("recalloc_aligned_at", op::REALLOCARRAY),
    ("aligned_recalloc", op::REALLOCARRAY),
    ("aligned_offset_recalloc", op::REALLOCARRAY),
    ("new_reallocn", op::REALLOCARRAY),
    ("free_size", op::FREE),
    ("free_aligned", op::FREE),
    ("free_size_aligned", op::FREE),
    ("free_small", op::FREE),
    ("ufree", op::FREE),
    ("heap_destroy", op::FREE_UNNAMED),
    ("heap_alloc_new", op::ALIGNED),
    ("heap_alloc_new_n", op::CALLOC | op::SHIFTED),
];

/// What has a twin that takes a heap first (`mi_heap_malloc` beside `mi_malloc`).
const WITH_HEAP: [&str; 24] = [
    "malloc",
    "malloc_small",
    "malloc_aligned",
    "malloc_aligned_at",
    "zalloc",
    "zalloc_small",
    "zalloc_aligned",
    "zalloc_aligned_at",
    "calloc",
    "calloc_aligned",
    "calloc_aligned_at",
    "mallocn",
    "realloc",
    "realloc_aligned",
    "realloc_aligned_at",
    "reallocn",
    "reallocf",
    "rezalloc",
    "rezalloc_aligned",
    "rezalloc_aligned_at",
    "recalloc",
    "recalloc_aligned",
    "recalloc_aligned_at",
    "umalloc",
];

const RUST_API: [(&str, u8); 4] = [
    ("__rust_alloc", op::MALLOC),
    ("__rust_alloc_zeroed", op::MALLOC),
    ("__rust_realloc", op::RUST_REALLOC),
    ("__rust_dealloc", op::FREE),
];

/// What the function of this name does, of those that have no prefix but their own.
pub fn plain(name: &[u8]) -> Option<(Api, u8)> {
    // Most names are none of these: look at few bytes of those.
    match name.first()? {
        b'_' => cxx(name).or_else(|| rust(name)),
        _ => of_api(name, ""),
    }
}

/// The same for a name whose prefix has been taken off.
pub fn of_api(rest: &[u8], prefix: &str) -> Option<(Api, u8)> {
    let found = |table: &[(&str, u8)]| table.iter().find(|(name, _)| name.as_bytes() == rest).map(|&(_, shape)| shape);
    let of = |api, table| Some((api, found(table)?));
    let general = || of(Api::C, &C).or_else(|| of(Api::C, &MORE_C));
    match prefix {
        TCMALLOC => general().or_else(|| of(Api::Tcmalloc, &TCMALLOC_API)),
        MIMALLOC => general().or_else(|| of(Api::Mimalloc, &MIMALLOC_API)).or_else(|| with_heap(rest)),
        _ => general().or_else(|| of(Api::Jemalloc, &JEMALLOC_API)),
    }
}

/// Whether this is the name of a function of C or of jemalloc, its prefix taken off.
pub fn is_c(rest: &str) -> bool {
    of_api(rest.as_bytes(), "").is_some()
}

fn with_heap(rest: &[u8]) -> Option<(Api, u8)> {
    let twin = rest.strip_prefix(b"heap_")?;
    WITH_HEAP.iter().find(|name| name.as_bytes() == twin)?;
    let (_, shape) = of_api(twin, MIMALLOC)?;
    // Where the size comes first without a heap, it comes second with one.
    Some((Api::Mimalloc, if shape == op::MALLOC { op::ALIGNED } else { shape | op::SHIFTED }))
}

/// The replaceable operator new and delete, single and array, sized, aligned and not throwing, mangled for 64 bits; also the
/// ones that take a hint of how hot the block is.
fn cxx(name: &[u8]) -> Option<(Api, u8)> {
    fn without<'a>(name: &'a [u8], part: &str) -> &'a [u8] {
        name.strip_prefix(part.as_bytes()).unwrap_or(name)
    }
    const ALIGNED: &str = "St11align_val_t";
    const NOTHROW: &str = "RKSt9nothrow_t";
    let name = name.strip_prefix(b"_Z")?;
    let (shape, rest) = if let Some(rest) = name.strip_prefix(b"nwm").or_else(|| name.strip_prefix(b"nam")) {
        (op::MALLOC, rest)
    } else {
        let rest = name.strip_prefix(b"dlPv").or_else(|| name.strip_prefix(b"daPv"))?;
        (op::FREE, without(rest, "m"))
    };
    let rest = without(without(without(rest, ALIGNED), NOTHROW), "12__hot_cold_t");
    rest.is_empty().then_some((Api::Cxx, shape))
}

/// Plain, as rustc wrote them until 1.86, or mangled with the hash of the crate that holds the shim.
fn rust(name: &[u8]) -> Option<(Api, u8)> {
    let bare = match name.strip_prefix(b"_RNv") {
        // _RNvCsHASH_7___rustc12___rust_alloc: a name that begins with an underscore has another one before it.
        Some(mangled) => {
            let at = mangled.windows(9).position(|part| part == b"7___rustc")?;
            let rest = &mangled[at + 9..];
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            rest[digits..].strip_prefix(b"_")?
        }
        None => name,
    };
    RUST_API.iter().find(|(known, _)| known.as_bytes() == bare).map(|&(_, shape)| (Api::Rust, shape))
}

/// How well a function is known, the lower the better.
pub fn rank(name: &str) -> usize {
    C.iter().position(|(known, _)| *known == name).unwrap_or(C.len())
}

/// The name as people write it.
pub fn display(name: &str) -> String {
    let mangled = name.starts_with("_Z").then(|| cpp_demangle::Symbol::new(name).ok()).flatten();
    mangled.and_then(|symbol| symbol.demangle().ok()).unwrap_or_else(|| name.to_owned())
}

/// The prefix of a name that only jemalloc has, if it is one: `je_` of `je_mallocx`.
pub fn jemalloc_prefix(name: &[u8]) -> Option<&str> {
    let prefix = std::str::from_utf8(name.strip_suffix(OF_JEMALLOC.as_bytes())?).ok()?;
    // Neither C's own nor a mangled name that happens to end like this.
    let usable = !prefix.is_empty() && !prefix.starts_with("_Z") && !prefix.starts_with("_R");
    let plain = prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    (usable && plain).then_some(prefix)
}

/// Whether a function of this name never returns, so that what stands behind a call of it is not reached from there.
pub fn never_returns(name: &[u8]) -> bool {
    const NAMES: [&str; 12] = [
        "abort",
        "exit",
        "_exit",
        "__assert_fail",
        "__stack_chk_fail",
        "__cxa_throw",
        "__cxa_rethrow",
        "__cxa_throw_bad_array_new_length",
        "_Unwind_Resume",
        "_ZSt9terminatev",
        "_ZSt17__throw_bad_allocv",
        "_ZSt28__throw_bad_array_new_lengthv",
    ];
    NAMES.iter().any(|known| known.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All variants of operator new and delete that the C++ standard has, and nothing that only resembles them.
    #[test]
    fn operators() {
        for kind in ["w", "a"] {
            for rest in ["", "RKSt9nothrow_t", "St11align_val_t", "St11align_val_tRKSt9nothrow_t", "12__hot_cold_t"] {
                let name = format!("_Zn{kind}m{rest}");
                assert_eq!(plain(name.as_bytes()), Some((Api::Cxx, op::MALLOC)), "{name}");
            }
        }
        for kind in ["l", "a"] {
            for rest in
                ["", "m", "RKSt9nothrow_t", "St11align_val_t", "mSt11align_val_t", "St11align_val_tRKSt9nothrow_t"]
            {
                let name = format!("_Zd{kind}Pv{rest}");
                assert_eq!(plain(name.as_bytes()), Some((Api::Cxx, op::FREE)), "{name}");
            }
        }
        // Placement, 32 bits, and somebody's own with a further argument.
        for name in ["_ZnwmPv", "_Znwj", "_ZdlPvS_", "_ZnwmR4Pool", "_Znwm.cold", "_ZN3fooC1Ev"] {
            assert_eq!(plain(name.as_bytes()), None, "{name}");
        }
    }

    /// Rust's functions under their old and new names, and not the handler beside them.
    #[test]
    fn rust_functions() {
        let shape = |name: &str| plain(name.as_bytes()).map(|(api, shape)| (api == Api::Rust).then_some(shape));
        assert_eq!(shape("__rust_alloc"), Some(Some(op::MALLOC)));
        assert_eq!(shape("_RNvCsfLfy6EI15iL_7___rustc12___rust_alloc"), Some(Some(op::MALLOC)));
        assert_eq!(shape("_RNvCsfLfy6EI15iL_7___rustc14___rust_realloc"), Some(Some(op::RUST_REALLOC)));
        assert_eq!(shape("_RNvCsfLfy6EI15iL_7___rustc19___rust_alloc_zeroed"), Some(Some(op::MALLOC)));
        assert_eq!(shape("_RNvCsfLfy6EI15iL_7___rustc26___rust_alloc_error_handler"), None);
        assert_eq!(shape("_RNvCsfLfy6EI15iL_4main4main"), None);
    }

    /// Where the size is follows from the name, with a heap before it and without.
    #[test]
    fn shapes() {
        let shape = |name: &str, prefix: &str| {
            let rest = name.strip_prefix(prefix).expect("the prefix");
            of_api(rest.as_bytes(), prefix).map(|(_, shape)| shape)
        };
        for (name, prefix, expected) in [
            ("mi_malloc", "mi_", op::MALLOC),
            ("mi_heap_malloc", "mi_", op::ALIGNED),
            ("mi_heap_zalloc_aligned_at", "mi_", op::ALIGNED),
            ("mi_heap_calloc", "mi_", op::CALLOC | op::SHIFTED),
            ("mi_heap_realloc", "mi_", op::REALLOC | op::SHIFTED),
            ("mi_heap_recalloc_aligned", "mi_", op::REALLOCARRAY | op::SHIFTED),
            ("mi_heap_reallocf", "mi_", op::REALLOCF | op::SHIFTED),
            ("mi_reallocf", "mi_", op::REALLOCF),
            ("mi_heap_destroy", "mi_", op::FREE_UNNAMED),
            ("mi_new_reallocn", "mi_", op::REALLOCARRAY),
            ("tc_newarray_nothrow", "tc_", op::MALLOC),
            ("tc_deletearray_sized", "tc_", op::FREE),
            ("tc_pvalloc", "tc_", op::MALLOC),
            ("_rjem_xallocx", "_rjem_", op::XALLOCX),
            ("je_sdallocx", "je_", op::FREE),
            ("_rjem_mallctl", "_rjem_", op::CONTROL),
            ("mallctlbymib", "", op::CONTROL_BY_MIB),
            ("dlcalloc", "dl", op::CALLOC),
        ] {
            assert_eq!(shape(name, prefix), Some(expected), "{name}");
        }
        for (name, prefix) in [
            ("mi_heap_new", "mi_"),
            ("mi_usable_size", "mi_"),
            ("tc_mallocx", "tc_"),
            ("tc_nallocx", "tc_"),
            ("je_nallocx", "je_"),
            ("je_mallctlnametomib", "je_"),
            ("je_new", "je_"),
        ] {
            assert_eq!(shape(name, prefix), None, "{name}");
        }
    }

    /// Each heap function's twin is in the tables.
    #[test]
    fn twins() {
        for name in WITH_HEAP {
            assert!(with_heap(format!("heap_{name}").as_bytes()).is_some(), "{name}");
        }
    }

    /// Prefixes are found by what only jemalloc has.
    #[test]
    fn prefixes() {
        assert_eq!(jemalloc_prefix(b"je_mallocx"), Some("je_"));
        assert_eq!(jemalloc_prefix(b"_rjem_mallocx"), Some("_rjem_"));
        for none in ["mallocx", "_ZL7mallocx", "je_nallocx", "je.mallocx", ""] {
            assert_eq!(jemalloc_prefix(none.as_bytes()), None, "{none}");
        }
    }

    proptest! {
        /// Any bytes are a function or none, never a panic.
        #[test]
        fn total(name in proptest::collection::vec(any::<u8>(), 0..64), tail in "(_RNv|_Z)?[a-z0-9_]{0,40}") {
            for name in [&name[..], tail.as_bytes()] {
                let _ = (plain(name), of_api(name, MIMALLOC), jemalloc_prefix(name));
            }
        }
    }
}
