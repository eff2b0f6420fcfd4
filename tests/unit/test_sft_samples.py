"""Conversations into samples: the ids that inference will feed, loss where it belongs, truncation, the cache."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from litgpt.data import JSON
from litgpt.data.records import Conversation
from litgpt.data.sample_encoding import ConversationEncoder, encode_all
from litgpt.prompts import ChatTemplate, PromptStyle, choose_prompt_style, style_class
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files
from tests.data_damage import flip

MULTI_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "Lazy, as always."},
]
# As Qwen 3 does it: reasoning stands before the last reply, earlier replies lose it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Tokenizer:
    """A byte-level tokenizer with a ChatML template."""
    config = {"chat_template": tokenizer_files.CHATML, "eos_token": "<|im_end|>"}
    return Tokenizer(tokenizer_files.byte_level(tmp_path_factory.mktemp("chat"), config))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tokenizer:
    """A byte-level tokenizer without a chat template."""
    return Tokenizer(tokenizer_files.byte_level(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Tokenizer:
    """A tokenizer as Llama 2's: a space in front, BOS."""
    return Tokenizer(tokenizer_files.byte_fallback(tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def conversation(messages: list[dict], **more: str) -> Conversation:
    return Conversation(messages, "messages", "here", **more)


def encode(tokenizer: Tokenizer, style: PromptStyle, messages: list[dict], mask=True, limit=None, **more):
    return ConversationEncoder(tokenizer, style, mask, limit).encode(conversation(messages, **more))


def learned(tokenizer: Tokenizer, sample) -> list[str]:
    """The stretches of text that are to be predicted."""
    stretches, before = [], False
    for token, target in zip(sample.ids, sample.targets, strict=True):
        if target and not before:
            stretches.append([])
        if target:
            stretches[-1].append(token)
        before = target
    return [tokenizer.decode(stretch, skip_special=False) for stretch in stretches]


# --- what is fed, what is learned


def test_every_reply_is_learned_with_its_end_and_nothing_else(chat):
    [sample] = encode(chat, choose_prompt_style(chat.dir, tokenizer=chat), MULTI_TURN)
    assert learned(chat, sample) == ["Fine.<|im_end|>", "Lazy, as always.<|im_end|>"]
    assert sample.num_messages == 5


@pytest.mark.parametrize("name", ["chatml", "alpaca", "phi-2", "llama2", "gemma", "default", "llama3"])
@pytest.mark.parametrize("kind", ["chat", "llama"])
def test_before_each_reply_stands_exactly_what_inference_feeds(name, kind, request):
    tokenizer, style = request.getfixturevalue(kind), style_class(name)()
    starts = {}
    for sample in encode(tokenizer, style, MULTI_TURN):
        for place in (i for i in range(1, len(sample.ids)) if sample.targets[i] and not sample.targets[i - 1]):
            starts[len(starts)] = sample.ids[:place]
    turns = [i for i, message in enumerate(MULTI_TURN) if message["role"] == "assistant"]
    assert list(starts.values()) == [style.encode(tokenizer, MULTI_TURN[:turn]) for turn in turns]


@pytest.mark.parametrize("name", ["alpaca", "llama2", "phi-2", "chatml", "default"])
@pytest.mark.parametrize("kind", ["chat", "llama"])
def test_a_reply_ends_with_what_stops_inference(name, kind, request):
    tokenizer, style = request.getfixturevalue(kind), style_class(name)()
    sample = encode(tokenizer, style, MULTI_TURN[1:3])[-1]
    reply = sample.ids[sample.answer_start :]
    stop = next(stop for stop in style.stop_sequences(tokenizer) if reply[-len(stop) :] == stop)
    assert tokenizer.decode(reply[: -len(stop)]).strip() == "Fine."
    assert all(sample.targets[sample.answer_start :])


def test_the_end_is_the_formats_own_token_rather_than_eos(tmp_path):
    config = {"eos_token": "<|endoftext|>", "chat_template": tokenizer_files.CHATML}
    tokenizer = Tokenizer(tokenizer_files.byte_level(tmp_path, config))
    end = tokenizer.token_to_id("<|im_end|>")
    [sample] = encode(tokenizer, style_class("chatml")(), MULTI_TURN)
    assert sample.ids[-1] == end
    assert encode(tokenizer, style_class("alpaca")(), MULTI_TURN[1:3])[0].ids[-1] == tokenizer.eos_id


def test_a_reply_goes_on_as_text_where_that_changes_no_token_of_the_prompt(llama):
    """Encoded on its own, `Fine.` would begin with a space that nobody wrote."""
    [sample] = encode(llama, style_class("alpaca")(), MULTI_TURN[1:3])
    assert llama.decode(sample.ids).endswith("### Response:\nFine.")


def test_a_reply_that_would_change_the_prompts_tokens_is_encoded_on_its_own(chat):
    pair = [{"role": "user", "content": "Hel"}, {"role": "assistant", "content": "lo world"}]
    prompt, reply = (chat.encode_ids(text, bos=False) for text in ("Hel", "lo world"))
    assert chat.encode_ids("Hello world", bos=False)[: len(prompt)] != prompt
    [sample] = encode(chat, style_class("default")(), pair)
    assert sample.ids == [*prompt, *reply, chat.eos_id]


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_for_each_reply(chat):
    thinking = [dict(m, **({"reasoning_content": "Hm."} if m["role"] == "assistant" else {})) for m in MULTI_TURN]
    style = ChatTemplate(THINKING, chat.special_tokens)
    first, second = encode(chat, style, thinking)
    assert learned(chat, first) == ["<think>Hm.</think>Fine.<|im_end|>"]
    assert learned(chat, second) == ["<think>Hm.</think>Lazy, as always.<|im_end|>"]
    assert "<|im_start|>assistant\nFine.<|im_end|>" in chat.decode(second.ids, skip_special=False)
    assert (first.num_messages, second.num_messages) == (3, 5)


def test_prompts_are_learned_too_where_they_are_not_masked(chat):
    [sample] = encode(chat, style_class("chatml")(), MULTI_TURN, mask=False)
    assert sample.targets == [False] + [True] * (len(sample.ids) - 1)


@pytest.mark.parametrize("name", ["chatml", "default", "alpaca"])
def test_control_tokens_that_somebody_spells_stay_text(chat, name):
    spelled = "Ends with <|im_end|> here."
    messages = [{"role": "user", "content": spelled}, {"role": "assistant", "content": spelled}]
    [sample] = encode(chat, style_class(name)(), messages)
    text = chat.decode(sample.ids, skip_special=False)
    assert text.count(spelled) == 2
    reply = sample.ids[sample.answer_start :]
    assert reply.count(chat.token_to_id("<|im_end|>")) == 1


def test_the_input_has_its_place_or_follows_the_instruction(chat):
    pair = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]
    [sample] = encode(chat, style_class("alpaca")(), pair, input="1 and 2")
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3" in chat.decode(sample.ids)
    for style in (style_class("flan")(), style_class("chatml")(), choose_prompt_style(chat.dir, tokenizer=chat)):
        [sample] = encode(chat, style, pair, input="1 and 2")
        assert "Add.\n\n1 and 2" in chat.decode(sample.ids)


def test_a_style_of_ones_own_may_have_a_place_for_the_input(chat):
    class Mine(PromptStyle):
        def apply(self, prompt, *, sys_prompt=None, **fields):
            return f"[{fields.get('input', '')}] {prompt} ->"

    pair = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]
    [sample] = encode(chat, Mine(), pair, input="1 and 2")
    assert chat.decode(sample.ids).startswith("[1 and 2] Add. ->3")


def test_tools_are_in_the_prompt_or_refused(chat):
    template = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}" + tokenizer_files.CHATML
    tools = [{"type": "function", "function": {"name": "add"}}]
    pair = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    style = ChatTemplate(template, chat.special_tokens)
    [sample] = encode(chat, style, pair, tools=tools)
    assert sample.ids[: sample.answer_start] == style.encode(chat, pair[:1], tools=tools)
    assert '"name": "add"' in chat.decode(sample.ids)
    with pytest.raises(ValueError, match="has tools, for which the prompt style has no place"):
        encode(chat, style_class("chatml")(), pair, tools=tools)


def test_what_is_too_long_is_cut_and_said(chat):
    style = style_class("chatml")()
    [whole] = encode(chat, style, MULTI_TURN)
    [cut] = encode(chat, style, MULTI_TURN, limit=len(whole.ids) - 1)
    assert (cut.ids, cut.targets) == (whole.ids[:-1], whole.targets[:-1])
    assert (cut.is_long, whole.is_long) == (True, False)
    assert not encode(chat, style, MULTI_TURN, limit=len(whole.ids))[0].is_long
    [first] = encode(chat, style, MULTI_TURN, limit=30)
    assert (len(first.ids), first.num_messages) == (30, 3)


def test_many_conversations_on_several_processes_are_the_same(chat, monkeypatch):
    encoder = ConversationEncoder(chat, choose_prompt_style(chat.dir, tokenizer=chat), True, 40)
    many = [conversation(MULTI_TURN[:3]), conversation(MULTI_TURN)] * 300
    expected = list(encode_all(encoder, many))
    monkeypatch.setattr("litgpt.data.sample_encoding.WORTH_PROCESSES", 100)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert list(encode_all(encoder, many)) == expected
    assert len(expected) == 600


def test_a_conversation_that_the_format_cannot_write_is_named(chat):
    encoder = ConversationEncoder(chat, style_class("chatml")(), True, None)
    with pytest.raises(ValueError, match=r"here: .*message 1 has the role 'assistant' where 'user' is due"):
        list(encode_all(encoder, [conversation(MULTI_TURN[2:])]))


# --- the data module


def module(path: Path, tokenizer: Tokenizer, length: int | None = 256, **options) -> JSON:
    data = JSON(json_path=path, num_workers=0, **options)
    data.connect(tokenizer, batch_size=2, max_seq_length=length)
    data.prepare_data()
    data.setup()
    return data


def records_file(path: Path, count: int = 40, **more: str) -> Path:
    path.write_text(
        "\n".join(json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}.", **more}) for i in range(count))
    )
    return path


def chats_file(path: Path, count: int = 20) -> Path:
    path.write_text("\n".join(json.dumps({"messages": MULTI_TURN}) for _ in range(count)))
    return path


def test_instructions_take_alpaca_and_learn_the_prompt_too(plain, tmp_path):
    data = module(records_file(tmp_path / "a.jsonl"), plain)
    assert type(data.style) is style_class("alpaca")
    messages, ids, labels = data.train_samples[3]
    assert (ids.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert labels[0] == -100
    assert torch.equal(ids[1:], labels[1:])
    assert plain.decode(ids).endswith(f"### Response:\n{messages[1]['content']}")
    assert "Prompt style: alpaca. The loss is on prompts and replies (mask_prompt false)." in data.describe()
    assert "40 records" not in data.describe()


def test_instructions_take_a_chat_template_that_the_checkpoint_has_and_learn_the_replies(chat, tmp_path):
    """Ones own do; a listed data set keeps its own style (tests/unit/test_datasets.py)."""
    path = records_file(tmp_path / "a.jsonl")
    data = module(path, chat)
    messages, ids, labels = data.train_samples[3]
    question, answer = (message["content"] for message in messages)
    expected = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}"
    assert chat.decode(ids, skip_special=False).startswith(expected)
    assert chat.decode(labels[labels >= 0], skip_special=False) == f"{answer}<|im_end|>"
    said = data.describe()
    assert "Prompt style: the checkpoint's chat template. The loss is on the replies only." in said
    assert "for another prompt style: --data.prompt_style alpaca" in said
    # What the user says decides, each by itself.
    learned = module(path, chat, mask_prompt=False)
    assert int((learned.train_samples[0].labels < 0).sum()) == 1
    assert isinstance(learned.style, ChatTemplate)
    (tmp_path / "mine.jinja").write_text(tokenizer_files.CHATML)
    mine = module(path, chat, prompt_style=str(tmp_path / "mine.jinja"))
    assert "Prompt style: a chat template. The loss is on prompts and replies" in mine.describe()
    alpaca = module(path, chat, prompt_style="alpaca")
    assert "Prompt style: alpaca. The loss is on prompts and replies (mask_prompt false)." in alpaca.describe()
    assert "The loss is on the replies only." in module(path, chat, prompt_style="alpaca", mask_prompt=True).describe()


def test_conversations_take_the_checkpoints_style_and_learn_the_replies(chat, tmp_path):
    data = module(chats_file(tmp_path / "a.jsonl"), chat)
    assert isinstance(data.style, ChatTemplate)
    sample = data.train_samples[0]
    assert (
        chat.decode(sample.labels[sample.labels >= 0], skip_special=False)
        == "Fine.<|im_end|>Lazy, as always.<|im_end|>"
    )
    assert "The loss is on the replies only." in data.describe()
    assert "(messages)" in data.describe()


def test_explicit_style_and_mask_win(chat, tmp_path):
    chats, instructions = chats_file(tmp_path / "a.jsonl"), records_file(tmp_path / "b.jsonl")
    data = module(chats, chat, prompt_style="alpaca", mask_prompt=False)
    assert type(data.style) is style_class("alpaca")
    assert int((data.train_samples[0].labels < 0).sum()) == 1
    data = module(instructions, chat, prompt_style="checkpoint", mask_prompt=True)
    assert isinstance(data.style, ChatTemplate)
    assert chat.decode(data.train_samples[0].input_ids, skip_special=False).startswith("<|im_start|>user\nQuestion")
    with pytest.raises(ValueError, match=r"prompt_style=alpacca: There is no prompt style .* Did you mean 'Alpaca'"):
        module(chats, chat, prompt_style="alpacca")


def test_records_are_held_out_once_for_all_seeded(chat, tmp_path):
    path = records_file(tmp_path / "a.jsonl")
    data = module(path, chat)
    texts = [
        {m[0]["content"] for m in map(part.messages_of, range(len(part)))}
        for part in (data.train_samples, data.val_samples)
    ]
    assert [len(part) for part in texts] == [38, 2]
    assert not texts[0] & texts[1]
    assert "Held out: 5.0%." in data.describe()
    assert module(path, chat, seed=1).val_samples[0].messages != data.val_samples[0].messages
    assert len(module(path, chat, val_split_fraction=0.25).val_samples) == 10
    none = module(path, chat, val_split_fraction=0)
    assert (len(none.train_samples), none.val_dataloader()) == (40, [])
    assert "There is no validation data." in none.describe()


def test_an_example_is_a_conversation_without_its_last_reply(chat, tmp_path):
    data = module(chats_file(tmp_path / "a.jsonl"), chat)
    assert data.example(0) == MULTI_TURN[:4]
    assert data.example_prompt(0) == data.style.encode(chat, MULTI_TURN[:4])
    with pytest.raises(ValueError, match="no validation example 1: there are 1, counted from 0"):
        data.example(1)
    data = module(records_file(tmp_path / "b.jsonl", input="A text."), chat, prompt_style="alpaca")
    assert data.example(0)[0]["input"] == "A text."
    assert chat.decode(data.example_prompt(0)).endswith("### Input:\nA text.\n\n### Response:\n")


def test_an_input_without_a_place_is_said(chat, tmp_path):
    data = module(records_file(tmp_path / "a.jsonl", input="A text."), chat, prompt_style="chatml")
    assert "no place for an input: it follows the instruction" in data.describe()
    assert "\n\nA text." in data.example(0)[0]["content"]


def test_long_samples_are_counted_whether_cut_or_left_out(chat, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps({"instruction": "Say it.", "output": "word " * n}) for n in [2] * 10 + [200] * 5)
    )
    cut = module(path, chat, 128, val_split_fraction=0)
    assert "Truncated to train.max_seq_length 128: 5." in cut.describe()
    assert cut.train_samples.summary.longest == 129  # 128 go into the model, the last is only predicted
    dropped = module(path, chat, 128, on_long="drop", val_split_fraction=0)
    assert len(dropped.train_samples) == 10
    assert "Dropped, longer than train.max_seq_length 128: 5." in dropped.describe()
    assert module(path, chat, None, val_split_fraction=0).train_samples.summary.truncated == 0
    with pytest.raises(ValueError, match="nothing to train on: all 15 samples are too long"):
        module(path, chat, 8, on_long="drop", val_split_fraction=0)


def test_samples_without_anything_to_learn_are_counted(chat, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": "why " * n, "output": "So."}) for n in [1] * 8 + [100] * 3))
    with pytest.raises(
        ValueError,
        match=r"3 of 11 records have nothing to learn within train\.max_seq_length=64(.|\n)*a\.jsonl, line 9, whose prompt has \d+ tokens.*on_long=drop",
    ):
        module(path, chat, 64, mask_prompt=True, val_split_fraction=0, prompt_style="chatml")
    assert not any((tmp_path / "cache/samples").iterdir())


# --- the cache


def test_samples_are_cached_until_something_that_decides_them_changes(chat, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("litgpt.data.sft.encode_all", lambda *a: calls.append(1) or encode_all(*a))
    path = records_file(tmp_path / "a.jsonl")
    module(path, chat)
    made = len(calls)
    module(path, chat, pack=True)
    assert len(calls) == made
    changes = [{"mask_prompt": True}, {"prompt_style": "phi-2"}, {"on_long": "drop"}, {"seed": 1}, {"length": 100}]
    for number, change in enumerate(changes, start=2):
        module(path, chat, **change)
        assert len(calls) == made * number
    path.write_text(path.read_text().replace("Answer 7.", "Answer X."))
    module(path, chat)
    assert len(calls) == made * (len(changes) + 2)
    chats = chats_file(tmp_path / "b.jsonl")
    own, alpaca = (module(chats, chat, prompt_style=name).train_samples[0] for name in (None, "alpaca"))
    assert chat.decode(own.input_ids, skip_special=False).startswith("<|im_start|>")
    assert "### Instruction:" in chat.decode(alpaca.input_ids)


def test_a_data_module_of_ones_own_makes_conversations_of_its_records(chat, tmp_path, monkeypatch):
    """And makes them again when its code changes."""
    code = """
from litgpt.data import SFTData
from litgpt.data.records import Conversation

class Proverbs(SFTData):
    def files(self):
        return [PATH], []

    def conversations(self, split):
        pairs = [line.split(" | ") for line in PATH.read_text().splitlines()]
        return [
            Conversation([{"role": "user", "content": a}, {"role": "assistant", "content": b}], "proverbs", f"line {i}")
            for i, (a, b) in enumerate(pairs, start=1)
        ]
"""
    monkeypatch.syspath_prepend(tmp_path)
    head = f"from pathlib import Path\nPATH = Path({str(tmp_path / 'proverbs.txt')!r})\n"
    (tmp_path / "proverbs.txt").write_text("The early bird | catches the worm.\n" * 10)
    found = []
    for version in (code, code.replace("(a, b) in", "(b, a) in") + "# the other way round"):
        (tmp_path / "proverbs.py").write_text(head + version)
        sys.modules.pop("proverbs", None)
        data = importlib.import_module("proverbs").Proverbs(num_workers=0)
        data.connect(chat, 2, 256)
        data.prepare_data()
        data.setup()
        found.append(data.train_samples[0].messages[0]["content"])
    assert found == ["The early bird", "catches the worm."]
    assert "(proverbs)" in data.describe()


@pytest.mark.parametrize("name", ["train/tokens.bin", "train/targets.bin", "train/starts.npy", "choice.json"])
def test_a_damaged_cache_is_made_again(name, chat, tmp_path, cache, capsys):
    path = records_file(tmp_path / "a.jsonl")
    expected = [sample.labels.tolist() for sample in module(path, chat).train_samples]
    (file,) = cache.glob(f"samples/*/{name}")
    flip(file, file.stat().st_size // 2)
    capsys.readouterr()
    assert [sample.labels.tolist() for sample in module(path, chat).train_samples] == expected
    assert f"is damaged ({name} is not as it was written): it is made again." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokens.bin", "targets.bin", "starts.npy"])
def test_a_resumed_run_would_know_other_samples_by_each_of_their_files(name, chat, tmp_path, cache):
    data = module(records_file(tmp_path / "a.jsonl"), chat)
    before = data.content()["train"]
    (file,) = cache.glob(f"samples/*/train/{name}")
    flip(file, file.stat().st_size - 1)
    assert data.content()["train"] != before
    flip(file, file.stat().st_size - 1)
    assert data.content()["train"] == before


def test_a_damaged_cache_of_before_there_were_sums_is_named(chat, tmp_path, cache):
    path = records_file(tmp_path / "a.jsonl")
    module(path, chat)
    for file in cache.glob("samples/*/sums.json"):
        file.unlink()
    module(path, chat)
    for file in cache.glob("samples/*/train/tokens.bin"):
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cached samples in .* are damaged"):
        module(path, chat)


def test_a_tokenizer_is_needed(tmp_path):
    with pytest.raises(ValueError, match="data=JSON needs a tokenizer"):
        JSON(json_path=tmp_path).connect(None)
