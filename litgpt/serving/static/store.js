// What the browser keeps for the page. Where it keeps nothing (a private window, a full disk) the page works all the same.

export function load(name, storage = "localStorage") {
  try {
    return JSON.parse(window[storage].getItem(`litgpt.${name}`));
  } catch {
    return null;
  }
}

export function save(name, value, storage = "localStorage") {
  try {
    window[storage].setItem(`litgpt.${name}`, JSON.stringify(value));
  } catch {
    // As said above.
  }
}
