/** The manifest of a bundle: plain data, every field checked. Files and signatures are bundle.mjs's. */

import { damaged } from "./errors.mjs";

const MAX_DEPTH = 32;
const MOST = 2 ** 53;
const PRECISIONS = /^(fp32|int8|int4)$/;
const SHA256 = /^[0-9a-f]{64}$/;
const PATH = /^[A-Za-z0-9_][A-Za-z0-9_.-]*(\/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,3}$/;
const RESERVED = new Set(["manifest.json", "manifest.sig"]);

/** The manifest in `body`; throws bundle_damaged with the field at fault. */
export function readManifest(body) {
  let text;
  let value;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(body);
    value = JSON.parse(text);
  } catch (error) {
    throw damaged(`the manifest is not JSON: ${error.message}`);
  }
  refuseTwice(text);
  MANIFEST(value, "manifest");
  checkPaths(value);
  return value;
}

/** Of a field that stands twice, other readers may take the other one. */
function refuseTwice(text) {
  const levels = [];
  for (const [token, colon] of text.matchAll(/"(?:[^"\\]|\\.)*"(\s*:)?|[{}[\]]/gs)) {
    if ("{[".includes(token)) levels.push(new Set());
    else if ("}]".includes(token)) levels.pop();
    else if (colon) {
      const name = JSON.parse(token.slice(0, -colon.length));
      if (levels.at(-1).has(name)) throw damaged(`${name} stands twice`);
      levels.at(-1).add(name);
    }
    if (levels.length > MAX_DEPTH) throw damaged("the manifest is nested too deeply");
  }
}

// Each of these gives a check of (value, its name), which throws.

const must = (isRight) => (value, at) => {
  if (!isRight(value)) throw damaged(`${at} can't be ${JSON.stringify(value)?.slice(0, 40)}`);
};
const whole = (least, most) => must((value) => Number.isInteger(value) && value >= least && value <= most);
const text = (most) => must((value) => typeof value === "string" && [...value].length <= most);
const named = (most) => must((value) => typeof value === "string" && value !== "" && [...value].length <= most);
const formed = (form) => must((value) => typeof value === "string" && form.test(value));
const isPlain = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

const list = (least, most, check) => (value, at) => {
  must((found) => Array.isArray(found) && found.length >= least && found.length <= most)(value, at);
  value.forEach((item, index) => check(item, `${at}[${index}]`));
};

const table = (most, check) => (value, at) => {
  must((found) => isPlain(found) && Object.keys(found).length <= most)(value, at);
  for (const [name, item] of Object.entries(value)) check(item, `${at}.${name}`);
};

/** An object of these fields and no other; `optional` ones may be missing, `empty` ones null as well. */
const object = (fields, optional = {}, empty = {}) => (value, at) => {
  must(isPlain)(value, at);
  const checks = { ...fields, ...optional, ...empty };
  for (const name of Object.keys(value)) if (!Object.hasOwn(checks, name)) throw damaged(`${at}.${name} is unknown`);
  for (const [name, check] of Object.entries(checks)) {
    const isMissing = !Object.hasOwn(value, name) && !Object.hasOwn(fields, name);
    const isNull = value[name] === null && Object.hasOwn(empty, name);
    if (!isMissing && !isNull) check(value[name], `${at}.${name}`);
  }
};

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
    key_chain: list(0, 8, text(2048)), // rotation is not supported: its statements are passed over
    format_version: whole(1, 1),
  },
  { key_id: text(64), expires_at: whole(0, MOST) },
);

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
  for (const needed of [manifest.tokenizer_file, ...manifest.variants.map((variant) => variant.file)]) {
    if (!paths.has(needed)) throw damaged(`${needed} is not listed`);
  }
}
