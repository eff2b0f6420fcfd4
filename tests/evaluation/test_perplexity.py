"""Perplexity of texts, against whole forward passes of the reference implementation."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from litgpt.__main__ import main
from litgpt.evaluation import perplexity
from litgpt.evaluation.perplexity import Document, measure, read_texts, windows
from litgpt.generation.engine import Engine
from litgpt.generation.interface import EngineOptions
from litgpt.generation.live import LiveEngine
from litgpt.model import GPT
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from tests.evaluation.conftest import SENTENCE


@pytest.mark.parametrize(("count", "window", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (40, 8, 3), (40, 8, 8)])
def test_each_token_is_predicted_once_from_as_much_as_the_stride_promises(count, window, stride):
    predicted = []
    for first, start, end in windows(count, window, stride):
        predicted += range(start, end)
        assert end - 1 - first <= window  # what the model sees: all before the last one
        if start:
            assert start - first >= min(window - stride + 1, start + 1)
    assert predicted == list(range(count))


@torch.inference_mode()
def reference_nll(model, ids: list[int], bos: int, window: int, stride: int) -> float:
    """Written out: for each token the tokens that its window holds before it."""
    text, total = [bos, *ids], 0.0
    for place in range(1, len(text)):
        if place <= window:
            start = 0
        else:
            ends = window + stride * math.ceil((place - window) / stride)  # of the window that predicts it
            start = max(0, min(ends, len(ids)) - window)
        logits = model(torch.tensor([text[start:place]])).logits[0, -1]
        total -= logits.log_softmax(-1)[text[place]].item()
    return total


def test_perplexity_is_that_of_the_reference(tiny_llama, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "b.txt").write_text(f"{SENTENCE}. Grüße")
    (data / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("to", SENTENCE)))
    words = ["--data", str(data), "--max_seq_length", "16", "--stride", "5", "--precision", "32-true"]
    assert main(["evaluate", str(tiny_llama), "--tasks", "perplexity", *words, "--out_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    tokenizer = Tokenizer(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    texts = {"a.jsonl:1": "to", "a.jsonl:2": SENTENCE, "b.txt": f"{SENTENCE}. Grüße"}
    assert [document["name"] for document in results["documents"]] == list(texts)
    nll = tokens = 0
    for document, text in zip(results["documents"], texts.values(), strict=True):
        ids = tokenizer.encode_ids(text, bos=False)
        assert (document["num_tokens"], document["num_bytes"]) == (len(ids), len(text.encode()))
        expected = reference_nll(model, ids, tokenizer.bos_id, 16, 5)
        assert -document["loglikelihood"] == pytest.approx(expected, rel=1e-4)
        nll, tokens = nll + expected, tokens + len(ids)
    figures = results["results"]["perplexity"]
    assert figures["perplexity,none"] == pytest.approx(math.exp(nll / tokens), rel=1e-3)
    size = sum(len(text.encode()) for text in texts.values())
    assert figures["bits_per_byte,none"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert results["litgpt"]["bos"] == {"added_to_texts": "<s>", "before_texts_without_context": "<s>"}
    printed = capsys.readouterr()
    assert "|b.txt" in printed.out
    assert "|bits_per_byte" in printed.out
    assert "chat_template" not in printed.err  # it has nothing to do with it
    assert "token/s" in printed.err
    assert "request/s" not in printed.err


def test_the_bar_moves_within_a_window(tiny_llama, monkeypatch):
    def engine(model: GPT, _: EngineOptions) -> Engine:
        return Engine(model, prefill_chunk=32)

    run = LiveEngine(load_model(tiny_llama, dtype=torch.float32), engine, EngineOptions()).run
    made, moves = perplexity.bar, []

    def watched(*args):
        progress = made(*args)
        update = progress.update
        progress.update = lambda count: (moves.append(count), update(count))
        return progress

    monkeypatch.setattr(perplexity, "bar", watched)
    document = Document("a", SENTENCE * 2)
    measure(run, Tokenizer(tiny_llama), [document], window=128, stride=64)
    assert sum(moves) == document.num_tokens == 129
    assert [count for count in moves if count > 1] == [32, 32, 32, 32]
    assert min(moves) >= 0


@pytest.mark.parametrize(
    "words",
    [
        ["--num_fewshot", "2"],
        ["--apply_chat_template", "true"],
        ["--system_instruction", "Be brief."],
        ["--gen_kwargs", "temperature=0", "--log_samples", "true"],
        ["--predict_only", "true"],
    ],
)
def test_what_does_nothing_to_a_text_is_refused_by_name(tiny_llama, tmp_path, capsys, words):
    (tmp_path / "text.txt").write_text(SENTENCE)
    text = ["--tasks", "perplexity", "--data", str(tmp_path / "text.txt"), "--out_dir", str(tmp_path / "out")]
    assert main(["evaluate", str(tiny_llama), *text, *words]) == 1
    error = capsys.readouterr().err
    for option in words[::2]:
        assert option in error
    assert "for tasks of the harness only" in error


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "y.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("  \n")
    for name, message in (
        ("x.jsonl", 'line 2: a JSON object with a "text"'),
        ("y.txt", "is not UTF-8"),
        ("empty.txt", "no text in it"),
    ):
        with pytest.raises(ValueError, match=message):
            read_texts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_texts(tmp_path / "nowhere")
