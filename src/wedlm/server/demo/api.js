// SPDX-License-Identifier: Apache-2.0
// OpenAI-compatible servers: whom to ask, what to send, and the chunks of a streamed answer.

/** What a server said, or why there is none: a sentence for the reader. `status` is 0 where there was no answer. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** A server: `base` ends before /chat/completions; `own` is the one this page came from. */
export function ownServer(key) {
  return { base: new URL("v1", document.baseURI).href, key, own: true };
}

export function otherServer(base, key) {
  let url;
  try {
    url = new URL(base);
  } catch {
    throw new ServerError(`The base URL is "${base}"; expected one such as http://127.0.0.1:8001/v1.`);
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") {
    throw new ServerError(`The base URL begins with ${url.protocol}; expected http: or https:.`);
  }
  return { base: url.href.replace(/\/+$/, ""), key, own: false };
}

/** The name of the first model that a server lists. */
export async function firstModel(server, signal) {
  const response = await call(server, "/models", { signal });
  const list = await response.json().catch(() => null);
  const name = list?.data?.[0]?.id;
  if (!name) throw new ServerError(`${server.base}/models lists no model; type its name.`, response.status);
  return name;
}

/**
 * The chunks of a streamed chat answer, as objects, until [DONE]; before them {warning}, if the server has one.
 * ServerError, or AbortError after `signal`.
 */
export function chat(server, body, signal) {
  return chunks(server, "/chat/completions", body, signal);
}

/** Those of a streamed completion, in the same way. */
export function complete(server, body, signal) {
  return chunks(server, "/completions", body, signal);
}

async function* chunks(server, path, body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call(server, path, { method: "POST", body: JSON.stringify(request), signal });
  const warning = response.headers.get("X-Wedlm-Warning");
  if (warning) yield { warning };
  const events = lines(response.body.pipeThrough(new TextDecoderStream()).getReader());
  for await (const line of guarded(events, server)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = parsed(data, server);
    if (chunk.error) throw new ServerError(sentence(chunk) ?? "The server ended the answer with an error.");
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer did.");
}

async function call(server, path, options) {
  const headers = { "Content-Type": "application/json" };
  if (!options.body) delete headers["Content-Type"];
  if (server.key) headers.Authorization = `Bearer ${server.key}`;
  let response;
  try {
    response = await fetch(server.base + path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(unreachable(server));
  }
  if (response.ok) return response;
  const said = sentence(await response.json().catch(() => null));
  throw new ServerError(said ?? `${server.base}${path} answered with status ${response.status}.`, response.status);
}

/** A browser does not tell a page whether there was no answer or the answer was withheld. */
function unreachable(server) {
  if (server.own) return "This server does not answer: it has stopped, or the connection is lost.";
  return (
    `No answer from ${server.base}: either no server listens there, or it does not let pages of ` +
    `${location.origin} call it (CORS); start it with that origin allowed.`
  );
}

function sentence(body) {
  const said = body?.error?.message ?? body?.message ?? body?.error ?? body?.detail;
  return typeof said === "string" && said ? said : null;
}

function parsed(data, server) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError(`${server.base} sent a chunk that is not JSON: ${data.slice(0, 80)}`);
  }
}

async function* lines(reader) {
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening also stops the answer
  }
}

async function* guarded(events, server) {
  try {
    yield* events;
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError(server.own ? "The connection to this server broke off." : `${server.base} broke off.`);
  }
}
