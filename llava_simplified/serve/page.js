// The page is a client of the server's own API: it has no access that other clients lack.
//
// - The image never leaves the browser except inside a request, as a data URL.
// - The conversation is kept here; every request contains all of it.
// - Everything that comes from the model, the user or the server is inserted as text, never as HTML.
// - No request goes to any other server.
"use strict";

// ---- state ----

let settings = null; // page.json: the model's name, its instruction, the limits
let apiKey = "";
let image = null; // {dataUrl} of the image that is asked about
let imageSequence = 0; // counts images, to recognize that another one has been chosen meanwhile
let exchanges = []; // the conversation: [{question, messages, answers, element}]
let answering = null; // AbortController of the answers being generated
let attentionRequests = new AbortController(); // aborted when the conversation is cleared
let pointedWord = null; // the word whose attention map is shown

const byId = (id) => document.getElementById(id);
const answerOf = new WeakMap(); // .answer element -> answer

const veil = document.createElement("canvas"); // the attention map over the image
veil.id = "veil";
veil.setAttribute("aria-hidden", "true");

function create(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// ---- requests ----

// An error response of the API.
class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message ?? `HTTP status ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}

// A problem that was found before anything was sent; the message is shown as it is.
class PageError extends Error {}

function authorization() {
  if (!apiKey) return {};
  // Header values are Latin-1 in fetch; the server expects the bytes of UTF-8.
  const bytes = new TextEncoder().encode(apiKey);
  return { Authorization: `Bearer ${String.fromCharCode(...bytes)}` };
}

async function request(path, options = {}) {
  const headers = { ...authorization(), ...options.headers };
  const response = await fetch(path, { ...options, headers, credentials: "omit" });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error, response.headers.get("Retry-After"));
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

// The data of a stream of server-sent events, parsed; ends with the event [DONE].
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new TypeError("the stream ended early");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new ApiError(500, content.error);
      yield content;
    }
  }
}

// ---- problems ----

const IMAGE_PROBLEMS = {
  not_image: "This file is not an image that the server can read. "
    + "JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are supported.",
  corrupt: "This image is damaged: part of the file is invalid. Try another copy of it.",
  truncated: "This image is damaged: the end of the file is missing. Try another copy of it.",
  html: "This file is a web page, not an image. Download the image itself and try again.",
};

function explain(error) {
  if (error instanceof PageError) return error.message;
  if (!(error instanceof ApiError)) {
    return "The connection to the server failed. Check that it is running, then try again.";
  }
  if (error.code in IMAGE_PROBLEMS) return IMAGE_PROBLEMS[error.code];
  if (error.code === "too_large") return `This image is too large: ${error.message}.`;
  if (error.status === 413) return "This image file is too large for the server.";
  if (error.status === 429) {
    const seconds = error.retryAfter ?? 1;
    const unit = Number(seconds) === 1 ? "second" : "seconds";
    return `The server is busy. Please try again in ${seconds} ${unit}.`;
  }
  if (error.code === "timeout") return "The answer took too long. Please try again.";
  if (error.status >= 500) return "The server failed. Its log has the details.";
  return `The server refused the request: ${error.message}.`;
}

function showProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
  showNote();
  if (text) byId("problem").scrollIntoView({ block: "nearest" });
}

// ---- the API key ----

const KEY_NAME = "llava-api-key";

// Browsers may forbid storage; the key is then lost when the page is reloaded.
function storeKey(key) {
  apiKey = key;
  try {
    sessionStorage.setItem(KEY_NAME, key);
  } catch { /* kept in memory only */ }
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  } catch {
    return "";
  }
}

function showKeyForm(problem = "") {
  storeKey("");
  byId("app").hidden = true;
  byId("key-form").hidden = false;
  byId("key-problem").textContent = problem;
  byId("key-problem").hidden = !problem;
  byId("key").value = "";
  byId("key").focus();
}

async function tryKey(key) {
  apiKey = key;
  try {
    await request("v1/models");
  } catch (error) {
    showKeyForm(error.status === 401 ? "This key is wrong." : explain(error));
    return;
  }
  storeKey(key);
  showApp();
}

// ---- the image ----

// Return why a file cannot be used, judged by its first bytes, or "".
async function unsupportedType(file) {
  const bytes = new Uint8Array(await file.slice(0, 64).arrayBuffer());
  const head = String.fromCharCode(...bytes);
  const isIso = head.slice(4, 8) === "ftyp"; // the container of HEIC, AVIF and MP4
  if (isIso && /^(hei[cmsx]|hev[cx]|mif1|msf1)/.test(head.slice(8)) && !head.includes("avif")) {
    return "HEIC photos are not supported. Export the photo as JPEG, or set the phone's camera "
      + "to the format “most compatible”.";
  }
  if (file.type.startsWith("video/")) return "This file is a video. Only images are supported.";
  if (head.startsWith("%PDF")) return "This file is a PDF document. Save the page as an image first.";
  if (file.type === "image/svg+xml") return "SVG drawings are not supported. Export the drawing as PNG.";
  return "";
}

function readDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// Return the file as a data URL; throw PageError if it cannot be used.
async function loadFile(file) {
  if (file.size === 0) throw new PageError("This file is empty.");
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  const largest = (settings.max_body - 10_000) * 0.75; // base64 writes three bytes as four characters
  if (file.size > largest) {
    throw new PageError(`This file is too large: it has ${megabytes(file.size)} MB, `
      + `the server accepts ${megabytes(largest)} MB.`);
  }
  try {
    const problem = await unsupportedType(file);
    if (problem) throw new PageError(problem);
    return await readDataUrl(file);
  } catch (error) {
    if (error instanceof PageError) throw error;
    throw new PageError("The browser could not read this file.");
  }
}

function showPreview(file) {
  hidePreview();
  byId("preview").src = URL.createObjectURL(file);
  byId("preview").hidden = false;
  byId("stage").hidden = false;
  byId("drop").hidden = true;
  byId("replace").hidden = false;
  byId("remove").hidden = false;
}

function hidePreview() {
  const preview = byId("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.removeAttribute("src");
  byId("no-preview").hidden = true;
  byId("stage").hidden = true;
  byId("drop").hidden = false;
  byId("replace").hidden = true;
  byId("remove").hidden = true;
}

async function setImage(file) {
  const sequence = ++imageSequence;
  image = null;
  clearConversation();
  showPreview(file);
  try {
    const dataUrl = await loadFile(file);
    if (sequence !== imageSequence) return;
    image = { dataUrl };
  } catch (error) {
    if (sequence === imageSequence) showProblem(explain(error));
    return;
  }
  await ask("");
}

function removeImage() {
  imageSequence++;
  image = null;
  clearConversation();
  hidePreview();
  byId("file").focus();
}

function takeFile(files) {
  if (!settings || byId("app").hidden) return;
  const file = [...files].find((candidate) => candidate.type.startsWith("image/")) ?? files[0];
  if (file) setImage(file);
}

// ---- the camera ----

async function openCamera() {
  const video = byId("video");
  try {
    const wanted = { facingMode: "environment", width: { ideal: 1280 } };
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
  } catch {
    showProblem("The camera cannot be used: there is none, or this page may not use it.");
    return;
  }
  byId("camera-dialog").showModal();
}

function takePhoto() {
  const video = byId("video");
  if (!video.videoWidth) return; // it has not started yet
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const usePhoto = (blob) => setImage(new File([blob], "photo.jpg", { type: blob.type }));
  canvas.toBlob(usePhoto, "image/jpeg", 0.95);
  byId("camera-dialog").close();
}

function closeCamera() {
  for (const track of byId("video").srcObject?.getTracks() ?? []) track.stop();
  byId("video").srcObject = null;
}

// ---- the examples ----

// Images are fetched and not linked, because they may require the API key.
async function loadExamples() {
  byId("example-list").replaceChildren();
  for (let number = 0; number < settings.examples; number++) {
    const response = await request(`examples/${number}`).catch(() => null);
    if (response) addExample(number, await response.blob());
  }
}

function addExample(number, blob) {
  const button = create("button", "example");
  const thumbnail = document.createElement("img");
  button.type = "button";
  thumbnail.src = URL.createObjectURL(blob);
  thumbnail.alt = `Example ${number + 1}`;
  button.append(thumbnail);
  const file = new File([blob], `example-${number}.jpg`, { type: blob.type });
  button.addEventListener("click", () => setImage(file));
  byId("example-list").append(button);
  byId("examples").hidden = false;
}

// ---- the conversation ----

// Return the messages that ask a question after the earlier exchanges. It continues from the first
// answer of each; exchanges without an answer are left out. The image is part of the first question.
function messagesFor(earlier, question) {
  const messages = [];
  for (const exchange of earlier) {
    const answer = exchange.answers[0].text;
    if (!answer) continue;
    messages.push({ role: "user", content: exchange.question });
    messages.push({ role: "assistant", content: answer });
  }
  messages.push({ role: "user", content: question });
  messages[0].content = [
    { type: "image_url", image_url: { url: image.dataUrl } },
    { type: "text", text: messages[0].content },
  ];
  return messages;
}

function clearConversation() {
  stop();
  attentionRequests.abort();
  attentionRequests = new AbortController();
  exchanges = [];
  point(null);
  byId("conversation").replaceChildren();
  showProblem("");
  showNote();
}

// Add a question and its empty answers to the page.
function addExchange(question, isShown, count) {
  const messages = messagesFor(exchanges, question);
  const exchange = { question, messages, answers: [], elements: [] };
  if (isShown) exchange.elements.push(create("p", "question", question));
  for (let index = 0; index < count; index++) {
    const element = create("div", "answer writing");
    const answer = { text: "", words: [], messages, element, attention: null };
    const box = create("div", "answer-box");
    box.append(answer.element);
    answerOf.set(answer.element, answer);
    exchange.answers.push(answer);
    exchange.elements.push(box);
  }
  exchanges.push(exchange);
  byId("conversation").append(...exchange.elements);
  return exchange;
}

function removeExchange(exchange) {
  exchanges = exchanges.filter((other) => other !== exchange);
  for (const element of exchange.elements) element.remove();
}

// Ask a question about the image. Without one, start again with the instruction of the training.
async function ask(question) {
  if (!image) {
    showProblem("Choose an image first.");
    return;
  }
  stop();
  point(null);
  if (!question) clearConversation();
  showProblem("");
  const options = readOptions();
  const exchange = addExchange(question || settings.instruction, Boolean(question), options.n);
  const controller = new AbortController();
  setAnswering(controller);
  scrollToEnd();
  try {
    await streamAnswers(exchange, options, controller.signal);
    controller.signal.throwIfAborted();
    finishExchange(exchange);
  } catch (error) {
    if (controller.signal.aborted) return; // `stop` has finished the exchange, or it has been cleared
    removeExchange(exchange);
    if (question && !byId("question").value) byId("question").value = question;
    if (error.status === 401) showKeyForm("This key is no longer accepted.");
    else showProblem(explain(error));
  } finally {
    if (answering === controller) setAnswering(null);
  }
}

async function streamAnswers(exchange, options, signal) {
  const body = { model: settings.model, messages: exchange.messages, stream: true, ...options };
  const response = await post("v1/chat/completions", body, signal);
  for await (const event of readEvents(response)) {
    for (const choice of event.choices) {
      signal.throwIfAborted();
      if (choice.delta.content) addText(exchange.answers[choice.index], choice.delta.content);
    }
  }
}

// Abort the answers being generated. What has arrived remains.
function stop() {
  if (!answering) return;
  answering.abort();
  setAnswering(null);
  finishExchange(exchanges.at(-1));
}

function setAnswering(controller) {
  answering = controller;
  byId("conversation").setAttribute("aria-busy", String(Boolean(controller)));
  byId("ask").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  showNote();
}

function addText(answer, text) {
  const scroll = byId("scroll");
  const wasAtEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
  answer.text += text;
  renderWords(answer);
  if (wasAtEnd) scrollToEnd();
}

function scrollToEnd() {
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
}

function finishExchange(exchange) {
  for (const answer of exchange.answers) {
    answer.element.classList.remove("writing");
    if (answer.text) {
      answer.element.after(copyButton(answer));
    } else {
      answer.element.classList.add("empty");
      answer.element.textContent = "no answer";
    }
  }
}

// ---- words ----

// A word with the white space in front of it; a Chinese or Japanese character is a word. This is the rule
// of serve/attention.py, whose attention maps belong to these words. JavaScript's \s differs from Python's.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const CJK = "\\u3040-\\u30ff\\u3400-\\u9fff";
const WORD = new RegExp(`([${SPACE}]*)([${CJK}]|[^${SPACE}${CJK}]+)`, "g");

// Bring the elements of an answer's words up to date with its text. Words that have not changed
// keep their element.
function renderWords(answer) {
  const found = [...answer.text.matchAll(WORD)];
  found.forEach(([, space, word], index) => {
    const existing = answer.words[index];
    if (existing) {
      if (existing.textContent !== word) existing.textContent = word;
      return;
    }
    const element = create("span", "word", word);
    element.tabIndex = index ? -1 : 0; // one stop of the tab key; the arrow keys move on from there
    answer.words.push(element);
    answer.element.append(space, element);
  });
}

function moveFocus(event) {
  const answer = answerOf.get(event.target.closest(".answer"));
  const index = answer ? answer.words.indexOf(event.target) : -1;
  if (index < 0) return;
  const last = answer.words.length - 1;
  const targets = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last };
  const word = answer.words[targets[event.key]];
  if (!word) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  word.tabIndex = 0;
  word.focus();
}

// ---- copying ----

function copyButton(answer) {
  const button = create("button", "small copy", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    const isCopied = await copyText(answer.text);
    button.textContent = isCopied ? "Copied" : "Copying failed";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* not available without https, except on localhost */ }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  return isCopied;
}

// ---- attention maps ----

// Show the attention map of a word, or none.
function point(word) {
  if (word === pointedWord) return;
  pointedWord?.classList.remove("pointed");
  pointedWord = word;
  pointedWord?.classList.add("pointed");
  showAttention();
}

function showAttention() {
  const answer = pointedWord && answerOf.get(pointedWord.closest(".answer"));
  const attention = answer?.attention;
  if (!attention || attention === "loading") {
    veil.remove();
    showNote(attention ? "Computing the attention map …" : "");
    if (answer && !attention) loadAttention(answer);
    return;
  }
  const index = answer.words.indexOf(pointedWord);
  const isCompared = byId("compare").checked && attention.grids.length > 1;
  drawVeil(attention, isCompared ? aboveAverage(attention, index) : attention.shares[index]);
  const percent = Math.round(100 * attention.totals[index]);
  showNote(`“${pointedWord.textContent}”: ` + (isCompared
    ? "the image is bright where the attention is above the average of the answer's words."
    : `${percent} % of the model's attention was on the image, the most where it is bright.`));
}

async function loadAttention(answer) {
  answer.attention = "loading";
  showNote("Computing the attention map …");
  const signal = attentionRequests.signal;
  try {
    const body = { model: settings.model, messages: answer.messages, answer: answer.text };
    const { region, words } = await (await post("v1/attention", body, signal)).json();
    if (words.length !== answer.words.length) throw new PageError("its words could not be matched");
    answer.attention = attentionOf(region, words.map((word) => word.grid));
  } catch (error) {
    if (signal.aborted) return;
    answer.attention = null; // pointing at a word again repeats the request
    showNote(`No attention map is available. ${explain(error)}`);
    return;
  }
  if (pointedWord && answerOf.get(pointedWord.closest(".answer")) === answer) showAttention();
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// totals: the part of each word's attention that is on the image.
// shares: how that part is distributed over the patches.
function attentionOf(region, grids) {
  const flat = grids.map((grid) => grid.flat());
  const totals = flat.map(sum);
  const shares = flat.map((weights, index) => weights.map((weight) => weight / (totals[index] || 1)));
  return { region, grids, totals, shares };
}

// Some patches attract attention whatever the word ("attention sinks"). Compared with the other words of the
// answer, what is particular to one becomes visible.
function aboveAverage({ shares }, index) {
  return shares[index].map((share, patch) => {
    const average = sum(shares.map((other) => other[patch])) / shares.length;
    return Math.max(0, share - average);
  });
}

// One pixel for each patch: the more attention, the brighter and the more transparent.
function patchImage(rows, columns, shares) {
  const low = Math.min(...shares);
  const high = Math.max(...shares);
  const pixels = new ImageData(columns, rows);
  shares.forEach((share, patch) => {
    const light = high > low ? (share - low) / (high - low) : 0;
    const color = [255 * light, 170 * light, 60 * light, 255 * (0.72 - 0.5 * light)];
    pixels.data.set(color, 4 * patch);
  });
  const canvas = new OffscreenCanvas(columns, rows);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

// Lay the attention over the image, which is as large as its box permits and centered in it.
function drawVeil({ region: [left, top, right, bottom], grids }, shares) {
  const preview = byId("preview");
  if (!preview.naturalWidth) return; // of a type that the browser cannot show
  // Unlike clientWidth, this is not rounded: the edge of the image would remain uncovered.
  const { width: boxWidth, height: boxHeight } = preview.getBoundingClientRect();
  const scale = Math.min(boxWidth / preview.naturalWidth, boxHeight / preview.naturalHeight);
  const width = preview.naturalWidth * scale;
  const height = preview.naturalHeight * scale;
  veil.width = Math.round(width);
  veil.height = Math.round(height);
  veil.style.width = `${width}px`;
  veil.style.height = `${height}px`;
  veil.style.left = `${(boxWidth - width) / 2}px`;
  veil.style.top = `${(boxHeight - height) / 2}px`;

  const context = veil.getContext("2d");
  const area = [
    left * veil.width,
    top * veil.height,
    (right - left) * veil.width,
    (bottom - top) * veil.height,
  ];
  context.fillStyle = "rgb(0 0 0 / 72%)"; // the margin that the model does not receive
  context.fillRect(0, 0, veil.width, veil.height);
  context.clearRect(...area);
  context.imageSmoothingQuality = "high";
  context.drawImage(patchImage(grids[0].length, grids[0][0].length, shares), ...area);
  byId("stage").append(veil);
}

// The line below the conversation: a hint, or what the attention map shows.
function showNote(text = "") {
  const answers = exchanges.flatMap((exchange) => exchange.answers);
  const hasAnswer = answers.some((answer) => answer.text);
  let hint = "The caption will appear here.";
  if (hasAnswer) hint = "Point at a word to see its attention to the image.";
  const isQuiet = answering || !byId("problem").hidden;
  byId("note").textContent = text || (isQuiet ? "" : hint);
  byId("compare-label").hidden = !hasAnswer || Boolean(answering);
}

// The word that an event is about, if its answer is complete.
const wordAt = (event) => event.target.closest(".answer:not(.writing) .word");

// ---- settings ----

function readNumber(id) {
  const input = byId(id);
  const value = Math.round(Number(input.value)) || Number(input.min);
  return Math.min(Math.max(value, Number(input.min)), Number(input.max));
}

function readOptions() {
  return {
    temperature: Number(byId("temperature").value),
    n: readNumber("answers"),
    max_tokens: readNumber("max-tokens"),
  };
}

function setTemperature(value) {
  byId("temperature").value = value;
  byId("temperature-value").value = byId("temperature").value;
}

// Greedy decoding has one answer only: several need a temperature, and a temperature of 0 permits one.
function answersChanged() {
  const isGreedy = Number(byId("temperature").value) === 0;
  if (readNumber("answers") > 1 && isGreedy) setTemperature(settings.sampling_temperature);
}

function temperatureChanged() {
  setTemperature(byId("temperature").value);
  if (Number(byId("temperature").value) === 0) byId("answers").value = 1;
}

// ---- start ----

function listenToConversation() {
  const card = byId("conversation-card");
  const isMouse = (event) => event.pointerType === "mouse";
  const pointAt = (event) => {
    const word = wordAt(event);
    if (word) point(word);
  };
  card.addEventListener("pointerover", (event) => isMouse(event) && pointAt(event));
  card.addEventListener("pointerleave", (event) => isMouse(event) && point(null));
  card.addEventListener("focusin", pointAt);
  card.addEventListener("focusout", (event) => card.contains(event.relatedTarget) || point(null));
  card.addEventListener("keydown", moveFocus);
  byId("compare").addEventListener("change", showAttention);
  new ResizeObserver(() => pointedWord && showAttention()).observe(byId("stage"));
}

function listenToImage() {
  byId("file").addEventListener("change", (event) => {
    takeFile(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  byId("replace").addEventListener("click", () => byId("file").click());
  byId("remove").addEventListener("click", removeImage);
  byId("preview").addEventListener("error", () => {
    byId("preview").hidden = true;
    byId("no-preview").hidden = false;
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    takeFile(event.clipboardData.files);
  });
}

// An image can be dropped anywhere on the page.
function listenToDrops() {
  const highlight = (isDragging) => byId("image").classList.toggle("dragging", isDragging);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    highlight(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || highlight(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    highlight(false);
    if (event.dataTransfer.files.length) takeFile(event.dataTransfer.files);
    else showProblem("Only files can be dropped. Save the image first, or copy it and paste it here.");
  });
}

function listenToCamera() {
  if (!navigator.mediaDevices?.getUserMedia) return; // browsers offer it with https and on localhost only
  byId("camera").hidden = false;
  byId("camera").addEventListener("click", openCamera);
  byId("shoot").addEventListener("click", takePhoto);
  byId("camera-cancel").addEventListener("click", () => byId("camera-dialog").close());
  byId("camera-dialog").addEventListener("close", closeCamera);
}

function listenToForms() {
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = byId("question").value.trim();
    if (image) byId("question").value = "";
    ask(question);
  });
  byId("stop").addEventListener("click", () => {
    stop();
    byId("question").focus();
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    tryKey(byId("key").value.trim());
  });
  byId("temperature").addEventListener("input", temperatureChanged);
  byId("answers").addEventListener("input", answersChanged);
}

function showSettings() {
  document.title = `${settings.model} · LLaVA Simplified`;
  byId("model").textContent = settings.model;
  byId("question").placeholder = settings.instruction;
  byId("answers").max = settings.max_answers;
  byId("max-tokens").max = settings.max_tokens;
  byId("max-tokens").value = settings.default_max_tokens;
}

function showApp() {
  byId("key-form").hidden = true;
  byId("app").hidden = false;
  loadExamples();
}

async function start() {
  try {
    settings = await (await request("page.json")).json();
  } catch (error) {
    byId("app").hidden = false;
    showProblem(explain(error));
    return;
  }
  showSettings();
  listenToConversation();
  listenToImage();
  listenToDrops();
  listenToCamera();
  listenToForms();
  if (!settings.key_required) showApp();
  else if (storedKey()) await tryKey(storedKey());
  else showKeyForm();
}

start();
