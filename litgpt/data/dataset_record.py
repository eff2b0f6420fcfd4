"""What `litgpt prepare_dataset` records of the data that it prepared: DIR/dataset.yaml."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from litgpt.checkpoint.atomic import atomic_file
from litgpt.cli.untrusted import is_count, read_yaml_mapping, shown

RECORD_FILE = "dataset.yaml"
TOKENIZER_DIR = "tokenizer"
FORMAT = 1
_REMEDY = "Copy it again from where it came, or prepare the data again."


@dataclass(frozen=True)
class SplitRecord:
    """One split: a folder of chunks of its name.

    Attributes:
        tokens: Ids in it, the EOS after each document included.
        documents: Documents in it.
        chunks: Files that they lie in.
        index_sha256: Of its index.json, which has the sums of the chunks.
    """

    tokens: int
    documents: int
    chunks: int
    index_sha256: str


@dataclass(frozen=True)
class DatasetRecord:
    """A prepared data set.

    Attributes:
        tokenizer: Fingerprint of the tokenizer (`Tokenizer.fingerprint`); its files are in DIR/tokenizer.
        vocab_size: Of the tokenizer.
        eos_id: The id that ends every document.
        dtype: Type of the ids, uint16 or int32.
        sources: What was read: number of files and bytes of each split that has files of its own.
        options: What else decided the tokens.
        rows_without_text: Records that were left out since their text is empty or missing.
        splits: The splits by name.
    """

    tokenizer: str
    vocab_size: int
    eos_id: int
    dtype: str
    sources: dict[str, Any]
    options: dict[str, Any]
    rows_without_text: int
    splits: dict[str, SplitRecord]

    def write(self, directory: Path) -> None:
        """Write it into `directory`, whole or not at all."""
        text = yaml.safe_dump({"format": FORMAT, **asdict(self)}, sort_keys=False, allow_unicode=True)
        with atomic_file(directory / RECORD_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> DatasetRecord | None:
        """The record of a directory; None where there is none, as beside chunks that litdata wrote.

        Raises:
            ValueError: It is damaged, or a newer version wrote it.
        """
        path = Path(directory) / RECORD_FILE
        try:
            content = read_yaml_mapping(path, _REMEDY)
        except FileNotFoundError:
            return None
        if content.get("format") != FORMAT:
            raise _damaged(path, f"format {shown(content.get('format'))}, and this version reads {FORMAT}")
        try:
            splits = {str(name): SplitRecord(**split) for name, split in content["splits"].items()}
            record = cls(**{f.name: content[f.name] for f in fields(cls) if f.name != "splits"}, splits=splits)
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from None
        for part in (record, *splits.values()):
            for entry in fields(part):
                if not _fits(getattr(part, entry.name), entry.type):
                    raise _damaged(path, f"{entry.name} is {shown(getattr(part, entry.name))}")
        return record


def _fits(value: Any, annotation: object) -> bool:
    """Whether a value is of the kind that a field's annotation (here a string) names."""
    if annotation == "int":
        return is_count(value)
    return isinstance(value, str if annotation == "str" else dict)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}). {_REMEDY}")
