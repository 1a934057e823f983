// Asking the server: with the key, with its own words for what is wrong, and answers that arrive in parts.

import {$} from "./dom.js";

/** What is known of the server: the model's name, and bytes per token of the cache that it is compared with. */
export const server = {model: "", cache: 0};

export async function api(path, options = {}) {
  const headers = {...options.headers};
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  const answer = await fetch(path, {...options, headers});
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(body.error ? body.error.message : "HTTP " + answer.status), {status: answer.status});
  }
  return answer;
}

export const json = (method, body) =>
  ({method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});

export async function meet() {
  const model = (await (await api("v1/models")).json()).data[0];
  server.model = model.id;
  server.cache = model.kv_cache_bytes_per_token;
  $("model").textContent = model.id;
}

/** All contexts, newest first. */
export async function contexts() {
  const found = [];
  for (let more = true; more;) {
    const after = found.length ? "&after=" + found.at(-1).id : "";
    const page = await (await api("v1/contexts?limit=1000" + after)).json();
    found.push(...page.data);
    more = page.has_more;
  }
  return found;
}

/** The events of a streaming answer. Comments tell how far the reading is: `tell` gets them. */
export async function* events(answer, tell) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) { tell(part.slice(2)); continue; }
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
