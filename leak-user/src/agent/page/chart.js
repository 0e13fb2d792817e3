// Bytes over time: by how much the growing call stacks have grown, one above the other; or all that is live, theirs on that of the others.

import { h, svg } from "./dom.js";
import { culprit, functionName } from "./names.js";
import { bytes, clock } from "./units.js";

const HEIGHT = 200;
const LEFT = 78;
const BOTTOM = 22;
const TOP = 8;
// Growing stacks that have a colour of their own.
const SHOWN = 4;

// A stack's bytes at a time between its points; before its first it held nothing that is known.
function at(series, t) {
  if (series.length === 0 || t < series[0][0]) return 0;
  let low = 0;
  let high = series.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (series[middle][0] <= t) low = middle;
    else high = middle - 1;
  }
  const [from, value] = series[low];
  const next = series[low + 1];
  return next ? value + ((next[1] - value) * (t - from)) / (next[0] - from) : value;
}

// The layers from the bottom up, at common times; null where nothing has two points. With `grown`, growing stacks alone, and of them what
// came since the first of these times: of a leak that is small beside what was there before, nobody would see the rise.
function layers(process, grown) {
  const drawn = process.stacks.filter((stack) => stack.series.length > 1 && (!grown || stack.verdict === "growing"));
  if (drawn.length === 0) return null;
  const grows = drawn.filter((stack) => stack.verdict === "growing");
  const rest = drawn.filter((stack) => stack.verdict !== "growing");
  const first = Math.min(...drawn.map((stack) => stack.series[0][0]));
  const last = Math.max(...drawn.map((stack) => stack.series.at(-1)[0]));
  if (!(last > first)) return null;
  const times = Array.from({ length: 121 }, (_, i) => first + ((last - first) * i) / 120);
  const sum = (stacks) => {
    const sums = times.map((t) => stacks.reduce((total, stack) => total + at(stack.series, t), 0));
    return grown ? sums.map((value) => Math.max(0, value - sums[0])) : sums;
  };
  const parts = [];
  if (rest.length > 0) parts.push({ label: "not growing", kind: "rest", values: sum(rest) });
  const others = grows.slice(SHOWN);
  if (others.length > 0) parts.push({ label: `${others.length} more growing`, kind: "more", values: sum(others) });
  grows.slice(0, SHOWN).reverse().forEach((stack, i, shown) => {
    parts.push({ label: functionName(culprit(stack), 48), kind: `grow${shown.length - i}`, values: sum([stack]) });
  });
  return { times, parts };
}

// Round steps of bytes, at most five up to `most`.
function ticks(most) {
  let step = 1;
  while (most / step > 5) step *= 2;
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
}

export function chart(process, grown, startedAt, made, width) {
  const data = layers(process, grown);
  if (!data) return h("p", { class: "empty" }, "No course over time yet: a call stack's bytes are shown once they were seen for some seconds.");
  const { times, parts } = data;
  const totals = times.map((_, i) => parts.reduce((sum, part) => sum + part.values[i], 0));
  const most = Math.max(1, ...totals) * 1.05;
  const [first, last] = [times[0], times.at(-1)];
  const x = (t) => LEFT + ((t - first) / (last - first)) * (width - LEFT - 8);
  const y = (value) => TOP + (1 - value / most) * (HEIGHT - TOP - BOTTOM);
  const time = (t) => {
    const date = new Date(startedAt.getTime() + t * 1000);
    return last - first < 600 ? `${clock(date, made)}:${String(date.getSeconds()).padStart(2, "0")}` : clock(date, made);
  };

  const drawing = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, class: "chart", role: "img" });
  const show = (value) => (grown ? `+${bytes(Math.round(value))}` : bytes(Math.round(value)));
  const summary = parts.map((part) => `${part.label}: ${show(part.values[0])} to ${show(part.values.at(-1))}`);
  drawing.append(svg("title", {}, `${grown ? "Growth" : "Live bytes"} from ${time(first)} to ${time(last)}. ${summary.join("; ")}`));
  for (const value of ticks(most)) {
    drawing.append(svg("line", { x1: LEFT, x2: width - 8, y1: y(value), y2: y(value), class: "grid" }));
    drawing.append(svg("text", { x: LEFT - 8, y: y(value) + 4, class: "axis end" }, value === 0 ? "0" : show(value)));
  }
  [0, 0.5, 1].forEach((part) => {
    const t = first + (last - first) * part;
    const anchor = ["axis", "axis middle", "axis end"][part * 2];
    drawing.append(svg("text", { x: x(t), y: HEIGHT - 4, class: anchor }, time(t)));
  });
  let floor = times.map(() => 0);
  for (const part of parts) {
    const roof = floor.map((value, i) => value + part.values[i]);
    const up = times.map((t, i) => `${x(t).toFixed(1)},${y(roof[i]).toFixed(1)}`);
    const down = times.map((t, i) => `${x(t).toFixed(1)},${y(floor[i]).toFixed(1)}`).reverse();
    drawing.append(svg("polygon", { points: [...up, ...down].join(" "), class: `layer ${part.kind}` }));
    drawing.append(svg("polyline", { points: up.join(" "), class: `edge ${part.kind}` }));
    floor = roof;
  }

  const mark = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "mark" });
  drawing.append(mark);
  const values = parts.map(() => h("span", { class: "value" }));
  const when = h("span", { class: "when" });
  const legend = h("ul", { class: "legend" }, h("li", {}, when), parts.map((part, i) =>
    h("li", {}, h("span", { class: `swatch ${part.kind}` }), h("bdi", {}, part.label), " ", values[i])).reverse());
  const point = (i, pointed) => {
    when.textContent = time(times[i]);
    parts.forEach((part, n) => { values[n].textContent = show(part.values[i]); });
    mark.setAttribute("x1", x(times[i]));
    mark.setAttribute("x2", x(times[i]));
    mark.classList.toggle("on", pointed);
  };
  point(times.length - 1, false);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const part = (((event.clientX - box.left) / box.width) * width - LEFT) / (width - LEFT - 8);
    point(Math.round(Math.min(1, Math.max(0, part)) * (times.length - 1)), true);
  });
  drawing.addEventListener("pointerleave", () => point(times.length - 1, false));
  return h("div", {}, drawing, legend);
}

// The growth of a process in a line's height; nothing where nothing grows.
export function sparkline(process) {
  const data = layers(process, true);
  if (!data) return null;
  const totals = data.times.map((_, i) => data.parts.reduce((sum, part) => sum + part.values[i], 0));
  const most = Math.max(1, ...totals);
  const points = totals.map((value, i) => `${((i / 120) * 78 + 1).toFixed(1)},${(17 - (value / most) * 16).toFixed(1)}`);
  return svg("svg", { viewBox: "0 0 80 18", class: "spark", "aria-hidden": "true" }, svg("polyline", { points: points.join(" ") }));
}
