"""LoRA and adapters exchanged with LitGPT 0.5.13: `LITGPT_PEER` is its command in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.adaptation.adapter import is_adapter, is_adapter_v2, load_adapter, read_adapter
from litgpt.adaptation.lora import LORA_WEIGHTS, TARGETS, LoRASettings, apply_lora, is_lora, save_lora
from litgpt.checkpoint import WEIGHTS, read_state_dict, save_model
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.sources.load import load_model
from tests import tokenizer_files
from tests.shapes import LLAMA

pytestmark = pytest.mark.slow

SIZES = {"n_layer": 4, "n_embd": 32, "n_head": 4, "intermediate_size": 40, "vocab_size": 704, "block_size": 64}
GEMMA = LLAMA | {
    "name": "Gemma-2-tiny",
    "mlp_class_name": "GemmaMLP",
    "gelu_approximate": "tanh",
    "scale_embeddings": True,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "attention_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
KINDS = {
    "multi-head, parallel": {"bias": True},
    "one norm for both": {"shared_attention_norm": True, "lm_head_bias": True},
    "grouped, wide heads": LLAMA | {"n_query_groups": 2, "head_size": 12},
    "multi-query": LLAMA | {"n_query_groups": 1},
    "normed keys": LLAMA | {"n_query_groups": 2, "norm_qk": True},
    "soft caps": GEMMA | {"n_query_groups": 2},
    "experts": LLAMA | {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
}
SCRIPT = """
import importlib, json, sys, torch
from pathlib import Path
root, made = Path(sys.argv[1]), json.loads(sys.argv[2])
for directory, (module, options) in made.items():
    peer = importlib.import_module(f"litgpt.{module}")
    model = peer.GPT(peer.Config.from_file(root / directory / "model_config.yaml", **options)).eval()
    belongs = peer.lora_filter if module == "lora" else peer.adapter_filter
    torch.manual_seed(1)
    with torch.inference_mode():
        for name, p in model.named_parameters():
            p.normal_(0, 0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
        torch.save(model(torch.load(root / "tokens.pt")), root / directory / "logits.pt")
    weights = model.state_dict()
    own = {name: p for name, p in weights.items() if belongs(name, p)}
    torch.save({"model": own}, root / directory / f"lit_model.pth.{module}")
    rest = {name.replace(".linear.", "."): p for name, p in weights.items() if name not in own or "norm" in name or "ln_f" in name}
    torch.save(rest, root / directory / "base.pth")
"""


@pytest.fixture(scope="module")
def peer():
    name = os.environ.get("LITGPT_PEER")
    if not name:
        pytest.skip("LITGPT_PEER does not name LitGPT's own command")
    return Path(name)


def run(*command, cwd):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], env=clean, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]


def tokens():
    return torch.randint(0, 700, (2, 20), generator=torch.Generator().manual_seed(1))


def config_of(kind: str) -> Config:
    return Config(**{"name": "tiny", **SIZES, "padded_vocab_size": 704, **KINDS[kind]})


def test_what_it_has_learned_computes_the_same_here(peer, tmp_path):
    """Names, shapes and numbers, for every kind of attention and every method."""
    torch.save(tokens(), tmp_path / "tokens.pt")
    made = {}
    options = {"lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.0}
    for kind in KINDS:
        for module in ("lora", "adapter", "adapter_v2"):
            directory = f"{kind} {module}"
            (tmp_path / directory).mkdir()
            config_of(kind).save(tmp_path / directory)
            targets = {f"lora_{target}": not (kind == "experts" and target == "mlp") for target in TARGETS}
            made[directory] = (module, options | targets if module == "lora" else {})
    run(peer.with_name("python"), "-c", SCRIPT, tmp_path, json.dumps(made), cwd=tmp_path)
    for directory, (module, given) in made.items():
        gpt = GPT(Config.from_checkpoint(tmp_path / directory)).eval()
        gpt.load_state_dict(torch.load(tmp_path / directory / "base.pth"))
        if module == "lora":
            weights = dict(read_state_dict(tmp_path / directory / LORA_WEIGHTS))
            switches = {target: given[f"lora_{target}"] for target in TARGETS}
            apply_lora(gpt, LoRASettings(r=3, alpha=7, dropout=0.0, **switches))
            assert {name for name in gpt.state_dict() if is_lora(name)} == weights.keys(), directory
            gpt.load_state_dict(weights, strict=False)
        else:
            weights, _ = read_adapter(tmp_path / directory)
            load_adapter(gpt, weights)
            belongs = is_adapter if module == "adapter" else is_adapter_v2
            assert {name for name in gpt.state_dict() if belongs(name)} == weights.keys(), directory
        with torch.inference_mode():
            logits, expected = gpt(tokens()), torch.load(tmp_path / directory / "logits.pt")
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1), directory


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    tokenizer_files.byte_level(directory, {})
    torch.manual_seed(0)
    gpt = GPT(config_of("grouped, wide heads"))
    gpt.init_weights()
    save_model(directory, gpt, gpt.config)
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return directory


def test_its_own_finetuned_checkpoints(peer, base, litgpt_main, tmp_path):
    """What its finetune_lora leaves is merged here to the same bits; what is made here, its merge_lora merges."""
    records = [{"instruction": f"Say {n}", "input": "", "output": f"number {n}"} for n in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    run(
        *(peer, "finetune_lora", base, "--out_dir", tmp_path / "run", "--precision", "32-true", "--data", "JSON"),
        *("--data.json_path", tmp_path / "data.json", "--data.val_split_fraction", "0.2", "--train.max_steps", "3"),
        *("--train.global_batch_size", "2", "--train.max_seq_length", "32", "--train.lr_warmup_steps", "1"),
        *("--train.epochs", "1", "--eval.max_new_tokens", "4", "--lora_key", "true", "--lora_mlp", "true"),
        *("--lora_head", "true"),
        cwd=tmp_path,
    )
    final = tmp_path / "run" / "final"
    assert litgpt_main(["merge_lora", str(final), "--out_dir", str(tmp_path / "merged")]) == 0
    theirs, ours = read_state_dict(final / WEIGHTS), read_state_dict(tmp_path / "merged" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)

    lora = LoRASettings(r=2, alpha=5, dropout=0.0, key=True, projection=True)
    gpt = load_model(base)
    apply_lora(gpt, lora)
    for name, p in gpt.named_parameters():
        if is_lora(name):
            p.data.add_(torch.randn_like(p) * 0.1)
    made = tmp_path / "made"
    made.mkdir()
    save_lora(made, {name: p for name, p in gpt.state_dict().items() if is_lora(name)}, lora, str(base))
    gpt.config.save(made)
    recorded = {f"lora_{name}": value for name, value in lora.to_dict().items() if name not in ("dora", "rs")}
    recorded |= {"checkpoint_dir": str(base), "precision": "32-true"}
    (made / "hyperparameters.yaml").write_text(yaml.safe_dump(recorded))
    tokenizer_files.byte_level(made, {})
    run(peer, "merge_lora", made, cwd=tmp_path)
    with torch.inference_mode():
        expected = gpt(tokens())
        assert (load_model(made)(tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture
def litgpt_main():
    from litgpt.__main__ import main

    return main
