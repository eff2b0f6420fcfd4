"""Tiny random models of `transformers`, read through the converter: the same logits, in one go and decoded step by step."""

import pytest
import torch
import transformers

from litgpt.convert import load_model, open_checkpoint

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # large enough that every part matters to the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**COMMON, "intermediate_size": 112, "num_key_value_heads": 2, "tie_word_embeddings": False}
NEOX = {**COMMON, "intermediate_size": 256, "tie_word_embeddings": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("Llama", LLAMA),
    "llama multi-head, tied": ("Llama", {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama multi-query, wide heads": ("Llama", {**LLAMA, "num_key_value_heads": 1, "head_dim": 32}),
    "llama biases": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama linear rope": (
        "Llama",
        {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama llama3 rope": ("Llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "llama yarn rope": ("Llama", {**LLAMA, "rope_parameters": YARN_ROPE}),
    "neox parallel": ("GPTNeoX", NEOX),
    "neox sequential, half rotated": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "rotary_pct": 0.5}),
}


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """The reference and our model, with the weights of one directory."""
    family, values = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**values)
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in reference.named_parameters():
        if p.dim() == 1:  # norms and biases, which start at 1 and 0
            p.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    reference.save_pretrained(tmp_path)
    ours = load_model(open_checkpoint(tmp_path), dtype=torch.float32)
    assert ours.config.tie_embeddings == config.tie_word_embeddings
    return reference, ours


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return (ours[..., :VOCABULARY].float() - reference.float()).abs().max().item()


@torch.inference_mode()
def test_full_forward(pair):
    reference, ours = pair
    idx = tokens(2, 40)
    expected = reference(idx).logits
    assert expected.abs().max() > 1, "otherwise 1e-4 says little"
    assert distance(ours(idx), expected) < 1e-4


@torch.inference_mode()
def test_cached_decode(pair):
    """A prompt in two chunks, then token by token, against the reference with a cache of its own."""
    reference, ours = pair
    idx, positions = tokens(2, 30), torch.arange(30).expand(2, 30)
    prefill = reference(idx[:, :13], use_cache=True)
    theirs, past = [prefill.logits], prefill.past_key_values
    for t in range(13, 30):
        step = reference(idx[:, [t]], past_key_values=past, use_cache=True)
        theirs.append(step.logits)
        past = step.past_key_values
    cache = ours.new_cache(2, 30)
    logits = [ours(idx[:, :8], cache=cache), ours(idx[:, 8:13], positions[:, 8:13], cache=cache)]
    logits += [ours(idx[:, [t]], positions[:, [t]], cache=cache) for t in range(13, 30)]
    assert distance(torch.cat(logits, dim=1), torch.cat(theirs, dim=1)) < 1e-4


@torch.inference_mode()
def test_rows_of_unequal_length(pair):
    reference, ours = pair
    idx, lengths = tokens(2, 20), torch.tensor([20, 11])
    positions = torch.arange(20).expand(2, 20)
    logits = ours(idx, positions.masked_fill(positions >= lengths[:, None], -1), cache=ours.new_cache(2, 20))
    for row, length in enumerate(lengths):
        assert distance(logits[row, :length], reference(idx[row, :length][None]).logits[0]) < 1e-4


def test_gradients(pair):
    reference, ours = pair
    idx = tokens(2, 24)
    loss = reference(idx, labels=idx).loss
    loss.backward()
    logits = ours.train()(idx)[:, :-1, :VOCABULARY].flatten(0, 1)
    our_loss = torch.nn.functional.cross_entropy(logits, idx[:, 1:].flatten())
    our_loss.backward()
    assert abs(our_loss.item() - loss.item()) < 1e-5
    theirs = dict(reference.named_parameters())
    last = (
        "transformer.ln_f.weight",
        "model.norm.weight" if "model.norm.weight" in theirs else "gpt_neox.final_layer_norm.weight",
    )
    first = (
        "transformer.wte.weight",
        "model.embed_tokens.weight" if "model.norm.weight" in theirs else "gpt_neox.embed_in.weight",
    )
    for our_name, their_name in (last, first):
        grad = ours.get_parameter(our_name).grad[: theirs[their_name].size(0)]
        torch.testing.assert_close(grad, theirs[their_name].grad, rtol=1e-3, atol=1e-5)


@torch.inference_mode()
def test_bfloat16_rounds_no_worse_than_the_reference(pair):
    """Mean error against float32 over many tokens; the two round in different places, so that single ones may differ."""
    reference, ours = pair
    idx = tokens(8, 60)
    exact = reference(idx).logits
    theirs = (reference.bfloat16()(idx).logits.float() - exact).abs().mean()
    mine = (ours.bfloat16()(idx)[..., :VOCABULARY].float() - exact).abs().mean()
    assert mine <= 1.1 * theirs
