/**
 * Drives headless Chromium for the tests: a list of steps on standard input, a list of results on standard
 * output, both JSON. Judges nothing.
 */

import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const require = createRequire(new URL("../../examples/browser/package.json", import.meta.url));
const { chromium } = require("playwright-core");

const FLAGS = [
  "--headless",
  "--no-sandbox", // root in a container has no other way
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-dev-shm-usage",
];
const TIMEOUT_MS = 40_000;

let input = "";
for await (const piece of process.stdin) input += piece;
const { executable, url, steps } = JSON.parse(input);

const STEPS = {
  async open(page) {
    await page.goto(url);
    await page.waitForSelector("body[data-ready]");
    return { status: await page.textContent("#status") };
  },

  async ask(page, { sheet, question, isPrivate = false }) {
    await page.fill("#sheet", sheet);
    await page.fill("#question", question);
    await page.setChecked("#private", isPrivate);
    await page.click("#ask");
    await page.waitForSelector("#answers article[data-tier]:first-child");
    const card = page.locator("#answers article").first();
    const [text, time, why] = await Promise.all(
      ["text", "time", "why"].map((name) => card.locator(`.${name}`).textContent()),
    );
    return { tier: await card.getAttribute("data-tier"), text, time, why };
  },

  /** Greedy tokens of chats, by the page's own modules. */
  async tokens(page, { bundle, chats, numTokens }) {
    return page.evaluate(greedyTokens, { bundle, chats, numTokens });
  },

  /** How many files the page asked for since the last time, by path. */
  async requests(page) {
    return page.longshoreRequests.splice(0);
  },

  /** From now on requests whose address holds `text` fail. */
  async block(page, { text }) {
    await page.route((address) => address.href.includes(text), (route) => route.abort());
    return null;
  },

  /** From now on the page reads its settings with these changes. */
  async configure(page, { changes }) {
    await page.route("**/config.json", async (route) => {
      const response = await route.fetch();
      await route.fulfill({ response, json: { ...(await response.json()), ...changes } });
    });
    return null;
  },

  /** From now on one bit of each answer whose address holds `text` is wrong. */
  async damage(page, { text }) {
    await page.route((address) => address.href.includes(text), async (route) => {
      const response = await route.fetch();
      const body = await response.body();
      body[body.length >> 1] ^= 1;
      await route.fulfill({ response, body });
    });
    return null;
  },

  async remember(page, { key, value }) {
    return page.evaluate(([name, text]) => localStorage.setItem(name, text), [key, value]);
  },

  async screenshot(page, { path }) {
    await page.screenshot({ path, fullPage: true });
    return null;
  },
};

/** Runs in the page. */
async function greedyTokens({ bundle, chats, numTokens }) {
  const load = (path) => import(new URL(path, location.href).href);
  const { openBundle } = await load("client/bundle.mjs");
  const { Edge } = await load("client/edge.mjs");
  const { MemoryStore } = await load("client/store.mjs");
  const { Student, chooseVariant } = await load("client/student.mjs");
  const ort = await load("node_modules/onnxruntime-web/dist/ort.wasm.min.mjs");
  const config = await (await fetch("config.json")).json();
  const edge = new Edge(config.edge_url, config.api_key);
  const { manifest, read } = await openBundle(edge, bundle, config.trusted_keys, new MemoryStore());
  const variant = chooseVariant(manifest);
  const graph = await read(variant.file);
  const options = { executionProviders: ["wasm"] };
  const student = await Student.open(ort, manifest, graph, await read(manifest.tokenizer_file), options);
  const answers = [];
  const begun = performance.now();
  let count = 0;
  for (const messages of chats) {
    const ids = [];
    for await (const token of student.answer(messages, numTokens)) ids.push(token.id);
    answers.push(ids);
    count += ids.length;
  }
  return { answers, version: ort.env.versions.web, msPerToken: (performance.now() - begun) / count };
}

const profile = await mkdtemp(join(tmpdir(), "longshore-chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: executable,
  args: FLAGS,
  viewport: { width: 820, height: 900 },
});
try {
  const page = context.pages()[0] ?? (await context.newPage());
  page.setDefaultTimeout(TIMEOUT_MS);
  page.longshoreRequests = [];
  page.on("request", (request) => page.longshoreRequests.push(new URL(request.url()).pathname));
  const problems = [];
  page.on("pageerror", (error) => problems.push(`${error}`));
  const results = [];
  for (const { step, ...fields } of steps) results.push(await STEPS[step](page, fields));
  process.stdout.write(JSON.stringify({ results, problems }));
} finally {
  await context.close();
  await rm(profile, { recursive: true, force: true });
}
