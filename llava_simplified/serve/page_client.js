// Send requests to the server's API, and explain its errors to the user.

let apiKey = "";

// An error response of the API.
export class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message ?? `HTTP status ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}

// A problem that the page itself has found. Its message is shown to the user unchanged.
export class PageError extends Error {}

// ---- requests ----

function authorization() {
  if (!apiKey) return {};
  // The server expects the key as UTF-8, but `fetch` encodes headers as Latin-1. So pass each byte as a character.
  const bytes = new TextEncoder().encode(apiKey);
  return { Authorization: `Bearer ${String.fromCharCode(...bytes)}` };
}

export async function request(path, options = {}) {
  const headers = { ...authorization(), ...options.headers };
  const response = await fetch(path, { ...options, headers, credentials: "omit" });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error, response.headers.get("Retry-After"));
}

export function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

// Yield the parsed data of server-sent events; the event [DONE] ends the stream.
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new TypeError("the stream ended early");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop(); // the beginning of an event whose end has not arrived
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new ApiError(500, content.error);
      yield content;
    }
  }
}

// ---- the API key ----

const KEY_NAME = "llava-api-key";

// Use a key for the following requests.
export function setKey(key) {
  apiKey = key;
}

// Keep the key until the tab is closed. Browsers may forbid storage; the key is then lost when the page is reloaded.
export function storeKey(key) {
  setKey(key);
  try {
    sessionStorage.setItem(KEY_NAME, key);
  } catch { /* kept in memory only */ }
}

export function storedKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  } catch {
    return "";
  }
}

// ---- messages for the user ----

const IMAGE_PROBLEMS = {
  not_image: "This file is not an image that the server can read. "
    + "JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are supported.",
  unsupported: "This image format is not supported. If it is a HEIC photo, export it as JPEG, or set the "
    + "phone's camera to the format “most compatible”. JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are supported.",
  corrupt: "This image is damaged: part of the file is invalid. Try another copy of it.",
  truncated: "This image is damaged: the end of the file is missing. Try another copy of it.",
  html: "This file is a web page, not an image. Download the image itself and try again.",
};

// Return a message that tells the user what an exception means, and what to do.
export function explain(error) {
  if (error instanceof PageError) return error.message;
  if (!(error instanceof ApiError)) {
    return "The connection to the server failed. Check that it is running, then try again.";
  }
  if (error.code in IMAGE_PROBLEMS) return IMAGE_PROBLEMS[error.code];
  const reason = error.message.replace(/\.$/, "");
  if (error.code === "too_large") return `This image is too large: ${reason.replace(/^the image /, "it ")}.`;
  if (error.status === 413) return "This image file is too large for the server.";
  if (error.status === 429) {
    const seconds = error.retryAfter ?? 1;
    const unit = Number(seconds) === 1 ? "second" : "seconds";
    return `The server is busy. Please try again in ${seconds} ${unit}.`;
  }
  if (error.code === "timeout") return "The answer took too long. Please try again.";
  if (error.status >= 500) return "The server failed. Its log has the details.";
  return `The server refused the request: ${reason}.`;
}
