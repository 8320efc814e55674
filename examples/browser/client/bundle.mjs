/**
 * Brings a bundle from an edge, and lets through only what a trusted key signed. Runs no model.
 *
 * Everything is kept, files by their digest, so a new version brings only what changed and a page without a
 * network still starts; kept bytes are checked again whenever they are read. The store is passed in:
 * `get(key)`, `put(key, bytes)`, `keepOnly(keys)`, `highest(name)`, `setHighest(name, text)`, `learnt()`,
 * `setLearnt(keys)`.
 */

import { damaged, incompatible, LongshoreError, refused } from "./errors.mjs";
import { readManifest } from "./manifest.mjs";
import { TrustStore, verifies } from "./trust.mjs";

const MAX_MANIFEST_BYTES = 1024 * 1024;
const MAX_SIGNATURE_BYTES = 1024;
const MAX_FILE_BYTES = 512 * 1024 * 1024; // what a page can hold
const MAX_TRIES = 4;

/**
 * The manifest, a function `read` that gives a file's checked bytes, and `keep`, which makes this version the one
 * that is kept: to be called once it runs, for until then the version before is what a bad one leaves in place.
 *
 * `trustedKeys` maps key ids to 32 bytes of base64url, or is a whole trust store; `edge.file(name, path, headers)`
 * fetches. Keys that a bundle's rotation statements teach are kept in the store. Throws bundle_invalid for the
 * signature, bundle_rollback for anything that is not newer than what was seen.
 */
export async function openBundle(edge, name, trustedKeys, store, nowS = Date.now() / 1000) {
  const [body, signature] = await offered(edge, name, store);
  const trust = TrustStore.of(trustedKeys).withLearnt(await store.learnt());
  const manifest = await checkManifest(body, signature, trust, nowS);
  if (manifest.name !== name) throw refused(`asked for ${name}, got ${manifest.name}`);
  const digest = await sha256(body);
  await refuseOlder(manifest, digest, store);
  const read = (path, progress) => fileBytes(edge, manifest, path, store, progress);
  const keep = async () => {
    await store.setHighest(name, `${manifest.version} ${digest}`);
    await store.setLearnt((await trust.withChain(manifest.key_chain ?? [], nowS)).learnt);
    await store.put(`${name}.manifest`, body);
    await store.put(`${name}.signature`, signature);
    await store.keepOnly([`${name}.manifest`, `${name}.signature`, ...manifest.files.map((file) => file.sha256)]);
  };
  return { manifest, read, keep };
}

/** The version that was kept last, without asking an edge for anything; throws `error` where there is none. */
export async function openKept(error, name, trustedKeys, store, nowS = Date.now() / 1000) {
  if ((await store.get(`${name}.manifest`)) === null) throw error;
  const nobody = {
    file() {
      throw new LongshoreError("connection_failed", "no edge is asked");
    },
  };
  return openBundle(nobody, name, trustedKeys, store, nowS);
}

/** Manifest and signature as the edge has them; those of the last visit where it can't be reached. */
async function offered(edge, name, store) {
  try {
    const body = await whole(await edge.file(name, "manifest.json"), MAX_MANIFEST_BYTES);
    return [body, await whole(await edge.file(name, "manifest.sig"), MAX_SIGNATURE_BYTES)];
  } catch (error) {
    if (error.code !== "connection_failed") throw error;
    const kept = [await store.get(`${name}.manifest`), await store.get(`${name}.signature`)];
    if (kept.includes(null)) throw error;
    return kept;
  }
}

/** The high-water mark: a lower version, or another manifest of the same one, is never taken. */
async function refuseOlder(manifest, digest, store) {
  const [version, seenDigest] = ((await store.highest(manifest.name)) ?? "0 -").split(" ");
  const isOther = manifest.version === Number(version) && digest !== seenDigest;
  if (manifest.version < Number(version) || isOther) {
    throw new LongshoreError("bundle_rollback", `version ${manifest.version} is not newer than ${version}`);
  }
}

/** The manifest in `body`, if a good key signed exactly these bytes and they have not expired. */
export async function checkManifest(body, signature, trust, nowS) {
  const manifest = readManifest(body);
  const key = (await trust.withChain(manifest.key_chain ?? [], nowS)).keyFor(manifest.key_id, nowS);
  const text = new TextDecoder().decode(signature).replace(/\n$/, "");
  if (!(await verifies(key, text, body))) throw refused("the signature does not fit the manifest");
  if (manifest.expires_at != null && !(nowS < manifest.expires_at)) throw refused("the bundle has expired");
  return manifest;
}

async function fileBytes(edge, manifest, path, store, progress = () => {}) {
  const file = manifest.files.find((entry) => entry.path === path);
  if (!file) throw damaged(`${path} is not listed`);
  if (file.size_bytes > MAX_FILE_BYTES) throw incompatible(`${path} is too large for a page`);
  const kept = await store.get(file.sha256);
  if (kept && (await sha256(kept)) === file.sha256) return kept;
  const bytes = await download(edge, manifest.name, file, progress);
  if ((await sha256(bytes)) !== file.sha256) throw damaged(`${path} is damaged`);
  await store.put(file.sha256, bytes);
  return bytes;
}

/** The bytes of a file; a broken download goes on from the last good piece. */
async function download(edge, name, file, progress) {
  const bytes = new Uint8Array(file.size_bytes);
  let begin = 0;
  for (let tries = 1; ; tries++) {
    const headers = begin ? { Range: `bytes=${begin}-`, "If-Range": `"${file.sha256}"` } : {};
    let end = 0;
    try {
      const response = await edge.file(name, file.path, headers);
      end = response.status === 206 ? begin : 0;
      for await (const piece of pieces(response)) {
        if (end + piece.length > bytes.length) throw damaged(`${file.path} is too long`);
        bytes.set(piece, end);
        end += piece.length;
        progress(end, bytes.length);
      }
      if (end === bytes.length) return bytes;
    } catch (error) {
      if (error instanceof LongshoreError && error.code !== "connection_failed") throw error;
    }
    if (tries === MAX_TRIES) throw damaged(`${file.path} broke off at ${end} of ${bytes.length} bytes`);
    begin = await goodBytes(bytes.subarray(0, end), file);
  }
}

/** How much of a broken download is good: whole pieces whose digests are those of the manifest. */
async function goodBytes(bytes, file) {
  let good = 0;
  for (const digest of file.chunk_sha256 ?? []) {
    const piece = bytes.subarray(good, good + file.chunk_bytes);
    if (good + piece.length >= file.size_bytes || (await sha256(piece)) !== digest) break;
    good += piece.length;
  }
  return good;
}

async function whole(response, maxBytes) {
  const parts = [];
  let size = 0;
  for await (const piece of pieces(response)) {
    size += piece.length;
    if (size > maxBytes) throw damaged("the edge sends far more than a manifest");
    parts.push(piece);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function* pieces(response) {
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
