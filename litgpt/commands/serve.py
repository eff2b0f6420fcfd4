"""Answer requests over HTTP."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from litgpt.cli.secret import Secret, hidden_secrets
from litgpt.generation.engine import share_memory
from litgpt.generation.interface import GenerationEngine
from litgpt.generation.sampling import Sampling
from litgpt.kv_cache import layer_cache_of
from litgpt.llm.llm import LLM
from litgpt.llm.loading import LoadOptions, load_parts
from litgpt.llm.placement import place
from litgpt.llm.terminal import say
from litgpt.prompts import format_of_options
from litgpt.serving.served import Defaults, ServedModel, adapted_model
from litgpt.sources.adapted import add_lora
from litgpt.sources.door import find_lora, open_model
from litgpt.sources.find import expect_checkpoint

API_KEY = "LITGPT_API_KEY"


def setup(
    checkpoint_dir: Path,
    *,
    quantize: str | None = None,
    kv_cache: str | None = None,
    precision: str | None = None,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    max_new_tokens: int = 50,
    devices: int | str = 1,
    accelerator: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Secret | None = None,
    stream: bool = False,
    openai_spec: bool = True,
    access_token: Secret | None = None,
    api_path: str | None = "/predict",
    timeout: float = 600,
    max_batch_size: int = 32,
    max_queue: int = 256,
    kv_cache_memory_bytes: str | None = None,
    adapter: list[str] | None = None,
    generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
    prompt_style: str | None = None,
    chat_template: str | None = None,
    compile: bool | None = None,
    allowed_hosts: list[str] | None = None,
    cors_origins: list[str] | None = None,
    access_log: bool = True,
    shutdown_timeout: float = 30,
) -> None:
    """Serve a model over HTTP: POST /predict takes {"prompt": ...}, and /v1 speaks OpenAI's API.

    It listens at once and answers 503 until the model is loaded. Ctrl-C or SIGTERM lets it finish what is running,
    for as long as --shutdown_timeout says; a second Ctrl-C ends it at once. /docs describes the API, /metrics is for
    Prometheus, /health for load balancers.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        quantize: Load the weights in 4 or 8 bits; `litgpt generate --help` lists how.
        kv_cache: int8 keeps keys and values in 8 bits, in about half of the memory. By default they have the type
            that is computed in.
        precision: 32-true, bf16-true, 16-true (weights and computation), bf16-mixed, 16-mixed (float32 weights). By
            default bf16-true where the device computes it in hardware, else 32-true.
        temperature: Of requests that name none: below 1 answers get more certain, 0 takes the most likely token.
        top_k: For requests that set none: sample only from the k most likely tokens.
        top_p: Of requests that name none: draw from the likeliest tokens that together reach this probability.
        max_new_tokens: For requests that set none: the most tokens that /predict and /v1/completions generate.
            A reply of /v1/chat/completions ends after 1,024, or after this where it is more.
        devices: Number of devices that share the model, or their numbers as 0,2; auto takes all. On a CPU, the number
            of processes.
        accelerator: cpu, cuda, mps, or auto for the best there is.
        host: The address to listen on; 0.0.0.0 for all of this machine's. Then set --api_key.
        port: The port to listen on.
        api_key: What clients must send as `Authorization: Bearer KEY`; by default LITGPT_API_KEY of the environment,
            which other users of the machine cannot see.
        stream: Answer /predict in lines of JSON as the text comes. /v1 streams where a request asks for it.
        openai_spec: OpenAI's API is there in any case.
        access_token: For a gated model that has to be downloaded first.
        api_path: Where /predict is.
        timeout: Seconds that a request may take, waiting included, before it is ended: with 504,
            or with an error as the last event of a stream. 0 for no limit.
        max_batch_size: How many answers are generated at a time.
        max_queue: How many more may wait; a request beyond that is refused with 429.
        kv_cache_memory_bytes: The most memory for keys and values, such as 2GB, of all adapters together. Requests wait
            while others need it; one that needs more than all of it is refused. By default nine tenths of what the
            device has left once the model is loaded, half of it on a CPU.
        adapter: NAME=DIR, once or several times: LoRA weights finetuned from this checkpoint (a directory, ours or
            PEFT's, or a Hub id), which requests choose by the model name NAME. The weights of the base are shared; each
            adapter has a batch of its own.
        generate_strategy: How several devices share the model. sequential: each has some blocks, for a model that is
            larger than one device; tensor_parallel: each has a part of every layer, and they work at once.
        prompt_style: Name of a prompt format, a class package.module.Class, or a chat template's .jinja file, in place
            of the checkpoint's own; `default` gives the model the bare prompt.
        chat_template: Name of one of the checkpoint's chat templates, where it has several. By default the usual one,
            and tool_use where tools are given.
        compile: Compile the decoding: on a CPU in the background, for later runs too; a GPU's first answer waits. By
            default on one CPU.
        allowed_hosts: Host names that the server goes by, once or several times; *.example.com for all below one, * for
            any. On 127.0.0.1 it answers to this machine's own names alone, so that no web page can reach it under
            another; a proxy in front of it may need its name here. By default any on other addresses.
        cors_origins: Of web pages of others that may use it from a browser, such as https://example.com, once or
            several times; * for all.
        access_log: A line on stderr for each request: method, path, status, tokens, time. Never what it says.
        shutdown_timeout: Seconds that what is running has to finish after Ctrl-C or SIGTERM; then it is ended.
    """
    # Here, so that the help is there without what only a running server needs.
    from litgpt.serving.application import create_app
    from litgpt.serving.guard import is_loopback
    from litgpt.serving.server import Server, listen
    from litgpt.serving.service import Service

    defaults = Defaults(Sampling(temperature, top_k, top_p), max_new_tokens)
    for name, value, minimum in (
        ("max_new_tokens", max_new_tokens, 1),
        ("max_batch_size", max_batch_size, 1),
        ("max_queue", max_queue, 0),
        ("timeout", timeout, 0),
        ("shutdown_timeout", shutdown_timeout, 0),
    ):
        if not value >= minimum:
            raise ValueError(f"--{name} {value} is not valid: give {minimum} or more.")
    if generate_strategy is not None and str(devices) == "1":
        raise ValueError(
            f"--generate_strategy {generate_strategy} is not supported on one device. Give --devices as well."
        )
    most_bytes = None if kv_cache_memory_bytes is None else _bytes(kv_cache_memory_bytes)
    placement = place(accelerator, devices, generate_strategy)
    if adapter and placement.is_split:
        raise ValueError(
            "--adapter cannot be combined with tensor_parallel. Take sequential, or merge it (litgpt merge_lora)."
        )
    path = "/" + (api_path or "/predict").strip("/")
    if path == "/" or path.startswith(("/v1/", "/static/", "/health", "/metrics", "/docs", "/openapi.json")):
        raise ValueError(f"--api_path {api_path} is taken. Choose another, such as /predict.")
    adapters = dict(_named_lora(spec, access_token) for spec in adapter or ())
    if len(adapters) < len(adapter or ()):
        raise ValueError(f"--adapter: two have the same name ({', '.join(adapter or ())}). Give each its own.")
    style = format_of_options(prompt_style, chat_template)
    hosts, origins = _split(allowed_hosts), [_origin(text) for text in _split(cors_origins)]
    layer_cache_of(kv_cache)
    expect_checkpoint(checkpoint_dir)
    api_key = api_key or (Secret(os.environ[API_KEY]) if os.environ.get(API_KEY) else None)
    service = Service(max_batch_size, max_queue, timeout)
    on_one_cpu = placement.device.type == "cpu" and generate_strategy is None

    def load() -> list[ServedModel]:
        def tell(share: float) -> None:
            service.say(f"loading {checkpoint_dir} ({share:.0%})")

        tell(0)
        options = LoadOptions(
            precision, quantize, on_one_cpu if compile is None else compile, style, access_token, kv_cache
        )
        llm = LLM(load_parts(checkpoint_dir, options, placement=placement, max_slots=max_batch_size, tell=tell))
        placement.on_loss(server.fail)
        models = [ServedModel(llm, defaults, aliases=(str(checkpoint_dir),))]
        for name, lora in adapters.items():
            source = add_lora(open_model(checkpoint_dir, access_token), lora)
            models.append(adapted_model(models[0], name, source, style))
        engines = [each.worker.engine for each in models]
        share_memory(engines, most_bytes)
        say(_memory_line(engines))
        return models

    def announce() -> None:
        names = [each.name for each in service.models]
        say(
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} ready. Listening on {where} ({path}, /v1, "
            "/health, /metrics, /docs, the chat page at /)"
        )
        if api_key is None and not is_loopback(host):
            say("Anybody who reaches this address can use it: --api_key or LITGPT_API_KEY asks for a key.")
        if service.capacity < max_batch_size + max_queue:
            say(
                f"At most {service.capacity} answers run or wait at a time: the system lets a program have only so "
                "many files open. `ulimit -n 4096` before it starts makes room for more."
            )

    listener = listen(host, port)
    host, port = listener.getsockname()[:2]
    if not hosts and not is_loopback(host):
        hosts = ["*"]
    service.requests.write = say if access_log else None
    app = create_app(service, api_path=path, stream=stream, api_key=api_key, hosts=hosts, origins=origins)
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with hidden_secrets():
        server = Server(app, service, load, grace=shutdown_timeout, say=say, announce=announce)
        say(f"Loading {checkpoint_dir}; {where} answers 503 until it is there.")
        try:
            server.serve_on(listener)
        finally:
            placement.close()
        server.leave()


def _split(given: list[str] | None) -> list[str]:
    """What an option that is given several times says; commas separate, too."""
    return [part.strip() for text in given or () for part in text.split(",") if part.strip()]


def _origin(text: str) -> str:
    """An origin as browsers send it.

    Raises:
        ValueError: It is none.
    """
    origin = text.rstrip("/").lower()
    if text not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+", origin):
        raise ValueError(
            f"--cors_origins {text} is not an origin. Write the scheme, host and port of the page, such as "
            "https://example.com or http://localhost:3000; or * for all."
        )
    return origin


def _bytes(text: str) -> float:
    """A number of bytes as people write it.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text.lower())
    if match is None or not float(match[1]):
        raise ValueError(
            f"--kv_cache_memory_bytes {text} is not an amount of memory. Write it as 2GB, 512MiB or 2000000000."
        )
    unit = 1024 if match[3] else 1000
    return float(match[1]) * unit ** (" kmgt".index(match[2]) if match[2] else 0)


def _memory_line(engines: list[GenerationEngine]) -> str:
    """What the requests of all engines may take together."""
    engine, total = engines[0], sum(engine.cache_bytes for engine in engines)
    each = f", {len(engines)} models an equal part each" if len(engines) > 1 else ""
    whole = engine.bytes_needed(engine.context)
    return (
        f"Keys and values may take {total / 1e9:.2f} GB{each} (--kv_cache_memory_bytes); a request as long as the "
        f"context of {engine.context:,} tokens needs {whole / 1e9:.2f} GB."
    )


def _named_lora(spec: str, access_token: Secret | None) -> tuple[str, Path]:
    """The name in NAME=DIR, and where the LoRA weights are.

    Raises:
        ValueError: it is not of that form, or there are no LoRA weights.
    """
    name, _, directory = spec.partition("=")
    if not name or not directory:
        raise ValueError(f"--adapter {spec} is not valid: write NAME=DIR, such as poet=out/finetune/lora/final.")
    try:
        return name, find_lora(directory, access_token)
    except FileNotFoundError as error:
        raise ValueError(f"--adapter {spec}: {error}") from None
