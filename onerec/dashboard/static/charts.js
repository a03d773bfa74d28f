// Line charts (uPlot) with a legend that shows values, and the same numbers in a table behind a disclosure.
import { h, table, scroll } from "./dom.js";
import { NO_DATA } from "./format.js";

const HEIGHT = 210;
const DURATIONS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000];
const ROWS = 60;
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3], [8, 2], [1, 2]];
const charts = new Set();

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

// A tick of a time axis: the day at midnight, else the time of day; UTC.
function clock(seconds, every) {
  const d = new Date(seconds * 1000), iso = d.toISOString();
  if (every >= 86400 || seconds % 86400 === 0) return `${MONTHS[d.getUTCMonth()]} ${d.getUTCDate()}`;
  return iso.slice(11, every < 60 ? 19 : 16);
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  // `x`: {label, format, time}; `format`: of values; `line`: {value} drawn across, an objective; `durations`: y in seconds.
  constructor(parent, { label, x, format, line = null, height = HEIGHT, durations = false }) {
    this.options = { label, x, format, line, height, durations };
    this.canvas = h("div", { class: "plot", role: "img" });
    this.legend = h("ul", { class: "legend" });
    this.body = h("div", {});
    this.details = h("details", { class: "data" }, h("summary", {}, `${label} as a table`), this.body);
    this.details.addEventListener("toggle", () => this.fill());
    this.node = h("div", { class: "chart" }, this.legend, this.canvas, this.details);
    parent.replaceChildren(this.node);
    this.watcher = new ResizeObserver(() => this.resize());
    this.watcher.observe(this.canvas);
    charts.add(this);
  }

  set(xs, series) {
    const key = JSON.stringify([xs.length, xs.at(-1), series.map((s) => [s.name, s.values.length, s.values.at(-1), s.values[0]])]);
    if (key === this.key) return;
    this.key = key;
    const names = series.map((s) => s.name).join("\n");
    this.xs = xs;
    this.series = series;
    if (this.plot && names === this.names) this.plot.setData([xs, ...series.map((s) => s.values)]);
    else { this.names = names; this.draw(); }
    this.tell(null);
    this.canvas.setAttribute("aria-label", `${this.options.label}: ` +
      series.map((s) => `${s.name} ${this.value(s, this.last(s))}`).join(", ") + ". Numbers in the table below.");
    this.fill();
  }

  last(s) {
    for (let i = s.values.length - 1; i >= 0; i--) if (s.values[i] !== null && s.values[i] !== undefined) return i;
    return null;
  }

  value(s, i) {
    const v = i === null ? null : s.values[i];
    return v === null || v === undefined ? NO_DATA : this.options.format(v);
  }

  tell(i) {
    this.legend.replaceChildren(...this.series.map((s, n) => {
      const swatch = h("span", { class: `swatch c${n + 1}`, "aria-hidden": "true" });
      return h("li", {}, swatch, h("span", {}, s.name), h("b", {}, this.value(s, i ?? this.last(s))));
    }), ...(i === null ? [] : [h("li", { class: "at" }, this.options.x.format(this.xs[i]))]));
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    const width = this.canvas.clientWidth;
    if (!width || !this.xs) return;
    const { x, format, line, height, durations } = this.options;
    const ink = css("--soft"), grid = css("--grid"), font = `12px ${css("--font")}`;
    const axis = { stroke: ink, font, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 } };
    const range = (u, low, high) => {
      if (low === null || high === null) return [0, 1];
      const floor = Math.min(0, low), pad = (high - floor || 1) * 0.06;
      return [floor === 0 ? 0 : floor - pad, high + pad];
    };
    const across = (u) => {
      if (!line || line.value === null) return;
      const y = u.valToPos(line.value, "y", true);
      if (y < u.bbox.top || y > u.bbox.top + u.bbox.height) return;
      const c = u.ctx;
      c.save();
      c.strokeStyle = css("--objective");
      c.setLineDash([4, 4]);
      c.lineWidth = devicePixelRatio;
      c.beginPath();
      c.moveTo(u.bbox.left, y);
      c.lineTo(u.bbox.left + u.bbox.width, y);
      c.stroke();
      c.restore();
    };
    this.plot = new window.uPlot({
      width, height, padding: [8, 22, 0, 0], legend: { show: false }, tzDate: (ts) => window.uPlot.tzDate(new Date(ts * 1e3), "Etc/UTC"),
      cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { time: Boolean(x.time) }, y: { range } },
      axes: [{ ...axis, size: 30, space: 64, values: (u, ticks) => ticks.map((v) => (x.time ? clock(v, ticks[1] - ticks[0]) : String(v))) }, { ...axis, size: durations ? 78 : 58, space: 34, ...(durations ? { incrs: DURATIONS } : {}), values: (u, ticks) => ticks.map((v) => format(v)) }],
      series: [{}, ...this.series.map((s, n) => ({
        label: s.name, stroke: css(`--c${n + 1}`), width: n === 0 ? 2.25 : 1.5, dash: DASHES[n % DASHES.length], spanGaps: true,
        points: { show: this.xs.length < 30, size: 5 },
      }))],
      hooks: { setCursor: [(u) => this.tell(u.cursor.idx ?? null)], draw: [across] },
    }, [this.xs, ...this.series.map((s) => s.values)], this.canvas);
    this.width = width;
  }

  resize() {
    const width = this.canvas.clientWidth;
    if (!width || width === this.width) return;
    if (this.plot) { this.width = width; this.plot.setSize({ width, height: this.options.height }); } else this.draw();
  }

  fill() {
    if (!this.details.open || !this.xs) return;
    const { label, x } = this.options;
    const newest = this.xs.map((_, i) => i).slice(-ROWS).reverse();
    const rows = newest.map((i) => [x.format(this.xs[i]), ...this.series.map((s) => this.value(s, i))]);
    const more = this.xs.length > ROWS ? h("p", { class: "note" }, `The newest ${ROWS} of ${this.xs.length}.`) : null;
    this.body.replaceChildren(scroll(`${label} as a table`, table(label, [x.label, ...this.series.map((s) => s.name)], rows,
      { numeric: this.series.map((_, n) => n + 1) })), ...(more ? [more] : []));
  }

  close() {
    this.watcher.disconnect();
    this.plot?.destroy();
    charts.delete(this);
  }
}

export function redraw() {
  for (const chart of charts) chart.draw();
}
