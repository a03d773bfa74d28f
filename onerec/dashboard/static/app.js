// What the server tells, once a second, goes to the panels; everything here only reads.
import { $, h } from "./dom.js";
import { redraw } from "./charts.js";
import * as panels from "./panels.js";

let settings = null;
let parts = {};
let lastBeat = 0;
let versionShown = null;

const panel = (name, draw) => {
  try { draw(); } catch (error) { console.error(`panel ${name}`, error); }
};

function render(changed) {
  const p = parts, has = (...names) => names.some((name) => name in changed);
  if (!settings || !p.chain?.data) return;
  if (has("chain")) { panel("headline", () => panels.headline(p.chain.data)); panel("course", () => panels.headlineCourse(p.chain.data)); }
  if (has("chain", "stream", "checkpoint", "releases")) panel("chain", () => panels.chain(p.chain.data, p));
  if (has("replicas", "chain")) panel("replicas", () => panels.replicas(p.replicas.data, p.chain.data.clock_ms));
  if (has("releases")) { panel("lineage", () => panels.lineage(p.releases)); panel("releases", () => panels.releases(p.releases)); }
  if (has("training")) panel("training", () => panels.training(p.training));
  if (has("ledger")) panel("ledger", () => panels.ledger(p.ledger, settings.objective_s));
  if (has("lag")) panel("lag", () => panels.lag(p.lag));
  if (has("drift")) panel("drift", () => panels.drift(p.drift, settings));
  if (has("stream")) panel("stream", () => panels.stream(p.stream));
}

function beat(state) {
  const words = { live: "live", lost: "no connection; trying again", waiting: "connecting" }[state];
  const node = $("live");
  if (node.dataset.state === state) return;
  node.dataset.state = state;
  $("live-text").textContent = words;
}

function listen() {
  const source = new EventSource("/api/live");
  source.addEventListener("settings", (event) => {
    settings = JSON.parse(event.data);
    parts = {};
    panels.sources(settings);
  });
  source.addEventListener("parts", (event) => {
    const changed = JSON.parse(event.data);
    parts = { ...parts, ...changed };
    lastBeat = Date.now();
    beat("live");
    render(changed);
    const version = parts.replicas?.data?.map((each) => each.data?.version).join();
    if (version !== versionShown) { versionShown = version; refreshUser(); }
    document.documentElement.dataset.ready = "yes";
  });
  source.addEventListener("error", () => {
    beat("lost");
    // A refused stream is not tried again by the browser itself.
    if (source.readyState === EventSource.CLOSED) { source.close(); setTimeout(listen, 5000); }
  });
}

setInterval(() => { if (lastBeat && Date.now() - lastBeat > 6000) beat("lost"); }, 1000);

// The theme.
const radios = [...document.querySelectorAll("#theme input")];
const chosen = document.documentElement.dataset.theme ?? "system";
for (const radio of radios) {
  radio.checked = radio.value === chosen;
  radio.addEventListener("change", () => {
    if (radio.value === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = radio.value;
    try { localStorage.setItem("onerec-theme", radio.value); } catch { /* not remembered then */ }
    redraw();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

// A user.
const input = $("user-id"), status = $("user-status");
let current = null;
let asked = 0;

async function ask(path) {
  const answer = await fetch(path, { headers: { accept: "application/json" } });
  return answer.json();
}

async function showUser(id, { remember = true } = {}) {
  if (!id) return;
  current = id;
  input.value = id;
  const mine = ++asked;
  if (remember) {
    const url = new URL(location.href);
    url.searchParams.set("user", id);
    history.replaceState(null, "", url);
    status.textContent = "asking …";
  }
  try {
    const answer = await ask(`/api/user?id=${encodeURIComponent(id)}`);
    if (mine !== asked) return;
    if (!answer.data) { status.textContent = answer.fault; $("sides").replaceChildren(); return; }
    status.textContent = "";
    panel("user", () => panels.user(answer.data));
  } catch (error) {
    if (mine === asked) status.textContent = `The page's server does not answer (${error.message}).`;
  }
}

function refreshUser() {
  if (current && !document.hidden) showUser(current, { remember: false });
}

setInterval(refreshUser, 5000);
$("user-form").addEventListener("submit", (event) => { event.preventDefault(); showUser(input.value); });
$("random-user").addEventListener("click", async () => {
  try {
    const answer = await ask("/api/users/random");
    if (answer.data) await showUser(answer.data);
    else status.textContent = answer.fault ?? "No data: nobody has a session yet.";
  } catch (error) { status.textContent = `The page's server does not answer (${error.message}).`; }
});
let typing = null;
async function suggest() {
  try {
    const answer = await ask(`/api/users?prefix=${encodeURIComponent(input.value)}`);
    $("user-list").replaceChildren(...(answer.data ?? []).map((id) => h("option", { value: id })));
  } catch { /* suggestions only help */ }
}
input.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(suggest, 150); });
input.addEventListener("focus", suggest);

listen();
const fromUrl = new URLSearchParams(location.search).get("user");
if (fromUrl) showUser(fromUrl);
