// What the pages share: elements, settings kept in this browser, the key, and the list of models.

const SETTINGS = "dash-export.settings";
export const DENSE = "dense";

export const $ = id => document.getElementById(id);
export let store = {getItem: () => null, setItem() {}, removeItem() {}};
try { store = localStorage; } catch { /* This browser keeps nothing. */ }

export const read = name => { try { return JSON.parse(store.getItem(name)); } catch { return null; } };  // null: damaged
export const settings = {model: "", ...read(SETTINGS)};
let key = settings.key ?? "";
let makeRoom = () => false;

/** Let `act` remove something when the browser's store is full; it returns whether it has. */
export const onFull = act => { makeRoom = act; };

export function keep(name, record) {
  try { store.setItem(name, JSON.stringify(record)); } catch { if (makeRoom()) keep(name, record); }
}

export const keepSettings = () => keep(SETTINGS, {...settings, key: $("keep").checked ? key : undefined});

export function make(tag, traits = {}, ...children) {
  const node = Object.assign(document.createElement(tag), traits);
  node.append(...children);
  return node;
}

export const button = (name, onclick) => make("button", {type: "button", onclick}, name);
export const say = text => { $("status").textContent = text; };  // to screen readers

// ---- The server

export const headers = () => ({"content-type": "application/json", ...key && {authorization: `Bearer ${key}`}});

/** Return the error that the server tells. */
export const told = async reply => (await reply.json().catch(() => null))?.error?.message ?? `Status ${reply.status}`;

export async function listModels() {
  const reply = await fetch("v1/models", {headers: headers()}).catch(() => null);
  if (reply?.status === 401) askForKey();
  if (!reply?.ok) return;
  const names = (await reply.json()).data.map(({id}) => id);
  if (!names.includes(settings.model)) [settings.model] = names;
  $("model").replaceChildren(...names.map(name => new Option(name, name, false, name === settings.model)));
  $("refused").hidden = true;
}

export function askForKey() {
  $("locked").hidden = false;
  $("refused").hidden = !key;
  if (!$("settings").open) $("settings").showModal();
  $("key").focus();
}

$("key").value = key;
$("locked").hidden = !key;
$("keep").checked = Boolean(key);
$("keep").onchange = keepSettings;
$("key").onchange = () => { key = $("key").value; keepSettings(); listModels(); };
for (const one of document.querySelectorAll("[data-opens]")) one.onclick = () => $(one.dataset.opens).showModal();
