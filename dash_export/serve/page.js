// The page: conversations, kept in this browser. What a model or a user wrote is only ever set as text, never as HTML.

import {$, DENSE, askForKey, button, headers, keep, keepSettings, listModels, make, onFull, read, say, settings, store,
  told} from "./parts.js";

const CHAT = "dash-export.chat.", log = $("log"), draft = $("prompt");

Object.assign(settings, {budget: "", system: "", temperature: "0.3", length: "512", ...settings});
let chat = null;  // {id, turns}; a turn is {text, seed, answer, dense}, the last with all layers, if asked for
let running = null;  // {answer, stop} while an answer comes in
const updates = new Map();  // answer that is shown -> function that brings its view up to date

// ---- What is kept: the settings, and a record for each conversation.

const chatIds = () => Object.keys(store).filter(name => name.startsWith(CHAT))
  .map(name => Number(name.slice(CHAT.length))).filter(id => kept(id).turns.length).sort((one, other) => other - one);

const fresh = () => ({id: Date.now(), turns: []});
const kept = id => ({id, turns: [read(CHAT + id) ?? []].flat().filter(turn => typeof turn?.text === "string")});

onFull(() => {
  const oldest = chatIds().at(-1);
  if (!oldest || oldest === chat.id) return false;
  store.removeItem(CHAT + oldest);
  return true;
});

const keepChat = ({id, turns}) => turns.length && keep(CHAT + id, turns);

// ---- Elements

const tools = actions => make("div", {className: "tools"},
  ...Object.entries(actions).map(([name, act]) => button(name, act)));

/** Return what a Copy button does. */
const copier = text => async ({target}) => {
  if (navigator.clipboard) await navigator.clipboard.writeText(text());
  else {  // A page that came by http from another machine has only this.
    const field = make("textarea", {value: text()});
    target.after(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say(target.textContent = "Copied");
  setTimeout(() => { target.textContent = "Copy"; }, 1500);
};

/** Return elements of Markdown: blocks of code, headings, items, `code` and **bold**. All else stays as it is. */
function markdown(text) {
  const marked = line => line.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part, place) => place % 2 === 0 ? part
    : part[0] === "`" ? make("code", {}, part.slice(1, -1)) : make("strong", {}, part.slice(2, -2)));
  const block = line => {
    const head = line.match(/^#{1,6} +(.*)/)?.[1];
    const [, mark, item] = line.match(/^(\s*(?:[-*+]|\d+[.)])) +(.*)/) ?? [];
    if (!mark) return make("div", {className: head ? "head" : ""}, ...marked(head ?? line));
    return make("div", {className: "item"}, make("span", {}, mark.replace(/[-*+]/, "•")), ...marked(item));
  };
  const parts = text.split(/^[ \t]*```(.*)\n?/m);  // text, language, code, nothing, text, ...
  return parts.flatMap((part, place) => {
    if (place % 4 === 0) return part.trim() ? part.trim().split("\n").map(block) : [];
    if (place % 4 !== 2) return [];
    const bar = make("div", {className: "bar"}, parts[place - 1], tools({Copy: copier(() => part)}));
    return make("div", {className: "code"}, bar, make("pre", {tabIndex: 0}, part));
  });
}

// ---- Skip maps

/** Paint a pixel for each layer of each token; CSS stretches the canvas. */
function paint(canvas, {tokens, layers}) {
  const colours = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  Object.assign(canvas, {width: layers, height: tokens.length});
  pen.fillStyle = colours.getPropertyValue("--run");
  pen.fillRect(0, 0, layers, tokens.length);
  pen.fillStyle = colours.getPropertyValue("--skip");
  tokens.forEach(([, skipped], row) => skipped.forEach(layer => pen.fillRect(layer, row, 1, 1)));
}

function mapLabel({tokens, layers}) {
  const skipped = tokens.reduce((sum, [, some]) => sum + some.length, 0) / tokens.length;
  return `Skip map: ${tokens.length} tokens, ${(layers - skipped).toFixed(1)} of ${layers} layers each`;
}

function openMap(answer) {
  $("map-title").textContent = $("whole").ariaLabel = mapLabel(answer);
  $("layers").textContent = `layers 0 to ${answer.layers - 1}`;
  $("tokens").replaceChildren(...answer.tokens.map(([text]) => make("div", {}, text.replaceAll("\n", "⏎") || " ")));
  paint($("whole"), answer);
  $("map").showModal();
}

// ---- The conversation's view

const blank = asked => ({asked, tokens: [], layers: 0, note: "stopped"});  // a token: [its text, layers it skipped]
const textOf = answer => answer.tokens.map(([text]) => text).join("");

function figures({tokens, speed, usage, note}, comes) {
  if (comes && !tokens.length) return "Reading …";
  return [`${tokens.length} tokens`, speed && `${speed.toFixed(1)} tokens/s`,
    usage?.layers_per_token && `${usage.layers_per_token.toFixed(1)} layers a token`,
    usage?.time_of_dense && `${usage.time_of_dense.toFixed(2)} of dense time`,
    !comes && note].filter(Boolean).join(" · ");
}

function answerView(answer, actions) {
  const canvas = make("canvas"), text = make("div", {className: "text"}), under = tools(actions);
  const strip = make("button", {type: "button", className: "strip", onclick: () => openMap(answer)}, canvas);
  const caption = make("div", {className: "small"}), told = make("div", {className: "small figures"});
  const refresh = () => {
    const comes = running?.answer === answer;
    caption.textContent = [answer.model, answer.asked].filter(Boolean).join(" · ");
    text.replaceChildren(...markdown(textOf(answer)));
    told.textContent = answer.error ?? figures(answer, comes);
    told.classList.toggle("error", "error" in answer);
    under.style.visibility = comes ? "hidden" : "";
    strip.style.visibility = answer.tokens.length ? "" : "hidden";
    if (!answer.tokens.length) return;
    strip.ariaLabel = strip.title = mapLabel(answer);
    paint(canvas, answer);
  };
  refresh();
  updates.set(answer, refresh);
  return make("div", {className: "answer"}, caption, make("div", {className: "beside"}, strip, text), told, under);
}

function turnView(turn, index) {
  const {text, answer, dense} = turn, own = {Copy: copier(() => text), Edit: () => edit(index)};
  const actions = {Copy: copier(() => textOf(answer)), Retry: () => send(text, index)};
  if (!dense && answer.asked !== DENSE)
    actions["Dense beside"] = () => ask(turn, turn.dense = blank(DENSE), answer.model);
  return make("article", {ariaLabel: `Message ${index + 1}`},
    make("div", {className: "asked"}, make("div", {className: "bubble"}, text), tools(own)),
    make("div", {className: "answers"}, answerView(answer, actions),
      ...dense ? [answerView(dense, {Copy: copier(() => textOf(dense))})] : []));
}

function chatView(id) {
  const other = id === chat.id ? chat : kept(id), title = other.turns[0].text;
  return make("li", {},
    make("button", {type: "button", ariaCurrent: id === chat.id, onclick: () => open(other)}, title),
    make("button", {type: "button", ariaLabel: `Delete: ${title}`, onclick: () => remove(id)}, "✕"));
}

function show() {
  const place = log.scrollTop;
  updates.clear();
  $("welcome").hidden = chat.turns.length > 0;
  $("turns").replaceChildren(...chat.turns.map(turnView));
  log.scrollTop = place;
  $("chats").querySelector("ul").replaceChildren(...chatIds().map(chatView));
  if (document.activeElement === document.body) draft.focus();
}

/** Show more of an answer, and stay at the conversation's end if that is where the reader is. */
function update(answer) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  updates.get(answer)?.();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// ---- What the user does

function open(other) {
  if (other !== chat) running?.stop.abort();
  if (chat) keepChat(chat);
  chat = other;
  show();
  log.scrollTop = log.scrollHeight;
  $("chats").hidePopover();
  draft.focus();
}

function remove(id) {
  if (!confirm("Delete this conversation?")) return;
  store.removeItem(CHAT + id);
  if (id !== chat.id) return show();
  chat.turns.length = 0;  // so that an answer that comes in does not keep it
  open(fresh());
}

/** Send a message in place of the one at `index` and of all that follow. */
function send(text, index = chat.turns.length) {
  if (!text.trim() || (index < chat.turns.length - 1 && !confirm("This removes the messages after it. Go on?"))) return;
  const {model, budget} = settings, turn = {text: text.trim(), seed: Math.floor(Math.random() * 2 ** 31)};
  turn.answer = blank(budget === "1.00" ? DENSE : budget ? `budget ${budget}` : "the server's budget");
  chat.turns.splice(index, Infinity, turn);
  ask(turn, turn.answer, model, budget);
  log.scrollTop = log.scrollHeight;
}

function edit(index) {
  const place = log.querySelectorAll(".asked")[index], before = [...place.childNodes];
  const field = make("textarea", {value: chat.turns[index].text, ariaLabel: "Your message, changed"});
  const go = () => send(field.value, index), cancel = () => {
    place.replaceChildren(...before);
    before.at(-1).lastChild.focus();
  };
  field.onkeydown = event => {
    if (event.key === "Escape") cancel();
    onEnter(event, go);
    event.stopPropagation();  // Escape stops no answer here.
  };
  place.replaceChildren(field, tools({Send: go, Cancel: cancel}));
  field.focus();
}

function onEnter(event, act) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;  // isComposing: Enter chooses a character
  event.preventDefault();
  act();
}

function sendDraft() {
  if (running) return;
  send(draft.value);
  draft.value = "";
}

// ---- The server

/** Return the conversation up to `turn`, without turns that have no answer. */
function messagesTo(turn) {
  const said = chat.turns.slice(0, chat.turns.indexOf(turn)).filter(({answer}) => answer.tokens.length);
  return [...settings.system ? [{role: "system", content: settings.system}] : [],
    ...said.flatMap(({text, answer}) => [{role: "user", content: text}, {role: "assistant", content: textOf(answer)}]),
    {role: "user", content: turn.text}];
}

/** Let the server answer `turn`. */
async function ask(turn, answer, model, budget) {
  running?.stop.abort();
  const mine = running = {answer, stop: new AbortController()}, ours = chat;
  const dash = {skips: true, ...answer.asked === DENSE ? {policy: DENSE} : budget && {budget: Number(budget)}};
  const body = {model, messages: messagesTo(turn), dash, seed: turn.seed, temperature: Number(settings.temperature),
    ...settings.length && {max_tokens: Number(settings.length)}, repetition_penalty: 1.1,
    stream: true, stream_options: {include_usage: true}};
  $("send").textContent = "Stop";
  keepChat(ours);
  show();
  say("Answering");
  try {
    const reply = await fetch("v1/chat/completions",
      {method: "POST", signal: mine.stop.signal, headers: headers(), body: JSON.stringify(body)});
    if (reply.status === 401) askForKey();
    if (!reply.ok) throw new Error(await told(reply));
    let began = 0;
    for await (const chunks of events(reply.body)) {
      began ||= performance.now();
      for (const chunk of chunks) take(answer, chunk);
      answer.speed = answer.usage?.tokens_per_second ?? 1000 * answer.tokens.length / (performance.now() - began + 1);
      update(answer);
    }
    say(textOf(answer));
  } catch (error) {
    if (error instanceof TypeError) answer.error = "The server does not answer. Does it still run?";
    else if (error.name !== "AbortError") answer.error = error.message;
    say(answer.error ?? "Stopped");
  }
  if (running === mine) running = null;
  $("send").textContent = running ? "Stop" : "Send";
  update(answer);
  keepChat(ours);
}

/** Yield server-sent events, those together that came together. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield lines.filter(line => line.startsWith("data: {")).map(line => JSON.parse(line.slice(6)));
  }
}

function take(answer, {error, model, choices: [choice] = [], dash, usage}) {
  if (error) throw new Error(error.message);
  const text = choice?.delta.content ?? "", skipped = dash?.skipped_layers;
  answer.model = model;
  if (skipped) answer.layers = dash.layers;
  if (skipped || text) answer.tokens.push([text, skipped ?? []]);
  if (choice?.finish_reason) answer.note = choice.finish_reason === "length" ? "cut: see Length in Settings" : "";
  if (usage) answer.usage = usage.dash;
}

// ---- Start

for (let part = 95; part >= 40; part -= 5) $("budget").append(new Option((part / 100).toFixed(2)));
for (const name of ["model", "budget", "system", "temperature", "length"]) {
  $(name).value = settings[name];
  $(name).onchange = ({target}) => {
    if (target.validity.valid) settings[name] = target.value;
    keepSettings();
  };
}
$("new").onclick = () => open(fresh());
$("send").onclick = () => running ? running.stop.abort() : sendDraft();
for (const one of document.querySelectorAll("#welcome button")) one.onclick = () => send(one.textContent);
$("budget-told").textContent = $("budget-help").textContent;
draft.onkeydown = event => {
  onEnter(event, sendDraft);
  if (event.key === "ArrowUp" && !draft.value && chat.turns.length) edit(chat.turns.length - 1);
};
addEventListener("keydown", event => {
  if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) running?.stop.abort();
});
addEventListener("pagehide", () => keepChat(chat));
open(chatIds().map(kept)[0] ?? fresh());
listModels();
