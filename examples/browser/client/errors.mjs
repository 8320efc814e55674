/** The errors of the page, by the codes that every tier uses. */

export class LongshoreError extends Error {
  constructor(code, message) {
    super(message);
    this.name = "LongshoreError";
    this.code = code;
  }
}

export const damaged = (message) => new LongshoreError("bundle_damaged", message);
export const refused = (message) => new LongshoreError("bundle_invalid", message);
export const incompatible = (message) => new LongshoreError("bundle_incompatible", message);
