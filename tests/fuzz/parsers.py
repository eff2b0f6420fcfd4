"""What is fuzzed: every reader of files that come with a checkpoint or with data, and how its input is made."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from hypothesis import strategies as st

from litgpt.adaptation.lora import read_lora
from litgpt.catalog import known_checkpoints
from litgpt.checkpoint import hf_weight_files, read_state_dict
from litgpt.config import Config
from litgpt.data.dataset_record import DatasetRecord, SplitRecord
from litgpt.data.preference_records import read_preferences
from litgpt.data.record_files import read_records
from litgpt.data.records import read_conversations
from litgpt.data.token_chunks import TokenChunks, document_offsets, write_chunk, write_index
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.config_json import read_config_json
from litgpt.formats.hf_config import config_from_hf, config_to_hf, ignored_entries
from litgpt.formats.safetensors_file import read_safetensors
from litgpt.prompts import choose_prompt_style
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.fit import least_parameters
from litgpt.sources.load import load_model
from litgpt.sources.meta import meta_model
from litgpt.sources.peft import import_peft
from litgpt.tokenizer.tokenizer import Tokenizer
from tests.fuzz import mutations as damaged
from tests.fuzz import seeds
from tests.fuzz.mutations import Draw


class Parser(NamedTuple):
    """A reader of files.

    Attributes:
        damage: Makes an input: draws, and damages files in a copy of the seeds. Returns what `read` is given.
        read: Reads it, and uses what it reads.
        share: How many of the inputs of a run it gets, against the others.
    """

    damage: Callable[[Draw, dict[str, Path]], Path]
    read: Callable[[Path], Any]
    share: int = 2


def checkpoint(path: Path) -> None:
    """Everything that is done with a checkpoint's files before a model answers."""
    source = open_checkpoint(path)
    load_model(source)
    tokenizer(source.files)


def tokenizer(directory: Path) -> None:
    read = Tokenizer(directory)
    ids = read.encode_ids("Hello, wörld!\n  <|im_start|>aaaaaaaaaaaaaaaaaaaaaaaaaaaaab", allow_special=True)
    read.decode([*ids, *read.stop_ids])
    read.decode_at_once(ids)
    choose_prompt_style(directory, tokenizer=read).apply("Hello")


def model_of(config: Config) -> None:
    """A configuration that is taken is one that a model can be made of."""
    if least_parameters(config) < 10**8 and config.n_layer * max(1, config.n_expert) < 300:
        meta_model(config)


def config_json(path: Path) -> None:
    content = read_config_json(path)
    config = config_from_hf(content, "org/name")
    ignored_entries(content)
    model_of(config)


@cache
def configs() -> list[dict[str, Any]]:
    """The `config.json` of a known checkpoint of every architecture, with few layers."""
    first: dict[str, dict[str, Any]] = {}
    for known in known_checkpoints().values():
        if known.architecture in ARCHITECTURES and known.architecture not in first:
            changes = (
                {"n_layer": 2, "n_expert": 4, "n_expert_per_token": 2} if "n_expert" in known.config else {"n_layer": 2}
            )
            try:
                config = Config.from_name(known.name, **changes)
                first[known.architecture] = config_to_hf(config, known.architecture)
            except ValueError:
                continue
    return list(first.values())


def damage_config_json(draw: Draw, kinds: dict[str, Path]) -> Path:
    given = configs()
    return written(kinds["hf"] / "config.json", damaged.json_file(draw, given[draw(indices(given))]))


def damage_directory(draw: Draw, kinds: dict[str, Path]) -> Path:
    file = kinds["hf"] / "config.json"
    written(file, json.dumps(damaged.values(draw, json.loads(file.read_text()))).encode())
    return kinds["hf"]


def damage_model_config(draw: Draw, kinds: dict[str, Path]) -> Path:
    known = [entry.config for entry in known_checkpoints().values()][::7]
    config = Config(**known[draw(indices(known))])
    return written(kinds["lit"] / "model_config.yaml", damaged.yaml_file(draw, {**config.to_dict(), "n_layer": 2}))


TEMPLATE = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{{ bos_token }}"
SIDE_FILES = (
    "generation_config.json",
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def damage_side_files(draw: Draw, kinds: dict[str, Path]) -> Path:
    directory = kinds["hf" if draw(st.integers(0, 3)) else "sentencepiece"]
    file = directory / SIDE_FILES[draw(indices(SIDE_FILES))]
    content = json.loads(file.read_text()) if file.is_file() else {"<x>": 500}
    if file.name == "tokenizer_config.json":
        content |= {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "lstrip": False, "special": True}}}
        content |= {"chat_template": [{"name": "default", "template": TEMPLATE}], "bos_token": None}
    written(file, damaged.json_file(draw, content))
    return directory


def damage_tokenizer_json(draw: Draw, kinds: dict[str, Path]) -> Path:
    kind = ("hf", "fallback", "metaspace")[draw(indices(range(3)))]
    file = kinds[kind] / "tokenizer.json"
    content = json.loads(file.read_text())
    if draw(indices(range(4))):  # a change in the vocabulary is hardly one
        parts = {name: value for name, value in content.items() if name != "model"}
        model = {name: value for name, value in content["model"].items() if name not in ("vocab", "merges")}
        changed = damaged.values(draw, {**parts, "model": model})
        if isinstance(changed.get("model"), dict):
            changed["model"] = {**content["model"], **changed["model"]}
        written(file, json.dumps(changed).encode())
    else:
        written(file, damaged.json_file(draw, content))
    return kinds[kind]


def damage_vocabulary(draw: Draw, kinds: dict[str, Path]) -> Path:
    directory = kinds["vocabulary"]
    files = [*sorted(directory.glob("*.json")), directory / "merges.txt"]
    file = files[draw(indices(files))]
    content = file.read_bytes()
    is_json = file.suffix == ".json"
    written(file, damaged.json_file(draw, json.loads(content)) if is_json else damaged.raw(draw, content))
    return directory


def damage_sentencepiece(draw: Draw, kinds: dict[str, Path]) -> Path:
    file = kinds["sentencepiece"] / "tokenizer.model"
    written(file, damaged.raw(draw, file.read_bytes()))
    return kinds["sentencepiece"]


def damage_template(draw: Draw, kinds: dict[str, Path]) -> Path:
    (kinds["hf"] / "prompt_style.yaml").unlink()
    file = kinds["hf"] / "chat_template.jinja"
    written(file, damaged.raw(draw, TEMPLATE.encode()))
    return kinds["hf"]


def damage_prompt_style(draw: Draw, kinds: dict[str, Path]) -> Path:
    content = {"class_path": "litgpt.prompts.Alpaca", "init_args": {"a": 1}}
    written(kinds["lit"] / "prompt_style.yaml", damaged.yaml_file(draw, content))
    return kinds["lit"]


def damage_index(draw: Draw, kinds: dict[str, Path]) -> Path:
    file = kinds["hf"] / "model.safetensors.index.json"
    written(file, damaged.json_file(draw, json.loads(file.read_text())))
    return kinds["hf"]


def read_index(path: Path) -> None:
    for file in hf_weight_files(path):
        assert file.resolve().is_relative_to(path.resolve())


def damage_safetensors(draw: Draw, kinds: dict[str, Path]) -> Path:
    file = max(kinds["hf"].glob("*.safetensors"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if draw(indices(range(3))):
        header = damaged.json_file(draw, json.loads(content[8 : 8 + length]))
        return written(file, len(header).to_bytes(8, "little") + header + content[8 + length :])
    return written(file, damaged.raw(draw, content, head=length + 8))


def damage_pickle(draw: Draw, kinds: dict[str, Path]) -> Path:
    file = kinds["bin"] / "pytorch_model.bin"
    if not draw(indices(range(3))):
        return written(file, damaged.raw(draw, file.read_bytes()))
    buffer = io.BytesIO()
    with zipfile.ZipFile(file) as given, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as changed:
        for name in given.namelist():
            content = given.read(name)
            changed.writestr(name, damaged.raw(draw, content) if name.endswith(".pkl") else content)
    return written(file, buffer.getvalue())


def touch(tensors: dict[str, torch.Tensor]) -> None:
    """Reads what a file claims to hold."""
    for tensor in tensors.values():
        np.asarray(tensor.detach().reshape(-1).view(torch.uint8).numpy()).sum()


def damage_gguf(draw: Draw, kinds: dict[str, Path]) -> Path:
    content = kinds["gguf"].read_bytes()
    return written(kinds["gguf"], damaged.raw(draw, content, 2, header_of(content), draw(st.booleans())))


@cache
def header_of(content: bytes) -> int:
    """Where in a GGUF file the vocabulary begins, before which its figures are; or the list of tensors."""
    return content.index(b"tokenizer.ggml.tokens")


def damage_gguf_tensors(draw: Draw, kinds: dict[str, Path]) -> Path:
    content = kinds["gguf"].read_bytes()
    start = content.index(b"token_embd.weight") - 8
    end = start + 1500
    part = damaged.raw(draw, content[start:end], in_place=draw(st.booleans()))
    return written(kinds["gguf"], content[:start] + part + content[end:])


def damage_lora(draw: Draw, kinds: dict[str, Path]) -> Path:
    file = kinds["lora"] / "lit_model.pth.lora"
    content = torch.load(file)
    if draw(indices(range(2))):
        settings = damaged.values(draw, {"lora": content["lora"], "base": content["base"]})
        torch.save({"model": content["model"], **settings}, file)
    else:
        torch.save(content["model"], file)
        recorded = yaml.safe_load((kinds["lora"] / "hyperparameters.yaml").read_text())
        written(kinds["lora"] / "hyperparameters.yaml", damaged.yaml_file(draw, recorded))
    return kinds["lora"]


def damage_peft(draw: Draw, kinds: dict[str, Path]) -> Path:
    assert kinds["lit"]  # its base
    file = kinds["peft"] / "adapter_config.json"
    content = json.loads(file.read_text())
    content["alpha_pattern"] = {"q_proj": 8, "model.layers.0.self_attn.v_proj": 4}
    written(file, damaged.json_file(draw, content))
    return kinds["peft"]


def read_peft(path: Path) -> None:
    import_peft(path, open_checkpoint(path.parent / "lit"))


def damage_chunks(draw: Draw, kinds: dict[str, Path]) -> Path:
    chunk = write_chunk(kinds["chunks"] / "chunk-0.bin", [np.arange(5), np.arange(7)], np.dtype("<u2"))
    write_index(kinds["chunks"], [chunk], np.dtype("<u2"))
    if draw(indices(range(2))):
        file = kinds["chunks"] / "index.json"
        written(file, damaged.json_file(draw, json.loads(file.read_text())))
    else:
        file = kinds["chunks"] / "chunk-0.bin"
        written(file, damaged.raw(draw, file.read_bytes()))
    return kinds["chunks"]


def read_chunks(path: Path) -> None:
    index = TokenChunks.read(path)
    for chunk in index.chunks:
        document_offsets(path / chunk.filename, chunk, index.dtype)


def damage_dataset_record(draw: Draw, kinds: dict[str, Path]) -> Path:
    split = SplitRecord(10, 2, 1, "0" * 64)
    DatasetRecord("f", 400, 0, "uint16", {"files": 1}, {"seed": 1}, 0, {"train": split}).write(kinds["chunks"])
    file = kinds["chunks"] / "dataset.yaml"
    written(file, damaged.yaml_file(draw, yaml.safe_load(file.read_text())))
    return kinds["chunks"]


CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", "weight": 1}]
RECORDS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"prompt": "Hello", "completion": "Hi"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *TURNS], "tools": [TOOL]},
    {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": json.dumps([TOOL])},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}], "system": "Be brief."},
    {"conversations": ["Hello", "Hi"]},
]
PAIRS = [
    {"prompt": "Hello", "chosen": "Hi", "rejected": "No"},
    {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No"}]},
    {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi", "rejected": "\n\nHuman: Hello\n\nAssistant: No"},
]


def damage_records(draw: Draw, kinds: dict[str, Path]) -> Path:
    record = RECORDS[draw(indices(RECORDS))]
    lines = json.dumps(record).encode() + b"\n" + damaged.json_file(draw, record)
    return written(kinds["chunks"] / "records.jsonl", lines)


def damage_pairs(draw: Draw, kinds: dict[str, Path]) -> Path:
    pair = PAIRS[draw(indices(PAIRS))]
    return written(kinds["chunks"] / "pairs.json", damaged.json_file(draw, [pair, pair]))


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def indices(given: Any) -> Any:
    return st.integers(0, len(given) - 1)


PARSERS = {
    "config.json": Parser(damage_config_json, config_json, 6),
    "model_config.yaml": Parser(damage_model_config, lambda path: model_of(Config.from_file(path)), 2),
    "side files": Parser(damage_side_files, tokenizer, 3),
    "tokenizer.json": Parser(damage_tokenizer_json, tokenizer, 4),
    "vocab.json": Parser(damage_vocabulary, tokenizer, 2),
    "tokenizer.model": Parser(damage_sentencepiece, tokenizer, 2),
    "chat_template.jinja": Parser(damage_template, tokenizer, 1),
    "prompt_style.yaml": Parser(damage_prompt_style, lambda path: choose_prompt_style(path).apply("Hello"), 1),
    "weight index": Parser(damage_index, read_index, 2),
    "safetensors": Parser(damage_safetensors, lambda path: touch(read_safetensors(path)), 4),
    "pickle": Parser(damage_pickle, lambda path: touch(read_state_dict(path)), 4),
    "GGUF": Parser(damage_gguf, checkpoint, 2),
    "GGUF tensors": Parser(damage_gguf_tensors, checkpoint, 2),
    "LoRA": Parser(damage_lora, read_lora, 1),
    "PEFT": Parser(damage_peft, read_peft, 1),
    "token chunks": Parser(damage_chunks, read_chunks, 2),
    "Hugging Face directory": Parser(damage_directory, checkpoint, 2),
    "records": Parser(damage_records, lambda path: read_conversations(read_records([path])), 3),
    "pairs": Parser(damage_pairs, lambda path: read_preferences(read_records([path])), 2),
    "dataset.yaml": Parser(damage_dataset_record, DatasetRecord.read, 1),
}


class Folder:
    """Seeds, and copies of them that inputs are made in."""

    def __init__(self, folder: Path) -> None:
        self.seeds, self.copies = folder / "seeds", folder / "copies"
        self.kinds = seeds.make(self.seeds)

    def fresh(self) -> "Copies":
        """The seeds by kind, whole again."""
        shutil.rmtree(self.copies, ignore_errors=True)
        self.copies.mkdir()
        return Copies(self)

    def changed(self) -> Iterator[Path]:
        """The files of the last input that are not as they were."""
        for file in self.copies.rglob("*"):
            before = self.seeds / file.relative_to(self.copies)
            if file.is_file() and not (before.is_file() and before.read_bytes() == file.read_bytes()):
                yield file


class Copies(dict[str, Path]):
    """Copies of the seeds, each made when it is asked for."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __missing__(self, kind: str) -> Path:
        original = self.folder.kinds[kind]
        (shutil.copytree if original.is_dir() else shutil.copy)(original, self.folder.copies / original.name)
        self[kind] = self.folder.copies / original.name
        return self[kind]
