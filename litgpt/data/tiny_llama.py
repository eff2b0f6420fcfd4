"""What TinyLlama was trained on: SlimPajama's web text and StarCoder's code."""

from __future__ import annotations

from dataclasses import dataclass

from litgpt.data.chunk_data import DataSource, FolderData, splits_of
from litgpt.data.object_store import join_address

# Shares of the samples, from TinyLlama's training code (https://github.com/jzhang38/TinyLlama).
SLIMPAJAMA, STARCODER = 0.693584, 0.306416


@dataclass(repr=False)
class TinyLlama(FolderData):
    """SlimPajama (627 billion tokens) and StarCoder's data, prepared beforehand in data_path/slimpajama and
    data_path/starcoder: see `litgpt prepare_dataset --help`.
    """

    data_path: str = "data"
    """Folder or address with the prepared data sets slimpajama and starcoder"""
    use_starcoder: bool = True
    """Mix code of StarCoder in, 30.6% of the samples; otherwise SlimPajama alone"""

    def roots(self) -> list[str]:
        names = ["slimpajama", "starcoder"] if self.use_starcoder else ["slimpajama"]
        return [join_address(self.data_path, name) for name in names]

    def sources(self) -> list[DataSource]:
        return slimpajama(self.data_path, self.use_starcoder)


def slimpajama(data_path: str, use_starcoder: bool) -> list[DataSource]:
    """SlimPajama's training and validation chunks, and StarCoder's for training.

    Raises:
        FileNotFoundError: They are not prepared; the message says how that is done.
    """
    names = ["slimpajama", "starcoder"] if use_starcoder else ["slimpajama"]
    try:
        web, *code = [splits_of(join_address(data_path, name)) for name in names]
    except FileNotFoundError:
        ids = {"slimpajama": "cerebras/SlimPajama-627B", "starcoder": "bigcode/starcoderdata"}
        commands = [
            f"litgpt prepare_dataset --source_path {ids[name]} --checkpoint_dir TOKENIZER --destination_path "
            f"{join_address(data_path, name)}"
            for name in names
        ]
        raise FileNotFoundError(
            f"data_path={data_path}: prepared data is expected in {' and '.join(names)} below it. It is too "
            "large to be prepared on the way (SlimPajama's download alone is 895 GB); prepare it beforehand:\n  "
            + "\n  ".join(commands)
        ) from None
    return [
        DataSource(web.path, web.train, web.val, SLIMPAJAMA),
        *(DataSource(source.path, source.train, None, STARCODER) for source in code),
    ]
