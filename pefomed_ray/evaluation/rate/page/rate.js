// The rating page. The server keeps everything; the page keeps in its session (sessionStorage, so each tab its own) who is
// rating, which item is looked at, and a comment that is being written.
"use strict";

const byId = (id) => document.getElementById(id);

const state = {
  rater: "",
  scale: [],     // [{score, meaning}], best first
  order: [],     // keys of the items, in this rater's order
  said: {},      // key -> {score, skipped, comment}
  at: 0,         // place in the order; order.length is the page behind the last item
};

const NOTHING = { score: null, skipped: false, comment: "" };
const saidOf = (key) => state.said[key] ?? NOTHING;
const isOpen = (key) => saidOf(key).score === null && !saidOf(key).skipped;
const currentKey = () => state.order[state.at];

// ---- The server ----------------------------------------------------------------------------------------------------

async function ask(path, method = "GET", body = undefined) {
  const options = { method, keepalive: method !== "GET" };  // a comment is still saved while the page is being left
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The program behind this page does not answer, and nothing is saved. Start it again.");
  }
  if (response.status === 403) {
    throw new Error("Nothing is saved: the program was started anew. Open the address that it printed.");
  }
  if (!response.ok) {
    const { detail } = await response.json().catch(() => ({}));
    throw new Error(typeof detail === "string" ? detail : `Not saved: the server answered ${response.status}.`);
  }
  return response.json();
}

// One thing after the other: of two keys pressed quickly the second finds what the first has left.
let queue = Promise.resolve();
function inTurn(action) {
  queue = queue.then(action).then(() => { byId("trouble").textContent = ""; }, (error) => {
    byId("trouble").textContent = error.message;
  });
  return queue;
}

// ---- Saying something ----------------------------------------------------------------------------------------------

async function save(key, said) {
  const { rater } = state;
  state.said[key] = await ask(`/api/items/${key}/rating`, "PUT", { rater, ...said });
  forgetDraft(key);
}

async function rate(score) {
  const key = currentKey();
  if (key === undefined) return;
  await save(key, { score, skipped: false, comment: byId("comment").value });
  await advance(`Saved: ${score}.`);
}

async function skip() {
  const key = currentKey();
  if (key === undefined) return;
  await save(key, { score: null, skipped: true, comment: byId("comment").value });
  await advance("Skipped.");
}

async function saveComment() {
  const key = currentKey();
  const comment = byId("comment").value;
  if (key === undefined || comment === saidOf(key).comment) return;
  await save(key, { ...saidOf(key), comment });
  say("Comment saved.");
  showProgress();
}

async function undo() {
  await saveComment();
  const { key, said } = await ask("/api/undo", "POST", { rater: state.rater });
  if (key === null) return say("Nothing to undo.");
  state.said[key] = said;
  forgetDraft(key);
  await show(state.order.indexOf(key));
  say(`Undone. ${placeText()}.`);
}

// ---- Moving --------------------------------------------------------------------------------------------------------

async function advance(message) {
  await show(nextOpen(state.at));
  say(`${message} ${placeText()}.`);
}

function nextOpen(from) {
  const places = [...state.order.keys()];
  const wrapped = [...places.slice(from + 1), ...places.slice(0, from + 1)];
  return wrapped.find((place) => isOpen(state.order[place])) ?? state.order.length;
}

async function move(steps) {
  await saveComment();
  const to = Math.min(Math.max(state.at + steps, 0), state.order.length);
  if (to === state.at) return;
  await show(to);
  say(`${placeText()}.`);
}

function placeText() {
  return state.at < state.order.length ? `Item ${state.at + 1} of ${state.order.length}` : "End of the list";
}

async function show(place) {
  const key = state.order[place];
  const item = key === undefined ? null : await ask(`/api/items/${key}`);
  state.at = place;
  sessionStorage.setItem("place", key ?? "end");
  byId("item").hidden = item === null;
  byId("end").hidden = item !== null;
  if (item) showItem(item);
  else showEnd();
  showProgress();
}

function showItem(item) {
  byId("question").textContent = item.question;
  byId("question-part").hidden = !item.question;
  byId("reference").textContent = item.reference;
  byId("answer").textContent = item.answer.trim() ? item.answer : "(an empty answer)";
  byId("answer").classList.toggle("empty", !item.answer.trim());
  byId("texts").scrollTop = 0;
  window.scrollTo(0, 0);
  showImages(item.images);
  showSaid(item.key);
  byId("previous").disabled = state.at === 0;
  const following = state.order[state.at + 1];
  if (following) loadAhead(following);
}

function showSaid(key) {
  const said = saidOf(key);
  for (const button of byId("scores").children) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.score) === said.score && said.score !== null));
  }
  byId("skip").setAttribute("aria-pressed", String(said.skipped));
  byId("comment").value = draft(key) ?? said.comment;
}

function showImages(addresses) {
  byId("images").replaceChildren(...addresses.map((address, number) => {
    const button = document.createElement("button");
    const many = addresses.length > 1 ? ` ${number + 1} of ${addresses.length}` : "";
    button.type = "button";
    button.setAttribute("aria-label", `Enlarge image${many}`);
    button.addEventListener("click", () => openZoom(number));
    const image = document.createElement("img");
    image.alt = `Image${many} of this item`;
    image.addEventListener("error", () => {
      const note = document.createElement("span");
      note.className = "broken";
      note.textContent = "This picture cannot be shown. Skip the item, and say so in a comment.";
      image.replaceWith(note);
    });
    image.src = address;
    button.append(image);
    if (many) {
      const label = document.createElement("span");
      label.className = "number";
      label.textContent = number + 1;
      button.append(label);
    }
    return button;
  }));
}

async function loadAhead(key) {
  // The browser's cache is forbidden (no-store), but a picture decoded in this page is reused by it.
  const item = await ask(`/api/items/${key}`).catch(() => null);
  loadAhead.kept = item?.images.map((address) => Object.assign(new Image(), { src: address }));
}

function showProgress() {
  const rated = state.order.filter((key) => saidOf(key).score !== null).length;
  const skipped = state.order.filter((key) => saidOf(key).skipped).length;
  byId("place").textContent = placeText();
  byId("progress").max = state.order.length;
  byId("progress").value = rated + skipped;
  byId("done").textContent = `${rated} rated${skipped ? `, ${skipped} skipped` : ""}`;
  document.title = `${placeText()} · Rate answers`;
}

function showEnd() {
  const open = state.order.filter(isOpen).length;
  const skipped = state.order.filter((key) => saidOf(key).skipped).length;
  const rated = state.order.length - open - skipped;
  byId("end-title").textContent = open ? `${open} of ${state.order.length} are still open` : "All done. Thank you!";
  byId("end-text").textContent =
    `${rated} rated, ${skipped} skipped. Everything is saved; this page can be closed. The left arrow goes back.`;
  byId("to-open").hidden = open === 0;
  byId("to-skipped").hidden = skipped === 0;
  byId(open ? "to-open" : skipped ? "to-skipped" : "to-start").focus();
}

function say(message) {
  byId("status").textContent = message;
}

// ---- A comment that is being written -------------------------------------------------------------------------------

const draftName = (key) => `draft ${state.rater} ${key}`;
const draft = (key) => sessionStorage.getItem(draftName(key));
const forgetDraft = (key) => sessionStorage.removeItem(draftName(key));

byId("comment").addEventListener("input", () => sessionStorage.setItem(draftName(currentKey()), byId("comment").value));
byId("comment").addEventListener("blur", () => inTurn(saveComment));
window.addEventListener("pagehide", () => { saveComment().catch(() => {}); });

// ---- A larger picture ----------------------------------------------------------------------------------------------

const zoom = { number: 0, factor: 1 };
const MAX_FACTOR = 8;
const ZOOM_STEP = 1.4;

function openZoom(number) {
  const images = byId("images").querySelectorAll("img");
  if (number >= images.length) return byId("zoom").close();
  zoom.number = number;
  byId("zoom-image").src = images[number].src;
  byId("zoom-image").alt = images[number].alt;
  byId("zoom-place").textContent = images.length > 1 ? `${number + 1} of ${images.length}` : "";
  byId("zoom-next").hidden = images.length === 1;
  if (!byId("zoom").open) byId("zoom").showModal();
  byId("zoom-view").focus();
  setFactor(1);
}

function setFactor(factor) {
  const [view, image] = [byId("zoom-view"), byId("zoom-image")];
  const middle = [
    (view.scrollLeft + view.clientWidth / 2) / view.scrollWidth,
    (view.scrollTop + view.clientHeight / 2) / view.scrollHeight,
  ];
  zoom.factor = Math.min(Math.max(factor, 1), MAX_FACTOR);
  const whole = Math.min(view.offsetWidth / image.naturalWidth, view.offsetHeight / image.naturalHeight);
  image.style.width = `${Math.floor(image.naturalWidth * whole * zoom.factor)}px`;
  view.scrollLeft = middle[0] * view.scrollWidth - view.clientWidth / 2;
  view.scrollTop = middle[1] * view.scrollHeight - view.clientHeight / 2;
}

byId("zoom-image").addEventListener("load", () => setFactor(1));
byId("zoom-in").addEventListener("click", () => setFactor(zoom.factor * ZOOM_STEP));
byId("zoom-out").addEventListener("click", () => setFactor(zoom.factor / ZOOM_STEP));
byId("zoom-next").addEventListener("click", () => openZoom(zoom.number + 1));
byId("zoom-close").addEventListener("click", () => byId("zoom").close());
byId("zoom-view").addEventListener("wheel", (event) => {
  event.preventDefault();
  setFactor(event.deltaY < 0 ? zoom.factor * ZOOM_STEP : zoom.factor / ZOOM_STEP);
}, { passive: false });
byId("zoom-view").addEventListener("pointermove", (event) => {
  if (event.pointerType !== "mouse" || event.buttons !== 1) return;  // fingers scroll by themselves
  byId("zoom-view").scrollBy(-event.movementX, -event.movementY);
});
byId("zoom-image").addEventListener("dragstart", (event) => event.preventDefault());
window.addEventListener("resize", () => { if (byId("zoom").open) setFactor(zoom.factor); });

const ZOOM_KEYS = {
  "+": () => setFactor(zoom.factor * ZOOM_STEP),
  "=": () => setFactor(zoom.factor * ZOOM_STEP),
  "-": () => setFactor(zoom.factor / ZOOM_STEP),
  "z": () => openZoom(zoom.number + 1),
};

// ---- Keys ----------------------------------------------------------------------------------------------------------

const KEYS = {
  "s": () => inTurn(skip),
  "u": () => inTurn(undo),
  "c": () => inTurn(() => byId("comment").focus()),
  "z": () => { if (!byId("item").hidden) openZoom(0); },
  "?": () => byId("help").showModal(),
  "ArrowLeft": () => inTurn(() => move(-1)),
  "ArrowRight": () => inTurn(() => move(1)),
  "ArrowUp": () => byId("texts").scrollBy(0, -60),
  "ArrowDown": () => byId("texts").scrollBy(0, 60),
};

function actionOf(event) {
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (byId("zoom").open) return ZOOM_KEYS[name];
  if (document.querySelector("dialog[open]")) return undefined;
  if (event.target === byId("comment")) return name === "Escape" ? () => byId("comment").blur() : undefined;
  if (event.repeat && !name.startsWith("Arrow")) return undefined;  // a key held down rates one item, not twenty
  if (state.scale.some(({ score }) => String(score) === name)) return () => inTurn(() => rate(Number(name)));
  const scrolls = byId("texts").scrollHeight > byId("texts").clientHeight;
  if (!scrolls && (name === "ArrowUp" || name === "ArrowDown")) return undefined;  // the page scrolls instead
  return KEYS[name];
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  action();
});

byId("skip").addEventListener("click", KEYS.s);
byId("undo").addEventListener("click", KEYS.u);
byId("to-comment").addEventListener("click", KEYS.c);
byId("previous").addEventListener("click", KEYS.ArrowLeft);
byId("next").addEventListener("click", KEYS.ArrowRight);
byId("open-help").addEventListener("click", KEYS["?"]);
byId("close-help").addEventListener("click", () => byId("help").close());
byId("to-open").addEventListener("click", () => inTurn(() => show(nextOpen(-1))));
byId("to-start").addEventListener("click", () => inTurn(() => show(0)));
byId("to-skipped").addEventListener("click", () => inTurn(() => {
  return show(state.order.findIndex((key) => saidOf(key).skipped));
}));

// ---- Who is rating -------------------------------------------------------------------------------------------------

async function askName() {
  const names = await ask("/api/raters");
  byId("names").replaceChildren(...names.map((name) => Object.assign(document.createElement("option"), { value: name })));
  byId("name").value = state.rater;
  byId("name-dialog").showModal();
  byId("name").select();
}

async function begin(name) {
  const plan = await ask(`/api/plan?rater=${encodeURIComponent(name)}`);
  Object.assign(state, { rater: plan.rater, scale: plan.scale, order: plan.order, said: plan.said });
  sessionStorage.setItem("rater", plan.rater);
  byId("rater").hidden = false;
  byId("rater").textContent = plan.rater;
  byId("rater").setAttribute("aria-label", `Rating as ${plan.rater}; change`);
  showScale();
}

function showScale() {
  byId("scores").replaceChildren(...state.scale.map(({ score, meaning }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.score = score;
    button.setAttribute("aria-keyshortcuts", score);
    button.append(Object.assign(document.createElement("kbd"), { textContent: score }), meaning);
    button.addEventListener("click", () => inTurn(() => rate(score)));
    return button;
  }));
  byId("help-scores").replaceChildren(...state.scale.map(({ score, meaning }) => {
    const row = document.createElement("tr");
    const key = document.createElement("td");
    key.append(Object.assign(document.createElement("kbd"), { textContent: score }));
    row.append(key, Object.assign(document.createElement("td"), { textContent: meaning }));
    return row;
  }));
}

byId("rater").addEventListener("click", () => inTurn(askName));
byId("name-dialog").addEventListener("close", () => { if (!state.rater) inTurn(askName); });
byId("name-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("name-trouble").textContent = "";
  try {
    await begin(byId("name").value);
    await show(nextOpen(-1));
  } catch (error) {
    byId("name-trouble").textContent = error.message;
    return;
  }
  byId("name-dialog").close();
  say(`Rating as ${state.rater}. ${placeText()}.`);
});

inTurn(async () => {
  const rater = sessionStorage.getItem("rater");
  if (!rater) return askName();
  await begin(rater);
  const place = sessionStorage.getItem("place");
  const found = place === "end" ? state.order.length : state.order.indexOf(place);
  await show(found >= 0 ? found : nextOpen(-1));
});
