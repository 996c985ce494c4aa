// What the charts draw: which clients, in which colour, and their points over time.

import { get } from "./api.js";

export const NUM_DRAWN = 8;
const FINE_S = 660; // one point a second for the last 10 minutes, and what a rate needs before them
const RATE_S = 10; // as the service's own service_per_s
const SCORE_MEMORY = 0.9; // of a score, each second
const MIN_STAY_S = 15; // a drawn client is not replaced sooner, so that colours do not flicker

/** Points of one client: equally long arrays, times rising, null where nothing is known. */
class Points {
  times = [];
  service = [];
  waiting = [];
  lead = [];

  add(time, service, waiting, lead) {
    if (time <= (this.times.at(-1) ?? 0)) return;
    this.times.push(time);
    this.service.push(service);
    this.waiting.push(waiting);
    this.lead.push(lead);
  }

  forgetBefore(time) {
    const first = this.times.findIndex((at) => at >= time);
    if (first < 60) return; // now and then, not each second
    for (const list of [this.times, this.service, this.waiting, this.lead]) list.splice(0, first);
  }

  /** Service per second over the `span` seconds before each point, null where that reaches before the first. */
  rates(span) {
    const { times, service } = this;
    let from = 0;
    return times.map((time, i) => {
      while (from < i && times[from + 1] <= time - span) from += 1;
      const passed = time - times[from];
      if (passed < span * 0.5 || passed > span * 3 || service[i] === null || service[from] === null) return null;
      const made = service[i] - service[from];
      return made < 0 ? null : made / passed;
    });
  }
}

export class Store {
  drawn = new Map(); // name -> { slot, sinceS }
  pinned = new Set();
  #scores = new Map();
  #lastSlot = new Map();
  #fine = new Map(); // name -> Points, a point a second
  #coarse = new Map(); // name -> Points, a point a minute
  #asked = new Set();

  /** Clients of the charts, who asks and gets most first. */
  names() {
    return [...this.drawn.keys()].sort((a, b) => this.#score(b) - this.#score(a));
  }

  slot(name) {
    return this.drawn.get(name)?.slot ?? null;
  }

  /** Takes in one overview: chooses whom to draw, and adds a point for each of them. */
  saw(overview) {
    this.#rate(overview);
    this.#choose(overview.time_s);
    for (const client of overview.clients) {
      if (!this.drawn.has(client.name)) continue;
      const points = this.#points(this.#fine, client.name);
      points.add(overview.time_s, client.service, client.waiting, client.lead);
      points.forgetBefore(overview.time_s - FINE_S);
    }
  }

  pin(name, isPinned, timeS) {
    if (isPinned) this.pinned.add(name);
    else this.pinned.delete(name);
    if (isPinned && !this.drawn.has(name)) this.#draw(name, timeS);
  }

  /** Fetches what was before for clients that have no history here yet. */
  async fetchHistory(nowS, wantsHour) {
    await this.#fetch(this.#fine, "fine", nowS - FINE_S, 1);
    if (wantsHour) await this.#fetch(this.#coarse, "coarse", nowS - 3600 - 120, 60);
  }

  /** After a pause or an outage: what is kept has a hole, so ask again. */
  forgetHistory() {
    this.#asked.clear();
  }

  forgetHour() {
    for (const name of this.drawn.keys()) this.#asked.delete(`coarse ${name}`);
  }

  /** [times, values] of one client in the last `windowS`; `what`: rate, total, waiting or lead. */
  series(name, what, nowS, windowS) {
    const isHour = windowS > FINE_S;
    const points = this.#points(isHour ? this.#coarse : this.#fine, name);
    const values = what === "rate" ? points.rates(isHour ? 60 : RATE_S) : points[what === "total" ? "service" : what];
    // At most some 300 points: one per step, at times that do not shift as the window moves.
    const step = isHour ? 60 : Math.max(1, Math.round(windowS / 300));
    const times = [];
    const out = [];
    let lastBucket = null;
    let lastTime = null;
    for (let i = 0; i < points.times.length; i += 1) {
      const at = points.times[i];
      if (at < nowS - windowS) continue;
      const bucket = Math.floor(at / step);
      if (bucket === lastBucket && i < points.times.length - 1) continue;
      if (lastTime !== null && at - lastTime > 3 * Math.max(step, 2)) {
        times.push(lastTime + 0.001); // a hole is a hole, not a line across it
        out.push(null);
      }
      times.push(at);
      out.push(values[i]);
      lastBucket = bucket;
      lastTime = at;
    }
    if (what === "total") {
      const first = out.find((value) => value !== null) ?? 0;
      return [times, out.map((value) => (value === null ? null : value - first))];
    }
    return [times, out];
  }

  #score(name) {
    return (this.pinned.has(name) ? 10 : 0) + (this.#scores.get(name) ?? 0);
  }

  #rate(overview) {
    const isFirst = this.#scores.size === 0;
    const fresh = new Map();
    for (const client of overview.clients) {
      const asks = overview.waiting > 0 ? client.waiting / overview.waiting : 0;
      const gets = overview.service_per_s > 0 ? client.service_per_s / overview.service_per_s : 0;
      fresh.set(client.name, asks + gets + (client.running > 0 ? 1e-6 : 0));
    }
    for (const name of new Set([...this.#scores.keys(), ...fresh.keys()])) {
      const now = fresh.get(name) ?? 0;
      const score = isFirst ? now : SCORE_MEMORY * (this.#scores.get(name) ?? 0) + (1 - SCORE_MEMORY) * now;
      if (score > 1e-9) this.#scores.set(name, score);
      else this.#scores.delete(name);
    }
  }

  #choose(timeS) {
    const outside = [...this.#scores.keys()].filter((name) => !this.drawn.has(name));
    outside.sort((a, b) => this.#scores.get(b) - this.#scores.get(a));
    for (const name of outside) {
      if (this.drawn.size < NUM_DRAWN) {
        this.#draw(name, timeS);
        continue;
      }
      const leaver = this.#leaver(timeS);
      if (leaver === null || this.#score(name) < 1.5 * this.#score(leaver) + 0.01) return;
      this.#remove(leaver);
      this.#draw(name, timeS);
    }
  }

  #leaver(timeS) {
    const old = [...this.drawn].filter(([name, { sinceS }]) => !this.pinned.has(name) && timeS - sinceS >= MIN_STAY_S);
    old.sort(([a], [b]) => this.#score(a) - this.#score(b));
    return old.length ? old[0][0] : null;
  }

  #draw(name, timeS) {
    if (this.drawn.size >= NUM_DRAWN) {
      const others = [...this.drawn.keys()].filter((one) => !this.pinned.has(one) || one !== name);
      others.sort((a, b) => this.#score(a) - this.#score(b));
      this.#remove(others[0]);
    }
    const taken = new Set([...this.drawn.values()].map(({ slot }) => slot));
    const free = [...Array(NUM_DRAWN).keys()].filter((slot) => !taken.has(slot));
    const before = this.#lastSlot.get(name);
    const slot = free.includes(before) ? before : free[0];
    this.#lastSlot.set(name, slot);
    this.drawn.set(name, { slot, sinceS: timeS });
  }

  #remove(name) {
    this.drawn.delete(name);
    this.pinned.delete(name);
    this.#fine.delete(name);
    this.#coarse.delete(name);
    this.#asked.delete(`fine ${name}`);
    this.#asked.delete(`coarse ${name}`);
  }

  #points(table, name) {
    if (!table.has(name)) table.set(name, new Points());
    return table.get(name);
  }

  async #fetch(table, word, since, resolution) {
    const names = [...this.drawn.keys()].filter((name) => !this.#asked.has(`${word} ${name}`));
    if (!names.length) return;
    for (const name of names) this.#asked.add(`${word} ${name}`);
    let history;
    try {
      history = await get("history", { client: names, since: Math.max(0, Math.floor(since)), resolution });
    } catch (error) {
      for (const name of names) this.#asked.delete(`${word} ${name}`);
      throw error;
    }
    for (const name of names) {
      const known = history.clients[name];
      if (!known || !this.drawn.has(name)) continue;
      const merged = new Points();
      history.times_s.forEach((at, i) => merged.add(at, known.service[i], known.waiting[i], known.lead[i]));
      const live = this.#points(table, name);
      live.times.forEach((at, i) => merged.add(at, live.service[i], live.waiting[i], live.lead[i]));
      table.set(name, merged);
    }
  }
}
