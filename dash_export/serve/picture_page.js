// The page of an image encoder: a picture, what was run for it, and its classes or what it is like. Names of files and
// classes are only ever set as text.

import {$, DENSE, askForKey, headers, keepSettings, listModels, make, say, settings, told} from "./parts.js";

const MOST_BYTES = 3e6, SIDE = 2048;  // a request has 4 MiB, and base64 takes a third more than the file
let shown = null;   // {file, bitmap, sent, note}: the picture that is shown; sent: its data URL
let vector = null;  // of the picture that is shown
let before = null;  // {bitmap, vector, name} of the picture before it
let running = null, taken = 0;

// ---- The picture

/** Return a picture's data URL, of a smaller picture where the file is too large to be sent, and a note about that. */
async function prepared(file, bitmap) {
  if (file.size <= MOST_BYTES) return {sent: await dataUrl(file), note: ""};
  if (!bitmap) throw new Error(`${file.name} has over 3 MB, and this browser cannot make it smaller.`);
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height)), canvas = make("canvas");
  drawn(canvas, bitmap, Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  return {sent: canvas.toDataURL("image/jpeg", .9),
    note: `sent as ${canvas.width} × ${canvas.height} pixels in JPEG, because the file has over 3 MB`};
}

const dataUrl = file => new Promise((done, failed) => {
  const reader = Object.assign(new FileReader(), {onload: () => done(reader.result),
    onerror: () => failed(new Error(`${file.name} cannot be read.`))});
  reader.readAsDataURL(file);
});

function drawn(canvas, bitmap, width, height) {
  Object.assign(canvas, {width, height});
  const pen = canvas.getContext("2d");
  pen.drawImage(bitmap, 0, 0, width, height);
  return pen;
}

async function take(file) {
  if (!file?.type.startsWith("image/")) return fail(`${file?.name ?? "This"} is no picture: choose one.`);
  running?.abort();
  const mine = ++taken;
  try {
    const bitmap = await createImageBitmap(file).catch(() => null);  // null: this browser does not read it
    const next = {file, bitmap, ...await prepared(file, bitmap)};
    if (mine !== taken) return;  // another one came meanwhile
    if (vector) before = {bitmap: shown.bitmap, vector, name: shown.file.name};
    [shown, vector] = [next, null];
  } catch (error) { return fail(error.message); }
  ask();
}

// ---- The view

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = false;
  $("answer").ariaBusy = false;
  $("answer").hidden = !vector;  // else it is of the picture before
  say(text);
}

/** Draw the picture, and the patches over the part of it that the model sees; the rest is dimmed. */
function paint({patches: [rows, columns], seen: [left, top, right, bottom]}) {
  const {bitmap, file, note} = shown, canvas = $("picture");
  canvas.hidden = !bitmap;
  $("caption").textContent = [file.name, `${columns} × ${rows} patches`, note,
    bitmap ? "" : "this browser does not show such pictures"].filter(Boolean).join(" · ");
  if (!bitmap) return;
  const room = canvas.parentNode.clientWidth, dots = devicePixelRatio;
  const scale = dots * Math.min(room / bitmap.width, .6 * innerHeight / bitmap.height);
  const width = Math.max(1, Math.round(bitmap.width * scale)), height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = drawn(canvas, bitmap, width, height);
  canvas.style.width = `${width / dots}px`;
  const [x, y, wide, high] = [left * width, top * height, (right - left) * width, (bottom - top) * height];
  pen.fillStyle = "#000a";
  pen.beginPath();
  pen.rect(0, 0, width, height);
  pen.rect(x, y, wide, high);
  pen.fill("evenodd");
  for (const [colour, shift] of [["#0008", .5], ["#fff8", -.5]]) {  // seen on light and on dark
    const line = (from, size, part) => Math.round(from + size * part) + shift;
    pen.strokeStyle = colour;
    pen.beginPath();
    for (let column = 0; column <= columns; column++) {
      pen.moveTo(line(x, wide, column / columns), y);
      pen.lineTo(line(x, wide, column / columns), y + high);
    }
    for (let row = 0; row <= rows; row++) {
      pen.moveTo(x, line(y, high, row / rows));
      pen.lineTo(x + wide, line(y, high, row / rows));
    }
    pen.stroke();
  }
  canvas.ariaLabel = `${file.name}, with the grid of its patches: ${columns} across, ${rows} down`;
}

const cosine = (one, other) => one.reduce((sum, value, at) => sum + value * other[at], 0);  // of vectors of length 1
const share = part => `${(100 * part).toFixed(1)} %`;

function show({data: [{embedding, dash}], dash: all}, asked) {
  const skipped = new Set(dash.skipped_layers), ran = dash.layers - skipped.size;
  vector = embedding;
  $("welcome").hidden = true;
  $("answer").hidden = false;
  paint(dash);
  const part = dash.guarded ? "Guarded: all" : skipped.size ? `${ran} of` : "All";
  $("verdict").textContent = `${part} ${dash.layers} layers ran`;
  $("guard").textContent = dash.guarded ? "Foreign to what the policy learnt from, so nothing was skipped."
    : asked === DENSE ? "Every layer was asked for." : "Not guarded.";
  $("layers").replaceChildren(...Array.from({length: dash.layers}, (_, layer) =>
    make("li", {className: skipped.has(layer) ? "skipped" : ""}, make("b", {}, layer),
      ` ${skipped.has(layer) ? "skip" : "run"}`)));
  $("figures").textContent = [asked, `${(1000 * all.encode_seconds).toFixed(0)} ms`,
    all.time_of_dense && `${all.time_of_dense.toFixed(2)} of dense time by the cost table`]
    .filter(Boolean).join(" · ");
  $("classes").hidden = !dash.classes;
  $("classes").tBodies[0].replaceChildren(...(dash.classes ?? []).map(({name, probability}) => make("tr", {},
    make("th", {scope: "row"}, name), make("td", {}, share(probability)))));
  $("alike").hidden = Boolean(dash.classes);
  $("before").hidden = !before?.bitmap;
  if (before?.bitmap) {
    const {bitmap} = before;
    drawn($("before"), bitmap, 64, Math.max(1, Math.round(64 * bitmap.height / bitmap.width)));
  }
  $("alike").lastChild.textContent = !before ? "Drop another picture to see how alike the two are."
    : before.vector.length === vector.length ? `Cosine with ${before.name}: ${cosine(vector, before.vector).toFixed(4)}`
    : `${before.name} was read by another model.`;
  say(["verdict", "guard", "figures", ...dash.classes ? [] : ["alike"]].map(id => $(id).textContent).join(" "));
}

// ---- The server

/** Let the server encode the picture that is shown. */
async function ask() {
  if (!shown) return;
  running?.abort();
  const mine = running = new AbortController(), budget = Number($("budget").value);
  const asked = $("recommended").checked ? "recommended budget" : budget === 1 ? DENSE : `budget ${budget.toFixed(2)}`;
  const dash = $("recommended").checked ? {} : budget === 1 ? {policy: DENSE} : {budget};
  $("answer").ariaBusy = true;
  say("Reading");
  try {
    const reply = await fetch("v1/embeddings", {method: "POST", signal: mine.signal, headers: headers(),
      body: JSON.stringify({model: settings.model, input: [shown.sent], dash})});
    if (reply.status === 401) askForKey();
    if (!reply.ok) throw new Error(await told(reply));
    const answer = await reply.json();
    $("error").hidden = true;
    $("answer").ariaBusy = false;
    show(answer, asked);
  } catch (error) {
    if (error.name === "AbortError") return;
    fail(error instanceof TypeError ? "The server does not answer. Does it still run?" : error.message);
  }
}

// ---- What the user does

function tellBudget() {
  $("budget-told").textContent = $("recommended").checked ? "" : Number($("budget").value).toFixed(2);
}

$("budget").oninput = () => { $("recommended").checked = false; tellBudget(); };
$("budget").onchange = ask;
$("recommended").onchange = () => { tellBudget(); ask(); };
$("model").onchange = ({target}) => { settings.model = target.value; keepSettings(); ask(); };
$("choose").onclick = () => $("file").click();
$("file").onchange = ({target}) => { take(target.files[0]); target.value = ""; };
addEventListener("paste", ({clipboardData: {files}}) => { if (files.length) take(files[0]); });
addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", () => document.body.classList.remove("over"));
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
tellBudget();
listModels();
