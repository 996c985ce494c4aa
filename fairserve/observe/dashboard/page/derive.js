// What the overview means, in shares and in words. Plain functions of the data.

import { percent, seconds } from "./format.js";

const STANDS_OUT = 1.8; // times an even part of the waiting requests

export const isBacklogged = (client) => client.waiting > 0 && !client.is_paused;

const sum = (list, field) => list.reduce((total, one) => total + one[field], 0);
const part = (amount, whole) => (whole > 0 ? amount / whole : 0);

/** Of what the waiting clients get together, the part that each one's weight entitles it to; null for the others. */
function dues(overview) {
  const waiting = overview.clients.filter(isBacklogged);
  if (waiting.length < 2) return () => null;
  const given = part(sum(waiting, "service_per_s"), overview.service_per_s);
  const weights = sum(waiting, "weight");
  return (client) => (isBacklogged(client) ? given * part(client.weight, weights) : null);
}

/** Rows of "who asks, who gets": the drawn clients in the order of `names`, then the rest. */
export function sharesOf(overview, names) {
  const due = dues(overview);
  const clients = new Map(overview.clients.map((client) => [client.name, client]));
  const rows = names.flatMap((name) => {
    const client = clients.get(name);
    if (!client) return [];
    const asks = part(client.waiting, overview.waiting);
    const gets = part(client.service_per_s, overview.service_per_s);
    return [{ name, asks, gets, due: due(client), isRest: false }];
  });
  const asks = 1 - sum(rows, "asks");
  const gets = 1 - sum(rows, "gets");
  const isRestBusy = (overview.waiting > 0 && asks > 0.001) || (overview.service_per_s > 0 && gets > 0.001);
  if (overview.num_clients > rows.length && isRestBusy) {
    rows.push({ name: "all others", asks: Math.max(0, overview.waiting > 0 ? asks : 0), gets: Math.max(0, gets), due: null, isRest: true });
  }
  return rows.filter((row) => row.asks > 0 || row.gets > 0);
}

/** Rows of "wait", for the drawn clients of which something is known. */
export function waitsOf(overview, names) {
  const clients = new Map(overview.clients.map((client) => [client.name, client]));
  return names.flatMap((name) => {
    const client = clients.get(name);
    if (!client || (client.waiting === 0 && client.service_per_s === 0)) return [];
    return [{ name, mean: client.mean_wait_s, oldest: client.waiting > 0 ? client.oldest_wait_s : null }];
  });
}

/** One sentence on who asks for most, as pieces: strings, and { name } for a client. */
export function greedySentence(overview) {
  const waiting = overview.clients.filter((client) => client.waiting > 0);
  if (overview.waiting === 0 || !waiting.length) {
    return overview.running > 0
      ? ["Nobody waits: there is room for all that is asked."]
      : ["Nobody asks for anything now."];
  }
  const busiest = waiting.reduce((most, client) => (client.waiting > most.waiting ? client : most));
  const asks = part(busiest.waiting, overview.waiting);
  const gets = percent(part(busiest.service_per_s, overview.service_per_s));
  if (busiest.is_paused) return [{ name: busiest.name }, ` is paused and holds ${percent(asks)} of the waiting requests.`];
  const num = Math.max(overview.verdict.num_backlogged, 1);
  if (num === 1) return ["Only ", { name: busiest.name }, ` waits, with ${busiest.waiting} requests: it may take all that the others leave, now ${gets} of the service.`];
  if (asks < STANDS_OUT / num) {
    return [`No client stands out: ${num} wait, the busiest holds ${percent(asks)} of the waiting requests.`];
  }
  const due = dues(overview)(busiest);
  return [
    { name: busiest.name },
    ` asks for most: it holds ${percent(asks)} of the waiting requests. It gets ${gets} of the service`,
    due === null ? "." : `; by its weight it is due ${percent(due)}.`,
  ];
}

/** In which state a client is: a word and a class. */
export function stateOf(client) {
  if (client.is_paused) return ["paused", "warn"];
  if (client.waiting > 0) return ["waiting", "busy"];
  return client.running > 0 ? ["running", "good"] : ["idle", "calm"];
}

export const uptime = (overview) => seconds(overview.time_s - overview.started_s);
