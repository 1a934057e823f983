// Why a part of the text was expected: how much each part before it counted, by the layers' implicit attention.

import {api, json, server} from "./api.js";
import {$, say, short} from "./dom.js";

const LEVELS = 10, SHOWN = 3, APART = 12;

/** The share of each part of a text in what the last one was expected from: tokens' shares by the characters they begin at. */
export function shares({text_offset, relevance}, parts) {
  const found = new Map();
  text_offset.forEach((offset, place) => {
    if (relevance[place] !== null) found.set(offset, (found.get(offset) ?? 0) + relevance[place]);
  });
  return parts.map(part => found.get(part.offset) ?? null);
}

/** Colour the parts, as they are shown in `letters`, by what part number `place` was expected from. */
export async function why(parts, letters, prompt, place) {
  const end = parts[place].offset + Array.from(parts[place].text).length;
  const body = {model: server.model, prompt: Array.from(prompt).slice(0, end).join("")};
  let answer;
  try { answer = await (await api("v1/explain", json("POST", body))).json(); }
  catch (error) { say(error.message, true); return; }
  const found = shares(answer, parts);
  const others = found.filter((share, at) => share !== null && at < place - 1); // the nearest one outweighs all
  const top = Math.max(...others, 0) || 1;
  letters.forEach((letter, at) => {
    const level = found[at] === null || at >= place ? 0 : Math.min(LEVELS - 1, Math.round(found[at] / top * (LEVELS - 1)));
    letter.className = at === place ? "chosen" : "h" + level;
    letter.title = found[at] === null || at >= place ? "not looked at" : `${(found[at] * 100).toFixed(1)} % of what it was expected from`;
  });
  const order = parts.map((_, at) => at).filter(at => at < place && found[at] !== null).sort((a, b) => found[b] - found[a]);
  const named = [];
  for (const at of order) if (named.length < SHOWN && named.every(other => Math.abs(other - at) >= APART)) named.push(at);
  const around = at => short(parts.slice(Math.max(0, at - 8), at + 9).map(part => part.text).join(""), 24);
  const told = answer.logprob_without, bits = value => (-value / Math.LN2).toFixed(1);
  $("heat-summary").textContent = `“${parts[place].text}” cost ${bits(answer.logprob)} bits. It was expected most from what is coloured, around ` +
    named.map(at => `“${around(at)}”`).join(", ") +
    `. The test: while the text before it is taken away, it costs ${bits(told.most_relevant_first)} bits on average with the most relevant first, ` +
    `${bits(told.random)} in random order, ${bits(told.least_relevant_first)} with the least relevant first.`;
  $("scale").hidden = true;
}
