/** The manifest of a bundle: plain data, every field checked. Files and signatures are bundle.mjs's. */

import { damaged, incompatible } from "./errors.mjs";
import { formed, list, must, named, object, readJson, table, text, whole } from "./fields.mjs";
import { MAX_STATEMENT_CHARS } from "./trust.mjs";

const MOST = 2 ** 53;
const PRECISIONS = /^(fp32|int8|int4)$/;
const SHA256 = /^[0-9a-f]{64}$/;
const PATH = /^[A-Za-z0-9_][A-Za-z0-9_.-]*(\/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,3}$/;
const RESERVED = new Set(["manifest.json", "manifest.sig"]);

/** The manifest in `body`; throws bundle_damaged with the field at fault. */
export function readManifest(body) {
  const value = readJson(body, "manifest", MANIFEST);
  checkPaths(value);
  if (value.vision) checkBuckets(value.vision, value.vision_buckets ?? []);
  return value;
}

const path = must(
  (value) =>
    typeof value === "string" &&
    value.length <= 200 &&
    PATH.test(value) &&
    !value.split("/").some((part) => part.endsWith(".")) &&
    !RESERVED.has(value.toLowerCase()),
);

const FILE_FIELDS = object(
  { path, size_bytes: whole(0, 8 * 1024 ** 3), sha256: formed(SHA256) },
  { chunk_sha256: list(0, 65536, formed(SHA256)) },
  { chunk_bytes: whole(4096, 2 ** 30) },
);

function file(value, at) {
  FILE_FIELDS(value, at);
  const { chunk_bytes: chunkBytes = null, chunk_sha256: digests = [] } = value;
  const numChunks = chunkBytes === null ? 0 : Math.ceil(value.size_bytes / chunkBytes);
  if (digests.length !== numChunks) throw damaged(`${at} has the wrong number of chunks`);
}

const affixes = object({ prefix: text(1000), suffix: text(1000) });
const folderName = must(
  (value) => typeof value === "string" && /^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$/.test(value) && !value.endsWith("."),
);

const MANIFEST = object(
  {
    name: folderName,
    version: whole(1, MOST),
    model_digest: formed(/^[0-9a-f]{32,128}$/),
    files: list(1, 256, file),
    variants: list(
      1,
      16,
      object(
        { name: named(100), file: path, precision: formed(PRECISIONS) },
        { graph: formed(/^(traced|built)$/), required_operators: list(0, 200, named(100)) },
        { prefill_file: path }, // reads prompts faster, with the weights that lie in `file`
      ),
    ),
    tokenizer_file: path,
    kv: object(
      { num_layers: whole(1, 1024), num_kv_heads: whole(1, 1024), head_dim: whole(1, 4096), max_tokens: whole(1, 2 ** 20) },
      { dtype: formed(/^(float32|float16|int8)$/) },
    ),
    chat_template: object(
      { jinja: text(100_000), roles: table(8, affixes) },
      { start: text(1000), generation_prompt: text(1000) },
    ),
    eos_token_ids: list(1, 16, whole(0, 2 ** 31 - 1)),
    min_onnxruntime: formed(/^[0-9]{1,6}(\.[0-9]{1,6}){0,3}$/),
    opset: whole(13, 100),
  },
  {
    vision_buckets: list(
      0,
      64,
      object({ width_px: whole(1, 8192), height_px: whole(1, 8192), num_tokens: whole(1, 65536) }),
    ),
    capabilities: table(64, must((value) => ["string", "number", "boolean"].includes(typeof value))),
    key_chain: list(0, 8, text(MAX_STATEMENT_CHARS)),
    format_version: whole(1, 1),
  },
  {
    key_id: text(64),
    expires_at: whole(0, MOST),
    vision: object({
      encoder_file: path,
      image_token_id: whole(0, 2 ** 31 - 1),
      unit_px: whole(1, 1024),
      hidden_size: whole(1, 65536),
    }),
  },
);

/** An encoder needs sizes to run at, each a whole number of its units and with the tokens that makes. */
function checkBuckets({ unit_px: unit }, buckets) {
  if (buckets.length === 0) throw damaged("an encoder has no size");
  if (new Set(buckets.map((item) => `${item.width_px} ${item.height_px}`)).size !== buckets.length) {
    throw damaged("a size stands twice");
  }
  for (const { width_px: width, height_px: height, num_tokens: tokens } of buckets) {
    if (width % unit || height % unit || tokens !== (width / unit) * (height / unit)) {
      throw damaged(`${width} x ${height} is not ${tokens} units of ${unit} pixels`);
    }
  }
}

function checkPaths(manifest) {
  const paths = new Set(manifest.files.map((entry) => entry.path));
  const folded = new Set([...paths].map((entry) => entry.toLowerCase())); // some file systems know no case
  if (folded.size !== manifest.files.length) throw damaged("a path stands twice");
  for (const entry of folded) {
    const parts = entry.split("/");
    const isBelow = parts.some((_, count) => count > 0 && folded.has(parts.slice(0, count).join("/")));
    if (isBelow) throw damaged(`${entry} lies below a file`);
  }
  if (new Set(manifest.variants.map((variant) => variant.name)).size !== manifest.variants.length) {
    throw damaged("a variant stands twice");
  }
  const graphs = manifest.variants.flatMap((variant) => [variant.file, variant.prefill_file ?? variant.file]);
  const encoders = manifest.vision ? [manifest.vision.encoder_file] : [];
  for (const needed of [manifest.tokenizer_file, ...graphs, ...encoders]) {
    if (!paths.has(needed)) throw damaged(`${needed} is not listed`);
  }
}

/** Throws bundle_incompatible where the bundle needs a newer ONNX Runtime than `version`. */
export function checkRuntime(manifest, version) {
  const parts = (text) => [...(text.match(/[0-9]+/g) ?? []).map(Number), 0, 0, 0].slice(0, 3);
  const [have, need] = [parts(version), parts(manifest.min_onnxruntime)];
  const at = have.findIndex((part, index) => part !== need[index]);
  if (at >= 0 && have[at] < need[at]) {
    throw incompatible(`the bundle needs ONNX Runtime ${manifest.min_onnxruntime}, not ${version}`);
  }
}
