// One client's details and, for who has an admin key, its live controls.

import { changeClient, getClient, hasKey } from "./api.js";
import { showBudgets } from "./budgets.js";
import { chip } from "./panels.js";
import { stateOf } from "./derive.js";
import { byId, clock, element, num, percent, seconds, setText, shown } from "./format.js";

const MAX_WEIGHT = 1e6;

export class Detail {
  #dialog = byId("detail");
  #name = null;
  #client = null;
  #isAsking = false;

  /** `pins`: { has(name), set(name, isPinned) }; `askKey(why)` opens the key's dialog; `changed()` after a change. */
  constructor({ pins, askKey, changed }) {
    this.pins = pins;
    this.askKey = askKey;
    this.changed = changed;
    byId("detail-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => {
      this.#name = null;
    });
    byId("detail-pin").addEventListener("change", ({ target }) => this.pins.set(this.#name, target.checked));
    byId("controls-key").addEventListener("click", () => this.askKey());
    byId("weight-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#setWeight();
    });
    byId("weight-back").addEventListener("click", () => this.#change({ weight: null }, ({ weight }) => `The weight is ${num(weight)} again.`));
    byId("hold").addEventListener("click", () => {
      const isPaused = !this.#client?.is_paused;
      this.#change({ is_paused: isPaused }, () => (isPaused ? "The client is paused." : "The client goes on."));
    });
  }

  open(name) {
    this.#name = name;
    this.#client = null;
    setText(byId("detail-name"), shown(name));
    byId("detail-state").replaceChildren();
    byId("detail-facts").replaceChildren();
    byId("detail-budgets").replaceChildren();
    byId("detail-budgets").hidden = true;
    byId("controls").open = false;
    byId("weight").value = "";
    byId("detail-pin").checked = this.pins.has(name);
    this.#say("");
    this.showLock();
    this.#dialog.showModal();
  }

  showLock() {
    byId("controls-lock").hidden = hasKey();
    byId("controls-forms").hidden = !hasKey();
  }

  /** Draws the newest numbers while the dialog is open. */
  async saw(overview) {
    if (this.#name === null) return;
    const found = overview.clients.find(({ name }) => name === this.#name);
    if (found) return this.#show(found, overview);
    if (this.#isAsking) return;
    this.#isAsking = true;
    const name = this.#name;
    try {
      const client = await getClient(name);
      if (name === this.#name) this.#show(client, overview);
    } catch (error) {
      if (name === this.#name) this.#say(error.message, true);
    } finally {
      this.#isAsking = false;
    }
  }

  #show(client, overview) {
    this.#client = client;
    byId("detail-state").replaceChildren(chip(...stateOf(client)));
    const facts = [
      ["Weight", num(client.weight)],
      ["Waiting", num(client.waiting)],
      ["Running", num(client.running)],
      ["Oldest wait", client.waiting > 0 ? seconds(client.oldest_wait_s) : "–"],
      ["Mean wait", seconds(client.mean_wait_s)],
      ["Service per second", num(client.service_per_s)],
      ["Share of the service", percent(overview.service_per_s > 0 ? client.service_per_s / overview.service_per_s : 0)],
      ["Lead", num(client.lead)],
      ["Counter", num(client.counter)],
      ["Service received", num(client.service)],
      ["Input tokens", `${num(client.num_input)} (${num(client.num_cached)} cached)`],
      ["Output tokens", num(client.num_output)],
      ["Refused", num(client.num_refused)],
      ["Waiting at most", client.max_waiting === null ? "as its key says" : num(client.max_waiting)],
      ["Requests per minute", client.requests_per_min === null ? "no limit" : num(client.requests_per_min)],
      ["Last active", client.last_active_s === null ? "not since the actor began" : clock(client.last_active_s)],
    ];
    const list = byId("detail-facts");
    if (list.children.length !== facts.length) {
      list.replaceChildren(...facts.map(([label]) => element("div", {}, element("dt", {}, label), element("dd"))));
    }
    facts.forEach(([, value], i) => setText(list.children[i].lastChild, value));
    showBudgets(client, overview.time_s);
    setText(byId("hold"), client.is_paused ? "Resume this client" : "Pause this client");
    const field = byId("weight");
    if (document.activeElement !== field && !field.value) field.value = String(client.weight);
  }

  #setWeight() {
    const typed = byId("weight").value.trim();
    const weight = Number(typed);
    if (!typed || !(weight > 0 && weight <= MAX_WEIGHT)) {
      byId("weight").setAttribute("aria-invalid", "true");
      this.#say(`A weight is a number above 0 and at most ${num(MAX_WEIGHT)}.`, true);
      return;
    }
    byId("weight").removeAttribute("aria-invalid");
    this.#change({ weight }, (client) => `The weight is ${num(client.weight)} from the next grant on.`);
  }

  async #change(change, words) {
    const name = this.#name;
    try {
      const client = await changeClient(name, change);
      if (name !== this.#name) return;
      if ("weight" in change) byId("weight").value = String(client.weight);
      setText(byId("hold"), client.is_paused ? "Resume this client" : "Pause this client");
      this.#client = client;
      this.#say(words(client));
      this.changed();
    } catch (error) {
      if (name !== this.#name) return;
      this.#say(error.message, true);
      if (error.needsKey) this.askKey(error.message);
    }
  }

  #say(text, isError = false) {
    const said = byId("controls-said");
    setText(said, text);
    said.classList.toggle("error", isError);
    if (isError) byId("controls").open = true;
  }
}
