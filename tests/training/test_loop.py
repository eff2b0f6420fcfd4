"""What one optimizer step is, when training stops, what it writes down."""

import csv
import math

import pytest
import torch
from lightning_fabric import Fabric

from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training.arguments import EvalArgs
from litgpt.training.batches import micro_batch
from litgpt.training.gradients import Gradients
from litgpt.training.loop import TrainingDiverged, accumulate_gradients
from litgpt.training.loss import NextTokenLoss
from litgpt.training.metrics import COLUMNS, flops_per_token
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.state import Progress
from tests.training.conftest import SHAPE, assert_learns_compiled, compiling, deterministic, weights


def ragged(rows: int) -> list[dict[str, torch.Tensor]]:
    """Samples with 1 to 24 target tokens each."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for row in range(rows):
        ids = torch.randint(0, 250, (25,), generator=generator)
        labels = ids.clone()
        labels[: 24 - 3 * row] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def gradient(fabric: Fabric, sizes: list[int]) -> tuple[dict[str, torch.Tensor], float, int]:
    torch.manual_seed(0)
    gpt = GPT(Config(**SHAPE, vocab_size=300))
    gpt.init_weights()
    samples, batches = iter(ragged(sum(sizes))), []
    for size in sizes:
        chosen = [next(samples) for _ in range(size)]
        batches.append(micro_batch({k: torch.stack([s[k] for s in chosen]) for k in ("input_ids", "labels")}))
    loss, targets = accumulate_gradients(fabric, fabric.setup_module(NextTokenLoss(gpt)), batches)
    return {name: p.grad for name, p in gpt.named_parameters()}, loss.sum().item(), targets


def test_accumulation_does_not_change_the_gradient():
    fabric = Fabric(accelerator="cpu", devices=1)
    whole, loss, targets = gradient(fabric, [8])
    assert targets == sum(3 * row + 1 for row in range(8))
    for sizes in ([1] * 8, [3, 4, 1]):
        parts, part_loss, part_targets = gradient(fabric, sizes)
        assert part_targets == targets
        assert part_loss == pytest.approx(loss, rel=1e-6)
        for name in whole:
            error = (parts[name] - whole[name]).norm() / whole[name].norm()
            assert error < 1e-5, (name, error)


def test_gradient_is_that_of_the_mean_over_target_tokens():
    whole, _, _ = gradient(Fabric(accelerator="cpu", devices=1), [8])
    torch.manual_seed(0)
    gpt = GPT(Config(**SHAPE, vocab_size=300))
    gpt.init_weights()
    batch = micro_batch({k: torch.stack([s[k] for s in ragged(8)]) for k in ("input_ids", "labels")})
    loss = torch.nn.functional.cross_entropy(gpt(batch.idx).flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    loss.backward()
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clipping(dtype):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(3, 1, bias=False, dtype=dtype)
    gradients = Gradients(fabric, model, torch.optim.SGD(model.parameters(), lr=1.0), 0, Progress())
    for max_norm, norm, after in ((1.0, 5.0, 1.0), (9.0, 5.0, 5.0), (None, 5.0, 5.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0, 0.0]], dtype=dtype)
        assert gradients.prepare(1, max_norm, wanted=True).item() == norm
        assert model.weight.grad.norm().item() == pytest.approx(after, rel=1e-5 if dtype != torch.bfloat16 else 1e-2)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 3}, 3),
        ({"max_tokens": 8 * 32 * 4 - 1}, 4),
        ({"max_steps": 9, "max_tokens": 8 * 32 * 2}, 2),
        ({"epochs": 1, "max_steps": 500}, None),
    ],
)
def test_the_first_limit_ends_the_run(train, tmp_path, capsys, limits, steps):
    rows = train(tmp_path / "run", **limits, eval=EvalArgs(interval=1000, max_iters=2), log_interval=1)
    if steps is None:  # one epoch: the whole training text, rounded up to a whole step
        training_tokens = int(capsys.readouterr().out.partition("Training text: ")[2].split()[0].replace(",", ""))
        steps = math.ceil((training_tokens - 1) // 32 / 8)
        assert float(rows[-2]["epoch"]) < 1 == float(rows[-1]["epoch"])
    assert int(rows[-1]["step"]) == len(rows) == steps
    assert rows[-1]["val_loss"]  # the final validation
    assert (tmp_path / "run/final/lit_model.pth").exists()
    assert not list((tmp_path / "run").glob("step-*"))


def test_tokens_end_a_run_of_unknown_length(train, tmp_path, monkeypatch):
    from litgpt.training.arguments import TrainArgs

    for name in ("total_steps", "last_step"):
        monkeypatch.setattr(TrainArgs, name, lambda *args: None)  # as with batches of varying length
    assert [r["tokens"] for r in train(tmp_path / "run", max_tokens=500)] == ["256", "512"]


def test_max_time_ends_the_run(train, tmp_path):
    rows = train(tmp_path / "run", max_time=0.5, log_interval=1000, eval=EvalArgs(interval=1000, max_iters=2))
    assert len(rows) == 1  # nothing but the time ends it, before a step that logs
    assert float(rows[0]["time"]) >= 0.5
    assert int(rows[0]["step"]) < 1000
    assert (tmp_path / "run/final").is_dir()


def test_metrics_and_lines(train, tmp_path, capsys):
    rows = train(tmp_path / "run", max_steps=6, log_interval=2, save_interval=3, keep_last=1,
                 eval=EvalArgs(interval=3, max_iters=2, initial_validation=True, max_new_tokens=5))  # fmt: skip
    with open(tmp_path / "run/metrics.csv") as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    assert [r["step"] for r in rows] == ["0", "2", "3", "4", "6"]
    assert [bool(r["val_loss"]) for r in rows] == [True, False, True, False, True]
    assert [r["iter"] for r in rows[1:]] == ["4", "6", "8", "12"]
    assert [r["tokens"] for r in rows[1:]] == [str(8 * 32 * step) for step in (2, 3, 4, 6)]
    losses = [float(r["loss"]) for r in rows[1:]]
    assert losses[0] > losses[-1]
    assert all(len(r["loss"]) > 10 for r in rows[1:])  # all digits
    assert float(rows[0]["val_loss"]) == pytest.approx(math.log(300), rel=0.1)
    assert all(float(r["tokens_per_sec"]) > 0 and float(r["iter_time"]) > 0 for r in rows[1:])
    assert [float(r["learning_rate"]) for r in rows[1:3]] == pytest.approx([4e-4 * 2 / 5, 4e-4 * 3 / 5])
    assert [p.name for p in sorted((tmp_path / "run").glob("step-*"))] == ["step-00000003"]

    printed = capsys.readouterr().out
    for line in (
        "Seed set to 42",
        "Number of trainable parameters: ",
        "Number of non-trainable parameters: 0",
        "Tokens per step: 4 sequences x 2 accumulation x 1 device x 32 tokens = 256",
        "Training time: ",
        "Memory used: ",
        f"Saving checkpoint to '{tmp_path / 'run/final'}'",
        "The model writes:",
        f"litgpt chat {tmp_path / 'run/final'}",
        f"Epoch 1 | iter 4 step 2 | loss train: {losses[0]:.3f}, val: {float(rows[0]['val_loss']):.3f} | iter time: ",
    ):
        assert line in printed, line
    assert printed.count(" ms (step)\n") == 4
    logs = (tmp_path / "run/logs.txt").read_text()
    # Tokenising is reported by the data module, which knows no run.
    lines = [line for line in printed.splitlines() if not line.startswith("Tokenised ")]
    assert logs.splitlines() == lines
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_validation_does_not_change_training(train, tmp_path):
    plain = train(tmp_path / "plain", max_steps=6)
    validated = train(tmp_path / "validated", max_steps=6, eval=EvalArgs(interval=2, max_iters=2, max_new_tokens=4))
    for row in (*plain, *validated):
        del row["val_loss"]
    assert deterministic(plain) == deterministic(validated)


def test_a_diverging_run_stops_and_saves_nothing_bad(train, tmp_path):
    sgd = OptimizerSpec("SGD", {"lr": 1e15})
    with pytest.raises(
        TrainingDiverged,
        match=r"NaN or infinite at step 2, in the sequence\(s\) that begin with the tokens \d+, .*\d. "
        r"The last good checkpoint is .*step-00000001",
    ):
        train(tmp_path / "run", max_steps=40, log_interval=7, save_interval=1, optimizer=sgd, lr_warmup_steps=0,
              max_norm=None)  # fmt: skip
    assert not (tmp_path / "run/final").exists()
    for name, tensor in weights(tmp_path / "run/step-00000001").items():
        assert tensor.isfinite().all(), name
    assert (tmp_path / "run/loss.png").exists()


def test_flops_count_what_multiplies():
    config = Config(**SHAPE, vocab_size=300)
    gpt, tied = GPT(config), GPT(Config(**SHAPE, vocab_size=300, tie_embeddings=True))
    attention = 12 * 2 * 2 * 16 * 32  # layers, heads, head size, tokens
    table = config.padded_vocab_size * 32
    assert flops_per_token(gpt, 32) == 6 * (gpt.num_parameters() - table) + attention
    assert flops_per_token(tied, 32) == flops_per_token(gpt, 32)


def test_compiled_blocks_learn_the_same(train, tmp_path):
    """`--compile true` compiles the blocks to train and to validate, and the state dict keeps its names."""
    settings = {"max_steps": 3, "optimizer": OptimizerSpec("AdamW", {"lr": 0.01}), "lr_warmup_steps": 0}
    plain = train(tmp_path / "plain", **settings)
    with compiling() as graphs:
        compiled = train(tmp_path / "compiled", **settings, compile=True)
    assert_learns_compiled(plain, compiled, graphs)
    assert float(plain[-1]["val_loss"]) == pytest.approx(float(compiled[-1]["val_loss"]), rel=1e-5)
    expected, actual = weights(tmp_path / "plain/final"), weights(tmp_path / "compiled/final")
    assert expected.keys() == actual.keys()
