// Token budgets: what is used of each window, against its soft and its hard mark.

import { byId, element, num, percent, seconds, setText, shown } from "./format.js";

const WORDS = ["", "soft passed", "spent"];
const TONES = ["", "soft", "alarm"];

/** 2: spent, and requests are refused. 1: past its soft mark, and requests weigh less. */
const levelOf = ({ used, soft, hard }) => (hard !== null && used >= hard ? 2 : soft !== null && used >= soft ? 1 : 0);
const limitOf = ({ soft, hard }) => hard ?? soft;
const rank = (budget) => 1e6 * levelOf(budget) + budget.used / limitOf(budget);

/** Of the budgets that hold for a client the one that is passed, or nearest to it; null without any. */
const nearest = ({ budgets }) =>
  (budgets ?? []).reduce((most, budget) => (most === null || rank(budget) > rank(most) ? budget : most), null);

export const hasBudget = (client) => nearest(client) !== null;
export const budgetRank = (client) => (hasBudget(client) ? rank(nearest(client)) : -1);
export const budgetTone = (client) => (hasBudget(client) ? TONES[levelOf(nearest(client))] : "");

/** 82 % day, or: spent, day. */
export function budgetText(client) {
  const budget = nearest(client);
  if (budget === null) return "–";
  const level = levelOf(budget);
  return level > 0 ? `${WORDS[level]}, ${budget.window}` : `${percent(budget.used / limitOf(budget))} ${budget.window}`;
}

/** A meter and a line of text for each budget of the client whose details are shown. */
export function showBudgets(client, nowS) {
  const list = byId("detail-budgets");
  const budgets = client.budgets ?? [];
  list.hidden = budgets.length === 0;
  while (list.children.length > budgets.length) list.lastChild.remove();
  budgets.forEach((budget, i) => {
    const { of, window, soft, hard, used, promised, resets_s: resetsS } = budget;
    const item = list.children[i] ?? list.appendChild(newBudget());
    const [name, meter, text] = item.children;
    const level = levelOf(budget);
    const part = Math.min(1, used / limitOf(budget));
    setText(name.firstChild, `A ${window}, ${budget.is_group ? "all of " : ""}${shown(of)}`);
    setText(name.lastChild, WORDS[level]);
    name.lastChild.className = TONES[level];
    meter.setAttribute("aria-valuenow", String(Math.round(100 * part)));
    meter.className = `meter ${TONES[level]}`;
    meter.firstChild.style.width = `${100 * part}%`;
    meter.lastChild.hidden = soft === null || hard === null;
    meter.lastChild.style.left = `${hard === null ? 0 : (100 * soft) / hard}%`;
    const marks = [soft === null ? [] : [`soft ${num(soft)}`], hard === null ? [] : [`hard ${num(hard)}`]].flat();
    const more = promised > 0 ? `, ${num(promised)} promised` : "";
    setText(text, `${num(used)} tokens used${more}; ${marks.join(", ")}; ends in ${seconds(Math.max(0, resetsS - nowS))}`);
  });
}

function newBudget() {
  const meter = { role: "meter", "aria-label": "Part of the budget that is used, in percent", "aria-valuemin": "0", "aria-valuemax": "100" };
  return element(
    "li",
    {},
    element("p", { className: "of" }, element("bdi"), element("strong")),
    element("span", { className: "meter", ...meter }, element("span", { className: "fill" }), element("span", { className: "worst", title: "soft" })),
    element("p", { className: "sub" }),
  );
}
