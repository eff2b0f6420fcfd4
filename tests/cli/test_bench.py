"""`litgpt bench`: that each test does what its name says, on the engine, and that table and file say the same of it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from litgpt.config import Config
from litgpt.devices.bandwidth import read_bandwidth
from litgpt.generation.engine import Engine
from litgpt.kernels import native
from litgpt.llm.speed_test import SpeedTest, weight_bytes_read
from litgpt.llm.timing import Timing
from litgpt.model import GPT
from litgpt.quantization.layers import replace_linears
from tests import checkpoint_files


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoint_files.chat_model(tmp_path_factory.mktemp("bench") / "tiny", block_size=160)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Reading 256 MiB ten times is not what is tested."""
    monkeypatch.setattr("litgpt.devices.bandwidth.SMALLEST", 2**16)


@pytest.fixture
def work(monkeypatch):
    """What the engines of a run did: (prompts, tokens) of each prefill, requests of each decode step."""
    done = {"prefill": [], "decode": []}
    plain = Engine.make_runner

    def make_runner(self, max_slots):
        made = plain(self, max_slots)
        inner_prefill, inner_decode = made.prefill, made.decode

        def counting_prefill(cache, sequences, rows, chunks):
            done["prefill"].append((len(chunks), sum(map(len, chunks))))
            return inner_prefill(cache, sequences, rows, chunks)

        def counting_decode(cache, sequences, rows):
            done["decode"].append(len(sequences))
            return inner_decode(cache, sequences, rows)

        made.prefill, made.decode = counting_prefill, counting_decode
        return made

    monkeypatch.setattr(Engine, "make_runner", make_runner)
    return done


def rows_of(out):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_and_the_file_say_the_same(litgpt, directory, tmp_path, work):
    file = tmp_path / "figures.json"
    options = (
        "--prompt_tokens",
        24,
        "--new_tokens",
        6,
        "--batch_sizes",
        "1,3",
        "--repetitions",
        2,
        "--compile",
        "false",
    )
    result = litgpt("bench", directory, *options, "--precision", "32-true", "--json", file)
    assert result.code == 0, result.err
    table, figures = rows_of(result.out), json.loads(file.read_text())
    assert [row["test"] for row in table] == ["pp24", "tg6", "pp24 x3", "tg6 x3"]
    for row, of_test in zip(table, figures, strict=True):
        rate, _, deviation = row["t/s"].partition(" ± ")
        assert float(rate) == pytest.approx(of_test["avg_ts"], abs=0.006)
        assert float(deviation) == pytest.approx(of_test["stddev_ts"], abs=0.006)
        assert len(of_test["samples_ts"]) == len(of_test["samples_ns"]) == 2
        tokens = of_test["n_parallel"] * (of_test["n_prompt"] or of_test["n_gen"])
        assert [tokens / ns * 1e9 for ns in of_test["samples_ns"]] == pytest.approx(of_test["samples_ts"], rel=1e-4)
        assert 0 < of_test["first_token_s"]["median"] <= of_test["first_token_s"]["worst"]
        assert of_test["model_n_params"] == sum(p.numel() for p in GPT(Config.from_checkpoint(directory)).parameters())
        assert of_test["model_size"] == 4 * of_test["model_n_params"]
        assert of_test["peak_memory_bytes"] > 50e6
        assert (of_test["model_type"], of_test["precision"]) == ("tiny-random float32", "32-true")
        assert of_test["n_threads"] == torch.get_num_threads()
    prompts, answers = figures[0::2], figures[1::2]
    assert all(of_test["bandwidth"] is None for of_test in prompts)
    for of_test, row in zip(answers, table[1::2], strict=True):
        steps = of_test["avg_ts"] / of_test["n_parallel"]
        assert of_test["bandwidth"] == pytest.approx(of_test["step_bytes"] * steps)
        assert f"{of_test['bandwidth'] / of_test['stream_bandwidth']:.0%}" in row["reads"]
    # Once to warm up and twice measured: prompts of 24 tokens, and single tokens with seven new ones, the first of which
    # is the prompt's.
    assert work["prefill"] == [(1, 24)] * 3 + [(1, 1)] * 3 + [(3, 72)] * 3 + [(3, 3)] * 3
    assert work["decode"] == [1] * 6 * 3 + [3] * 6 * 3


def test_what_a_request_holds_before_a_test_is_not_measured(litgpt, directory, work):
    options = ("--prompt_tokens", 8, "--new_tokens", 4, "--depth", 64, "--batch_sizes", 2, "--repetitions", 1)
    result = litgpt("bench", directory, *options, "--compile", "false")
    assert result.code == 0, result.err
    assert [row["test"] for row in rows_of(result.out)] == ["pp8 @ d64 x2", "tg4 @ d64 x2"]
    assert work["prefill"] == [(2, 128), (2, 16)] * 2 + [(2, 128), (2, 2)] * 2
    assert work["decode"] == [2] * 4 * 2


def test_random_weights_of_a_known_shape_are_measured_without_a_checkpoint(litgpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "figures.json"
    options = ("--init", "random", "--prompt_tokens", 0, "--new_tokens", 2, "--repetitions", 1, "--compile", "false")
    result = litgpt("bench", "pythia-14m", *options, "--quantize", "int8", "--json", file)
    assert result.code == 0, result.err
    [figures] = json.loads(file.read_text())
    assert (figures["quantize"], figures["init"]) == ("int8", "random")
    assert figures["model_n_params"] == sum(p.numel() for p in GPT(Config.from_name("pythia-14m")).parameters())
    assert figures["stddev_ts"] == 0


def test_the_kernels_are_waited_for_before_the_clock_starts(litgpt, directory, monkeypatch):
    waits = []
    real = native.library
    monkeypatch.setattr(native, "library", lambda wait=True: waits.append(wait) or real(wait))
    options = ("--prompt_tokens", 0, "--new_tokens", 2, "--batch_sizes", "1,3", "--repetitions", 1)
    assert litgpt("bench", directory, *options).code == 0
    assert waits.count(True) >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt_tokens", 160], "The test pp160 needs 161 tokens in a row, and the model's context has 160"),
        (["--new_tokens", 100, "--depth", 64], "pp512 @ d64 needs"),
        (["--prompt_tokens", 0, "--new_tokens", 0], "--prompt_tokens 0 with --new_tokens 0 leaves nothing to measure"),
        (["--batch_sizes", "1,0"], "--batch_sizes 0 is not valid: give 1 or more"),
        (
            ["--batch_sizes", "many"],
            "--batch_sizes many is not valid: give numbers with commas between them, as 1,8",
        ),
        (["--repetitions", 0], "--repetitions 0 is not valid"),
        (["--threads", 0], "--threads 0 is not valid"),
    ],
)
def test_what_cannot_be_measured_is_refused(litgpt, directory, options, message):
    result = litgpt("bench", directory, *options)
    assert (result.code, result.out) == (1, "")
    assert message in result.err


def test_requests_that_do_not_fit_in_memory_together_are_refused(litgpt, directory, monkeypatch):
    monkeypatch.setattr("litgpt.generation.engine.memory_free", lambda device: 1e6)
    options = ("--prompt_tokens", 24, "--new_tokens", 6, "--batch_sizes", 64, "--compile", "false")
    result = litgpt("bench", directory, *options)
    assert result.code == 1
    assert "The test pp24 x64 needs" in result.err
    assert "Give --batch_sizes less" in result.err


# --- the figures


def test_the_rate_counts_what_comes_while_all_requests_are_decoded():
    # One request alone, a token every half second after the first.
    assert Timing([[3.0, 3.5, 4.0]]).decode_rate == pytest.approx(2)
    # Two, the second of which begins late: before it the first one's tokens came more quickly, and after it too.
    late = Timing([[1.0, 1.1, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 4.1]])
    assert late.decode_rate == pytest.approx(2)
    # The order within a step makes no difference.
    assert Timing([[1.01, 2.01, 3.01], [1.0, 2.0, 3.0]]).decode_rate == pytest.approx(2, rel=0.02)


def test_bytes_of_weights_that_a_step_reads():
    tied = Config(
        block_size=32, n_layer=1, n_embd=32, n_head=2, padded_vocab_size=64, tie_embeddings=True, lm_head_bias=False
    )
    model = GPT(tied)
    assert weight_bytes_read(model, 1) == sum(p.nbytes for p in model.parameters())
    apart = GPT(replace(tied, tie_embeddings=False))
    assert weight_bytes_read(apart, 1) == weight_bytes_read(model, 1)
    replace_linears(model, "int8", torch.float32)  # its head is a copy
    expected = sum(p.nbytes for p in model.parameters()) - model.transformer.wte.weight.nbytes
    assert weight_bytes_read(model, 1) == expected < weight_bytes_read(apart, 1) / 2


def test_experts_are_read_as_far_as_tokens_choose_them():
    config = Config(
        block_size=32, n_layer=1, n_embd=32, n_head=2, padded_vocab_size=64, mlp_class_name="LLaMAMoE",
        intermediate_size=64, n_expert=8, n_expert_per_token=2, bias=False,
    )  # fmt: skip
    model = GPT(config)
    experts = sum(p.nbytes for p in model.transformer.h[0].mlp.experts.parameters())
    rest = weight_bytes_read(model, 10**6) - experts
    assert weight_bytes_read(model, 1) == pytest.approx(rest + experts / 4)
    assert weight_bytes_read(model, 2) == pytest.approx(rest + experts * (1 - (3 / 4) ** 2))


def test_names_of_tests():
    assert [SpeedTest(512).name, SpeedTest(0, 128).name] == ["pp512", "tg128"]
    assert SpeedTest(0, 128, 8, 1024).name == "tg128 @ d1024 x8"


def test_memory_is_read_at_some_speed():
    speed = read_bandwidth(torch.device("cpu"), 2**20, times=1)
    assert 0 < speed < math.inf
