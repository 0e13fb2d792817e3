// Names that came from traced programs: what they may look like, how they are shortened, and which frame of a stack a person wants to
// hear about first. The rules of `view::safe` and `view::names`; a test holds them together.

// What does not print as itself: control and format characters, separators but the plain space, marks that combine, what is unassigned.
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{Mn}\p{Me}\p{Default_Ignorable_Code_Point}\u1160-\u11ff\ud7b0-\ud7ff]|(?! )\p{Zs}/gu;
const SHORT = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };
const LONGEST = 2048;

// The text with all of that written out, such as \u{202e}, so that it can neither hide, reorder nor imitate what stands around it.
export function safe(text) {
  const shown = String(text)
    .slice(0, LONGEST)
    .replace(INVISIBLE, (c) => SHORT[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`);
  return shown.length < LONGEST ? shown : `${shown.slice(0, LONGEST - 1)}…`;
}

// Begins of functions that only pass an allocation on.
const WRAPPERS = [
  "operator new", "malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign", "xmalloc", "xcalloc", "xrealloc",
  "g_malloc", "strdup", "__strdup", "strndup", "mmap", "__mmap", "std::", "void std::", "__gnu_cxx::", "alloc::", "core::",
  "hashbrown::", "<alloc::", "<core::", "<std::", "<hashbrown::", "__rust_alloc", "__rust_realloc", "__rdl_", "__rg_", "je_", "_rjem_",
  "tc_", "mi_",
];
// Files whose functions are nobody's own code.
const LIBRARIES = ["libc.so", "libc-", "libstdc++.so", "libc++.so", "ld-linux", "ld-musl", "libm.so"];
// C++ operators whose symbols look like brackets, the longer ones first.
const OPERATORS = ["<=>", "<<=", ">>=", "->*", "<<", ">>", "<=", ">=", "->", "()", "<", ">"];

export function base(path) {
  return path.slice(path.lastIndexOf("/") + 1);
}

export function isLibrary(frame) {
  const module = base(frame.module ?? "");
  return LIBRARIES.some((library) => module.startsWith(library));
}

// The frame to name a stack by: the innermost of the program's own, with a name if one has.
export function culprit(stack) {
  const own = (frame) =>
    (frame.module !== null || frame.function !== null) &&
    !WRAPPERS.some((wrapper) => (frame.function ?? "").startsWith(wrapper)) &&
    !isLibrary(frame) &&
    frame.function !== "_start";
  const named = (frame) => frame.function !== null;
  const frames = stack.frames;
  return frames.find((frame) => own(frame) && named(frame)) ?? frames.find(own) ?? frames.find(named) ?? frames[0];
}

function place(frame) {
  if (frame.module === null) return null;
  const module = safe(base(frame.module));
  return frame.offset === null ? module : `${module}+0x${frame.offset.toString(16)}`;
}

// The function's name, else its place in the file.
export function functionName(frame, columns = Infinity) {
  if (!frame) return "??";
  return frame.function === null ? (place(frame) ?? "??") : elide(safe(frame.function), columns);
}

// Source line, else place in the file, unless that stands for the name already.
export function location(frame) {
  if (!frame) return null;
  if (frame.file !== null) return safe(frame.file) + (frame.line === null ? "" : `:${frame.line}`);
  if (frame.function !== null) return place(frame);
  return frame.reason === null ? null : `(${safe(frame.reason)})`;
}

// The same without the folders.
export function shortLocation(frame) {
  const whole = location(frame);
  return whole === null || frame.file === null ? whole : base(whole);
}

// A name in so many characters: template arguments and parameters go first, the innermost before the others, then the middle.
export function elide(name, columns) {
  if (name.length <= columns) return name;
  const found = brackets(name);
  let short = name;
  for (let depth = Math.max(0, ...found.map((bracket) => bracket.depth)); depth > 0; depth -= 1) {
    short = collapse(name, found, depth);
    if (short.length <= columns) return short;
  }
  const head = Math.floor((columns - 1) / 3);
  return `${short.slice(0, head)}…${short.slice(short.length - (columns - head - 1))}`;
}

// Template arguments and parameters; brackets of operators are none, nor is the pair around a path such as `<Type as Trait>::method`.
function brackets(name) {
  const found = [];
  const open = [];
  let symbolsEnd = 0;
  for (let at = 0; at < name.length; at += 1) {
    const c = name[at];
    if (symbolsEnd <= at && name.slice(0, at).endsWith("operator")) {
      symbolsEnd = at + (OPERATORS.find((symbol) => name.startsWith(symbol, at)) ?? "").length;
    }
    if (at < symbolsEnd || (c === ">" && name[at - 1] === "-")) continue;
    if (c === "(" || (c === "<" && at > 0)) {
      open.push([c, at + 1]);
    } else if (c === ")" || (c === ">" && open.length > 0)) {
      const [opened, start] = open.pop() ?? [];
      if (opened === undefined || (opened === "<") !== (c === ">")) return [];
      found.push({ start, end: at, depth: open.length + 1 });
    }
  }
  return open.length === 0 ? found : [];
}

function collapse(name, found, depth) {
  let out = "";
  let from = 0;
  for (const bracket of found) {
    if (bracket.depth !== depth || bracket.end === bracket.start) continue;
    out += `${name.slice(from, bracket.start)}…`;
    from = bracket.end;
  }
  return out + name.slice(from);
}
