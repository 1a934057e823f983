// Reading texts: sending a file, watching it being read, and the figures and plot of what was read so far.

import {api, contexts, server} from "./api.js";
import {$, number, random, say, short, size, view} from "./dom.js";
import {draw} from "./plot.js";
import * as store from "./store.js";

const MOST_POINTS = 200, EXCERPT = 4000;
/** Files of this visit by node, for passages further in than the excerpt that is kept. */
export const files = new Map();
let stopping = null, waiting = Promise.resolve();

/** Show the figures: `states` are [tokens, bytes in memory] while a text was read, `kept` [tokens, bytes of files]. */
function figures(states, kept) {
  const tokens = Math.max(0, ...[...states, ...kept].map(point => point[0]));
  $("tokens").textContent = number(tokens);
  $("memory").textContent = size((states.at(-1) ?? kept.at(-1) ?? [0, 0])[1]);
  $("memory-name").textContent = states.length || !kept.length ? "memory" : "kept on disk";
  $("cache").textContent = size(tokens * server.cache);
  draw($("plot"), states, kept, server.cache);
}

/** Show that a text is being read, in the place of the invitation to drop one in; or that none is. */
function going(on) {
  $("now").hidden = $("meanwhile").hidden = !on;
  $("invite").hidden = on;
}

export const speed = rate => { $("speed").textContent = rate ? `${number(Math.round(rate))} tokens/s` : "–"; };

/** The figures of the conversation that is open. */
export function show() {
  if (stopping) return;
  const before = store.path(store.current()?.id).filter(node => node.tokens);
  figures(before.flatMap(node => node.points ?? []), before.map(node => [node.tokens, node.bytes]));
  speed(before.at(-1)?.rate);
}

/** Read files, one after the other. */
export function read(list) {
  for (const file of list) waiting = waiting.then(() => one(file)).catch(error => say(error.message, true));
  return waiting;
}

export const stop = () => stopping?.abort();

async function free(name) {
  const clean = name.replace(/[^A-Za-z0-9 ._-]/g, "_").replace(/^[^A-Za-z0-9]+/, "").slice(0, 56) || "text";
  const taken = new Set((await contexts()).map(context => context.name));
  let found = clean;
  for (let again = 2; taken.has(found); again++) found = `${clean} ${again}`;
  return found;
}

/** What a file begins with, as text. */
export async function beginning(file, from = 0, most = EXCERPT) {
  const text = new TextDecoder().decode(await file.slice(from, from + 4 * most).arrayBuffer());
  return Array.from(text.replace(/^\uFFFD+|\uFFFD+$/g, "")).slice(0, most).join("");
}

/** Ask how far the reading is until it is over, and once more then; nothing is shown of one that was given up. */
async function watch(key, file, started, points, over, signal) {
  for (let last = false; !last;) {
    await new Promise(wake => setTimeout(wake, over() ? 0 : 200));
    last = over();
    const now = await (await api("v1/contexts/progress/" + key)).json().catch(() => null);
    if (signal.aborted) return;
    if (!now || !now.read || now.read === points.at(-1)?.[0]) continue;
    points.push([now.read, now.state_bytes]);
    if (points.length > MOST_POINTS) points.splice(0, points.length, ...points.filter((_, place) => place % 2 === 0));
    $("progress").value = now.received_bytes / file.size * now.read / now.arrived;
    $("now-text").textContent = `Reading ${file.name}: ${number(now.read)} tokens`;
    speed(now.read / (performance.now() - started) * 1e3);
    figures(points, []);
  }
}

async function one(file) {
  const key = random(), points = [], started = performance.now(), control = new AbortController();
  stopping = control;
  let over = false;
  $("now-text").textContent = `Reading ${file.name}`;
  $("progress").value = 0;
  $("meanwhile-name").textContent = `Reading ${file.name}`;
  going(true);
  say(`reading ${file.name}`);
  view("reading");
  try {
    const query = new URLSearchParams({progress: key, name: await free(file.name)});
    const watching = watch(key, file, started, points, () => over, control.signal).catch(() => {});
    const headers = {"Content-Type": "text/plain"};
    const answer = await api("v1/contexts?" + query, {method: "POST", headers, body: file, signal: control.signal});
    const context = await answer.json();
    over = true;
    await watching;
    const seconds = (performance.now() - started) / 1e3;
    const node = store.put({
      id: random(), parent: null, kind: "read", at: Date.now(), name: file.name, excerpt: await beginning(file),
      context: context.id, tokens: context.tokens, bytes: context.bytes, points, seconds, rate: context.tokens / seconds,
    });
    files.set(node.id, file);
    stopping = null;
    store.go(node.id);
    document.dispatchEvent(new Event("contexts"));
    say(`${number(context.tokens)} tokens in ${seconds.toFixed(1)} s; what is kept of them is ${size(context.bytes)}`);
    document.dispatchEvent(new Event("read"));
  } catch (error) {
    control.abort();
    say(error.name === "AbortError" ? `${short(file.name)}: stopped; nothing of it is kept` : error.message, error.name !== "AbortError");
  } finally {
    over = true;
    stopping = null;
    going(false);
    show();
  }
}
