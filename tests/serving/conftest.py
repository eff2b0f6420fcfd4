"""Real servers on loopback, in threads of this process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx
import openai
import pytest
import torch

from litgpt.checkpoint import WEIGHTS
from litgpt.generation.engine import Engine
from litgpt.llm.llm import LLM
from litgpt.llm.loading import LoadOptions, load_parts
from litgpt.llm.placement import Placement
from litgpt.serving.application import create_app
from litgpt.serving.connections import Limits
from litgpt.serving.served import ServedModel, adapted_model
from litgpt.serving.server import Server, listen
from litgpt.serving.service import Service
from litgpt.sources.adapted import add_lora
from litgpt.sources.door import open_model
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import checkpoint_files, tokenizer_files

PATIENCE = 120  # seconds that a busy machine is given

# As Hermes and Qwen write tools and calls.
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Write <tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if opening %}{{ '' + opening }}{% endif %}{% endif %}"
)


@dataclass
class Running:
    """A server that runs."""

    server: Server
    service: Service
    engine: Engine
    url: str
    thread: threading.Thread

    @property
    def engines(self) -> list[Engine]:
        return [model.worker.engine for model in self.service.models]

    @property
    def model(self) -> ServedModel:
        return self.service.models[0]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def wait_until_idle(self) -> None:
        """Until no answer runs or waits; fails where one stays."""
        wait_for(lambda: not self.service.taken and not any(e.running or e.waiting for e in self.engines))


class Brake:
    """Holds a server's model up after this many steps until it is let go, and counts its steps.

    What must happen to an answer before its end happens while the model stands still, however quick or busy the machine.
    """

    def __init__(self, served: Running, after: int = 0) -> None:
        self.steps, self.after, self.free = 0, after, threading.Event()
        self.handle = served.engine.model.transformer["h"][0].register_forward_pre_hook(self.hold)

    def hold(self, *_) -> None:
        self.steps += 1
        if self.steps > self.after:
            self.free.wait(PATIENCE)

    def release(self) -> None:
        """Lets it run on; steps are still counted."""
        self.free.set()

    def remove(self) -> None:
        self.release()
        self.handle.remove()


def wait_for(condition: Callable[[], object]) -> None:
    """Until it holds. The bound is no claim about time: it ends a test that would wait forever."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what is waited for does not come"
        time.sleep(0.01)


@contextmanager
def running(
    directory: Path,
    *,
    slots: int = 8,
    queue: int = 64,
    timeout: float = 0,
    before_loading: Callable[[], None] = lambda: None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    limits: Limits | None = None,
    grace: float = 30,
    log: list[str] | None = None,
    **options,
) -> Iterator[Running]:
    """A server for a checkpoint, in float32; `options` go to the application."""
    placement = Placement([torch.device("cpu")])
    llm = LLM(load_parts(directory, LoadOptions("32-true"), placement=placement, max_slots=slots))
    service = Service(slots, queue, timeout)
    service.requests.write = None if log is None else log.append

    def load() -> list[ServedModel]:
        before_loading()
        base = ServedModel(llm)
        loras = {name: add_lora(open_model(directory), path) for name, path in adapters.items()}
        return [base, *(adapted_model(base, name, lora, None) for name, lora in loras.items())]

    server = Server(create_app(service, **options), service, load, limits, grace)
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.serve_on, args=(listener,))
    thread.start()
    try:
        if before_loading.__name__ == "<lambda>":
            wait_until_ready(url)
        yield Running(server, service, llm.engine, url, thread)
    finally:
        server.stop(finish=False)
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until_ready(url: str) -> None:
    def ready() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(ready)


def raw_request(url: str, data: bytes) -> bytes:
    """What the server answers to these bytes, up to where it closes the connection or is silent."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            pass
        return received


def connect(url: str, *parts: bytes) -> socket.socket:
    """A connection on which so much has been sent."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    for part in parts:
        connection.sendall(part)
    return connection


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory) -> Path:
    """A random model that writes printable text, with a chat template that has a place for tools."""
    directory = tmp_path_factory.mktemp("chat")
    config = {"chat_template": TOOLS_TEMPLATE, "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer(tokenizer_files.byte_level(directory, config))
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    printable = [i for i, token in enumerate(tokens) if i > 2 and token.isascii() and token.decode().isprintable()]
    checkpoint_files.with_model(directory, 512)
    weights = torch.load(directory / WEIGHTS, weights_only=True)
    head = torch.zeros_like(weights["lm_head.weight"])
    head[printable] = weights["lm_head.weight"][printable]
    torch.save({**weights, "lm_head.weight": head}, directory / WEIGHTS)
    return directory


@pytest.fixture(scope="session")
def served(chat_directory) -> Iterator[Running]:
    with running(chat_directory) as server:
        yield server
