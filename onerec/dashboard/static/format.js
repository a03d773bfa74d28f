// Values as people read them. What is not known is "no data", never 0.
export const NO_DATA = "no data";

export function age(ms) {
  if (ms === null || ms === undefined) return NO_DATA;
  const sign = ms < 0 ? "−" : "";
  const v = Math.abs(ms), s = Math.floor(v / 1000), two = (n) => String(n).padStart(2, "0");
  if (v < 1000) return `${sign}${Math.round(v)} ms`;
  if (v < 59950) return `${sign}${(v / 1000).toFixed(1)} s`;
  if (s < 3600) return `${sign}${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${sign}${Math.floor(s / 3600)} h ${two(Math.floor(s / 60) % 60)} min`;
  return `${sign}${Math.floor(s / 86400)} d ${two(Math.floor(s / 3600) % 24)} h`;
}

// For axes: as short as it can be said.
export function shortAge(ms) {
  const sign = ms < 0 ? "−" : "", v = Math.abs(ms), n = (x) => String(Math.round(x * 100) / 100);
  const s = Math.round(v / 1000), pair = (big, unit, small, other) => `${sign}${big} ${unit}${small ? ` ${small} ${other}` : ""}`;
  if (v === 0) return "0";
  if (v < 60000) return `${sign}${n(v / 1000)} s`;
  if (s < 3600) return pair(Math.floor(s / 60), "min", s % 60, "s");
  if (s < 86400) return pair(Math.floor(s / 3600), "h", Math.floor(s / 60) % 60, "min");
  return pair(Math.floor(s / 86400), "d", Math.floor(s / 3600) % 24, "h");
}

export function time(ms) {
  if (ms === null || ms === undefined) return NO_DATA;
  const d = new Date(ms);
  return Number.isNaN(d.getTime()) ? String(ms) : d.toISOString().slice(0, 19).replace("T", " ");
}

export function count(n) {
  return n === null || n === undefined ? NO_DATA : Number(n).toLocaleString("en").replaceAll(",", " ");
}

export function number(n, digits = 3) {
  if (n === null || n === undefined || !Number.isFinite(n)) return NO_DATA;
  return Math.abs(n) >= 1000 ? count(Math.round(n)) : n.toFixed(Math.abs(n) >= 100 ? 1 : digits);
}

export function percent(n) {
  return n === null || n === undefined ? NO_DATA : `${(100 * n).toFixed(1)} %`;
}

export function duration(ms) {
  if (!ms) return null;
  const s = Math.round(ms / 1000);
  return s < 60 ? `${s} s` : `${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")} min`;
}
