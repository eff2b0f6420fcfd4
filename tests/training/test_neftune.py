"""NEFTune's noise: as large as the paper says, in training only."""

import pytest
import torch

from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.loss import NextTokenLoss
from litgpt.training.neftune import add_noise, document_lengths
from tests.training.conftest import SHAPE

MODEL = {**SHAPE, "vocab_size": 300}
IDX = torch.arange(32)[None].expand(64, 32)


def noisy(alpha: float | None) -> NextTokenLoss:
    torch.manual_seed(0)
    model = NextTokenLoss(GPT(Config(**MODEL)))
    add_noise(model, alpha)
    return model


def noise_on(model: NextTokenLoss, **inputs: torch.Tensor) -> torch.Tensor:
    """(B, T, C) what the first block gets beyond the embedding."""
    seen: list[torch.Tensor] = []
    handle = model.gpt.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(IDX, IDX, **inputs)
    handle.remove()
    return (seen[0] - model.gpt.transformer.wte.weight[IDX]).detach()


def test_size_of_the_noise():
    noise = noise_on(noisy(5.0))
    limit = 5 / (32 * 32) ** 0.5  # T tokens of C values
    assert 0.99 * limit < noise.abs().max() <= limit * 1.001
    assert noise.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)  # of a uniform distribution
    assert abs(noise.mean().item()) < 0.02 * limit


def test_packed_documents_have_noise_as_if_alone():
    ids = torch.cat((torch.zeros(8), torch.ones(24))).long()[None].expand(64, 32)
    noise = noise_on(noisy(5.0), document_ids=ids)
    for part, length in ((noise[:, :8], 8), (noise[:, 8:], 24)):
        limit = 5 / (length * 32) ** 0.5
        assert 0.99 * limit < part.abs().max() <= limit * 1.001
    assert document_lengths(torch.tensor([[0, 0, 1, -1, -1, -1]])).flatten().tolist() == [2, 2, 1, 3, 3, 3]


def test_none_without_training_and_none_without_the_option():
    model = noisy(5.0)
    model.eval()
    assert noise_on(model).count_nonzero() == 0
    assert noise_on(noisy(None)).count_nonzero() == 0
    with pytest.raises(ValueError, match=r"train\.neftune_noise_alpha=0 must be positive"):
        TrainArgs(neftune_noise_alpha=0)


def test_validation_has_no_noise(train, tmp_path):
    """The first validation comes before the first step."""
    evaluation = EvalArgs(interval=10, max_iters=2, initial_validation=True)
    plain = train(tmp_path / "plain", max_steps=1, eval=evaluation)
    noisy = train(tmp_path / "noisy", max_steps=1, eval=evaluation, neftune_noise_alpha=10.0)
    assert plain[0]["val_loss"] == noisy[0]["val_loss"]
    assert plain[1]["loss"] != noisy[1]["loss"]
