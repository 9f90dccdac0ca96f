// The page is a client of the server's own API: it has no access that other clients lack.
//
// - The image never leaves the browser except inside a request, as a data URL.
// - The conversation is kept here; every request contains all of it.
// - Everything that comes from the model, the user or the server is inserted as text, never as HTML.
// - No request goes to any other server.
//
// This file has the state of the page and connects its parts:
//
//     page_client.js      requests, the API key, error messages
//     page_image.js       files and the camera
//     page_attention.js   words and their attention maps

import { aboveAverage, drawVeil, prepareAttention, splitWords } from "./page_attention.js";
import {
  explain, PageError, post, readEvents, request, setKey, storedKey, storeKey,
} from "./page_client.js";
import { loadFile, setUpCamera } from "./page_image.js";

// ---- state ----

let settings = null; // page.json: the model's name, its instruction, the limits
let image = null; // {dataUrl} of the current image; dataUrl is null until the file is read
let exchanges = []; // the conversation: [{question, messages, answers, elements}]
let answering = null; // AbortController of the answers being generated
let attentionRequests = new AbortController(); // aborted when the conversation is cleared
let pointedWord = null; // the word whose attention map is shown

const byId = (id) => document.getElementById(id);
const answerOf = new WeakMap(); // .answer element -> answer

const veil = document.createElement("canvas"); // the canvas with the attention map, over the image
veil.id = "veil";
veil.setAttribute("aria-hidden", "true");

function create(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// ---- problems ----

function showProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
  showNote();
  if (text) byId("problem").scrollIntoView({ block: "nearest" });
}

// ---- the API key ----

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
  setKey(key);
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

// Caption a new image. If the user chooses another one while its file is being read, the first one is dropped.
async function setImage(file) {
  const chosen = { dataUrl: null };
  image = chosen;
  clearConversation();
  showPreview(file);
  try {
    chosen.dataUrl = await loadFile(file, settings.max_body);
  } catch (error) {
    if (image === chosen) showProblem(explain(error));
    return;
  }
  if (image === chosen) await ask("");
}

function removeImage() {
  image = null;
  clearConversation();
  hidePreview();
  byId("file").focus();
}

function setImageFromFiles(files) {
  if (!settings || byId("app").hidden) return;
  const file = [...files].find((candidate) => candidate.type.startsWith("image/")) ?? files[0];
  if (file) setImage(file);
}

// ---- the examples ----

// The images are fetched instead of linked, because requests for them need the API key.
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

// Return the messages of a conversation: the earlier exchanges and a new question. Of several answers to a question,
// the first one is used. Exchanges without an answer are left out. The image is part of the first question.
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

// Ask a question about the image. An empty question starts a new conversation, with the instruction that the model was
// trained with.
async function ask(question) {
  if (!image?.dataUrl) {
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

// Abort the answers that are being generated. The text that has arrived stays on the page.
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

// Bring the elements of an answer's words up to date with its text. Words that have not changed
// keep their element.
function renderWords(answer) {
  splitWords(answer.text).forEach(({ space, word }, index) => {
    const existing = answer.words[index];
    if (existing) {
      if (existing.textContent !== word) existing.textContent = word;
      return;
    }
    const element = create("span", "word", word);
    element.tabIndex = index ? -1 : 0; // the tab key stops at the first word only; arrow keys move to the others
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

// Show the attention map of a word; null shows no map.
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
  const isCompared = byId("compare").checked && attention.shares.length > 1;
  // Browsers cannot show all types of images that the server reads.
  if (byId("preview").naturalWidth) {
    const shares = isCompared ? aboveAverage(attention, index) : attention.shares[index];
    drawVeil(veil, byId("preview"), attention, shares);
    byId("stage").append(veil);
  }
  showNote(`“${pointedWord.textContent}”: ${describeAttention(attention, index, isCompared)}`);
}

function describeAttention({ totals }, index, isCompared) {
  if (isCompared) {
    return "the image is bright where the attention is above the average of the answer's words.";
  }
  const percent = Math.round(100 * totals[index]);
  return `${percent} % of the model's attention was on the image, the most where it is bright.`;
}

async function loadAttention(answer) {
  answer.attention = "loading";
  showNote("Computing the attention map …");
  const signal = attentionRequests.signal;
  try {
    const body = { model: settings.model, messages: answer.messages, answer: answer.text };
    const maps = await (await post("v1/attention", body, signal)).json();
    if (maps.words.length !== answer.words.length) throw new PageError("Its words differ from those of the answer.");
    answer.attention = prepareAttention(maps);
  } catch (error) {
    if (signal.aborted) return;
    answer.attention = null; // so that pointing at a word again repeats the request
    showNote(`No attention map is available. ${explain(error)}`);
    return;
  }
  if (pointedWord && answerOf.get(pointedWord.closest(".answer")) === answer) showAttention();
}

// Show a line below the conversation: what the attention map shows, or else a hint.
function showNote(text = "") {
  const answers = exchanges.flatMap((exchange) => exchange.answers);
  const hasAnswer = answers.some((answer) => answer.text);
  let hint = "The caption will appear here.";
  if (hasAnswer) hint = "Point at a word to see its attention to the image.";
  const isQuiet = answering || !byId("problem").hidden;
  byId("note").textContent = text || (isQuiet ? "" : hint);
  byId("compare-label").hidden = !hasAnswer || Boolean(answering);
}

// Return the word that an event refers to, if its answer is complete.
const wordAt = (event) => event.target.closest(".answer:not(.writing) .word");

// ---- settings ----

// An empty field has the value with which the page began.
function readNumber(id) {
  const input = byId(id);
  const value = Math.round(Number(input.value || input.defaultValue)) || Number(input.min);
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

// Greedy decoding (temperature 0) generates only one answer. So asking for several answers raises the temperature, and
// a temperature of 0 reduces the number of answers to 1.
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
    setImageFromFiles(event.target.files);
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
    setImageFromFiles(event.clipboardData.files);
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
    if (event.dataTransfer.files.length) setImageFromFiles(event.dataTransfer.files);
    else showProblem("Only files can be dropped. Save the image first, or copy it and paste it here.");
  });
}

function listenToForms() {
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = byId("question").value.trim();
    if (image?.dataUrl) byId("question").value = "";
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
  byId("max-tokens").defaultValue = settings.default_max_tokens;
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
  setUpCamera(setImage, showProblem);
  listenToForms();
  if (!settings.key_required) showApp();
  else if (storedKey()) await tryKey(storedKey());
  else showKeyForm();
}

start();
