"""Many clients at once, many of which misbehave: nobody is lost, no slot leaks, memory stays, answers are right."""

import asyncio
import contextlib
import gc
import json
import random

import httpx
import psutil
import pytest

from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from tests.serving.conftest import running

BAD = [b"{", b"[]", b'{"messages": 5}', b'{"messages": [{"role": "user", "content": "x"}], "n": 0}', b"\xff" * 50]
CLIENTS = 32


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_traffic(chat_directory, count):
    with running(chat_directory, slots=8, queue=200) as served:
        draws = random.Random(0)
        prompts = [" ".join(draws.choice(("one", "two", "Hello", "def f(x):")) for _ in range(draws.randrange(1, 30)))
                   for _ in range(25)]  # fmt: skip
        alone = Engine(served.engine.model)
        expected = {}
        for prompt in prompts:
            ids = served.model.codec.encode([{"role": "user", "content": prompt}])
            [tokens] = alone.complete([Request(ids, 40, Sampling(0), served.model.stops)])
            expected[prompt] = [served.model.codec.tokenizer.decode(tokens[: size + 1]) for size in range(40)]
        asyncio.run(clients(served.url, count // 4, prompts, expected, random.Random(1)))
        served.wait_until_idle()
        before = memory()
        tally = asyncio.run(clients(served.url, count, prompts, expected, random.Random(2)))
        served.wait_until_idle()
        grown = memory() - before
        assert served.engine.running == served.engine.waiting == served.service.taken == 0
        assert not served.model.worker._deliveries
        assert sum(tally.values()) == count
        assert all(tally[kind] > count // 20 for kind in KINDS), tally
        assert grown < 30e6 + 5e3 * count
        assert httpx.get(f"{served.url}/health").json()["running"] == 0


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


async def clients(url: str, count: int, prompts: list[str], expected: dict, draws: random.Random) -> dict[str, int]:
    """So many requests by CLIENTS clients; how many there were of each kind."""
    tally = dict.fromkeys(KINDS, 0)
    plans = [(draws.choice(list(KINDS)), draws.choice(prompts), draws.randrange(1, 40), draws.random() / 5)
             for _ in range(count)]  # fmt: skip
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def one_client() -> None:
            while plans:
                kind, prompt, size, delay = plans.pop()
                await KINDS[kind](client, prompt, size, delay, expected[prompt][size - 1])
                tally[kind] += 1

        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
    return tally


def body(prompt: str, size: int, **options) -> dict:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": size, "temperature": 0, **options}


async def whole(client, prompt, size, delay, expected) -> None:
    response = await client.post("/v1/chat/completions", json=body(prompt, size))
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == expected


async def streamed(client, prompt, size, delay, expected) -> None:
    text, done = "", False
    async with client.stream("POST", "/v1/chat/completions", json=body(prompt, size, stream=True)) as response:
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert done
    assert text == expected


async def cancelled(client, prompt, size, delay, expected) -> None:
    """Goes away, perhaps before the answer is whole."""
    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
        await asyncio.wait_for(client.post("/v1/chat/completions", json=body(prompt, 300, n=2)), delay)


async def hung_up(client, prompt, size, delay, expected) -> None:
    """Goes away in the middle of a stream."""
    request = body(prompt, 300, stream=True)
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        async for _ in response.aiter_lines():
            break


async def bad(client, prompt, size, delay, expected) -> None:
    content = BAD[size % len(BAD)]
    response = await client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)


KINDS = {"whole": whole, "streamed": streamed, "cancelled": cancelled, "hung_up": hung_up, "bad": bad}
