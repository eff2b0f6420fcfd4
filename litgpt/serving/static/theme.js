// Light or dark: as the system has it, until the switch says otherwise. It runs before the page is painted.
"use strict";
(() => {
  const KEY = "litgpt.theme";
  const system = matchMedia("(prefers-color-scheme: dark)");

  function stored(value) {
    try {
      if (value === undefined) return localStorage.getItem(KEY);
      if (value === null) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, value);
    } catch {
      // The browser keeps nothing; the switch works all the same.
    }
    return null;
  }

  let chosen = stored();

  function isDark() {
    return chosen ? chosen === "dark" : system.matches;
  }

  function show() {
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
  }

  show();
  system.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      const dark = !isDark();
      chosen = dark === system.matches ? null : dark ? "dark" : "light"; // back to the system's: follow it again
      stored(chosen);
      show();
    });
  });
})();
