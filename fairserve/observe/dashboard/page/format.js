// Numbers, times and names as people read them, and small helpers for elements.

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const small = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const time = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const NONE = "–";
const GAP = "\u00a0"; // a number and its unit stay on one line

/** 0.25, 34.5, 1,234, 56.7K. */
export function num(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 10000) return compact.format(value);
  return size >= 100 || Number.isInteger(value) ? grouped.format(value) : small.format(value);
}

/** 0 %, 0.4 %, 34 %. */
export function percent(share) {
  if (!Number.isFinite(share)) return NONE;
  const value = share * 100;
  const digits = value > 0 && value < 0.995 ? 1 : 0;
  return `${value > 0 && value < 0.05 ? "<0.1" : value.toFixed(digits)}${GAP}%`;
}

/** 0.4 s, 12 s, 3 min, 2.5 h, 4 d. */
export function seconds(value) {
  if (!Number.isFinite(value)) return NONE;
  if (value < 0.05) return `0${GAP}s`;
  if (value < 9.95) return `${value.toFixed(1)}${GAP}s`;
  if (value < 120) return `${Math.round(value)}${GAP}s`;
  if (value < 7200) return `${Math.round(value / 60)}${GAP}min`;
  return value < 172800 ? `${small.format(value / 3600)}${GAP}h` : `${small.format(value / 86400)}${GAP}d`;
}

/** Unix seconds as the time of day here. */
export const clock = (unix) => time.format(new Date(unix * 1000));

/** A name from outside, without characters that draw nothing or turn the text around. */
export const shown = (name) => name.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "\uFFFD");

/** At most `max` characters: names differ at their ends, so the middle goes. */
export function shortened(name, max) {
  const letters = [...shown(name)];
  if (letters.length <= max) return letters.join("");
  const tail = Math.floor((max - 1) / 2);
  return [...letters.slice(0, max - 1 - tail), "…", ...letters.slice(letters.length - tail)].join("");
}

/** For the chart library, which reads some HTML in its texts. */
export const escaped = (text) =>
  text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);

export const byId = (id) => document.getElementById(id);

/** An element with properties, attributes (`aria-…`, `role`, `data-…`) and children; strings become text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && !name.includes("-")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Sets the text where it differs: an unchanged element costs no layout and disturbs no selection. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}
