// What this browser remembers: the conversations as one tree. A node is a text that was read, a turn, or a context that
// was found on the server; its `context` is the model's state after it, so any node can be gone on from. Each node is an
// entry of its own, so that two tabs never write over each other.

import {say} from "./dom.js";

const NODE = "megalodon.node.", HEAD = "megalodon.head";
const nodes = new Map();
let head = null;

export function load() {
  for (let place = 0; place < localStorage.length; place++) {
    const name = localStorage.key(place);
    if (!name.startsWith(NODE)) continue;
    const node = JSON.parse(localStorage.getItem(name));
    nodes.set(node.id, node);
  }
  const kept = sessionStorage.getItem(HEAD) ?? localStorage.getItem(HEAD);
  head = nodes.has(kept) ? kept : null;
}

/** What another tab changed. */
export function follow({key, newValue}) {
  if (!key?.startsWith(NODE)) return;
  if (newValue === null) nodes.delete(key.slice(NODE.length)); else nodes.set(key.slice(NODE.length), JSON.parse(newValue));
  go(nodes.has(head) ? head : null);
}

/** Keep a node. If the browser has no room for it, it lasts until the page is left, and the person is told. */
export function put(node) {
  nodes.set(node.id, node);
  try {
    localStorage.setItem(NODE + node.id, JSON.stringify(node));
  } catch (error) {
    say(`this browser has no room for what is written here, a reload will lose it: ${error.message}`, true);
  }
  return node;
}

export const get = id => nodes.get(id);
export const all = () => [...nodes.values()];
export const current = () => nodes.get(head) ?? null;

/** From where the next turn goes on; null for a new text. */
export function go(id) {
  head = id;
  for (const storage of [sessionStorage, localStorage]) {
    if (id === null) storage.removeItem(HEAD); else storage.setItem(HEAD, id);
  }
  document.dispatchEvent(new Event("head"));
}

/** The nodes from the first to this one. */
export function path(id) {
  const found = [];
  for (let node = nodes.get(id); node; node = nodes.get(node.parent)) found.unshift(node);
  return found;
}

export const children = id => all().filter(node => node.parent === id).sort((a, b) => a.at - b.at);

/** The newest end of what goes on from a node. */
export function latest(id) {
  for (let after = children(id); after.length; after = children(id)) id = after.at(-1).id;
  return id;
}

export const ofContext = context => all().find(node => node.context === context);

export function drop(id) {
  const {parent} = nodes.get(id);
  nodes.delete(id);
  localStorage.removeItem(NODE + id);
  if (head === id) go(nodes.has(parent) ? parent : null);
}

/** Forget the nodes of contexts that are gone, but for those that others go on from. */
export function forget(contexts) {
  const gone = new Set(contexts);
  for (let before = -1; before !== nodes.size;) {
    before = nodes.size;
    for (const node of all()) if (gone.has(node.context) && !children(node.id).length) drop(node.id);
  }
  for (const node of all()) if (gone.has(node.context)) put({...node, context: null});
}

/** Run `work` when no other tab holds the name. Browsers have no locks on plain HTTP from another machine: there,
    a second tab takes a turn that the first still runs for one that was broken off. */
export function holding(name, work) {
  return navigator.locks ? navigator.locks.request("megalodon." + name, work) : work();
}

/** The node as it is kept now: another tab may have got on with it. */
export const kept = id => JSON.parse(localStorage.getItem(NODE + id));
