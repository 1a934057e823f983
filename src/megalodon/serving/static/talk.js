// The conversation: turns that are sent, stopped, kept, branched and shown.

import {api, events, json, server} from "./api.js";
import {$, element, number, random, say, short, size} from "./dom.js";
import {speed} from "./reading.js";
import * as store from "./store.js";

const KEPT_SECONDS = 7 * 86400, SAVE_EVERY = 400;
const LOST = "the message before is not kept on the server: branch from an earlier one";
let running = null, leaving = false;
window.addEventListener("pagehide", () => { leaving = true; });
window.addEventListener("pageshow", () => { leaving = false; });

const button = (text, act, more = {}) => element("button", {type: "button", textContent: text, onclick: act, ...more});

/** What is asked: the text after the context before it, and with `answer` that too. */
function request(node, answer) {
  const body = {model: server.model, save_context: {expires_in: KEPT_SECONDS}};
  const before = store.get(node.parent);
  if (before) body.context = before.context;
  if (node.chat) {
    body.messages = [{role: "user", content: node.user}];
    if (answer) body.messages.push({role: "assistant", content: answer});
  } else body.prompt = node.user + (answer ?? "");
  return {path: node.chat ? "v1/chat/completions" : "v1/completions", body};
}

function sampling() {
  const chosen = {stream: true, stream_options: {include_usage: true}};
  for (const name of ["max_tokens", "temperature", "top_p", "seed"]) {
    if ($(name).value !== "") chosen[name] = Number($(name).value);
  }
  return chosen;
}

export async function send() {
  const user = $("prompt").value, chat = $("mode").value === "chat", before = store.current();
  if (running) return;
  if (!user && (chat || !before)) { say("write something first, or drop in a text"); return; }
  if (before && !before.context) { say(LOST, true); return; }
  $("prompt").value = "";
  await turn(user, chat, before?.id ?? null);
}

async function turn(user, chat, parent) {
  if (parent && !store.get(parent)?.context) { say(LOST, true); return; }
  const node = {id: random(), parent, kind: "turn", at: Date.now(), user, chat, answer: "", running: true};
  running = new AbortController();
  $("send").disabled = true; $("stop").disabled = false;
  try {
    store.put(node);
    store.go(node.id);
    await store.holding(node.id, () => stream(node));
  } catch (error) {
    if (leaving) return; // the page that comes next takes the turn up
    await ended(node, error);
  }
  running = null;
  $("send").disabled = false; $("stop").disabled = true;
  document.dispatchEvent(new Event("contexts"));
}

async function stream(node) {
  const {path, body} = request(node);
  const started = performance.now();
  let first = 0, saved = started;
  const answer = await api(path, {...json("POST", {...body, ...sampling()}), signal: running.signal});
  for await (const chunk of events(answer, say)) {
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) {
      const piece = node.chat ? choice.delta.content : choice.text;
      if (!piece) continue;
      first ||= performance.now();
      node.answer += piece;
      grow(node, piece);
      if (performance.now() - saved > SAVE_EVERY) { store.put(node); saved = performance.now(); }
    }
    if (chunk.usage) finish(node, chunk, first - started, performance.now() - first);
  }
}

function finish(node, {usage, context}, wait, took) {
  delete node.running;
  const rate = usage.completion_tokens > 1 && took > 0 ? (usage.completion_tokens - 1) / took * 1e3 : 0;
  const known = node.parent ? ` after ${number(store.get(node.parent).tokens)} that were not read again` : "";
  Object.assign(node, {rate, context: context.id, tokens: context.tokens, bytes: context.bytes});
  node.note = `${number(usage.completion_tokens)} tokens${known} · first text after ${Math.round(wait)} ms` +
    (rate ? ` · ${Math.round(rate)} tokens/s` : "") + ` · ${size(context.bytes)} kept`;
  store.put(node);
  refresh();
  say("");
  $("announce").textContent = "Answer: " + node.answer;
}

async function ended(node, error) {
  delete node.running;
  const stopped = error.name === "AbortError";
  if (!node.answer) { // nothing came: the text goes back to where it was written
    store.drop(node.id);
    $("prompt").value ||= node.user;
    say(stopped ? "stopped before anything came; your text is back" : error.message, !stopped);
    return;
  }
  await keep(node, stopped ? "stopped" : "broken off: " + error.message);
}

/** Have the server read what came of an answer, so that it can be gone on from. */
async function keep(node, why) {
  delete node.running;
  node.note = why;
  store.put(node);
  try {
    const {path, body} = request(node, node.answer);
    const extra = node.chat ? {max_tokens: 0, add_generation_prompt: false} : {max_tokens: 0};
    const {context} = await (await api(path, json("POST", {...body, ...extra}))).json();
    Object.assign(node, {context: context.id, tokens: context.tokens, bytes: context.bytes, note: `${why}; what came is kept`});
    say(`${why}; what came is kept`);
  } catch (error) {
    node.note = `${why}; it cannot be gone on from: ${error.message}`;
    say(node.note, true);
  }
  store.put(node);
  refresh();
}

/** Show what changed, wherever the person has gone meanwhile. */
const refresh = () => store.go(store.current()?.id ?? null);

export const stop = () => running?.abort();

/** Take up turns that a reload broke off; one that another tab runs is left to it. */
export function resume() {
  for (const {id} of store.all().filter(node => node.running)) {
    store.holding(id, async () => {
      const node = store.kept(id);
      if (!node?.running) return;
      if (node.answer) await keep(node, "broken off by a reload");
      else await ended(node, new Error("broken off by a reload before anything came"));
      document.dispatchEvent(new Event("contexts"));
    });
  }
}

function branch(node) {
  store.go(node.id);
  say(`forked at ${number(node.tokens)} tokens: what you write next goes on from here`);
  $("prompt").focus();
}

function edit(node) {
  store.go(node.parent);
  $("mode").value = node.chat ? "chat" : "complete";
  $("prompt").value = node.user;
  say("change the text and send it: the old turn stays as a branch");
  $("prompt").focus();
}

function ways(node) {
  const others = store.children(node.parent).filter(one => one.kind === "turn"), place = others.indexOf(node);
  if (others.length < 2) return [];
  const to = step => () => store.go(store.latest(others[place + step].id));
  return [element("span", {className: "ways"},
    button("‹", to(-1), {disabled: place === 0, ariaLabel: "branch before"}),
    `${place + 1} of ${others.length}`,
    button("›", to(1), {disabled: place === others.length - 1, ariaLabel: "next branch"}))];
}

function block(kind, who, text, ...row) {
  return element("div", {className: "turn " + kind},
    element("span", {className: "unseen", textContent: who}),
    element("div", {className: "body", textContent: text}), element("div", {className: "row"}, ...row));
}

const fork = node => node.context ? [button("Fork here", () => branch(node), {className: "fork", title: "go on from this point another way"})] : [];

function shown(node) {
  const made = element("article", {});
  made.dataset.node = node.id;
  if (node.kind !== "turn") {
    const text = node.kind === "read" ? node.name : `${node.name || "a kept context"}, begun elsewhere`;
    const took = node.seconds ? ` read in ${node.seconds.toFixed(1)} s` : "";
    made.append(block("read", "Read:", text, `${number(node.tokens)} tokens${took}; ${size(node.bytes)} kept`, ...fork(node)));
    return made;
  }
  if (node.user) made.append(block("user", "You:", node.user, button("Edit", () => edit(node), {className: "edit"}), ...ways(node)));
  const again = button("Again", () => running || turn(node.user, node.chat, node.parent), {className: "again", title: "another answer"});
  made.append(block("model", "Model:", node.answer, ...(node.running ? [] : [...fork(node), again]),
    ...(node.user ? [] : ways(node)), element("span", {textContent: node.note ?? ""})));
  return made;
}

function grow(node, piece) {
  const box = $("text"), low = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  box.querySelector(`[data-node="${node.id}"] .model .body`)?.append(piece);
  if (low) box.scrollTop = box.scrollHeight;
}

export function render() {
  const node = store.current();
  const after = node ? store.children(node.id) : [];
  $("hero").hidden = node !== null;
  $("text").hidden = node === null;
  $("text").replaceChildren(...store.path(node?.id).map(shown));
  if (after.length) {
    const on = after.map(one => button(short(one.user || one.answer), () => store.go(store.latest(one.id))));
    $("text").append(element("div", {className: "onward"}, "Goes on as: ", ...on));
  }
  $("text").scrollTop = $("text").scrollHeight;
}
