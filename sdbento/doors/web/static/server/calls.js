// Calls of the server. Paths are relative to the page, so that it may lie below any prefix.
import { decode, encode } from "../lib/numbers.js";
import { askForKey, key } from "./key.js";

export class ServerError extends Error {
  // `retryAfter`: seconds until it is worth trying again, where the server says so
  constructor(status, error, retryAfter = null) {
    super(error.message);
    Object.assign(this, { status, type: error.type, param: error.param, retryAfter });
  }
}

// The answer, once it is known to be no error. `body`: sent as JSON by POST.
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const response = await send(path, body, signal);
    if (response.ok) return response;
    const error = await errorOf(response);
    const question = key.get() ? "This key was not accepted." : "A key is needed to use this server.";
    if (response.status !== 401 || !(await askForKey(question))) throw error;
  }
}

export async function json(path, options) {
  return decode(await (await call(path, options)).text());
}

async function send(path, body, signal) {
  const headers = { "X-Requested-With": "XMLHttpRequest" }; // else the browser asks for a password
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body === undefined) return await reach(path, { headers, signal });
  headers["Content-Type"] = "application/json";
  return await reach(path, { method: "POST", headers, body: encode(body), signal });
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "The server cannot be reached.", type: "unreachable" });
  }
}

async function errorOf(response) {
  const text = await response.text();
  const after = Number(response.headers.get("Retry-After"));
  return new ServerError(response.status, described(text, response), after > 0 ? after : null);
}

// AUTOMATIC1111's routes have errors of another shape than ours; a proxy answers anything.
function described(text, response) {
  try {
    const { error, errors, detail } = JSON.parse(text);
    if (typeof error === "object") return error;
    return { message: errors || detail || error, type: error };
  } catch {
    return { message: `The answer was ${response.status} ${response.statusText}.`, type: "unknown" };
  }
}
