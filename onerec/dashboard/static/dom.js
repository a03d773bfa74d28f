// Elements from data. Text only ever becomes text nodes, so markup in it stays text.
export const $ = (id) => document.getElementById(id);

export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

// Replaces the children only where they differ: focus and open disclosures stay as they are.
const shown = new WeakMap();

export function show(parent, ...children) {
  const fresh = h("div", {}, ...children), markup = fresh.innerHTML;
  if (shown.get(parent) === markup) return;
  shown.set(parent, markup);
  const open = new Set([...parent.querySelectorAll("details[open][data-key]")].map((each) => each.dataset.key));
  const focused = parent.contains(document.activeElement) ? document.activeElement.closest("[data-key]")?.dataset.key : null;
  for (const each of fresh.querySelectorAll("details[data-key]")) each.open = open.has(each.dataset.key);
  parent.replaceChildren(...fresh.childNodes);
  if (focused) {
    const again = [...parent.querySelectorAll("[data-key]")].find((each) => each.dataset.key === focused);
    (again?.matches("details") ? again.querySelector("summary") : again)?.focus();
  }
}

export function text(value, limit = 120) {
  // Somebody else's words: their own direction, cut where long, all of it behind a disclosure.
  const all = String(value);
  const points = [...all.slice(0, 2 * limit + 2)];
  if (points.length <= limit) return h("bdi", {}, all);
  return h("details", { class: "long", "data-key": `long ${all.slice(0, 300)}` },
    h("summary", {}, h("bdi", {}, `${points.slice(0, limit).join("")}…`)), h("div", { class: "whole", dir: "auto", tabindex: "0" }, all));
}

export function table(caption, head, rows, { numeric = [] } = {}) {
  const cls = (i) => (numeric.includes(i) ? "num" : null);
  return h("table", {}, h("caption", { class: "hidden" }, caption),
    h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { scope: "col", class: cls(i) }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) =>
      i === 0 ? h("th", { scope: "row", class: cls(i) }, cell) : h("td", { class: cls(i) }, cell))))));
}

export function scroll(label, content) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, content);
}

// Our own words, with commands between backticks.
export function words(sentence) {
  return sentence.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));
}

export function nothing(sentence, fault = null) {
  return h("p", { class: fault ? "fault" : "nothing" }, fault ? h("strong", {}, `${sentence}: `) : words(sentence), fault ? text(fault, 400) : null);
}

export function disclosure(key, summary, ...content) {
  return h("details", { class: "data", "data-key": key }, h("summary", {}, summary), ...content);
}
