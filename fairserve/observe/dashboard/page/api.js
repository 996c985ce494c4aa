// Talks to /admin/v1 of the service that served this page, below whatever prefix it lies.

const ROOT = new URL("admin/v1/", document.baseURI);
const KEPT = "fairserve-admin-key";
const MAX_WAIT_MS = 5000;

/** Of several models the one that this page shows, as its own address says; "" for the first. */
export const MODEL = new URLSearchParams(location.search).get("model") ?? "";

/** An answer that is not the one asked for. `status` 0: no answer at all. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }

  get needsKey() {
    return this.status === 401 || this.status === 403;
  }
}

let key = null;
try {
  key = sessionStorage.getItem(KEPT);
} catch {
  // Storage is forbidden: the key lives as long as the page.
}

export const hasKey = () => Boolean(key);

/** Keeps the key for this tab; an empty one is forgotten. Throws where it cannot be part of a header. */
export function setKey(typed) {
  const wanted = typed.trim();
  if (/[^\x21-\x7e]/.test(wanted)) throw new Error("A key holds printable ASCII characters and no spaces.");
  key = wanted || null;
  try {
    if (key) sessionStorage.setItem(KEPT, key);
    else sessionStorage.removeItem(KEPT);
  } catch {
    // As above.
  }
}

async function ask(path, options) {
  const headers = { Accept: "application/json", ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", signal: AbortSignal.timeout(MAX_WAIT_MS) });
  } catch (error) {
    throw new ApiError(0, "no_answer", error.name === "TimeoutError" ? "No answer within 5 s." : "No connection.");
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  const told = body?.error ?? {};
  throw new ApiError(response.status, told.code ?? null, told.message ?? `The service answered HTTP ${response.status}.`);
}

/** GET about the model of this page; a list as a parameter's value repeats the parameter, null leaves it out. */
export function get(path, params = {}) {
  const url = new URL(path, ROOT);
  if (MODEL && path !== "models") url.searchParams.set("model", MODEL);
  for (const [name, value] of Object.entries(params)) {
    for (const one of [value].flat()) if (one !== null && one !== "") url.searchParams.append(name, one);
  }
  return ask(url, {});
}

/** PATCH of one client; resolves to its new view. */
export function changeClient(name, change) {
  const headers = { "Content-Type": "application/json" };
  const url = new URL(`clients/${encodeURIComponent(name)}`, ROOT);
  return ask(url, { method: "PATCH", headers, body: JSON.stringify(change) });
}

export const getClient = (name) => get(`clients/${encodeURIComponent(name)}`);
