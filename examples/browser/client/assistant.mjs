/**
 * Which tier answers: this device, and when it can't, the edge, going on from the tokens so far so that
 * nothing is lost and nothing said twice. Owns the choice; starts no runtime.
 */

import { LongshoreError } from "./errors.mjs";

/** Faults of the question itself: another tier would refuse it as well, or must not see it. */
const FINAL = new Set(["invalid_request", "aborted"]);

export class Assistant {
  /** `openDevice` gives a Student or throws; it is asked again after a failure. */
  constructor(edge, model, modelDigest, openDevice) {
    this.edge = edge;
    this.model = model;
    this.modelDigest = modelDigest;
    this.openDevice = openDevice;
  }

  /**
   * Answers `messages`; each piece of text goes to `emit`. With `isPrivate` nothing leaves the device.
   * Gives `{text, tier, node, ttftMs, numPieces, fallback}`; `fallback` says why the device did not answer.
   */
  async ask(messages, { maxTokens, isPrivate = false, emit = () => {} }) {
    const begun = performance.now();
    const answer = { text: "", tokenIds: [], tier: "device", node: "this browser", ttftMs: null, numPieces: 0 };
    const add = (text) => {
      if (!text) return;
      answer.ttftMs ??= performance.now() - begun;
      answer.numPieces += 1;
      answer.text += text;
      emit(text);
    };
    answer.fallback = await this.#byDevice(messages, maxTokens, isPrivate, answer, add);
    if (answer.fallback !== null && answer.tokenIds.length < maxTokens) {
      await this.#byEdge(messages, maxTokens, answer, add);
    }
    return { ...answer, totalMs: performance.now() - begun };
  }

  /** Null when the device gave the whole answer, else why it did not. */
  async #byDevice(messages, maxTokens, isPrivate, answer, add) {
    try {
      const student = await this.openDevice();
      for await (const token of student.answer(messages, maxTokens)) {
        answer.tokenIds.push(token.id);
        add(token.text);
      }
      return null;
    } catch (error) {
      const fault = error instanceof LongshoreError ? error : new LongshoreError("device_failed", `${error}`);
      if (isPrivate || FINAL.has(fault.code)) throw fault;
      return `${fault.code}: ${fault.message}`;
    }
  }

  async #byEdge(messages, maxTokens, answer, add) {
    const stream = this.edge.chat(this.#request(messages, maxTokens, answer));
    let step = await stream.next();
    for (; !step.done; step = await stream.next()) add(step.value);
    answer.tier = step.value?.served_by ?? "edge";
    answer.node = step.value?.node ?? "";
  }

  #request(messages, maxTokens, { tokenIds, text }) {
    const body = { model: this.model, messages, temperature: 0, max_tokens: maxTokens };
    if (!text) return body;
    const digest = this.modelDigest();
    const from = { token_ids: tokenIds, text, segment: 1, ...(digest && { model_digest: digest }) };
    return { ...body, longshore: { continue_from: from } };
  }
}
