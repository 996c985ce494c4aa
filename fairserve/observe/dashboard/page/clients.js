// The table of clients: the busiest of the overview, or, for a search, another order or another page, what /clients says.

import { get } from "./api.js";
import { budgetRank, budgetText, budgetTone, hasBudget } from "./budgets.js";
import { stateOf } from "./derive.js";
import { byId, element, num, percent, seconds, setText, shown } from "./format.js";

const PAGE = 50;
const COLUMNS = [
  { key: "name", label: "Client", order: "name" },
  { key: "state", label: "State", value: (client) => stateOf(client)[0], rank: "low" },
  { key: "weight", label: "Weight", order: "weight", text: ({ weight }) => num(weight), rank: "low" },
  { key: "waiting", label: "Waiting", order: "waiting", text: ({ waiting }) => num(waiting) },
  { key: "running", label: "Running", order: "running", text: ({ running }) => num(running), rank: "low" },
  { key: "mean_wait_s", label: "Mean wait", text: (client) => seconds(client.mean_wait_s) },
  { key: "oldest_wait_s", label: "Oldest", text: (client) => (client.waiting > 0 ? seconds(client.oldest_wait_s) : "–"), rank: "low" },
  { key: "service_per_s", label: "Service/s", order: "service_per_s", text: (client) => num(client.service_per_s), rank: "low" },
  { key: "share", label: "Share", value: (client) => client.service_per_s, text: (client, all) => percent(all > 0 ? client.service_per_s / all : 0) },
  { key: "lead", label: "Lead", order: "lead", text: ({ lead }) => num(lead), rank: "low" },
  { key: "service", label: "Received", order: "service", text: ({ service }) => num(service), rank: "low" },
  { key: "num_refused", label: "Refused", text: (client) => num(client.num_refused), rank: "low" },
  { key: "budget", label: "Budget", value: budgetRank, text: budgetText, tone: budgetTone, rank: "low budget" },
];

export class ClientTable {
  #table = byId("clients-table");
  #rows = new Map(); // name -> row
  #sort = COLUMNS.find(({ key }) => key === "service_per_s");
  #isDescending = true;
  #offset = 0;
  #search = "";
  #overview = null;
  #isHeld = false; // rows stay where they are while a pointer or the focus is on them
  #asked = 0;

  /** `open(name)` shows a client's details; `slotOf(name)` is its colour in the charts, or null; `failed(error)`. */
  constructor({ open, slotOf, failed }) {
    this.open = open;
    this.slotOf = slotOf;
    this.failed = failed;
    this.#table.tHead.rows[0].append(...COLUMNS.map((column) => this.#header(column)));
    const body = this.#table.tBodies[0];
    const hold = (isHeld) => () => {
      this.#isHeld = isHeld;
    };
    body.addEventListener("pointerenter", hold(true));
    body.addEventListener("pointerleave", hold(false));
    body.addEventListener("focusin", hold(true));
    body.addEventListener("focusout", hold(false));
    let typing = null;
    byId("search").addEventListener("input", ({ target }) => {
      clearTimeout(typing);
      typing = setTimeout(() => this.#turn(() => {
        this.#search = target.value.trim();
        this.#offset = 0;
      }), 200);
    });
    byId("previous").addEventListener("click", () => this.#turn(() => (this.#offset = Math.max(0, this.#offset - PAGE))));
    byId("next").addEventListener("click", () => this.#turn(() => (this.#offset += PAGE)));
    this.#markSorted();
  }

  /** Draws the newest; asks the service where the overview does not hold what is wanted. */
  async saw(overview) {
    this.#overview = overview;
    const page = this.#fromOverview(overview);
    if (page) return this.#draw(page.clients, page.total, overview);
    const asked = ++this.#asked;
    const params = { offset: this.#offset, limit: PAGE, order: this.#sort.order ?? "service_per_s", search: this.#search };
    try {
      const answer = await get("clients", params);
      if (asked === this.#asked) this.#draw(answer.clients, answer.total, overview);
    } catch (error) {
      this.failed(error);
    }
  }

  /** Everything is here when the overview holds all clients; its first page is here unless something else is wanted. */
  #fromOverview({ clients, num_clients: total }) {
    this.#asked += 1;
    if (clients.length >= total) {
      const found = clients.filter(({ name }) => name.includes(this.#search));
      return { clients: found, total: found.length };
    }
    const isFirst = !this.#search && this.#offset === 0 && this.#sort.key === "service_per_s";
    return isFirst ? { clients: clients.slice(0, PAGE), total } : null;
  }

  #holdsAll() {
    return !this.#overview || this.#overview.clients.length >= this.#overview.num_clients;
  }

  #turn(change) {
    change();
    this.#isHeld = false;
    this.#markSorted();
    if (this.#overview) this.saw(this.#overview);
  }

  #header(column) {
    const button = element("button", { type: "button" }, column.label, element("span", { className: "arrow", "aria-hidden": "true" }));
    button.addEventListener("click", () => this.#turn(() => {
      // Of a part of the clients the service gives the greatest first; only a whole list can be turned round.
      if (this.#sort === column && this.#holdsAll()) this.#isDescending = !this.#isDescending;
      else if (this.#sort !== column) this.#isDescending = column.key !== "name" && column.key !== "state";
      this.#sort = column;
      this.#offset = 0;
    }));
    const kind = `${column.text ? "number" : ""} ${column.rank ?? ""}`.trim();
    return element("th", { scope: "col", className: kind, "data-key": column.key }, button);
  }

  #markSorted() {
    for (const header of this.#table.tHead.rows[0].cells) {
      if (header.dataset.key !== this.#sort.key) header.removeAttribute("aria-sort");
      else header.setAttribute("aria-sort", this.#isDescending ? "descending" : "ascending");
    }
  }

  #sorted(clients) {
    const value = this.#sort.value ?? ((client) => client[this.#sort.key]);
    const sign = this.#isDescending ? -1 : 1;
    return [...clients].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return x === y ? (a.name < b.name ? -1 : 1) : sign * (x < y ? -1 : 1);
    });
  }

  #draw(clients, total, overview) {
    const body = this.#table.tBodies[0];
    const list = this.#sorted(clients);
    const names = new Set(list.map(({ name }) => name));
    const isSame = names.size === this.#rows.size && [...names].every((name) => this.#rows.has(name));
    for (const [name, row] of this.#rows) {
      if (names.has(name)) continue;
      row.remove();
      this.#rows.delete(name);
    }
    this.#table.classList.toggle("unbounded", !list.some(hasBudget));
    const focused = document.activeElement;
    list.forEach((client, i) => {
      let row = this.#rows.get(client.name);
      if (!row) this.#rows.set(client.name, (row = this.#newRow(client.name)));
      this.#fill(row, client, overview.service_per_s);
      if (body.rows[i] !== row && !(this.#isHeld && isSame)) body.insertBefore(row, body.rows[i] ?? null);
    });
    if (focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
    const last = this.#offset + list.length;
    setText(byId("clients-count"), this.#countText(list.length, total));
    byId("previous").disabled = this.#offset === 0;
    byId("next").disabled = last >= total;
    byId("previous").parentElement.hidden = this.#offset === 0 && last >= total;
    const note = byId("clients-note");
    note.hidden = list.length > 0;
    setText(note, this.#search ? `No client's name holds “${shown(this.#search)}”.` : "No client has sent a request yet.");
  }

  #countText(numShown, total) {
    const found = this.#search ? " found" : "";
    if (numShown === total) return `${num(total)}${found}`;
    return `${num(this.#offset + 1)} to ${num(this.#offset + numShown)} of ${num(total)}${found}`;
  }

  #newRow(name) {
    const row = element("tr");
    const button = element("button", { type: "button", className: "name", title: shown(name) }, element("span", { className: "line", "aria-hidden": "true" }), element("bdi", {}, shown(name)), element("span", { className: "held", hidden: true }, "paused"));
    button.addEventListener("click", () => this.open(name));
    row.append(
      element("th", { scope: "row" }, button),
      element("td", { className: "low" }, element("span", { className: "chip" })),
      ...COLUMNS.slice(2).map(({ rank }) => element("td", { className: `number ${rank ?? ""}`.trim() })),
    );
    return row;
  }

  #fill(row, client, serviceAll) {
    const slot = this.slotOf(client.name);
    const line = row.cells[0].firstChild.firstChild;
    const className = slot === null ? "line" : `line c${slot}`;
    if (line.className !== className) line.className = className;
    row.cells[0].firstChild.lastChild.hidden = !client.is_paused;
    const [word, kind] = stateOf(client);
    setText(row.cells[1].firstChild, word);
    row.cells[1].firstChild.className = `chip ${kind}`;
    for (let i = 2; i < COLUMNS.length; i += 1) {
      const { text, tone, rank } = COLUMNS[i];
      setText(row.cells[i], text(client, serviceAll));
      if (tone) row.cells[i].className = `number ${rank} ${tone(client)}`.trim();
    }
  }
}
