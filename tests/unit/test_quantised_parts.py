"""Quantised weights in checkpoints: saved and loaded they are the same, made one by one they are as loaded; damage is named."""

import copy
import re

import pytest
import torch

from litgpt.adaptation.adapter import apply_adapter, is_adapter, save_adapter
from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, merge_lora, save_lora
from litgpt.checkpoint import CONFIG, WEIGHTS, read_state_dict, save_model, write_state_dict
from litgpt.config import Config
from litgpt.export.hf_writer import export_hf
from litgpt.formats.quantised_parts import KIND, quantised_stream, saved_weights
from litgpt.llm.loading import settled_kind
from litgpt.model import GPT
from litgpt.quantization.layers import SAVED_KINDS, kind_of, quantized_layers, replace_linears
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model
from litgpt.sources.meta import meta_model
from tests import tokenizer_files
from tests.unit.test_quantize import IDS, LLAMA, MODELS, SIZES, make

ALL = {**MODELS, "tied": LLAMA | {"tie_embeddings": True}}


def model_of(name: str) -> GPT:
    if name in MODELS:
        return make(name)
    torch.manual_seed(0)
    model = GPT(Config(**SIZES, **ALL[name]))
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain checkpoint directory of each model, and the quantised ones that are made of it."""
    places = {}

    def place(name: str, kind: str | None = None):
        if (name, kind) not in places:
            directory = places[name, kind] = tmp_path_factory.mktemp("checkpoint")
            if kind is None:
                save_model(directory, model_of(name), model_of(name).config)
            else:
                loaded = load_model(place(name), dtype=torch.bfloat16, quantize=kind)
                save_model(directory, saved_weights(loaded), loaded.config)
            tokenizer_files.byte_level(directory, {})
        return places[name, kind]

    return place


def same(one: GPT, other: GPT) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_saved_and_loaded_the_logits_are_the_same_bit_for_bit(plain, name, kind):
    expected = load_model(plain(name), dtype=torch.bfloat16, quantize=kind)
    saved = plain(name, kind)
    source = open_checkpoint(saved)
    assert (source.quantized, source.dtype) == (kind, torch.bfloat16)
    loaded = load_model(saved)
    assert kind_of(loaded) == kind
    assert same(loaded, expected)
    assert torch.equal(loaded(IDS), expected(IDS))
    assert same(load_model(saved, quantize=kind), expected)
    assert (saved / WEIGHTS).stat().st_size < (plain(name) / WEIGHTS).stat().st_size / 1.8
    # In another precision it is what the saved model is when it is converted to it.
    assert torch.equal(load_model(saved, dtype=torch.float32)(IDS), copy.deepcopy(expected).float()(IDS))


@pytest.mark.parametrize("name", ["moe", "tied"])
@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_matrix_by_matrix_they_become_what_a_loaded_model_has(plain, name, kind, tmp_path):
    source = open_checkpoint(plain(name))
    model = meta_model(source.config, kind, torch.bfloat16)
    write_state_dict(tmp_path / "stream.pth", quantised_stream(source.weights(), model, source.release))
    made, expected = read_state_dict(tmp_path / "stream.pth"), read_state_dict(plain(name, kind) / WEIGHTS)
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name
    tied = [made[name].data_ptr() for name in ("lm_head.weight", "transformer.wte.weight") if name in made]
    assert len(set(tied)) == 1 or not source.config.tie_embeddings  # stored once


def test_the_names_of_the_parts_and_the_order_of_int4_are_kept(plain):
    """Checkpoints that are there must stay readable."""
    tensors = read_state_dict(plain("llama", "bnb.nf4-dq") / WEIGHTS)
    assert bytes(tensors[KIND].tolist()) == b"bnb.nf4-dq"
    prefix = "transformer.h.1.mlp.proj.quantized."
    layer = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    blocks = 96 * 160 // 64
    assert {name: (list(t.shape), t.dtype) for name, t in layer.items()} == {
        "codes": ([96 * 160 // 2], torch.uint8),
        "absmax": ([blocks], torch.uint8),
        "scales": ([1], torch.float32),
        "offset": ([1], torch.float32),
    }
    tensors = read_state_dict(plain("llama", "int4") / WEIGHTS)
    assert tensors[prefix + "codes"].shape == (96, 80)
    assert tensors[prefix + "scales"].shape == (96, 5, 2)
    assert tensors["lm_head.quantized.codes"].dtype == torch.int8
    tensors = read_state_dict(plain("llama", "bnb.int8") / WEIGHTS)
    assert tensors[prefix + "codes"].shape == (96, 160)
    assert tensors[prefix + "absmax"].dtype == torch.float32


# --- where plain weights are wanted


@pytest.mark.parametrize("kind", ["bnb.fp4-dq", "bnb.int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "tied", "neox"])
def test_as_plain_weights_they_are_what_the_codes_stand_for(plain, name, kind, tmp_path):
    source = open_checkpoint(plain(name, kind))
    assert source.note is None
    assert source.note_on_plain == f"Its {kind} weights are de-quantised to bfloat16."
    quantised, whole = load_model(source), load_model(source, plain=True)
    assert kind_of(whole) is None
    layers = dict(quantized_layers(quantised))
    assert len(layers) >= 8
    for name, tensor in whole.state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        expected = quantised.state_dict()[name] if layer is None else layer.plain_weight()
        assert torch.equal(tensor, expected), name
    assert list(source.layout()) == [name for name, _ in source.weights()]
    assert all(
        t.shape == tensor.shape for t, (_, tensor) in zip(source.layout().values(), source.weights(), strict=True)
    )
    export_hf(source, tmp_path / "hf")
    again = load_model(open_checkpoint(tmp_path / "hf"))
    assert torch.equal(again(IDS), whole(IDS))


def test_lora_on_quantised_weights_is_merged_into_plain_ones_and_an_adapter_is_beside_them(plain, tmp_path):
    base = plain("llama", "bnb.nf4")
    tuned = load_model(base)
    apply_lora(tuned, LoRASettings(r=2))
    torch.manual_seed(2)
    learned = {name: torch.randn_like(p) * 0.05 for name, p in tuned.named_parameters() if is_lora(name)}
    tokenizer_files.byte_level(tmp_path / "lora", {})
    save_lora(tmp_path / "lora", learned, LoRASettings(r=2), str(base))
    source = open_model(tmp_path / "lora")
    assert (source.quantized, source.note) == (None, "Its bnb.nf4 weights are de-quantised to bfloat16.")
    expected = load_model(base, plain=True)
    apply_lora(expected, LoRASettings(r=2))
    expected.load_state_dict(learned, strict=False)
    merge_lora(expected)
    assert same(load_model(source), expected)

    adapted = load_model(base)
    apply_adapter(adapted, 4, 0)
    for p in adapted.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    tokenizer_files.byte_level(tmp_path / "adapter", {})
    save_adapter(tmp_path / "adapter", {n: p for n, p in adapted.state_dict().items() if is_adapter(n)}, str(base))
    again = load_model(open_model(tmp_path / "adapter"))
    assert kind_of(again) == "bnb.nf4"
    assert torch.equal(again(IDS), adapted(IDS))


# --- what is refused


def test_another_kind_than_the_checkpoints_is_refused(plain):
    source = open_checkpoint(plain("llama", "bnb.int8"))
    assert kind_of(load_model(source, quantize="bnb.int8-training")) == "bnb.int8-training"
    with pytest.raises(
        ValueError, match=r"quantize=int8 has no effect here: the weights in '.*' are bnb.int8 already. Leave it out"
    ):
        load_model(source, quantize="int8")
    with pytest.raises(ValueError, match=r"bnb\.int8 weights, which cannot be split over processes"):
        load_model(source, split=lambda model: lambda name, tensor: tensor)
    cuda, source = torch.device("cuda"), open_checkpoint(plain("llama", "int4"))
    with pytest.raises(ValueError, match=r"are int4, which is for CPUs, and the model goes to cuda.*quantize=bnb.nf4"):
        settled_kind(source, None, "bf16-true", cuda)
    with pytest.raises(ValueError, match="precision=bf16-mixed cannot be combined with quantize=int4"):
        settled_kind(source, None, "bf16-mixed", torch.device("cpu"))
    assert settled_kind(source, None, "bf16-true", torch.device("cpu")) == "int4"


DAMAGE = {
    # what is done to the tensors: (kind of the checkpoint, the change, what is said)
    "no kind": ("bnb.nf4", {KIND: None}, "not how they are quantised ('quantize')"),
    "unknown kind": (
        "int4",
        {KIND: torch.tensor(list(b"int2"), dtype=torch.uint8)},
        "quantised as 'int2', which is none of",
    ),
    "kind of fractions": ("int4", {KIND: torch.full((3,), 1e9)}, "which is none of"),
    "other kind": (
        "bnb.nf4",
        {KIND: torch.tensor(list(b"bnb.nf4-dq"), dtype=torch.uint8)},
        "missing: transformer.h.0.attn.qkv.quantized.scales [2]",
    ),
    "lost": ("int4", {"lm_head.quantized.scales": None}, "missing: lm_head.quantized.scales [128]"),
    "cut": (
        "bnb.fp4",
        {"transformer.h.0.attn.proj.quantized.codes": torch.zeros(9, dtype=torch.uint8)},
        "transformer.h.0.attn.proj.quantized.codes is [9] in lit_model.pth, [4608]",
    ),
    "wrong type": (
        "bnb.int8",
        {"transformer.h.0.attn.proj.quantized.codes": torch.zeros(96, 96)},
        "wrong type: transformer.h.0.attn.proj.quantized.codes is float32 in lit_model.pth, where int8 was expected",
    ),
    "plain": (
        "bnb.nf4",
        {"transformer.h.0.attn.proj.weight": torch.zeros(96, 96)},
        "unexpected: transformer.h.0.attn.proj.w",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(plain, damage, tmp_path):
    kind, change, message = DAMAGE[damage]
    tensors = {**read_state_dict(plain("llama", kind) / WEIGHTS), **change}
    write_state_dict(tmp_path / WEIGHTS, [(name, tensor) for name, tensor in tensors.items() if tensor is not None])
    (tmp_path / CONFIG).write_text((plain("llama") / CONFIG).read_text())
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(tmp_path)


def test_a_truncated_file_and_another_models_shape_are_named(plain, tmp_path):
    whole = (plain("llama", "int4") / WEIGHTS).read_bytes()
    (tmp_path / CONFIG).write_text((plain("llama") / CONFIG).read_text())
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        open_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    Config(**SIZES | LLAMA | {"intermediate_size": 192}).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"mlp.fc_1.quantized.codes is \[160, 48\] in lit_model.pth, \[192, 48\] in model_c"
    ):
        open_checkpoint(tmp_path)


def test_a_model_whose_kind_is_not_the_files_takes_what_the_codes_stand_for(plain):
    """`load_model` refuses it; who makes the model himself gets weights quantised anew."""
    model = load_model(plain("llama"))
    replace_linears(model, "bnb.nf4", torch.float32)
    open_checkpoint(plain("llama", "int4")).load_into(model)
    expected = load_model(plain("llama", "int4"), plain=True, dtype=torch.float32)
    replace_linears(expected, "bnb.nf4", torch.float32)
    assert torch.equal(model(IDS), expected(IDS))
