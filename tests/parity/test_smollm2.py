"""A real pretrained model, from its GGUF file, against the reference implementation."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.__main__ import main
from litgpt.prompts import choose_prompt_style
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def reference_tokenizer(smollm2_gguf):
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def converted(smollm2_gguf, tmp_path_factory):
    """The GGUF file through the command that a user types."""
    out = tmp_path_factory.mktemp("smollm2") / "converted"
    assert main(["convert_to_litgpt", str(smollm2_gguf), "--out_dir", str(out), "--dtype", "float32"]) in (0, None)
    return out


@pytest.fixture(scope="module")
def tokenizer(converted):
    return Tokenizer(converted)


@torch.inference_mode()
def greedy(model, ids, count):
    """``count`` greedy tokens through the KV cache, written out plainly: the engine is tested elsewhere."""
    cache = model.new_cache(1, ids.numel() + count)
    out, idx, start = [], ids.view(1, -1), 0
    for _ in range(count):
        positions = torch.arange(start, start + idx.shape[1]).view(1, -1)
        start += idx.shape[1]
        idx = model(idx, positions, cache=cache)[:, -1].argmax(-1, keepdim=True)
        out.append(idx.item())
    return out


def test_64_greedy_tokens_in_float32_equal_the_reference(converted, reference, reference_tokenizer):
    conversation = [{"role": "user", "content": "Tell me about the history of Paris."}]
    prompt = reference_tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor(reference_tokenizer(prompt)["input_ids"])
    theirs = reference.generate(ids[None], max_new_tokens=64, do_sample=False)[0, ids.numel() :]
    assert theirs.numel() == 64, "the answer is to be longer than that"
    ours = greedy(load_model(converted, dtype=torch.float32), ids, 64)
    assert ours == theirs.tolist()


def test_tokens_and_chat_template_equal_the_reference(tokenizer, reference_tokenizer, page_of_text):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    for messages in (conversation, conversation[1:]):
        rendered = reference_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert choose_prompt_style(tokenizer.dir, tokenizer=tokenizer).render(messages) == rendered
    nasty = (
        page_of_text + "\n\n  naïve café 日本語 \U0001f600\U0001f468‍\U0001f469‍\U0001f467 def f(x):\n\treturn 12345  x"
    )
    assert tokenizer.encode_ids(nasty) == reference_tokenizer(nasty)["input_ids"]
    assert tokenizer.decode(tokenizer.encode_ids(nasty)) == nasty


def test_bfloat16_is_as_precise_as_the_reference(converted, reference, tokenizer, page_of_text):
    ids = tokenizer.encode(page_of_text).view(1, -1)[:, :1024]
    with torch.inference_mode():
        exact = reference(ids).logits
        ours = load_model(converted, dtype=torch.bfloat16)(ids).float()
        theirs = copy.deepcopy(reference).to(torch.bfloat16)(ids).logits.float()
    error, bound = (ours - exact).abs().mean().item(), 1.1 * (theirs - exact).abs().mean().item()
    print(f"mean absolute logit error in bfloat16: ours {error:.5f}, bound {bound:.5f}")
    assert error <= bound


def test_generate_says_paris(converted, capsys):
    # In bfloat16 the first tokens of two answers are equally likely: 25.36 and 25.26 are both rounded to 25.38.
    greedy = ("--top_k", "1", "--precision", "32-true")
    assert main(["generate", str(converted), "--prompt", QUESTION, *greedy]) in (0, None)
    assert "Paris" in capsys.readouterr().out
