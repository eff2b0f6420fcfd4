"""The finetuning recipes: what they come to, beside what was published, and that they say no more than they need to."""

import csv
import io
import math
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt.__main__ import main
from litgpt.catalog import known_checkpoints
from litgpt.cli import resources
from litgpt.data import Alpaca2k
from litgpt.sources.find import expected_on_hub, find_here

HUB = resources.config_hub() / "finetune"
RECIPES = sorted(path.relative_to(HUB).with_suffix("").as_posix() for path in HUB.glob("*/*.yaml"))
# The settings of LitGPT 0.5.13's recipes; what all of them have in common:
PUBLISHED = {row["recipe"]: row for row in csv.DictReader(Path(__file__).with_name("published_recipes.csv").open())}
IN_COMMON = {
    "precision": "bf16-true",
    "num_nodes": 1,
    "resume": False,
    "logger_name": "csv",
    "seed": 1337,
    "data.class_path": "litgpt.data.Alpaca2k",
    "data.init_args.mask_prompt": False,
    "data.init_args.prompt_style": "alpaca",
    "data.init_args.ignore_index": -100,
    "data.init_args.seed": 42,
    "data.init_args.num_workers": 4,
    "data.init_args.download_dir": "data/alpaca2k",
    "train.log_interval": 1,
    "train.max_tokens": None,
    "train.max_seq_length": 512,
    "train.tie_embeddings": None,
    "train.max_norm": None,
    "train.min_lr": 6e-5,
    "eval.max_new_tokens": 100,
    "eval.max_iters": 100,
    "eval.initial_validation": False,
    "eval.final_validation": True,
    "optimizer.class_path": "torch.optim.AdamW",
    "optimizer.init_args.lr": 2e-4,
    "optimizer.init_args.betas": [0.9, 0.95],
}
GROUPS = {
    "train": ("save_interval", "global_batch_size", "micro_batch_size", "lr_warmup_steps", "epochs", "max_steps"),
    "eval": ("interval",),
    "optimizer.init_args": ("weight_decay",),
    "data.init_args": ("val_split_fraction",),
}
PREFIXES = {name: f"{group}.{name}" for group, names in GROUPS.items() for name in names}
# Where this project's own recipes say otherwise; config_hub/finetune/README.md tells why.
RANK_8 = [f"{model}/{kind}" for kind in ("lora", "qlora") for model in ("falcon-7b", "gemma-7b", "llama-2-7b")]
RANK_8 += [f"{model}/{kind}" for kind in ("lora", "qlora") for model in ("llama-3-8b", "mistral-7b", "tiny-llama")]
DIFFERENT = {recipe: {"lora_r": 8} for recipe in [*RANK_8, "gemma-2b/qlora"]}
DIFFERENT["tiny-llama/full"] = {
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.lr_warmup_steps": 100,
    "train.epochs": 3,
    "train.min_lr": 5e-6,
    "optimizer.init_args.lr": 5e-5,
}
DIFFERENT["phi-2/full"] = {
    "train.micro_batch_size": 1,
    "train.lr_warmup_steps": 100,
    "train.epochs": 2,
    "train.max_steps": None,
    "train.min_lr": 3e-6,
    "optimizer.init_args.lr": 3e-5,
}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and value
        result |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return result


def published(recipe: str) -> dict[str, Any]:
    row = {name: yaml.safe_load(text) for name, text in PUBLISHED[recipe].items() if name != "recipe"}
    if row["val_split_fraction"] is None:
        row["val_split_fraction"] = 0.05  # that data set's default there, too
    if recipe.endswith("/full"):
        row = {name: value for name, value in row.items() if name != "quantize" and not name.startswith("lora_")}
    return {**IN_COMMON, **{PREFIXES.get(name, name): value for name, value in row.items()}}


def command_of(recipe: str) -> str:
    return "finetune_full" if recipe.endswith("/full") else "finetune_lora"


@cache
def resolved(*argv: str) -> dict[str, Any]:
    """What a command line comes to."""
    with redirect_stdout(io.StringIO()) as out:
        assert main([*argv, "--print_config"]) == 0
    return flat(yaml.safe_load(out.getvalue()))


def settings_of(recipe: str) -> dict[str, Any]:
    """What a recipe comes to, found where the package has it."""
    return resolved(command_of(recipe), "--config", f"config_hub/finetune/{recipe}.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Recipes travel with the package: the directory one works in does not matter."""
    monkeypatch.chdir(tmp_path)


def test_every_model_has_its_three_recipes():
    models = {recipe.partition("/")[0] for recipe in RECIPES}
    assert sorted(RECIPES) == sorted(f"{model}/{kind}" for model in models for kind in ("full", "lora", "qlora"))
    assert set(RECIPES) > set(PUBLISHED)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_comes_to_what_was_published(recipe):
    settings = dict(settings_of(recipe))
    # What null stands for where records are instructions, as these are.
    if settings["data.init_args.prompt_style"] is None:
        settings["data.init_args.prompt_style"] = Alpaca2k.single_turn_style
    settings["data.init_args.mask_prompt"] = bool(settings["data.init_args.mask_prompt"])
    before, differences = published(recipe), DIFFERENT.get(recipe, {})
    assert {name: settings[name] for name in before} == {**before, **differences}
    assert all(before[name] != value for name, value in differences.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_differs_from_the_defaults_and_no_more(recipe):
    text = (HUB / f"{recipe}.yaml").read_text()
    command = command_of(recipe)
    assert f"#   litgpt {command} --config config_hub/finetune/{recipe}.yaml\n" in text
    said = flat(yaml.safe_load(text))
    data = said["data.class_path"].rpartition(".")[2]
    settings = settings_of(recipe)
    defaults = resolved(command, "--data", data)
    for name, value in said.items():
        full = name.replace("optimizer.", "optimizer.init_args.")
        assert settings[full] == value
        if name != "data.class_path":
            assert full not in defaults or settings[full] != defaults[full], name
    assert resolved(command)["data"] is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_shows_its_arithmetic(recipe):
    text = (HUB / f"{recipe}.yaml").read_text().replace("\n# ", " ")
    settings = settings_of(recipe)
    batch, rows, devices = settings["train.global_batch_size"], settings["train.micro_batch_size"], settings["devices"]
    found = re.search(r"(\d+) sequences? x (\d+) accumulation x (\d+) devices? = (\d+) sequences per step", text)
    assert [int(figure) for figure in found.groups()] == [rows, batch // rows // devices, devices, batch]
    assert rows * devices * int(found[2]) == batch
    records, epochs = 2000 - round(settings["data.init_args.val_split_fraction"] * 2000), settings["train.epochs"]
    in_epoch = math.ceil(records / batch)  # the last step of an epoch is smaller
    assert re.search(rf"{records:,} records / {batch} (=|make) {in_epoch} steps", text)
    assert epochs == 1 or f"{in_epoch} steps an epoch, x {epochs} = {in_epoch * epochs} steps" in text
    assert f"up to {batch} x 512 = {batch * 512:,} tokens" in text
    if command_of(recipe) == "finetune_full":
        repo_id = settings["checkpoint_dir"].removeprefix("checkpoints/")
        needed = known_checkpoints()[repo_id].parameters * 4 * 2 / 1e9
        assert f"x 4 x 2 bytes = {needed:.1f} GB" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_checkpoint_is_a_known_one_and_downloaded_where_it_is_not_here(recipe, tmp_path, monkeypatch):
    place = settings_of(recipe)["checkpoint_dir"]
    assert place.removeprefix("checkpoints/") in known_checkpoints()
    monkeypatch.chdir(tmp_path)
    assert find_here(place) is None
    assert expected_on_hub(place) == place.removeprefix("checkpoints/")


def test_the_figures_in_the_readme_are_of_recipes_that_are_here():
    table = (HUB / "README.md").read_text().split("## Published")[1]
    rows = re.findall(r"^\| `([\w.-]+/\w+)`", table, flags=re.M)
    assert len(rows) > 40
    assert set(rows) <= set(PUBLISHED)


def test_the_readme_lists_every_model():
    rows = re.findall(r"^\| \[?`([\w.-]+)/`", (HUB / "README.md").read_text(), flags=re.M)
    assert sorted(rows) == sorted({recipe.partition("/")[0] for recipe in RECIPES})
