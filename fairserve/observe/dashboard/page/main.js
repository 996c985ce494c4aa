// Asks once a second, and hands what came to whoever draws it.

import { get, hasKey, MODEL, setKey } from "./api.js";
import { drawShares, drawTimes, drawWaits, loadLibrary, readColours } from "./charts.js";
import { ClientTable } from "./clients.js";
import { sharesOf, waitsOf } from "./derive.js";
import { Detail } from "./detail.js";
import { byId, clock, seconds, setText } from "./format.js";
import { prepareEvents, showEvents, showReplicas, showTotals, showUnknown, showVerdict } from "./panels.js";
import { Store } from "./store.js";

const EVERY_MS = 1000;
const TOP = 50;
const HOUR_S = 3600;
const DRAW_PART = 0.25; // of the time, at most, goes into charts: a slow machine draws them less often

const store = new Store();
let overview = null;
let receivedMs = 0; // on the page's own clock: the service's may differ
let isPaused = false;
let isHalted = false; // until somebody gives a key
let isDrawing = false;
let canDraw = false;
let hourFetchedMs = 0;
let isCutOff = false;
let nextDrawMs = 0;
let knowsModels = false;

// ------------------------------------------------------------------------------------------------ the cycle

async function cycle() {
  const begunMs = performance.now();
  if (!isPaused && !isHalted && !document.hidden) await refresh();
  setTimeout(cycle, Math.max(100, EVERY_MS - (performance.now() - begunMs)));
}

async function refresh() {
  try {
    if (!knowsModels) await offerModels();
    const fresh = await get("overview", { top: TOP });
    if (isPaused) return; // pressed while the answer was under way
    overview = fresh;
    receivedMs = performance.now();
    if (isCutOff) store.forgetHistory();
    isCutOff = false;
    setBanner(null);
    show();
    await fetchHistory();
    if (performance.now() >= nextDrawMs) await drawCharts();
  } catch (error) {
    failed(error);
  }
  showFreshness();
}

/** Of several models, each has a page; one that has come since shows when the page is loaded again. */
async function offerModels() {
  const models = await get("models");
  knowsModels = true;
  if (models.length < 2) return;
  const select = byId("model");
  select.replaceChildren(...models.map(({ name }) => new Option(name, name, false, name === MODEL)));
  select.hidden = false;
}

function show() {
  performance.mark("show");
  store.saw(overview);
  showVerdict(overview);
  showTotals(overview);
  showReplicas(overview);
  showEvents(overview);
  table.saw(overview);
  detail.saw(overview);
  performance.measure("fairserve-show", "show");
}

async function fetchHistory() {
  const wantsHour = chosen("window") === HOUR_S;
  if (wantsHour && performance.now() - hourFetchedMs > 60_000) {
    hourFetchedMs = performance.now();
    store.forgetHour();
  }
  await store.fetchHistory(overview.time_s, wantsHour);
}

// ----------------------------------------------------------------------------------------------- the charts

const visible = new Set();
const CHARTS = {
  "chart-service": (state) =>
    drawTimes("chart-service", state, chosen("what"), { title: "Service per client", empty: "No service yet." }),
  "chart-shares": (state) => drawShares("chart-shares", state),
  "chart-lead": (state) => drawTimes("chart-lead", state, "lead", { title: "Lead per client", empty: "Nobody waits or runs." }),
  "chart-backlog": (state) =>
    drawTimes("chart-backlog", state, "waiting", { title: "Waiting requests per client", empty: "Nobody waits." }),
  "chart-wait": (state) => drawWaits("chart-wait", state),
};

const choices = { what: "rate", window: 600 };
const chosen = (name) => choices[name];

/** Draws what is on the screen, each chart in a task of its own, so that keys and scrolling come between. */
async function drawCharts() {
  if (!canDraw || isDrawing || !overview) return;
  isDrawing = true;
  let tookMs = 0;
  try {
    const names = store.names();
    const state = {
      store,
      overview,
      nowS: overview.time_s,
      startedS: overview.started_s,
      windowS: chosen("window"),
      shares: sharesOf(overview, names),
      waits: waitsOf(overview, names),
    };
    for (const [id, drawOne] of Object.entries(CHARTS)) {
      if (!visible.has(id)) continue;
      await new Promise((resolve) => setTimeout(resolve));
      performance.mark("draw");
      await drawOne(state);
      tookMs += performance.measure("fairserve-draw", { start: "draw", detail: id }).duration;
    }
  } finally {
    isDrawing = false;
    nextDrawMs = performance.now() + tookMs * (1 / DRAW_PART - 1) - EVERY_MS / 2;
  }
}

function describeService() {
  const words = { rate: "Service received per second, mean of 10 s", total: "Service received since the left edge" };
  const mean = chosen("window") === HOUR_S ? "Service received per second, mean of a minute" : words.rate;
  setText(byId("service-sub"), `${chosen("what") === "rate" ? mean : words.total}. Clients that wait and weigh the same run side by side.`);
}

// --------------------------------------------------------------------------------------- freshness, outages

const HINTS = {
  401: "The key is missing or wrong.",
  403: "This key does not open the admin API.",
};

function failed(error) {
  if (error.needsKey) {
    isHalted = true;
    setBanner(`No data without an admin key. ${error.message}`);
    showUnknown("The page needs an admin key.");
    askKey(hasKey() ? (HINTS[error.status] ?? error.message) : undefined);
    return;
  }
  isCutOff = true;
  if (error.code === "counter_unreachable") {
    setBanner(
      "Degraded mode: the counter actor does not answer. Requests are still served, each replica in the order of the last counters it knows; nothing here is current.",
    );
    showUnknown("The counter actor does not answer, so nobody can tell now.");
  } else if (error.status === 0) {
    setBanner(`The service does not answer. ${error.message}`);
    showUnknown("The service does not answer.");
  } else {
    setBanner(`The admin API failed. ${error.message ?? error}`);
    if (error.status === undefined) console.error(error);
    else showUnknown("The admin API failed.");
  }
}

function setBanner(text) {
  byId("banner").hidden = text === null;
  byId("main").classList.toggle("old", text !== null && overview !== null);
  setText(byId("banner-text"), text ?? "");
}

const ageS = () => (performance.now() - receivedMs) / 1000;

function showFreshness() {
  const isDown = !byId("banner").hidden;
  const state = isPaused ? "paused" : isDown ? "down" : overview ? "live" : "waiting";
  byId("freshness").dataset.state = state;
  const at = overview ? clock(overview.time_s) : "";
  const words = { paused: `paused at ${at}`, down: "no data", live: `live, ${at}`, waiting: "connecting" };
  setText(byId("freshness-text"), words[state]);
  const age = overview ? `Last answer ${seconds(ageS())} ago, at ${at}.` : "There was no answer yet.";
  setText(byId("banner-age"), isDown && !isHalted ? age : "");
}

// ------------------------------------------------------------------------------------------------- controls

const table = new ClientTable({
  open: (name) => {
    detail.open(name);
    if (overview) detail.saw(overview);
  },
  slotOf: (name) => store.slot(name),
  failed,
});

const detail = new Detail({
  pins: {
    has: (name) => store.drawn.has(name),
    set: (name, isPinned) => {
      store.pin(name, isPinned, overview.time_s);
      redraw();
    },
  },
  askKey,
  changed: () => refresh(),
});

function redraw() {
  if (!overview) return;
  fetchHistory().then(drawCharts).catch(failed);
}

function askKey(why) {
  const dialog = byId("key-dialog");
  setText(byId("key-said"), why ?? "");
  byId("key-said").classList.toggle("error", Boolean(why));
  if (!dialog.open) dialog.showModal();
}

function useKey(typed) {
  try {
    setKey(typed);
  } catch (error) {
    setText(byId("key-said"), error.message);
    byId("key-said").classList.add("error");
    return;
  }
  byId("key-input").value = "";
  byId("key-dialog").close();
  detail.showLock();
  isHalted = false;
  refresh();
}

byId("model").addEventListener("change", ({ target }) => {
  const url = new URL(location.href);
  url.searchParams.set("model", target.value);
  location.assign(url);
});

byId("key").addEventListener("click", () => askKey());
byId("key-close").addEventListener("click", () => byId("key-dialog").close());
byId("key-forget").addEventListener("click", () => useKey(""));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key-input").value);
});

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  setText(byId("pause"), isPaused ? "Go on" : "Pause");
  if (!isPaused) isCutOff = true; // what passed meanwhile comes from the history
  showFreshness();
});

for (const name of ["what", "window"]) {
  for (const input of document.querySelectorAll(`input[name="${name}"]`)) {
    if (input.checked) choices[name] = name === "window" ? Number(input.value) : input.value;
    input.addEventListener("change", () => {
      choices[name] = name === "window" ? Number(input.value) : input.value;
      describeService();
      redraw();
    });
  }
}

const THEMES = ["auto", "light", "dark"];
const root = document.documentElement;

function setTheme(theme) {
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  setText(byId("theme"), `Theme: ${theme}`);
  try {
    localStorage.setItem("fairserve-theme", theme);
  } catch {
    // Storage is forbidden: the choice lives as long as the page.
  }
  readColours();
  drawCharts();
}

byId("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readColours();
  drawCharts();
});

// ---------------------------------------------------------------------------------------------------- start

prepareEvents(() => overview && showEvents(overview));
setText(byId("theme"), `Theme: ${root.dataset.theme ?? "auto"}`);
readColours();
describeService();
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) visible.add(target.id);
    else visible.delete(target.id);
  }
  drawCharts();
}, { rootMargin: "400px" });
for (const id of Object.keys(CHARTS)) watcher.observe(byId(id));
addEventListener("resize", () => drawCharts());
document.addEventListener("visibilitychange", () => {
  isCutOff = true;
  if (!document.hidden && !isPaused && !isHalted) refresh();
});
setInterval(showFreshness, 1000);
loadLibrary().then(
  () => {
    canDraw = true;
    drawCharts();
  },
  (error) => {
    for (const note of document.querySelectorAll(".chart-box .note")) setText(note, error.message);
  },
);
cycle();
