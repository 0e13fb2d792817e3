// Elements by one function. Text only ever becomes text nodes: nothing here parses HTML.

// `props`: `class`, `on...` listeners, anything else an attribute; null and false leave it out.
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// A name from a traced program: kept apart from the direction of the text around it. It has gone through `safe`.
export function name(text, props = {}) {
  return h("bdi", props, text);
}

// Replaces what `parent` holds, and gives the focus, what was opened and how far it was scrolled back to what has the same `data-key`.
export function replace(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const opened = new Map([...parent.querySelectorAll("details[data-key]")].map((one) => [one.dataset.key, one.open]));
  const scrolled = new Map([...parent.querySelectorAll(".scrolls[data-key]")].map((one) => [one.dataset.key, one.scrollTop]));
  parent.replaceChildren(...children.flat(Infinity).filter(Boolean));
  for (const one of parent.querySelectorAll("[data-key]")) {
    const key = one.dataset.key;
    if (opened.has(key)) one.open = opened.get(key);
    if (scrolled.has(key)) one.scrollTop = scrolled.get(key);
    if (key === focused) one.focus({ preventScroll: true });
  }
}
