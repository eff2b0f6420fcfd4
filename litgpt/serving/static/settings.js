// The dialog of settings: system prompt, sampling, API key.

import { load, save } from "./store.js";

const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const field = (name) => form.elements.namedItem(name);

const kept = load("settings") ?? {};
for (const name of ["system", ...SAMPLING]) field(name).value = kept[name] ?? "";
field("key").value = load("key", "sessionStorage") ?? "";

// The fields of a request, without those that are left empty.
export function sampling() {
  const filled = SAMPLING.filter((name) => field(name).value !== "" && field(name).validity.valid);
  return Object.fromEntries(filled.map((name) => [name, Number(field(name).value)]));
}

export function systemPrompt() {
  return field("system").value.trim();
}

export function apiKey() {
  return field("key").value.trim();
}

export function askForKey() {
  open();
  field("key").select();
}

// Calls back when the dialog is closed.
export function onClose(callback) {
  dialog.addEventListener("close", callback);
}

function open() {
  if (!dialog.open) dialog.showModal();
}

document.getElementById("open-settings").addEventListener("click", open);

document.getElementById("reset").addEventListener("click", () => {
  for (const name of ["system", ...SAMPLING]) field(name).value = "";
  keep();
});

// A click beside it closes it, if everything in it is right.
dialog.addEventListener("mousedown", (event) => {
  if (event.target === dialog && form.reportValidity()) dialog.close();
});

form.addEventListener("input", keep);

function keep() {
  save("settings", Object.fromEntries(["system", ...SAMPLING].map((name) => [name, field(name).value])));
  save("key", apiKey(), "sessionStorage"); // gone with the tab
}
