"""Data sets of text that are downloaded and tokenised on first use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.chunk_data import TRAIN, VAL, FolderData, has_chunks
from litgpt.data.dataset_record import DatasetRecord
from litgpt.data.object_store import is_remote, join_address

SOURCE_DIR = "source"


@dataclass(repr=False)
class DownloadedText(FolderData):
    """Text of the Hugging Face Hub; a subclass says how to get it."""

    def download(self, folder: Path) -> dict[str, list[Path]]:
        """Get the files of `train`, and those of `val` if it has its own, where they are not in `folder` yet."""
        raise TypeError(f"{type(self).__name__} has no download(): a data module must say where its text is.")

    def text_column(self) -> str:
        """Where the text of a record is."""
        return "text"

    def held_out(self) -> float | None:
        """Part of the documents to hold out for validation; None where there are files for it."""
        return None

    def prepare_data(self) -> None:
        if self.is_prepared():
            return
        if self._tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} needs a tokenizer for the text: give `tokenizer_dir` (a directory, or the name "
                "of a checkpoint whose tokenizer was downloaded)."
            )
        from huggingface_hub.utils import WeakFileLock

        from litgpt.data.preparation import prepare

        destination = Path(self.data_path)
        destination.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(destination / ".prepare.lock"):  # several machines may share the disk
            if self.is_prepared():
                return
            folder = destination / SOURCE_DIR
            sources = self.download(folder)
            prepare(
                sources,
                folder,
                self._tokenizer.dir,
                destination,
                text_column=self.text_column(),
                val_split_fraction=self.held_out(),
            )

    def setup(self, stage: str = "") -> None:
        record, wanted = self._record(self.data_path), self.held_out()
        held = None if record is None else record.options.get("val_split_fraction")
        if wanted is not None and held is not None and held != wanted:
            raise ValueError(
                f"val_split_fraction={wanted} has no effect here: {self.data_path} was prepared with {held}. "
                "Leave it out, or choose another `data_path`."
            )
        super().setup(stage)

    def is_prepared(self) -> bool:
        """Whether the chunks are there: our own with their record, or litdata's."""
        if is_remote(self.data_path) or DatasetRecord.read(Path(self.data_path)) is not None:
            return True
        return all(has_chunks(join_address(self.data_path, split)) for split in (TRAIN, VAL))
