//! The sentences of the text views: a process's verdict in words, first of all what a person on call wants to know.

use super::names::{culprit, function};
use super::units::{Rate, about, bytes, duration, estimated_bytes, estimated_plural, plural, rate};
use crate::report::{
    Ended, Overhead, Process, ProcessEnd, Reason, Report, Resource, Stack, StackEnd, StackVerdict, Verdict,
};

/// Counters that tell of what the target did, not of anything lost.
const NO_LOSS: &[&str] = &["calls_nested", "allocations_failed"];

/// Columns that a function's name may take inside a sentence.
const NAME_COLUMNS: usize = 60;

/// Further away than this a limit is not worth a word.
const FAR: f64 = 60.0 * 86_400.0;

/// The verdict's word and its sentence.
pub fn verdict(process: &Process, report: &Report) -> (&'static str, String) {
    match process.verdict {
        Verdict::Leaking => ("LEAKING", leaking(process)),
        Verdict::Warming => {
            ("WARMING UP", format!("{} seen so far, too little for a verdict", duration(report.duration_s)))
        }
        Verdict::Plateau => ("PLATEAU", "memory grew and then stopped growing: not a leak".to_owned()),
        Verdict::Spike => ("SPIKE", "memory rose and came back down: not a leak".to_owned()),
        Verdict::Stable if process.stacks_seen == 0 => {
            ("STABLE", "nothing that was allocated is still held".to_owned())
        }
        Verdict::Stable if is_high(process) => (
            "STABLE",
            format!(
                "high but steady ({} live): not a leak",
                estimated_bytes(process.live_bytes, process.live_bytes_ci95)
            ),
        ),
        Verdict::Stable => ("STABLE", "no call stack grows".to_owned()),
    }
}

fn leaking(process: &Process) -> String {
    let worst = process.stacks.iter().find(|stack| stack.verdict == StackVerdict::Growing);
    let listed = || process.stacks.iter().filter(|stack| stack.verdict == StackVerdict::Growing).count() as u64;
    let count = process.growing_stacks.max(listed());
    let total = process.growing_bytes_per_s.or_else(|| worst.and_then(|stack| stack.growth.bytes_per_s));
    let place = worst.and_then(culprit).map(|frame| function(frame, NAME_COLUMNS));
    let one = count <= 1;
    let grows = if one { "grows" } else { "grow" };
    let by = total.map_or_else(String::new, |total| {
        let interval = worst.filter(|_| one).and_then(|stack| stack.growth.ci95);
        format!(" by {}", Rate::of(total).show(total, interval))
    });
    let place = place.map_or_else(String::new, |place| {
        if one { format!(" in {place}") } else { format!(" in all, fastest in {place}") }
    });
    let mut parts = vec![format!("{} {grows}{by}{place}", plural(count.max(1), "call stack"))];
    if let Some(ratio) = process.explained_growth_ratio {
        let verb = if one { "it explains" } else { "they explain" };
        parts.push(match ratio {
            r if r >= 0.995 => format!("{verb} all of the RSS growth"),
            r if r < 0.5 => format!("{verb} only {:.0} % of the RSS growth", r * 100.0),
            r => format!("{verb} {:.0} % of the RSS growth", r * 100.0),
        });
    }
    if let Some(seconds) = process.seconds_to_limit.filter(|seconds| (0.0..FAR).contains(seconds)) {
        parts.push(format!("out of memory in about {}", about(seconds)));
    }
    parts.join("; ")
}

/// Whether much memory is held: enough that somebody may have taken it for a leak.
fn is_high(process: &Process) -> bool {
    let rss = process.rss.last_bytes.unwrap_or(u64::MAX);
    process.live_bytes >= 16 << 20 || process.live_bytes >= rss / 4
}

/// What else there is to say of a process, a sentence each.
pub fn remarks(process: &Process) -> Vec<String> {
    let mut remarks = Vec::new();
    if let (Some(first), Some(last)) = (process.rss.first_bytes, process.rss.last_bytes)
        && !matches!(process.verdict, Verdict::Leaking | Verdict::Warming)
        && process.rss.growth_bytes_per_s.is_some_and(|rate| rate > 0.0)
        && last.saturating_sub(first) >= (first / 50).max(1 << 20)
    {
        remarks.push(format!(
            "RSS still grew by {}, and no traced call stack explains it. It may be older memory touched for the first \
             time, fragmentation, file mappings, thread stacks, or an allocator that is not traced.",
            bytes(last - first)
        ));
    }
    if process.affected_by_loss {
        remarks.push(
            "Something was lost (see above): what may have been freed unseen is left out, and it is less sure what grows.".to_owned(),
        );
    }
    if let Some(overhead) = process.overhead.as_ref().filter(|overhead| overhead.state != "exact") {
        remarks.push(self::overhead(overhead));
    }
    if let Some(reason) = &process.reason {
        remarks.push(format!("Traced because {}.", self::reason(reason)));
    }
    if let Some(remark) = process.baseline.as_ref().and_then(|baseline| baseline.remark.as_ref()) {
        let mut remark = super::safe(remark);
        if let Some(first) = remark.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        remarks.push(remark + ".");
    }
    if let Some(hint) = &process.hint {
        remarks.push(super::safe(hint));
    }
    if let Some(end) = &process.ended {
        remarks.push(format!("The process ended after {}{}.", duration(end.at_s), status(end)));
    }
    remarks
}

/// Why a process is traced, or is not any more.
pub fn reason(reason: &Reason) -> String {
    match reason {
        Reason::Rising { bytes: rise, seconds } => {
            format!("memory rose by {} in {}, and is still rising", bytes(*rise), duration(*seconds))
        }
        Reason::Steady { seconds } => format!("it has been steady for {}", duration(*seconds)),
        Reason::Settled { seconds } => {
            format!("that it leaks has been known for {}, and others wait", duration(*seconds))
        }
        Reason::All => "all are traced".to_owned(),
        Reason::OverBudget { why } => super::safe(why),
        Reason::Untraceable { error } => format!("it cannot be traced: {}", super::safe(error)),
    }
}

/// How a process is watched for the sake of its time, and why.
fn overhead(overhead: &Overhead) -> String {
    let how = match overhead.state.as_str() {
        "windows" => format!("Watched for {:.1} % of the time, and estimated", overhead.duty * 100.0),
        "released" => "Not watched any more".to_owned(),
        _ => "Sampled".to_owned(),
    };
    let of = if overhead.of == "processor" { "a processor" } else { "its time" };
    let taken = overhead.measured_percent;
    format!("{how}: {}. Tracing takes {taken:.2} % of {of} now.", super::safe(&overhead.reason))
}

fn status(end: &ProcessEnd) -> String {
    how_ended(end.exit_code, end.signal).map_or_else(String::new, |how| format!(", {how}"))
}

/// How a process ended, if that is known.
pub fn how_ended(exit_code: Option<i32>, signal: Option<i32>) -> Option<String> {
    match (exit_code, signal) {
        (_, Some(signal)) => Some(format!("by signal {signal}")),
        (Some(code), None) => Some(format!("exit status {code}")),
        (None, None) => None,
    }
}

/// Resident set, live memory, limit and allocators in a few words each.
pub fn facts(process: &Process) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(last) = process.rss.last_bytes {
        let slope = match process.rss.growth_bytes_per_s {
            Some(slope) if slope.abs() < f64::EPSILON => ", flat".to_owned(),
            Some(slope) => format!(", {}{}", if slope > 0.0 { "+" } else { "" }, rate(slope)),
            None => String::new(),
        };
        facts.push(format!("RSS {}{slope}", bytes(last)));
    }
    facts.push(format!(
        "traced and live {} in {}",
        estimated_bytes(process.live_bytes, process.live_bytes_ci95),
        estimated_plural(process.live_count, process.live_count_ci95, "block")
    ));
    if let Some(interval) = process.interval_bytes {
        facts.push(format!("sampled, one in {}", bytes(interval)));
    }
    if let Some(limit) = process.memory_limit_bytes {
        facts.push(format!("limit {}", bytes(limit)));
    }
    let place = super::system::belongs_to(&process.labels);
    if !place.is_empty() {
        facts.push(place);
    }
    let mut families: Vec<String> = process.allocators.iter().map(|allocator| super::safe(&allocator.family)).collect();
    families.dedup();
    if !families.is_empty() {
        facts.push(families.join(", "));
    }
    facts
}

/// A growing stack's rate, certainty and kind.
pub fn growth(stack: &Stack) -> (String, Vec<String>) {
    let rate = match stack.growth.bytes_per_s {
        Some(rate) => format!("+{}", Rate::of(rate).show(rate, stack.growth.ci95)),
        None => "grows".to_owned(),
    };
    let mut rest = Vec::new();
    if let Some(confidence) = stack.growth.confidence {
        rest.push(match confidence {
            c if c > 0.999 => "over 99.9 % sure".to_owned(),
            c => format!("{:.1} % sure", c * 100.0),
        });
    }
    if stack.affected_by_loss {
        rest.push("touched by loss".to_owned());
    }
    let kind = match stack.resource {
        Resource::Heap => "heap",
        Resource::Mmap => "mapping",
    };
    rest.push(match &stack.op {
        Some(op) => format!("{kind} ({})", super::safe(op)),
        None => kind.to_owned(),
    });
    (rate, rest)
}

/// What a stack holds and for how long.
pub fn held(stack: &Stack) -> String {
    let what = match stack.resource {
        Resource::Heap => "block",
        Resource::Mmap => "mapping",
    };
    let age = stack.oldest_age_s.map(|age| format!(", oldest {}", duration(age))).unwrap_or_default();
    format!(
        "{} in {}{age}",
        estimated_bytes(stack.live_bytes, stack.live_bytes_ci95),
        estimated_plural(stack.live_count, stack.live_count_ci95, what)
    )
}

/// Why a stack that does not grow is none to worry about.
pub fn calm(verdict: StackVerdict) -> &'static str {
    match verdict {
        StackVerdict::Growing => "grows",
        StackVerdict::Warming => "not enough seen yet",
        StackVerdict::Plateau => "grew, then stopped",
        StackVerdict::Spike => "rose and came back",
        StackVerdict::Stable => "high but steady",
    }
}

/// Why a stack is not complete.
pub fn stack_end(end: StackEnd) -> Option<&'static str> {
    match end {
        StackEnd::Complete => None,
        StackEnd::TooDeep => Some("more frames than are recorded"),
        StackEnd::BadRead => Some("outer frames unknown: the stack could not be read"),
        StackEnd::NoFramePointer => Some("outer frames unknown: this code was built without frame pointers"),
        StackEnd::NoTable => Some("outer frames unknown: no unwind table for this code"),
        StackEnd::NoRow => Some("outer frames unknown: the unwind table has no row for this place"),
        StackEnd::Interrupted => {
            Some("outer frames unknown: a signal interrupted code whose full table was not loaded")
        }
        StackEnd::Unknown => Some("outer frames unknown"),
        StackEnd::Lost => Some("the record of this call stack was lost"),
    }
}

/// The counters that mean a loss, largest first.
pub fn losses(report: &Report) -> Option<String> {
    let mut losses: Vec<_> = report.losses.iter().filter(|(name, _)| !NO_LOSS.contains(&name.as_str())).collect();
    losses.sort_by_key(|&(name, n)| (std::cmp::Reverse(*n), name));
    let list: Vec<String> =
        losses.into_iter().map(|(name, &n)| format!("{} {}", super::safe(name), super::units::count(n))).collect();
    (!list.is_empty()).then(|| format!("{} (numbers may be off by this; never a verdict)", list.join(", ")))
}

/// Why tracing ended.
pub fn ended(ended: Ended) -> &'static str {
    match ended {
        Ended::Duration => "time is over",
        Ended::TargetsExited => "all traced processes have ended",
        Ended::Interrupted => "interrupted",
        Ended::OutputClosed => "output closed",
    }
}
