"""TinyStories: short stories in the words of a small child, written by GPT-3.5 and GPT-4."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from litgpt.checkpoint.atomic import atomic_directory
from litgpt.data.downloaded_text import SOURCE_DIR, DownloadedText
from litgpt.data.hub_dataset import HubDataset
from litgpt.data.object_store import is_remote

ARCHIVE = "TinyStories_all_data.tar.gz"
FOLDER = "TinyStories_all_data"


@dataclass(repr=False)
class TinyStories(DownloadedText):
    """TinyStories (https://arxiv.org/abs/2305.07759): 4,967,871 stories, downloaded and tokenised on first use. The
    first of their 50 files is for validation.
    """

    data_path: str = "data/tinystories"
    """Folder where the data is, or goes; or the address of what was prepared"""
    repo_id: str = "roneneldan/TinyStories"
    """Where on the Hub it is"""

    def text_column(self) -> str:
        return "story"

    def prepare_data(self) -> None:
        super().prepare_data()
        if not is_remote(self.data_path):  # the archive stays; what was unpacked takes several times its size
            shutil.rmtree(Path(self.data_path) / SOURCE_DIR / FOLDER, ignore_errors=True)

    def download(self, folder: Path) -> dict[str, list[Path]]:
        stories = folder / FOLDER
        if not stories.is_dir():
            archive = folder / ARCHIVE
            if not archive.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                dataset = HubDataset(self.repo_id, None, None)
                if ARCHIVE not in dataset.files:
                    raise ValueError(f"repo_id={self.repo_id}: this data set has no {ARCHIVE}.")
                dataset.fetch([dataset.files[ARCHIVE]], folder)
            unpack(archive, stories)
        first, *rest = sorted(stories.glob("*.json"))
        return {"train": rest, "val": [first]}


def unpack(archive: Path, folder: Path) -> None:
    """Write the JSON files of a tar archive into a folder, which appears once they are all there.

    Raises:
        ValueError: It is damaged, or has fewer than two.
    """
    try:
        with tarfile.open(archive) as tar, atomic_directory(folder) as temporary:
            bar = tqdm(desc=f"Unpacking {archive.name}", unit=" files", delay=2, disable=None)
            for member in tar:
                name = PurePosixPath(member.name).name
                packed = tar.extractfile(member) if member.isfile() else None
                if packed is not None and name.endswith(".json") and not name.startswith("."):
                    with packed, open(temporary / name, "wb") as file:
                        shutil.copyfileobj(packed, file, 1 << 20)
                    bar.update()
            bar.close()
            if len(list(temporary.iterdir())) < 2:
                raise ValueError(f"{archive} holds fewer than two JSON files: one is for validation.")
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{archive} is damaged ({error}). Delete it; it will be downloaded again.") from None
