// The agent's page for people: asks for the report every few seconds and shows it, what leaks first.
//
// Everything that is shown comes from /api/v1/report, and all of it as text (see dom.js). The process that is looked at is in the address
// (`#1234`), so that it can be sent to somebody; the token, if the agent wants one, is kept for this tab and sent to nobody else.

import { get, token } from "./api.js";
import { chart, sparkline } from "./chart.js";
import { h, name, replace } from "./dom.js";
import { MEASURES, flame } from "./flame.js";
import { culprit, functionName, isLibrary, location as place, safe, shortLocation } from "./names.js";
import { about, bytes, clock, count, duration, estimatedBytes, estimatedPlural, plural, rate } from "./units.js";
import * as words from "./words.js";

const ASK_EVERY = 5000;
// A report that stays the same for so long is told to be old.
const OLD = 60_000;
const CARDS = 5;
const ROWS = 200;
// Who ran out of memory is told at the top for this time.
const DEAD_FOR = 6 * 3600 * 1000;
const LINES = 40;

const $ = (id) => document.getElementById(id);

const state = {
  report: null,
  // When the report that is shown came, on the clock of this page.
  came: 0,
  // When the agent did not answer for the first time since it last did.
  silent: null,
  trouble: null,
  measure: "growth",
  zoomed: {},
  filter: "",
};

const made = () => new Date(Date.parse(state.report.started_at) + state.report.duration_s * 1000);

// All that can be looked at, worst first: the traced processes, then those that are only watched.
function everyone() {
  const watched = (state.report.system?.processes ?? []).map((process) => ({ ...process, verdict: "watched", stacks: [] }));
  const others = state.report.processes.filter((process) => process.verdict !== "leaking");
  return [...leaking(), ...others, ...watched];
}

// Those that leak, the one that meets its limit first before the others; then the fastest.
function leaking() {
  const left = (process) => words.timeLeft(process) ?? Number.MAX_VALUE;
  return state.report.processes.filter((process) => process.verdict === "leaking").sort((a, b) => left(a) - left(b));
}

// Those that the kernel killed because memory ran out, the latest first.
const killed = () => [...(state.report.oom_kills ?? [])].reverse();

// The process that the address names, or what is last known of it; else the worst.
function selected() {
  const wanted = /^#(\d+)$/.exec(window.location.hash)?.[1];
  if (wanted !== undefined) {
    const is = (process) => String(process.pid) === wanted;
    const kill = killed().find(is);
    const last = kill && { ...(kill.process ?? { ...kill, verdict: "watched", stacks: [] }), kill };
    return everyone().find(is) ?? last ?? { missing: wanted };
  }
  return everyone()[0] ?? null;
}

// --- What leaks ---

function headline() {
  const found = leaking();
  const dead = killed().filter((kill) => made() - Date.parse(kill.at) < DEAD_FOR).slice(0, CARDS).map(obituary);
  if (found.length === 0) {
    const [title, text] = words.calm(state.report);
    return [h("h2", { class: "calm" }, title), h("p", {}, text), dead];
  }
  const more = found.length - CARDS;
  return [
    h("h2", { class: "bad" }, `${plural(found.length, "process", "processes")} ${found.length === 1 ? "leaks" : "leak"}`),
    h("div", { class: "cards" }, found.slice(0, CARDS).map(card)),
    more > 0 && h("p", {}, `and ${count(more)} more, in the list of processes.`),
    dead,
  ];
}

// A process that ran out of memory not long ago.
function obituary(kill) {
  const belongs = words.belongsTo(kill);
  const size = kill.rss.last_bytes;
  return h("p", { class: "dead" }, h("strong", {}, clock(new Date(kill.at), made())), " the kernel killed ",
    h("a", { href: `#${kill.pid}`, "data-key": `dead${kill.pid}` }, name(safe(kill.comm)), ` ${kill.pid}`),
    belongs && [" of ", name(belongs)], " because memory ran out",
    size !== null && `, at ${bytes(size)} RSS`, kill.process?.verdict === "leaking" && [": ", name(words.sentence(overdue(kill.process), state.report))]);
}

// Of whom no time is left.
const overdue = (process) => ({ ...process, seconds_to_limit: null });

function card(process) {
  const worst = words.growing(process)[0];
  const frame = worst && culprit(worst);
  const total = process.growing_bytes_per_s ?? worst?.growth.bytes_per_s ?? null;
  const deadline = words.deadline(process, made());
  const belongs = words.belongsTo(process);
  return h("article", { class: "card" },
    h("h3", {}, h("a", { href: `#${process.pid}`, "data-key": `card${process.pid}` }, name(safe(process.comm))), ` pid ${process.pid}`,
      belongs && [" · ", name(belongs)]),
    h("p", { class: "where" }, total !== null && h("strong", {}, `+${rate(total)}`), frame && (process.growing_stacks > 1 ? ", most in " : " in "),
      frame && name(functionName(frame, 80), { class: "code" })),
    frame && place(frame) !== null && h("p", { class: "line code" }, name(place(frame))),
    h("p", { class: "deadline" }, deadline === null ? noDeadline(process) : ["Out of memory ", h("strong", {}, deadline)]));
}

function noDeadline(process) {
  if (process.memory_limit_bytes === null) return "No memory limit is known.";
  if (process.seconds_to_limit === null) return `The limit of ${bytes(process.memory_limit_bytes)} is not in sight: RSS does not rise.`;
  return `Far from its limit of ${bytes(process.memory_limit_bytes)}.`;
}

// --- One process ---

function details(process) {
  if (process === null) return [];
  if (process.missing) return missing(process.missing);
  const traced = process.verdict !== "watched";
  return [
    h("h2", { tabindex: "-1", id: "process-name" }, name(safe(process.comm)), h("small", {}, ` pid ${process.pid}`)),
    h("p", { class: "verdict" }, badge(process.verdict), " ",
      traced ? name(words.sentence(process.kill ? overdue(process) : process, state.report)) : !process.kill && watchedSentence(process)),
    process.kill && h("p", { class: "dead" }, `The kernel killed it at ${clock(new Date(process.kill.at), made())} because memory ran out. This is what was last known of it.`),
    facts(process),
    traced && words.remarks(process).map((text) => h("p", { class: "remark" }, text)),
    newPages(process.pid),
    traced && [
      pictures(process),
      callStacks(process),
    ],
  ];
}

function missing(pid) {
  const unlisted = (state.report.system?.watched ?? 0) - everyone().length;
  return [
    h("h2", { tabindex: "-1", id: "process-name" }, `No process ${pid} here`),
    h("p", {}, unlisted > 0
      ? `It has ended, or is one of ${count(unlisted)} that are watched and neither grow fast nor are large.`
      : "It has ended, or is not watched."),
    h("p", {}, h("a", { href: "#" }, "Show the worst process")),
  ];
}

function watchedSentence(process) {
  const slope = process.rss.growth_bytes_per_s;
  return slope !== null && slope >= 1
    ? "from afar; its allocator is traced once its memory keeps rising"
    : "from afar: it does not grow, so its allocator is not traced";
}

const badge = (verdict) => h("span", { class: `badge ${verdict in words.VERDICTS ? verdict : ""}` }, words.VERDICTS[verdict] ?? safe(verdict));

function facts(process) {
  const list = h("dl", { class: "facts" });
  const fact = (term, ...value) => list.append(h("div", {}, h("dt", {}, term), h("dd", {}, ...value)));
  const { last_bytes: rss } = process.rss;
  const limit = process.memory_limit_bytes ?? null;
  if (rss !== null) {
    const of = limit === null ? null : ` of ${bytes(limit)}`;
    const value = [bytes(rss), of];
    const slope = words.slope(process.rss);
    if (slope) value.push(" ", h("span", { class: "dim whole" }, slope));
    if (limit !== null && limit > 0) value.push(meter(rss / limit));
    fact("RSS", ...value);
  }
  if (process.live_bytes !== undefined) {
    const blocks = estimatedPlural(process.live_count, process.live_count_ci95, "block");
    fact("Traced and live", estimatedBytes(process.live_bytes, process.live_bytes_ci95), h("span", { class: "dim" }, ` in ${blocks}`));
    const deadline = process.kill ? null : words.deadline(process, made());
    if (deadline !== null) fact("Out of memory", deadline);
    if (process.memory_limit_of) {
      const own = process.memory_limit_of === process.cgroup;
      fact("Limit of", own ? "its control group" : name(safe(process.memory_limit_of), { class: "code" }));
    }
    if (typeof process.memory_used_bytes === "number") fact("Taken of the limit", bytes(process.memory_used_bytes));
    if (typeof process.baseline?.steady_bytes === "number") fact("Steady before at", bytes(process.baseline.steady_bytes));
    const families = [...new Set(process.allocators.map((allocator) => safe(allocator.family)))];
    fact("Allocator", name(families.join(", ") || "none found"), process.interval_bytes !== null && ` · one in ${bytes(process.interval_bytes)} sampled`);
  }
  if (process.exe) fact("Program", name(safe(process.exe), { class: "code" }));
  for (const [term, value] of words.labels(process)) fact(term, name(value, { class: "code" }));
  const ids = words.ids(process).map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, name(value, { class: "code" }))));
  return [list, ids.length > 0 && h("details", { class: "ids", "data-key": "ids" },
    h("summary", { "data-key": "ids-summary" }, "Ids and control group"), h("dl", {}, ids))];
}

function meter(part) {
  const bar = h("span", {});
  bar.style.width = `${Math.min(100, Math.max(1, part * 100))}%`;
  return h("span", { class: `meter${part > 0.8 ? " high" : ""}`, role: "img", "aria-label": `${(part * 100).toFixed(0)} % of the limit` }, bar);
}

// Bytes over time and by call stack: those that grow, or all that are live.
function pictures(process) {
  const grows = process.stacks.some((stack) => MEASURES.growth.of(stack) > 0);
  const key = grows ? state.measure : "live";
  const choice = Object.entries(MEASURES).map(([id, measure]) =>
    h("button", {
      type: "button",
      "data-key": `measure-${id}`,
      "aria-pressed": String(id === key),
      disabled: id === "growth" && !grows,
      onclick: () => {
        state.measure = id;
        state.zoomed = {};
        render();
      },
    }, measure.label));
  return [
    h("p", { class: "choice", role: "group", "aria-label": "What the pictures show" }, choice),
    h("h3", {}, key === "growth" ? "Growth over time" : "Live bytes over time"),
    chart(process, key === "growth", new Date(state.report.started_at), made(), Math.max(280, $("process").clientWidth - 42)),
    h("h3", {}, `Flame graph of the ${MEASURES[key].label}`),
    flame(process.stacks, MEASURES[key], state.zoomed, render),
  ];
}

function callStacks(process) {
  const grows = words.growing(process);
  const listed = process.stacks.map((stack) => callStack(stack, stack === grows[0]));
  const hidden = process.stacks_seen - process.stacks.length;
  return [
    h("h3", {}, "Call stacks, the worst first"),
    listed.length > 0 ? listed : h("p", { class: "empty" }, "Nothing that was allocated since tracing began is still held."),
    hidden > 0 && h("p", { class: "dim" }, `and ${plural(hidden, "call stack")} that hold less.`),
    h("p", { class: "choice" },
      // Of one that was killed the agent has no profile any more.
      !process.kill && h("button", { type: "button", "data-key": "profile", onclick: () => profile(process) }, "Download a pprof profile"),
      navigator.clipboard && h("button", { type: "button", "data-key": "copy", onclick: (event) => copy(process, event.target) }, "Copy a summary")),
  ];
}

function callStack(stack, open) {
  const frame = culprit(stack);
  const rows = stack.frames.map((one) =>
    h("li", { class: isLibrary(one) ? "library" : one === frame ? "own" : null },
      name(functionName(one), { class: "code" }), one.inlined && " (inlined)",
      place(one) !== null && h("span", { class: "dim code" }, " ", name(place(one)))));
  const cut = words.stackEnd(stack.end);
  return h("details", { class: `stack ${stack.verdict === "growing" ? "growing" : ""}`, open, "data-key": `stack${stack.id}${stack.verdict}` },
    h("summary", { "data-key": `summary${stack.id}` }, h("strong", {}, words.pace(stack)), " ", name(functionName(frame, 80), { class: "code" }),
      shortLocation(frame) !== null && [" ", name(shortLocation(frame), { class: "dim code" })]),
    h("p", { class: "dim" }, [words.held(stack), ...words.stackFacts(stack)].join(" · ")),
    h("ol", {}, rows),
    cut !== null && h("p", { class: "dim" }, cut));
}

const chain = (stack) => stack.frames.slice(0, 8).map((frame) => functionName(frame, 48)).join(" < ") || "??";

// Where a process touches new pages, which tells of memory that no traced allocator knows of.
function newPages(pid) {
  const found = state.report.system?.growing.find((one) => one.pid === pid);
  if (!found) return null;
  return [
    h("h3", {}, `Touches new pages in, +${rate(found.bytes_per_s)}`),
    h("ul", { class: "plain" }, found.stacks.map((stack) =>
      h("li", {}, `${(stack.share * 100).toFixed(0)} % `,
        name(chain(stack), { class: "code" })))),
  ];
}

async function profile(process) {
  const answer = await get(`/debug/pprof/heap?pid=${process.pid}`).catch(() => null);
  if (!answer?.ok) {
    state.trouble = `The profile could not be had: ${answer ? `status ${answer.status}` : "the agent does not answer"}.`;
    status();
    return;
  }
  const url = URL.createObjectURL(await answer.blob());
  h("a", { href: url, download: `heap-${process.pid}.pb.gz` }).click();
  URL.revokeObjectURL(url);
}

async function copy(process, button) {
  const lines = [
    `${safe(process.comm)} (pid ${process.pid}) on ${safe(state.report.host.hostname ?? "an unknown host")}, ${made().toISOString()}`,
    ...[words.belongsTo(process)].filter(Boolean),
    `${words.VERDICTS[process.verdict] ?? safe(process.verdict)}: ${words.sentence(process, state.report)}`,
  ];
  for (const stack of words.growing(process)) {
    lines.push("", `${words.pace(stack)}  ${words.held(stack)}`);
    for (const frame of stack.frames) lines.push(`  ${functionName(frame)}  ${place(frame) ?? ""}`.trimEnd());
  }
  const done = await navigator.clipboard.writeText(lines.join("\n")).then(() => true, () => false);
  button.textContent = done ? "Copied" : "The browser does not allow it";
}

// --- The list of processes ---

function list() {
  const all = everyone();
  const filter = state.filter.toLowerCase();
  const found = all.filter((process) =>
    [process.comm, process.exe ?? "", words.belongsTo(process), String(process.pid)].some((text) => text.toLowerCase().includes(filter)));
  const shown = selected();
  const rows = found.slice(0, ROWS).map((process) => row(process, process.pid === shown?.pid));
  const system = state.report.system;
  const unlisted = system ? system.watched - all.length : 0;
  return [
    h("h2", {}, "Processes"),
    system && h("p", { class: "dim" }, `${count(system.watched)} watched, ${count(system.traced)} traced` +
      (system.most_traced === null ? "" : `, at most ${count(system.most_traced)} at a time`)),
    (all.length > 8 || state.filter) && h("input", {
      type: "search", "data-key": "filter", placeholder: "name, pid, pod, container, unit", "aria-label": "Filter processes", value: state.filter,
      oninput: (event) => {
        state.filter = event.target.value;
        rerenderList();
      },
    }),
    rows.length > 0 ? h("ul", { class: "rows scrolls", "data-key": "rows" }, rows)
      : h("p", { class: "empty" }, all.length > 0 ? "None of that name." : system ? `None of the ${count(system.watched)} watched processes grows, or is large, yet.` : "None."),
    found.length > ROWS && h("p", { class: "dim" }, `and ${count(found.length - ROWS)} more: filter to see them.`),
    unlisted > 0 && all.length > 0 && h("p", { class: "dim" }, `and ${count(unlisted)} that neither grow fast nor are large.`),
  ];
}

function row(process, current) {
  const belongs = words.belongsTo(process);
  const grows = process.growing_bytes_per_s ?? null;
  const left = process.seconds_to_limit === undefined ? null : words.timeLeft(process);
  const size = process.rss.last_bytes === null ? "" : bytes(process.rss.last_bytes);
  const numbers = [size, grows === null ? words.slope(process.rss) : `+${rate(grows)}`, left !== null && `${about(left)} left`];
  return h("li", {},
    h("a", { href: `#${process.pid}`, "data-key": `row${process.pid}`, "aria-current": current ? "true" : null, class: "row-link" },
      h("span", { class: "who" }, name(safe(process.comm)), h("span", { class: "dim" }, ` ${process.pid}`)),
      badge(process.verdict),
      h("span", { class: "dim numbers" }, numbers.filter(Boolean).map((one, n) => [n > 0 && " · ", h("span", { class: "whole" }, one)])),
      sparkline(process),
      belongs && name(belongs, { class: "dim belongs" })));
}

// --- The rest ---

function more() {
  const { report } = state;
  const { losses, system, ended_processes: ended, memory, host, tool, mode } = report;
  const lost = Object.entries(losses).sort((a, b) => b[1] - a[1]);
  const decisions = [...(system?.decisions ?? [])].reverse().slice(0, LINES);
  const growing = (system?.growing ?? []).filter((one) => one.pid !== selected()?.pid);
  const part = (key, title, open, ...children) =>
    h("details", { "data-key": key, open }, h("summary", { "data-key": `${key}-summary` }, title), ...children);
  const at = (seconds) => clock(new Date(Date.parse(report.started_at) + seconds * 1000), made());
  const what = { promoted: "traced", released: "released" };
  const dead = killed().slice(0, LINES);
  const restarts = [...(system?.restarts ?? [])].reverse().slice(0, LINES);
  return [
    growing.length > 0 && part("growing", `Growing, and no leak known: ${count(growing.length)}`, true, h("ul", { class: "plain" }, growing.map((one) =>
      h("li", {}, h("a", { href: `#${one.pid}`, "data-key": `growing${one.pid}` }, name(safe(one.comm)), ` ${one.pid}`), ` +${rate(one.bytes_per_s)}`,
        one.stacks[0] && [", new pages in ", name(chain(one.stacks[0]), { class: "code" })])))),
    dead.length > 0 && part("dead", "Killed because memory ran out", false, dead.map(obituary)),
    restarts.length > 0 && part("restarts", "Restarts", false, h("ul", { class: "plain" }, restarts.map((one) =>
      h("li", {}, h("time", {}, clock(new Date(one.at), made())), " ", h("a", { href: `#${one.pid}` }, name(safe(one.comm)), ` ${one.pid}`),
        `: memory is ${one.back_to_baseline ? "" : "not "}back to baseline: ${bytes(one.now_bytes)}, ${bytes(one.before_bytes)} before the restart`)))),
    part("losses", lost.length > 0 ? `Losses: ${plural(lost.length, "kind")}` : "Losses: none", lost.length > 0,
      h("p", {}, lost.length > 0 ? "Numbers may be off by this; never a verdict." : "Every event that was seen is in the numbers."),
      lost.length > 0 && h("table", {}, h("tbody", {}, lost.map(([key, n]) => h("tr", {}, h("th", { scope: "row", class: "code" }, safe(key)), h("td", {}, count(n))))))),
    system && part("decisions", "Decisions", false, decisions.length > 0
      ? h("ul", { class: "plain" }, decisions.map((one) => h("li", {}, h("time", {}, at(one.at_s)), ` ${what[one.what] ?? safe(one.what)} `,
        h("a", { href: `#${one.pid}` }, name(safe(one.comm)), ` ${one.pid}`), ": ", name(words.reason(one.reason)))))
      : h("p", { class: "empty" }, "None yet: a process is traced once its memory has kept rising for 20 seconds.")),
    ended.length > 0 && part("ended", "Ended", false, h("ul", { class: "plain" }, ended.slice(0, LINES).map((one) =>
      h("li", {}, `${count(one.count)} of `, name(one.exe ? safe(one.exe) : "other programs", { class: "code" }), `: at most ${bytes(one.largest_rss_bytes)} RSS`,
        one.live_bytes_at_end > 0 && `, ${bytes(one.live_bytes_at_end)} not freed at the end`, one.leaking > 0 && `, ${count(one.leaking)} leaking`)))),
    part("agent", "The agent and its host", false, h("dl", { class: "facts" }, [
      ["version", safe(tool.version)],
      ["host", [host.hostname, host.kernel, host.arch].filter(Boolean).map(safe).join(", ")],
      ["memory of the host", host.memory_bytes === null ? null : bytes(host.memory_bytes)],
      ["running for", duration(report.duration_s)],
      ["events a second", report.events_per_s === null ? null : count(Math.round(report.events_per_s))],
      ["sampling", mode.sampling === "exact" ? "every allocation" : mode.interval_bytes === null ? "by bytes" : `one in ${bytes(mode.interval_bytes)}`],
      ["own memory", memory.user_bytes === null ? null : `${bytes(memory.user_bytes)} of at most ${bytes(memory.user_cap_bytes)}`],
      ["kernel memory", memory.kernel_bytes === null ? null : `${bytes(memory.kernel_bytes)} of at most ${bytes(memory.kernel_cap_bytes)}`],
    ].filter(([, value]) => value).map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, name(value))))),
    token() && h("button", { type: "button", "data-key": "forget", onclick: () => {
      token(null);
      window.location.reload();
    } }, "Forget the token")),
  ];
}

// --- Putting it there ---

function render() {
  if (state.report === null) return;
  const { report } = state;
  const leaks = leaking().length;
  const host = safe(report.host.hostname ?? "");
  document.title = [leaks > 0 ? `(${leaks}) leaking` : "no leak", host, "leaktrace"].filter(Boolean).join(" · ");
  $("host").replaceChildren(name(host));
  $("token").hidden = true;
  $("main").hidden = false;
  replace($("headline"), ...headline());
  replace($("process"), ...details(selected()));
  rerenderList();
  replace($("more"), ...more());
  status();
}

function rerenderList() {
  const field = $("list").querySelector("input");
  const caret = field?.selectionStart ?? null;
  replace($("list"), ...list());
  if (caret !== null && document.activeElement?.dataset.key === "filter") document.activeElement.setSelectionRange(caret, caret);
}

// The age of the report, and what is wrong.
function status() {
  if (state.report !== null) {
    const age = Date.now() - state.came;
    const old = age > OLD && !state.report.final;
    $("age").textContent = `report of ${clock(made())}, ${age < 2000 ? "just now" : `${duration(Math.round(age / 1000))} ago`}`;
    $("age").classList.toggle("old", old);
    if (state.silent === null && old) state.trouble ??= "The agent answers, but its report does not change any more: look at its log.";
  }
  const trouble = state.silent === null ? state.trouble : `No answer from the agent since ${clock(new Date(state.silent))}` +
    `${state.report === null ? "" : "; what is shown is of before"}. Asking again every ${ASK_EVERY / 1000} seconds.`;
  $("trouble").hidden = !trouble;
  // Said anew only when it changes, for those who listen.
  if ($("trouble").textContent !== (trouble ?? "")) $("trouble").textContent = trouble ?? "";
}

function askForToken(wrong) {
  if ($("token").hidden) {
    $("token").hidden = false;
    $("token-text").focus();
  }
  $("main").hidden = true;
  if (wrong) $("token-why").textContent = "The agent does not take this token. It is in the file that token_file of its configuration names.";
}

async function ask() {
  let answer;
  try {
    answer = await get("/api/v1/report");
    if (answer.status === 401 || answer.status === 403) {
      const wrong = token() !== null;
      token(null);
      state.silent = null;
      state.trouble = null;
      status();
      askForToken(wrong);
      return;
    }
    if (!answer.ok) {
      state.silent = null;
      state.trouble = answer.status === 503 ? "The agent has no report yet: it is starting." : `The agent answers with status ${answer.status}.`;
      status();
      return;
    }
    const report = await answer.json();
    const same = state.report?.started_at === report.started_at && state.report?.duration_s === report.duration_s;
    state.silent = null;
    if (same) {
      status();
      return;
    }
    state.trouble = null;
    state.came = Date.now();
    state.report = report;
  } catch {
    state.silent ??= Date.now();
    status();
    return;
  }
  // Somebody is copying from the page: it stays as it is until they are done.
  if (document.getSelection().isCollapsed) render();
  else status();
}

// Asks, unless it is already being asked, nobody looks, or the token is missing.
let asking = false;
async function look() {
  if (asking || document.hidden || !$("token").hidden) return;
  asking = true;
  await ask();
  asking = false;
}

window.addEventListener("hashchange", () => {
  state.zoomed = {};
  render();
  $("process-name")?.focus();
});
document.addEventListener("visibilitychange", look);
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  token($("token-text").value.trim());
  $("token-text").value = "";
  $("token").hidden = true;
  look();
});
// The chart's letters stay of one size, so it is drawn for the width that there is.
let resized = 0;
window.addEventListener("resize", () => {
  cancelAnimationFrame(resized);
  resized = requestAnimationFrame(render);
});
setInterval(status, 1000);
setInterval(look, ASK_EVERY);
look();
