// A flame graph, callers above what they call. Boxes are buttons that the browser lays out by shares of the width, so that names are cut, and
// the whole follows the window, without a line of measuring; that is why no library draws it.

import { h } from "./dom.js";
import { base, culprit, functionName, isLibrary, safe } from "./names.js";
import { bytes, rate } from "./units.js";

// Boxes narrower than this part of the width are left out.
const LEAST = 0.002;
const DEEPEST = 200;

// What the graph can measure: a number for each stack.
export const MEASURES = {
  growth: {
    label: "growing bytes",
    of: (stack) => (stack.verdict === "growing" ? Math.max(0, stack.growth.bytes_per_s ?? 0) : 0),
    show: (value) => `+${rate(value)}`,
  },
  live: { label: "live bytes", of: (stack) => stack.live_bytes, show: bytes },
};

function tree(stacks, measure) {
  const root = { children: new Map(), value: 0, leak: false };
  for (const stack of stacks) {
    const value = measure.of(stack);
    if (!(value > 0)) continue;
    root.value += value;
    const named = stack.verdict === "growing" ? culprit(stack) : null;
    let node = root;
    // Innermost first in the report; a cut stack begins where it was cut.
    for (const frame of stack.frames.slice(0, DEEPEST).reverse()) {
      const key = `${frame.module}\0${frame.function ?? frame.offset}`;
      let next = node.children.get(key);
      if (!next) {
        next = { key: `${node.key ?? ""}\u0001${key}`, frame, children: new Map(), value: 0, lines: new Set(), leak: false };
        node.children.set(key, next);
      }
      next.value += value;
      if (frame.file !== null) next.lines.add(safe(frame.file) + (frame.line === null ? "" : `:${frame.line}`));
      next.leak ||= frame === named;
      node = next;
    }
  }
  return root;
}

// The same module has the same colour in every graph; code of the C and C++ libraries has none.
function colour(frame) {
  if (isLibrary(frame)) return "library";
  let hash = 0;
  for (const c of frame.module ?? "") hash = (hash * 31 + c.codePointAt(0)) >>> 0;
  return `module${hash % 6}`;
}

// `zoomed` holds the key of the box that fills the width, and stays the caller's, for the next report.
export function flame(stacks, measure, zoomed, redraw) {
  const root = tree(stacks, measure);
  if (!(root.value > 0)) return h("p", { class: "empty" }, `No ${measure.label} in the call stacks that are listed.`);
  const info = h("p", { class: "flame-info", "aria-live": "polite" });
  const share = (value) => `${((100 * value) / root.value).toFixed(1)} %`;
  const whole = `${measure.show(root.value)} in all. Callers are above what they call; a click or Enter widens, Escape goes back.`;
  const tell = (node) => {
    const lines = node ? [...node.lines].slice(0, 3).join(", ") : "";
    const file = node?.frame.module ? ` in ${safe(base(node.frame.module))}` : "";
    info.textContent = node
      ? `${functionName(node.frame)}${file}: ${measure.show(node.value)}, ${share(node.value)} of all${lines && ` · ${lines}`}`
      : whole;
  };

  let path = [];
  const find = (node, above) => {
    if (node.key === zoomed.key) path = [...above, node];
    else for (const child of node.children.values()) find(child, [...above, node]);
  };
  if (zoomed.key !== undefined) find(root, []);
  const zoom = path.at(-1) ?? root;

  const rows = [];
  const put = (node, depth, left, width) => {
    if (width < LEAST) return;
    const row = (rows[depth] ??= []);
    const label = functionName(node.frame);
    const box = h("button", {
      type: "button",
      class: `frame ${colour(node.frame)}${node.leak ? " leak" : ""}${path.includes(node) && node !== zoom ? " above" : ""}`,
      tabindex: depth === 0 && row.length === 0 ? 0 : -1,
      "data-key": `frame${node.key}`,
      "aria-label": `${label}, ${measure.show(node.value)}, ${share(node.value)}`,
      onclick: () => {
        zoomed.key = zoomed.key === node.key ? undefined : node.key;
        redraw();
      },
      onpointerenter: () => tell(node),
      onfocus: () => tell(node),
    }, h("bdi", {}, label), node.frame.inlined ? " (inlined)" : null);
    box.style.left = `${left * 100}%`;
    box.style.width = `${width * 100}%`;
    row.push(box);
    if (path.includes(node) && node !== zoom) {
      put(path[path.indexOf(node) + 1], depth + 1, 0, 1);
      return;
    }
    let from = left;
    for (const child of [...node.children.values()].sort((a, b) => b.value - a.value)) {
      const part = (width * child.value) / node.value;
      put(child, depth + 1, from, part);
      from += part;
    }
  };
  if (path.length > 1) put(path[1], 0, 0, 1);
  else {
    let from = 0;
    for (const child of [...root.children.values()].sort((a, b) => b.value - a.value)) {
      put(child, 0, from, child.value / root.value);
      from += child.value / root.value;
    }
  }
  tell(path.length > 1 ? zoom : null);

  // Arrows go to the box that is nearest in that direction.
  const keys = (event) => {
    const row = rows.findIndex((boxes) => boxes.includes(event.target));
    if (row < 0) return;
    const column = rows[row].indexOf(event.target);
    const middle = (box) => parseFloat(box.style.left) + parseFloat(box.style.width) / 2;
    const nearest = (boxes) =>
      boxes?.reduce((best, box) => (Math.abs(middle(box) - middle(event.target)) < Math.abs(middle(best) - middle(event.target)) ? box : best));
    const to = {
      ArrowUp: () => nearest(rows[row - 1]),
      ArrowDown: () => nearest(rows[row + 1]),
      ArrowLeft: () => rows[row][column - 1],
      ArrowRight: () => rows[row][column + 1],
    }[event.key]?.();
    if (to) {
      event.preventDefault();
      to.focus();
    } else if (event.key === "Escape" && zoomed.key !== undefined) {
      zoomed.key = undefined;
      redraw();
    }
  };
  const graph = h("div", { class: "flame", role: "group", "aria-label": `Flame graph of the ${measure.label}`, onkeydown: keys, onpointerleave: () => tell(path.length > 1 ? zoom : null) },
    rows.map((boxes) => h("div", { class: "row" }, boxes)));
  return h("div", {}, graph, info);
}
