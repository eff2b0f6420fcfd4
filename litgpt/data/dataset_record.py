"""What `litgpt prepare_dataset` records of the data that it prepared: DIR/dataset.yaml."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from litgpt.checkpoint.atomic import atomic_file

RECORD_FILE = "dataset.yaml"
TOKENIZER_DIR = "tokenizer"
FORMAT = 1


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
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _damaged(path, str(error).partition("\n")[0]) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else content
            raise _damaged(path, f"format {found!r:.60}, and this version reads {FORMAT}")
        try:
            splits = {str(name): SplitRecord(**split) for name, split in content["splits"].items()}
            return cls(**{f.name: content[f.name] for f in fields(cls) if f.name != "splits"}, splits=splits)
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}). Copy it again from where it came, or prepare the data again.")
