"""`litgpt generate`: what it prints, where, and what its options do."""

import io
import os
import re
import subprocess
import sys

import pytest
import torch

from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.prompts import PromptStyle
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import checkpoint_files

# Greedy, in the precision that the expected answers are computed in, whatever this machine's own choice is.
GREEDY = ("--top_k", "1", "--precision", "32-true")
TIMING = r"Time for inference {}: \d+\.\d\d sec total, \d+\.\d\d tokens/sec, {} tokens"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return checkpoint_files.chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory):
    return checkpoint_files.bare_model(tmp_path_factory.mktemp("bare"))


def answer(directory, text: str, count: int, style: str | None = "chatml") -> str:
    tokenizer, style = Tokenizer(directory), PromptStyle.from_name(style)
    prompt = style.encode(tokenizer, [{"role": "user", "content": text}])
    model = load_model(directory, dtype=torch.float32)
    return tokenizer.decode(Engine(model).complete([Request(prompt, count, Sampling(0))])[0])


def test_the_answer_alone_is_on_stdout_and_the_timing_on_stderr(litgpt, chat_model):
    result = litgpt("generate", chat_model, "--prompt", "Hello", *GREEDY, "--max_new_tokens", 12)
    assert result.code == 0
    assert result.out == answer(chat_model, "Hello", 12) + "\n"
    assert re.search(TIMING.format(1, 12), result.err)
    assert re.search(r"^Memory used: \d+\.\d\d GB$", result.err, re.MULTILINE)
    assert "Seed set to 1234" in result.err


def test_what_one_answer_on_one_device_does_not_need_is_not_imported(chat_model):
    words = ["generate", str(chat_model), "--prompt", "Hello", "--max_new_tokens", "3"]
    unused = ["litgpt.generation.compiled", "litgpt.parallel.tensor_parallel", "litgpt.llm.leader", "sympy"]
    code = (
        f"import sys; from litgpt.__main__ import main; assert main({words}) == 0;"
        f"sys.exit(f'imported {{found}}' if (found := {set(unused)} & set(sys.modules)) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr


def test_the_prompt_is_printed_on_request_with_the_space_after_it(litgpt, bare_model):
    tokenizer, model = Tokenizer(bare_model), load_model(bare_model, dtype=torch.float32)
    prompt = tokenizer.encode_ids("To be, or not")
    reply = Engine(model).complete([Request(prompt, 8, Sampling(0))])[0]
    whole = tokenizer.decode([*prompt, *reply])
    assert whole.startswith("To be, or not ")  # this space is dropped where the reply is decoded alone
    options = ("generate", bare_model, "--prompt", "To be, or not", *GREEDY, "--max_new_tokens", 8)
    assert litgpt(*options).out == whole.removeprefix("To be, or not") + "\n"
    assert litgpt(*options, "--include_prompt", "true").out == whole + "\n"


def test_an_answer_goes_on_to_its_end_and_a_limit_that_cuts_it_is_said(litgpt, tmp_path):
    directory = checkpoint_files.chat_model(tmp_path, block_size=128)
    result = litgpt("generate", directory, "--prompt", "Hello", *GREEDY)
    prompt = PromptStyle.from_name("chatml").encode(Tokenizer(directory), [{"role": "user", "content": "Hello"}])
    assert result.out == answer(directory, "Hello", 128 - len(prompt)) + "\n"
    assert "The answer was cut: the model's context of 128 tokens is full." in result.err
    cut = litgpt("generate", directory, "--prompt", "Hello", *GREEDY, "--max_new_tokens", 12)
    assert "The answer was cut after --max_new_tokens 12;" in cut.err


def test_samples_count_on_from_the_seed(litgpt, chat_model):
    def run(seed, samples):
        out = litgpt(
            "generate", chat_model, "--prompt", "Hi", "--num_samples", samples, "--seed", seed, "--max_new_tokens", 4
        )
        timings = [line for line in out.err.splitlines() if line.startswith("Time for inference")]
        assert [re.match(TIMING.format(n + 1, 4), line) is not None for n, line in enumerate(timings)] == [
            True
        ] * samples
        return out.out

    three = run(5, 3)
    assert three == run(5, 1) + run(6, 1) + run(7, 1)
    assert run(5, 1) != run(6, 1)


def test_prompt_style_and_system_prompt_act(litgpt, chat_model):
    options = (
        "generate",
        chat_model,
        "--prompt",
        "Hello",
        "--top_k",
        1,
        "--max_new_tokens",
        8,
        "--include_prompt",
        "true",
    )
    assert litgpt(*options).out.startswith("user\nHello\nassistant\n")
    assert litgpt(*options, "--sys_prompt", "Be brief").out.startswith("system\nBe brief\nuser\nHello\nassistant\n")
    assert litgpt(*options, "--prompt_style", "alpaca").out.startswith("Below is an instruction")
    assert litgpt(*options, "--prompt_style", "default").out.startswith("Hello")
    wrong = litgpt(*options, "--prompt_style", "alpca")
    assert (wrong.code, wrong.out) == (1, "")
    assert "Did you mean 'Alpaca'" in wrong.err


def test_a_prompt_may_be_piped_in(chat_model):
    command = [sys.executable, "-m", "litgpt", "generate", str(chat_model), *GREEDY, "--max_new_tokens", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input="Hello\nworld\n", capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == answer(chat_model, "Hello\nworld", 6) + "\n"
    assert "Reading the prompt from standard input" in done.stderr


def test_a_prompt_on_the_command_line_leaves_stdin_alone(litgpt, chat_model, monkeypatch):
    class Untouched(io.StringIO):
        def read(self, *_):
            raise AssertionError("stdin was read")

    monkeypatch.setattr(sys, "stdin", Untouched("x"))
    assert litgpt("generate", chat_model, "--prompt", "Hello", "--max_new_tokens", 2).code == 0
    assert litgpt("generate", chat_model, "--max_new_tokens", 2).code == 0  # no pipe: the default prompt


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "bf16-mixed"])
def test_precision_acts(litgpt, chat_model, precision, monkeypatch):
    seen = []

    def spy(self, request):
        seen.append((self.model.lm_head.weight.dtype, self.autocast))
        return original(self, request)

    original = Engine.submit
    monkeypatch.setattr(Engine, "submit", spy)
    result = litgpt("generate", chat_model, "--prompt", "Hi", "--precision", precision, "--max_new_tokens", 3)
    assert result.code == 0
    kinds = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
    kind = kinds[precision.split("-")[0]]
    assert seen == [(torch.float32, kind) if precision.endswith("mixed") else (kind, None)]
    assert f"({precision}, " in result.err


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(litgpt, tmp_path):
    directory = checkpoint_files.chat_model(tmp_path, block_size=32)
    result = litgpt("generate", directory, "--prompt", "word " * 100)
    assert (result.code, result.out) == (1, "")
    assert re.search(r"error: The prompt has \d{3} tokens, and the model's context of 32 tokens", result.err)
    assert "Traceback" not in result.err


def test_room_that_the_context_does_not_have_is_said(litgpt, tmp_path):
    directory = checkpoint_files.chat_model(tmp_path, block_size=32)
    result = litgpt("generate", directory, "--prompt", "hi", "--top_k", 1, "--max_new_tokens", 50)
    assert result.code == 0
    room = int(re.search(r"context of 32 tokens leaves room for (\d+) after the prompt", result.err)[1])
    assert re.search(TIMING.format(1, room), result.err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "bnb.nf5"), "--quantize bnb.nf5 is not for inference. Choose one of: bnb.nf4,"),
        (("--precision", "bf8"), "--precision bf8 is not known. Choose one of 32-true"),
        (("--top_p", "1.5"), "top_p 1.5 is not valid"),
        (("--temperature", "-1"), "temperature -1.0 is not valid"),
        (("--num_samples", "0"), "--num_samples 0 is not valid"),
        (("--max_new_tokens", "0"), "max_new_tokens 0 is not valid"),
    ],
)
def test_an_option_that_cannot_act_is_refused_by_name(litgpt, chat_model, options, message):
    result = litgpt("generate", chat_model, "--prompt", "Hi", *options)
    assert result.code != 0
    assert result.out == ""
    assert message in result.err
    assert "Traceback" not in result.err


def test_damaged_checkpoints_are_named_before_anything_is_printed(litgpt, tmp_path):
    missing = litgpt("generate", tmp_path / "nowhere", "--prompt", "Hi")
    assert missing.code == 1
    assert "nowhere" in missing.err
    directory = checkpoint_files.chat_model(tmp_path / "model")
    (directory / "tokenizer.json").unlink()
    without = litgpt("generate", directory, "--prompt", "Hi")
    assert without.code == 1
    assert "neither tokenizer.json nor tokenizer.model" in without.err
    assert without.out == ""


def test_a_tokenizer_of_another_model_is_noticed(litgpt, tmp_path):
    directory = checkpoint_files.chat_model(tmp_path)
    config = (directory / "tokenizer_config.json").read_text()
    beyond = '{"added_tokens_decoder": {"5000": {"content": "<|im_x|>"}}, "chat_template": "<|im_x|>hi", '
    (directory / "tokenizer_config.json").write_text(beyond + config[1:].replace("chat_template", "unused"))
    result = litgpt("generate", directory, "--prompt", "Hi")
    assert result.code == 1
    assert "gives the token id 5000, but the model's vocabulary ends at 703" in result.err


def test_smollm2_knows_the_capital_of_france(litgpt, smollm2_gguf):
    prompt = "What is the capital of France?"
    result = litgpt("generate", smollm2_gguf, "--prompt", prompt, "--top_k", 1, "--precision", "32-true")
    assert result.out == "The capital of France is Paris.\n"
