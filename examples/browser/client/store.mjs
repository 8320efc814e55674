/** Where the page keeps bundle files between visits: the browser's cache storage. Checks nothing. */

const CACHE_NAME = "longshore-files";
const HIGHEST_PREFIX = "longshore-highest-";
const LEARNT_KEYS = "longshore-learnt-keys"; // what rotation statements taught
const address = (key) => new URL(`/longshore-files/${key}`, location.origin).href;

export class BrowserStore {
  async get(key) {
    const found = await (await caches.open(CACHE_NAME)).match(address(key));
    return found ? new Uint8Array(await found.arrayBuffer()) : null;
  }

  async put(key, bytes) {
    try {
      await (await caches.open(CACHE_NAME)).put(address(key), new Response(bytes));
    } catch {
      // a full disk costs a download next time, not the answer
    }
  }

  async keepOnly(keys) {
    const cache = await caches.open(CACHE_NAME);
    const wanted = new Set(keys.map(address));
    for (const request of await cache.keys()) {
      if (!wanted.has(request.url)) await cache.delete(request);
    }
  }

  async highest(name) {
    return localStorage.getItem(HIGHEST_PREFIX + name);
  }

  async setHighest(name, text) {
    localStorage.setItem(HIGHEST_PREFIX + name, text);
  }

  async learnt() {
    try {
      return JSON.parse(localStorage.getItem(LEARNT_KEYS) ?? "[]");
    } catch {
      return []; // they are learnt again with the next bundle that teaches them
    }
  }

  async setLearnt(keys) {
    localStorage.setItem(LEARNT_KEYS, JSON.stringify(keys));
  }
}

/** The same for as long as the process lives. */
export class MemoryStore {
  #files = new Map();
  #highest = new Map();
  #learnt = [];

  async get(key) {
    return this.#files.get(key) ?? null;
  }

  async put(key, bytes) {
    this.#files.set(key, bytes);
  }

  async keepOnly(keys) {
    for (const key of this.#files.keys()) if (!keys.includes(key)) this.#files.delete(key);
  }

  async highest(name) {
    return this.#highest.get(name) ?? null;
  }

  async setHighest(name, text) {
    this.#highest.set(name, text);
  }

  async learnt() {
    return this.#learnt;
  }

  async setLearnt(keys) {
    this.#learnt = keys;
  }
}
