// Verdict, totals, replicas and events: everything that is neither a chart nor the table of clients.

import { greedySentence, uptime } from "./derive.js";
import { byId, clock, element, num, percent, seconds, setText, shortened, shown } from "./format.js";

const TITLES = { fair: "Fair", unfair: "Not fair", unknown: "Not known" };
const MARKS = { fair: "✓ fair", unfair: "✕ NOT FAIR", unknown: "? not known" };
const KINDS = {
  started: "restart",
  joined: "joined",
  lost: "lost",
  draining: "draining",
  lifted: "lift",
  throttled: "throttled",
  refused: "refused",
  preempted: "preempted",
  lapsed: "lapsed",
  overload: "overload",
  changed: "changed",
};
const SERIOUS = new Set(["started", "lost", "overload", "lapsed"]);

/** `state`: fair, unfair or unknown. The live region speaks when the state changes, not at each new number. */
function setVerdict(state, text) {
  const section = byId("verdict");
  setText(byId("verdict-title"), TITLES[state]);
  setText(byId("verdict-text"), text);
  if (section.dataset.state !== state || !byId("verdict-live").textContent) {
    section.dataset.state = state;
    setText(byId("verdict-live"), `${TITLES[state]}. ${text}`);
    document.title = `${MARKS[state]} · fairserve`;
  }
}

export function showVerdict(overview) {
  const { verdict } = overview;
  setVerdict(verdict.is_fair ? "fair" : "unfair", sentence(verdict.text));
  const pieces = greedySentence(overview).map((piece) =>
    typeof piece === "string" ? piece : element("strong", {}, element("bdi", {}, shown(piece.name))),
  );
  const line = byId("greedy");
  if (line.textContent !== pieces.map((piece) => piece.textContent ?? piece).join("")) line.replaceChildren(...pieces);
  setText(byId("gap"), num(verdict.gap));
  setText(byId("bound"), num(verdict.bound));
  setText(byId("lead-bound"), num(verdict.bound));
  setText(byId("worst"), num(verdict.worst_gap));
  setText(byId("jain"), verdict.num_backlogged > 1 ? verdict.jain.toFixed(3) : "–");
  setText(byId("backlogged"), num(verdict.num_backlogged));
  setText(byId("known"), num(overview.num_clients));
  const pair = verdict.gap_pair;
  setText(byId("gap-pair"), pair ? `${shortened(pair[0], 18)} ahead, ${shortened(pair[1], 18)} behind` : "fewer than two clients wait");
  const meter = byId("gap-meter");
  const used = verdict.bound > 0 ? Math.min(1, verdict.gap / verdict.bound) : 0;
  meter.setAttribute("aria-valuenow", String(Math.round(used * 100)));
  meter.querySelector(".fill").style.width = `${used * 100}%`;
  const worst = verdict.bound > 0 ? Math.min(1, verdict.worst_gap / verdict.bound) : 0;
  meter.querySelector(".worst").style.left = `calc(${worst * 100}% - 2px)`;
}

export function showUnknown(why) {
  setVerdict("unknown", why);
}

/** Without the word that the title says already. */
const sentence = (text) => {
  const whole = shown(text).replace(/^(not )?fair: /i, "");
  return whole ? whole[0].toUpperCase() + whole.slice(1) + (/[.!?]$/.test(whole) ? "" : ".") : "";
};

export function showTotals(overview) {
  const totals = [
    ["Waiting", num(overview.waiting), overview.is_overloaded ? "overloaded" : "requests"],
    ["Running", num(overview.running), "requests"],
    ["Service", num(overview.service_per_s), "per second"],
    ["Tokens", num(overview.tokens_per_s), "per second"],
    ["Granted", num(overview.num_granted), "since the start"],
    ["Lifts", num(overview.num_lifts), "newcomers raised"],
    ["Preempted", num(overview.num_preempted), "gave way"],
    ["Throttled", num(overview.num_throttled), "interactions"],
    ["Refused", num(overview.num_refused), "no room"],
    ["Lapsed", num(overview.num_lapsed), "grants"],
  ];
  const list = byId("totals");
  if (list.children.length !== totals.length) {
    const cell = ([label]) => element("div", {}, element("dt", {}, label), element("dd"), element("dd", { className: "unit" }));
    list.replaceChildren(...totals.map(cell));
  }
  totals.forEach(([, value, unit], i) => {
    const [, amount, what] = list.children[i].children;
    setText(amount, value);
    setText(what, unit);
    what.classList.toggle("alarm", unit === "overloaded");
  });
  setText(byId("about"), `${shown(overview.model)} · ${overview.policy} · prediction ${overview.prediction} · up ${uptime(overview)}`);
  setText(byId("built"), `Overview built in ${(overview.built_in_s * 1000).toFixed(1)} ms inside the counter actor. Service is in units of the cost function, lead and gap in units per weight.`);
}

const STATES = { live: ["live", "good"], stale: ["stale", "bad"], draining: ["draining", "warn"] };

export function chip(word, kind) {
  return element("span", { className: `chip ${kind}` }, word);
}

export function showReplicas(overview) {
  const body = byId("replicas-table").tBodies[0];
  while (body.rows.length > overview.replicas.length) body.deleteRow(-1);
  overview.replicas.forEach((replica, i) => {
    const row = body.rows[i] ?? newReplicaRow(body);
    const [word, kind] = STATES[replica.state] ?? [replica.state, "calm"];
    const used = replica.kv_capacity_tokens > 0 ? 1 - replica.free_kv_tokens / replica.kv_capacity_tokens : 0;
    const cells = row.cells;
    setText(cells[0].firstChild, shortened(replica.name.split("#").at(-1), 20)); // Ray: application#deployment#id
    cells[0].title = shown(replica.name);
    setText(cells[1].firstChild, word);
    cells[1].firstChild.className = `chip ${kind}`;
    const meter = cells[2].firstChild;
    meter.setAttribute("aria-valuenow", String(Math.round(used * 100)));
    meter.firstChild.style.width = `${Math.max(0, Math.min(1, used)) * 100}%`;
    setText(cells[2].lastChild, percent(used));
    setText(cells[3], `${num(replica.running)} of ${num(replica.max_slots)}`);
    setText(cells[4], num(replica.waiting));
    setText(cells[5], num(replica.granted_unconfirmed));
    setText(cells[6], num(replica.tokens_per_s));
    setText(cells[7], seconds(replica.report_age_s));
    cells[7].classList.toggle("alarm", replica.state === "stale");
  });
  const note = byId("replicas-note");
  note.hidden = overview.replicas.length > 0;
  setText(note, "No replica has reported yet.");
  const calls = overview.routers.map(({ name, requests, call_age_s: age }) => `${shortened(name, 20)}: ${num(requests)} requests, called ${seconds(age)} ago`);
  setText(byId("routers"), calls.length ? `Routers: ${calls.slice(0, 6).join(" · ")}${calls.length > 6 ? ` · and ${calls.length - 6} more` : ""}` : "No router has called yet.");
  const numLive = overview.replicas.filter(({ state }) => state === "live").length;
  setText(byId("mode"), `${numLive} of ${overview.replicas.length} live`);
}

function newReplicaRow(body) {
  const row = body.insertRow();
  const meter = element("span", { className: "meter", role: "meter", "aria-label": "KV cache in use", "aria-valuemin": "0", "aria-valuemax": "100" }, element("span", { className: "fill" }));
  row.append(
    element("th", { scope: "row" }, element("bdi")),
    element("td", {}, element("span", { className: "chip" })),
    element("td", { className: "use" }, meter, element("span", { className: "value" })),
    ...["number", "number low", "number low", "number low", "number"].map((className) => element("td", { className })),
  );
  return row;
}

export function showEvents(overview) {
  const wanted = byId("event-kind").value;
  const list = byId("events");
  const events = overview.events.filter(({ kind }) => !wanted || kind === wanted);
  const stamp = events.map(({ seq, count }) => `${seq}x${count}`).join(" ");
  if (list.dataset.stamp !== stamp) {
    list.dataset.stamp = stamp;
    list.replaceChildren(...events.map(eventItem));
  }
  const note = byId("events-note");
  note.hidden = events.length > 0;
  setText(note, wanted ? "No event of this kind among the last 50." : "Nothing has happened yet.");
}

function eventItem({ time_s: time, kind, text, count }) {
  const words = [shown(text)];
  if (count > 1) words.push(" ", element("span", { className: "times" }, `× ${num(count)}`));
  return element(
    "li",
    {},
    element("time", { dateTime: new Date(time * 1000).toISOString() }, clock(time)),
    chip(KINDS[kind] ?? kind, SERIOUS.has(kind) ? "warn" : "calm"),
    element("span", { className: "text" }, ...words),
  );
}

export function prepareEvents(onChange) {
  const select = byId("event-kind");
  select.append(...Object.entries(KINDS).map(([value, label]) => element("option", { value }, label)));
  select.addEventListener("change", onChange);
}
