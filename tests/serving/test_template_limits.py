"""Requests that make the chat template loop or fill the memory: each is refused, and the server goes on."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from litgpt.prompts import rendering
from tests import checkpoint_files, tokenizer_files
from tests.serving.conftest import PATIENCE, running

BOMBS = (
    "{% if bomb == 'loops' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if bomb == 'memory' %}{{ 'x' * 10**10 }}{% endif %}"
    "{% if bomb == 'text' %}{{ 'x' * size }}{% endif %}"
    "{% if bomb == 'power' %}{{ size ** size }}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoint_files.chat_model(tmp_path_factory.mktemp("bombs"), template=BOMBS + tokenizer_files.CHATML)


def test_eight_bombs(directory, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    with running(directory) as served, ThreadPoolExecutor(16) as pool:

        def chat(**variables: object) -> httpx.Response:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
            body["chat_template_kwargs"] = variables
            return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=PATIENCE)

        kinds = [{"bomb": "loops"}, {"bomb": "memory"}, {"bomb": "power", "size": 10**9}]
        answers = [pool.submit(chat, **kinds[number % 3]) for number in range(8)]
        for _ in range(5):
            assert httpx.get(f"{served.url}/health", timeout=PATIENCE).json()["status"] == "ok"
        assert pool.submit(chat).result().status_code == 200
        for answer in (future.result() for future in answers):
            assert answer.status_code == 400
            assert "The checkpoint's chat template takes more than" in answer.json()["error"]["message"]
        too_long = chat(bomb="text", size=10**6)  # no bomb, but more than the context holds
        assert too_long.status_code == 400
        assert chat().status_code == 200
        served.wait_until_idle()
    # and ends when it is told to: `running` sees to that
