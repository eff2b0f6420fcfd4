"""`--compiler thunder` trains as no compiler does. Needs an environment with Thunder: run test.sh."""

import json
from dataclasses import replace

import litgpt_thunder
import pytest
import torch

from litgpt.checkpoint import save_model
from litgpt.cli.flat import flattened
from litgpt.commands import finetune_dpo, finetune_full, finetune_lora, pretrain
from litgpt.data import JSON, Preferences
from litgpt.runs.options import OPTIMIZER, TRAIN
from litgpt.sources.load import load_model
from litgpt.training.arguments import EvalArgs
from litgpt.training.metrics import read_metrics
from tests import checkpoint_files
from tests.training.conftest import SHAPE, _one_thread_own_cache, on_two_ranks, text, train  # noqa: F401 - fixtures

STEPS = 6
LLAMA = {**SHAPE, "n_query_groups": 1, "n_layer": 3}
SMALL = {"global_batch_size": 8, "micro_batch_size": 4, "lr_warmup_steps": 2}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    litgpt_thunder.compiler.cache_clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = checkpoint_files.chat_model(tmp_path_factory.mktemp("base"))
    model = load_model(directory)
    torch.manual_seed(0)
    model.init_weights()  # its large random weights would blow up the last bits from step to step
    save_model(directory, model, model.config)
    return directory


@pytest.fixture
def finetuned(base, tmp_path):
    """Runs a finetuning command's function on a few records."""
    # Few lengths: each is compiled for itself, the first time.
    records = [{"instruction": f"{a} {b} {c}?", "output": f"{c} {b} {a}"} for a in "12" for b in "3456" for c in "789"]
    (tmp_path / "records.json").write_text(json.dumps(records))
    pairs = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": r["output"][::-1]} for r in records]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))

    def run(command, out_dir, **options):
        data, file = (Preferences, "pairs.json") if command is finetune_dpo else (JSON, "records.json")
        more = options.pop("data", {})
        settings = {**SMALL, "max_steps": STEPS, "epochs": None, **options.pop("train", {})}
        flattened(command.setup)(
            checkpoint_dir=base,
            out_dir=out_dir,
            data=data(**{"json_path": tmp_path / file, "val_split_fraction": 0.25, "num_workers": 0, **more}),
            train=replace(TRAIN, **settings),
            eval=EvalArgs(interval=3, max_iters=2, max_new_tokens=4),
            optimizer=replace(OPTIMIZER, init_args={"lr": 0.003}),
            **options,
        )
        return read_metrics(out_dir / "metrics.csv")

    return run


def assert_same_losses(eager: list[dict], compiled: list[dict], tolerance: float = 1e-4) -> None:
    """In float32, to what sums in another order make of it in six steps; in bfloat16, to what is left of a float32 that
    is rounded to 2^-8 after each operation in one program and only at the end in the other."""
    assert len(eager) == len(compiled) == STEPS
    assert float(eager[0]["loss"]) != pytest.approx(float(eager[-1]["loss"]), rel=1e-2), "nothing was learned"
    for a, b in zip(eager, compiled, strict=True):
        for figure in ("loss", "grad_norm", "val_loss"):
            assert bool(a[figure]) == bool(b[figure])
            if a[figure]:
                allowed = tolerance * (5 if figure == "grad_norm" else 1)
                assert float(b[figure]) == pytest.approx(float(a[figure]), rel=allowed), (a["step"], figure)


def assert_thunder_acted(whole: bool) -> None:
    """It has compiled blocks, `whole` or in parts, and not just passed them on."""
    graphs = litgpt_thunder.compiler().subgraph_infos
    assert graphs
    for graph in graphs:
        assert graph.thunder_compiled_fns, graph.split_reasons
        assert not (whole and graph.split_reasons), graph.split_reasons


PRETRAINING = {
    "plain": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "checkpointed": {"activation_checkpointing": "full"},
}


@pytest.mark.parametrize("case", PRETRAINING)
def test_pretrain(case, train, tmp_path):  # noqa: F811
    options = {"max_steps": STEPS, "shape": LLAMA, **SMALL, **PRETRAINING[case]}
    options["optimizer"] = replace(pretrain.OPTIMIZER, init_args={"lr": 0.01})
    eager = train(tmp_path / "eager", **options)
    assert not litgpt_thunder.compiler().subgraph_infos
    compiled = train(tmp_path / "thunder", compiler="thunder", **options)
    assert_thunder_acted(whole=case != "bf16-mixed")
    assert_same_losses(eager, compiled, tolerance=1e-2 if case == "bf16-mixed" else 1e-4)


FINETUNING = {
    "full": (finetune_full, {}),
    "lora": (finetune_lora, {"lora_mlp": True, "lora_projection": True, "lora_dropout": 0.0}),
    "packed": (finetune_lora, {"lora_dropout": 0.0, "data": {"pack": True}, "train": {"max_seq_length": 160}}),
    "dpo": (finetune_dpo, {"lora_dropout": 0.0}),
}


@pytest.mark.parametrize("case", FINETUNING)
def test_finetune(case, finetuned, tmp_path):
    command, options = FINETUNING[case]
    eager = finetuned(command, tmp_path / "eager", **options)
    compiled = finetuned(command, tmp_path / "thunder", compiler="thunder", **options)
    assert_thunder_acted(whole=case == "full")
    assert_same_losses(eager, compiled)


TWO_RANKS = """
import sys
from pathlib import Path
from litgpt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks(strategy, text, tmp_path):  # noqa: F811
    words = [
        "pretrain",
        "tiny",
        *(
            f"--model_config.{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in LLAMA.items()
        ),
    ]
    words += ["--data=TextFiles", f"--data.train_data_path={text}", "--data.num_workers=0", "--devices=2"]
    words += ["--tokenizer_vocab_size=300", f"--train.max_steps={STEPS}", "--eval.interval=3", "--eval.max_iters=2"]
    words += ["--logger_name=csv", f"--strategy={strategy}", "--optimizer.lr=0.01"]
    words += [f"--train.{name}={value}" for name, value in SMALL.items()]
    for out_dir, more in (("eager", []), ("thunder", ["--compiler=thunder"])):
        on_two_ranks(TWO_RANKS, tmp_path, *words, f"--out_dir={tmp_path / out_dir}", *more, fresh=True)
    assert_same_losses(*(read_metrics(tmp_path / name / "metrics.csv") for name in ("eager", "thunder")))
