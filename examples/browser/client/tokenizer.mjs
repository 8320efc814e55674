/**
 * Byte-level BPE as tokenizer.json describes it, and bytes from tokens. Loads no model.
 *
 * Takes the form of Llama-3-, Qwen- and GPT-2-like tokenizers; anything else is refused when it is read,
 * never tokenized differently.
 */

import { damaged, incompatible } from "./errors.mjs";

const GPT2_PATTERN = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
// White_Space of Unicode; JavaScript's \s has U+FEFF in it and U+0085 not.
const WHITE_SPACE = "\\t-\\r\\x85\\p{Z}";
const UNUSED_MODEL_FIELDS = ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"];

export class Tokenizer {
  #pattern;
  #ids;
  #ranks;
  #special = new Map();
  #specialPattern;
  #bytes = [];
  #form;
  #takesWholeTokens;

  /** Reads a parsed tokenizer.json; throws bundle_incompatible for a form that this one does not know. */
  constructor(file) {
    try {
      this.#read(file);
    } catch (error) {
      throw error instanceof TypeError ? damaged(`the tokenizer can't be read: ${error.message}`) : error;
    }
  }

  /** The token ids of a text; control tokens written out in it are taken as such. */
  encode(text) {
    const ids = [];
    let begin = 0;
    for (const match of this.spellings(text)) {
      this.#encodePlain(text.slice(begin, match.index), ids);
      ids.push(this.#special.get(match[0]));
      begin = match.index + match[0].length;
    }
    this.#encodePlain(text.slice(begin), ids);
    return ids;
  }

  /** The token ids of a text in which nothing is a control token. */
  encodeForeign(text) {
    const ids = [];
    this.#encodePlain(text, ids);
    return ids;
  }

  /** Where a text spells control tokens. */
  spellings(text) {
    return this.#specialPattern ? text.matchAll(this.#specialPattern) : [];
  }

  /** The bytes of a token's text; none for a control token or an id that there is not. */
  bytesOf(id) {
    return this.#bytes[id] ?? new Uint8Array();
  }

  #read(file) {
    const model = file.model;
    need(model.type === "BPE", `the model is ${model.type}`);
    for (const name of UNUSED_MODEL_FIELDS) need((model[name] ?? "") === "", `the model has ${name}`);
    need(!model.byte_fallback, "the model falls back on bytes");
    this.#ids = new Map(Object.entries(model.vocab));
    need(CHARS.every((char) => this.#ids.has(char)), "a byte has no token");
    const pairs = model.merges.map((merge) => (typeof merge === "string" ? merge.split(" ") : merge));
    need(pairs.every((pair) => pair.length === 2 && this.#ids.has(pair[0] + pair[1])), "a merge has no token");
    this.#ranks = new Map(pairs.map((pair, rank) => [pair.join(" "), rank]));
    const normalizer = file.normalizer?.type;
    need(normalizer === undefined || normalizer === "NFC", `the normalizer is ${normalizer}`);
    this.#form = normalizer;
    this.#takesWholeTokens = model.ignore_merges === true;
    this.#pattern = new RegExp(splitPattern(file.pre_tokenizer), "gu");
    for (const [token, id] of this.#ids) this.#bytes[id] = bytesOfChars(token);
    for (const token of file.added_tokens ?? []) this.#add(token);
    this.#specialPattern = patternOf([...this.#special.keys()]);
  }

  #add(token) {
    for (const flag of ["single_word", "lstrip", "rstrip"]) need(!token[flag], `${token.content}: ${flag}`);
    need(!(this.#form && token.normalized), `${token.content} is normalized`);
    this.#special.set(token.content, token.id);
    this.#bytes[token.id] = token.special ? new Uint8Array() : new TextEncoder().encode(token.content);
  }

  #encodePlain(text, ids) {
    const normal = this.#form ? text.normalize(this.#form) : text;
    let begin = 0;
    for (const match of normal.matchAll(this.#pattern)) {
      // what lies between two matches is a piece of its own
      if (match.index > begin) this.#encodePiece(normal.slice(begin, match.index), ids);
      if (match[0]) this.#encodePiece(match[0], ids);
      begin = match.index + match[0].length;
    }
    if (begin < normal.length) this.#encodePiece(normal.slice(begin), ids);
  }

  #encodePiece(piece, ids) {
    const letters = Array.from(new TextEncoder().encode(piece), (byte) => CHARS[byte]);
    const whole = this.#takesWholeTokens ? this.#ids.get(letters.join("")) : undefined;
    if (whole !== undefined) ids.push(whole);
    else for (const part of this.#merged(letters)) ids.push(this.#ids.get(part));
  }

  /** Merges the pair of the lowest rank, wherever it stands, until no pair has a rank. */
  #merged(letters) {
    let parts = letters;
    for (;;) {
      let best = Infinity;
      let bestPair = null;
      for (let index = 0; index + 1 < parts.length; index++) {
        const rank = this.#ranks.get(`${parts[index]} ${parts[index + 1]}`);
        if (rank < best) [best, bestPair] = [rank, [parts[index], parts[index + 1]]];
      }
      if (bestPair === null) return parts;
      parts = replaced(parts, bestPair);
    }
  }
}

function replaced(parts, [first, second]) {
  const out = [];
  for (let index = 0; index < parts.length; index++) {
    if (parts[index] === first && parts[index + 1] === second) out.push(first + parts[++index]);
    else out.push(parts[index]);
  }
  return out;
}

/** GPT-2's printable stand-in of each byte: itself where printable, else from U+0100 on, in order. */
const CHARS = (() => {
  let next = 0x100;
  const isPrintable = (byte) =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(isPrintable(byte) ? byte : next++));
})();
const BYTE_OF = new Map(CHARS.map((char, byte) => [char, byte]));

function bytesOfChars(token) {
  const bytes = Array.from(token, (char) => BYTE_OF.get(char));
  return bytes.includes(undefined) ? new TextEncoder().encode(token) : Uint8Array.from(bytes);
}

function patternOf(texts) {
  if (!texts.length) return null;
  const longestFirst = texts.toSorted((one, other) => other.length - one.length);
  return new RegExp(longestFirst.map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|"), "gu");
}

function splitPattern(step) {
  const steps = step.type === "Sequence" ? step.pretokenizers : [step];
  const bytes = steps.at(-1);
  need(bytes.type === "ByteLevel" && !bytes.add_prefix_space, "it does not end in bytes");
  if (steps.length === 1) {
    need(bytes.use_regex !== false, "it does not split");
    return withWhiteSpace(GPT2_PATTERN);
  }
  const [split] = steps;
  const isKnown = split.type === "Split" && split.behavior === "Isolated" && !split.invert;
  need(steps.length === 2 && isKnown && bytes.use_regex === false, "it splits in an unknown way");
  return withWhiteSpace(split.pattern.Regex);
}

/** `\s` and `\S` written out; `(?i:...)`, which older browsers do not know, is left to the engine. */
function withWhiteSpace(pattern) {
  let isInBrackets = false;
  return pattern.replace(/\\(.)|[[\]]/gs, (found, escaped) => {
    if (escaped === undefined) isInBrackets = found === "[";
    else if (escaped === "s") return isInBrackets ? WHITE_SPACE : `[${WHITE_SPACE}]`;
    else if (escaped === "S") {
      need(!isInBrackets, "its pattern holds \\S in brackets");
      return `[^${WHITE_SPACE}]`;
    }
    return found;
  });
}

function need(condition, problem) {
  if (!condition) throw incompatible(`this tokenizer is of another kind: ${problem}`);
}
