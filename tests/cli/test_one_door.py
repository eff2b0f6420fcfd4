"""Whatever a user may name as a model, every command opens it by the same door, or says why that has no meaning."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.adaptation.adapter import apply_adapter, is_adapter, save_adapter
from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, merge_lora, save_lora
from litgpt.checkpoint import save_model
from litgpt.generation.engine import Request
from litgpt.generation.sampling import Sampling
from litgpt.llm import LLM
from litgpt.serving.server import Server
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import checkpoint_files
from tests.hub_server import Hub, connect, serve_hub

PLAIN, ADAPTED = "models/plain", {"LoRA": "tuned/lora", "PEFT": "tuned/peft", "PEFT on the Hub": "org/peft"}
KINDS = {
    "a directory": PLAIN,
    "below checkpoints": "org/plain",
    "a known name": "pythia-14m",
    "a Hub id": "org/remote",
    "a Hugging Face directory": "models/hf",
    "a GGUF file": "models/plain.gguf",
    **ADAPTED,
    "an adapter": "tuned/adapter",
}
WITHOUT_LORA = [kind for kind in KINDS if kind not in ADAPTED]
NO_MERGE = {"an adapter": "holds an adapter, which cannot be merged .* Give the model it belongs to, models/plain"}
NO_LORA = dict.fromkeys(WITHOUT_LORA, "holds no LoRA weights .* Give a directory that .*finetune_lora.* or a PEFT")
GREEDY = ["--top_k", "1", "--precision", "32-true", "--max_new_tokens", "5", "--prompt", "Hello"]
SHORT = ["--train.global_batch_size", "2", "--train.micro_batch_size", "2", "--precision", "32-true"]
STILL = [*SHORT, "--train.max_steps", "1", "--train.lr_warmup_steps", "0", "--optimizer.lr", "0"]
RECORDS = ["--data", "JSON", "--data.json_path", "records.json", "--data.val_split_fraction", "0.25"]
PAIRS = ["--data", "Preferences", "--data.json_path", "pairs.json", "--data.val_split_fraction", "0.25"]
TEXT = ["--data", "TextFiles", "--data.train_data_path", "text.txt", "--train.max_seq_length", "16"]
DRY = ["--out_dir", "OUT", "--dry_run", "true", *SHORT]

# What answers, with MODEL and OUT in the place of what is named and of a new directory.
ANSWERS = {
    "generate": ["generate", "MODEL"],
    "generate_sequentially": ["generate_sequentially", "MODEL"],
    "generate_speculatively": ["generate_speculatively", "MODEL", "--draft_model_checkpoint_dir", "MODEL"],
}
# What leaves weights in OUT: those of the model, or merged ones; and what is refused, in which words.
WRITES = {
    "convert --to hf": (["convert", "MODEL", "OUT", "--to", "hf"], NO_MERGE),
    "convert --to gguf": (["convert", "MODEL", "OUT.gguf", "--to", "gguf"], NO_MERGE),
    "convert --to litgpt": (["convert", "MODEL", "OUT", "--to", "litgpt"], NO_MERGE),
    "convert_from_litgpt": (["convert_from_litgpt", "MODEL", "OUT", "--format", "safetensors"], NO_MERGE),
    "convert_to_litgpt": (
        ["convert_to_litgpt", "MODEL", "--out_dir", "OUT"],
        dict.fromkeys(("a directory", "below checkpoints", "a known name"), "is in the right format already")
        | dict.fromkeys(("LoRA", "an adapter"), "in the right format already. `litgpt merge_lora"),
    ),
    "convert_lit_checkpoint": (["convert_lit_checkpoint", "MODEL", "--out_dir", "OUT", "--dtype", "float32"], NO_MERGE),
    "convert_pretrained_checkpoint": (["convert_pretrained_checkpoint", "MODEL", "OUT"], NO_MERGE),
    "merge_lora": (["merge_lora", "MODEL", "--out_dir", "OUT"], NO_LORA),
    "finetune_full": (["finetune_full", "MODEL", "--out_dir", "OUT", *RECORDS, *STILL], NO_MERGE),
    "pretrain --initial_checkpoint_dir": (
        ["pretrain", "tiny", "--initial_checkpoint_dir", "MODEL", "--out_dir", "OUT", *TEXT, *STILL],
        NO_MERGE,
    ),
}
# What needs a model, a base or a tokenizer, and leaves other things than weights.
TAKES = {
    "evaluate": (["evaluate", "MODEL", "--tasks", "perplexity", "--data", "text.txt", "--out_dir", "OUT"], {}),
    "validate": (["validate", "MODEL", "--check_values", "true"], {}),
    "convert --to peft": (
        ["convert", "MODEL", "OUT", "--to", "peft"],
        NO_LORA | dict.fromkeys(("PEFT", "PEFT on the Hub"), "is a PEFT adapter already"),
    ),
    "merge_lora --pretrained_checkpoint_dir": (
        ["merge_lora", "tuned/lora", "--pretrained_checkpoint_dir", "MODEL", "--out_dir", "OUT"],
        NO_MERGE,
    ),
    "convert --pretrained_checkpoint_dir": (
        ["convert", "tuned/peft", "OUT", "--to", "litgpt", "--pretrained_checkpoint_dir", "MODEL"],
        NO_MERGE,
    ),
    "generate_adapter": (["generate_adapter", "MODEL", "--adapter_path", "tuned/adapter", *GREEDY], {}),
    "generate_full": (["generate_full", "MODEL", "--finetuned_path", PLAIN, *GREEDY], {}),
    "finetune_lora": (["finetune_lora", "MODEL", *RECORDS, *DRY], NO_MERGE),
    "finetune_adapter": (["finetune_adapter", "MODEL", *RECORDS, *DRY, "--adapter_start_layer", "1"], NO_MERGE),
    "finetune_dpo": (["finetune_dpo", "MODEL", *PAIRS, *DRY], NO_MERGE),
    "prepare_dataset": (
        ["prepare_dataset", "text.txt", "MODEL", "--destination_path", "OUT", "--num_workers", "1"],
        {},
    ),
}
# Training takes its time: one kind of each sort will do.
TRAINS = ("finetune", "pretrain")
FEW = ("a directory", "a Hub id", "a GGUF file", "LoRA", "PEFT", "an adapter")
EVERY = {name: words for table in (WRITES, TAKES) for name, (words, _) in table.items()} | ANSWERS


def quietly(*words):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model in all kinds, and what LoRA, in our format and PEFT's, and LLaMA-Adapter have learned on it."""
    before, root = Path.cwd(), tmp_path_factory.mktemp("models")
    os.chdir(root)
    try:
        plain = checkpoint_files.chat_model(Path(PLAIN))
        quietly("convert", plain, "models/hf", "--to", "hf")
        quietly("convert", plain, "models/plain.gguf", "--to", "gguf")
        for name in ("checkpoints/org/plain", "checkpoints/EleutherAI/pythia-14m", "models/merged", *tuned()):
            shutil.copytree(plain, name)
        torch.manual_seed(0)
        for directory, save in zip(tuned(), (save_some_lora, save_some_adapter), strict=True):
            (Path(directory) / "lit_model.pth").unlink()
            save(load_model(plain), Path(directory))
        quietly("convert", "tuned/lora", "tuned/peft", "--to", "peft")
        Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
        Path("records.json").write_text(
            json.dumps([{"instruction": "Say.", "output": f"It is {n}."} for n in range(8)])
        )
        pairs = [{"prompt": "Say.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(8)]
        Path("pairs.json").write_text(json.dumps(pairs))
    finally:
        os.chdir(before)
    return root


def tuned():
    return "tuned/lora", "tuned/adapter"


def save_some_lora(gpt, directory):
    """LoRA weights in a directory, and the model with them merged in models/merged."""
    settings = LoRASettings(r=2, projection=True, mlp=True)
    apply_lora(gpt, settings)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if is_lora(name):
                p.copy_(torch.randn_like(p) * 0.3)
    save_lora(directory, {name: p for name, p in gpt.state_dict().items() if is_lora(name)}, settings, PLAIN)
    merge_lora(gpt)
    save_model(Path("models/merged"), gpt, gpt.config)


def save_some_adapter(gpt, directory):
    apply_adapter(gpt, start_layer=1)
    weights = {name: torch.randn_like(p) for name, p in gpt.named_parameters() if is_adapter(name)}
    save_adapter(directory, weights, PLAIN)


@pytest.fixture(scope="module")
def server(folder):
    with serve_hub(Hub()) as hub:
        for name, directory in (("org/remote", "models/hf"), ("org/peft", "tuned/peft")):
            files = (folder / directory).iterdir()
            hub.repositories[name] = {file.name: file.read_bytes() for file in files if file.is_file()}
        yield hub


@pytest.fixture
def run(litgpt, folder, server, tmp_path, monkeypatch):
    """A command on what is named: what the program left, and where it was to write."""
    monkeypatch.chdir(folder)
    connect(server, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("remote", "peft"):
        shutil.rmtree(folder / "checkpoints/org" / name, ignore_errors=True)

    def run(words, named, out=tmp_path / "out"):
        result = litgpt(*(word.replace("MODEL", named).replace("OUT", str(out)) for word in words))
        if named.startswith("org/") and named != "org/plain":
            assert f"Downloading {named}\n" in result.err
        return result

    return run


def cells(table):
    """Each command with each kind."""
    return [(name, kind) for name in table for kind in (FEW if name.startswith(TRAINS) else KINDS)]


def sort_of(kind):
    """A directory that holds the same as this kind."""
    return "tuned/adapter" if kind == "an adapter" else "models/merged" if kind in ADAPTED else PLAIN


def weights_in(place):
    return {name: tensor.clone() for name, tensor in open_model(place).weights()}


@pytest.mark.parametrize(("command", "kind"), cells(ANSWERS))
def test_the_model_answers_with_what_was_learned(run, litgpt, command, kind):
    result = run([*ANSWERS[command], *GREEDY], KINDS[kind])
    assert result.code == 0, result.err
    if kind == "an adapter":
        expected = litgpt("generate_adapter", PLAIN, "--adapter_path", "tuned/adapter", *GREEDY).out
    else:
        expected = litgpt("generate", sort_of(kind), *GREEDY).out
    assert result.out == expected


@pytest.mark.parametrize("kind", KINDS)
def test_chat_replies_with_what_was_learned(run, litgpt, monkeypatch, kind):
    def chat(named):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        return run(["chat", "MODEL", *GREEDY[:-2]], named)

    result = chat(KINDS[kind])
    assert result.code == 0, result.err
    said, expected = (text.partition("\n")[2] for text in (result.out, chat(sort_of(kind)).out))  # first is the name
    assert ">> Reply:" in said
    assert said == expected


@pytest.mark.parametrize("kind", KINDS)
def test_serve_and_the_python_api_load_what_was_learned(run, monkeypatch, kind):
    served = []

    class Caught(Server):
        def serve_on(self, listener):
            listener.close()
            served.extend(self._load())

        def leave(self):
            """The process goes on."""

    monkeypatch.setattr("litgpt.serving.server.Server", Caught)
    request = Request([5, 6, 7], 10, Sampling(0))
    # In float32: where bfloat16 has hardware, that is the default, and LoRA weights merged or not differ in it.
    expected = LLM.load(sort_of(kind), precision="32-true").engine.complete([request])
    result = run(["serve", "MODEL", "--port", "0", "--precision", "32-true"], KINDS[kind])
    assert result.code == 0, result.err
    served[0].worker.close()
    assert served[0].worker.engine.complete([request]) == expected
    llm = LLM.load(KINDS[kind], tokenizer_dir=KINDS[kind], precision="32-true")
    assert llm.engine.complete([request]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_take_the_shape_of_any(run, folder, kind):
    llm = LLM.load(KINDS[kind], init="random", distribute=None)
    assert llm.config.n_embd == open_model(PLAIN).config.n_embd
    assert llm.tokenizer.vocab_size == LLM.load(PLAIN).tokenizer.vocab_size


@pytest.mark.parametrize(("command", "kind"), cells(WRITES))
def test_the_weights_come_out_merged_or_it_is_said_why_not(run, tmp_path, command, kind):
    words, refused = WRITES[command]
    result = run(words, KINDS[kind])
    if kind in refused:
        assert result.code == 1
        assert re.search(refused[kind], result.err.splitlines()[-1])
        return
    assert result.code == 0, result.err
    place = next(place for place in (tmp_path / "out.gguf", tmp_path / "out/final", tmp_path / "out") if place.exists())
    expected = weights_in(sort_of(kind))
    torch.testing.assert_close(weights_in(place), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("command", "kind"), cells(TAKES))
def test_every_other_command_takes_it_or_says_why_not(run, command, kind):
    words, refused = TAKES[command]
    result = run(words, KINDS[kind])
    if kind in refused:
        assert result.code == 1
        assert re.search(refused[kind], result.err.splitlines()[-1])
    else:
        assert result.code == 0, result.out + result.err


@pytest.mark.parametrize(
    "words",
    [
        ["finetune_lora", "MODEL", *RECORDS],
        ["pretrain", "tiny", "--initial_checkpoint_dir", "MODEL", *TEXT],
        ["pretrain", "pythia-14m", "--tokenizer_dir", "MODEL", *TEXT],
    ],
)
def test_a_new_run_never_deletes_what_it_starts_from(run, tmp_path, words):
    first = tmp_path / "out" / "best"
    shutil.copytree("tuned/lora", first)
    result = run([*words, "--out_dir", "OUT", "--overwrite", "true", *STILL], str(first))
    assert result.code == 1
    assert f"would delete '{first}', which it starts from. Choose another --out_dir." in result.err
    assert (first / "lit_model.pth.lora").is_file()
    before = {path: path.read_bytes() for path in first.iterdir() if path.is_file()}
    result = run([*words, "--out_dir", str(first), *STILL], str(first))  # whose settings say what the weights belong to
    assert result.code == 1
    assert f"error: --out_dir {first} is what the run starts from" in result.err
    assert {path: path.read_bytes() for path in first.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("kind", ["a GGUF file", "PEFT", "PEFT on the Hub"])
def test_a_new_model_takes_its_tokenizer(run, tmp_path, kind):
    shape = ["--model_config.n_layer", "1", "--model_config.n_embd", "32", "--model_config.n_head", "2"]
    result = run(
        ["pretrain", "pythia-14m", *shape, "--tokenizer_dir", "MODEL", "--out_dir", "OUT", *TEXT, *STILL], KINDS[kind]
    )
    assert result.code == 0, result.err
    tokenizers = [Tokenizer(Path(place)) for place in (PLAIN, tmp_path / "out/final")]
    assert len({tuple(tokenizer.encode_ids("Hello world", bos=False)) for tokenizer in tokenizers}) == 1


@pytest.mark.parametrize("command", EVERY)
def test_what_is_written_as_a_path_is_not_asked_of_the_hub(run, server, command):
    asked = len(server.requests)
    for path in ("./x/y", "../x", "/x/y", "out/x", "nope/x.gguf"):
        result = run(EVERY[command], path)
        assert result.code == 1
        assert f"No checkpoint '{path}' (looked for " in result.err
    assert len(server.requests) == asked


def on(base, directory):
    """The same LoRA weights in another directory, with another base."""
    shutil.copytree("tuned/lora", directory)
    content = torch.load(directory / "lit_model.pth.lora")
    torch.save(content | {"base": str(base)}, directory / "lit_model.pth.lora")
    return directory


def test_what_was_learned_on_lora_opens_on_both(run, litgpt, folder, tmp_path):
    twice = on(folder / "tuned/lora", tmp_path / "twice")
    once, merged = weights_in("models/plain"), weights_in("models/merged")
    for name, weight in weights_in(twice).items():
        torch.testing.assert_close(weight, merged[name] + (merged[name] - once[name]), atol=1e-5, rtol=1e-5)


def test_what_belongs_to_itself_is_refused(run, litgpt, tmp_path):
    first = on(tmp_path / "second", tmp_path / "first")
    on(first, tmp_path / "second")
    result = litgpt("generate", first, *GREEDY)
    assert result.code == 1
    assert "more than 8 deep or in a circle" in result.err
    for directory in (first, tmp_path / "second"):
        for file in directory.glob("token*"):
            file.unlink()
    result = litgpt("prepare_dataset", "text.txt", first, "--destination_path", tmp_path / "out")
    assert result.code == 1
    assert "more than 8 deep or in a circle" in result.err


def test_lora_weights_without_a_tokenizer_have_that_of_their_model(run, litgpt, folder, tmp_path):
    bare = on(folder / PLAIN, tmp_path / "bare")
    for file in bare.iterdir():
        if file.name != "lit_model.pth.lora":
            file.unlink()
    result = litgpt("generate", bare, *GREEDY)
    assert result.code == 0, result.err
    assert result.out == litgpt("generate", "models/merged", *GREEDY).out
