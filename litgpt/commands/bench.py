"""Measure how many tokens per second a model reads and writes on this machine, as llama-bench does.

With --json FILE a list is written, of an object for each test. Names that llama-bench has mean the same: cpu_info,
gpu_info, backends, model_filename, model_type, model_size (bytes), model_n_params, n_threads, type_k, type_v, n_prompt,
n_gen, n_depth, test_time, avg_ns, stddev_ns, avg_ts, stddev_ts, samples_ns, samples_ts. Ours besides:

    litgpt_version, torch_version
    precision, quantize, kv_cache, compile   how the model was run
    n_parallel                     requests at a time; avg_ts and samples_ts are of all of them together
    first_token_s                  seconds to the first token: {median, worst} over all requests
    peak_memory_bytes              of the process, or of the GPU, during the test
    step_bytes, bandwidth          bytes of weights, keys and values that a decode step reads, and that times the steps
                                   per second; null for prompts
    stream_bandwidth               bytes per second at which this machine reads its memory
"""

from __future__ import annotations

import datetime
import statistics
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any, Literal

import torch

import litgpt
from litgpt.cli.secret import Secret
from litgpt.devices.accelerator import device_name
from litgpt.devices.bandwidth import read_bandwidth
from litgpt.devices.precision import inference_precision
from litgpt.generation.live import LiveEngine
from litgpt.llm.loading import LoadOptions, load_parts, random_model, shape_of
from litgpt.llm.placement import place
from litgpt.llm.speed_test import SpeedResult, SpeedTest, check_room, run_test
from litgpt.llm.terminal import say
from litgpt.quantization.layers import kind_of, num_parameters


def setup(
    checkpoint_dir: Path,
    *,
    prompt_tokens: int | str = 512,
    new_tokens: int | str = 128,
    depth: int | str = 0,
    batch_sizes: int | str = 1,
    repetitions: int = 5,
    json: Path | None = None,
    init: Literal["pretrained", "random"] = "pretrained",
    quantize: str | None = None,
    kv_cache: str | None = None,
    precision: str | None = None,
    compile: bool | None = None,
    threads: int | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
    access_token: Secret | None = None,
) -> None:
    """Measure how many tokens per second a model reads (pp) and writes (tg), for one request and for many at a time.

    The table goes to stdout, one test a row as llama-bench has them: pp512 reads prompts of 512 tokens, tg128 writes
    answers of 128; "x8" is for 8 requests at a time, whose tokens count together. Figures are the mean and standard
    deviation over the repetitions, after one that is not counted. The engine is the one that answers in `generate` and
    `serve`; prompts are random tokens.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        prompt_tokens: Lengths of prompts to read, such as 512 or 128,512; 0 for none.
        new_tokens: Lengths of answers to write; 0 for none.
        depth: Tokens that each request holds before a test begins; several are possible.
        batch_sizes: How many requests at a time, such as 1,8,32.
        repetitions: How often each test is measured.
        json: A file to write all figures to.
        init: Take the checkpoint's weights, or random ones for a model of this shape, for which a known name suffices.
        quantize: Keep the weights in 4 or 8 bits; `litgpt generate --help` lists how. By default as the checkpoint has
            them.
        kv_cache: int8 keeps keys and values in 8 bits.
        precision: 32-true, bf16-true, 16-true (weights and computation), bf16-mixed, 16-mixed (float32 weights). By
            default bf16-true where the device computes it in hardware, else 32-true.
        compile: Compile the decoding, which is waited for before the clock starts. By default on one CPU, as in
            `serve`.
        threads: Of a CPU; by default one for each core.
        accelerator: cpu, cuda, mps, or auto for the best there is.
        devices: Number of devices that share the model, or their numbers as 0,2; auto takes all.
        generate_strategy: How several devices share the model: sequential or tensor_parallel.
        access_token: For a gated model that has to be downloaded first.
    """
    tests = planned(prompt_tokens, new_tokens, depth, batch_sizes)
    for name, value in (("repetitions", repetitions), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is not valid: give 1 or more.")
    if json is not None:
        json.open("a").close()  # that it cannot be written is said before the model is loaded
    if threads is not None:
        torch.set_num_threads(threads)
    placement = place(accelerator, devices, generate_strategy)
    on_cpu = placement.device.type == "cpu"
    compile = on_cpu and generate_strategy is None if compile is None else compile
    options = LoadOptions(precision, quantize, compile, None, access_token, kv_cache)
    if init == "random":
        if placement.strategy is not None:
            raise ValueError("--init random cannot act with --generate_strategy. Leave one of them out.")
        config = shape_of(checkpoint_dir, access_token)
        name = config.name
        model, engine_options = random_model(config, options, placement.device)
    else:
        parts = load_parts(checkpoint_dir, options, placement=placement)
        model, engine_options, name = parts.model, parts.engine, parts.name
    engine_options = replace(
        engine_options,
        max_slots=max(test.batch_size for test in tests),
        # The cache is then as large before a test as it has to be in it.
        fixed_length=max(test.longest for test in tests) if any(test.depth for test in tests) else None,
    )
    engine = LiveEngine(model, placement.make_engine, engine_options)
    for test in tests:
        check_room(engine, test)
    kind, weights = kind_of(model), sum(p.nbytes for p in model.parameters())
    dtype = str(engine_options.autocast or model.transformer.wte.weight.dtype).removeprefix("torch.")
    machine = {
        "litgpt_version": litgpt.__version__,
        "torch_version": torch.__version__,
        "cpu_info": device_name(torch.device("cpu")),
        "gpu_info": "" if on_cpu else device_name(placement.device),
        "backends": str(placement).upper() if on_cpu else str(placement),
        "n_threads": torch.get_num_threads(),
        "model_filename": str(checkpoint_dir),
        "model_type": f"{name} {kind or str(model.transformer.wte.weight.dtype).removeprefix('torch.')}",
        "model_size": weights,
        "model_n_params": num_parameters(model),
        "init": init,
        "precision": precision or inference_precision(placement.device),
        "quantize": kind,
        "kv_cache": kv_cache,
        "type_k": kv_cache or dtype,
        "type_v": kv_cache or dtype,
        "compile": compile,
    }
    stream = 0.0 if placement.strategy else read_bandwidth(placement.device, weights)
    rows: list[dict[str, Any]] = []
    print(header(machine), flush=True)
    try:
        for test in tests:
            say(f"{test.name} ...")
            result = run_test(engine, test, repetitions, is_whole=placement.strategy is None)
            rows.append({**machine, **figures(result, stream)})
            print(table_row(machine, result, stream), flush=True)
            if json is not None:
                json.write_text(dumps(rows, indent=2) + "\n", encoding="utf-8")
    finally:
        placement.close()
    if stream:
        say(f"This machine reads its memory at {stream / 1e9:.1f} GB/s; the last column is the share of that.")


def planned(
    prompt_tokens: int | str, new_tokens: int | str, depth: int | str, batch_sizes: int | str
) -> list[SpeedTest]:
    """All tests, those of one batch size together.

    Raises:
        ValueError: There are none, or a number is not valid.
    """
    prompts, news = _numbers("prompt_tokens", prompt_tokens, 0), _numbers("new_tokens", new_tokens, 0)
    tests = []
    for batch_size in _numbers("batch_sizes", batch_sizes, 1):
        for held in _numbers("depth", depth, 0):
            tests += [SpeedTest(count, 0, batch_size, held) for count in prompts if count]
            tests += [SpeedTest(0, count, batch_size, held) for count in news if count]
    if not tests:
        raise ValueError("--prompt_tokens 0 with --new_tokens 0 leaves nothing to measure. Give one of them.")
    return tests


def _numbers(option: str, given: int | str, minimum: int) -> list[int]:
    """What an option says that takes several numbers.

    Raises:
        ValueError: One is not valid.
    """
    try:
        numbers = [int(part) for part in str(given).split(",")]
    except ValueError:
        raise ValueError(f"--{option} {given} is not valid: give numbers with commas between them, as 1,8.") from None
    for number in numbers:
        if number < minimum:
            raise ValueError(f"--{option} {number} is not valid: give {minimum} or more.")
    return numbers


def figures(result: SpeedResult, stream: float) -> dict[str, Any]:
    """What is written of a test."""
    test, rates = result.test, result.rates
    tokens = test.batch_size * (test.prompt_tokens or test.new_tokens)
    nanoseconds = [round(tokens / rate * 1e9) for rate in rates]
    return {
        "n_prompt": test.prompt_tokens,
        "n_gen": test.new_tokens,
        "n_depth": test.depth,
        "n_parallel": test.batch_size,
        "test_time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.mean(nanoseconds)),
        "stddev_ns": round(statistics.stdev(nanoseconds)) if len(nanoseconds) > 1 else 0,
        "avg_ts": result.rate,
        "stddev_ts": result.deviation,
        "samples_ns": nanoseconds,
        "samples_ts": rates,
        "first_token_s": {"median": statistics.median(result.first_tokens), "worst": max(result.first_tokens)},
        "peak_memory_bytes": int(result.peak_bytes),
        "step_bytes": result.step_bytes or None,
        "bandwidth": result.bandwidth or None,
        "stream_bandwidth": stream or None,
    }


COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s", "first token", "memory", "reads")


def header(machine: dict[str, Any]) -> str:
    """The first two lines of the table."""
    right = {"size", "params", "threads", "test", "t/s", "first token", "memory", "reads"}
    lines = " | ".join("---:" if name in right else "---" for name in COLUMNS)
    return f"| {' | '.join(COLUMNS)} |\n| {lines} |"


def table_row(machine: dict[str, Any], result: SpeedResult, stream: float) -> str:
    """A test's line of the table."""
    reads = f"{result.bandwidth / 1e9:.1f} GB/s" if result.bandwidth else ""
    if reads and stream:
        reads += f", {result.bandwidth / stream:.0%}"
    cells = (
        machine["model_type"],
        _size(machine["model_size"]),
        f"{machine['model_n_params'] / 1e6:.2f} M",
        machine["backends"],
        machine["n_threads"],
        result.test.name,
        f"{result.rate:.2f} ± {result.deviation:.2f}",
        f"{statistics.median(result.first_tokens) * 1e3:.0f} ms",
        _size(result.peak_bytes),
        reads,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _size(num_bytes: float) -> str:
    """As llama-bench writes it."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
