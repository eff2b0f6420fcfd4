// The page: a conversation in turns, each a question and its answer.

import { render } from "./markdown.js";
import * as server from "./server.js";
import * as settings from "./settings.js";
import { load, save } from "./store.js";

const MOST_TRIES = 5; // of a request that finds the server's queue full
const UNANSWERED = "Not answered, and left out of what the model reads";
const $ = (id) => document.getElementById(id);
const [turnsBox, composer, message, send, banner] = ["turns", "composer", "message", "send", "banner"].map($);

let turns = restored(); // [{question, answer, note, problem, figures}]
let earlier = null; // the conversation before "New chat"
let running = null; // the AbortController of the answer that is on its way
let loaded = []; // the server's models
let following = true; // the end of the conversation is kept in sight
const views = new WeakMap(); // of the turns

// ---- The conversation on the page

function restored() {
  const kept = load("conversation");
  if (!Array.isArray(kept)) return [];
  const whole = kept.filter((turn) => typeof turn?.question === "string" && typeof turn.answer === "string");
  for (const turn of whole) if (!turn.answer) turn.note ||= UNANSWERED;
  return whole;
}

function show() {
  const wanted = turns.map((turn) => views.get(turn) ?? view(turn));
  // What stays is not touched: a screen reader would read it again.
  for (const child of [...turnsBox.children]) if (!wanted.includes(child)) child.remove();
  for (const child of wanted) if (!child.isConnected) turnsBox.append(child);
  turns.forEach(update);
  $("welcome").hidden = turns.length > 0;
  $("back").hidden = !earlier;
  document.title = turns.length ? `${turns[0].question.slice(0, 40)} · litgpt` : "litgpt";
}

function view(turn) {
  const made = $("turn").content.firstElementChild.cloneNode(true);
  const on = (name, action) => made.querySelector(name).addEventListener("click", action);
  on(".edit", () => edit(turn));
  on(".retry", (event) => {
    if (event.detail === 0) message.focus(); // by a key: the button is about to go, and the focus with it
    if (!running) answer(turn);
  });
  on(".copy", (event) => copy(turn.answer, event.currentTarget));
  made.querySelector(".question .text").textContent = turn.question;
  views.set(turn, made);
  return made;
}

function update(turn) {
  const part = (name) => views.get(turn).querySelector(name);
  const busy = running !== null && turn === turns.at(-1);
  const { thoughts, text, thinking } = split(turn.answer);
  render(part(".answer > .text"), text);
  render(part(".thoughts > .markdown"), thoughts);
  part(".thoughts").hidden = !thoughts;
  part("summary").textContent = busy && thinking ? "Thinking …" : "Thoughts";
  part(".waiting").hidden = !busy || text !== "";
  part(".problem").textContent = turn.problem ?? "";
  part(".problem").hidden = !turn.problem;
  part(".figures").textContent = [turn.note, turn.figures].filter(Boolean).join(" · ");
  part(".copy").hidden = !turn.answer;
  views.get(turn).classList.toggle("busy", busy);
  if (following) window.scrollTo(0, document.documentElement.scrollHeight);
}

// An answer of a model that thinks aloud first. Some templates write the opening <think> themselves.
function split(answer) {
  const open = answer.trimStart().startsWith("<think>");
  const end = answer.indexOf("</think>");
  if (end >= 0) {
    const thoughts = answer.slice(0, end).replace("<think>", "");
    return { thoughts: thoughts.trim(), text: answer.slice(end + "</think>".length), thinking: false };
  }
  return open
    ? { thoughts: answer.replace("<think>", "").trim(), text: "", thinking: true }
    : { thoughts: "", text: answer, thinking: false };
}

function keep() {
  save("conversation", turns);
}

function say(text) {
  $("said").textContent = text; // for screen readers
}

// ---- Questions and answers

function ask(question) {
  turns.push({ question, answer: "" });
  following = true;
  show();
  return answer(turns.at(-1));
}

// What the server gets. A turn without an answer is left out: it would leave two questions in a row.
function messagesFor(turn) {
  const system = settings.systemPrompt();
  const before = turns.slice(0, turns.indexOf(turn)).filter((one) => one.answer);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...before.flatMap((one) => [
      { role: "user", content: one.question },
      { role: "assistant", content: one.answer },
    ]),
    { role: "user", content: turn.question },
  ];
}

async function answer(turn) {
  const controller = new AbortController();
  running = controller;
  document.body.classList.add("busy");
  send.setAttribute("aria-label", "Stop");
  send.title = "Stop (Escape)";
  turnsBox.setAttribute("aria-busy", "true"); // read out when it is whole, not at every word
  say("Answering");
  keep();
  try {
    for (let tries = 1; ; tries += 1) {
      Object.assign(turn, { answer: "", note: "", problem: "", figures: "" });
      update(turn);
      try {
        await receive(turn, controller.signal);
        break;
      } catch (problem) {
        const again = problem.kind === "loading" || (problem.kind === "busy" && tries < MOST_TRIES);
        if (!again || controller.signal.aborted) throw problem;
        await countdown(problem, controller.signal, (text) => {
          turn.note = text;
          update(turn);
        });
      }
    }
    if (!turn.answer) turn.note = "The answer is empty";
  } catch (problem) {
    if (controller.signal.aborted) turn.note = "Stopped";
    else fail(turn, problem);
  }
  if (running === controller) {
    running = null;
    document.body.classList.remove("busy");
    send.setAttribute("aria-label", "Send");
    send.title = "Send";
    turnsBox.removeAttribute("aria-busy");
    say(turn.problem ? "" : turn.note || "The answer is complete");
  }
  if (turns.includes(turn)) {
    update(turn);
    keep();
  }
}

async function receive(turn, signal) {
  const request = { model: modelName(), messages: messagesFor(turn), ...settings.sampling() };
  const began = performance.now();
  let first = 0;
  let last = 0;
  let tokens = 0; // a piece is a token, or a few; the server counts them at the end
  let drawn = false;
  const draw = () => {
    drawn = false;
    turn.figures = figures(tokens, first - began, last - first);
    update(turn);
  };
  for await (const part of server.answer(request, settings.apiKey(), signal)) {
    if (part.text) {
      last = performance.now();
      first ||= last;
      tokens += 1;
      turn.answer += part.text;
      if (!drawn) requestAnimationFrame(draw); // once a frame, however fast they come
      drawn = true;
    }
    if (part.finish === "length") turn.note = "Cut off: it reached the most tokens of an answer";
    if (part.usage) tokens = part.usage.completion_tokens;
  }
  turn.figures = figures(tokens, first - began, last - first);
}

// Speed is that of decoding: the first token has its own time, in which the question is read.
function figures(tokens, untilFirst, afterFirst) {
  if (!tokens) return "";
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 1 && afterFirst > 50) parts.push(`${(((tokens - 1) * 1000) / afterFirst).toFixed(1)} tokens/s`);
  parts.push(`first after ${(untilFirst / 1000).toFixed(2)} s`);
  return parts.join(" · ");
}

async function countdown(problem, signal, tell) {
  const why = problem.kind === "loading" ? "The model is being loaded" : "The server is busy";
  for (let left = Math.min(Math.ceil(problem.after), 60); left > 0; left -= 1) {
    tell(`${why}; next try in ${left} s`);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
    });
    signal.throwIfAborted();
  }
}

function fail(turn, problem) {
  if (!problem.kind) console.error(problem); // a mistake of this page
  turn.problem = problem.message;
  if (!turn.answer) turn.note = UNANSWERED;
  if (problem.kind === "key") settings.askForKey();
  if (problem.kind === "network" || problem.kind === "broken") watch();
}

function stop() {
  running?.abort();
}

function edit(turn) {
  if (running || views.get(turn).querySelector(".editor")) return;
  const question = views.get(turn).querySelector(".question");
  const form = $("editor").content.firstElementChild.cloneNode(true);
  const text = form.querySelector("textarea");
  const close = () => {
    form.remove();
    message.focus();
  };
  text.value = turn.question;
  text.addEventListener("input", () => fit(text));
  text.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (isSend(event)) form.requestSubmit();
    else return;
    event.preventDefault();
  });
  form.querySelector(".cancel").addEventListener("click", close);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const changed = text.value.trim();
    if (!changed || running) return;
    turns.splice(turns.indexOf(turn));
    message.focus();
    ask(changed);
  });
  question.append(form);
  fit(text);
  text.focus();
  text.setSelectionRange(text.value.length, text.value.length);
}

// ---- What the user does

function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing; // composing: Enter chooses a word
}

function fit(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight + 2}px`;
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return stop();
  const question = message.value.trim();
  if (!question) return message.focus();
  message.value = "";
  fit(message);
  message.focus();
  ask(question);
});

message.addEventListener("input", () => fit(message));

message.addEventListener("keydown", (event) => {
  if (isSend(event)) {
    event.preventDefault();
    if (!running) composer.requestSubmit();
  } else if (event.key === "ArrowUp" && !message.value && turns.length) {
    event.preventDefault();
    edit(turns.at(-1));
  }
});

window.addEventListener("pagehide", keep); // with what there is of an answer

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) stop();
});

$("new").addEventListener("click", () => {
  stop();
  if (turns.length) earlier = turns;
  turns = [];
  show();
  keep();
  message.focus();
});

$("back").addEventListener("click", () => {
  [turns, earlier] = [earlier, null];
  show();
  keep();
  message.focus();
});

turnsBox.addEventListener("click", (event) => {
  const button = event.target.closest(".copy-code");
  if (button) copy(button.closest("figure").querySelector("code").textContent, button);
});

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyOldWay(text); // the clipboard is not there for pages over plain http
  }
  const label = button.textContent;
  if (label === "Copied") return;
  button.textContent = "Copied";
  say("Copied");
  setTimeout(() => (button.textContent = label), 1500);
}

function copyOldWay(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  message.focus();
}

window.addEventListener(
  "scroll",
  () => (following = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 60),
  { passive: true },
);

// ---- The server's state

function announce(text, busy = false) {
  if (banner.textContent !== text) banner.textContent = text;
  banner.hidden = !text;
  banner.classList.toggle("progress", busy);
}

let watching = false;

// Until the server is ready, or for good where that takes a key.
async function watch() {
  if (watching) return;
  watching = true;
  for (let ready = false; !ready; ) {
    try {
      const state = await server.health();
      ready = state.status === "ok";
      if (state.status === "loading") {
        announce(`The model is being loaded: ${state.progress} (${Math.round(state.seconds)} s)`, true);
      } else if (state.status === "stopping") announce("The server is shutting down.");
    } catch (problem) {
      announce(problem.message);
    }
    if (!ready) await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  announce("");
  watching = false;
  await listModels();
}

async function listModels() {
  try {
    loaded = await server.models(settings.apiKey());
  } catch (problem) {
    if (problem.kind === "key") {
      announce("This server asks for an API key. It goes into the settings.");
      settings.askForKey();
    } else announce(problem.message);
    return;
  }
  announce("");
  const names = loaded.map((model) => model.id);
  const chosen = load("model");
  $("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  $("model").hidden = names.length < 2;
  $("model-name").hidden = names.length > 1;
  $("model-name").textContent = names[0] ?? "";
}

function modelName() {
  return $("model").value || undefined; // none: the server's first
}

$("model").addEventListener("change", () => save("model", $("model").value));

settings.onClose(() => {
  message.focus();
  if (!loaded.length) listModels();
});

show();
watch();
