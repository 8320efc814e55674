/**
 * The student on ONNX Runtime: a cache of keys and values, and the greedy loop over it.
 *
 * The runtime is passed in, so that the same code runs in a browser and in Node. Fetches and checks nothing.
 */

import { LongshoreError, incompatible } from "./errors.mjs";
import { checkRuntime } from "./manifest.mjs";
import { encodeChat } from "./prompt.mjs";
import { Tokenizer } from "./tokenizer.mjs";

/** int4 matrix products are many times slower than fp32 in WebAssembly, so they come last. */
const PREFERRED = ["int8", "fp32", "int4"];

/** The variant to take; `names` are precisions in order of preference. */
export function chooseVariant(manifest, names = PREFERRED) {
  for (const name of names) {
    const found = manifest.variants.find((variant) => variant.precision === name);
    if (found) return found;
  }
  throw incompatible(`the bundle has no variant in ${names.join(", ")}`);
}

export class Student {
  #ort;
  #session;
  #manifest;
  #cache;
  #cached = []; // the tokens whose keys and values the cache holds

  /** `graph` and `tokenizer` are the bytes of the bundle's files. */
  static async open(ort, manifest, graph, tokenizer, options = {}) {
    const { kv } = manifest;
    if ((kv.dtype ?? "float32") !== "float32") throw incompatible(`the cache is ${kv.dtype}`);
    checkRuntime(manifest, ort.env.versions.web ?? ort.env.versions.node ?? "0");
    let session;
    try {
      session = await ort.InferenceSession.create(graph, { executionProviders: ["cpu"], ...options });
    } catch (error) {
      throw incompatible(`this runtime does not take the model: ${error.message ?? error}`);
    }
    const file = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(tokenizer));
    return new Student(ort, manifest, session, new Tokenizer(file));
  }

  constructor(ort, manifest, session, tokenizer) {
    this.#ort = ort;
    this.#manifest = manifest;
    this.#session = session;
    this.tokenizer = tokenizer;
    this.#cache = this.#emptyCache();
  }

  /**
   * Answers greedily, one `{id, text}` per token; `text` lags behind while a character is not whole.
   * Gives the finish reason, `stop` or `length`. Throws context_length_exceeded for a prompt without room.
   */
  async *answer(messages, maxTokens) {
    const { kv, eos_token_ids: eos } = this.#manifest;
    const prompt = encodeChat(this.tokenizer, this.#manifest.chat_template, messages);
    const room = Math.min(maxTokens, kv.max_tokens - prompt.length);
    if (room <= 0) {
      const message = `the prompt has ${prompt.length} tokens, the model takes ${kv.max_tokens}`;
      throw new LongshoreError("context_length_exceeded", message);
    }
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    let logits = await this.#prefill(prompt);
    for (let count = 1; ; count++) {
      const id = bestOf(logits, this.#manifest.vision?.image_token_id);
      const isEnd = eos.includes(id);
      const isLast = isEnd || count === room;
      const bytes = isEnd ? new Uint8Array() : this.tokenizer.bytesOf(id);
      yield { id, text: decoder.decode(bytes, { stream: !isLast }) };
      if (isLast) return isEnd ? "stop" : "length";
      logits = await this.#forward([id]);
    }
  }

  /** Computes the prompt from where it differs from what the cache holds; its last token always. */
  async #prefill(prompt) {
    let shared = 0;
    while (shared < prompt.length - 1 && this.#cached[shared] === prompt[shared]) shared++;
    this.#cached.length = Math.min(shared, this.#cached.length);
    return this.#forward(prompt.slice(shared));
  }

  /** Computes `tokens` after what is cached; the last one's logits [vocab]. */
  async #forward(tokens) {
    const total = this.#cached.length + tokens.length;
    const whole = (values) => BigInt64Array.from(values, BigInt);
    const feeds = { ...this.#cache };
    feeds.input_ids = new this.#ort.Tensor("int64", whole(tokens), [1, tokens.length]);
    feeds.rows = new this.#ort.Tensor("int64", whole([tokens.length - 1]), [1]);
    feeds.seqlens_k = new this.#ort.Tensor("int32", Int32Array.of(total - 1), [1]);
    feeds.total_sequence_length = new this.#ort.Tensor("int32", Int32Array.of(total), [1]);
    const { vision } = this.#manifest;
    // A model that sees is asked about text alone here: no rows for image tokens, since there are none.
    if (vision) feeds.image_features = new this.#ort.Tensor("float32", new Float32Array(), [0, vision.hidden_size]);
    const results = await this.#session.run(feeds);
    for (const name of Object.keys(this.#cache)) this.#cache[name] = results[name.replace("past", "present")];
    this.#cached.push(...tokens);
    return results.logits.data;
  }

  #emptyCache() {
    const { num_layers: numLayers, num_kv_heads: heads, max_tokens: tokens, head_dim: width } = this.#manifest.kv;
    const cache = {};
    for (let layer = 0; layer < numLayers; layer++) {
      for (const what of ["key", "value"]) {
        const zeros = new Float32Array(heads * tokens * width);
        cache[`past_${what}.${layer}`] = new this.#ort.Tensor("float32", zeros, [1, heads, tokens, width]);
      }
    }
    return cache;
  }
}

/** The first of the largest, the image token's aside; throws device_failed where one is not a number. */
function bestOf(logits, imageTokenId) {
  let best = -1;
  for (let index = 0; index < logits.length; index++) {
    if (Number.isNaN(logits[index])) throw new LongshoreError("device_failed", "a logit is not a number");
    if (index !== imageTokenId && !(logits[index] <= logits[best])) best = index;
  }
  return best;
}
