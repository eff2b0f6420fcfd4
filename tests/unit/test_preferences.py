"""Pairs of replies: the forms of records, the ids that are compared, and the batches."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from litgpt.data import HFPreferences, Preferences
from litgpt.data.preference_records import read_preferences
from litgpt.data.records import Record
from litgpt.prompts import choose_prompt_style
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.batches import BatchStream, micro_batch
from tests import tokenizer_files
from tests.hub_server import Hub, connect, serve_hub

USER, GOOD, BAD = (
    {"role": "user", "content": "Say it."},
    {"role": "assistant", "content": "Good."},
    {"role": "assistant", "content": "Bad."},
)
FORMS = {
    # layouts of data sets on the Hub, all of them the same pair
    "texts": {"prompt": "Say it.", "chosen": "Good.", "rejected": "Bad."},
    "orca": {"system": "", "question": "Say it.", "chosen": "Good.", "rejected": "Bad."},
    "prompt as messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "replies as texts": {"prompt": [USER], "chosen": "Good.", "rejected": "Bad."},
    "messages": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ultrafeedback": {"prompt": "Say it.", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Say it."}],
        "chosen": {"from": "gpt", "value": "Good."},
        "rejected": {"from": "gpt", "value": "Bad."},
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: Say it.\n\nAssistant: Good.",
        "rejected": "\n\nHuman: Say it.\n\nAssistant: Bad.",
    },
}
# As Qwen 3 does it: only the last reply has its reasoning.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    config = {"chat_template": tokenizer_files.CHATML, "eos_token": "<|im_end|>"}
    return Tokenizer(tokenizer_files.byte_level(tmp_path_factory.mktemp("chat"), config))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))


def set_up(module, tokenizer: Tokenizer, length: int = 96, batch: int = 2, step: int | None = None):
    module.connect(tokenizer, batch, length, samples_per_step=step)
    module.prepare_data()
    module.setup()
    return module


def data(folder: Path, tokenizer: Tokenizer, records: list[dict], length: int = 96, step: int | None = None, **options):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    module = Preferences(**{"json_path": path, "val_split_fraction": 0.0, "num_workers": 0, **options})
    return set_up(module, tokenizer, length, step=step)


def pair(n: int, **more) -> dict:
    return {"prompt": f"Count to {n}.", "chosen": " ".join(map(str, range(1, n + 1))), "rejected": f"No {n}!", **more}


# --- records


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_says_the_same(form):
    [found] = read_preferences([Record("here", FORMS[form])])
    assert (found.chosen.messages, found.rejected.messages, found.num_common) == ([USER, GOOD], [USER, BAD], 1)


def test_what_stands_beside_a_pair():
    [found] = read_preferences([Record("", {"system": "Be brief.", "input": "It.", **FORMS["texts"]})])
    assert found.chosen.messages == [{"role": "system", "content": "Be brief."}, USER, GOOD]
    assert (found.num_common, found.chosen.input, found.rejected.input) == (2, "It.", "It.")


def test_columns_are_renamed():
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    [found] = read_preferences([Record("", {"q": "Say it.", "a": "Good.", "b": "Bad."})], columns)
    assert found.rejected.messages == [USER, BAD]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "Say it.", "chosen": "Good."}, r"line 7: has no 'rejected'; .*keys are 'prompt', 'chosen'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "line 7: has replies without a prompt"),
        ({"chosen": "Good.", "rejected": "Bad."}, r"line 7: has a 'chosen' without a prompt next to it .* or in it"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "?"}, BAD]}, "line 7: has a 'chosen' .*no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, USER]}, "has a 'rejected' .* ends with one of the user"),
        ({"prompt": "x", "chosen": [1], "rejected": [BAD]}, r"in its 'chosen', message 1 is 1"),
    ],
)
def test_what_is_no_pair_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        read_preferences([Record("line 7", values)])


# --- samples


def rows(module: Preferences, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(prompt, reply) of each training row, as text."""
    found = []
    for sample in module.train_samples:
        learned = sample.labels != -100
        assert learned.tolist() == sorted(learned.tolist())  # the reply is what stands last
        parts = (sample.input_ids[~learned].tolist(), sample.input_ids[learned].tolist())
        found.append(tuple(tokenizer.decode(part, skip_special=False) for part in parts))
    return found


def test_before_both_replies_stands_exactly_what_inference_feeds(tmp_path, tokenizer):
    module = data(tmp_path, tokenizer, [FORMS["texts"]])
    prompt = choose_prompt_style(tokenizer.dir, tokenizer=tokenizer).encode(tokenizer, [USER])
    for sample in module.train_samples:
        assert sample.input_ids[sample.labels == -100].tolist() == prompt
    assert [reply for _, reply in rows(module, tokenizer)] == ["Good.<|im_end|>", "Bad.<|im_end|>"]


def test_replies_in_the_prompt_are_not_compared(tmp_path, tokenizer):
    before = [USER, {"role": "assistant", "content": "What?"}, {"role": "user", "content": "That."}]
    module = data(tmp_path, tokenizer, [{"chosen": [*before, GOOD], "rejected": [*before, BAD]}])
    (prompt, good), (same, bad) = rows(module, tokenizer)
    assert prompt == same
    assert "What?" in prompt
    assert (good, bad) == ("Good.<|im_end|>", "Bad.<|im_end|>")


@pytest.mark.parametrize("tail", [[], [{"role": "user", "content": "More."}, GOOD]])
def test_a_template_that_rewrites_earlier_turns(tail, tmp_path, tokenizer):
    path = tmp_path / "thinking.jinja"
    path.write_text(THINKING)
    before = [USER, {"role": "assistant", "content": "What?"}, {"role": "user", "content": "That."}]
    records = [{"chosen": [*before, GOOD, *tail], "rejected": [*before, BAD, *tail]}]
    if tail:
        with pytest.raises(ValueError, match=r"line 1: has several messages of the assistant after the prompt"):
            data(tmp_path, tokenizer, records, prompt_style=str(path))
        return
    module = data(tmp_path, tokenizer, records, prompt_style=str(path))
    prompts = {prompt for prompt, _ in rows(module, tokenizer)}
    assert len(prompts) == 1
    assert "<think>" not in prompts.pop()


def test_long_pairs_are_cut_or_left_out_as_pairs(tmp_path, tokenizer):
    records = [pair(2), pair(30), pair(3)]
    cut = data(tmp_path, tokenizer, records, length=40)
    assert len(cut.train_samples) == 6
    assert max(cut.train_samples.lengths) == 41
    assert "3 pairs of 3 records (prompt/chosen/rejected)" in cut.describe()
    assert "Truncated to train.max_seq_length 40: 1." in cut.describe()
    dropped = data(tmp_path, tokenizer, records, length=40, on_long="drop")
    assert [prompt for prompt, _ in rows(dropped, tokenizer)] == [
        prompt for n in (2, 3) for prompt, _ in rows(data(tmp_path, tokenizer, [pair(n)]), tokenizer)
    ]
    assert "Dropped, longer than train.max_seq_length 40: 1." in dropped.describe()
    with pytest.raises(ValueError, match=r"2 of 2 records have nothing to learn.*line 1, whose prompt has \d+ tokens"):
        data(tmp_path, tokenizer, [pair(2), pair(3)], length=8)


def test_equal_replies_are_left_out_and_counted(tmp_path, tokenizer):
    module = data(tmp_path, tokenizer, [pair(2), pair(3, rejected="1 2 3")])
    assert len(module.train_samples) == 2
    assert "Left out, since both replies are the same: 1." in module.describe()
    with pytest.raises(ValueError, match="nothing to train on: of 1 both replies are the same"):
        data(tmp_path, tokenizer, [pair(3, rejected="1 2 3")])


def test_some_pairs_are_held_out(tmp_path, tokenizer):
    module = data(tmp_path, tokenizer, [pair(n) for n in range(1, 11)], val_split_fraction=0.3)
    assert (len(module.train_samples), len(module.val_samples), module.num_examples) == (14, 6, 3)
    questions = [module.example(i)[-1]["content"] for i in range(3)]
    assert len(set(questions)) == 3
    for i, question in enumerate(questions):
        assert question in tokenizer.decode(module.example_prompt(i))


@pytest.mark.parametrize("option", [{"pack": True}, {"mask_prompt": False}])
def test_what_cannot_act_is_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(option))}="):
        Preferences(json_path=tmp_path, **option)


# --- batches


def test_a_batch_has_both_rows_of_each_pair(tmp_path, tokenizer):
    """... in every epoch each pair once, and the references that belong to the rows."""
    module = data(tmp_path, tokenizer, [pair(n) for n in range(1, 9)], step=4)
    module.set_reference([torch.arange(16.0), torch.empty(0)])
    stream = BatchStream(module.train_dataloader(), 2)
    assert stream.samples_per_epoch == 8
    seen = []
    for _ in range(4):
        batch = stream.next()
        numbers = batch.samples[::2, 0].tolist()
        seen += numbers
        for place, number in enumerate(numbers):
            for row in (0, 1):
                ids, targets = module.train_samples.tokens_of(2 * number + row)
                at = 2 * place + row
                assert batch.idx[at, : len(ids) - 1].tolist() == ids[:-1].tolist()
                wanted = np.where(targets[1:], ids[1:], -100).tolist()
                assert batch.targets[at, : len(ids) - 1].tolist() == wanted
                assert (batch.targets[at, len(ids) - 1 :] == -100).all()
                assert batch.inputs["reference_log_probs"][at] == 2 * number + row
    assert sorted(seen) == list(range(8))
    assert f"training sample(s) {numbers[0]}, {numbers[1]}" == batch.described()


def test_all_batches_are_all_pairs_in_order(tmp_path, tokenizer):
    module = data(tmp_path, tokenizer, [pair(n) for n in range(1, 10)], val_split_fraction=0.2)
    (train, train_rows), (val, val_rows) = module.all_batches()
    assert (train_rows, val_rows) == (14, 4)
    for batches, count in ((train, 7), (val, 2)):
        numbers = torch.cat([micro_batch(batch).samples for batch in batches])
        assert numbers[numbers >= 0].tolist() == list(range(count))


# --- the Hub


def test_pairs_from_the_hub(tmp_path, tokenizer, monkeypatch):
    lines = "".join(json.dumps({"q": f"Count to {n}.", "chosen": "1", "rejected": "2"}) + "\n" for n in range(4))
    with serve_hub(Hub({"datasets/org/pairs": {"train.jsonl.gz": gzip.compress(lines.encode())}})) as server:
        connect(server, monkeypatch)
        module = HFPreferences(
            repo_id="org/pairs", columns={"prompt": "q"}, download_dir=tmp_path / "data", val_split_fraction=0.25
        )
        set_up(module, tokenizer)
    assert (len(module.train_samples), len(module.val_samples)) == (6, 2)
