/**
 * Chat messages to token ids by the manifest's prefix and suffix table. Runs no template code.
 *
 * What people wrote never becomes a control token: where a message spells one, it is read as its characters.
 */

import { LongshoreError } from "./errors.mjs";

// A role that the table does not hold is written as another that means the same.
const STAND_IN = { developer: "system" };

/** The prompt's token ids, up to where the answer begins. */
export function encodeChat(tokenizer, template, messages) {
  const prompt = new Prompt(tokenizer);
  prompt.own(template.start ?? "");
  for (const { role, content } of messages) {
    if (typeof content !== "string") throw new LongshoreError("unsupported_parameter", "this page takes no images");
    const affixes = affixesOf(template, role);
    prompt.own(affixes.prefix);
    prompt.foreign(content);
    prompt.own(affixes.suffix);
  }
  prompt.own(template.generation_prompt ?? "");
  return prompt.end();
}

function affixesOf(template, role) {
  for (const name of [role, STAND_IN[role]]) {
    if (name !== undefined && Object.hasOwn(template.roles, name)) return template.roles[name];
  }
  throw new LongshoreError("invalid_request", `this model knows no role ${role}`);
}

/** Gathers text as long as it is encoded in one go; a control token's spelling is a piece of its own. */
class Prompt {
  #ids = [];
  #text = "";

  constructor(tokenizer) {
    this.tokenizer = tokenizer;
  }

  own(text) {
    this.#text += text;
  }

  foreign(text) {
    let begin = 0;
    for (const match of this.tokenizer.spellings(text)) {
      this.#text += text.slice(begin, match.index);
      this.end();
      this.#ids.push(...this.tokenizer.encodeForeign(match[0]));
      begin = match.index + match[0].length;
    }
    this.#text += text.slice(begin);
  }

  end() {
    this.#ids.push(...this.tokenizer.encode(this.#text));
    this.#text = "";
    return this.#ids;
  }
}
