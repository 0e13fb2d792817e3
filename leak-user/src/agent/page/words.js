// What a person on call wants to know, in sentences; those of the text view (`view::words`) where it has them.

import { culprit, functionName, safe } from "./names.js";
import { about, bytes, clock, count, duration, estimatedBytes, estimatedPlural, plural, rate } from "./units.js";

// Further away than this a limit is not worth a word.
const FAR = 60 * 86400;
const NAME_COLUMNS = 60;

export const VERDICTS = {
  leaking: "LEAKING",
  warming: "WARMING UP",
  plateau: "PLATEAU",
  spike: "SPIKE",
  stable: "STABLE",
  watched: "watched",
};

export const growing = (process) => process.stacks.filter((stack) => stack.verdict === "growing");

export function sentence(process, report) {
  switch (process.verdict) {
    case "leaking":
      return leaking(process);
    case "warming":
      return `${duration(report.duration_s)} seen so far, too little for a verdict`;
    case "plateau":
      return "memory grew and then stopped growing: not a leak";
    case "spike":
      return "memory rose and came back down: not a leak";
    case "stable":
      if (process.stacks_seen === 0) return "nothing that was allocated is still held";
      if (isHigh(process)) {
        return `high but steady (${estimatedBytes(process.live_bytes, process.live_bytes_ci95)} live): not a leak`;
      }
      return "no call stack grows";
    default:
      return safe(process.verdict);
  }
}

function leaking(process) {
  const worst = growing(process)[0];
  const stacks = Math.max(process.growing_stacks, growing(process).length, 1);
  const total = process.growing_bytes_per_s ?? worst?.growth.bytes_per_s ?? null;
  const one = stacks === 1;
  let text = `${plural(stacks, "call stack")} ${one ? "grows" : "grow"}`;
  if (total !== null) text += ` by ${rate(total, one ? worst?.growth.ci95 : null)}`;
  if (worst && worst.frames.length > 0) {
    const place = functionName(culprit(worst), NAME_COLUMNS);
    text += one ? ` in ${place}` : ` in all, fastest in ${place}`;
  }
  const ratio = process.explained_growth_ratio;
  if (ratio !== null) {
    const part = ratio >= 0.995 ? "all" : `${ratio < 0.5 ? "only " : ""}${(ratio * 100).toFixed(0)} %`;
    text += `; ${one ? "it explains" : "they explain"} ${part} of the RSS growth`;
  }
  const left = timeLeft(process);
  return left === null ? text : `${text}; out of memory in about ${about(left)}`;
}

// Seconds until the limit is met, if that is near enough to be worth a word.
export function timeLeft(process) {
  const seconds = process.seconds_to_limit;
  return seconds !== null && seconds >= 0 && seconds < FAR ? seconds : null;
}

// Such as "in about 5 h 20 min, at 08:30", counted from when the report was made.
export function deadline(process, made) {
  const left = timeLeft(process);
  return left === null ? null : `in about ${about(left)}, ${clock(new Date(made.getTime() + left * 1000), made)}`;
}

function isHigh(process) {
  return process.live_bytes >= 16 * 1024 * 1024 || process.live_bytes >= (process.rss.last_bytes ?? Infinity) / 4;
}

// What else there is to say of a process, a sentence each.
export function remarks(process) {
  const said = [];
  const { first_bytes: first, last_bytes: last, growth_bytes_per_s: slope } = process.rss;
  const judged = !["leaking", "warming"].includes(process.verdict);
  if (judged && first !== null && last !== null && slope > 0 && last - first >= Math.max(first / 50, 1024 * 1024)) {
    said.push(
      `RSS still grew by ${bytes(last - first)}, and no traced call stack explains it. It may be older memory touched for the first ` +
        "time, fragmentation, file mappings, thread stacks, or an allocator that is not traced.",
    );
  }
  if (process.affected_by_loss) {
    said.push("Something was lost (see below): what may have been freed unseen is left out, and it is less sure what grows.");
  }
  if (process.overhead && process.overhead.state !== "exact") said.push(overhead(process.overhead));
  if (process.reason) said.push(`Traced because ${reason(process.reason)}.`);
  const before = process.baseline?.remark;
  if (before) said.push(`${safe(before[0].toUpperCase() + before.slice(1))}.`);
  if (process.hint) said.push(safe(process.hint));
  if (process.ended) said.push(ended(process.ended));
  return said;
}

export function reason(why) {
  switch (why.kind) {
    case "rising":
      return `memory rose by ${bytes(why.bytes)} in ${duration(why.seconds)}, and is still rising`;
    case "steady":
      return `it has been steady for ${duration(why.seconds)}`;
    case "settled":
      return `that it leaks has been known for ${duration(why.seconds)}, and others wait`;
    case "all":
      return "all are traced";
    case "untraceable":
      return `it cannot be traced: ${safe(why.error)}`;
    default:
      return safe(why.kind);
  }
}

function overhead({ state, duty, of, measured_percent: taken, reason: why }) {
  const how =
    { windows: `Watched for ${(duty * 100).toFixed(1)} % of the time, and estimated`, released: "Not watched any more" }[state] ??
    "Sampled";
  const whole = of === "processor" ? "a processor" : "its time";
  return `${how}: ${safe(why)}. Tracing takes ${taken.toFixed(2)} % of ${whole} now.`;
}

function ended({ at_s: at, exit_code: code, signal }) {
  let how = "";
  if (signal !== null) how = `, by signal ${signal}`;
  else if (code !== null) how = `, exit status ${code}`;
  return `The process ended after ${duration(at)}${how}.`;
}

// A growing stack's rate, how sure that is, and its kind; or why one that does not grow is none to worry about.
export function stackFacts(stack) {
  const kind = stack.resource === "mmap" ? "mapping" : "heap";
  const facts = [stack.op === null ? kind : `${kind} (${safe(stack.op)})`];
  if (stack.affected_by_loss) facts.unshift("touched by loss");
  const sure = stack.growth.confidence;
  if (stack.verdict === "growing" && sure !== null) {
    facts.unshift(sure > 0.999 ? "over 99.9 % sure" : `${(sure * 100).toFixed(1)} % sure`);
  }
  return facts;
}

export function pace(stack) {
  if (stack.verdict !== "growing") return CALM[stack.verdict] ?? safe(stack.verdict);
  const { bytes_per_s: speed, ci95 } = stack.growth;
  return speed === null ? "grows" : `+${rate(speed, ci95)}`;
}

const CALM = {
  warming: "not enough seen yet",
  plateau: "grew, then stopped",
  spike: "rose and came back",
  stable: "high but steady",
};

export function held(stack) {
  const age = stack.oldest_age_s === null ? "" : `, oldest ${duration(stack.oldest_age_s)}`;
  const blocks = estimatedPlural(stack.live_count, stack.live_count_ci95, stack.resource === "mmap" ? "mapping" : "block");
  return `${estimatedBytes(stack.live_bytes, stack.live_bytes_ci95)} in ${blocks}${age}`;
}

const ENDS = {
  too_deep: "more frames than are recorded",
  bad_read: "outer frames unknown: the stack could not be read",
  no_frame_pointer: "outer frames unknown: this code was built without frame pointers",
  no_table: "outer frames unknown: no unwind table for this code",
  no_row: "outer frames unknown: the unwind table has no row for this place",
  interrupted: "outer frames unknown: a signal interrupted code whose full table was not loaded",
  lost: "the record of this call stack was lost",
};

// Why a stack is not complete; null if it is.
export function stackEnd(end) {
  return end === "complete" ? null : (ENDS[end] ?? "outer frames unknown");
}

export function slope(rss) {
  const value = rss.growth_bytes_per_s;
  if (value === null) return "";
  return Math.abs(value) < 1 ? "flat" : `${value > 0 ? "+" : ""}${rate(value)}`;
}

const CONTAINER_ID = 12;

// Where a process belongs, the most telling: the container by its pod, else by its id, else the unit.
export function belongsTo(of) {
  if (of.pod) return [of.namespace, of.pod, of.container_name].filter(Boolean).map(safe).join("/");
  if (of.container) return [of.container_runtime, of.container.slice(0, CONTAINER_ID)].filter(Boolean).map(safe).join(" ");
  return of.unit ? safe(of.unit) : "";
}

const NAMES = { namespace: "namespace", pod: "pod", container_name: "container", image: "image", node: "node", unit: "unit" };
const IDS = {
  container: "container id",
  container_runtime: "runtime",
  pod_uid: "pod uid",
  unit: "unit",
  pid_in_namespace: "pid there",
  cgroup: "control group",
};

const known = (of, names) => Object.entries(names)
  .filter(([key]) => of[key] !== null && of[key] !== undefined && of[key] !== "")
  .map(([key, name]) => [name, safe(of[key])]);

// By which a person knows where it belongs, as pairs of name and value. A container's unit is named after its id.
export function labels(of) {
  return known(of.container ? { ...of, unit: null } : of, NAMES);
}

// What else is known of that, which is long and for machines.
export function ids(of) {
  return known(of.container ? of : { ...of, unit: null }, IDS);
}

// The processes that are worth a look, counted: the headline where nothing leaks.
export function calm(report) {
  const system = report.system;
  const rises = system ? system.growing.length : 0;
  const warming = report.processes.filter((process) => process.verdict === "warming").length;
  const traced = plural(system ? system.traced : report.processes.length, "process", "processes");
  if (!system) {
    if (report.processes.length === 0) return ["Nothing is traced", "No process was found that could be traced."];
    if (warming === report.processes.length) return ["Too early to tell", `Tracing ${traced}; a verdict takes half a minute.`];
    return ["Nothing leaks", `Tracing ${traced}, none grows.`];
  }
  const watching = `Watching ${plural(system.watched, "process", "processes")}`;
  if (system.traced > 0 && warming > 0) {
    return ["Nothing known to leak", `${watching}; ${plural(warming, "process", "processes")} that grew ${warming === 1 ? "is" : "are"} traced, too short yet for a verdict.`];
  }
  if (rises > 0) {
    const grow = rises === 1 ? "grows" : "grow";
    return ["Nothing known to leak", `${watching}; ${count(rises)} ${grow}, and no leak in ${rises === 1 ? "it" : "them"} is known (see below).`];
  }
  if (system.traced > 0) return ["Nothing leaks", `${watching}; ${traced} traced, none grows.`];
  return ["Nothing leaks", `${watching}, none grows.`];
}
