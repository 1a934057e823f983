// The page begins here: what a person does is led to the part that does it.

import {meet} from "./api.js";
import {$, say, view} from "./dom.js";
import * as library from "./library.js";
import * as reading from "./reading.js";
import * as store from "./store.js";
import * as surprise from "./surprise.js";
import * as talk from "./talk.js";

const SETTINGS = ["mode", "max_tokens", "temperature", "top_p", "seed"], THEMES = ["auto", "light", "dark"];

async function begin() {
  try {
    await meet();
    await library.refresh();
    reading.show();
    talk.resume();
  } catch (error) { say(error.message, true); }
}

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = name;
  $("theme").textContent = "◐ " + name;
  $("theme").setAttribute("aria-label", `colours: ${name}`);
  localStorage.setItem("megalodon.theme", name);
}

function startAnew() {
  store.go(null);
  view("talk");
  $("prompt").focus();
}

document.addEventListener("head", () => { talk.render(); reading.show(); library.render(); surprise.reset(); });
document.addEventListener("contexts", library.refresh);
document.addEventListener("read", surprise.look);
window.addEventListener("pagehide", library.flush);

$("form").onsubmit = event => { event.preventDefault(); talk.send(); };
$("surprise").onsubmit = event => { event.preventDefault(); surprise.look(); };
$("stop").onclick = talk.stop;
$("stop-reading").onclick = reading.stop;
$("new").onclick = startAnew;
$("undo").onclick = library.undo;
$("key").onchange = begin;
$("theme").onclick = () => theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % THEMES.length]);
$("file").onchange = event => { reading.read([...event.target.files]); event.target.value = ""; };
for (const button of document.querySelectorAll("#views button")) button.onclick = () => view(button.dataset.view);

document.addEventListener("keydown", event => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && event.target === $("prompt")) { event.preventDefault(); talk.send(); }
  if (event.key === "Escape") talk.stop();
  if (event.altKey && event.key.toLowerCase() === "n") { event.preventDefault(); startAnew(); }
});

for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    if (!event.dataTransfer.types.includes("Files")) return; // words that are dragged into the box stay words
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
  });
}
document.addEventListener("drop", event => reading.read([...event.dataTransfer.files]));

for (const name of SETTINGS) {
  const kept = localStorage.getItem("megalodon.setting." + name);
  if (kept !== null) $(name).value = kept;
  $(name).addEventListener("change", () => localStorage.setItem("megalodon.setting." + name, $(name).value));
}
$("prompt").value = sessionStorage.getItem("megalodon.draft") ?? "";
window.addEventListener("pagehide", () => sessionStorage.setItem("megalodon.draft", $("prompt").value));
window.addEventListener("storage", store.follow);

theme(localStorage.getItem("megalodon.theme") ?? "auto");
store.load();
talk.render();
surprise.reset();
reading.show();
begin();
