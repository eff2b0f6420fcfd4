"""Tiny models with real tokenizers, and tasks of lm-evaluation-harness made on the spot."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests import tokenizer_files

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
}
SENTENCE = "the king of France sat upon a stone and said to his men that winter would come again before long"


def save_random(model, directory: Path) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random Llama as transformers writes it, whose tokenizer puts BOS before each text."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer_files.byte_fallback(directory, {"chat_template": tokenizer_files.CHATML})
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    save_random(LlamaForCausalLM(LlamaConfig(vocab_size=704, **SIZES, **ids)), directory)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> Path:
    """A random Qwen3 of the family's kind of tokenizer: no BOS, chat markers, an end of turn that is the EOS."""
    directory = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": tokenizer_files.CHATML}
    tokenizer_files.byte_level(directory, config)
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    save_random(Qwen3ForCausalLM(Qwen3Config(vocab_size=400, head_dim=12, **SIZES, **ids)), directory)
    return directory


def sentence(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(SENTENCE.split(), k=count))


def task(name: str, folder: Path, records: list[dict], **settings) -> str:
    """Writes one task; returns its name."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {"test": str(folder / f"{name}.jsonl"), "train": str(folder / f"{name}.jsonl")}
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "training_split": "train",
        "metadata": {"version": 1.5},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return name


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks: four choices after long contexts, choices of one token, text to read, answers to write."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(3)
    questions = [
        {
            "question": f"{sentence(draw, count)}?",
            "choices": [sentence(draw, draw.randint(1, 7)) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for count in (5, 40, 70, 12, 90, 30, 3, 21)  # the tokens of 90 words do not fit the context
    ]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    task("choices", folder, questions, **choice)
    lettered = "Question: {{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:"
    task("letters", folder, questions, **choice | {"doc_to_text": lettered, "doc_to_choice": ["A", "B", "C", "D"]})
    task("without_context", folder, questions, **choice | {"doc_to_text": ""})
    texts = [{"text": sentence(draw, count)} for count in (3, 150, 60, 400, 1)]
    reading = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    task(
        "reading",
        folder,
        texts,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=reading,
    )
    written = {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n\n", "Q:"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "word",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}],
            },
            {"name": "all", "filter": [{"function": "take_first"}]},
        ],
    }
    task("writing", folder, questions, **written)
    long = {"until": ["<|im_end|>", "</s>"], "max_gen_toks": 60, "do_sample": False, "temperature": 0.7}
    task("writing_on", folder, questions[:4], **written | {"generation_kwargs": long})
    task("continued", folder, questions[:4], **written | {"gen_prefix": "The answer is"})
    return folder
