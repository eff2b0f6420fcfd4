"""Print what a model answers to a prompt."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from litgpt.commands.inference import Assistant, Stopwatch, clean, load_assistant, memory_line, say
from litgpt.generation.sampling import Sampling
from litgpt.prompts.styles import Message

DEFAULT_PROMPT = "What food do llamas eat?"


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    *,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 0.8,
    include_prompt: bool = False,
    prompt_style: str | None = None,
    precision: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    seed: int = 1234,
    access_token: str | None = None,
) -> None:
    """Print a model's answer to a prompt on stdout; timing and the like go to stderr.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        sys_prompt: Replaces the system message of the model's prompt format.
        num_samples: How many answers to print.
        max_new_tokens: An answer ends after so many tokens, if the model does not end it before.
        top_k: Draw from the so many most likely tokens only; 1 always takes the most likely one.
        top_p: Draw from the most likely tokens that together reach this probability.
        min_p: Draw from tokens at least this fraction as likely as the most likely one.
        temperature: Below 1 the answer gets more certain, above 1 more varied; 0 always takes the most likely token.
        include_prompt: Print the prompt, in the model's format, before the answer.
        prompt_style: Name of a prompt format, a class package.module.Class, or a chat template's .jinja file, in place
            of the checkpoint's own; `default` gives the model the bare prompt.
        precision: 32-true, bf16-true, 16-true (weights and computation), bf16-mixed, 16-mixed (float32 weights). By
            default bf16-true where the device computes it in hardware, else 32-true.
        quantize: Not available: refused by name.
        compile: Compile the decoding with torch.compile: it starts slower and then runs faster.
        seed: Of the first answer; the others count on from it.
        access_token: For a gated model that has to be downloaded first.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    if num_samples < 1:
        raise ValueError(f"--num_samples {num_samples} is not possible: give 1 or more.")
    prompt = _piped_prompt() or prompt if prompt == DEFAULT_PROMPT else prompt
    assistant = load_assistant(
        checkpoint_dir,
        precision=precision,
        compile=compile,
        prompt_style=prompt_style,
        access_token=access_token,
        quantize=quantize,
    )
    system: list[Message] = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
    ids = assistant.encode([*system, {"role": "user", "content": clean(prompt)}])
    say(f"Seed set to {seed}")
    if len(ids) + max_new_tokens > assistant.config.block_size > len(ids):
        room = assistant.config.block_size - len(ids)
        say(f"The model's context of {assistant.config.block_size} tokens leaves room for {room} after the prompt.")
    for sample in range(num_samples):
        _answer(assistant, ids, sample + 1, max_new_tokens, sampling, seed + sample, include_prompt)
    say(memory_line(assistant))


def _answer(
    assistant: Assistant,
    prompt: list[int],
    number: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    include_prompt: bool,
) -> None:
    stopwatch = Stopwatch()
    ids = assistant.engine.stream(assistant.request(prompt, max_new_tokens, sampling, seed))
    pieces = assistant.text(stopwatch.count(ids), prompt, joins=include_prompt)
    first = next(pieces, "")  # a prompt that is too long is refused before anything is printed
    if include_prompt:
        print(assistant.tokenizer.decode(prompt), end="")
    print(first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    say(f"Time for inference {number}: {stopwatch.report()}")


def _piped_prompt() -> str:
    """What a pipe or a file on stdin says; "" where stdin is neither."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no stdin, or not a file
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    say("Reading the prompt from standard input (--prompt takes it from the command line)")
    return sys.stdin.read().removesuffix("\n")
