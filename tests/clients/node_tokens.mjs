/** Greedy tokens of chats on onnxruntime-node, by the browser example's modules: JSON in, JSON out. */

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Tokenizer } from "../../examples/browser/client/tokenizer.mjs";
import { checkManifest } from "../../examples/browser/client/bundle.mjs";
import { checkRuntime, readManifest } from "../../examples/browser/client/manifest.mjs";
import { TrustStore } from "../../examples/browser/client/trust.mjs";
import { encodeChat } from "../../examples/browser/client/prompt.mjs";
import { chooseVariant, Student } from "../../examples/browser/client/student.mjs";

const require = createRequire(new URL("../../examples/browser/package.json", import.meta.url));

let input = "";
for await (const piece of process.stdin) input += piece;
const job = JSON.parse(input);

/** What the module under test says of every golden case. */
async function vectors() {
  const tokenizer = new Tokenizer(JSON.parse(await readFile(job.tokenizer, "utf-8")));
  const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
  const textOf = (ids) => Buffer.concat(ids.map((id) => tokenizer.bytesOf(id))).toString();
  return {
    tokenizer: job.texts.map((text) => {
      const ids = tokenizer.encode(text);
      return { text, ids, decoded: textOf(ids) };
    }),
    template: job.chats.map((messages) => refusal(() => encodeChat(tokenizer, job.template, messages))),
    bundles: await Promise.all(
      job.bundles.map(({ manifest, signature }) =>
        refusal(async () => {
          const trust = TrustStore.of(job.trusted);
          const body = await checkManifest(bytes(manifest), Buffer.from(signature), trust, Date.now() / 1000);
          return body.version;
        }),
      ),
    ),
    runtimes: await Promise.all(
      job.runtimes.map(({ manifest, have }) =>
        refusal(async () => checkRuntime(readManifest(bytes(manifest)), have) ?? null),
      ),
    ),
    rotations: await Promise.all(job.rotations.map(rotation)),
  };
}

/** Who is known after a chain of statements, and the key that counts, also after a visit's end. */
async function rotation({ trust, chain, key_id: keyId, now_s: nowS }) {
  const before = TrustStore.of(trust);
  const wiser = await before.withChain(chain, nowS);
  const kept = before.withLearnt(JSON.parse(JSON.stringify(wiser.learnt)));
  const known = wiser.keys.map((key) => [key.key_id, key.introduced_by ?? null]);
  const key = await refusal(() => wiser.keyFor(keyId, nowS));
  return { known, key, keptKey: await refusal(() => kept.keyFor(keyId, nowS)) };
}

async function refusal(work) {
  try {
    return await work();
  } catch (error) {
    return error.code ?? `${error}`;
  }
}

async function tokens() {
  const ort = require("onnxruntime-node");
  const manifest = JSON.parse(await readFile(join(job.bundle, "manifest.json"), "utf-8"));
  const file = (path) => readFile(join(job.bundle, path));
  const variant = chooseVariant(manifest, [job.precision]);
  const options = { executionProviders: ["cpu"], intraOpNumThreads: 1 };
  const student = await Student.open(
    ort, manifest, await file(variant.file), await file(manifest.tokenizer_file), options,
  );
  const answers = [];
  for (const messages of job.chats) {
    const ids = [];
    for await (const token of student.answer(messages, job.numTokens)) ids.push(token.id);
    answers.push(ids);
  }
  return { answers, version: ort.env.versions.node };
}

const result = job.what === "vectors" ? await vectors() : await tokens();
if (Array.isArray(result.template)) result.template = await Promise.all(result.template);
process.stdout.write(JSON.stringify(result));
