"""Memory for keys and values: a budget that is stated, what never fits is refused, what does not fit now waits."""

import threading

import httpx
import pytest

from litgpt.__main__ import main
from litgpt.generation.engine import Request
from litgpt.serving.server import Server
from tests.serving.conftest import PATIENCE, Brake, running, wait_for


def post(served, **body) -> httpx.Response:
    body = {"prompt": "Hello", "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=PATIENCE)


def test_what_never_fits_is_refused_with_the_figures(chat_directory):
    with running(chat_directory) as small:
        small.engine.cache_bytes = small.engine.bytes_needed(256)
        refused = post(small, max_tokens=400)
        assert refused.status_code == 400
        message = refused.json()["error"]["message"]
        assert f"{small.engine.bytes_needed(512) / 1e6:,.1f} MB" in message
        assert f"{small.engine.cache_bytes / 1e6:,.1f} MB" in message
        assert "max_tokens" in message
        assert post(small, max_tokens=400, stream=True).status_code == 400
        assert post(small, max_tokens=400, n=3).status_code == 400
        assert not small.engine.cache_size
        assert post(small, max_tokens=100).status_code == 200


def test_what_does_not_fit_now_waits(chat_directory):
    with running(chat_directory) as small:
        small.engine.cache_bytes = small.engine.bytes_needed(256)
        brake = Brake(small, after=3)
        running_together = []
        small.engine.model.transformer["wte"].register_forward_pre_hook(
            lambda *_: running_together.append((small.engine.running, small.engine.cache_size))
        )
        responses = []
        threads = [
            threading.Thread(target=lambda: responses.append(post(small, max_tokens=200, n=2))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: small.service.taken == 4 and brake.steps > brake.after)
        assert not responses
        brake.release()
        for thread in threads:
            thread.join(PATIENCE)
        assert [response.status_code for response in responses] == [200, 200]
        assert {len(response.json()["choices"]) for response in responses} == {2}
        assert max(running_together)[0] == 1
        assert max(size for _, size in running_together) <= small.engine.cache_bytes
        brake.remove()


def test_memory_is_given_back_when_the_client_goes_away(chat_directory):
    with running(chat_directory) as served:
        served.engine.kept_bytes = served.engine.bytes_needed(128)
        brake = Brake(served, after=4)
        body = {"prompt": "Hello", "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            assert served.engine.cache_size > served.engine.kept_bytes
        wait_for(lambda: not served.service.taken)
        brake.remove()
        served.wait_until_idle()
        wait_for(lambda: served.engine.cache_size <= served.engine.kept_bytes)


@pytest.mark.parametrize("given", ["3MB", "3000kB", "3000000", "2.861023MiB"])
def test_the_budget_is_an_option_and_stated(chat_directory, monkeypatch, capsys, given):
    served = []

    class Caught(Server):
        def serve_on(self, listener):
            listener.close()
            served.extend(self._load())

        def leave(self):
            """The process goes on."""

    monkeypatch.setattr("litgpt.serving.server.Server", Caught)
    assert main(["serve", str(chat_directory), "--port", "0", "--kv_cache_memory_bytes", given]) == 0
    [model] = served
    assert model.worker.engine.cache_bytes == pytest.approx(3e6, rel=1e-6)
    output = capsys.readouterr()
    assert "Keys and values may take 0.00 GB (--kv_cache_memory_bytes)" in output.out + output.err
    model.check(Request([5] * 100, 100))
    model.worker.close()


@pytest.mark.parametrize("given", ["much", "-1", "0", "3XB"])
def test_another_word_for_it_is_refused(chat_directory, capsys, given):
    assert main(["serve", str(chat_directory), "--port", "0", f"--kv_cache_memory_bytes={given}"]) in (1, 2)
    assert "Write it as 2GB, 512MiB or 2000000000" in capsys.readouterr().err
