/** Reads JSON strictly: every field checked for its kind and bound, none twice, none unknown. Knows no format. */

import { damaged } from "./errors.mjs";

const MAX_DEPTH = 32;

/** What the UTF-8 JSON in `body` says, if `check` lets it pass as `name`; throws bundle_damaged otherwise. */
export function readJson(body, name, check) {
  let text;
  let value;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(body);
    value = JSON.parse(text);
  } catch (error) {
    throw damaged(`the ${name} is not JSON: ${error.message}`);
  }
  refuseTwice(text);
  check(value, name);
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
    if (levels.length > MAX_DEPTH) throw damaged("it is nested too deeply");
  }
}

// Each of these gives a check of (value, its name), which throws.

export const must = (isRight) => (value, at) => {
  if (!isRight(value)) throw damaged(`${at} can't be ${JSON.stringify(value)?.slice(0, 40)}`);
};
export const whole = (least, most) => must((value) => Number.isInteger(value) && value >= least && value <= most);
export const text = (most) => must((value) => typeof value === "string" && [...value].length <= most);
export const named = (most) => must((value) => typeof value === "string" && value !== "" && [...value].length <= most);
export const formed = (form) => must((value) => typeof value === "string" && form.test(value));
const isPlain = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

export const list = (least, most, check) => (value, at) => {
  must((found) => Array.isArray(found) && found.length >= least && found.length <= most)(value, at);
  value.forEach((item, index) => check(item, `${at}[${index}]`));
};

export const table = (most, check) => (value, at) => {
  must((found) => isPlain(found) && Object.keys(found).length <= most)(value, at);
  for (const [name, item] of Object.entries(value)) check(item, `${at}.${name}`);
};

/** An object of these fields and no other; `optional` ones may be missing, `empty` ones null as well. */
export const object = (fields, optional = {}, empty = {}) => (value, at) => {
  must(isPlain)(value, at);
  const checks = { ...fields, ...optional, ...empty };
  for (const name of Object.keys(value)) if (!Object.hasOwn(checks, name)) throw damaged(`${at}.${name} is unknown`);
  for (const [name, check] of Object.entries(checks)) {
    const isMissing = !Object.hasOwn(value, name) && !Object.hasOwn(fields, name);
    const isNull = value[name] === null && Object.hasOwn(empty, name);
    if (!isMissing && !isNull) check(value[name], `${at}.${name}`);
  }
};
