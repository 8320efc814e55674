/**
 * Which keys may sign bundles: public keys with their times, revocations, and rotation from old to new.
 * Decides by what it is given and the time; fetches no key and keeps none.
 */

import { damaged, LongshoreError, refused } from "./errors.mjs";
import { formed, list, must, object, readJson, whole } from "./fields.mjs";

export const MAX_STATEMENT_CHARS = 2048;
const MAX_KEYS = 64;
const ROTATION_PREFIX = new TextEncoder().encode("longshore-key-rotation-1\n");

const keyId = formed(/^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$/);
const time = whole(0, 2 ** 53);
const OPERATOR_KEY = object(
  { key_id: keyId, public_key: must((value) => typeof value === "string" && decodeBase64Url(value)?.length === 32) },
  {},
  { not_before: time, expires_at: time, introduced_by: keyId },
);
const STATEMENT = object({ old_key_id: keyId, new_key: OPERATOR_KEY }, { format_version: whole(1, 1) });
const TRUST_STORE = object(
  {},
  { keys: list(0, MAX_KEYS, OPERATOR_KEY), revoked: list(0, 256, keyId), format_version: whole(1, 1) },
);

/** The keys that this page trusts; `revoked` ids count no more, nor do keys that those introduced. */
export class TrustStore {
  #keys;
  #revoked;

  constructor(keys, revoked = []) {
    TRUST_STORE({ keys, revoked }, "trusted keys");
    if (new Set(keys.map((key) => key.key_id)).size !== keys.length) throw damaged("a key stands twice");
    this.#keys = keys;
    this.#revoked = revoked;
  }

  /** Of a table of ids and keys, or a trust store as `longshore bundle trust` writes it. */
  static of(plain) {
    if (!Array.isArray(plain.keys)) {
      return new TrustStore(Object.entries(plain).map(([id, key]) => ({ key_id: id, public_key: key })));
    }
    TRUST_STORE(plain, "trusted keys");
    return new TrustStore(plain.keys, plain.revoked);
  }

  get keys() {
    return [...this.#keys];
  }

  /** Those that rotation statements taught. */
  get learnt() {
    return this.#keys.filter((key) => key.introduced_by != null);
  }

  /** The good key of that id, as text; throws bundle_invalid with the reason why there is none. */
  keyFor(id, nowS) {
    const key = this.#find(id);
    if (!key) throw refused("the bundle is not signed by a trusted key");
    const line = [key.key_id]; // the key, who introduced it, who introduced that one
    let introducer = key.introduced_by;
    while (introducer != null && !line.includes(introducer)) {
      line.push(introducer);
      introducer = this.#find(introducer)?.introduced_by;
    }
    const says = (what) => refused(`the bundle is signed by the key ${key.key_id}, which ${what}`);
    if (line.some((name) => this.#revoked.includes(name))) throw says("is revoked");
    if (key.not_before != null && nowS < key.not_before) throw says("does not count yet");
    if (key.expires_at != null && nowS >= key.expires_at) throw says("has expired");
    return key.public_key;
  }

  /** With the keys that rotation statements teach; what does not verify teaches nothing. */
  async withChain(statements, nowS) {
    let store = this;
    for (const text of statements) store = store.with(await store.#learn(text, nowS));
    return store;
  }

  /** With keys that were learnt before; without all of them where the store holds something else. */
  withLearnt(keys) {
    try {
      list(0, MAX_KEYS, OPERATOR_KEY)(keys, "learnt keys");
    } catch {
      return this;
    }
    return keys.reduce((store, key) => store.with(key), this);
  }

  /** With one more key, unless there is none, its id is known or revoked, or there are too many. */
  with(key) {
    const isTaken = !key || this.#find(key.key_id) || this.#revoked.includes(key.key_id);
    return isTaken || this.#keys.length >= MAX_KEYS ? this : new TrustStore([...this.#keys, key], this.#revoked);
  }

  #find(id) {
    return this.#keys.find((key) => key.key_id === id);
  }

  async #learn(text, nowS) {
    try {
      const [first, ...rest] = text.split(".");
      const payload = decodeBase64Url(first);
      if (text.length > MAX_STATEMENT_CHARS || payload === null) return null;
      const statement = readJson(payload, "statement", STATEMENT);
      const oldKey = this.keyFor(statement.old_key_id, nowS);
      const signed = new Uint8Array([...ROTATION_PREFIX, ...payload]);
      const isSigned = await verifies(oldKey, rest.join("."), signed);
      return isSigned ? { ...statement.new_key, introduced_by: statement.old_key_id } : null;
    } catch (error) {
      if (error instanceof LongshoreError) return null;
      throw error;
    }
  }
}

/** True if `signatureText` is the signature of `keyText` over `payload`, both base64url. */
export async function verifies(keyText, signatureText, payload) {
  const [key, signature] = [decodeBase64Url(keyText), decodeBase64Url(signatureText)];
  if (key?.length !== 32 || signature?.length !== 64) return false;
  const imported = await crypto.subtle.importKey("raw", key, "Ed25519", false, ["verify"]);
  return crypto.subtle.verify("Ed25519", imported, signature, payload);
}

/** The bytes of canonical unpadded base64url, or null for anything else. */
export function decodeBase64Url(text) {
  if (!/^[A-Za-z0-9_-]*$/.test(text) || text.length % 4 === 1) return null;
  const plain = text.replaceAll("-", "+").replaceAll("_", "/");
  const binary = atob(plain);
  if (btoa(binary).replace(/=+$/, "") !== plain) return null; // loose bits in the last character
  return Uint8Array.from(binary, (char) => char.charCodeAt(0));
}
