// The five charts, drawn by plotly, which is loaded after the page: the verdict and the tables do not wait for it.

import { byId, escaped, num, percent, seconds, setText, shortened, shown } from "./format.js";

const DASHES = ["solid", "solid", "solid", "solid", "dash", "dash", "dot", "dot"];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const CONFIG = { displayModeBar: false, responsive: false, doubleClick: false, showTips: false };
const LINE_LABEL_PX = 15; // between the labels at the lines' ends
const ROW_PX = 44;
const MAX_ROW_PX = 62;

let library = null;
let colours = null;

/** Resolves when plotly is there; rejects with a sentence for people. */
export function loadLibrary() {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", import.meta.url);
    script.onload = () => {
      library = window.Plotly;
      resolve();
    };
    script.onerror = () =>
      reject(new Error("The charts cannot be drawn: the chart library is missing on the server (pip install plotly)."));
    document.head.append(script);
  });
}

/** Reads the theme's colours from the style sheet; call it when the theme changes. */
export function readColours() {
  const probe = document.createElement("i");
  document.body.append(probe);
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  colours = {
    text: read("text"),
    muted: read("muted"),
    grid: read("grid"),
    panel: read("panel"),
    border: read("border"),
    other: read("muted"),
    slots: DASHES.map((_, slot) => read(`c${slot}`)),
  };
  probe.remove();
}

const ofSlot = (slot) => (slot === null ? colours.other : colours.slots[slot]);

/** The chart library takes a date's UTC fields as they are, so local time is handed over as if it were UTC. */
const asDate = (unix) => (unix - new Date(unix * 1000).getTimezoneOffset() * 60) * 1000;

function draw(id, traces, layout) {
  const target = byId(id);
  return library.react(
    target,
    traces,
    {
      width: target.clientWidth,
      height: target.clientHeight,
      autosize: false,
      showlegend: false,
      dragmode: false,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, size: 12, color: colours.muted },
      hoverlabel: { bgcolor: colours.panel, bordercolor: colours.border, font: { color: colours.text, size: 12 } },
      ...layout,
    },
    CONFIG,
  );
}

/** Says in words what a chart shows, for those who do not see it, and shows the note where there is nothing to draw. */
function describe(id, text, emptyText) {
  byId(id).setAttribute("aria-label", text);
  const note = byId(`${id}-note`);
  note.hidden = !emptyText;
  setText(note, emptyText ?? "");
}

/** Labels at the lines' ends, moved apart where they would lie on each other. `ends`: [{ y, text, colour }]. */
function endLabels(ends, top, height) {
  const px = (value) => (1 - value / top) * height;
  const placed = ends.map((end) => ({ ...end, at: px(end.y) })).sort((a, b) => a.at - b.at);
  for (let i = 1; i < placed.length; i += 1) placed[i].at = Math.max(placed[i].at, placed[i - 1].at + LINE_LABEL_PX);
  for (let i = placed.length - 1; i >= 0; i -= 1) {
    const below = i === placed.length - 1 ? height : placed[i + 1].at - LINE_LABEL_PX;
    placed[i].at = Math.min(placed[i].at, below);
  }
  return placed.map(({ at, text, colour }) => ({
    x: 1,
    xref: "paper",
    xanchor: "left",
    xshift: 6,
    y: 1 - at / height,
    yref: "paper",
    yanchor: "middle",
    showarrow: false,
    text,
    font: { color: colour, size: 12 },
  }));
}

/** Lines of the drawn clients over time. `what`: rate, total, lead or waiting. */
export function drawTimes(id, state, what, words) {
  const { store, nowS, windowS, startedS } = state;
  const isNarrow = byId(id).clientWidth < 480;
  const margin = { l: 44, r: isNarrow ? 92 : 128, t: 10, b: 26 };
  const height = byId(id).clientHeight - margin.t - margin.b;
  const from = Math.max(nowS - windowS, Math.min(startedS, nowS - 60));
  const ends = [];
  let top = 0;
  const traces = store.names().map((name) => {
    const slot = store.slot(name);
    const [times, values] = store.series(name, what, nowS, windowS);
    for (const value of values) if (value > top) top = value;
    const last = values.findLast((value) => value !== null);
    const label = escaped(shortened(name, isNarrow ? 11 : 16));
    if (last !== undefined && times.at(-1) > nowS - Math.max(90, windowS / 20)) ends.push({ y: last, text: label, colour: ofSlot(slot) });
    return {
      type: "scatter",
      mode: "lines",
      name: escaped(shortened(name, 32)),
      x: times.map(asDate),
      y: values,
      connectgaps: false,
      line: { color: ofSlot(slot), width: what === "lead" ? 1.5 : 2, dash: DASHES[slot], shape: what === "waiting" ? "hv" : "linear" },
      hovertemplate: `%{y:,.3~s}<extra>%{fullData.name}</extra>`,
    };
  });
  const isEmpty = !ends.length || (top === 0 && what !== "lead");
  const bound = what === "lead" ? state.overview.verdict.bound : 0;
  const isBoundSeen = bound > 0 && top > bound / 3; // else it would press all lines to the ground
  const ceiling = Math.max(top, isBoundSeen ? bound : 0) * 1.08 || 1;
  traces.reverse(); // who asks most is drawn last, on top
  const sorted = [...ends].sort((a, b) => b.y - a.y);
  const values = sorted.map(({ text, y }) => `${text} ${num(y)}`).join(", ");
  describe(id, `${words.title}. ${isEmpty ? words.empty : `Now: ${values}.`}`, isEmpty ? words.empty : null);
  return draw(id, isEmpty ? [] : traces, {
    margin,
    hovermode: isEmpty ? false : "x unified",
    xaxis: {
      visible: !isEmpty,
      type: "date",
      range: [asDate(from), asDate(nowS)],
      tickformat: windowS > 300 ? "%H:%M" : "%H:%M:%S",
      hoverformat: "%H:%M:%S",
      nticks: isNarrow ? 4 : 6,
      fixedrange: true,
      showgrid: false,
      ticks: "outside",
      ticklen: 4,
      tickcolor: colours.border,
      linecolor: colours.border,
      showline: true,
      zeroline: false,
    },
    yaxis: {
      visible: !isEmpty,
      range: [0, ceiling],
      nticks: 5,
      tickformat: top < 10 ? "~g" : "~s",
      fixedrange: true,
      gridcolor: colours.grid,
      zeroline: false,
    },
    annotations: isEmpty ? [] : [...endLabels(ends, ceiling, height), ...marks(state, from, byId(id).clientWidth - margin.l - margin.r), ...(isBoundSeen ? [boundLabel(bound)] : [])],
    shapes: isEmpty ? [] : [
      ...state.overview.events.filter((event) => isMark(event, from)).map((event) => mark(event)),
      ...(isBoundSeen ? [boundLine(bound)] : []),
    ],
  });
}

const boundLine = (bound) => ({
  type: "line",
  xref: "paper",
  x0: 0,
  x1: 1,
  y0: bound,
  y1: bound,
  line: { color: colours.text, width: 1.5, dash: "dashdot" },
});

const boundLabel = (bound) => ({
  xref: "paper",
  x: 0,
  xanchor: "left",
  y: bound,
  yanchor: "bottom",
  showarrow: false,
  text: `bound ${num(bound)}`,
  font: { size: 12, color: colours.text },
});

const MARKED = { started: "restart", changed: "change" };
const isMark = (event, from) => event.kind in MARKED && event.time_s > from + 5;

function mark(event) {
  const at = asDate(event.time_s);
  const line = { color: colours.muted, width: 1, dash: "dot" };
  return { type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line, layer: "below" };
}

function marks(state, from, widthPx) {
  const apart = (60 / widthPx) * (state.nowS - from); // a word's width
  let lastS = Infinity;
  const withRoom = state.overview.events.filter((event) => {
    if (!isMark(event, from) || lastS - event.time_s < apart) return false;
    lastS = event.time_s; // newest first; where two are close the newer one has its word
    return true;
  });
  return withRoom.map((event) => ({
    x: asDate(event.time_s),
    y: 1,
    yref: "paper",
    yanchor: "top",
    xanchor: event.time_s - from < apart ? "left" : "right",
    showarrow: false,
    text: MARKED[event.kind],
    font: { size: 11, color: colours.muted },
    bgcolor: colours.panel,
  }));
}

/** Rows of bars share their names' column, so that a client lies at the same height in both charts. */
function rows(id, labels, layout) {
  const isNarrow = byId(id).clientWidth < 480;
  return {
    margin: { l: isNarrow ? 100 : 136, r: 52, t: 4, b: 4 },
    bargap: 0.28,
    bargroupgap: 0.12,
    hovermode: "closest",
    xaxis: { visible: false, fixedrange: true, ...layout.xaxis },
    yaxis: {
      range: [labels.length - 0.5, -0.5],
      tickvals: labels.map((_, i) => i),
      ticktext: labels.map((label) => escaped(shortened(label, isNarrow ? 11 : 15))),
      tickfont: { color: colours.text, size: 12 },
      ticklabelstandoff: 5,
      fixedrange: true,
      showgrid: false,
      zeroline: false,
    },
    ...layout.rest,
  };
}

/** As high as its rows need, and as its neighbours are. */
function fit(id, numRows) {
  const box = byId(id).parentElement;
  const room = parseFloat(getComputedStyle(box).minHeight) / Math.max(1, numRows);
  const height = `${Math.max(1, numRows) * Math.min(MAX_ROW_PX, Math.max(ROW_PX, room)) + 8}px`;
  if (byId(id).style.height !== height) byId(id).style.height = height;
}

/** For each drawn client its share of the waiting requests, of the service, and what its weight entitles it to. */
export function drawShares(id, state) {
  const { shares, store } = state;
  fit(id, shares.length);
  const colour = shares.map(({ name, isRest }) => ofSlot(isRest ? null : store.slot(name)));
  const y = shares.map((_, i) => i);
  const most = Math.max(0.01, ...shares.flatMap(({ asks, gets, due }) => [asks, gets, due ?? 0]));
  const labels = shares.map(({ name }) => name);
  const bar = (field, more) => ({
    type: "bar",
    orientation: "h",
    y,
    x: shares.map((share) => share[field]),
    text: shares.map((share) => percent(share[field])),
    textposition: "outside",
    cliponaxis: false,
    textfont: { color: colours.text, size: 12 },
    customdata: shares.map((share) => escaped(shortened(share.name, 32))),
    ...more,
  });
  const ticks = shares.flatMap(({ due }, i) => (due === null ? [] : [{ due, i }]));
  const text = shares.map(({ name, asks, gets }) => `${shown(name)} asks ${percent(asks)}, gets ${percent(gets)}`);
  describe(id, `Share of the waiting requests and of the service. ${text.join("; ")}.`, shares.length ? null : "Nobody asks for anything now.");
  return draw(
    id,
    [
      bar("asks", {
        offsetgroup: "asks",
        marker: { color: colour, opacity: 0.9, pattern: { shape: "/", fillmode: "replace", size: 5, solidity: 0.35, fgcolor: colour }, line: { color: colour, width: 1 } },
        hovertemplate: "%{customdata}: %{x:.1%} of the waiting requests<extra></extra>",
      }),
      bar("gets", {
        offsetgroup: "gets",
        text: "",
        marker: { color: colour },
        hovertemplate: "%{customdata}: %{x:.1%} of the service<extra></extra>",
      }),
      {
        type: "scatter", // right of the bar, or of the mark where that is in the way
        mode: "text",
        y: y.map((i) => i + 0.18),
        x: shares.map(({ gets, due }) => (due > gets && due < gets + most * 0.15 ? due : gets) + most * 0.008),
        text: shares.map(({ gets }) => percent(gets)),
        textposition: "middle right",
        textfont: { color: colours.text, size: 12 },
        cliponaxis: false,
        hoverinfo: "skip",
      },
    ],
    rows(id, labels, {
      xaxis: { range: [0, most * 1.02] },
      rest: {
        shapes: ticks.map(({ due, i }) => ({
          type: "line",
          x0: due,
          x1: due,
          y0: i - 0.01,
          y1: i + 0.4,
          line: { color: colours.text, width: 3 },
        })),
      },
    }),
  );
}

/** How long requests of the drawn clients waited of late, and how long the oldest has waited. */
export function drawWaits(id, state) {
  const { waits, store } = state;
  fit(id, waits.length);
  const colour = waits.map(({ name }) => ofSlot(store.slot(name)));
  const y = waits.map((_, i) => i);
  const most = Math.max(0.1, ...waits.flatMap(({ mean, oldest }) => [mean, oldest]));
  const text = waits.map(({ name, mean, oldest }) => `${shown(name)} ${seconds(mean)}, oldest ${seconds(oldest)}`);
  describe(id, `Mean wait and age of the oldest waiting request. ${text.join("; ")}.`, waits.length ? null : "Nobody waits.");
  const bar = (field, more) => ({
    type: "bar",
    orientation: "h",
    y,
    x: waits.map((wait) => wait[field]),
    text: waits.map((wait) => (wait[field] === null ? "" : seconds(wait[field]))),
    textposition: "outside",
    cliponaxis: false,
    textfont: { color: colours.text, size: 12 },
    customdata: waits.map((wait) => escaped(shortened(wait.name, 32))),
    ...more,
  });
  return draw(
    id,
    [
      bar("oldest", {
        offsetgroup: "oldest",
        marker: { color: colour, pattern: { shape: "/", fillmode: "replace", size: 5, solidity: 0.35, fgcolor: colour }, line: { color: colour, width: 1 } },
        hovertemplate: "%{customdata}: the oldest waits %{x:.1f} s<extra></extra>",
      }),
      bar("mean", {
        offsetgroup: "mean",
        marker: { color: colour },
        hovertemplate: "%{customdata}: mean wait %{x:.1f} s<extra></extra>",
      }),
    ],
    rows(id, waits.map(({ name }) => name), { xaxis: { range: [0, most * 1.02] }, rest: {} }),
  );
}
