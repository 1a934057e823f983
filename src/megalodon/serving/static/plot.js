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

/** Draw points of [tokens, bytes] beside a cache of `cache` bytes a token. */
export function draw(svg, points, cache) {
  points = points.filter(([tokens, bytes]) => tokens > 0 && bytes > 0);
  svg.setAttribute("viewBox", points.length ? "0 0 400 186" : "0 0 400 70");
  if (!points.length) {
    svg.replaceChildren(shape("text", {x: 200, y: 40, class: "empty"}, "Drop in a text: memory is drawn here"));
    svg.setAttribute("aria-label", "Nothing has been read yet");
    return;
  }
  const across = points.at(-1)[0], bytes = points.at(-1)[1];
  const caches = Array.from({length: 65}, (_, place) => Math.max(1, across * place / 64)).map(at => [at, at * cache]); // none before the server was asked
  const levels = decades([...points.map(point => point[1]), cache * across || bytes]);
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
  made.push(shape("polyline", {id: "line", points: line(points), class: "state"}));
  made.push(shape("circle", {cx: x(across), cy: y(bytes), r: 3.5, class: "state"}));
  // each line bears its name above it, or below where the other is close above
  const place = (mine, other) => y(mine) + (mine < other && y(mine) - y(other) < 26 ? 17 : -8);
  made.push(shape("text", {x: RIGHT - 6, y: place(bytes, cache * across), class: "label state"}, "memory: " + size(bytes)));
  if (over.length) {
    const [, end] = over.at(-1);
    made.push(shape("text", {x: RIGHT - 6, y: place(end, bytes), class: "label cache"}, "KV cache: " + size(end)));
  }
  svg.replaceChildren(...made);
  svg.setAttribute("aria-label", `Memory against tokens read: ${size(bytes)} after ${number(across)} tokens, where it ` +
    `was ${size(points[0][1])} after ${number(points[0][0])}. A KV cache would have ${size(cache * across)}.`);
}
