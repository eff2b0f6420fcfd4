"""A tiny model on a little real text, trained by the command's own function."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litgpt.cli import ConfigOverrides
from litgpt.commands import pretrain
from litgpt.data import TextFiles
from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.metrics import read_metrics

TEXT = Path(__file__).parents[2] / "config_hub/pretrain/data/shakespeare.txt"
SHAPE = {
    "block_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "intermediate_size": 64,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
}

TRAIN_FIELDS = TrainArgs.__dataclass_fields__.keys() - {"logger_name"}


@pytest.fixture(autouse=True)
def _one_thread_own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path) -> Path:
    """40 kB of Shakespeare in one file."""
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.read_bytes()[:40_000])
    return path


@pytest.fixture
def train(text):
    """Runs `litgpt pretrain`'s function with tiny settings; keyword arguments change them."""

    def run(out_dir: Path, *, data: dict | None = None, eval: EvalArgs | None = None, **options):
        settings = {k: options.pop(k) for k in list(options) if k in TRAIN_FIELDS}
        small = {
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "lr_warmup_steps": 5,
            "max_tokens": None,
            "max_norm": 1.0,
        }
        module = options.pop("module", None) or TextFiles(**{"train_data_path": text, "num_workers": 0, **(data or {})})
        pretrain.setup(
            "tiny",
            ConfigOverrides(options.pop("shape", SHAPE)),
            out_dir=out_dir,
            data=module,
            train=replace(pretrain.TRAIN, **{**small, **settings}),
            eval=eval or EvalArgs(interval=10, max_iters=4),
            **{"devices": 1, "tokenizer_vocab_size": 300, "logger_name": "csv", **options},
        )
        return read_metrics(out_dir / "metrics.csv")

    return run


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / "lit_model.pth", weights_only=True)


def deterministic(rows: list[dict]) -> list[dict]:
    """What must be the same in two runs: all but the times."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_sec", "iter_time", "time", "mfu")} for row in rows]
