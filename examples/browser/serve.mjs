/**
 * Serves this folder on 127.0.0.1 for trying it out: `node serve.mjs [--port N] [--config FILE]`.
 * Only the page's own files and the runtime's; never a way to host it.
 */

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const FOLDER = fileURLToPath(new URL(".", import.meta.url));
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".wasm": "application/wasm",
  ".json": "application/json",
};
const SERVED = /^\/(index\.html|style\.css|page\.mjs|client\/[a-z]+\.mjs|node_modules\/onnxruntime-web\/dist\/[\w.-]+)$/;

const { values } = parseArgs({ options: { port: { type: "string", default: "8090" }, config: { type: "string" } } });
const config = resolve(values.config ?? join(FOLDER, "config.json"));

function fileOf(url) {
  const path = new URL(url, "http://localhost").pathname;
  if (path === "/") return join(FOLDER, "index.html");
  if (path === "/config.json") return config;
  return SERVED.test(path) ? join(FOLDER, path) : null;
}

async function answer(request, response) {
  const file = request.method === "GET" ? fileOf(request.url) : null;
  const size = file && (await stat(file).catch(() => null))?.size;
  if (size == null) {
    response.writeHead(404).end("not found");
    return;
  }
  const type = TYPES[extname(file)] ?? "application/octet-stream";
  response.writeHead(200, { "Content-Type": type, "Content-Length": size, "Cache-Control": "no-cache" });
  createReadStream(file).pipe(response);
}

const server = createServer(answer);
server.listen(Number(values.port), "127.0.0.1", () => {
  console.log(`the page is at http://127.0.0.1:${server.address().port}/`);
});
