// The endpoint's page. Key, images and answers live in this script's variables alone: nothing is stored, and what is
// closed or reloaded is gone.
"use strict";

const MAX_IMAGES = 4;  // what an endpoint takes unless it is told otherwise
const MODELS_TIMEOUT_MS = 30_000;
const DIGEST_CHARS = 12;

const byId = (id) => document.getElementById(id);

let key = "";
let models = [];
let images = [];      // [{name, dataUrl, reading}] as they were added; no dataUrl while the endpoint reads one
let running = null;   // AbortController of the answers under way

function made(tag, { text = "", ...more } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), more);
  element.textContent = text;
  element.append(...children);
  return element;
}

// ---- The endpoint --------------------------------------------------------------------------------------------------

// Raises Error with words for people; an AbortError passes as it is.
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, {
      ...options,
      cache: "no-store",
      credentials: "omit",
      headers: { ...options.headers, Authorization: `Bearer ${key}` },
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The endpoint did not answer. Nothing is lost: try again.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  if (response.status === 401) {
    askKey("This key is not valid.");
    throw new Error("The key is not valid.");
  }
  throw new Error(body?.error?.message ?? `The endpoint answered ${response.status}.`);
}

// The data of server-sent events, wherever the chunks are cut: in a character, in a line end, between two events.
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);  // a last \r may be half of a \r\n
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---- Key and models ------------------------------------------------------------------------------------------------

function askKey(trouble = "") {
  key = "";
  byId("enter").hidden = false;
  byId("asking").hidden = byId("forget").hidden = true;
  byId("key").value = "";
  byId("key-trouble").textContent = trouble;
  byId("key").focus();
}

async function useKey(entered) {
  // What no header can carry is no key; fetch would only say that it failed.
  if (!/^[\x21-\x7e]+$/.test(entered)) return askKey("This key is not valid.");
  byId("key-trouble").textContent = "";
  key = entered;
  try {
    await loadModels();
  } catch (error) {
    if (key) byId("key-trouble").textContent = error.message;
    key = "";
    return;
  }
  byId("key").value = "";
  byId("enter").hidden = true;
  byId("asking").hidden = byId("forget").hidden = false;
  byId("files").focus();
}

async function loadModels() {
  const response = await request("/v1/models", { signal: AbortSignal.timeout(MODELS_TIMEOUT_MS) });
  const rank = (model) => (model.aliases.length ? 0 : model.parent ? 1 : 2);
  models = (await response.json()).data.sort((one, other) => rank(one) - rank(other));
  fillChoice(byId("model"), []);
  fillChoice(byId("other"), [made("option", { text: "nothing", value: "" })]);
  showChoice();
}

function fillChoice(select, first) {
  const before = select.value;
  const options = models.map((model) => made("option", { text: optionText(model), value: model.id }));
  select.replaceChildren(...first, ...options);
  if (before && models.some((model) => model.id === before)) select.value = before;
}

function nameOf(model) {
  if (!model.parent) return "base without adapter";
  const name = model.id.replace(`${model.parent}:`, "");
  return model.aliases.length ? name : name.slice(0, DIGEST_CHARS);
}

function optionText(model) {
  const task = model.lineage?.task ? ` (${model.lineage.task})` : "";
  return `${model.not_followed ? "⚠ " : ""}${nameOf(model)}${task}`;
}

function chosen() {
  const ids = [byId("model").value, byId("other").value].filter(Boolean);
  return ids.map((id) => models.find((model) => model.id === id));
}

const needsQuestion = (model) => !["report", "caption"].includes(model.lineage?.task);

function showChoice() {
  const needing = chosen().filter(needsQuestion);
  byId("question-note").textContent = needing.length === 0
    ? "Not needed: this adapter writes about the images unasked. It may be left empty."
    : "Enter asks, Shift+Enter makes a new line.";
  const behind = [...new Set(chosen())].filter((model) => model.not_followed);
  byId("warnings").replaceChildren(...behind.map((model) => made("p", {
    text: `⚠ “${nameOf(model)}” was moved to an adapter that cannot be served (${model.not_followed}). ` +
      "The adapter before it goes on answering.",
  })));
}

// ---- Images --------------------------------------------------------------------------------------------------------

function addFiles(files) {
  if (!key) {
    byId("key-trouble").textContent = "The key first, then the image.";
    return;
  }
  const free = MAX_IMAGES - images.length;
  const names = files.slice(free).map((file) => file.name).join(", ");
  byId("image-trouble").textContent = names ? `${MAX_IMAGES} images at most; left out: ${names}` : "";
  files.slice(0, free).forEach(addFile);
}

// The endpoint makes of any file what the model will see: of a DICOM file a PNG without the patient's data.
async function addFile(file) {
  const image = { name: file.name || "pasted image", dataUrl: "", reading: new AbortController() };
  images.push(image);
  showImages();
  try {
    const response = await request("/v1/image", { method: "POST", body: file, signal: image.reading.signal });
    image.dataUrl = await dataUrlOf(await response.blob());
  } catch (error) {
    images = images.filter((other) => other !== image);
    if (error.name !== "AbortError") addTrouble(`${image.name}: ${error.message}`);
  }
  showImages();
}

function addTrouble(message) {
  const before = byId("image-trouble").textContent;
  byId("image-trouble").textContent = before ? `${before}\n${message}` : message;
}

function dataUrlOf(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The image could not be read."));
    reader.readAsDataURL(blob);
  });
}

function removeImage(image) {
  image.reading.abort();
  images = images.filter((other) => other !== image);
  byId("image-trouble").textContent = "";
  showImages();
  byId("files").focus();  // the button that had the focus is gone
}

function showImages() {
  byId("images").replaceChildren(...images.map(imageItem));
  byId("images").className = images.length > 1 ? "many" : "";
}

function imageItem(image, number) {
  const remove = made("button", { text: "Remove", type: "button" });
  remove.setAttribute("aria-label", `Remove image ${number + 1}, ${image.name}`);
  remove.addEventListener("click", () => removeImage(image));
  const shown = image.dataUrl ? picture(image, number) : made("p", { className: "reading soft", text: "Reading…" });
  const name = made("span", { className: "name", text: image.name, title: image.name });
  return made("li", {}, shown, made("div", { className: "row" }, name, remove));
}

function picture(image, number) {
  return made("img", { src: image.dataUrl, alt: `Image ${number + 1}: ${image.name}` });
}

// ---- Asking --------------------------------------------------------------------------------------------------------

function whyNot(question) {
  if (images.length === 0) return ["Add an image first.", "files"];
  if (images.some((image) => !image.dataUrl)) return ["An image is still being read.", "question"];
  if (!question && chosen().some(needsQuestion)) return ["Write a question first.", "question"];
  return null;
}

async function ask() {
  if (running) return;
  if (!byId("more").querySelector("input:invalid")) byId("ask-trouble").textContent = "";
  else byId("more").open = true;  // the browser cannot point at a field that is folded away
  if (!byId("ask-form").reportValidity()) return;
  const question = byId("question").value.trim();
  const refused = whyNot(question);
  if (refused) {
    byId("ask-trouble").textContent = refused[0];
    return byId(refused[1]).focus();
  }
  running = new AbortController();
  const { signal } = running;
  byId("stop").disabled = false;
  byId("status").textContent = "Answering…";
  const asked = chosen();
  const cards = addTurn(question, asked);
  const ends = await Promise.all(asked.map((model, number) => answer(model, question, cards[number], signal)));
  running = null;
  byId("stop").disabled = true;
  const end = ends.every(Boolean) ? "Answered." : "Not answered in full.";
  byId("status").textContent = signal.aborted ? "Stopped." : end;
}

function stop() {
  running?.abort();
  byId("question").focus();  // the button is about to be disabled
}

function bodyOf(model, question) {
  const content = images.map((image) => ({ type: "image_url", image_url: { url: image.dataUrl } }));
  if (question) content.push({ type: "text", text: question });
  const body = {
    model: model.id,
    messages: [{ role: "user", content }],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (byId("max-tokens").value) body.max_tokens = Number(byId("max-tokens").value);
  if (byId("temperature").value) body.temperature = Number(byId("temperature").value);
  return JSON.stringify(body);
}

// Whether it came whole; what came of it stays on the page in any case.
async function answer(model, question, card, signal) {
  const started = performance.now();
  const told = { digest: "", tokens: null, cut: false };
  let trouble = "";
  try {
    await stream(model, question, card, signal, told);
  } catch (error) {
    trouble = signal.aborted ? "Stopped." : error.message;
  }
  const seconds = (performance.now() - started) / 1000;
  card.querySelector(".facts").textContent = factsOf(model, told, seconds);
  card.querySelector(".trouble").textContent = trouble;
  card.setAttribute("aria-busy", "false");
  return trouble === "";
}

async function stream(model, question, card, signal, told) {
  const headers = { "Content-Type": "application/json" };
  const body = bodyOf(model, question);
  const response = await request("/v1/chat/completions", { method: "POST", headers, body, signal });
  told.digest = response.headers.get("x-adapter-sha256") ?? "";
  card.querySelector(".facts").textContent = factsOf(model, told);
  const text = card.querySelector(".text");
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      text.textContent += choice?.delta.content ?? "";
      told.cut ||= choice?.finish_reason === "length";
      told.tokens = event.usage?.completion_tokens ?? told.tokens;
    }
  } catch (error) {
    if (error instanceof TypeError || error instanceof SyntaxError) throw new Error("The answer was cut off.");
    throw error;
  }
  throw new Error("The answer was cut off.");
}

function factsOf(model, { digest, tokens, cut }, seconds) {
  const facts = [model.id, digest ? `adapter ${digest.slice(0, DIGEST_CHARS)}` : "no adapter"];
  if (tokens !== null) facts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (seconds !== undefined) facts.push(`${seconds.toFixed(seconds < 10 ? 2 : 0)} s`);
  if (cut) facts.push("ended at max tokens");
  return facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");  // lines break between facts alone
}

// A question with a card for each answer, above those before.
function addTurn(question, asked) {
  const cards = asked.map(answerCard);
  const text = made("p", { text: question || "(no question)", dir: "auto" });
  const asking = made("div", { className: "asked" }, ...images.map(picture), text);
  const turn = made("article", { className: "turn" }, asking, made("div", { className: "cards" }, ...cards));
  byId("answers-part").hidden = false;
  byId("answers").prepend(turn);
  turn.scrollIntoView({ block: "nearest" });
  return cards;
}

function answerCard(model) {
  const parts = [
    made("h3", { text: nameOf(model) }),
    made("p", { className: "text", dir: "auto" }),
    made("p", { className: "trouble" }),
    made("p", { className: "facts soft", text: model.id }),
  ];
  const card = made("section", { className: "card" }, ...parts);
  card.setAttribute("aria-label", `Answer of ${nameOf(model)}`);
  card.setAttribute("aria-busy", "true");  // read aloud when it is whole, not word by word
  return card;
}

// ---- Events --------------------------------------------------------------------------------------------------------

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
});
// A reload is what surely leaves nothing: key, images, answers, and what is under way.
byId("forget").addEventListener("click", () => location.reload());
byId("model").addEventListener("change", showChoice);
byId("other").addEventListener("change", showChoice);

// No `accept` on the input: DICOM files often have no suffix, and the picker would hide them.
byId("files").addEventListener("change", () => {
  addFiles([...byId("files").files]);
  byId("files").value = "";  // so that the same file can be chosen again
});

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");

document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");  // it left the window, not just an element
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!holdsFiles(event)) return;
  event.preventDefault();  // else the browser leaves the page for the file
  addFiles([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length === 0) return;
  event.preventDefault();
  addFiles(files);
});

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
byId("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
});
byId("examples").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  byId("question").value = event.target.textContent;
  byId("question").focus();
});

byId("most").textContent = MAX_IMAGES;
askKey();
