// Small helpers: find and make elements, write numbers and sizes, tell the person something.

export const $ = id => document.getElementById(id);

export const number = value => Number(value).toLocaleString("en");

/** Bytes as people read them. */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (bytes >= 999.5 && place < units.length - 1) { bytes /= 1000; place++; }
  return `${place === 0 || bytes >= 100 ? Math.round(bytes) : bytes.toPrecision(3)} ${units[place]}`;
}

export const short = (text, most = 40) => {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > most ? line.slice(0, most - 1) + "…" : line;
};

/** An element; children that are strings become text, never markup. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A line at the top, which screen readers read out. */
export function say(text, error = false) {
  $("status").textContent = text;
  $("status").className = error ? "error" : "";
}

/** Which part a narrow screen shows. */
export function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("#views button")) {
    button.setAttribute("aria-pressed", button.dataset.view === name);
  }
}

/** Letters for names that nobody reads. It needs no secure context, as crypto.randomUUID does. */
export const random = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), byte => byte.toString(16).padStart(2, "0")).join("");
