"""From what a user names to all that an LLM consists of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from litgpt.checkpoint import CONFIG
from litgpt.cli.secret import Secret
from litgpt.config import Config
from litgpt.devices.accelerator import accelerator as best_accelerator
from litgpt.devices.precision import inference_dtypes, inference_precision
from litgpt.formats.config_json import read_config_json
from litgpt.formats.hf_config import config_from_hf
from litgpt.generation.interface import GenerationEngine
from litgpt.llm.placement import Placement
from litgpt.model import GPT
from litgpt.prompts import NamedTemplate, PromptStyle, choose_prompt_style
from litgpt.quantization.layers import check_quantize
from litgpt.quantization.weight_only import KINDS as WEIGHT_ONLY
from litgpt.sources.door import open_model
from litgpt.sources.find import find_here, find_tokenizer
from litgpt.sources.load import kind_for, load_model
from litgpt.sources.meta import give_memory, meta_model
from litgpt.sources.source import Source, Watch
from litgpt.tokenizer.tokenizer import Tokenizer


@dataclass
class Parts:
    """What an LLM is made of; the arguments of `Assistant`."""

    model: GPT
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    name: str | None = None
    checkpoint: Path | str | None = None
    placement: Placement | None = None
    engine: dict[str, Any] = field(default_factory=dict)


def load_parts(
    checkpoint: Path | str,
    *,
    precision: str | None = None,
    compile: bool = False,
    prompt_style: str | PromptStyle | NamedTemplate | None = None,
    access_token: Secret | str | None = None,
    quantize: str | None = None,
    tokenizer_dir: Path | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    placement: Placement | None = None,
    load: Callable[..., GPT] = load_model,
    finetuned: Path | None = None,
    make_engine: Callable[..., GenerationEngine] | None = None,
    tell: Callable[[float], None] | None = None,
) -> Parts:
    """Finds, downloads if need be, and loads a checkpoint: as `LLM.load`, with more to say.

    Args:
        checkpoint, precision, compile, prompt_style, access_token, quantize, tokenizer_dir: As for `LLM.load`.
        device: Where to; by default the best device there is.
        dtype: Type of the weights, in place of a precision.
        placement: Several devices, in place of one.
        load: Makes the model of the opened checkpoint; called as `load_model` is.
        finetuned: The directory of what was finetuned from the checkpoint; its prompt format comes first.
        make_engine: Makes the engine that answers, as `Engine` is made.
        tell: Called with the share of the weights that has been read, as they are.

    Raises:
        FileNotFoundError, ValueError: As for `LLM.load`.
    """
    placement = placement or Placement([torch.device(device or best_accelerator())], load=load)
    device, autocast = placement.device, None
    if dtype is None:
        precision = precision or inference_precision(device)
        dtype, autocast = inference_dtypes(precision, device)
        check_quantize(quantize, precision, training=False, device=device)
    source = open_model(checkpoint, access_token)
    kind = settled_kind(source, quantize, precision, device)
    placement.check(source, kind, compile)
    # The small files first: what is wrong with them is said before the weights are read.
    files = find_tokenizer(tokenizer_dir, access_token) if tokenizer_dir else source.files
    tokenizer = Tokenizer(files)
    style = choose_prompt_style(
        source.files, explicit=prompt_style, config=source.config, tokenizer=tokenizer, finetuned=finetuned
    )
    name = source.config.name or Path(checkpoint).stem
    how = (precision or str(dtype).removeprefix("torch."), kind, str(placement))
    _say(f"Loading {name} ({', '.join(filter(None, how))})")
    if source.note:
        _say(source.note)
    model = placement.load(checkpoint, source, dtype=dtype, quantize=quantize, watch=shown(source, tell))
    reloads = load is load_model
    engine = {"make": make_engine or placement.make_engine, "autocast": autocast, "compile": compile}
    return Parts(model, tokenizer, style, name, checkpoint if reloads else None, placement, engine)


def shown(source: Source, tell: Callable[[float], None] | None = None) -> Watch:
    """What wraps the weights of a checkpoint while they are loaded: it shows a bar if that takes over two seconds.

    Args:
        source: The checkpoint.
        tell: Called with the share of the weights that has been read.
    """
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in source.layout().items()}

    def watch(weights: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        done, total = 0, sum(sizes.values())
        with tqdm(total=total, desc="Loading", unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
            for name, weight in weights:
                yield name, weight
                bar.update(sizes[name])
                done += sizes[name]
                if tell is not None:
                    tell(done / total)

    return watch


def settled_kind(source: Source, quantize: str | None, precision: str | None, device: torch.device) -> str | None:
    """How the model is quantised: as is asked for, or else as its checkpoint is.

    Raises:
        ValueError: It cannot be, or not here.
    """
    kind = kind_for(source, quantize)
    if quantize is None and kind in WEIGHT_ONLY and device.type != "cpu":
        raise ValueError(
            f"The weights in '{source.files}' are {kind}, which is for CPUs, and the model goes to {device}. Give the "
            "checkpoint that they were made from, with --quantize bnb.nf4."
        )
    check_quantize(kind, precision or "32-true", training=False, device=device)
    return kind


def random_parts(
    model: str | Path,
    *,
    tokenizer_dir: str | Path | None,
    places: bool,
    compile: bool,
    precision: str | None,
    prompt_style: str | PromptStyle | NamedTemplate | None,
    access_token: Secret | str | None,
) -> Parts:
    """A model of random weights, with a tokenizer that there is: as `LLM.load`.

    Args:
        places: Whether it goes where it answers quickest; else it stays on the CPU in torch's default type.
        model, tokenizer_dir, compile, precision, prompt_style, access_token: As for `LLM.load`.

    Raises:
        FileNotFoundError, ValueError: As for `LLM.load`.
    """
    config = _shape_of(model)
    if tokenizer_dir is None and not Path(model).is_dir():
        raise ValueError(
            f"init='random' makes the weights of {model}, but not its tokenizer. Give tokenizer_dir, a checkpoint "
            f"(`litgpt download {model} --tokenizer_only true`)."
        )
    tokenizer = Tokenizer(find_tokenizer(tokenizer_dir or model, access_token))
    style = choose_prompt_style(Path(tokenizer.dir), explicit=prompt_style, config=config, tokenizer=tokenizer)
    device = torch.device(best_accelerator() if places else "cpu")
    dtype, autocast = torch.get_default_dtype(), None
    if places:
        dtype, autocast = inference_dtypes(precision or inference_precision(device), device)
    gpt = meta_model(config)
    give_memory(gpt, dtype, device)
    gpt.init_weights()
    return Parts(gpt, tokenizer, style, engine={"autocast": autocast, "compile": compile})


def _say(text: str) -> None:
    """A line about the work, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _shape_of(model: str | Path) -> Config:
    """The configuration of a checkpoint that is here, or of a known name."""
    path = find_here(model, incomplete=True)
    if path is None:
        return Config.from_name(str(model).removeprefix("checkpoints/"))
    if (path / CONFIG).is_file():
        return Config.from_checkpoint(path)
    if (path / "config.json").is_file():
        return config_from_hf(read_config_json(path / "config.json"), str(model))
    return Config.from_name(path.name)
