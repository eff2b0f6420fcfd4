"""What `generate` and `chat` share: a model, loaded and ready to answer, and what is printed about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from litgpt.checkpoint import resolve_checkpoint_dir
from litgpt.config import Config
from litgpt.convert import load_model, open_checkpoint
from litgpt.distributed import PRECISIONS, accelerator, inference_precision, memory_used
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, choose_prompt_style
from litgpt.prompts.styles import Message, with_input
from litgpt.quantize import check_quantize
from litgpt.tokenizer import Tokenizer


@dataclass
class Assistant:
    """A model with its tokenizer, its prompt format and the engine that runs it."""

    name: str
    config: Config
    tokenizer: Tokenizer
    style: PromptStyle
    engine: Engine
    device: torch.device
    stops: list[list[int]]
    """Token sequences that end an answer."""

    def encode(self, messages: Sequence[Message], input: str = "") -> list[int]:
        """The token ids of a conversation, ready for the reply; `input` is what the last question is about.

        Raises:
            ValueError: the prompt format refuses the conversation, or the tokenizer is not this model's.
        """
        messages, fields = with_input(self.style, messages, input)
        ids = self.style.encode(self.tokenizer, messages, **fields)
        largest = max(ids, default=0)
        if largest >= self.config.padded_vocab_size:
            raise ValueError(
                f"The tokenizer in {self.tokenizer.dir} gives the token id {largest}, but the model's vocabulary ends "
                f"at {self.config.padded_vocab_size - 1}. They do not belong together: copy the model's own tokenizer "
                "there."
            )
        return ids

    def request(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Request:
        return Request(prompt, max_new_tokens, sampling, self.stops, seed)

    def text(self, ids: Iterable[int], prompt: Sequence[int], joins: bool = False) -> Iterator[str]:
        """The answer's text as it comes. Where it `joins` the prompt's text, as after a bare prompt, it keeps the space
        between the two."""
        return self.tokenizer.decode_stream(ids, after=prompt if joins or self.style.continues_text else ())


def load_assistant(
    checkpoint_dir: Path | str,
    *,
    precision: str | None,
    compile: bool,
    prompt_style: str | PromptStyle | None,
    access_token: str | None,
    quantize: str | None = None,
    load: Callable[..., GPT] = load_model,
    finetuned: Path | None = None,
) -> Assistant:
    """Finds, downloads if need be, and loads a checkpoint.

    Args:
        load: Makes the model of the opened checkpoint; called as `load_model` is.
        finetuned: The directory of what was finetuned from the checkpoint; its prompt format comes first.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, it is damaged, or an option cannot act.
    """
    device = torch.device(accelerator())
    precision = precision or inference_precision(device)
    weights_dtype, autocast = parse_precision(precision, device)
    check_quantize(quantize, precision, training=False)
    path = resolve_checkpoint_dir(checkpoint_dir, download=partial(_download, access_token=access_token))
    source = open_checkpoint(path)
    # The small files first: what is wrong with them is said before the weights are read.
    tokenizer = Tokenizer(source.files)
    style = choose_prompt_style(
        source.files, explicit=prompt_style, config=source.config, tokenizer=tokenizer, finetuned=finetuned
    )
    name = source.config.name or path.stem
    say(f"Loading {name} ({', '.join(filter(None, (precision, quantize, device.type)))})")
    if source.note:
        say(source.note)
    model = load(source, dtype=weights_dtype, device=device, quantize=quantize)
    engine = Engine(model, compile=compile, autocast=autocast)
    return Assistant(name, source.config, tokenizer, style, engine, device, style.stop_sequences(tokenizer))


def parse_precision(precision: str, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of the weights, and that of the computation where it is another.

    Raises:
        ValueError: no such precision, or the device cannot compute in it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision} is not known. Choose one of {', '.join(PRECISIONS)}.")
    if precision.startswith("64") and device.type == "mps":
        raise ValueError(f"--precision {precision} cannot act on an Apple GPU. Choose 32-true or less.")
    return PRECISIONS[precision]


def clean(text: str) -> str:
    """What was read from outside, without the lone surrogates that stand for undecodable bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def say(text: str = "") -> None:
    """A line about the work, on stderr: stdout is for what the model says."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


class Stopwatch:
    """Counts the tokens that pass through and the time they take."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.tokens = 0

    def count(self, ids: Iterable[int]) -> Iterator[int]:
        for token_id in ids:
            self.tokens += 1
            yield token_id

    def report(self) -> str:
        seconds = time.perf_counter() - self.started
        return f"{seconds:.02f} sec total, {self.tokens / seconds:.02f} tokens/sec, {self.tokens} tokens"


def memory_line(assistant: Assistant) -> str:
    return f"Memory used: {memory_used(assistant.device) / 1e9:.02f} GB"


def _download(repo_id: str, access_token: str | None) -> Path:
    from litgpt.commands.download import download

    say(f"Downloading {repo_id}")
    return download(repo_id, access_token=access_token)
