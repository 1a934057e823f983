// The plot of memory against tokens, with axes: sizes on a logarithmic scale, as a state and a cache soon differ a
// thousandfold.

import {number, size} from "./dom.js";

const LEFT = 56, RIGHT = 388, TOP = 18, BOTTOM = 150;

function shape(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Round numbers from 0 to at most `most`, about four of them. */
export function ticks(most) {
  const rough = most / 4, unit = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, unit * [1, 2, 5, 10].find(times => times * unit >= rough));
  return Array.from({length: Math.floor(most / step) + 1}, (_, place) => place * step);
}

/** Powers of ten around sizes, at most six. */
function decades(sizes) {
  const low = Math.floor(Math.log10(Math.min(...sizes))), high = Math.ceil(Math.log10(Math.max(...sizes)));
  const every = Math.ceil((high - low) / 5) || 1;
  return Array.from({length: Math.ceil((high - low) / every) + 1}, (_, place) => 10 ** (low + place * every));
}

/** Draw points of [tokens, bytes] beside a cache of `cache` bytes a token: a line of those of a state in memory, dots for
    those of files that contexts are kept in. */
export function draw(svg, states, files, cache) {
  const points = [...states, ...files].filter(([tokens, bytes]) => tokens > 0 && bytes > 0).sort((a, b) => a[0] - b[0]);
  svg.setAttribute("viewBox", points.length ? "0 0 400 186" : "0 0 400 70");
  if (!points.length) {
    svg.replaceChildren(shape("text", {x: 200, y: 40, class: "empty"}, "Drop in a text: memory is drawn here"));
    svg.setAttribute("aria-label", "Nothing has been read yet");
    return;
  }
  const across = points.at(-1)[0];
  const caches = Array.from({length: 65}, (_, place) => Math.max(1, across * place / 64)).map(at => [at, at * cache]); // none before the server was asked
  const levels = decades([...points.map(point => point[1] / 3), cache * across || points.at(-1)[1]]); // a third: room for a name below
  if (levels.length < 2) levels.push(levels[0] * 10);
  const bottom = Math.log10(levels[0]), top = Math.log10(levels.at(-1));
  const x = tokens => LEFT + (RIGHT - LEFT) * tokens / across;
  const y = bytes => BOTTOM - (BOTTOM - TOP) * (Math.log10(bytes) - bottom) / (top - bottom);
  const line = points => points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
  const over = cache ? caches.filter(point => point[1] >= levels[0]) : [];

  const made = [];
  for (const level of levels) {
    made.push(shape("line", {x1: LEFT, x2: RIGHT, y1: y(level), y2: y(level), class: "grid"}));
    made.push(shape("text", {x: LEFT - 6, y: y(level) + 4, class: "up"}, size(level)));
  }
  for (const tick of ticks(across)) {
    made.push(shape("line", {x1: x(tick), x2: x(tick), y1: BOTTOM, y2: BOTTOM + 4, class: "axis"}));
    made.push(shape("text", {x: x(tick), y: BOTTOM + 17, class: tick > 0.95 * across ? "last" : "across"}, number(tick)));
  }
  made.push(shape("line", {x1: LEFT, x2: RIGHT, y1: BOTTOM, y2: BOTTOM, class: "axis"}));
  made.push(shape("line", {x1: LEFT, x2: LEFT, y1: TOP, y2: BOTTOM, class: "axis"}));
  made.push(shape("text", {x: (LEFT + RIGHT) / 2, y: BOTTOM + 33, class: "name"}, "tokens read"));
  made.push(shape("polyline", {id: "cache-line", points: line(over), class: "cache"}));
  made.push(shape("polyline", {id: "line", points: line(states), class: "state"}));
  made.push(...files.map(([tokens, bytes]) => shape("circle", {cx: x(tokens), cy: y(bytes), r: 3.5, class: "state"})));
  const name = (bytes, text, kind, y0) => made.push(shape("text", {x: RIGHT - 8, y: y0, class: "label " + kind}, `${text}: ${size(bytes)}`));
  if (files.length) name(files.at(-1)[1], "kept", "state", y(files.at(-1)[1]) - 8);
  if (states.length) name(states.at(-1)[1], "memory", "state", y(states.at(-1)[1]) + (files.length ? 15 : -8));
  if (over.length) name(over.at(-1)[1], "KV cache", "cache", y(over.at(-1)[1]) + (y(over.at(-1)[1]) < TOP + 10 ? 17 : -8));
  svg.replaceChildren(...made);
  const told = states.length ? `${size(states.at(-1)[1])} after ${number(states.at(-1)[0])} tokens, where it was ` +
    `${size(states[0][1])} after ${number(states[0][0])}` : "not measured";
  const kept = files.length ? ` ${size(files.at(-1)[1])} are kept after ${number(across)} tokens.` : "";
  svg.setAttribute("aria-label", `Memory against tokens read: ${told}.${kept} A KV cache would have ${size(cache * across)}.`);
}
