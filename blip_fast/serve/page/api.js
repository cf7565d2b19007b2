// Requests to the server of this page, as its /docs describe them.

let key = "";

/** Send this API key with all further requests. It is stored nowhere else. */
export function useKey(value) {
  key = value.trim();
}

/** An answer that is not a result: a code, a sentence for people, and after how many seconds to try again. */
export class Refusal extends Error {
  constructor(code, message, seconds = 0) {
    super(message);
    this.code = code;
    this.seconds = seconds;
  }

  /** Whether the picture itself is refused, so that there is no point in trying again. */
  get ofPicture() {
    return ["not_an_image", "too_large", "too_many_pixels"].includes(this.code);
  }
}

/** Resolves if the server has loaded its models. */
export async function ready() {
  await send("/ready", {});
}

/** The server's model, features and limits. */
export async function info() {
  return read(await send("/v1/info", {}), "json");
}

/** Yield `{index, captions}` or `{index, error}` for each picture, in the order in which they finish. */
export async function* captions(files, { num, prompt }, signal) {
  const response = await post("/v1/caption", { image: files, num, prompt }, signal, "application/x-ndjson");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await unbroken(reader.read());
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines.filter(Boolean)) {
      const row = JSON.parse(line);
      yield row.error ? { index: row.index, error: new Refusal(row.error.code, row.error.message) } : row;
    }
    if (done) return;
  }
}

/** `[{text, itm, itc}]` in the order of the texts. */
export async function score(file, texts, signal) {
  return (await read(await post("/v1/score", { image: file, texts }, signal), "json")).scores;
}

/** `{answer, score}`. */
export async function ask(file, question, signal) {
  return read(await post("/v1/ask", { image: file, question }, signal), "json");
}

/** `[{name, score, cosine, image}]`, best first, for a text or a picture. */
export async function search(query, signal) {
  return (await read(await post("/v1/search", query, signal), "json")).hits;
}

/** A heat map of where in the picture a word of the text is seen, as a Blob. */
export async function explain(file, text, word, signal) {
  return read(await post("/v1/explain", { image: file, text, word }, signal), "blob");
}

/** The picture of a search hit, as a Blob, since an <img> element could not send the key. */
export async function indexed(path, signal) {
  return read(await send(path, { signal }), "blob");
}

function post(path, fields, signal, accept = "*/*") {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    for (const one of [value].flat()) if (one !== "") body.append(name, one);
  }
  return send(path, { method: "POST", body, signal, headers: { Accept: accept } });
}

async function send(path, options) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await unbroken(fetch(path, { ...options, headers }));
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const status = `The server answered with status ${response.status}.`; // for example from a proxy
  const seconds = Number(response.headers.get("Retry-After"));
  throw new Refusal(error?.code ?? "unexplained", error?.message ?? status, seconds);
}

function read(response, kind) {
  return unbroken(response[kind]());
}

/** The promise's value. Network errors become a Refusal; an AbortError stays as it is. */
async function unbroken(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const sentence = "The server could not be reached, or it broke off. See that it runs, then try again.";
    throw new Refusal("unreachable", sentence);
  }
}
