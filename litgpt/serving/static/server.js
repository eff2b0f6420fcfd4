// The server's API as the page uses it. Addresses are relative, so that the page also works under a proxy's path.

// What went wrong, in words for the user. `kind`: key, busy, loading, network, broken, refused. `after`: seconds to wait.
export class Problem extends Error {
  constructor(kind, message, after = 0) {
    super(message);
    this.kind = kind;
    this.after = after;
  }
}

const UNREACHABLE = "The server cannot be reached. Is it running, and is the network up?";

// The state of the server: {status: "ok" | "loading" | "stopping", progress, seconds}.
export async function health() {
  const response = await reach("health", {});
  try {
    return await response.json();
  } catch {
    throw new Problem("network", `The server's state cannot be read (${response.status}).`);
  }
}

// The models to choose from: [{id, max_model_len}].
export async function models(key) {
  const response = await reach("v1/models", { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

// An answer as it comes: {text}, {finish} and {usage}. Aborting the signal ends it here and on the server.
export async function* answer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await reach("v1/chat/completions", { method: "POST", headers: headers(key), body, signal });
  if (!response.ok) throw await refusal(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new Problem("broken", part.error.message);
    const [choice] = part.choices;
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (part.usage) yield { usage: part.usage };
  }
  throw new Problem("broken", "The connection broke off before the answer was whole.");
}

async function reach(address, options) {
  try {
    return await fetch(address, { cache: "no-store", credentials: "same-origin", ...options });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem("network", UNREACHABLE);
  }
}

function headers(key) {
  if (/[^\x20-\x7e]/.test(key)) throw new Problem("key", "The API key has characters that no key can have.");
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function refusal(response) {
  const said = await response.json().catch(() => null); // a proxy's errors are no JSON
  const error = said?.error ?? {};
  const message = error.message ?? `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  const after = Number(response.headers.get("Retry-After")) || 2;
  if (response.status === 401) return new Problem("key", "The server asks for an API key, and this one is not right.");
  if (response.status === 429) return new Problem("busy", message, after);
  if (error.code === "loading") return new Problem("loading", message, after);
  return new Problem("refused", message);
}

// The data of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("broken", "The connection broke off before the answer was whole.");
  } finally {
    reader.cancel().catch(() => {}); // of an answer that nobody reads on
  }
}
