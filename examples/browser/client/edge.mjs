/** The edge over HTTP: bundle files, and chat answers as a stream of events. Chooses nothing. */

import { LongshoreError } from "./errors.mjs";

const MAX_EVENT_CHARS = 1024 * 1024;

export class Edge {
  constructor(url, apiKey) {
    this.url = url.replace(/\/+$/, "");
    this.apiKey = apiKey;
  }

  /** The response with a bundle's file, or the part that `headers` ask for. */
  file(bundle, path, headers = {}) {
    return this.#fetch(`/bundles/${bundle}/${path}`, { headers, cache: "no-store" });
  }

  /**
   * Asks the edge; each piece of text is yielded. Gives the report: who served it, and why.
   * A stream that ends without [DONE] throws answer_interrupted.
   */
  async *chat(body, signal) {
    const response = await this.#fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal,
    });
    let report = null;
    for await (const { event, data } of eventsOf(response)) {
      if (data === "[DONE]") return report;
      const chunk = JSON.parse(data);
      if (event === "error" || chunk.error) throw errorOf(chunk.error, "upstream_failed");
      for (const choice of chunk.choices ?? []) if (choice.delta?.content) yield choice.delta.content;
      report = chunk.longshore?.report ?? report;
    }
    throw new LongshoreError("answer_interrupted", "the answer broke off");
  }

  async #fetch(path, options) {
    const headers = { ...options.headers, Authorization: `Bearer ${this.apiKey}` };
    let response;
    try {
      response = await fetch(this.url + path, { ...options, headers, redirect: "error" });
    } catch (error) {
      throw new LongshoreError("connection_failed", `the edge did not answer: ${error.message}`);
    }
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    throw errorOf(body.error, "upstream_failed", `the edge answered ${response.status}`);
  }
}

function errorOf(error, code, message = "the edge could not answer") {
  return new LongshoreError(error?.code ?? code, error?.message ?? message);
}

/** Server-sent events (WHATWG HTML 9.2), as far as this wire uses them. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let [event, data] = ["message", []];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      if (rest.length > MAX_EVENT_CHARS) throw new LongshoreError("protocol_error", "an event is too long");
      for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
        if (line.startsWith("event:")) event = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          [event, data] = ["message", []];
        }
      }
    }
  } catch (error) {
    if (error instanceof LongshoreError) throw error;
    throw new LongshoreError("answer_interrupted", `the answer broke off: ${error.message}`);
  } finally {
    await reader.cancel().catch(() => {});
  }
}
