//! The live memory of traced processes as a profile in pprof's format, compressed by gzip as its readers expect.
//!
//! Each call stack of the report is a sample with the four values of a heap profile: `alloc_objects`, `alloc_space`,
//! `inuse_objects`, `inuse_space`. What has no place in those is in labels (`process`, `pid`, `stack_id`, `verdict`, `resource`,
//! `growth` in bytes a second, `stack_end` where a stack is not whole), by which `-tagfocus` selects and `-tagroot` groups. What the report
//! does not list is said in the comments. Of sampled allocations the values are the report's estimates, which readers must not scale again;
//! for pprof's own format none does.
//!
//! A report knows the places of code as offsets in files. The addresses here are made from them: each file has a range of its
//! own, of [`SPACE`] bytes, in which it begins at its offset 0. So the same code has the same address in all processes of a profile,
//! and address less mapping start is the offset.
//!
//! prost was chosen for the encoding: the `pprof` crate is a profiler with a format beside it, and `pprof_util` has no labels on samples.

pub mod proto;

use std::collections::HashMap;
use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message as _;

use crate::report::{Frame, Process, Report, Resource, Sampling, Stack, StackEnd, StackVerdict};
use proto::{Function, Label, Line, Location, Mapping, Profile, Sample, ValueType};

/// The range of addresses of one file: no offset in a file with code reaches that far.
const SPACE: u64 = 1 << 40;
/// The files after these have no room below 2^63, where some readers' addresses end; their code stands without a mapping.
const MAPPINGS: usize = 1 << 22;

/// Writes the profile of all processes of a report.
pub fn write(out: &mut (impl Write + ?Sized), report: &Report) -> io::Result<()> {
    out.write_all(&compressed(&profile(report, &report.processes))?)
}

/// The profile as a file or an answer holds it.
pub fn compressed(profile: &Profile) -> io::Result<Vec<u8>> {
    let mut out = GzEncoder::new(Vec::new(), Compression::default());
    out.write_all(&profile.encode_to_vec())?;
    out.finish()
}

/// The profile of these processes of a report.
pub fn profile<'a>(report: &Report, processes: impl IntoIterator<Item = &'a Process>) -> Profile {
    let mut builder = Builder::new();
    let types =
        [("alloc_objects", "count"), ("alloc_space", "bytes"), ("inuse_objects", "count"), ("inuse_space", "bytes")]
            .map(|(of, unit)| ValueType { r#type: builder.text(of), unit: builder.text(unit) });
    let period_type = ValueType { r#type: builder.text("space"), unit: builder.text("bytes") };
    let mut comments = vec![format!("{} {}", report.tool.name, report.tool.version)];
    for (n, process) in processes.into_iter().enumerate() {
        if n == 0 {
            builder.main_program(process);
        }
        for stack in &process.stacks {
            builder.sample(process, stack);
        }
        comments.extend(not_listed(process));
    }
    for (loss, count) in &report.losses {
        comments.push(format!("lost: {loss} {count}"));
    }
    let comment = comments.iter().map(|text| builder.text(text)).collect();
    Profile {
        sample_type: types.to_vec(),
        sample: builder.samples,
        mapping: builder.mappings,
        location: builder.locations,
        function: builder.functions,
        drop_frames: 0,
        keep_frames: 0,
        time_nanos: i64::try_from(report.started_at.as_nanosecond()).unwrap_or(i64::MAX),
        duration_nanos: (report.duration_s * 1e9) as i64,
        period_type: Some(period_type),
        // As Go's heap profiles have it: the mean bytes between samples, where every allocation counts 1.
        period: match report.mode.sampling {
            Sampling::Exact => 1,
            Sampling::Bytes => report.mode.interval_bytes.map_or(1, signed),
        },
        comment,
        default_sample_type: builder.strings["inuse_space"],
        string_table: builder.string_table,
    }
}

impl Profile {
    /// Makes the values of this name those that readers show first; whether it has them.
    pub fn show(&mut self, sample_type: &str) -> bool {
        let named = |index: i64| usize::try_from(index).ok().and_then(|index| self.string_table.get(index));
        let found = self.sample_type.iter().find(|value| named(value.r#type).is_some_and(|name| name == sample_type));
        let Some(index) = found.map(|value| value.r#type) else { return false };
        self.default_sample_type = index;
        true
    }
}

/// Leaves of a profile what is in use, without labels: for readers that add up what they get over time, and make series of labels.
pub fn keep_in_use(profile: &mut Profile) {
    profile.sample_type.drain(..2);
    for sample in &mut profile.sample {
        sample.value.drain(..2);
        sample.label.clear();
    }
}

/// What of a process's memory the profile does not have.
fn not_listed(process: &Process) -> Option<String> {
    let listed: u64 = process.stacks.iter().map(|stack| stack.live_bytes).fold(0, u64::saturating_add);
    let rest = process.live_bytes.saturating_sub(listed);
    (rest > 0).then(|| {
        format!("pid {} ({}): {rest} live bytes in call stacks that are not listed", process.pid, process.comm)
    })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Collects what samples refer to, each thing once.
struct Builder {
    string_table: Vec<String>,
    strings: HashMap<String, i64>,
    samples: Vec<Sample>,
    mappings: Vec<Mapping>,
    /// By path and build id.
    mapping_ids: HashMap<(i64, i64), u64>,
    locations: Vec<Location>,
    /// By mapping, address and lines.
    location_ids: HashMap<(u64, u64, Vec<Line>), u64>,
    functions: Vec<Function>,
    /// By name and source file.
    function_ids: HashMap<(i64, i64), u64>,
}

impl Builder {
    fn new() -> Self {
        Self {
            string_table: vec![String::new()],
            strings: HashMap::from([(String::new(), 0)]),
            samples: Vec::new(),
            mappings: Vec::new(),
            mapping_ids: HashMap::new(),
            locations: Vec::new(),
            location_ids: HashMap::new(),
            functions: Vec::new(),
            function_ids: HashMap::new(),
        }
    }

    /// The index of a text.
    fn text(&mut self, text: &str) -> i64 {
        if let Some(index) = self.strings.get(text) {
            return *index;
        }
        let index = self.string_table.len() as i64;
        self.string_table.push(text.to_owned());
        self.strings.insert(text.to_owned(), index);
        index
    }

    fn label(&mut self, key: &str, value: &str) -> Label {
        Label { key: self.text(key), str: self.text(value), ..Label::default() }
    }

    fn sample(&mut self, process: &Process, stack: &Stack) {
        let mut label = vec![
            self.label("process", &process.comm),
            Label { key: self.text("pid"), num: i64::from(process.pid), ..Label::default() },
            self.label("stack_id", &stack.id),
            self.label("verdict", verdict(stack.verdict)),
            self.label("resource", resource(stack.resource)),
        ];
        if let (StackVerdict::Growing, Some(rate)) = (stack.verdict, stack.growth.bytes_per_s) {
            let (key, num_unit) = (self.text("growth"), self.text("bytes_per_second"));
            label.push(Label { key, num: rate as i64, num_unit, ..Label::default() });
        }
        if !stack.complete {
            label.push(self.label("stack_end", end(stack.end)));
        }
        if let Some(container) = &process.labels.container {
            label.push(self.label("container", container));
        }
        let value = [stack.allocated_count.unwrap_or(0), stack.allocated_bytes, stack.live_count, stack.live_bytes];
        let location_id = self.stack(&stack.frames);
        self.samples.push(Sample { location_id, value: value.map(signed).to_vec(), label });
    }

    /// The locations of a stack: a function and what was inlined into it are one.
    fn stack(&mut self, frames: &[Frame]) -> Vec<u64> {
        if frames.is_empty() {
            // Readers leave out a sample without a location, and then the sums are not those of the report.
            return vec![self.note("[call stack lost]")];
        }
        // Inlined frames come before the frame that they are in.
        frames.split_inclusive(|frame| !frame.inlined).map(|frames| self.location(frames)).collect()
    }

    fn location(&mut self, frames: &[Frame]) -> u64 {
        let outer = &frames[frames.len() - 1];
        let (mapping_id, address) = self.place(outer);
        let lines: Vec<Line> = frames
            .iter()
            .filter_map(|frame| {
                let name = frame.function.as_deref()?;
                let function_id = self.function(name, frame.file.as_deref().unwrap_or_default());
                Some(Line { function_id, line: frame.line.map_or(0, i64::from) })
            })
            .collect();
        if mapping_id == 0 && lines.is_empty() {
            let reason = outer.reason.as_deref().unwrap_or("unknown code");
            return self.note(&format!("[{reason}]"));
        }
        if mapping_id > 0 {
            let mapping = &mut self.mappings[mapping_id as usize - 1];
            // One place without a name, and the reader may find it.
            mapping.has_functions &= lines.len() == frames.len();
            mapping.has_filenames &= frames.iter().all(|frame| frame.file.is_some());
            mapping.has_line_numbers &= frames.iter().all(|frame| frame.line.is_some());
        }
        self.add_location(mapping_id, address, lines)
    }

    /// A place that is not code.
    fn note(&mut self, text: &str) -> u64 {
        let function_id = self.function(text, "");
        self.add_location(0, 0, vec![Line { function_id, line: 0 }])
    }

    fn add_location(&mut self, mapping_id: u64, address: u64, line: Vec<Line>) -> u64 {
        let key = (mapping_id, address, line.clone());
        let next = self.locations.len() as u64 + 1;
        let id = *self.location_ids.entry(key).or_insert(next);
        if id == next {
            self.locations.push(Location { id, mapping_id, address, line });
        }
        id
    }

    /// The file that a frame's code is in, and its address in the ranges of this profile; zeros where that is not known.
    fn place(&mut self, frame: &Frame) -> (u64, u64) {
        let (Some(module), Some(offset)) = (&frame.module, frame.offset) else { return (0, 0) };
        let key = (self.text(module), self.text(frame.build_id.as_deref().unwrap_or_default()));
        let next = self.mappings.len() as u64 + 1;
        if offset >= SPACE || next > MAPPINGS as u64 && !self.mapping_ids.contains_key(&key) {
            return (0, 0);
        }
        let id = *self.mapping_ids.entry(key).or_insert(next);
        let start = id * SPACE;
        if id == next {
            self.mappings.push(Mapping {
                id,
                memory_start: start,
                memory_limit: start + SPACE,
                file_offset: 0,
                filename: key.0,
                build_id: key.1,
                has_functions: true,
                has_filenames: true,
                has_line_numbers: true,
                has_inline_frames: true,
            });
        }
        (id, start + offset)
    }

    /// Gives the program its mapping before anything else: readers call the profile by the first one. Where its path is not known,
    /// as of a command that was too quick, its name tells, of which the kernel keeps 15 bytes.
    fn main_program(&mut self, process: &Process) {
        let is_program = |module: &str| match &process.exe {
            Some(exe) => module == exe,
            None => module.rsplit('/').next().is_some_and(|name| name.starts_with(&process.comm)),
        };
        let mut frames = process.stacks.iter().flat_map(|stack| &stack.frames);
        if let Some(frame) = frames.find(|frame| frame.module.as_deref().is_some_and(is_program)) {
            self.place(frame);
        }
    }

    fn function(&mut self, name: &str, file: &str) -> u64 {
        let key = (self.text(name), self.text(file));
        let next = self.functions.len() as u64 + 1;
        let id = *self.function_ids.entry(key).or_insert(next);
        if id == next {
            self.functions.push(Function { id, name: key.0, system_name: key.0, filename: key.1 });
        }
        id
    }
}

fn verdict(verdict: StackVerdict) -> &'static str {
    match verdict {
        StackVerdict::Growing => "growing",
        StackVerdict::Warming => "warming",
        StackVerdict::Plateau => "plateau",
        StackVerdict::Spike => "spike",
        StackVerdict::Stable => "stable",
    }
}

fn resource(resource: Resource) -> &'static str {
    match resource {
        Resource::Heap => "heap",
        Resource::Mmap => "mmap",
    }
}

fn end(end: StackEnd) -> &'static str {
    match end {
        StackEnd::Complete => "complete",
        StackEnd::TooDeep => "too_deep",
        StackEnd::BadRead => "bad_read",
        StackEnd::NoFramePointer => "no_frame_pointer",
        StackEnd::NoTable => "no_table",
        StackEnd::NoRow => "no_row",
        StackEnd::Interrupted => "interrupted",
        StackEnd::Unknown => "unknown",
        StackEnd::Lost => "lost",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;
    use crate::report::sample;

    fn read_back(report: &Report) -> Profile {
        let mut bytes = Vec::new();
        write(&mut bytes, report).unwrap();
        let mut plain = Vec::new();
        GzDecoder::new(&bytes[..]).read_to_end(&mut plain).unwrap();
        Profile::decode(&plain[..]).unwrap()
    }

    fn text(profile: &Profile, index: i64) -> &str {
        &profile.string_table[usize::try_from(index).unwrap()]
    }

    /// Every number that refers to something refers to something that is there, ids are not zero and not shared, and each
    /// address is in its mapping.
    fn assert_sound(profile: &Profile) {
        assert_eq!(profile.string_table[0], "");
        let unique: HashSet<&String> = profile.string_table.iter().collect();
        assert_eq!(unique.len(), profile.string_table.len());
        let ids = |ids: Vec<u64>| {
            let set: HashSet<u64> = ids.iter().copied().collect();
            assert!(set.len() == ids.len() && !set.contains(&0));
            set
        };
        let mappings = ids(profile.mapping.iter().map(|mapping| mapping.id).collect());
        let functions = ids(profile.function.iter().map(|function| function.id).collect());
        let locations = ids(profile.location.iter().map(|location| location.id).collect());
        for function in &profile.function {
            assert!(!text(profile, function.name).is_empty());
            let _ = (text(profile, function.system_name), text(profile, function.filename));
        }
        for location in &profile.location {
            assert!(location.mapping_id == 0 || mappings.contains(&location.mapping_id));
            assert!(location.line.iter().all(|line| functions.contains(&line.function_id)));
            assert!(location.mapping_id > 0 || !location.line.is_empty());
            if let Some(mapping) = profile.mapping.iter().find(|mapping| mapping.id == location.mapping_id) {
                assert!((mapping.memory_start..mapping.memory_limit).contains(&location.address));
            }
        }
        for sample in &profile.sample {
            assert!(!sample.location_id.is_empty());
            assert!(sample.location_id.iter().all(|id| locations.contains(id)));
            assert_eq!(sample.value.len(), profile.sample_type.len());
            for label in &sample.label {
                assert!(!text(profile, label.key).is_empty() && (label.str == 0 || label.num == 0));
            }
        }
    }

    /// A sample holds what the report says of its stack: values, functions with file and line, place in the file.
    #[test]
    fn a_sample_for_each_stack() {
        let report = sample::leaking();
        let profile = read_back(&report);
        assert_sound(&profile);
        let types: Vec<&str> = profile.sample_type.iter().map(|of| text(&profile, of.r#type)).collect();
        assert_eq!(types, ["alloc_objects", "alloc_space", "inuse_objects", "inuse_space"]);
        assert_eq!(text(&profile, profile.default_sample_type), "inuse_space");
        let stacks = &report.processes[0].stacks;
        assert_eq!(profile.sample.len(), stacks.len());
        for (sample, stack) in profile.sample.iter().zip(stacks) {
            let wanted =
                [stack.allocated_count.unwrap(), stack.allocated_bytes, stack.live_count, stack.live_bytes].map(signed);
            assert_eq!(sample.value, wanted);
            let at = |id: &u64| &profile.location[*id as usize - 1];
            let lines: Vec<(&str, &str, i64)> = sample
                .location_id
                .iter()
                .flat_map(|id| &at(id).line)
                .map(|line| (&profile.function[line.function_id as usize - 1], line.line))
                .map(|(function, line)| (text(&profile, function.name), text(&profile, function.filename), line))
                .collect();
            let named = stack.frames.iter().filter_map(|frame| {
                let file = frame.file.as_deref().unwrap_or_default();
                Some((frame.function.as_deref()?, file, frame.line.map_or(0, i64::from)))
            });
            assert_eq!(lines, named.collect::<Vec<_>>());
            let places = sample.location_id.iter().map(|id| {
                let mapping = profile.mapping[at(id).mapping_id as usize - 1];
                (
                    text(&profile, mapping.filename),
                    text(&profile, mapping.build_id),
                    at(id).address - mapping.memory_start,
                )
            });
            let outer = stack.frames.iter().filter(|frame| !frame.inlined).map(|frame| {
                (frame.module.as_deref().unwrap(), frame.build_id.as_deref().unwrap_or_default(), frame.offset.unwrap())
            });
            assert!(places.eq(outer));
        }
        // The sample report has an inlined function, so one location with two lines.
        assert!(profile.location.iter().any(|location| location.line.len() == 2));
    }

    /// What there is no name, no file or no stack for is in the profile all the same, so that its sums are the report's.
    #[test]
    fn what_is_not_known_counts() {
        let mut report = sample::leaking();
        let stacks = &mut report.processes[0].stacks;
        stacks[0].frames.clear();
        stacks[0].end = StackEnd::Lost;
        stacks[0].complete = false;
        stacks[1].frames = vec![
            Frame { reason: Some("no file".to_owned()), ..Frame::default() },
            Frame { module: Some("/x".to_owned()), offset: Some(u64::MAX), ..Frame::default() },
            Frame { module: Some("/x".to_owned()), offset: Some(7), inlined: true, ..Frame::default() },
        ];
        let profile = read_back(&report);
        assert_sound(&profile);
        let sum: i64 = profile.sample.iter().map(|sample| sample.value[3]).sum();
        assert_eq!(sum, report.processes[0].stacks.iter().map(|stack| signed(stack.live_bytes)).sum::<i64>());
        for note in ["[call stack lost]", "[no file]", "[unknown code]"] {
            assert!(profile.function.iter().any(|function| text(&profile, function.name) == note), "{note}");
        }
    }

    /// Memory of stacks that are not listed, and losses, are said in the comments.
    #[test]
    fn comments_say_what_is_missing() {
        let mut report = sample::leaking();
        let listed: u64 = report.processes[0].stacks.iter().map(|stack| stack.live_bytes).sum();
        report.processes[0].live_bytes = listed + 77;
        let profile = read_back(&report);
        let comments: Vec<&str> = profile.comment.iter().map(|index| text(&profile, *index)).collect();
        assert!(
            comments.contains(&"pid 1234 (orders): 77 live bytes in call stacks that are not listed"),
            "{comments:?}"
        );
        assert!(comments.contains(&"lost: allocations_ring_full 1204"), "{comments:?}");
    }

    /// The program is the first mapping, whether its path is known or only its name, and though a library's frame comes first.
    #[test]
    fn the_program_comes_first() {
        let mut report = sample::leaking();
        assert_ne!(report.processes[0].stacks[0].frames[0].module, report.processes[0].exe);
        for exe in [report.processes[0].exe.clone(), None] {
            report.processes[0].exe = exe;
            let profile = read_back(&report);
            assert_eq!(text(&profile, profile.mapping[0].filename), "/srv/orders/bin/orders");
        }
    }

    /// A report without processes is a profile without samples, which readers take.
    #[test]
    fn nothing_traced() {
        let mut report = sample::leaking();
        report.processes.clear();
        let profile = read_back(&report);
        assert_sound(&profile);
        assert!(profile.sample.is_empty());
    }
}
