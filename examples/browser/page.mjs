/** The page: wires the form to the assistant and shows who answered, how fast, and why. */

import { Assistant } from "./client/assistant.mjs";
import { openBundle, openKept } from "./client/bundle.mjs";
import { Edge } from "./client/edge.mjs";
import { LongshoreError } from "./client/errors.mjs";
import { BrowserStore } from "./client/store.mjs";
import { chooseVariant, Student } from "./client/student.mjs";

const RUNTIME = new URL("./node_modules/onnxruntime-web/dist/", location.href).href;
const MAX_TOKENS = 96;
const SAMPLE_SHEET = "The lamp is red. The lamp costs $7. There are 12 lamps in stock.";
const at = (id) => document.getElementById(id);

/** `config.json` beside the page: edge_url, api_key, bundle, model, instruction, trusted_keys. */
const config = await (await fetch("config.json", { cache: "no-store" })).json();
const edge = new Edge(config.edge_url, config.api_key);
let opened = null; // the promise of a Student; cleared where it fails
let modelDigest = null;

function say(text, isWarning = false) {
  at("status").textContent = text;
  at("status").classList.toggle("warn", isWarning);
}

/** The runtime; loaded late, so that the page works without it. */
async function loadRuntime() {
  const ort = await import(`${RUNTIME}ort.wasm.min.mjs`).catch(() => {
    throw new LongshoreError("device_failed", "the runtime can't be loaded");
  });
  ort.env.wasm.numThreads = 1; // more need a page that is isolated from other origins
  ort.env.wasm.wasmPaths = RUNTIME;
  return ort;
}

/** The edge's version; where that is refused or breaks, the one that ran on the last visit. */
async function open() {
  say("Checking the bundle");
  const keeper = [config.bundle, config.trusted_keys, new BrowserStore()];
  try {
    return await start(await openBundle(edge, ...keeper));
  } catch (error) {
    return await start(await openKept(error, ...keeper));
  }
}

async function start(bundle) {
  const { manifest } = bundle;
  const variant = chooseVariant(manifest, config.precisions);
  const tokenizer = await bundle.read(manifest.tokenizer_file);
  const graph = await bundle.read(variant.file, showProgress);
  const student = await Student.open(await loadRuntime(), manifest, graph, tokenizer, { executionProviders: ["wasm"] });
  await bundle.keep();
  modelDigest = manifest.model_digest;
  const size = (graph.length / 1e6).toFixed(1);
  say(`${manifest.name} ${manifest.version} is ready on this device (${variant.name}, ${size} MB, signed by ${manifest.key_id})`);
  return student;
}

function showProgress(done, total) {
  at("progress").hidden = done === total;
  at("progress").value = done / total;
  say(`Downloading the model: ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
}

/** The student; a start that failed is tried again at the next question. */
function student() {
  opened ??= open().catch((error) => {
    opened = null;
    at("progress").hidden = true;
    say(`Not on this device: ${error.message}`, true);
    throw error;
  });
  return opened;
}

const assistant = new Assistant(edge, config.model, () => modelDigest, student);

async function ask(event) {
  event.preventDefault();
  const card = at("answer").content.cloneNode(true).firstElementChild;
  const part = (name) => card.querySelector(`.${name}`);
  part("question").textContent = at("question").value;
  at("answers").prepend(card);
  at("ask").disabled = true;
  const system = `${config.instruction}\n${at("sheet").value}`;
  const messages = [{ role: "system", content: system }, { role: "user", content: at("question").value }];
  const emit = (text) => (part("text").textContent += text);
  try {
    show(card, part, await assistant.ask(messages, { maxTokens: MAX_TOKENS, isPrivate: at("private").checked, emit }));
  } catch (error) {
    part("text").textContent ||= "No answer.";
    part("why").textContent = `${error.code ?? "error"}: ${error.message}`;
    part("why").hidden = false;
    card.dataset.tier = "error";
  }
  at("ask").disabled = false;
}

function show(card, part, answer) {
  part("tier").textContent = answer.tier;
  part("time").textContent = `first token after ${Math.round(answer.ttftMs)} ms, whole after ${Math.round(answer.totalMs)} ms`;
  part("why").textContent = answer.fallback ? `not by the device: ${answer.fallback}` : "";
  part("why").hidden = !answer.fallback;
  card.dataset.tier = answer.tier;
}

at("sheet").value = config.sheet ?? SAMPLE_SHEET;
at("question").value = config.question ?? "What is the price of the lamp?";
at("form").addEventListener("submit", ask);
await student().catch(() => {});
document.body.dataset.ready = "yes";
