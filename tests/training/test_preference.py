"""The loss on pairs: the papers' formulas computed from `transformers`' logits, in value and in every gradient."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from peft import PeftModel
from safetensors.torch import load_file

from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora
from litgpt.data.packing import PackedSample
from litgpt.data.preferences import PairCollate
from litgpt.export.peft_writer import export_peft
from litgpt.sources.load import load_model
from litgpt.training import preference
from litgpt.training.batches import MicroBatch, micro_batch
from litgpt.training.neftune import add_noise
from litgpt.training.preference import PreferenceLoss, PreferenceSettings, reference_log_probs
from tests.parity import test_architectures as architectures

BETA = 0.3
VARIANTS = {
    "DPO": PreferenceSettings(beta=BETA),
    "conservative DPO": PreferenceSettings(beta=BETA, label_smoothing=0.2),
    "IPO": PreferenceSettings("ipo", beta=BETA),
}
LORA = LoRASettings(r=3, alpha=7, dropout=0.5, key=True, projection=True, mlp=True, head=True)
# Pairs of (tokens of the prompt, of the chosen and of the rejected reply)
PAIRS = [(5, 9, 2), (3, 1, 12), (8, 4, 4)]


def replies() -> list[tuple[torch.Tensor, int]]:
    """Each row's ids, and where its reply begins; chosen and rejected in turn, with one prompt."""
    generator, rows = torch.Generator().manual_seed(5), []
    for prompt, *lengths in PAIRS:
        start = torch.randint(3, architectures.VOCABULARY, (prompt,), generator=generator)
        for length in lengths:
            reply = torch.randint(3, architectures.VOCABULARY, (length,), generator=generator)
            rows.append((torch.cat([start, reply]), prompt))
    return rows


def batch(first: int = 0, last: int = len(PAIRS)) -> MicroBatch:
    parts = [PackedSample(i, ids.numpy(), np.arange(len(ids)) >= start) for i, (ids, start) in enumerate(replies())]
    return micro_batch(PairCollate(False)([parts[2 * pair : 2 * pair + 2] for pair in range(first, last)]))


def log_probs(model) -> torch.Tensor:
    """(2P,) of each reply under a model of `transformers`, one row at a time, in float64."""
    found = []
    for ids, start in replies():
        logits = model(ids[None]).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None])[start - 1 :, 0].sum())
    return torch.stack(found)


def papers_loss(variant: str, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Summed over pairs."""
    (y_w, y_l), (ref_w, ref_l) = policy.view(-1, 2).T, reference.view(-1, 2).T
    if variant == "IPO":
        return (((y_w - ref_w) - (y_l - ref_l) - 1 / (2 * BETA)) ** 2).sum()
    p = torch.sigmoid(BETA * (y_w - ref_w) - BETA * (y_l - ref_l))
    smoothing = 0.2 if variant == "conservative DPO" else 0.0
    return -((1 - smoothing) * p.log() + smoothing * (1 - p).log()).sum()


def rewards(policy: torch.Tensor, reference: torch.Tensor) -> list[float]:
    chosen, rejected = (BETA * (policy - reference)).detach().view(-1, 2).T
    return [chosen.sum(), rejected.sum(), (chosen - rejected).sum(), (chosen > rejected).sum()]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(preference, "rows_per_chunk", lambda device, vocabulary: 7)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(the reference model, one that has learned something from it, the directories of both)"""
    folders = [tmp_path_factory.mktemp(name) for name in ("base", "learned")]
    base = architectures.build("Llama", folders[0]).reference
    learned = deepcopy(base)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in learned.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    learned.save_pretrained(folders[1])
    return base, learned, *folders


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-4 * theirs.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_loss_and_every_gradient(variant, llama, tmp_path):
    base, learned, _, folder = llama
    with torch.no_grad():
        reference = log_probs(base)
    learned.zero_grad()
    policy = log_probs(learned)
    expected = papers_loss(variant, policy, reference)
    expected.backward()
    assert (policy - reference).abs().mean() > 1, "otherwise it would matter little which is which"

    ours = load_model(folder, dtype=torch.float32)
    pairs = batch()
    loss, *figures = PreferenceLoss(ours, VARIANTS[variant])(
        pairs.idx, pairs.targets, reference_log_probs=reference, **pairs.inputs
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [f.item() for f in figures] == pytest.approx([float(f) for f in rewards(policy, reference)], rel=1e-4)

    # The reference's gradients, saved as if they were weights, are read through the same rules.
    gradients = deepcopy(learned)
    for p, of in zip(gradients.parameters(), learned.parameters(), strict=True):
        p.data = of.grad
    gradients.save_pretrained(tmp_path)
    theirs = dict(load_model(tmp_path, dtype=torch.float32).named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert close(p.grad, theirs[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_loss_and_every_gradient(variant, llama, tmp_path):
    """... against `peft`; the reference is the model without its adapter."""
    base, _, folder, _ = llama
    ours = load_model(folder, dtype=torch.float32)
    apply_lora(ours, LORA)
    torch.manual_seed(3)
    matrices = {name: p for name, p in ours.named_parameters() if is_lora(name)}
    with torch.no_grad():
        for p in matrices.values():
            p.add_(torch.randn_like(p) * 0.05)
    export_peft(matrices, LORA, ours.config, type(base).__name__, "org/model", _made(tmp_path / "adapter"))
    peft = PeftModel.from_pretrained(deepcopy(base), tmp_path / "adapter", is_trainable=True).eval()
    policy = log_probs(peft)
    with torch.no_grad(), peft.disable_adapter():
        reference = log_probs(peft)
    expected = papers_loss(variant, policy, reference)
    expected.backward()

    pairs = batch()
    loss, *figures = PreferenceLoss(ours.eval(), VARIANTS[variant])(pairs.idx, pairs.targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [f.item() for f in figures] == pytest.approx([float(f) for f in rewards(policy, reference)], rel=1e-4)
    gradients = {name: p.grad for name, p in matrices.items()}
    export_peft(gradients, LORA, ours.config, type(base).__name__, "org/model", _made(tmp_path / "gradients"))
    written = load_file(tmp_path / "gradients/adapter_model.safetensors")
    theirs = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if ".lora_" in n}
    assert written.keys() == theirs.keys()
    for name, gradient in written.items():
        assert close(gradient, theirs[name]), name
    assert all(p.grad is None for name, p in ours.named_parameters() if not is_lora(name))


def _made(folder):
    folder.mkdir()
    return folder


def test_the_reference_is_the_base_without_dropout_and_noise(llama):
    base, _, folder, _ = llama
    gpt = load_model(folder, dtype=torch.float32)
    apply_lora(gpt, LORA)
    loss = PreferenceLoss(gpt, VARIANTS["DPO"])
    add_noise(loss, 100.0)
    with torch.no_grad():
        expected = log_probs(base)
        for name, p in gpt.named_parameters():
            if is_lora(name):
                p.add_(1.0)
    loss.train()
    pairs, seen = batch(), []
    compute = loss._log_probs
    loss._log_probs = lambda *args: seen.append(compute(*args)) or seen[-1]
    loss(pairs.idx, pairs.targets).sum().backward()
    reference, policy = (by_token.double().sum(dim=1) for by_token, _ in seen)
    torch.testing.assert_close(reference, expected, rtol=1e-6, atol=1e-5)
    assert (policy - expected).abs().max() > 0.5
    assert gpt.training
    assert not reference.requires_grad
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in gpt.parameters())


def test_pairs_are_the_terms_and_those_without_targets_do_not_count(llama):
    _, _, folder, _ = llama
    gpt = load_model(folder, dtype=torch.float32)
    loss = PreferenceLoss(gpt, VARIANTS["IPO"])
    reference = torch.linspace(-90, -40, 2 * len(PAIRS))
    sums = []
    for first, last in ((0, 3), (0, 1), (1, 3)):
        pairs = batch(first, last)
        assert loss.num_terms(pairs) == last - first
        sums.append(loss(pairs.idx, pairs.targets, reference[2 * first : 2 * last]))
    torch.testing.assert_close(sums[0], sums[1] + sums[2], rtol=1e-5, atol=1e-4)
    half = batch()
    half.targets[1] = -100  # the first pair has no rejected reply
    assert loss.num_terms(half) == 2
    torch.testing.assert_close(loss(half.idx, half.targets, reference), sums[2], rtol=1e-5, atol=1e-4)
    nothing = batch().without_targets()
    assert loss.num_terms(nothing) == 0
    assert loss(nothing.idx, nothing.targets, reference).tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tie_is_no_win(dtype, llama):
    """Neither an exact one nor one that the last bits decide: the model is its own reference, but for those."""
    _, _, folder, _ = llama
    loss, pairs = PreferenceLoss(load_model(folder, dtype=dtype), VARIANTS["DPO"]), batch()
    one_by_one = list(zip(pairs.idx.split(2), pairs.targets.split(2), strict=True))

    def wins(reference: torch.Tensor) -> list[int]:
        return [int(loss(*pair, two)[4]) for pair, two in zip(one_by_one, reference.split(2), strict=True)]

    with torch.no_grad():
        own = torch.cat([loss(*pair, log_probs_alone=True) for pair in one_by_one])
        assert wins(own) == [0, 0, 0]
        assert wins(loss(pairs.idx, pairs.targets, log_probs_alone=True)) == [0, 0, 0]  # in a batch of another shape
        last_bits = torch.finfo(dtype).eps * own.view(-1, 2).abs() * torch.tensor([0.1, -0.1])
        assert wins(own - last_bits.flatten()) == wins(own + last_bits.flatten()) == [0, 0, 0]
        clearly = torch.tensor([1e-3 if dtype == torch.float32 else 0.5, 0.0]).repeat(len(PAIRS))
        assert wins(own - clearly) == [1, 1, 1]
        assert wins(own + clearly) == [0, 0, 0]


def test_reference_log_probs_of_all_rows(llama):
    base, _, folder, _ = llama
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup_module(PreferenceLoss(load_model(folder, dtype=torch.float32), VARIANTS["DPO"]))
    parts = [PackedSample(i, ids.numpy(), np.arange(len(ids)) >= start) for i, (ids, start) in enumerate(replies())]
    batches = [PairCollate(False)([parts[:2], parts[2:4]]), PairCollate(False)([parts[4:]])]
    found = reference_log_probs(fabric, model, batches, 2 * len(PAIRS))
    with torch.no_grad():
        torch.testing.assert_close(found, log_probs(base), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.0}, "beta=0.0: must be positive"),
        ({"loss": "hinge"}, "loss=hinge: choose sigmoid or ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5: must be at least 0 and below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 is for loss=sigmoid"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSettings(**values)
