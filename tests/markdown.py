"""What a test needs to know of a Markdown page: its fenced blocks, its links, and the names of its headings.

A block is either run or says why it is not, in an HTML comment on the line above it:

    <!-- not run: needs two GPUs -->
    ```bash

What running means is told by the first word after the fence. `bash` is a script; `python` is a piece of the program that
the page's pieces make together, as in a notebook; `text` is what the block before it prints, where figures may be others
and `...` stands for anything; any other language needs `title=NAME` after it, and is a file of that name for the scripts.
A Python piece with a title is a file, too, and is not run by itself.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?(?P<indent> *)```(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
FIGURE = re.compile(r"\d[\d,.]*(?:e-?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of its fence, counted from 1."""
    language: str
    title: str | None
    text: str
    reason: str | None
    """Why it is not run."""

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        found = []
        for match in FENCE.finditer(self.text):
            words = match["info"].split() or [""]
            title = next((word.removeprefix("title=") for word in words if word.startswith("title=")), None)
            line = self.text.count("\n", 0, match.start()) + 1 + (match["reason"] is not None)
            text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
            found.append(Block(self.path, line, words[0], title, text, match["reason"]))
        return found

    @cached_property
    def prose(self) -> str:
        """The text without its blocks."""
        return FENCE.sub("", self.text)

    @cached_property
    def anchors(self) -> set[str]:
        """What a link may name after `#`, as GitHub makes it of the headings."""
        names: set[str] = set()
        for heading in re.findall(r"^#+ +(.+?) *$", self.prose, flags=re.MULTILINE):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
            name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            names.add(name if name not in names else f"{name}-1")
        return names

    @cached_property
    def links(self) -> list[str]:
        return re.findall(r"\]\(\s*([^)\s]+)\s*\)", self.prose)

    def broken_links(self) -> list[str]:
        """The links that lead nowhere: to no file or folder, or to no heading of a page. Those to the web are not asked."""
        broken = []
        for link in self.links:
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (self.path.parent / name) if name else self.path
            if not target.exists() or (anchor and anchor not in Page(target).anchors):
                broken.append(link)
        return broken


def unlike(expected: str, printed: str) -> str | None:
    """The first line of `expected` that `printed` does not have, in this order; figures may be others, `...` is any text."""
    rest = re.sub(r"\x1b\[[\d;]*m", "", printed)
    for line in filter(str.strip, expected.splitlines()):
        parts = [r"[\d,.e-]+".join(map(re.escape, FIGURE.split(part))) for part in line.strip().split("...")]
        pattern = re.sub(r"\b(sequence|device|step|token)s?\b", r"\1s?", ".*".join(parts))  # of other figures, one
        found = re.search(re.sub(r"(?:\\ )+", r"\\s+", pattern), rest)
        if not found:
            return line
        rest = rest[found.end() :]
    return None
