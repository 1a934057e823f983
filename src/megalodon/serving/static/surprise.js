// Surprise: the model's loss on each token of a passage, as colours over the text.

import {api, json, server} from "./api.js";
import {$, element, say, short} from "./dom.js";
import {beginning, files} from "./reading.js";
import * as store from "./store.js";
import {why} from "./why.js";

/** Characters that are shown at once, and those before them that are read to get into the text. */
const MOST = 2000, RUN_UP = 1000, LEVELS = 10, LEAST_TOP = 8;

/** What is shown: its parts, the text that was asked about, and the part that the keyboard points at. */
let shown = null;

/** The text that the open conversation began with. */
const source = () => store.path(store.current()?.id).find(node => node.kind === "read");

/** Parts of a text with their losses in bits. Tokens that are parts of one character are one part. */
export function parts({text, logprobs}) {
  const letters = Array.from(text), found = []; // offsets count characters, not UTF-16 units
  logprobs.text_offset.forEach((offset, place) => {
    const value = logprobs.token_logprobs[place], bits = value === null ? null : -value / Math.LN2;
    const last = found.at(-1);
    if (last && last.offset === offset) {
      last.bits = last.bits === null ? bits : last.bits + (bits ?? 0);
      last.tokens++;
    } else found.push({offset, bits, tokens: 1});
  });
  return found.map((part, place) => ({...part, text: letters.slice(part.offset, found[place + 1]?.offset).join("")}));
}

/** Different words with the bits of all their parts, the most surprising first. */
function words(parts) {
  const found = [{text: "", bits: 0}];
  for (const part of parts) {
    if (/\s/.test(part.text[0] ?? "")) found.push({text: "", bits: 0});
    found.at(-1).text += part.text;
    found.at(-1).bits += part.bits ?? 0;
    if (/\s$/.test(part.text)) found.push({text: "", bits: 0});
  }
  found.sort((a, b) => b.bits - a.bits);
  return found.filter((word, place) => word.text.trim() && found.findIndex(other => other.text === word.text) === place);
}

async function passage(node) {
  const file = files.get(node.id);
  if (!file) return {lead: "", text: Array.from(node.excerpt).slice(0, MOST).join("")};
  const from = Math.floor(Math.max(0, file.size - MOST) * $("place").value / 100);
  const start = Math.max(0, from - RUN_UP);
  const lead = new TextDecoder().decode(await file.slice(start, from).arrayBuffer()).replace(/^\uFFFD+|\uFFFD+$/g, "");
  return {lead, text: await beginning(file, from, MOST)};
}

export async function look() {
  const node = source();
  if (!node) { say("drop in a text first: its surprise is shown here"); return; }
  $("look").disabled = true;
  try {
    const again = $("how").value === "again", {lead, text} = await passage(node);
    const body = {model: server.model, prompt: lead + text, echo: true, logprobs: 0, max_tokens: 0};
    if (again) body.context = store.current().context;
    const answer = await (await api("v1/completions", json("POST", body))).json();
    const skipped = Array.from(lead).length;
    shown = {parts: parts(answer.choices[0]).filter(part => part.offset >= skipped), prompt: lead + text, again, at: 0};
    show(shown.parts, again);
  } catch (error) { say(error.message, true); }
  $("look").disabled = false;
}

function show(found, again) {
  const told = found.map(part => part.bits).filter(bits => bits !== null).sort((a, b) => a - b);
  const top = Math.max(LEAST_TOP, told[Math.floor(told.length * 0.95)] ?? 0);
  const tokens = found.reduce((sum, part) => sum + (part.bits === null ? 0 : part.tokens), 0);
  const mean = told.reduce((sum, bits) => sum + bits, 0) / (tokens || 1);
  $("heat").replaceChildren(...found.map(part => {
    const level = part.bits === null ? 0 : Math.min(LEVELS - 1, Math.floor(part.bits / top * LEVELS));
    return element("span", {className: "h" + level, textContent: part.text, title: part.bits === null ? "nothing before it" : part.bits.toFixed(1) + " bits"});
  }));
  $("heat-summary").textContent = `${mean.toFixed(2)} bits a token on average, ${again ? "knowing all that was read" : "read for the first time"}. ` +
    `Least expected: ${words(found).slice(0, 5).map(word => `“${short(word.text, 20)}” (${word.bits.toFixed(0)} bits)`).join(", ")}.`;
  $("scale-top").textContent = `${top.toFixed(0)} bits or more`;
  $("heat").hidden = $("scale").hidden = false;
}

/** Show what a part was expected from. */
async function ask(place) {
  if (!shown || place < 1) return;
  point(place);
  await why(shown.parts, [...$("heat").children], shown.prompt, place);
}

function point(place) {
  $("heat").children[shown.at]?.classList.remove("at");
  shown.at = Math.min(Math.max(0, place), shown.parts.length - 1);
  const letter = $("heat").children[shown.at];
  letter.classList.add("at");
  letter.scrollIntoView({block: "nearest"});
}

$("heat").onclick = event => {
  const place = [...$("heat").children].indexOf(event.target);
  if (place >= 0) ask(place);
};
$("heat").onkeydown = event => {
  const steps = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (steps) { event.preventDefault(); point(shown.at + steps); }
  if (event.key === "Enter") { event.preventDefault(); ask(shown.at); }
};

/** Another conversation was opened: what is shown must be of its text. */
let of = null;
export function reset() {
  const node = source();
  if (node?.id === of) return;
  of = node?.id ?? null;
  $("heat").hidden = $("scale").hidden = true;
  $("heat").replaceChildren();
  $("place").value = 0;
  $("place-label").hidden = !files.has(of);
  $("heat-summary").textContent = "Each token is coloured by the model's loss on it: how little it expected what came.";
}
