"""Every way of finetuning: exact resume, any micro-batch size, any number of ranks, and what it leaves behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.adaptation.adapter import ADAPTER_V2_WEIGHTS, ADAPTER_WEIGHTS
from litgpt.adaptation.lora import LORA_WEIGHTS, apply_lora, read_lora
from litgpt.checkpoint import WEIGHTS, copy_companion_files, save_model
from litgpt.cli.flat import flattened
from litgpt.commands import finetune_adapter, finetune_adapter_v2, finetune_full, finetune_lora
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.model import GPT
from litgpt.runs.finetuning import Finetuning
from litgpt.runs.options import OPTIMIZER, TRAIN, FinetuneOptions
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.metrics import read_metrics
from tests import checkpoint_files
from tests.data_damage import flip
from tests.training.conftest import (
    assert_close_runs,
    assert_learns_compiled,
    assert_same_run,
    compiling,
    killed_in_step,
    on_two_ranks,
    weights,
)

METHODS = {
    # name: (the command's function, its own options, the file that its checkpoints hold)
    "full": (finetune_full.setup, {}, WEIGHTS),
    "lora": (finetune_lora.setup, {"lora_mlp": True, "lora_dropout": 0.1}, LORA_WEIGHTS),
    "qlora": (finetune_lora.setup, {"quantize": "bnb.nf4", "lora_projection": True}, LORA_WEIGHTS),
    "dora": (finetune_lora.setup, {"lora_dora": True, "lora_dropout": 0.0, "lora_plus_ratio": 4.0}, LORA_WEIGHTS),
    "adapter": (finetune_adapter.setup, {"adapter_start_layer": 0}, ADAPTER_WEIGHTS),
    "adapter v2": (finetune_adapter_v2.setup, {"adapter_start_layer": 1}, ADAPTER_V2_WEIGHTS),
}
TRAIN_FIELDS = TrainArgs.__dataclass_fields__.keys() - {"logger_name"}
EVALUATION = EvalArgs(interval=4, max_iters=3, max_new_tokens=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = checkpoint_files.chat_model(tmp_path_factory.mktemp("base"), template=None)
    model = load_model(directory)
    torch.manual_seed(0)
    model.init_weights()  # the weights there are made for definite answers, not for learning
    save_model(directory, model, model.config)
    return directory


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Ragged: answers of one to forty words."""
    path = tmp_path_factory.mktemp("records") / "records.json"
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 41)]
    path.write_text(json.dumps(rows))
    return path


def run(method: str, base: Path, records: Path, out_dir: Path, data: dict | None = None, **options) -> list[dict]:
    """Finetunes with tiny settings; keyword arguments change them."""
    setup, own, _ = METHODS[method]
    settings = {name: options.pop(name) for name in list(options) if name in TRAIN_FIELDS}
    small = {"global_batch_size": 8, "micro_batch_size": 4, "lr_warmup_steps": 2, "epochs": None, "max_norm": 1.0}
    flattened(setup)(
        checkpoint_dir=base,
        out_dir=out_dir,
        data=JSON(**{"json_path": records, "val_split_fraction": 0.2, "num_workers": 0, **(data or {})}),
        train=replace(TRAIN, **{**small, **settings}),
        **{"eval": EVALUATION, "optimizer": replace(OPTIMIZER, init_args={"lr": 0.01}), **own, **options},
    )
    return read_metrics(out_dir / "metrics.csv")


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(method, base, records, tmp_path, monkeypatch):
    run(method, base, records, tmp_path / "whole", max_steps=12)
    with killed_in_step(9, monkeypatch):
        run(method, base, records, tmp_path / "parts", max_steps=12, save_interval=5)
    torch.manual_seed(7)
    run(method, base, records, tmp_path / "parts", max_steps=12, save_interval=5, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=12, file=METHODS[method][2])


def test_a_resume_on_something_else_is_refused(base, records, tmp_path):
    out = tmp_path / "out"
    run("lora", base, records, out, max_steps=2)
    others, other_base = tmp_path / "others.json", tmp_path / "base"
    others.write_text(records.read_text().replace('"1 2 3 ', '"3 2 1 '))
    shutil.copytree(base, other_base)
    again = {"max_steps": 3, "resume": "auto"}
    run("lora", other_base, records, out, **again)  # where it is, is no matter
    model = load_model(other_base)
    model.init_weights()
    save_model(other_base, model, model.config)
    for line, arguments, changed in (
        (r"the training data: (?P<as_many>32 samples, .+) \(\w+\) then, (?P=as_many) \(\w+\) now", (base, others), {}),
        ("the training data: ", (base, records), {"data": {"prompt_style": "default"}}),
        ("the frozen weights: another", (other_base, records), {}),
        ("`lora_alpha`: 16 then, 32 now", (base, records), {"lora_alpha": 32}),
        ("`quantize`: none then, bnb.nf4 now", (base, records), {"quantize": "bnb.nf4"}),
        ("`seed`: 1337 then, 1 now", (base, records), {"seed": 1}),
        ("`data.seed`: 42 then, 7 now", (base, records), {"data": {"seed": 7}}),
        ("the length of a packed row: none then, ", (base, records), {"data": {"pack": True}}),
    ):
        with pytest.raises(ValueError, match=rf"was started with something else:\n(.*\n)*  {line}"):
            run("lora", *arguments, out, **again, **changed)
    run("full", base, records, tmp_path / "full", max_steps=2)
    run("full", other_base, records, tmp_path / "full", max_steps=3, resume="auto")  # all its weights are its own


@pytest.mark.parametrize("method", ["full", "dora", "adapter", "adapter v2"])
def test_one_by_eight_equals_eight_by_one(method, base, records, tmp_path):
    """Ragged samples: the loss is that per target token of the whole step, however it is divided."""
    one = run(method, base, records, tmp_path / "one", max_steps=6, micro_batch_size=8, eval=EvalArgs(interval=99))
    eight = run(method, base, records, tmp_path / "eight", max_steps=6, micro_batch_size=1, eval=EvalArgs(interval=99))
    for a, b in zip(one, eight, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-4)


ON_TWO_RANKS = """
import sys
from pathlib import Path
from tests.training.test_finetune import run
method, base, records, out_dir, strategy = sys.argv[1:]
run(method, Path(base), Path(records), Path(out_dir), max_steps=6, micro_batch_size=2, devices=2, strategy=strategy)
"""


@pytest.mark.parametrize(
    ("method", "strategy"),
    [("full", "fsdp"), ("dora", "ddp"), ("dora", "fsdp"), ("adapter", "ddp"), ("adapter v2", "fsdp")],
)
def test_two_ranks_equal_one(method, strategy, base, records, tmp_path):
    run(method, base, records, tmp_path / "one", max_steps=6, micro_batch_size=2)
    on_two_ranks(ON_TWO_RANKS, tmp_path, method, base, records, tmp_path / "two", strategy)
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(1, 7), METHODS[method][2])


GEMMA = {
    "mlp_class_name": "GemmaMLP",
    "norm_unit_offset": True,
    "scale_embeddings": True,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "tie_embeddings": True,
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_lora_on_norms_after_the_layers_on_two_ranks_with_activations_computed_again(strategy, base, records, tmp_path):
    model = GPT(Config(**{**vars(Config.from_checkpoint(base)), **GEMMA}))
    torch.manual_seed(0)
    model.init_weights()
    (tmp_path / "gemma").mkdir()
    save_model(tmp_path / "gemma", model, model.config)
    copy_companion_files(base, tmp_path / "gemma")
    run("lora", tmp_path / "gemma", records, tmp_path / "one", max_steps=3, micro_batch_size=2, lora_dropout=0.0)
    again = ON_TWO_RANKS.replace("max_steps=6", "max_steps=3, lora_dropout=0.0, activation_checkpointing='full'")
    on_two_ranks(again, tmp_path, "lora", tmp_path / "gemma", records, tmp_path / "two", strategy)
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(1, 4), LORA_WEIGHTS)


def test_packed_rows_train_too(base, records, tmp_path):
    rows = run("lora", base, records, tmp_path, {"pack": True}, max_steps=8, max_seq_length=128, lr_warmup_steps=1)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_what_lora_leaves_behind(base, records, tmp_path):
    """The matrices say what they are, and the merged model next to them computes what they and the base do."""
    run("lora", base, records, tmp_path, max_steps=6)
    final = tmp_path / "final"
    update, settings, of = read_lora(final)
    assert (settings.r, settings.mlp, settings.dropout, of) == (8, True, 0.1, str(base))
    adapted = load_model(base, dtype=torch.float32)
    apply_lora(adapted, settings)
    missing, unexpected = adapted.load_state_dict(update, strict=False)
    assert not unexpected
    assert not any("lora" in name for name in missing)
    idx = torch.randint(0, 700, (2, 30), generator=torch.Generator().manual_seed(0))
    merged, before = load_model(final, dtype=torch.float32), load_model(base, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(merged(idx), adapted.eval()(idx), rtol=1e-5, atol=1e-5)
        assert (merged(idx) - before(idx)).abs().max() > 0.01
    assert (final / "prompt_style.yaml").is_file()
    assert weights(final, LORA_WEIGHTS).keys() == update.keys()
    assert open_checkpoint(final).config == open_checkpoint(base).config

    flip(final / WEIGHTS, (final / WEIGHTS).stat().st_size // 2)  # which a resume does without
    with pytest.raises(ValueError, match=r"lit_model.pth' .*damaged.*write it again with `litgpt merge_lora"):
        load_model(final)
    assert len(run("lora", base, records, tmp_path, max_steps=8, resume="auto")) == 8
    load_model(final)


def test_a_dry_run_says_everything_and_trains_nothing(base, records, tmp_path, capsys):
    setup, own, _ = METHODS["lora"]
    data = JSON(json_path=records, val_split_fraction=0.2)
    flattened(setup)(checkpoint_dir=base, out_dir=tmp_path / "out", data=data, dry_run=True, **own)
    out = capsys.readouterr().out
    for line in (
        "Number of trainable parameters: ",
        "Number of non-trainable parameters: ",
        "Tokens per step: 1 sequence x 16 accumulation x 1 device x up to ",
        "Steps: 10",  # 5 epochs of 32 records in batches of 16
        "Estimated memory: ",
        "One training sample, what is not trained on in <<...>>:\n",
        "### Response:",
        "--dry_run: nothing was trained.",
    ):
        assert line in out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_leaves_the_run_that_is_there(base, records, tmp_path, capsys):
    """Neither does it stand in its way, nor does --overwrite delete it."""
    setup, own, _ = METHODS["lora"]
    earlier = tmp_path / "out/final/lit_model.pth"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"weights")
    for overwrite in (False, True):
        data = JSON(json_path=records, val_split_fraction=0.2)
        options = {"out_dir": tmp_path / "out", "overwrite": overwrite, "dry_run": True}
        flattened(setup)(checkpoint_dir=base, data=data, **options, **own)
        assert "--dry_run: nothing was trained." in capsys.readouterr().out
        assert earlier.read_bytes() == b"weights"


def test_making_a_job_does_nothing_yet(tmp_path, monkeypatch):
    """It stores what was asked; what deletes, downloads, launches and tokenises are its steps."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    earlier = tmp_path / "out/final/lit_model.pth"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"weights")
    options = FinetuneOptions(data=JSON(json_path=tmp_path / "nowhere"), overwrite=True, devices=2)
    job = Finetuning(Path("nobody/has-it"), tmp_path / "out", options, settings={}, quantize="unknown")
    assert earlier.read_bytes() == b"weights"
    with pytest.raises(ValueError, match="quantize=unknown"):
        job.check()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "final", "lit_model.pth"]


def test_pretraining_data_is_refused_by_name(base, tmp_path):
    from litgpt.data import TextFiles

    with pytest.raises(ValueError, match=r"data=TextFiles is for pretraining.*data=JSON"):
        finetune_full.setup(base, tmp_path / "out", FinetuneOptions(data=TextFiles(train_data_path=tmp_path)))


@pytest.mark.parametrize("command", ["finetune", "finetune_full"])
def test_lora_options_point_to_their_command(command, base, capsys):
    assert main([command, str(base), "--lora_r", "16"]) == 2
    assert "--lora_r: unknown setting. `litgpt finetune_lora` has it." in capsys.readouterr().err


def test_each_command_writes_to_its_own_place(capsys):
    places = {"finetune": "finetune", "finetune_full": "finetune/full", "finetune_lora": "finetune/lora"}
    for command, place in places.items():
        assert main([command, "x", "--print_config"]) == 0
        assert f"out_dir: out/{place}\n" in capsys.readouterr().out


@pytest.mark.parametrize("longest", [64, pytest.param(None, marks=pytest.mark.slow)])  # None: as wide as samples are
def test_compiled_blocks_learn_the_same(base, records, tmp_path, longest):
    """There is no dropout: compiled code draws other numbers."""
    settings = {"max_steps": 3, "max_seq_length": longest, "lora_dropout": 0.0}
    settings["eval"] = EvalArgs(final_validation=False)
    plain = run("lora", base, records, tmp_path / "plain", **settings)
    with compiling() as graphs:
        compiled = run("lora", base, records, tmp_path / "compiled", **settings, compile=True)
    assert_learns_compiled(plain, compiled, graphs)
    expected, actual = (weights(tmp_path / name / "final", LORA_WEIGHTS) for name in ("plain", "compiled"))
    assert expected.keys() == actual.keys()


@pytest.mark.parametrize("method", ["lora", "adapter v2"])
def test_checkpointed_activations_change_nothing(method, base, records, tmp_path):
    """Dropout draws the same numbers again when a block is computed again."""
    plain = run(method, base, records, tmp_path / "plain", max_steps=3)
    again = run(method, base, records, tmp_path / "again", max_steps=3, activation_checkpointing="full")
    assert [row["loss"] for row in plain] == [row["loss"] for row in again]


def test_noise_on_the_embeddings_acts(base, records, tmp_path):
    plain = run("lora", base, records, tmp_path / "plain", max_steps=2)
    noisy = run("lora", base, records, tmp_path / "noisy", max_steps=2, neftune_noise_alpha=5.0)
    assert plain[0]["loss"] != noisy[0]["loss"]


def test_muon_trains_matrices_by_their_names(base, records, tmp_path):
    muon = replace(OPTIMIZER, class_path="Muon", init_args={"lr": 0.01})
    rows = run("full", base, records, tmp_path, max_steps=6, optimizer=muon)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


MIXED_ON_TWO_RANKS = """
import sys
from pathlib import Path
from tests.training.test_finetune import run
base, records, out_dir, strategy = sys.argv[1:]
run("dora", Path(base), Path(records), Path(out_dir), max_steps=3, micro_batch_size=2, devices=2, strategy=strategy,
    precision="bf16-mixed")
"""


def test_mixed_precision_with_frozen_weights_on_two_ranks(base, records, tmp_path):
    """FSDP2 shards blocks whose frozen matrices are in bfloat16, and the rest in float32."""
    run("dora", base, records, tmp_path / "one", max_steps=3, micro_batch_size=2, precision="bf16-mixed")
    on_two_ranks(MIXED_ON_TWO_RANKS, tmp_path, base, records, tmp_path / "two", "fsdp")
    one, two = (read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert [float(row["loss"]) for row in two] == pytest.approx([float(row["loss"]) for row in one], rel=1e-3)
    assert weights(tmp_path / "two/final", LORA_WEIGHTS).keys() == weights(tmp_path / "one/final", LORA_WEIGHTS).keys()
