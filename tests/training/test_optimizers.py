"""Every kind of optimizer resumes exactly; Muon is torch's for the hidden matrices and AdamW for the rest."""

import pytest
import torch

from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training.muon import MuonWithAdamW
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.schedule import Schedule
from litgpt.training.state import load_optimizer_state, optimizer_state
from tests.training.conftest import SHAPE, assert_same_run, killed_in_step

MODEL = {**SHAPE, "vocab_size": 300}
RATE = {"lr": 1e-3}


def model(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(Config(**{**MODEL, "n_embd": 128}))  # bitsandbytes keeps 8 bits of tensors from 4,096 values on
    gpt.init_weights()
    return gpt.to(dtype)


def steps(gpt: GPT, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        idx = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(number))
        gpt(idx).float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("AdamW", {}), ("SGD", {}), ("SGD", {"momentum": 0.9}), ("Muon", {}), ("Adafactor", {}), ("Adagrad", {})),
        ("bitsandbytes.optim.AdamW8bit", {}),
        (f"{__name__}.Float32Momentum", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_optimizer_keeps_is_known_before_it_is_made(name, arguments, dtype):
    if name.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    spec, gpt = OptimizerSpec(name, {**RATE, **arguments}), model(dtype)
    expected = spec.state_ratio(gpt.to("meta").named_parameters())
    gpt = model(dtype)
    optimizer = spec.build(gpt.named_parameters())
    steps(gpt, optimizer, range(1))
    state = {t.data_ptr(): t for of in optimizer.state.values() for t in of.values() if torch.is_tensor(t) and t.ndim}
    weights = sum(p.numel() * p.itemsize for p in gpt.parameters())
    assert expected == pytest.approx(sum(t.numel() * t.itemsize for t in state.values()) / weights, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        *("AdamW", "SGD", "Adafactor", "NAdam", "Adagrad", "Muon"),
        *("bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.Lion8bit", "bitsandbytes.optim.AdamW32bit"),
        f"{__name__}.Float32Momentum",
    ],
)
def test_state_comes_back_exactly(tmp_path, name, dtype):
    if name.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    spec = OptimizerSpec(name, RATE)
    gpt = model(dtype)
    optimizer = spec.build(gpt.named_parameters())
    steps(gpt, optimizer, range(3))
    torch.save([gpt.state_dict(), optimizer_state(optimizer)], tmp_path / "state.pth")
    steps(gpt, optimizer, range(3, 6))

    weights, state = torch.load(tmp_path / "state.pth", weights_only=True)
    resumed = model(dtype)
    resumed.load_state_dict(weights)
    optimizer = spec.build(resumed.named_parameters())
    load_optimizer_state(optimizer, state)
    steps(resumed, optimizer, range(3, 6))
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


class Float32Momentum(torch.optim.Optimizer):
    """Keeps float32 for parameters in bfloat16, which torch would round when it loads them."""

    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["sum"] = p.grad.float() + 0.9 * state.get("sum", 0)
                p.sub_(group["lr"] * state["sum"])


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": OptimizerSpec("Muon", RATE)},
        {"optimizer": OptimizerSpec("bitsandbytes.optim.AdamW8bit", RATE), "shape": {**SHAPE, "n_embd": 128}},
        {"neftune_noise_alpha": 5.0, "activation_checkpointing": 2, "lr_schedule": "warmup-stable-decay"},
    ],
    ids=["Muon", "AdamW8bit", "noise"],
)
def test_a_killed_run_goes_on_exactly(train, tmp_path, monkeypatch, options):
    if "shape" in options:
        pytest.importorskip("bitsandbytes")
    train(tmp_path / "whole", max_steps=10, save_interval=4, **options)
    with killed_in_step(7, monkeypatch):
        train(tmp_path / "parts", max_steps=10, save_interval=4, **options)
    torch.manual_seed(7)
    train(tmp_path / "parts", max_steps=10, save_interval=4, resume="auto", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=10)


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    gpt, expected = model(), model()
    optimizer = OptimizerSpec("Muon", {**RATE, "weight_decay": 0.01}).build(gpt.named_parameters())
    assert isinstance(optimizer, MuonWithAdamW)
    hidden = [p for name, p in expected.transformer.h.named_parameters() if p.ndim == 2]
    rest = [p for p in expected.parameters() if all(p is not q for q in hidden)]
    assert len(hidden) == 10  # qkv, proj, fc_1, fc_2, proj of each block
    parts = [
        torch.optim.Muon(hidden, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95)),
    ]
    for number in range(4):
        rate = Schedule(warmup_steps=3).apply(optimizer, number)
        for part in parts:
            assert part.param_groups[0].setdefault("initial_lr", 1e-3) == 1e-3
            part.param_groups[0]["lr"] = rate
        steps(gpt, optimizer, range(number, number + 1))
        idx = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(number))
        expected(idx).logsumexp(-1).mean().backward()
        for part in parts:
            part.step()
            part.zero_grad()
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_muon_keeps_the_settings_of_groups_and_goes_through_a_state_dict():
    matrices = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    vector = torch.nn.Parameter(torch.randn(4))
    optimizer = MuonWithAdamW([{"params": [matrices[0], vector]}, {"params": [matrices[1]], "lr": 0.5}], lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.1]
    for p in (*matrices, vector):
        p.grad = torch.ones_like(p)
    optimizer.load_state_dict(optimizer.state_dict())
    before = [p.clone() for p in (*matrices, vector)]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, (*matrices, vector), strict=True))
    assert len(optimizer.state) == len(optimizer.state_dict()["state"]) == 3
    only = MuonWithAdamW([vector], lr=0.1)
    only.step()
    with pytest.raises(ValueError, match="optimizer=Muon with lr=-1"):
        OptimizerSpec("Muon", {"lr": -1}).build(matrices)


def test_bitsandbytes_with_sharded_weights_is_refused_before_any_work(train, tmp_path):
    pytest.importorskip("bitsandbytes")
    spec = OptimizerSpec("bitsandbytes.optim.AdamW8bit", RATE)
    with pytest.raises(ValueError, match=r"optimizer=bitsandbytes\.optim\.AdamW8bit cannot .*strategy=ddp"):
        train(tmp_path / "run", max_steps=2, optimizer=spec, devices=2, micro_batch_size=2)
    assert not (tmp_path / "run").exists()
