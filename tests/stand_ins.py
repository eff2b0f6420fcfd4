"""A Hub of every known checkpoint: small random models under the published names, made when they are asked for."""

import functools
import json
import tempfile
from pathlib import Path

from litgpt.catalog import known_checkpoints
from litgpt.commands import convert_from_litgpt
from tests import checkpoint_files, tokenizer_files
from tests.documents import stand_ins
from tests.hub_server import Hub

QUESTIONS = [
    {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))} for n in range(2, 42)
]


class StandIns(dict):
    """The repositories of such a Hub, with a data set for the recipes.

    Pythias are GPT-NeoX models that were only pretrained; all others are one Llama, with a chat template but for phi-2,
    which has none.
    """

    def __init__(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in QUESTIONS).encode()
        super().__init__({"datasets/mhenrichsen/alpaca_2k_test": {"alpaca_2000.jsonl": lines}})

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in known_checkpoints()

    def __missing__(self, name: str) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as place:
            self[name] = (
                stand_ins.checkpoint(name, Path(place), vocabulary=None)
                if "pythia" in name
                else llama("phi-2" not in name)
            )
        return self[name]


def hub() -> Hub:
    """A Hub with all of them, for `tests.hub_server.serve_hub`."""
    return Hub(repositories=StandIns())


@functools.cache
def llama(chats: bool) -> dict[str, bytes]:
    """The files of the Llama, as the Hub has them, with a chat template or without."""
    with tempfile.TemporaryDirectory() as place:
        template = tokenizer_files.CHATML if chats else None
        ours = checkpoint_files.chat_model(Path(place) / "ours", block_size=2048, template=template)
        theirs = Path(place) / "theirs"
        convert_from_litgpt.setup(ours, theirs, format="safetensors")
        return {path.name: path.read_bytes() for path in theirs.iterdir() if path.is_file()}
