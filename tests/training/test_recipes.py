"""Every finetuning recipe runs: two steps on a tiny model of its checkpoint's architecture, by the command line."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.__main__ import main
from litgpt.adaptation.lora import read_lora
from litgpt.checkpoint import WEIGHTS, read_state_dict, save_model
from litgpt.cli import resources
from litgpt.config import Config
from litgpt.data import Alpaca2k
from litgpt.model import GPT
from litgpt.prompts import ChatTemplate, choose_prompt_style
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.metrics import read_metrics
from tests import tokenizer_files
from tests.hub_server import Hub, connect, serve_hub

HUB = resources.config_hub() / "finetune"
RECIPES = sorted(path.relative_to(HUB).with_suffix("").as_posix() for path in HUB.glob("*/*.yaml"))
ROWS = 470  # of the embedding; the tokenizer has fewer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory to work in, with the data set where a first run would have left it."""
    directory = tmp_path_factory.mktemp("recipes")
    records = [{"instruction": f"Count to {n}.", "input": "", "output": f"One to {n}."} for n in range(80)]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    with pytest.MonkeyPatch.context() as patch, serve_hub(Hub()) as hub:
        connect(hub, patch)
        patch.chdir(directory)
        hub.repositories["datasets/mhenrichsen/alpaca_2k_test"] = {"alpaca_2000.jsonl": content}
        Alpaca2k().download()
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    config = {"chat_template": tokenizer_files.CHATML, "eos_token": "<|im_end|>"}
    return tokenizer_files.byte_level(tmp_path_factory.mktemp("tokenizer"), config)


@pytest.fixture(scope="module")
def tiny(place, tokenizer):
    """Makes the checkpoint that a recipe names, small, and where the recipe looks for it."""

    def make(where: str) -> Path:
        directory = place / where
        if directory.exists():
            return directory
        directory.mkdir(parents=True)
        for file in tokenizer.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        config = shrunk(Config.from_name(where.removeprefix("checkpoints/")))
        torch.manual_seed(0)
        model = GPT(config)
        model.init_weights()
        save_model(directory, model, config)
        return directory

    return make


def shrunk(real: Config) -> Config:
    """The same architecture with as few layers as have all their kinds, few heads, narrow ones and few tokens."""
    windows = real.sliding_window_indices or [1]
    groups = {1: 1, real.n_head: 4}.get(real.n_query_groups, 2)
    heads_fill_width = real.n_head * real.head_size == real.n_embd
    return Config(
        **{
            **vars(real),
            "block_size": 1024,
            "n_layer": max(2, windows.index(0) + 1 if 0 in windows else 0),
            "n_head": 4,
            "n_query_groups": groups,
            "head_size": 40,  # what is rotated of it is even for all of them
            "n_embd": 160 if heads_fill_width else 128,
            "intermediate_size": 192,
            "vocab_size": ROWS,
            "padded_vocab_size": ROWS,
            "sliding_window_size": real.sliding_window_size and 16,
        }
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_a_recipe(recipe, place, tiny, monkeypatch, capsys):
    settings = yaml.safe_load((HUB / f"{recipe}.yaml").read_text())
    base = tiny(settings["checkpoint_dir"])
    monkeypatch.chdir(place)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(place / "cache"))
    out_dir = Path(settings["out_dir"])
    command = "finetune_full" if recipe.endswith("/full") else "finetune_lora"
    done = main(
        [
            *(command, "--config", f"config_hub/finetune/{recipe}.yaml", "--train.max_steps", "2"),
            *("--devices", "1", "--data.num_workers", "0", "--eval.max_new_tokens", "2"),
            *("--overwrite", "true"),  # a few recipes share a directory
        ]
    )
    out = capsys.readouterr()
    assert done in (0, None), out.err
    rows = read_metrics(out_dir / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2"]
    losses = [float(row[name]) for name, row in (("loss", rows[0]), ("loss", rows[1]), ("val_loss", rows[1]))]
    assert all(0 < loss < 2 * math.log(ROWS) for loss in losses)  # random weights guess among all rows
    warmup = settings["train"].get("lr_warmup_steps", 100)
    peak = settings["optimizer"]["lr"]
    assert float(rows[0]["learning_rate"]) == pytest.approx(peak / warmup)

    final = out_dir / "final"
    before, after = read_state_dict(base / WEIGHTS), read_state_dict(final / WEIGHTS)
    assert before.keys() == after.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name].to(weight.dtype))}
    assert changed
    if command == "finetune_lora":
        weights, lora, _ = read_lora(final)
        assert (lora.r, lora.dropout) == (settings.get("lora_r", 8), settings.get("lora_dropout", 0.05))
        assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
        assert lora.head == any("lm_head" in name for name in weights) == settings.get("lora_head", False)
        assert not any("norm" in name or "wte" in name for name in changed)
    written = yaml.safe_load((final / "hyperparameters.yaml").read_text())
    assert written.get("quantize") == settings.get("quantize")
    style = choose_prompt_style(final, tokenizer=Tokenizer(final))
    in_chat = "prompt_style" in settings["data"].get("init_args", {})
    assert isinstance(style, ChatTemplate) == in_chat
    assert ("replies only" in out.out) == in_chat
