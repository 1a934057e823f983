// The library: the server's contexts as a tree of names. Turns that follow one another are one row, which leads to the
// last of them; where a conversation forks, a row has rows below it. Deleting waits, so that it can be undone.

import {api, contexts, json} from "./api.js";
import {$, element, number, random, say, short, size, view} from "./dom.js";
import * as store from "./store.js";

export const UNDO_MILLISECONDS = 8000;
const compact = new Intl.NumberFormat("en", {notation: "compact"});
let known = [], leaving = null;

const labelOf = context => {
  const node = store.ofContext(context.id);
  return context.name || (node && short(node.user || node.answer || node.name || "")) || "unnamed text";
};

/** Rows as {contexts: from first to last, below: rows} of a list that begins with the newest. */
export function rows(list) {
  const there = new Set(list.map(context => context.id)), below = new Map();
  for (const context of [...list].reverse()) { // forks in the order in which they were made
    const parent = there.has(context.parent) ? context.parent : null;
    if (!below.has(parent)) below.set(parent, []);
    below.get(parent).push(context);
  }
  function row(first) {
    const chain = [first];
    for (;;) {
      const after = below.get(chain.at(-1).id) ?? [];
      if (after.length !== 1 || chain.at(-1).name) {
        return {contexts: chain, below: after.map(row)};
      }
      chain.push(after[0]);
    }
  }
  return (below.get(null) ?? []).reverse().map(row);
}

export async function refresh() {
  try { known = await contexts(); } catch (error) { say(error.message, true); return; }
  render();
}

export function render() {
  const focused = document.activeElement?.dataset?.context;
  const list = known.filter(context => !leaving?.ids.includes(context.id));
  $("contexts").replaceChildren(...rows(list).map(item));
  $("no-contexts").hidden = list.length > 0;
  if (focused) document.querySelector(`.pick[data-context="${focused}"]`)?.focus();
}

function item(row) {
  const last = row.contexts.at(-1), label = labelOf(last.name ? last : row.contexts[0]);
  const open = row.contexts.some(context => context.id === store.current()?.context);
  const until = last.expires_at ? `, kept until ${new Date(last.expires_at * 1e3).toLocaleDateString()}` : "";
  const pick = element("button", {
    type: "button", className: "pick", title: `${label}: ${number(last.tokens)} tokens, ${size(last.bytes)}${until}`,
    onclick: () => choose(last),
  }, element("span", {className: "label", textContent: label}), element("small", {textContent: compact.format(last.tokens)},
    element("span", {className: "unseen", textContent: " tokens"})));
  pick.dataset.context = last.id;
  pick.setAttribute("aria-current", open);
  pick.onkeydown = event => keys(event, pick, row, label);
  const rename = element("button", {type: "button", className: "rename", textContent: "✎", ariaLabel: `rename ${label}`, onclick: () => edit(pick, row, label)});
  const remove = element("button", {type: "button", className: "delete", textContent: "×", ariaLabel: `delete ${label}`, onclick: () => away(row, label)});
  const made = element("li", {}, element("div", {className: "row"}, pick, rename, remove));
  if (row.below.length) made.append(element("ul", {ariaLabel: `forks of ${label}`}, ...row.below.map(item)));
  return made;
}

function keys(event, pick, row, label) {
  const picks = [...document.querySelectorAll(".pick")], step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step) picks[picks.indexOf(pick) + step]?.focus();
  else if (event.key === "F2") edit(pick, row, label);
  else if (event.key === "Delete") away(row, label);
  else return;
  event.preventDefault();
}

function choose(context) {
  const node = store.ofContext(context.id) ?? store.put({
    id: random(), parent: null, kind: "context", at: Date.now(), name: context.name,
    context: context.id, tokens: context.tokens, bytes: context.bytes,
  });
  store.go(node.id);
  view("talk");
  $("prompt").focus();
}

/** A name is for what is to stay: the end of the row gets it, and no longer expires. */
function edit(pick, row, label) {
  const last = row.contexts.at(-1), input = element("input", {value: last.name || label, ariaLabel: "new name", maxLength: 64});
  let done = false;
  const finish = async take => {
    if (done) return;
    done = true;
    const name = input.value.replace(/[^A-Za-z0-9 ._-]/g, "_").replace(/^[^A-Za-z0-9]+/, "").trim();
    try {
      if (take && name && name !== last.name) await api("v1/contexts/" + last.id, json("PATCH", {name, expires_in: null}));
    } catch (error) { say(error.message, true); }
    await refresh();
    document.querySelector(`.pick[data-context="${last.id}"]`)?.focus();
  };
  input.onkeydown = event => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault(); event.stopPropagation();
    finish(event.key === "Enter");
  };
  input.onblur = () => finish(true);
  pick.replaceWith(input);
  input.select();
}

/** Take a row away; the server is told when the time to undo it is over. */
function away(row, label) {
  flush();
  const ids = row.contexts.map(context => context.id);
  leaving = {ids, timer: setTimeout(flush, UNDO_MILLISECONDS), head: store.current()?.id ?? null};
  $("toast-text").textContent = `${label} is deleted${row.below.length ? "; what forks from it stays" : ""}.`;
  $("toast").hidden = false;
  if (ids.includes(store.current()?.context)) store.go(null);
  render();
}

export function undo() {
  if (!leaving) return;
  clearTimeout(leaving.timer);
  const {head} = leaving;
  leaving = null;
  $("toast").hidden = true;
  if (head && !store.current()) store.go(head);
  render();
  say("nothing was deleted");
}

/** Delete what is to be deleted now; also when the page is left, which must not outlive the wish. */
export function flush() {
  if (!leaving) return;
  const {ids, timer} = leaving;
  clearTimeout(timer);
  leaving = null;
  known = known.filter(context => !ids.includes(context.id));
  $("toast").hidden = true;
  store.forget(ids);
  for (const id of ids) {
    api("v1/contexts/" + id, {method: "DELETE", keepalive: true}).catch(error => error.status === 404 || say(error.message, true));
  }
}
