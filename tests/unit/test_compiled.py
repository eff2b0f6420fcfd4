"""The compiled decode step: the model's logits and the model's cache, kept on disk, and done without where it must be."""

import os
import re
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.generation.compile_notes import notes_wait, say_note
from litgpt.generation.compile_step import compile_elsewhere
from litgpt.generation.compiled import READING, CompiledDecoder, decoder
from litgpt.generation.compiled_program import path_of, reads_compiled, specification
from litgpt.model import GPT
from litgpt.quantization.layers import replace_linears
from tests import shapes

CONFIG = Config(
    block_size=256,
    n_layer=1,
    n_embd=64,
    n_head=4,
    n_query_groups=2,
    padded_vocab_size=96,
    intermediate_size=96,
    **shapes.LLAMA,
    tie_embeddings=True,
)
ROWS, KIND = 2, (2, torch.float32)
HAS_COMPILER = any(os.access(Path(folder, "g++"), os.X_OK) for folder in os.get_exec_path())
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no g++")


def test_notes_wait_for_the_end_of_an_answer(capsys):
    with notes_wait():
        print("The answer", end="")
        say_note("Compiling")
        print(" goes on")
        assert capsys.readouterr() == ("The answer goes on\n", "")
    assert capsys.readouterr() == ("", "Compiling\n")
    say_note("Compiled")
    assert capsys.readouterr().err == "Compiled\n"


def make(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(CONFIG).eval()
    model.init_weights()
    replace_linears(model, "int4", torch.float32)
    return model


def decoder_of(model: GPT, said: list[str], **options) -> CompiledDecoder:
    return CompiledDecoder(model, after=1, say=said.append, **options)


def largest_difference(model: GPT, decoder: CompiledDecoder) -> float:
    """Of the logits of some steps, and of the caches after them: another cache length, another read length, an idle
    row, rows in the middle of the cache."""
    worst = []
    for max_length, length in ((40, None), (256, 128)):
        with torch.inference_mode():
            whole = [model.new_cache(4, max_length) for _ in range(2)]
            for cache in whole:
                model(torch.arange(4 * 20).view(4, 20), cache=cache)
            plain, fast = (cache.select(slice(1, 1 + ROWS)) for cache in whole)
            plain.read_only(length)
            fast.read_only(length)
            for step, idle in enumerate((False, True, False)):
                tokens, positions = torch.tensor([[7], [8 + step]]), torch.tensor([[20 + step], [-1 if idle else 20]])
                expected = model(tokens, positions, cache=plain)
                worst.append((decoder(tokens, positions, cache=fast) - expected)[: 1 if idle else 2])
        # What is written for an idle row lies in the last slot, which is never seen.
        worst += [(a - b)[:, :-8] for a, b in zip(*(cache.tensors() for cache in whole), strict=True)]
    return max(float(difference.abs().max()) for difference in worst)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("code")


@pytest.fixture(autouse=True)
def cache_directory(folder, monkeypatch) -> Path:
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def compiled(folder) -> Path:
    """Two processes at once are asked for the same code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITGPT_CACHE_DIR", str(folder))
        wanted = specification(make(), *KIND)
        path = path_of(wanted)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            compile_elsewhere(wanted, path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return path


@needs_compiler
def test_compiled_logits_and_caches_are_the_models(compiled):
    """The weights are those of the model at hand, also changed in place, and no part of the code."""
    said: list[str] = []
    models = [make(0), make(1)]
    for model in models:
        decoder = decoder_of(model, said)
        assert largest_difference(model, decoder) < 1e-5  # the first steps are the model's own
        assert decoder.wait()
        assert largest_difference(model, decoder) < 1e-5
    with torch.no_grad():
        models[1].transformer["wte"].weight.mul_(2)
    assert largest_difference(models[1], decoder) < 1e-5
    assert said == []
    assert compiled.stat().st_size < 2_000_000


@needs_compiler
def test_compiled_reading_is_the_models(tmp_path, monkeypatch):
    """Prompts of unlike lengths, alone and together, in any rows, after what a row holds already, and over a window."""
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path))
    config = replace(CONFIG, n_layer=2, sliding_window_size=24, sliding_window_indices=[1, 0])
    torch.manual_seed(0)
    model = GPT(config).eval()
    model.init_weights()
    said: list[str] = []
    decoder = decoder_of(model, said)
    with torch.inference_mode():
        decoder.hidden_states(torch.ones(1, 5, dtype=torch.int64), None, cache=model.new_cache(1, 64))
        assert decoder.wait()
        assert said[0].startswith("Compiling the reading of prompts: C++ for this CPU, in the background.")
        assert re.fullmatch(r"Compiled the reading of prompts \(\d+ s\)\.", said[1])
        assert len(said) == 2
        plain, fast = model.new_cache(4, 200), model.new_cache(4, 200)
        for cache in (plain, fast):
            model(torch.arange(4 * 30).view(4, 30) % 96, cache=cache)  # what requests before have left
        for rows, is_empty, lengths in (
            (slice(1, 2), True, [40]),
            (torch.tensor([3, 0]), True, [17, 60]),
            (torch.tensor([1, 3, 2]), False, [50, 1, 33]),
            (slice(0, 1), False, [2]),
        ):
            width = max(lengths)
            tokens = torch.randint(0, 96, (len(lengths), width))
            results = []
            for cache, reader in ((plain, model.hidden_states), (fast, decoder.hidden_states)):
                chosen = cache.select(rows, is_empty)
                for row in chosen.rings[None].rows[:, 0].tolist() if is_empty else ():
                    cache.rewind(row, 0)
                begins = (chosen.rings[None].positions.amax(dim=1) + 1).tolist()
                places = [
                    [*range(begin, begin + length), *[-1] * (width - length)]
                    for begin, length in zip(begins, lengths, strict=True)
                ]
                chosen.read_only(128)
                results.append(reader(tokens, torch.tensor(places), cache=chosen))
            seen = torch.tensor(places) >= 0
            torch.testing.assert_close(results[1][seen], results[0][seen], rtol=1e-4, atol=1e-4)
        for window in (None, 24):
            assert torch.equal(plain.rings[window].table[:, :-1], fast.rings[window].table[:, :-1])
    assert decoder._calls[READING] == 1  # none of it has been the model's own


def test_what_cannot_be_read_compiled_is_read_by_the_model():
    for change in ({"attention_logit_softcapping": 30.0}, {"attention_sinks": True}):
        assert not reads_compiled(GPT(replace(CONFIG, **change)))
    assert not reads_compiled(make())  # quantised
    assert reads_compiled(GPT(CONFIG))


@needs_compiler
def test_what_is_on_disk_is_loaded_before_the_first_step(compiled):
    model = make()
    decoder = decoder_of(model, [])
    rows, dtype = KIND
    decoder.load([rows, rows + 1])
    assert set(decoder._threads) == {(rows, dtype)}  # the other would have to be compiled
    assert decoder.wait()
    with torch.no_grad():
        cache = model.new_cache(rows, 64)
        cache.is_empty = False
        tokens = torch.ones(rows, 1, dtype=torch.int64)
        decoder(tokens, tokens, cache=cache)
    assert decoder._calls.total() == 0  # the model has not been asked


@needs_compiler
def test_another_process_loads_what_is_on_disk(compiled, tmp_path):
    before = compiled.stat().st_mtime_ns
    code = """if True:
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        torch.set_num_threads(int(sys.argv[2]))
        from tests.unit.test_compiled import decoder_of, make, largest_difference
        model = make()
        decoder = decoder_of(model, [])
        decoder.after = 10**9  # nothing is compiled
        largest_difference(model, decoder)
        assert decoder.wait()
        assert largest_difference(model, decoder) < 1e-5
    """
    root = str(Path(__file__).parents[2])
    words = [sys.executable, "-c", code, root, str(torch.get_num_threads())]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert compiled.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "cut", "changed"])
def test_damaged_code_is_made_anew(compiled, damage, monkeypatch):
    whole = compiled.read_bytes()
    half = len(whole) // 2
    parts = {"empty": b"", "cut": whole[:half], "changed": whole[:half] + b"\0" * 64 + whole[half + 64 :]}
    compiled.write_bytes(parts[damage])
    asked = []

    def compile_again(wanted, path):
        asked.append(path)
        assert not path.exists()
        path.write_bytes(whole)

    monkeypatch.setattr("litgpt.generation.compiled.compile_elsewhere", compile_again)
    said: list[str] = []
    model = make()
    decoder = decoder_of(model, said)
    largest_difference(model, decoder)
    assert decoder.wait()
    assert asked == [compiled]
    assert [line.split(" (")[0].split(":")[0] for line in said] == [
        "Compiling the writing of 2 answers at a time",
        "Compiled the writing of 2 answers at a time",
    ]
    assert largest_difference(model, decoder) < 1e-5


def test_without_a_compiler_the_model_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    said: list[str] = []
    model = make()
    decoder = decoder_of(model, said)
    for _ in range(2):
        assert largest_difference(model, decoder) == 0
        assert not decoder.wait()
    assert len(said) == 2
    assert said[0].startswith("Compiling the writing of 2 answers at a time")
    assert said[1].startswith("Decoding is not compiled: there is no C++ compiler. Install g++")
    assert not list(tmp_path.rglob("*.pt2"))


def test_what_cannot_be_compiled_is_said_at_once(tmp_path):
    model = GPT(CONFIG).eval()
    apply_lora(model, LoRASettings())
    said: list[str] = []
    decoder = decoder_of(model, said)
    assert largest_difference(model, decoder) == 0
    assert len(said) == 1
    assert "Merge them" in said[0]


def test_code_is_of_one_shape_type_and_number_of_rows():
    base = specification(make(), *KIND)
    others = [
        specification(make(), 4, torch.float32),
        specification(make(), 2, torch.bfloat16),
        specification(make().to(torch.bfloat16), *KIND),
        specification(GPT(CONFIG), *KIND),
        base | {"code": "another"},
    ]
    paths = {path_of(each) for each in (base, *others)}
    assert len(paths) == 1 + len(others)
    assert path_of(specification(make(1), *KIND)) == path_of(base)  # other weights


def test_a_prompt_and_a_short_answer_start_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path))
    model, said = make(), []
    decoder = CompiledDecoder(model, after=100, say=said.append)
    assert largest_difference(model, decoder) == 0
    assert not decoder.wait()
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_a_cache_that_the_engine_has_let_go_of_is_freed():
    model = make()
    decoder, cache = CompiledDecoder(model, after=100), model.new_cache(2, 64)
    model.hidden_states(torch.tensor([[1, 2], [3, 4]]), cache=cache)
    rows = cache.select(slice(0, 1))
    decoder(torch.tensor([[5]]), torch.tensor([[2]]), cache=rows)
    assert decoder._states
    held = weakref.ref(cache.layers[0].tensors[0])
    assert held() is not None
    del cache, rows
    assert held() is None


def test_what_a_gpu_waits_for_is_said_once_for_each_number_of_rows(monkeypatch):
    """On a device of fake memory, with a compiler that does nothing."""
    model = GPT(CONFIG).eval().to("meta")
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda tokens, positions, *, cache: tokens)
    said: list[str] = []
    decode = decoder(model, said.append)
    for rows in (1, 4, 1, 4):
        decode(torch.ones(rows, 1), torch.zeros(rows, 1), cache=None)
    assert said == [
        "Compiling the writing of one answer at a time with torch.compile: its first tokens wait for that.",
        "Compiling the writing of 4 answers at a time with torch.compile: its first tokens wait for that.",
    ]
