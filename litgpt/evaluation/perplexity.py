"""Perplexity and bits per byte of texts, without the harness.

Every token of a document is predicted once, from as much of the text before it as a window holds. The first window
predicts all of its tokens, each following one the next `stride`; so a token has at least window - stride tokens before
it (https://huggingface.co/docs/transformers/perplexity describes the trade). The first token follows BOS (EOS where
there is none), which is not counted itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.cli.untrusted import parse_json
from litgpt.evaluation.bos import prefix_token
from litgpt.evaluation.engines import RequestRunner
from litgpt.evaluation.progress import bar
from litgpt.evaluation.scoring import Scored, score
from litgpt.evaluation.work import Evaluated
from litgpt.tokenizer.tokenizer import Tokenizer

TASK = "perplexity"
ROWS = 30  # of the table of documents


@dataclass
class Document:
    """A text and what the model thinks of it."""

    name: str
    text: str
    num_tokens: int = 0
    num_bytes: int = 0
    loglikelihood: float = 0.0
    """Natural, of all tokens together."""
    windows_left: int = 0

    @property
    def perplexity(self) -> float:
        return _exp(-self.loglikelihood / self.num_tokens) if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return -self.loglikelihood / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def read_texts(path: Path) -> list[Document]:
    """The texts of a file or folder: a .txt file is one, each line of a .jsonl file has one as "text".

    Raises:
        FileNotFoundError: There is no such file, or none in the folder.
        ValueError: A file is damaged, of another kind, or there is no text in it.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file())
        if not files:
            raise FileNotFoundError(f"data={path}: there are no .txt or .jsonl files in this folder.")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"data={path}: there is no such file or folder.")
    documents = [document for file in files for document in _of_file(file, path)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"data={path}: there is no text in it.")
    return documents


def _of_file(file: Path, path: Path) -> Iterator[Document]:
    name = str(file.relative_to(path)) if file != path else file.name
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"data={file}: texts are read from .txt files, .jsonl files and folders of them.")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data={file} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    if file.suffix == ".txt":
        yield Document(name, content)
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = parse_json(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'data={file}, line {number}: a JSON object with a "text" is expected.')
        yield Document(f"{name}:{number}", text)


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """How a text is gone through.

    Yields:
        (first, start, end): with the tokens from `first` on before them, those from `start` to `end` are predicted.
        `first` is -1 where BOS stands before the text's first token.
    """
    end = 0
    while end < num_tokens:
        start, end = end, min(num_tokens, end + (stride if end else window))
        yield max(-1, end - 1 - window), start, end


def measure(run: RequestRunner, tokenizer: Tokenizer, documents: list[Document], *, window: int, stride: int) -> None:
    """Has the model read the documents, and notes what it thinks of each.

    Args:
        run: Answers requests.
        tokenizer: The model's.
        documents: What to read.
        window: How many tokens the model sees at a time; at most its context.
        stride: How many tokens each window after the first predicts.
    """
    sequences, owners, prefix = [], [], prefix_token(tokenizer)
    texts = tokenizer.encode_batch_ids([document.text for document in documents], bos=False, eos=False)
    for document, ids in zip(documents, texts, strict=True):
        document.num_tokens, document.num_bytes = len(ids), len(document.text.encode())
        for first, start, end in windows(len(ids), window, stride):
            tokens = [prefix, *ids[:end]] if first < 0 else ids[first:end]
            sequences.append(Scored(tokens, len(tokens) - (end - start)))
            owners.append(document)
            document.windows_left += 1
    with bar(sum(document.num_tokens for document in documents), "Reading", "token") as progress:
        shown = [0] * len(sequences)  # of the tokens that each predicts

        def show(index: int, share: float) -> None:
            count = int(share * (len(sequences[index].tokens) - sequences[index].start))
            progress.update(count - shown[index])
            shown[index] = count

        for index, logprobs in score(run, sequences, on_prefill=show):
            owners[index].loglikelihood += sum(one.logprob for one in logprobs)
            owners[index].windows_left -= 1
            show(index, 1)


def all_as_one(documents: list[Document]) -> Document:
    """All documents as one."""
    return Document(
        "all",
        "",
        sum(document.num_tokens for document in documents),
        sum(document.num_bytes for document in documents),
        math.fsum(document.loglikelihood for document in documents),
    )


class Perplexity:
    """The perplexity of some texts.

    Args:
        source: The file or folder.
        window: How many tokens the model sees at a time; by default its context.
        stride: How many tokens each window after the first predicts; by default half a window.
        limit: Evaluate only the first N documents; a number below 1 is a fraction of them.
    """

    def __init__(self, source: Path, window: int | None, stride: int | None, limit: float | None) -> None:
        self.source, self.window, self.stride = source, window, stride
        self._pace: tuple[int, int] | None = None  # window and stride, once the model says what its context is
        self.documents = read_texts(source)
        self.num_all = len(self.documents)
        if limit is not None:
            self.documents = self.documents[: math.ceil(limit * self.num_all) if limit < 1 else int(limit)]

    def results(self, model: Evaluated) -> dict[str, Any]:
        """The figures; a table of the documents is printed."""
        context = model.config.block_size
        window = context if self.window is None else self.window
        if not 2 <= window <= context:
            raise ValueError(f"max_seq_length={window} is not valid: give 2 to {context}, the model's context.")
        stride = window // 2 if self.stride is None else self.stride
        if not 1 <= stride <= window:
            raise ValueError(f"stride={stride} is not valid: give 1 to {window}, a window's tokens.")
        self._pace = window, stride
        measure(model.run, model.tokenizer, self.documents, window=window, stride=stride)
        print(documents_table(self.documents), end="\n\n")
        return figures(self.documents, self.source, window, stride, self.num_all)

    def part(self) -> dict[str, Any] | None:
        """The figures of the documents that have been read."""
        done = [document for document in self.documents if document.num_tokens and not document.windows_left]
        return figures(done, self.source, *self._pace, self.num_all) if done and self._pace is not None else None


def figures(documents: list[Document], source: Path, window: int, stride: int, num_all: int) -> dict[str, Any]:
    """The figures in the harness's form, as those of one task."""
    total = all_as_one(documents)
    of_task = {
        "name": TASK,
        "alias": TASK,
        "sample_len": len(documents),
        "perplexity,none": total.perplexity,
        "perplexity_stderr,none": "N/A",
        "bits_per_byte,none": total.bits_per_byte,
        "bits_per_byte_stderr,none": "N/A",
    }
    settings = {"task": TASK, "data": str(source), "window": window, "stride": stride, "num_fewshot": 0}
    return {
        "results": {TASK: of_task},
        "group_subtasks": {},
        "configs": {TASK: settings | {"num_tokens": total.num_tokens, "num_bytes": total.num_bytes}},
        "versions": {TASK: 1},
        "n-shot": {TASK: 0},
        "higher_is_better": {TASK: {"perplexity": False, "bits_per_byte": False}},
        "n-samples": {TASK: {"original": num_all, "effective": len(documents)}},
        "documents": [
            {
                "name": document.name,
                "num_tokens": document.num_tokens,
                "num_bytes": document.num_bytes,
                "loglikelihood": document.loglikelihood,
                "perplexity": document.perplexity,
                "bits_per_byte": document.bits_per_byte,
            }
            for document in documents
        ],
    }


def documents_table(documents: list[Document]) -> str:
    """The documents' figures in Markdown, the longest first where there are many."""
    shown = documents
    if len(documents) > ROWS:
        shown = sorted(documents, key=lambda document: -document.num_tokens)[:ROWS]
    width = max(8, *(len(document.name) for document in shown))
    rows = [
        f"|{'Document':<{width}}|  Tokens|   Bytes|Perplexity|Bits/byte|",
        f"|{'-' * width}|-------:|-------:|---------:|--------:|",
    ]
    for document in [*shown, *([all_as_one(documents)] if len(documents) > 1 else [])]:
        rows.append(
            f"|{document.name:<{width}}|{document.num_tokens:>8}|{document.num_bytes:>8}|{document.perplexity:>10.4f}|"
            f"{document.bits_per_byte:>9.4f}|"
        )
    if shown is not documents:
        rows.append(f"The {ROWS} longest of {len(documents)} documents; results.json has all.")
    return "\n".join(rows)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
