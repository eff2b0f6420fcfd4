// Markdown as DOM nodes: CommonMark (https://spec.commonmark.org) and GitHub's tables, as far as models use them.
//
// What a model writes is untrusted. Its words get into the page as text nodes only; elements are those made here; HTML is
// shown as it is written; a link leads to http or https or is none; an image is a link. Work grows with the length of the
// text, whatever the text: no pattern below backtracks over more than a line's start, and nesting ends at DEEPEST.

const DEEPEST = 12;

// Shows the text in the container. Called again with a longer text it leaves the blocks alone that did not change.
export function render(container, text) {
  const wanted = blocks(text.split(/\r\n|\n|\r/), 0);
  let kept = 0;
  while (kept < wanted.length && container.children[kept]?.source === wanted[kept].source) kept += 1;
  while (container.children.length > kept) container.lastChild.remove();
  for (const block of wanted.slice(kept)) {
    const node = block.build();
    node.source = block.source;
    container.append(node);
  }
}

function element(tag, className = "", children = []) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const child of children) made.append(child);
  return made;
}

// ---- Blocks. A reader gets the lines and where it is; it returns where its block ends and how it is built, or null.

const READERS = [fence, heading, rule, quote, list, table];

function blocks(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const { end, build } = special(lines, at, depth) ?? paragraph(lines, at, depth);
    found.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return found;
}

function special(lines, at, depth) {
  if (depth > DEEPEST) return null;
  for (const reader of READERS) {
    const block = reader(lines, at, depth);
    if (block) return block;
  }
  return null;
}

function fill(parent, lines, depth) {
  for (const block of blocks(lines, depth)) parent.append(block.build());
  return parent;
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim()) {
    const underline = /^ {0,3}(?:===+|---+) *$/.exec(lines[end]);
    if (underline) {
      const text = lines.slice(at, end).join("\n");
      const tag = underline[0].includes("=") ? "h2" : "h3";
      return { end: end + 1, build: () => inline(element(tag), text) };
    }
    if (interrupts(lines, end, depth)) break;
    end += 1;
  }
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n");
  return { end, build: () => inline(element("p"), text.trimEnd()) };
}

// Whether a block begins here although no empty line is before it.
function interrupts(lines, at, depth) {
  if (depth > DEEPEST) return false;
  const mark = marker(lines[at]);
  if (mark && (!mark.rest || (mark.number ?? 1) !== 1)) return false; // "... in\n1984. It was ..." is no list
  return READERS.some((reader) => reader(lines, at, depth));
}

function fence(lines, at) {
  const open = /^(\s*)(`{3,}|~{3,})(.*)$/.exec(lines[at]);
  if (!open || (open[2][0] === "`" && open[3].includes("`"))) return null;
  const [, indent, marks, info] = open;
  let end = at + 1;
  while (end < lines.length && !closes(lines[end].trim(), marks)) end += 1;
  return {
    end: Math.min(end + 1, lines.length),
    build() {
      const code = lines.slice(at + 1, end).map((line) => stripped(line, width(indent)));
      return codeBlock(code.join("\n"), info.trim().split(/\s/)[0]);
    },
  };
}

function closes(line, marks) {
  return line.length >= marks.length && line[0] === marks[0] && line.replaceAll(marks[0], "") === "";
}

function codeBlock(text, language) {
  const copy = element("button", "copy-code", ["Copy"]);
  copy.type = "button";
  const pre = element("pre", "", [element("code", "", [text])]);
  pre.tabIndex = 0; // so that keys can scroll it
  return element("figure", "code", [element("figcaption", "", [element("span", "", [language]), copy]), pre]);
}

function heading(lines, at) {
  const found = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/.exec(lines[at]);
  if (!found) return null;
  let text = (found[2] ?? "").trim();
  const bare = text.slice(0, text.length - trailing(text, "#"));
  if (!bare || bare.endsWith(" ")) text = bare.trim();
  const tag = `h${Math.min(found[1].length + 1, 6)}`; // the page has the h1
  return { end: at + 1, build: () => inline(element(tag), text) };
}

function trailing(text, character) {
  let count = 0;
  while (count < text.length && text[text.length - 1 - count] === character) count += 1;
  return count;
}

function rule(lines, at) {
  if (!/^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/.test(lines[at])) return null;
  return { end: at + 1, build: () => element("hr") };
}

const QUOTE = /^ {0,3}> ?/;

function quote(lines, at, depth) {
  if (!QUOTE.test(lines[at])) return null;
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !interrupts(lines, end, depth))) end += 1;
  const inner = () => lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { end, build: () => fill(element("blockquote"), inner(), depth + 1) };
}

function list(lines, at, depth) {
  const first = marker(lines[at]);
  if (!first || rule(lines, at)) return null;
  const items = [];
  let end = at;
  for (let here = at; here < lines.length; ) {
    const found = marker(lines[here]);
    if (!found || found.kind !== first.kind || found.indent >= first.indent + 2 || rule(lines, here)) break;
    const item = [found.rest];
    // Two columns are enough to belong to an item; CommonMark would ask for three under "1." and models often do not.
    const least = Math.min(found.content, found.indent + 2);
    end = here + 1;
    let next = end;
    for (; next < lines.length; next += 1) {
      const line = lines[next];
      if (!line.trim()) continue;
      const belongs = width(/^\s*/.exec(line)[0]) >= least;
      if (!belongs && (next > end || marker(line) || interrupts(lines, next, depth))) break;
      while (end < next) item.push(lines[end++]);
      item.push(stripped(line, found.content));
      end = next + 1;
    }
    items.push(item);
    here = next;
  }
  return {
    end,
    build() {
      const made = element(first.number === null ? "ul" : "ol");
      if (first.number !== null && first.number !== 1) made.start = first.number;
      for (const item of items) made.append(listItem(item, depth));
      return made;
    },
  };
}

function listItem(lines, depth) {
  const made = element("li");
  const task = /^\[([ xX])\] /.exec(lines[0]);
  if (task) {
    const box = element("input");
    box.type = "checkbox";
    box.disabled = true;
    box.checked = task[1] !== " ";
    made.className = "task";
    made.append(box);
    lines = [lines[0].slice(4), ...lines.slice(1)];
  }
  return fill(made, lines, depth + 1);
}

function marker(line) {
  const found = /^(\s*)([-*+]|(\d{1,9})[.)])(?:([ \t]+)(.*))?$/.exec(line);
  if (!found) return null;
  const [, before, sign, number, after = " ", rest = ""] = found;
  const indent = width(before);
  const gap = width(after) <= 4 ? width(after) : 1;
  const content = indent + sign.length + gap; // the column where the item's text begins
  return { indent, content, rest, kind: sign.at(-1), number: number === undefined ? null : Number(number) };
}

// Columns of white space; a tab is four.
function width(space) {
  return space.length + 3 * (space.split("\t").length - 1);
}

// The line without so many columns of white space at its start.
function stripped(line, columns) {
  let at = 0;
  let gone = 0;
  while (gone < columns && at < line.length && (line[at] === " " || line[at] === "\t")) {
    gone += line[at] === "\t" ? 4 : 1;
    at += 1;
  }
  return " ".repeat(Math.max(0, gone - columns)) + line.slice(at);
}

function table(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-") || !/^[\s|:-]+$/.test(lines[at + 1])) return null;
  const head = cells(lines[at]);
  const marks = cells(lines[at + 1]);
  if (head.length !== marks.length || !marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  return {
    end,
    build() {
      const sides = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
      const cell = (tag, side, text = "") => inline(element(tag, side), text);
      const row = (texts, tag) => element("tr", "", sides.map((side, i) => cell(tag, side, texts[i])));
      const body = lines.slice(at + 2, end).map((line) => row(cells(line), "td"));
      const made = element("table", "", [element("thead", "", [row(head, "th")]), element("tbody", "", body)]);
      const frame = element("div", "table", [made]);
      frame.tabIndex = 0;
      return frame;
    },
  };
}

function cells(line) {
  const found = [""];
  const text = line.trim();
  for (let at = text.startsWith("|") ? 1 : 0; at < text.length; at += 1) {
    if (text[at] === "\\" && text[at + 1] === "|") found[found.length - 1] += text[++at];
    else if (text[at] !== "|") found[found.length - 1] += text[at];
    else if (at < text.length - 1) found.push("");
  }
  return found.map((cell) => cell.trim());
}

// ---- Inline. The text becomes a list of items: strings, nodes, and runs of `*`, `_` and `~` that may turn into emphasis.

const CODE = /`+/y;
const PLAIN = /[^\\`*_~[\]!<&\nh]+/y;
const ADDRESS = /https?:\/\/[^\s<>"`]+/y;
const POINTED = /<(https?:\/\/[^\s<>]*)>/y;
const BREAK = /<br ?\/?>/iy;
const ENTITY = /&(amp|lt|gt|quot|apos|nbsp|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});/y;
const TARGET = /\([ \n]*(?:<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*))(?:[ \n]+(?:"[^"\n]{0,300}"|'[^'\n]{0,300}'))?[ \n]*\)/y;
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

function inline(parent, text) {
  const items = [];
  const brackets = []; // those that are open: {index in items, image, active}
  let at = 0;

  function match(pattern) {
    pattern.lastIndex = at;
    return pattern.exec(text);
  }

  function take(found, ...made) {
    items.push(...made);
    at += found.length;
  }

  while (at < text.length) {
    const character = text[at];
    let found;
    if (character === "\\" && /[!-/:-@[-`{-~\n]/.test(text[at + 1] ?? "")) {
      take("  ", text[at + 1] === "\n" ? element("br") : text[at + 1]);
    } else if (character === "`") {
      const [run] = match(CODE);
      const end = closing(text, at + run.length, run.length);
      if (end < 0) take(run, run);
      else {
        const code = text.slice(at + run.length, end).replaceAll("\n", " ");
        const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
        take({ length: end + run.length - at }, element("code", "", [padded ? code.slice(1, -1) : code]));
      }
    } else if (character === "*" || character === "_" || character === "~") {
      const run = delimiters(text, at);
      take(run, run);
    } else if (character === "[" || (character === "!" && text[at + 1] === "[")) {
      brackets.push({ index: items.length, image: character === "!", active: true });
      take(character === "!" ? "![" : "[", character === "!" ? "![" : "[");
    } else if (character === "]") {
      const bracket = brackets.pop();
      const start = at;
      at += 1;
      const target = bracket?.active ? match(TARGET) : null;
      const href = target && address(unescaped(target[1] ?? target[2]));
      at = start;
      if (!href) {
        take("]", "]");
        continue;
      }
      const inner = items.splice(bracket.index).slice(1);
      emphasise(inner);
      const link = anchor(href, [bracket.image ? "image: " : "", ...nodes(inner)]);
      for (const nested of link.querySelectorAll("a")) nested.replaceWith(...nested.childNodes);
      if (!bracket.image) for (const outer of brackets) outer.active = outer.image; // no link within a link
      take({ length: 1 + target[0].length }, link);
    } else if (character === "<" && (found = match(POINTED)) && address(found[1])) {
      take(found[0], anchor(address(found[1]), [found[1]]));
    } else if (character === "<" && (found = match(BREAK))) {
      take(found[0], element("br"));
    } else if (character === "&" && (found = match(ENTITY))) {
      take(found[0], NAMED[found[1]] ?? codePoint(found[1]));
    } else if (character === "\n") {
      take("\n", element("br")); // a model's line is meant as one
    } else if (character === "h" && !/[\p{L}\p{N}]/u.test(text[at - 1] ?? "") && (found = match(ADDRESS))) {
      const shown = withoutEnd(found[0]);
      const href = address(shown);
      take(shown, href ? anchor(href, [shown]) : shown);
    } else {
      found = match(PLAIN)?.[0] ?? character;
      take(found, found);
    }
  }
  emphasise(items);
  for (const node of nodes(items)) parent.append(node);
  return parent;
}

// Where the next run of exactly so many backticks begins, or -1. It is -1 once for a length at most, which bounds the work.
function closing(text, from, length) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    CODE.lastIndex = at;
    const [run] = CODE.exec(text);
    if (run.length === length) return at;
    at += run.length;
  }
  return -1;
}

function delimiters(text, at) {
  const char = text[at];
  let length = 1;
  while (text[at + length] === char) length += 1;
  const kind = (one) => (one === undefined || /\s/u.test(one) ? "space" : /[\p{P}\p{S}]/u.test(one) ? "sign" : "word");
  const before = kind(text[at - 1]);
  const after = kind(text[at + length]);
  const left = after !== "space" && (after !== "sign" || before !== "word");
  const right = before !== "space" && (before !== "sign" || after !== "word");
  const inside = char === "_"; // snake_case stays as it is
  const counts = char !== "~" || length === 2;
  return {
    char,
    length,
    count: length,
    opens: counts && left && (!inside || !right || before === "sign"),
    closes: counts && right && (!inside || !left || after === "sign"),
  };
}

// Pairs the runs up, innermost first (https://spec.commonmark.org/0.31.2/#phase-2-inline-structure).
function emphasise(items) {
  const floors = {}; // below it there is no partner for a run of that kind
  let bottom = 0; // the same for every kind
  for (let close = 0; close < items.length; close += 1) {
    const closer = items[close];
    if (!closer.closes || !closer.count) continue;
    const kind = `${closer.char}${closer.opens}${closer.length % 3}`;
    const floor = Math.max(bottom, floors[kind] ?? 0);
    let open = close - 1;
    while (open >= floor && !pairs(items[open], closer)) open -= 1;
    if (open < floor) {
      floors[kind] = close;
      continue;
    }
    const opener = items[open];
    const inner = items.slice(open + 1, close);
    const depth = 1 + inner.reduce((most, item) => Math.max(most, item.depth ?? 0), 0);
    if (depth > DEEPEST) {
      bottom = close + 1;
      continue;
    }
    const count = opener.count > 1 && closer.count > 1 ? 2 : 1;
    const tag = closer.char === "~" ? "del" : count === 2 ? "strong" : "em";
    const made = element(tag, "", nodes(inner));
    made.depth = depth;
    opener.count -= count;
    closer.count -= count;
    items.splice(open + 1, inner.length, made);
    for (const key in floors) floors[key] = Math.min(floors[key], open + 2);
    close = open + 1; // the closer is looked at again: it may close more
  }
}

function pairs(opener, closer) {
  if (opener.char !== closer.char || !opener.opens || !opener.count) return false;
  const either = opener.closes || closer.opens;
  return !either || (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

// The items as nodes and strings, neighbouring strings in one.
function nodes(items) {
  const made = [];
  for (const item of items) {
    const node = item.char ? item.char.repeat(item.count) : item;
    if (typeof node === "string" && typeof made.at(-1) === "string") made[made.length - 1] += node;
    else made.push(node);
  }
  return made;
}

function anchor(href, children) {
  const made = element("a", "", children);
  made.href = href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  made.title = href; // where it leads, whatever its text says
  return made;
}

// The address if it is one of http or https, else null.
function address(text) {
  if (!/^https?:\/\//i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

function unescaped(text) {
  return text.replace(/\\([!-/:-@[-`{-~])/g, "$1");
}

// A bare address without the signs that belong to the sentence around it.
function withoutEnd(text) {
  let end = text.length;
  let open = text.split("(").length - text.split(")").length; // below zero: more are closed than opened
  for (;;) {
    const last = text[end - 1];
    if (last === ")" && open < 0) open += 1;
    else if (!".,:;!?'*_~]".includes(last)) return text.slice(0, end);
    end -= 1;
  }
}

function codePoint(entity) {
  const number = /x/i.test(entity) ? parseInt(entity.slice(2), 16) : Number(entity.slice(1));
  const valid = number > 0 && number <= 0x10ffff && !(number >= 0xd800 && number < 0xe000);
  return valid ? String.fromCodePoint(number) : "\ufffd";
}
