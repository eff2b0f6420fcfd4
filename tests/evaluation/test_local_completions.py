"""lm-evaluation-harness's `local-completions` against a server of ours: the figures of its backend for local models."""

import json

import httpx
import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytest.importorskip("tenacity", reason="lm-evaluation-harness asks for it to speak HTTP")

from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tests.evaluation.test_harness_parity import near, ours, plain, theirs  # noqa: E402
from tests.serving.conftest import PATIENCE, running  # noqa: E402

TASKS = ["choices", "letters", "writing"]
ROOM = 191  # tokens of a prompt: the harness has one more generated after each


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen3"])
def test_the_harness_over_http_gives_the_figures_of_the_harness(request, model, tasks, tmp_path, monkeypatch):
    directory = request.getfixturevalue(model)
    expected = theirs(directory, tasks, TASKS)["samples"]
    _, own = ours(directory, tasks, TASKS, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with running(directory) as served:
        found = simple_evaluate(
            model="local-completions",
            model_args={
                "base_url": f"{served.url}/v1/completions",
                "model": served.model.name,
                "tokenizer": str(directory),
                "max_length": ROOM,
                "add_bos_token": served.model.codec.tokenizer.adds_bos,  # there it is not the tokenizer that decides
                "num_concurrent": 2,
                "max_retries": 1,
            },
            tasks=TASKS,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            batch_size=3,
            random_seed=1234,
            bootstrap_iters=0,
            fewshot_as_multiturn=False,
        )["samples"]
        tokenizer = served.model.codec.tokenizer
        compared = 0
        for name in TASKS:
            for one, other, third in zip(found[name], expected[name], own[name], strict=True):
                if any(
                    len(tokenizer.encode_ids("".join(map(str, text[:2])))) >= ROOM - 30 for text in one["arguments"]
                ):
                    continue  # it is cut off one token earlier than in the harness's own backend
                if "\ufffd" in str(other["resps"]):
                    continue  # bytes that are no text: what becomes of them differs where text comes piece by piece
                assert plain(one["resps"]) == near(plain(other["resps"])), (name, one["doc_id"])
                assert plain(one["resps"]) == near(plain(third["resps"]))
                compared += 1
        assert compared > 8


@pytest.fixture(scope="module")
def served(tiny_llama):
    with running(tiny_llama) as server:
        yield server


def complete(served, **body) -> dict:
    response = httpx.post(f"{served.url}/v1/completions", json={"temperature": 0, **body}, timeout=PATIENCE)
    assert response.status_code == 200, response.text
    return response.json()


@torch.inference_mode()
def reference(served, ids: list[int]) -> torch.Tensor:
    """(T, V) what the model says after each token."""
    return served.engine.model(torch.tensor([ids]))[0].log_softmax(-1)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("count", [0, 5])
def test_a_prompt_is_scored_token_by_token(served, as_ids, count):
    tokenizer, text = served.model.codec.tokenizer, "the king of France sat upon a stone"
    ids = tokenizer.encode_ids(text)
    response = complete(served, prompt=ids if as_ids else text, max_tokens=count, echo=True, logprobs=2)
    [choice] = response["choices"]
    assert choice["text"].startswith(text)
    assert (choice["text"] == text) == (count == 0)
    assert choice["finish_reason"] == "length"
    assert response["usage"]["completion_tokens"] == count
    logprobs = choice["logprobs"]
    assert {len(part) for part in logprobs.values()} == {len(ids) + count}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    expected = reference(served, ids)
    for place in range(1, len(ids)):
        row = expected[place - 1]
        assert logprobs["token_logprobs"][place] == pytest.approx(row[ids[place]].item(), abs=1e-4)
        top = logprobs["top_logprobs"][place]
        assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)
        assert logprobs["token_logprobs"][place] in top.values()
        assert len(top) <= 3
    # Where each token stands in the text; BOS, which the tokenizer puts before it, is no part of it.
    assert logprobs["text_offset"][:2] == [0, 0]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    if count:
        assert logprobs["text_offset"][len(ids)] == len(text)
        plain = complete(served, prompt=text, max_tokens=count, logprobs=2)["choices"][0]
        assert choice["text"] == text + plain["text"]
        assert logprobs["tokens"][len(ids) :] == plain["logprobs"]["tokens"]


def test_scores_come_with_the_first_event_of_a_stream(served):
    body = {"prompt": ["the king", "winter"], "max_tokens": 4, "echo": True, "logprobs": 1, "temperature": 0}
    whole = complete(served, **body)["choices"]
    texts, tokens = ["", ""], [[], []]
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json={**body, "stream": True}, timeout=PATIENCE
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line[6:])["choices"]
                texts[choice["index"]] += choice["text"]
                tokens[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert texts == [choice["text"] for choice in whole]
    for one, other in zip(tokens, whole, strict=True):
        assert one[0] is other["logprobs"]["token_logprobs"][0] is None
        assert one[1:] == pytest.approx(other["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_nothing_is_generated_where_nothing_is_asked_for(served):
    steps = served.engine._numbers
    before = next(steps)
    [choice] = complete(served, prompt="winter", max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert complete(served, prompt="winter", max_tokens=0, echo=True)["choices"][0]["text"] == "winter"
    [alone] = complete(served, prompt=[5], max_tokens=0, echo=True, logprobs=1)["choices"]
    assert alone["logprobs"]["token_logprobs"] == [None]
    assert next(steps) == before + 1
    for prompt in ([], [5] * 300, "x " * 3000):
        response = httpx.post(
            f"{served.url}/v1/completions", json={"prompt": prompt, "max_tokens": 0}, timeout=PATIENCE
        )
        assert response.status_code == 400, response.text
    served.wait_until_idle()


def test_a_token_that_ends_the_answer_is_scored_too(served):
    """Clients take the last entry to be generated."""
    ends = {stop[0]: 100 for stop in served.model.stops}
    ids = served.model.codec.tokenizer.encode_ids("the king")
    [choice] = complete(served, prompt=ids, max_tokens=1, echo=True, logprobs=1, logit_bias=ends)["choices"]
    assert (choice["finish_reason"], choice["text"]) == ("stop", "the king")
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1


def test_a_response_has_a_bounded_number_of_log_probabilities(served):
    body = {"prompt": [5] * 150, "echo": True, "logprobs": 20, "n": 70, "max_tokens": 40, "temperature": 0}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=PATIENCE)
    assert response.status_code == 400
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == ("logprobs", "invalid_value")
    assert "13,300 tokens with 21" in response.json()["error"]["message"]
