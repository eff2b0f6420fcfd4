"""From what a user names to all that an LLM consists of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from litgpt.catalog import find_known
from litgpt.checkpoint import CONFIG
from litgpt.cli.secret import Secret
from litgpt.config import Config
from litgpt.devices.accelerator import accelerator as best_accelerator
from litgpt.devices.precision import inference_dtypes, inference_precision
from litgpt.formats.config_json import read_config_json
from litgpt.formats.hf_config import config_from_hf
from litgpt.generation.interface import MAX_SLOTS, EngineMaker, EngineOptions
from litgpt.kv_cache import layer_cache_of
from litgpt.llm.placement import Placement
from litgpt.model import GPT
from litgpt.prompts import NamedTemplate, PromptStyle, choose_prompt_style
from litgpt.quantization.layers import check_quantize, replace_linears
from litgpt.quantization.weight_only import KINDS as WEIGHT_ONLY
from litgpt.sources.door import open_model
from litgpt.sources.find import find_checkpoint, find_here, find_tokenizer
from litgpt.sources.load import kind_for
from litgpt.sources.meta import give_memory, meta_model
from litgpt.sources.source import Source, Watch
from litgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded, as a user says it."""

    precision: str | None = None
    """32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; None is what the device is best at."""
    quantize: str | None = None
    """Keep the weights in 4 or 8 bits; None leaves them as the checkpoint has them."""
    compile: bool = False
    """Compile the decoding."""
    prompt_style: str | PromptStyle | NamedTemplate | None = None
    """A prompt format in place of the checkpoint's own."""
    access_token: Secret | str | None = None
    """For a gated model that has to be downloaded."""
    kv_cache: str | None = None
    """Keep keys and values in 8 bits ("int8"); None in the type that is computed in."""


@dataclass
class Parts:
    """What an LLM is made of."""

    model: GPT
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    placement: Placement
    """Where the model is."""
    engine: EngineOptions
    """How its engine is to run it."""
    make_engine: EngineMaker
    """What makes that."""
    name: str | None = None
    """What the model is called; None is what its configuration says."""
    checkpoint: Path | str | None = None
    """Where the weights are from, if they may be read again."""


def load_parts(
    checkpoint: Path | str,
    options: LoadOptions = LoadOptions(),
    *,
    placement: Placement | None = None,
    dtype: torch.dtype | None = None,
    tokenizer_dir: Path | str | None = None,
    source: Source | None = None,
    finetuned: Path | None = None,
    max_slots: int = MAX_SLOTS,
    tell: Callable[[float], None] | None = None,
) -> Parts:
    """Find a checkpoint, download it if need be, and load it, saying so on stderr.

    Args:
        checkpoint: What the user named, as for `LLM.load`.
        options: What the user wants of it.
        placement: Where to; by default the best device there is.
        dtype: Type of the weights, in place of a precision.
        tokenizer_dir: A checkpoint whose tokenizer to use in place of the model's own.
        source: What to load in place of the opened checkpoint, such as weights that were finetuned from it.
        finetuned: The directory of these; its prompt format comes first.
        max_slots: How many requests the engine runs at a time.
        tell: Called with the share of the weights that has been read, as they are.

    Raises:
        FileNotFoundError, ValueError: As for `LLM.load`.
    """
    placement = placement or Placement([torch.device(best_accelerator())])
    device, precision, autocast = placement.device, options.precision, None
    if dtype is None:
        precision = precision or inference_precision(device)
        dtype, autocast = inference_dtypes(precision, device)
        check_quantize(options.quantize, precision, training=False, device=device)
    layer_cache_of(options.kv_cache)
    opened = source or open_model(checkpoint, options.access_token)
    kind = settled_kind(opened, options.quantize, precision, device)
    placement.check(opened, kind, options.compile)
    # The small files first: what is wrong with them is said before the weights are read.
    files = find_tokenizer(tokenizer_dir, options.access_token) if tokenizer_dir else opened.files
    tokenizer = Tokenizer(files)
    style = choose_prompt_style(
        opened.files, explicit=options.prompt_style, config=opened.config, tokenizer=tokenizer, finetuned=finetuned
    )
    name = opened.config.name or Path(checkpoint).stem
    how = (precision or str(dtype).removeprefix("torch."), kind, str(placement))
    _say(f"Loading {name} ({', '.join(filter(None, how))})")
    if opened.note:
        _say(opened.note)
    model = placement.load(
        checkpoint,
        opened,
        dtype=dtype,
        quantize=options.quantize,
        kv_cache=options.kv_cache,
        watch=with_progress(opened, tell),
    )
    engine = EngineOptions(max_slots=max_slots, compile=options.compile, autocast=autocast)
    again = checkpoint if source is None else None
    return Parts(model, tokenizer, style, placement, engine, placement.make_engine, name, again)


def with_progress(source: Source, tell: Callable[[float], None] | None = None) -> Watch:
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
            "checkpoint that they were made from, with quantize=bnb.nf4."
        )
    check_quantize(kind, precision or "32-true", training=False, device=device)
    return kind


def check_load(init: str, distribute: str | None, precision: str | None, quantize: str | None) -> None:
    """Refuse arguments of `LLM.load` that are not possible, or not together.

    Raises:
        ValueError: Says which.
    """
    if init not in ("pretrained", "random"):
        raise ValueError(f"init={init!r} is not valid: give 'pretrained' or 'random'.")
    if distribute not in ("auto", None):
        raise ValueError(f"distribute={distribute!r} is not valid: give 'auto' or None.")
    if distribute is None and (precision or quantize):
        option = f"precision={precision!r}" if precision else f"quantize={quantize!r}"
        raise ValueError(
            f"{option} cannot be combined with distribute=None. Give it to `distribute` then, or leave None out."
        )
    if init == "random" and quantize is not None:
        raise ValueError(f"quantize={quantize!r} cannot be combined with init='random': train the model first.")


def random_parts(
    model: str | Path, options: LoadOptions, *, tokenizer_dir: str | Path | None, dtype: torch.dtype | None = None
) -> Parts:
    """A model of random weights, with a tokenizer that there is: as `LLM.load`.

    Args:
        model, tokenizer_dir: As for `LLM.load`.
        options: What the user wants of it; it is not quantised.
        dtype: Stay on the CPU, in this type; None goes where it answers quickest, in the precision of the options.

    Raises:
        FileNotFoundError, ValueError: As for `LLM.load`.
    """
    config = shape_of(model, options.access_token)
    if tokenizer_dir is None and find_here(model, incomplete=True) is None:
        raise ValueError(
            f"init='random' makes the weights of {model}, but not its tokenizer. Give tokenizer_dir, a checkpoint "
            f"(`litgpt download {model} --tokenizer_only true`)."
        )
    tokenizer = Tokenizer(find_tokenizer(tokenizer_dir or model, options.access_token))
    style = choose_prompt_style(Path(tokenizer.dir), explicit=options.prompt_style, config=config, tokenizer=tokenizer)
    device = torch.device(best_accelerator() if dtype is None else "cpu")
    gpt, engine = random_model(config, options, device, dtype)
    placement = Placement([device])
    return Parts(gpt, tokenizer, style, placement, engine, placement.make_engine)


def random_model(
    config: Config, options: LoadOptions, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[GPT, EngineOptions]:
    """A model of random weights, and how its engine is to run it.

    Args:
        config: Its shape.
        options: What the user wants of it; where it is quantised, random weights are.
        device: Where it goes.
        dtype: The type of its weights, in place of the precision of the options.

    Raises:
        ValueError: The device has no such precision or weights.
    """
    autocast = None
    if dtype is None:
        precision = options.precision or inference_precision(device)
        dtype, autocast = inference_dtypes(precision, device)
        check_quantize(options.quantize, precision, training=False, device=device)
    gpt = meta_model(config)
    give_memory(gpt, dtype, device)
    gpt.init_weights()
    gpt.layer_cache = layer_cache_of(options.kv_cache)
    if options.quantize is not None:
        replace_linears(gpt, options.quantize, dtype)
    return gpt.eval(), EngineOptions(compile=options.compile, autocast=autocast)


def _say(text: str) -> None:
    """A line about the work, on stderr."""
    print(text, file=sys.stderr, flush=True)


def shape_of(model: str | Path, access_token: Secret | str | None) -> Config:
    """The configuration of a known name, or of whatever else names a model; its weights are not needed."""
    path, known = find_here(model, incomplete=True), find_known(str(model).removeprefix("checkpoints/"))
    if path is None and known is None:
        path = find_checkpoint(model, access_token, tokenizer_only=True, incomplete=True)
    if path is not None and (path / CONFIG).is_file():
        return Config.from_checkpoint(path)
    if path is not None and (path / "config.json").is_file():
        return config_from_hf(read_config_json(path / "config.json"), str(model))
    return Config.from_name(known.name) if known else open_model(model, access_token).config
