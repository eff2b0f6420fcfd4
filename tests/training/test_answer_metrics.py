"""Answers to validation samples are scored while finetuning: what is recorded, what it decides, and what it leaves alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchmetrics.text

from litgpt import LLM
from litgpt.__main__ import main
from litgpt.adaptation.lora import LORA_WEIGHTS
from litgpt.checkpoint import WEIGHTS, read_state_dict, save_model
from litgpt.commands import pretrain
from litgpt.data import JSON, Preferences
from litgpt.generation.in_training import complete_in_training
from litgpt.generation.request import Request
from litgpt.runs.options import RunOptions
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.arguments import EvalArgs
from litgpt.training.metrics import read_metrics
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.state import read_training_state
from tests import checkpoint_files
from tests.training import test_finetune_dpo
from tests.training.conftest import assert_same_run, deterministic, killed_in_step, on_two_ranks
from tests.training.test_finetune import run

FAST = OptimizerSpec("AdamW", {"lr": 0.01})
STUCK = OptimizerSpec("AdamW", {"lr": 0.0})
CHRF = {"class_path": "torchmetrics.text.CHRFScore", "init_args": {"n_word_order": 0}, "name": "chrf"}
METRICS = ["exact_match", "rouge", "bleu", CHRF]
FIGURES = ["exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"]
KNOWN = {
    "Colour of grass?": "green as can be",
    "Colour of snow?": "white as a sheet",
    "Colour of coal?": "black as night",
}
UNKNOWN = {"Colour of a lemon?": "yellow", "Colour of blood?": "red"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = checkpoint_files.chat_model(tmp_path_factory.mktemp("base"))
    model = load_model(directory)
    torch.manual_seed(0)
    model.init_weights()
    save_model(directory, model, model.config)
    return directory


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Three questions to learn, and the same three and two others to be asked."""
    directory = tmp_path_factory.mktemp("colours")
    for name, pairs in (("train", list(KNOWN.items()) * 4), ("val", [*KNOWN.items(), *UNKNOWN.items()])):
        rows = [{"instruction": question, "output": answer} for question, answer in pairs]
        (directory / f"{name}.json").write_text(json.dumps(rows))
    return directory


def finetune(method: str, base: Path, records: Path, out_dir: Path, eval: EvalArgs, **options) -> list[dict]:
    data = {"val_split_fraction": None, "prompt_style": "alpaca", **options.pop("data", {})}
    return run(method, base, records, out_dir, data, eval=eval, **options)


def test_an_overfitted_model_answers_exactly(base, colours, tmp_path, capsys):
    """Every figure is torchmetrics' own on what the saved checkpoints answer, and the best is kept by one of them."""
    evaluation = EvalArgs(interval=15, max_new_tokens=30, metrics=METRICS, best_by="rougeL")
    settings = {"save_interval": 15, "optimizer": FAST, "logger_name": "tensorboard"}
    rows = finetune("full", base, colours, tmp_path, evaluation, max_steps=60, **settings)
    scored = {int(row["step"]): row for row in rows if row["val_exact_match"]}
    assert list(scored) == [15, 30, 45, 60]
    assert float(scored[60]["val_exact_match"]) == pytest.approx(3 / 5)
    distinct = set()
    for step, row in scored.items():
        llm = LLM.load(tmp_path / (f"step-{step:08d}" if step < 60 else "final"), precision="32-true")
        answers = llm.generate([*KNOWN, *UNKNOWN], max_new_tokens=30, temperature=0)
        references = [*KNOWN.values(), *UNKNOWN.values()]
        if step == 60:
            assert answers[:3] == list(KNOWN.values())
        rouge = torchmetrics.text.ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))
        expected = {key.removesuffix("_fmeasure"): value for key, value in rouge(answers, references).items()}
        bleu, chrf = torchmetrics.text.BLEUScore(), torchmetrics.text.CHRFScore(n_word_order=0)
        expected["bleu"], expected["chrf"] = (metric(answers, [[r] for r in references]) for metric in (bleu, chrf))
        matches = [answer.strip() == reference for answer, reference in zip(answers, references, strict=True)]
        expected["exact_match"] = sum(matches) / len(matches)
        for name in FIGURES:
            assert float(row[f"val_{name}"]) == pytest.approx(float(expected[name]), abs=1e-6), (step, name)
            distinct.add(row[f"val_{name}"])
    assert len(distinct) > 5
    best = max(scored, key=lambda step: float(scored[step]["val_rougeL"]))
    progress = read_training_state(tmp_path / "best")["progress"]
    assert (progress["best_step"], progress["best_by"]) == (best, "rougeL")
    output = capsys.readouterr().out
    assert (
        "after each validation 5 of 5 validation samples are answered, with at most 30 tokens, and scored: " in output
    )
    assert f"Highest val_rougeL: {progress['best_value']:.3f}, at step {best}: {tmp_path / 'best'}" in output
    assert f"step 60 | exact_match: {3 / 5:.3f}, rouge1: " in output
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*"))
    assert all(f"val_{name}".encode() in events for name in FIGURES)


def test_training_goes_on_as_if_nothing_had_been_answered(base, colours, tmp_path):
    """Losses and weights are the same bit for bit: dropout, noise, the order of the data, blocks computed again."""
    settings = {"max_steps": 6, "neftune_noise_alpha": 5.0, "activation_checkpointing": "full", "lora_dropout": 0.2}
    plain = EvalArgs(interval=2, max_iters=3)
    rows = finetune("lora", base, colours, tmp_path / "without", plain, **settings)
    scored = replace(plain, max_new_tokens=8, metrics=METRICS, max_answers=2, evaluate_example=4)
    with_metrics = finetune("lora", base, colours, tmp_path / "with", scored, **settings)
    columns = [f"val_{name}" for name in FIGURES]
    assert with_metrics[1]["val_chrf"] != ""
    assert [{k: v for k, v in row.items() if k not in columns} for row in deterministic(with_metrics)] == deterministic(
        rows
    )
    without, expected = (read_state_dict(tmp_path / name / "final" / LORA_WEIGHTS) for name in ("with", "without"))
    assert all(torch.equal(without[name], tensor) for name, tensor in expected.items())


ON_TWO_RANKS = """
import json
import sys
from pathlib import Path
from litgpt.training.arguments import EvalArgs
from tests.training.test_finetune import run
base, records, out_dir, metrics = sys.argv[1:]
settings, data = {"max_steps": 4, "devices": 2}, {"prompt_style": "alpaca"}
evaluation = EvalArgs(interval=2, max_iters=3, max_new_tokens=4)
run("lora", Path(base), Path(records), Path(out_dir) / "plain", data, **settings, eval=evaluation)
assert not {"torchmetrics", "transformers"} & set(sys.modules)  # nobody has asked for a metric
for method, strategy in (("dora", "ddp"), ("full", "fsdp")):
    evaluation = EvalArgs(**json.loads(metrics))
    run(method, Path(base), Path(records), Path(out_dir) / method, data, **settings, strategy=strategy, eval=evaluation)
"""


def test_two_ranks_equal_one(base, tmp_path):
    """Five samples for two ranks, whose answers are of different lengths. Sharded models are whole meanwhile, and go on
    training in step. Without metrics, torchmetrics is not imported, nor what it imports."""
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 41)]
    records = tmp_path / "records.json"
    records.write_text(json.dumps(rows))
    evaluation = {"interval": 2, "max_iters": 3, "max_new_tokens": 9, "metrics": METRICS, "best_by": "chrf"}
    evaluation["max_answers"] = 5
    on_two_ranks(ON_TWO_RANKS, tmp_path, base, records, tmp_path / "two", json.dumps(evaluation))
    for method in ("dora", "full"):
        data = {"prompt_style": "alpaca"}
        run(method, base, records, tmp_path / "one" / method, data, max_steps=4, eval=EvalArgs(**evaluation))
        one, two = (read_metrics(tmp_path / ranks / method / "metrics.csv") for ranks in ("one", "two"))
        for single, double in zip(one, two, strict=True):
            assert float(single["loss"]) == pytest.approx(float(double["loss"]), rel=1e-5)
            for name in FIGURES:
                assert single[f"val_{name}"] == double[f"val_{name}"]
        assert {row["val_chrf"] for row in one} > {"", "0.0"}
        best = {
            read_training_state(tmp_path / ranks / method / "final")["progress"]["best_step"]
            for ranks in ("one", "two")
        }
        assert len(best) == 1


def test_out_of_patience_by_a_metric(base, colours, tmp_path, monkeypatch, capsys):
    """No answer gets better: the run ends, and does so as early when it was killed in between."""
    evaluation = EvalArgs(
        interval=1, max_iters=1, max_new_tokens=2, metrics="exact_match", best_by="exact_match", patience=2
    )
    settings = {"max_steps": 9, "optimizer": STUCK, "save_interval": None}
    finetune("full", base, colours, tmp_path / "whole", evaluation, **settings)
    output = capsys.readouterr().out
    assert f"Highest val_exact_match: 0.000, at step 1: {tmp_path / 'whole/best'}" in output
    assert "No higher one came in 2 validations (--eval.patience): training ends." in output
    with killed_in_step(3, monkeypatch):
        finetune("full", base, colours, tmp_path / "parts", evaluation, **settings)
    finetune("full", base, colours, tmp_path / "parts", evaluation, **settings, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=3, file=WEIGHTS)
    # By another figure, nothing was the best yet.
    by_loss = replace(evaluation, best_by="loss", metrics=None)
    assert len(finetune("full", base, colours, tmp_path / "parts", by_loss, **settings, resume="auto")) == 6


def test_pairs_are_compared_with_the_chosen_reply(base, tmp_path):
    rows = [{"prompt": f"Count to {n}.", "chosen": f"1 to {n}", "rejected": "no " * n} for n in range(2, 12)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    evaluation = EvalArgs(interval=1, max_iters=2, max_new_tokens=3, metrics=[CHRF], best_by="chrf")
    rows = test_finetune_dpo.run("lora", base, path, tmp_path / "out", max_steps=1, eval=evaluation)
    assert rows[0]["val_chrf"] != ""
    data, tokenizer = Preferences(json_path=path, val_split_fraction=0.5), Tokenizer(base)
    data.connect(tokenizer, 1, 200)
    data.prepare_data()
    data.setup()
    assert data.num_examples == 5
    for index in range(5):
        number = data.example(index)[-1]["content"].split()[-1].rstrip(".")
        assert tokenizer.decode(data.example_reply(index)) == f"1 to {number}"


def test_answers_are_compared_with_whole_last_replies(base, tmp_path):
    """What ends a turn is no part of a reply; one that was cut off is none."""
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?"), ("assistant", "Bye, and take care!")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "train.json").write_text(json.dumps([{"messages": messages}]))
    (tmp_path / "val.json").write_text(json.dumps([{"messages": messages}, {"messages": messages[:2]}]))
    data, tokenizer = JSON(json_path=tmp_path), Tokenizer(base)

    def replies(limit: int) -> list[str | None]:
        data.connect(tokenizer, 1, limit)
        data.prepare_data()
        data.setup()
        ids = [data.example_reply(index) for index in range(data.num_examples)]
        return [None if reply is None else tokenizer.decode(reply, skip_special=False) for reply in ids]

    assert replies(500) == ["Bye, and take care!", "Hello!"]
    longest = data.val_samples.summary.longest
    assert replies(longest - 2) == [None, "Hello!"]


@pytest.mark.parametrize(
    ("evaluation", "more", "message"),
    [
        ({"metrics": ["exactmatch"]}, {}, r"eval\.metrics=exactmatch is unknown\. Did you mean 'exact_match'\?"),
        (
            {"metrics": ["bleu"], "best_by": "rougeL"},
            {},
            r"eval\.best_by=rougeL: this run has no such figure\..* loss, bleu",
        ),
        (
            {"best_by": "exact_match"},
            {},
            r"eval\.best_by=exact_match: this run has no such figure\. Choose from loss; ",
        ),
        ({"metrics": ["bleu"], "max_new_tokens": None}, {}, r"eval\.max_new_tokens=null generates none"),
        ({"metrics": ["bleu"]}, {"data": {"val_split_fraction": 0.0}}, "`eval.metrics`: there is no validation data"),
        ({"metrics": ["bleu"]}, {"max_seq_length": 40}, "of all 5 validation samples the reply was cut off"),
        ({"evaluate_example": 5}, {}, r"eval\.evaluate_example=5: there are 5 validation samples, from 0 on"),
    ],
)
def test_what_cannot_be_is_said_before_training(evaluation, more, message, base, colours, tmp_path, monkeypatch):
    records = colours / "train.json" if "data" in more else colours
    monkeypatch.setattr("litgpt.runs.finetuning.load_model", None)  # nor are weights read
    with pytest.raises(ValueError, match=message):
        finetune("full", base, records, tmp_path, EvalArgs(**{"max_new_tokens": 4, **evaluation}), max_steps=1, **more)


def test_pretraining_has_no_answers(tmp_path, capsys):
    assert main(["pretrain", "pythia-14m", "--eval.metrics", "bleu", "--out_dir", str(tmp_path)]) == 1
    assert "--eval.metrics is for finetuning: " in capsys.readouterr().err
    options = RunOptions(data=JSON(json_path=tmp_path), eval=EvalArgs(best_by="bleu"))
    with pytest.raises(ValueError, match="this run has no such figure"):
        pretrain.setup("pythia-14m", out_dir=tmp_path, options=options)


def test_the_command_line_says_what_it_will_do(base, colours, tmp_path, capsys):
    spec = "[exact_match, {class_path: torchmetrics.text.BLEUScore, init_args: {n_gram: 2}}]"
    command = ["finetune_lora", base, "--data", "JSON", "--data.json_path", colours, "--out_dir", tmp_path / "out"]
    command += ["--eval.metrics", spec, "--eval.max_answers", 2, "--eval.max_new_tokens", 5, "--dry_run"]
    assert main([str(word) for word in [*command, "--eval.best_by", "BLEUScore"]]) == 0
    assert (
        "Metrics: after each validation 2 of 5 validation samples are answered, with at most 5 tokens, and scored: "
        "exact_match, BLEUScore. 2 of the replies are longer than that; --eval.max_new_tokens gives answers more room.\n"
    ) in capsys.readouterr().out


def test_answers_in_training_leave_no_trace(base):
    """Nothing is compiled for them, the modes of all modules and the random numbers stay what they were."""
    gpt, compiled = load_model(base).train(), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    for block in gpt.transformer.h:
        block.compile(backend=backend)
    gpt.transformer.h[0].eval()
    modes, numbers = [module.training for module in gpt.modules()], torch.get_rng_state()
    first, second = complete_in_training(gpt, [Request([5, 6, 7], 4), Request([8], 9)])
    assert (len(first), len(second), compiled) == (4, 9, [])
    assert [module.training for module in gpt.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    gpt(torch.tensor([[5, 6, 7]])).sum().backward()
    assert compiled
