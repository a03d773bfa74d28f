// One function for each panel: what the server told of a part → what is seen.
import { $, disclosure, h, nothing, scroll, show, table, text, words } from "./dom.js";
import { NO_DATA, age, count, duration, number, percent, shortAge, time } from "./format.js";
import { Chart } from "./charts.js";

const STAGES = {
  event: ["Event", "newest event of the log"],
  history: ["History", "histories are complete to here"],
  session: ["Session", "newest finished session"],
  trained: ["Trained", "newest checkpoint"],
  exported: ["Exported", "newest version in the repository"],
  loaded: ["Loaded", "by every replica"],
  answered: ["Answered", "what users are served from"],
};
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const waiting = (part) => (part?.waiting_s ? h("p", { class: "note" }, `No answer for ${part.waiting_s} s; still waiting.`) : null);

function plain(value) {
  if (value === null || value === undefined || value === "") return NO_DATA;
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : number(value, 4);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return value;
}

function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "string" ? text(value) : value))));
}

export function headline(chain) {
  const figure = $("headline"), verdict = $("verdict");
  figure.textContent = age(chain.headline_ms);
  const objective = age(chain.objective_ms);
  const state = chain.headline_ms === null ? "unknown" : chain.headline_ms < 0 ? "ahead" : chain.within ? "good" : "bad";
  const words = {
    unknown: "No data: no replica answers, or it has learnt nothing yet.",
    ahead: "Ahead of the clock: a clock is wrong, or this is another log.",
    good: `Within the objective of ${objective}.`,
    bad: `Over the objective of ${objective}.`,
  }[state];
  const mark = { unknown: "–", ahead: "!", good: "✓", bad: "!" }[state];
  verdict.className = `verdict ${state}`;
  show(verdict, h("span", { class: "mark", "aria-hidden": "true" }, mark), words);
  const spoken = $("spoken");
  // Said when the verdict changes, not every second.
  if (spoken.dataset.state !== state) {
    spoken.dataset.state = state;
    spoken.textContent = `Users are served from knowledge of age ${age(chain.headline_ms)}. ${words}`;
  }
  const clock = chain.mode === "live" ? "wall clock (live)" : chain.mode === "log" ? "newest event (replay)" : NO_DATA;
  show($("clock-facts"), [["Ages against", clock], ["Log clock (UTC)", time(chain.clock_ms)], ["Wall clock (UTC)", time(chain.wall_ms)],
    ...(chain.mode === "log" ? [["Pace", chain.factor === null ? NO_DATA : `${number(chain.factor, 1)} s of log a second`]] : []),
    ...(chain.jumps ? [["Jumps of the wall clock", count(chain.jumps)]] : [])]
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  document.title = `${age(chain.headline_ms)} · onerec freshness`;
}

function step(limit, count) {
  const units = [1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 345600, 604800];
  const seconds = limit / 1000 / count;
  if (seconds < 1) return 1000 * 10 ** Math.floor(Math.log10(seconds)) * (seconds / 10 ** Math.floor(Math.log10(seconds)) > 5 ? 10 : 5);
  return 1000 * (units.find((unit) => unit >= seconds) ?? Math.ceil(seconds / 604800) * 604800);
}

const course = { at: [], ages: [] };
const COURSE = 900;

// The headline since the page was opened.
export function headlineCourse(chain) {
  course.at.push(chain.wall_ms / 1000);
  course.ages.push(chain.headline_ms === null ? null : chain.headline_ms / 1000);
  if (course.at.length > COURSE) { course.at.shift(); course.ages.shift(); }
  if (!hasAny(course.ages)) return empty("course");
  chart("course", { label: "Age since this page was opened", x: { label: "Wall clock (UTC)", format: (s) => time(s * 1000), time: true },
    format: seconds, line: { value: chain.objective_ms / 1000 }, height: 120, durations: true })
    .set([...course.at], [{ name: "answered", values: [...course.ages] }]);
}

export function chain(data, parts) {
  const ages = data.stages.map((stage) => stage.age_ms).filter((ms) => ms !== null);
  const limit = Math.max(data.objective_ms * 1.15, ...ages) * 1.02;
  const at = (ms) => `${(100 * Math.min(Math.max(ms, 0), limit)) / limit}%`;
  const place = (node, from, to) => {
    node.style.insetInlineStart = at(from);
    node.style.inlineSize = `${(100 * Math.max(0, Math.min(to, limit) - Math.max(from, 0))) / limit}%`;
    return node;
  };
  show($("stages"), data.stages.map((stage) => {
    const [name, meaning] = STAGES[stage.name];
    const known = stage.age_ms !== null;
    const before = known && stage.added_ms !== null ? stage.age_ms - stage.added_ms : 0;
    const track = h("div", { class: "track", "aria-hidden": "true" });
    if (known) {
      const low = Math.max(0, Math.min(before, stage.age_ms));
      track.append(place(h("span", { class: "before" }), 0, low), place(h("span", { class: "added" }), low, Math.max(stage.age_ms, 0)));
    }
    const goal = h("span", { class: "goal" });
    goal.style.insetInlineStart = at(data.objective_ms);
    track.append(goal);
    const added = stage.added_ms === null || stage.name === "event" ? "" : stage.added_ms === 0 ? "" : `+${age(stage.added_ms)}`;
    return h("li", { class: known ? (stage.age_ms < 0 ? "negative" : null) : "unknown" },
      h("span", { class: "stage" }, name, h("small", {}, meaning)), track,
      h("span", { class: "age" }, age(stage.age_ms)), h("span", { class: "add" }, h("span", { class: "hidden" }, added ? "; this hand-off adds " : ""), added));
  }));
  const every = step(limit, 5), ticks = [];
  for (let ms = 0; ms <= limit; ms += every) {
    const tick = h("span", {}, shortAge(ms));
    tick.style.insetInlineStart = at(ms);
    ticks.push(tick);
  }
  const goal = h("span", { class: "goal-name" }, `objective ${shortAge(data.objective_ms)}`);
  goal.style.insetInlineStart = at(data.objective_ms);
  if (data.objective_ms / limit > 0.75) goal.classList.add("left");
  if (data.objective_ms / limit < 0.15) goal.classList.add("right");
  show($("axis"), h("div", {}, ticks, goal));
  const faults = [["state", parts.stream], ["run", parts.checkpoint], ["repository", parts.releases]]
    .filter(([, part]) => part?.fault).map(([name, part]) => h("span", { class: "fault" }, h("strong", {}, `${name}: `), text(part.fault, 400)));
  show($("chain-faults"), faults);
  show($("chain-table"), table("Stages, the event time that they know to, and its age", ["Stage", "Event time (UTC)", "Age", "Added by the hand-off"],
    data.stages.map((stage) => [STAGES[stage.name][0], time(stage.watermark_ms), age(stage.age_ms), age(stage.added_ms)]), { numeric: [2, 3] }).childNodes);
}

export function replicas(list, clock) {
  const versions = new Set(list.filter((each) => each.data).map((each) => each.data.version));
  show($("replicas"),
    versions.size > 1 ? h("p", { class: "warning" }, h("strong", {}, "Mixed versions: "), "the replicas answer from different ones.") : null,
    h("ul", { class: "cards" }, list.map((each) => {
      const d = each.data;
      return h("li", {},
        h("p", { class: "card-title" }, h("span", { class: `state ${d ? "good" : "bad"}` }, d ? "✓ answers" : "! down"), h("bdi", { class: "mono" }, each.server)),
        waiting(each),
        d ? facts([["Version", `${d.version}`], ["Learnt up to (UTC)", time(d.watermark)], ["Age", d.watermark === null || clock === null ? NO_DATA : age(clock - d.watermark)],
          ["Answer took", `${number(d.answer_ms, 0)} ms`], ["Loaded", d.ready.length ? d.ready.join(", ") : NO_DATA],
          ["Histories up to (UTC)", time(d.history_watermark)]]) : nothing("No answer", each.fault ?? "not asked yet"));
    })));
}

const LINEAGE = {
  step: "Training step", watermark: "Learnt up to (UTC)", sequence: "Last session of the log", item_sequence: "Last item record",
  source: "Log position", codebook_version: "Codebook", catalogue_revision: "Catalogue", items: "Items", leaves: "Semantic IDs",
  config_sha256: "Configuration", code_version: "Code", gate: "Gate", reason: "Reason", created_ms: "Built (UTC)",
  checkpoint_created_ms: "Checkpoint (UTC)", width: "Beams", parity: "Parity", format: "Format",
};

function nested(value) {
  if (Array.isArray(value)) return value.length ? value.map(plain).join(", ") : NO_DATA;
  if (!isObject(value)) return plain(value);
  const pairs = Object.entries(value);
  return pairs.length ? h("ul", { class: "nested" }, pairs.map(([name, inner]) => h("li", {}, h("bdi", { class: "key" }, name.replaceAll("_", " ")), " ", wrap(nested(inner))))) : NO_DATA;
}

// A digest says enough by its beginning; the whole is behind a disclosure.
const wrap = (value) => (typeof value === "string" ? text(value, /^[0-9a-f]{24,}$/.test(value) ? 12 : 120) : value);

function gate(g) {
  const verdict = g.passed === null || g.passed === undefined ? "" : g.passed ? "passed" : "not passed";
  return [h("span", {}, `${verdict} `), h("span", { class: "key" }, `loss ${number(g.candidate)}`, Number.isFinite(g.served) ? `, served before ${number(g.served)}` : "")];
}

function positions(source) {
  return h("ul", { class: "nested" }, Object.entries(source).map(([name, at]) => h("li", {}, h("bdi", { class: "key" }, name.split("/").at(-1)), " ",
    isObject(at) ? Object.entries(at).filter(([key]) => !key.startsWith("head")).map(([key, value]) => `${key} ${plain(value)}`).join(", ") : wrap(plain(at)))));
}

const FIRST_FACTS = ["step", "watermark", "sequence", "source", "items", "codebook_version", "config_sha256", "code_version", "gate", "reason", "created_ms"];

function lineageFacts(facts_) {
  const brief = { gate, source: positions };
  const short = (name) => (isObject(facts_[name]) && brief[name] ? brief[name](facts_[name]) : told(name));
  const told = (name) => (/_ms$|^watermark$/.test(name) && typeof facts_[name] === "number" ? time(facts_[name]) : wrap(nested(facts_[name])));
  const known = (name) => facts_[name] !== null && facts_[name] !== undefined && facts_[name] !== "";
  const label = (name) => LINEAGE[name] ?? name.replaceAll("_", " ");
  const first = FIRST_FACTS.filter((name) => name in facts_);
  const rest = Object.keys(facts_).filter((name) => (!first.includes(name) || brief[name]) && name !== "version" && known(name));
  // Only what a person did has a reason: without one nothing is missing.
  const missing = first.filter((name) => !known(name) && name !== "reason");
  return [facts(first.filter(known).map((name) => [label(name), short(name)])),
    missing.length ? h("p", { class: "note missing" }, `No data: ${missing.map((name) => label(name).toLowerCase()).join(", ")}.`) : null,
    rest.length ? disclosure(`more ${facts_.version}`, "More", facts(rest.map((name) => [label(name), told(name)]))) : null];
}

export function lineage(part) {
  const d = part.data;
  $("lineage-note").textContent = d?.lineages.length ? (d.answers ? "of what answers now" : "of the newest version; nobody answers") : "";
  if (!d) return show($("lineage"), waiting(part), nothing("Repository", part.fault ?? "not asked yet"));
  if (!d.lineages.length) return show($("lineage"), nothing("No data: nothing has been published yet."));
  show($("lineage"), d.lineages.map((each) => h("section", { class: "version" }, h("h3", {}, `Version ${each.version}`),
    each.facts ? lineageFacts(each.facts) : nothing("Manifest", each.fault))));
}

export function releases(part) {
  const d = part.data;
  if (!d) return show($("versions"), waiting(part), nothing("Repository", part.fault ?? "not asked yet"));
  if (!d.versions.length && !d.held?.length) return show($("versions"), nothing("Nothing has been published yet."));
  show($("versions"),
    d.hold ? h("p", { class: "warning" }, h("strong", {}, "Publishing is on hold: "), text(d.hold.reason ?? "", 300), " ", words("`onerec promote` lifts it.")) : null,
    d.gate_failed ? h("p", { class: "warning" }, h("strong", {}, "Gate failed: "), "the newest candidate was held back.") : null,
    d.unread ? h("p", { class: "warning" }, "The newest version's manifest cannot be read.") : null,
    scroll("Releases", table("Versions, newest first", ["Version", "State", "Step", "Learnt up to (UTC)"], d.versions.map((each) => [
      `${each.version}`, h("span", { class: `badge ${each.state.replaceAll(" ", "-")}` }, each.state), plain(each.step), time(each.watermark)]), { numeric: [2] })),
    h("ul", { class: "reasons" }, d.versions.filter((each) => each.reason).map((each) => h("li", {}, h("strong", {}, `${each.version}: `), text(each.reason, 200)))),
    (d.held ?? []).length ? disclosure("held", `Held back by the gate: ${d.held.length}`, h("ul", { class: "reasons" }, d.held.map((each) =>
      h("li", {}, h("strong", {}, `${each.version}: `), text(each.reason, 200), each.scores ? wrap(nested(each.scores)) : null)))) : null);
}

const made = {};

function chart(name, options) {
  made[name] ??= new Chart($(name), options);
  made[name].options.line = options.line ?? null;
  return made[name];
}

function empty(name, ...content) {
  made[name]?.close();
  delete made[name];
  show($(name), ...content);
}

const seconds = (s) => shortAge(Math.round(s * 10) * 100);
const NAMES = { onerec: "OneRec", popularity: "popularity", covisitation: "co-visitation", ntp: "next token", preference: "preference", reward: "reward model" };
const hasAny = (values) => values.some((value) => value !== null && value !== undefined);

export function training(part) {
  const d = part.data;
  if (!d) {
    const why = part.fault ? nothing("Run", part.fault) : nothing("No data: the trainer has not made a step yet.");
    empty("hits", waiting(part), why);
    empty("losses", why.cloneNode(true));
    $("losses-note").textContent = "";
    return;
  }
  const hits = d.hit_rate;
  if (!hits.ts.length) empty("hits", nothing("No data: no window has been scored yet."));
  else chart("hits", { label: "Hit rate", x: { label: "Event time (UTC)", format: (s) => time(s * 1000), time: true }, format: percent })
    .set(hits.ts.map((ms) => ms / 1000), Object.entries(hits.series).map(([name, values]) => ({ name: NAMES[name] ?? name, values })));
  const losses = Object.entries(d.losses.series).filter(([, values]) => hasAny(values));
  if (!losses.length) empty("losses", nothing("No data: no finite loss yet."));
  else chart("losses", { label: "Losses", x: { label: "Step", format: (v) => `step ${count(v)}` }, format: (v) => number(v) })
    .set(d.losses.step, losses.map(([name, values]) => ({ name: NAMES[name] ?? name, values })));
  $("losses-note").textContent = `Step ${count(d.newest.step)}; ${count(d.sessions)} sessions learnt; ${count(d.preference_steps)} steps with preference pairs` +
    `; ${d.skipped ? `${count(d.skipped)} skipped` : "none skipped"}; gradient norm ${number(d.newest.gradient)}` +
    (d.newest.expert_load ? `; experts' load ${d.newest.expert_load.map((v) => number(v, 2)).join(" to ")}.` : ".");
}

export function ledger(part, objective) {
  const entries = (part.data ?? []).filter((each) => isObject(each.age_s) && Number.isFinite(each.first_answered_ms));
  if (!entries.length) return empty("ledger", waiting(part), part.fault ? nothing("RUN/freshness.jsonl", part.fault) : nothing("No data: `onerec monitor` writes it when a version is first answered with."));
  entries.sort((a, b) => a.first_answered_ms - b.first_answered_ms);
  const names = Object.keys(STAGES).filter((name) => entries.some((each) => Number.isFinite(each.age_s[name]?.p95)));
  chart("ledger", { label: "Age by version", x: { label: "First answered (UTC)", format: (s) => time(s * 1000), time: true },
    format: seconds, line: { value: objective }, durations: true })
    .set(entries.map((each) => each.first_answered_ms / 1000), names.reverse().map((name) => ({ name: STAGES[name][0].toLowerCase(),
      values: entries.map((each) => (Number.isFinite(each.age_s[name]?.p95) ? each.age_s[name].p95 : null)) })));
}

export function lag(part) {
  const sources = part.data?.sources;
  if (!sources) return show($("lag"), waiting(part), part.fault ? nothing("Metrics", part.fault) : nothing("No data: no process tells its lag. Start `onerec run` with --metrics-port, or name its address by --metrics."));
  show($("lag"), table("Lag by source", ["Source", "Time", "Records"], sources.map((each) => [text(each.source || "stream", 40),
    each.seconds === null ? NO_DATA : age(each.seconds * 1000), count(each.records)]), { numeric: [1, 2] }));
}

export function drift(part, settings) {
  const d = part.data;
  const psi = isObject(d?.psi) ? d.psi : null;
  if (!psi) return show($("drift"), waiting(part), part.fault ? nothing("RUN/drift.json", part.fault) : nothing("No data: `onerec monitor` writes it once its windows are full."));
  const grade = (v) => (v === null || !Number.isFinite(v) ? ["unknown", NO_DATA] : v >= settings.psi_act ? ["bad", "act"] : v >= settings.psi_look ? ["look", "look"] : ["good", "steady"]);
  show($("drift"), table("Population stability index", ["Feature", "PSI", ""], Object.entries(psi).map(([name, value]) => {
    const [state, word] = grade(value);
    return [text(name.replaceAll("_", " "), 60), number(value), h("span", { class: `state ${state}` }, word)];
  }), { numeric: [1] }),
  facts([["Unseen items", percent(d.unseen)], ["Sessions compared", count(d.sessions)]]),
  h("p", { class: "note" }, `Worth a look from ${settings.psi_look}, an alert from ${settings.psi_act}.`));
}

const COUNTERS = { events: "Events", users: "Users", sessions: "Sessions", high_quality: "of high quality", duplicates: "Duplicates", late: "Late", dead_letters: "Dead letters" };

export function stream(part) {
  const d = part.data;
  if (!d) {
    show($("counters"), waiting(part), nothing("State", part.fault ?? "not asked yet"));
    show($("dead"), waiting(part), nothing("State", part.fault ?? "not asked yet"));
    return;
  }
  const begun = d.marks.event !== null || d.session_sequence > 0;
  show($("counters"), begun ? h("dl", { class: "counts" }, Object.entries(COUNTERS).map(([name, label]) => h("div", {}, h("dt", {}, label), h("dd", {}, count(d.counters[name])))))
    : nothing("No data: the state is empty so far."));
  const letters = d.dead_letters, reasons = Object.entries(letters.by_reason);
  const total = d.counters.events + d.counters.dead_letters;
  show($("dead"), !begun && !reasons.length ? nothing("No data: the state is empty so far.") : !reasons.length ? h("p", { class: "nothing" }, "None: every line was taken.") : [
    h("p", { class: "note" }, `${percent(total ? d.counters.dead_letters / total : null)} of ${count(total)} lines; all of them: `, h("code", {}, "onerec dead-letters")),
    table("Dead letters by reason", ["Reason", "Lines"], reasons.map(([reason, lines]) => [text(reason, 80), count(lines)]), { numeric: [1] }),
    disclosure("letters", "The newest few", h("ul", { class: "letters" }, letters.newest.map((each) => h("li", {},
      h("p", {}, h("strong", {}, text(each.reason, 80)), " ", h("span", { class: "note" }, `number ${each.number}, ${count(each.bytes)} bytes, `, text(each.source, 120))),
      h("code", { dir: "auto", class: "line", tabindex: "0" }, each.line + (each.cut ? "…" : ""))))))]);
}

function item(entry, marks) {
  const minor = [duration(entry.duration_ms)].filter(Boolean);
  return h("li", {}, h("span", { class: "item-name" }, text(entry.title ?? entry.item_id, 80), marks),
    h("span", { class: "item-facts" }, entry.title ? h("span", { class: "mono" }, text(entry.item_id, 40)) : null,
      (entry.tags ?? []).slice(0, 6).map((tag) => h("span", { class: "tag" }, text(tag, 30))),
      (entry.tags ?? []).length > 6 ? h("span", { class: "tag" }, `+${entry.tags.length - 6}`) : null,
      entry.author_id ? h("span", {}, "by ", text(entry.author_id, 40)) : null, minor.map((each) => h("span", {}, each)),
      "tags" in entry ? null : h("span", {}, "no catalogue entry")));
}

const REWARDS = ["swt", "vtr", "wtr", "ltr"];
const FIRST = 12;

export function user(found) {
  const { watched, recommended } = found;
  const w = watched.data, r = recommended.data;
  const seen = new Set((w?.history ?? []).map((each) => each.item_id));
  const history = w?.history ?? [];
  const left = h("section", { class: "side", "aria-labelledby": "watched-title" }, h("h3", { id: "watched-title" }, "Watched"),
    !w ? nothing("State", watched.fault) : !w.known ? nothing("No data: this user has no valid event in the state.") : !history.length ? nothing("No history: nothing that was watched counts as liked.") : [
      h("p", { class: "note" }, `${count(w.length)} items of history, newest first.`), h("ol", { class: "items" }, history.slice(0, FIRST).map((each) => item(each))),
      history.length > FIRST ? disclosure("history-more", `${history.length - FIRST} more${w.length > history.length ? ` of ${w.length - FIRST}` : ""}`, h("ol", { class: "items", start: FIRST + 1 }, history.slice(FIRST).map((each) => item(each)))) : null]);
  const right = h("section", { class: "side", "aria-labelledby": "recommended-title" }, h("h3", { id: "recommended-title" }, "Recommended now"),
    !r ? nothing("Triton", recommended.fault) : [
      h("p", { class: "note" }, `Version ${r.version} at `, h("bdi", {}, r.server), `, learnt up to ${time(r.watermark)} UTC.`, w && !w.known ? " A user without history gets what suits everybody." : ""),
      r.sessions.map((session, n) => h("div", { class: "session" }, h("h4", {}, `Session ${n + 1}`, h("span", { class: "note" }, ` log-likelihood ${number(session.score, 2)}`,
        session.rewards ? ` · ${REWARDS.map((name, i) => `${name} ${number(session.rewards[i], 2)}`).join(" · ")}` : "")),
      h("ol", { class: "items" }, session.items.map((id) => item(r.items[id] ?? { item_id: id }, seen.has(id) ? h("span", { class: "badge" }, "in history") : null)))))]);
  show($("sides"), left, right);
}

export function sources(settings) {
  show($("sources"), ["state", "run", "repository"].map((name) => [h("span", { class: "key" }, `${name} `), h("bdi", { class: "mono" }, settings[name]), " "]));
}
