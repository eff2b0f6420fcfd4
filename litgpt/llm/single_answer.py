"""One answer to one prompt, as `generate` and its like print it."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass

from litgpt.cli.notes import notes_wait
from litgpt.cli.secret import Secret
from litgpt.generation.sampling import Sampling
from litgpt.llm.llm import LLM
from litgpt.llm.loading import LoadOptions
from litgpt.llm.terminal import Stopwatch, announce_compilation, clean, cut_line, memory_used_line, say
from litgpt.prompts import format_of_options
from litgpt.prompts.styles import Message

DEFAULT_PROMPT = "What food do llamas eat?"


@dataclass
class Options:
    """The options that every command takes which prints an answer."""

    sys_prompt: str | None = None
    """Replaces the system message of the model's prompt format."""
    num_samples: int = 1
    """How many answers to print."""
    max_new_tokens: int | None = None
    """An answer ends after that many tokens, if the model does not end it before. By default it goes on to the end of
    its turn, or of the context; that of a model without a prompt format, which continues the text, for 256 tokens."""
    top_k: int | None = 50
    """Sample only from the k most likely tokens; 1 always takes the most likely one."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this fraction as likely as the most likely one."""
    temperature: float = 0.8
    """Below 1 the answer gets more certain, above 1 more varied; 0 always takes the most likely token."""
    include_prompt: bool = False
    """Print the prompt, in the model's format, before the answer."""
    prompt_style: str | None = None
    """Name of a prompt format, a class package.module.Class, or a chat template's .jinja file, in place of the
    checkpoint's own; `default` gives the model the bare prompt."""
    chat_template: str | None = None
    """Name of one of the checkpoint's chat templates, where it has several; by default the usual one."""
    precision: str | None = None
    """32-true, bf16-true, 16-true (weights and computation), bf16-mixed, 16-mixed (float32 weights). By default
    bf16-true where the device computes it in hardware, else 32-true."""
    quantize: str | None = None
    """Keep the weights in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8; for CPUs int4 or int8, or
    gguf, the blocks of a GGUF file as they lie in it. By default as the checkpoint has them."""
    kv_cache: str | None = None
    """int8 keeps keys and values in 8 bits, in about half of the memory. By default they are in the type that is
    computed in."""
    compile: bool = False
    """Compile the decoding: on a CPU in the background, for later runs too; a GPU's first answer waits."""
    seed: int = 1234
    """Of the first answer; the others count on from it."""
    access_token: Secret | None = None
    """For a gated model that has to be downloaded first."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} is not valid: give 1 or more.")
        _ = self.sampling  # refuses what is not valid

    @property
    def sampling(self) -> Sampling:
        """How tokens are sampled."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed=self.seed)

    @property
    def loading(self) -> LoadOptions:
        """How the model is loaded."""
        style = format_of_options(self.prompt_style, self.chat_template)
        return LoadOptions(self.precision, self.quantize, self.compile, style, self.access_token, self.kv_cache)


def read_prompt(prompt: str) -> str:
    """The prompt that is given; the default stands for one that is piped in."""
    return _piped_prompt() or prompt if prompt == DEFAULT_PROMPT else prompt


def print_answers(llm: LLM, prompt: str, options: Options, input: str = "") -> None:
    """Print what a model answers, and what was measured.

    Args:
        llm: The model.
        prompt: What to answer.
        options: The command's.
        input: What the prompt is about, in a prompt format's place for it, or after the prompt.
    """
    system: list[Message] = [] if options.sys_prompt is None else [{"role": "system", "content": options.sys_prompt}]
    ids = llm.codec.encode([*system, {"role": "user", "content": clean(prompt)}], clean(input))
    say(f"Seed set to {options.seed}")
    new, context = options.max_new_tokens, llm.config.block_size
    if new is not None and len(ids) + new > context > len(ids):
        say(f"The model's context of {context} tokens leaves room for {context - len(ids)} after the prompt.")
    if options.compile:
        announce_compilation(llm)
    for index in range(options.num_samples):
        _print_answer(llm, ids, index, options)
    say(memory_used_line(llm))


def _print_answer(llm: LLM, prompt: list[int], index: int, options: Options) -> None:
    """One of the answers, which has a seed of its own."""
    stopwatch = Stopwatch()
    request = llm.codec.request(prompt, options.max_new_tokens, options.sampling.following(index))
    pieces = llm.codec.text(stopwatch.count(llm.live.stream(request)), prompt, joins=options.include_prompt)
    first = next(pieces, "")  # a prompt that is too long is refused before anything is printed
    if options.include_prompt:
        print(llm.tokenizer.decode(prompt), end="")
    with notes_wait():
        print(first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    if line := cut_line(llm, stopwatch, len(prompt), options.max_new_tokens):
        say(line)
    say(f"Time for inference {index + 1}: {stopwatch.report()}")


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
