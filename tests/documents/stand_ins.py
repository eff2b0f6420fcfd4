"""Small repositories under real names, as the Hub has them: checkpoints of the right architectures, and data sets."""

import functools
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from litgpt.catalog import known_checkpoints
from litgpt.checkpoint import save_model
from litgpt.config import Config
from litgpt.export.hf_writer import export_hf
from litgpt.model import GPT
from tests import tokenizer_files

ROOT = Path(__file__).parents[2]
VOCABULARY = 704


def checkpoint(
    repo_id: str, directory: Path, name: str | None = None, vocabulary: int | None = VOCABULARY
) -> dict[str, bytes]:
    """The files of a repository: a random model of a known one's architecture, of two narrow layers.

    Args:
        repo_id: The repository.
        directory: An empty directory to make them in.
        name: The known model whose architecture it has, where it is not known itself.
        vocabulary: Rows of its embedding; None for those of the known model.
    """
    known = Config.from_name(name or known_checkpoints()[repo_id].name)
    rows = {} if vocabulary is None else {"vocab_size": vocabulary, "padded_vocab_size": vocabulary}
    size = 20 if known.rotary_percentage == 0.4 else 16  # a part of it turns, which has to be a whole number
    config = Config.from_name(
        known.name,
        n_layer=2,
        n_embd=2 * size,
        n_head=2,
        head_size=size,
        n_query_groups=1 if known.n_query_groups == 1 else 2,
        intermediate_size=64,
        **rows,
    )
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    ours, theirs = directory / "ours", directory / "theirs"
    ours.mkdir(parents=True)
    sentencepiece = any(word in repo_id for word in ("Llama-2", "TinyLlama", "gemma", "Mistral"))
    for name, content in tokenizer(sentencepiece).items():
        (ours / name).write_bytes(content)
    save_model(ours, model, config)
    export_hf(ours, theirs, shard_size=100_000)  # in two files, as large ones are
    (theirs / "generation_config.json").write_text(json.dumps({"eos_token_id": 2 if sentencepiece else 0}))
    return {file.name: file.read_bytes() for file in theirs.iterdir()}


@functools.cache
def tokenizer(sentencepiece: bool) -> dict[str, bytes]:
    """The files of a small tokenizer of one of two kinds."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (tokenizer_files.byte_fallback if sentencepiece else tokenizer_files.byte_level)(directory)
        return {file.name: file.read_bytes() for file in directory.iterdir()}


def parquet(records: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


def archive(files: dict[str, Any]) -> bytes:
    """A compressed tar archive of JSON files."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in files.items():
            text = json.dumps(content).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return made.getvalue()


def instructions(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n % 40)))}
        for n in range(count)
    ]


def text(part: int, size: int = 30_000) -> str:
    """A part of the quickstart's text."""
    whole = (ROOT / "config_hub/pretrain/data/shakespeare.txt").read_text()
    return whole[part * size : (part + 1) * size]


def data_sets() -> dict[str, dict[str, bytes]]:
    """Alpaca2k and OpenWebText, as they lie on the Hub."""
    alpaca = {"alpaca_2000.parquet": parquet(instructions(120)), "README.md": b"# Alpaca"}
    documents = [{"text": paragraph} for paragraph in text(0, 200_000).split("\n\n")]
    half = len(documents) // 2
    web = {
        "plain_text/train-00000-of-00002.parquet": parquet(documents[:half]),
        "plain_text/train-00001-of-00002.parquet": parquet(documents[half:]),
    }
    stories = [[{"story": document["text"]} for document in documents[start::2]] for start in range(2)]
    tiny_stories = {"TinyStories_all_data.tar.gz": archive({f"data{i:02}.json": stories[i] for i in range(2)})}
    # The short name is that of old, under which the Hub still finds it.
    webs = dict.fromkeys(("datasets/openwebtext", "datasets/Skylion007/openwebtext"), web)
    return {"datasets/mhenrichsen/alpaca_2k_test": alpaca, "datasets/roneneldan/TinyStories": tiny_stories, **webs}
