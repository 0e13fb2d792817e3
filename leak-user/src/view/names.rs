//! Names of functions and places in few columns, and which frame of a stack a person wants to hear about first.

use super::safe::{cut_middle, cut_start, safe, width};
use crate::report::{Frame, Stack};

/// Begins of functions that only pass an allocation on: naming them says nothing about who leaks.
const WRAPPERS: &[&str] = &[
    "operator new",
    "malloc",
    "calloc",
    "realloc",
    "posix_memalign",
    "aligned_alloc",
    "memalign",
    "xmalloc",
    "xcalloc",
    "xrealloc",
    "g_malloc",
    "strdup",
    "__strdup",
    "strndup",
    "mmap",
    "__mmap",
    "std::",
    "void std::",
    "__gnu_cxx::",
    "alloc::",
    "core::",
    "hashbrown::",
    "<alloc::",
    "<core::",
    "<std::",
    "<hashbrown::",
    "__rust_alloc",
    "__rust_realloc",
    "__rdl_",
    "__rg_",
    "je_",
    "_rjem_",
    "tc_",
    "mi_",
];

/// Files whose functions are nobody's own code.
const LIBRARIES: &[&str] = &["libc.so", "libc-", "libstdc++.so", "libc++.so", "ld-linux", "ld-musl", "libm.so"];

/// C++ operators whose symbols look like brackets, the longer ones first.
const OPERATORS: &[&str] = &["<=>", "<<=", ">>=", "->*", "<<", ">>", "<=", ">=", "->", "()", "<", ">"];

/// The frame to name a stack by: the innermost that is neither an allocator's wrapper nor of the standard library, with a
/// name if one has; else the innermost with a name, else the innermost.
pub fn culprit(stack: &Stack) -> Option<&Frame> {
    let own = |frame: &&Frame| {
        let module = frame.module.as_deref().map_or("", base);
        let name = frame.function.as_deref().unwrap_or_default();
        let known = frame.module.is_some() || frame.function.is_some();
        known
            && !WRAPPERS.iter().any(|wrapper| name.starts_with(wrapper))
            && !LIBRARIES.iter().any(|library| module.starts_with(library))
            && name != "_start"
    };
    let named = |frame: &&Frame| frame.function.is_some();
    let frames = &stack.frames;
    let find = |wanted: &dyn Fn(&&Frame) -> bool| frames.iter().find(wanted);
    find(&|frame| own(frame) && named(frame)).or_else(|| find(&own)).or_else(|| find(&named)).or(frames.first())
}

/// The function's name, else the place in its file; safe for a terminal and in at most `columns`.
pub fn function(frame: &Frame, columns: usize) -> String {
    match &frame.function {
        Some(name) => elide(&safe(name), columns),
        None => cut_start(&place(frame).unwrap_or_else(|| "??".to_owned()), columns),
    }
}

/// Source line, else place in the file (unless that already stands for the name), in at most `columns`.
pub fn location(frame: &Frame, columns: usize) -> Option<String> {
    let text = match (&frame.file, frame.line) {
        (Some(file), Some(line)) => format!("{}:{line}", safe(file)),
        (Some(file), None) => safe(file),
        (None, _) if frame.function.is_some() => place(frame)?,
        (None, _) => format!("({})", safe(frame.reason.as_deref()?)),
    };
    Some(cut_start(&text, columns))
}

/// Such as `libc.so.6+0x27249`.
fn place(frame: &Frame) -> Option<String> {
    let module = safe(base(frame.module.as_deref()?));
    Some(frame.offset.map_or(module.clone(), |offset| format!("{module}+{offset:#x}")))
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A function's name in at most `columns`: template arguments and parameters go first, the innermost before the others,
/// then the middle.
pub fn elide(name: &str, columns: usize) -> String {
    if width(name) <= columns {
        return name.to_owned();
    }
    let brackets = brackets(name);
    let deepest = brackets.iter().map(|bracket| bracket.depth).max().unwrap_or(0);
    let mut short = name.to_owned();
    for depth in (1..=deepest).rev() {
        short = collapse(name, &brackets, depth);
        if width(&short) <= columns {
            return short;
        }
    }
    cut_middle(&short, columns)
}

/// A pair of brackets: the bytes between them, and in how many pairs these stand, this one included.
struct Bracket {
    start: usize,
    end: usize,
    depth: usize,
}

/// The template arguments and parameters in a name, in order of their ends. Angle brackets of operators (`operator<<`,
/// `->`) are none, nor is the pair around a qualified path (`<Type as Trait>::method`): what it holds is what the name
/// says. A name whose brackets do not match has none.
fn brackets(name: &str) -> Vec<Bracket> {
    let mut found = Vec::new();
    let mut open: Vec<(char, usize)> = Vec::new();
    // Where an operator's own symbols end.
    let mut symbols_end = 0;
    for (at, c) in name.char_indices() {
        if name[..at].ends_with("operator") && symbols_end <= at {
            let symbol = OPERATORS.iter().find(|symbol| name[at..].starts_with(**symbol));
            symbols_end = at + symbol.map_or(0, |symbol| symbol.len());
        }
        if at < symbols_end || c == '>' && name[..at].ends_with('-') {
            continue;
        }
        match c {
            '<' if at == 0 => {}
            '<' | '(' => open.push((c, at + 1)),
            '>' if open.is_empty() => {}
            '>' | ')' => match open.pop() {
                Some((opened, start)) if (opened == '<') == (c == '>') => {
                    found.push(Bracket { start, end: at, depth: open.len() + 1 });
                }
                _ => return Vec::new(),
            },
            _ => {}
        }
    }
    if open.is_empty() { found } else { Vec::new() }
}

/// `name` with what stands in brackets of this depth replaced by an ellipsis.
fn collapse(name: &str, brackets: &[Bracket], depth: usize) -> String {
    let mut out = String::new();
    let mut from = 0;
    for bracket in brackets.iter().filter(|bracket| bracket.depth == depth && bracket.end > bracket.start) {
        out.push_str(&name[from..bracket.start]);
        out.push('…');
        from = bracket.end;
    }
    out + &name[from..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    /// Long names lose their inner brackets first, then all, then the middle; short ones nothing.
    #[test]
    fn elision_keeps_what_matters() {
        let map = "std::map<std::string, std::vector<Order, std::allocator<Order> > >::insert(Pair const&)";
        for (name, columns, shown) in [
            (map, 100, map),
            (map, 84, "std::map<std::string, std::vector<Order, std::allocator<…> > >::insert(Pair const&)"),
            (map, 70, "std::map<std::string, std::vector<…> >::insert(Pair const&)"),
            (map, 40, "std::map<…>::insert(…)"),
            (map, 16, "std::…:insert(…)"),
            (
                "<alloc::vec::Vec<app::order::Order> as core::clone::Clone>::clone",
                60,
                "<alloc::vec::Vec<…> as core::clone::Clone>::clone",
            ),
            ("Stream& operator<<<Order>(Stream&, Order const&)", 30, "Stream& operator<<<…>(…)"),
            ("Handler::operator()(Request const&, Response&) const", 40, "Handler::operator()(…) const"),
            ("Smart::operator->(int, int, int, int)", 25, "Smart::operator->(…)"),
            ("broken<(name>)of_somebody_else", 12, "bro…ody_else"),
        ] {
            assert_eq!(elide(name, columns), shown, "{name} in {columns}");
            assert!(width(shown) <= columns, "{name} in {columns}");
        }
    }

    /// A stack is named by the program's own function, not by operator new or a container's.
    #[test]
    fn culprit_is_ours() {
        let report = sample::leaking();
        let stacks = &report.processes[0].stacks;
        assert_eq!(culprit(&stacks[0]).unwrap().function.as_deref(), Some("Session::remember(Order)"));
        assert_eq!(function(culprit(&stacks[1]).unwrap(), 80), "libaudit.so+0x1c40");
    }

    /// Each kind of frame has a name and a place, and what is unknown says why.
    #[test]
    fn names_and_places() {
        let mut frame = sample::frame("main", "/srv/orders/src/main.cc", 20);
        assert_eq!(location(&frame, 100).unwrap(), "/srv/orders/src/main.cc:20");
        assert_eq!(location(&frame, 14).unwrap(), "…rc/main.cc:20");
        frame.file = None;
        assert_eq!(location(&frame, 100).unwrap(), "orders+0x12a40");
        let bare = sample::bare("/lib/x.so", 16);
        assert_eq!(function(&bare, 100), "x.so+0x10");
        assert_eq!(location(&bare, 100).unwrap(), "(the file has no symbols)");
        let nothing = Frame::default();
        assert_eq!((function(&nothing, 100).as_str(), location(&nothing, 100)), ("??", None));
    }

    /// Names from the target cannot act on the terminal.
    #[test]
    fn names_are_safe() {
        let frame =
            Frame { function: Some("a\x1b[2J".to_owned()), file: Some("b\n\u{202e}".to_owned()), ..Frame::default() };
        assert_eq!(function(&frame, 100), "a\\u{1b}[2J");
        assert_eq!(location(&frame, 100).unwrap(), "b\\n\\u{202e}");
    }
}
