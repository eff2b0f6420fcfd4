"""Records as people's files have them, under real tokenizers and templates: what `transformers` renders is learned."""

import json
from pathlib import Path

import pytest

from litgpt.data.record_files import read_records
from litgpt.data.records import recognise
from litgpt.data.sample_encoding import ConversationEncoder
from litgpt.prompts import choose_prompt_style
from litgpt.serving.tools import Call, CallReader, tool_form
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.tokenizer.tokenizer import Tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "get_temp",
        "description": "Temperature of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
ASKED = {"role": "user", "content": "How warm is Graz?"}
ANSWERED = [
    {"role": "tool", "tool_call_id": "call00001", "name": "get_temp", "content": "21"},
    {"role": "assistant", "content": "21 degrees."},
]


def called(arguments, **more) -> dict:
    function = {"name": "get_temp", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "call00001", "type": "function", "function": function}], **more}


class Model:
    """A model's tokenizer and template, here and in transformers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = Tokenizer(directory)
        self.style = choose_prompt_style(directory, tokenizer=self.tokenizer)
        self.encoder = ConversationEncoder(self.tokenizer, self.style, True, None)
        self.reference = AutoTokenizer.from_pretrained(directory)

    def samples(self, record: dict, tmp_path: Path) -> list:
        """The samples of a record in a file."""
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(record))
        return self.encoder.encode(recognise(next(read_records([path]))))

    def sample(self, record: dict, tmp_path: Path):
        """The one sample of a record in a file."""
        [sample] = self.samples(record, tmp_path)
        return sample

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)

    def learned(self, sample) -> list[str]:
        pairs = list(zip(sample.ids, sample.targets, strict=True))
        starts = [i for i, (_, target) in enumerate(pairs) if target and not pairs[i - 1][1]]
        ends = [i + 1 for i, (_, target) in enumerate(pairs) if target and not (pairs[i + 1 :] or [(0, 0)])[0][1]]
        return [self.text(sample.ids[start:end]) for start, end in zip(starts, ends, strict=True)]

    def check(self, sample, messages: list[dict], tools=None) -> None:
        """The sample is what transformers renders, up to the end of the last reply."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if any(message["content"] is None for message in messages):  # which apply_chat_template takes away
            template = _compile_jinja_template(self.reference.chat_template)
            text = template.render(messages=messages, **self.reference.special_tokens_map)
            ids = self.reference(text, add_special_tokens=False)["input_ids"]
        else:
            text = self.reference.apply_chat_template(messages, tools=tools, tokenize=False)
            ids = self.reference.apply_chat_template(messages, tools=tools, return_dict=False)
        assert text.startswith(self.text(sample.ids)), (text, self.text(sample.ids))
        assert not text[len(self.text(sample.ids)) :].strip()
        assert sample.ids == ids[: len(sample.ids)]


@pytest.fixture(scope="module")
def model(npm_tokenizer, smollm2_gguf):
    made: dict[str, Model] = {}

    def make(family: str) -> Model:
        if family not in made:
            directory = open_checkpoint(smollm2_gguf).files if family == "smollm2" else npm_tokenizer(family)
            made[family] = Model(directory)
        return made[family]

    return make


# What each template needs of a call: Mistral an id of nine letters, DeepSeek no content and the arguments as text.
AS_GIVEN_TO_THE_REFERENCE = {
    "qwen2_5": called({"town": "Graz"}, content=""),
    "llama3_2": called({"town": "Graz"}, content=""),
    "mistral_nemo": called({"town": "Graz"}, content=""),
    "deepseek_v3": called('{"town": "Graz"}', content=None),
}


@pytest.mark.parametrize("family", AS_GIVEN_TO_THE_REFERENCE)
@pytest.mark.parametrize("form", ["text", "object", "bare", "sharegpt", "legacy"])
def test_a_call_is_learned_in_the_templates_own_form_whatever_the_file_has(family, form, model, tmp_path):
    one, tools = model(family), [TOOL]
    record = {
        "text": {"messages": [ASKED, called('{"town": "Graz"}', content=None), *ANSWERED], "tools": tools},
        "object": {"messages": [ASKED, called({"town": "Graz"}), *ANSWERED], "tools": json.dumps(tools)},
        "bare": {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"name": "get_temp", "arguments": {"town": "Graz"}}],
                },
                {key: value for key, value in ANSWERED[0].items() if key != "tool_call_id"},
                ANSWERED[1],
            ],
            "tools": [TOOL["function"]],
        },
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": "How warm is Graz?"},
                {"from": "function_call", "value": '{"name": "get_temp", "arguments": {"town": "Graz"}}'},
                {"from": "observation", "value": "21"},
                {"from": "gpt", "value": "21 degrees."},
            ],
            "tools": json.dumps(tools),
        },
        "legacy": {
            "messages": [
                ASKED,
                {"role": "assistant", "function_call": {"name": "get_temp", "arguments": '{"town": "Graz"}'}},
                {"role": "function", "name": "get_temp", "content": "21"},
                ANSWERED[1],
            ],
            "functions": [TOOL["function"]],
        },
    }[form]
    if family == "deepseek_v3":
        record = {key: value for key, value in record.items() if key not in ("tools", "functions")}
        tools = None  # its template has no place for them
    samples = one.samples(record, tmp_path)
    assert len(samples) == (2 if family == "deepseek_v3" else 1)  # DeepSeek's template does not end a call
    one.check(samples[-1], [ASKED, AS_GIVEN_TO_THE_REFERENCE[family], *ANSWERED], tools)
    call, answer = (text for sample in samples for text in one.learned(sample))
    assert "get_temp" in call
    assert answer == "21 degrees." + one.text(one.encoder.end)
    if family != "deepseek_v3":
        assert '\\"' not in call  # an object, not a text that holds one
        reader = CallReader(tool_form(one.style), ["get_temp"])
        found = [*reader.push(call.removesuffix(one.text(one.encoder.end))), *reader.finish()]
        calls = [(one.name, json.loads(one.arguments)) for one in found if isinstance(one, Call)]
        assert calls == [("get_temp", {"town": "Graz"})]


CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize("family", ["smollm2", "qwen2_5", "llama3_2", "deepseek_v3"])
def test_the_developers_turn_is_the_system_turn(family, model, tmp_path):
    rest = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bonjour"}]
    sample = model(family).sample(
        {"messages": [{"role": "developer", "content": "Answer in French."}, *rest]}, tmp_path
    )
    model(family).check(sample, [{"role": "system", "content": "Answer in French."}, *rest])
    assert "Answer in French." in model(family).text(sample.ids)


def test_the_developers_turn_stands_where_the_template_puts_the_system(model, tmp_path):
    """Mistral's puts it before the last question, so it is not in a whole conversation that transformers renders."""
    one = model("mistral_nemo")
    messages = [{"role": "developer", "content": "Answer in French."}, {"role": "user", "content": "Hi"}]
    sample = one.sample({"messages": [*messages, {"role": "assistant", "content": "Bonjour"}]}, tmp_path)
    asked = [{**messages[0], "role": "system"}, messages[1]]
    expected = one.reference.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert sample.ids[: sample.answer_start] == expected
    assert "Answer in French." in one.text(expected)


@pytest.mark.parametrize("family", ["smollm2", "qwen2_5", "llama3_2", "mistral_nemo", "deepseek_v3"])
def test_a_reply_of_weight_0_is_read_and_not_learned(family, model, tmp_path):
    one = model(family)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "WRONG", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "RIGHT", "weight": 1},
    ]
    sample = one.sample({"messages": messages}, tmp_path)
    one.check(sample, [{key: m[key] for key in ("role", "content")} for m in messages])
    assert one.learned(sample) == ["RIGHT" + one.text(one.encoder.end)]


def test_a_conversation_may_begin_with_a_reply(model, tmp_path):
    messages = [{"role": "assistant", "content": "Hello!"}, *CONVERSATION[:2]]
    for family in ("qwen2_5", "smollm2", "llama3_2", "deepseek_v3"):
        one = model(family)
        sample = one.sample({"messages": messages}, tmp_path)
        one.check(sample, messages)
        end = one.text(one.encoder.end)
        assert one.learned(sample) == ["Hello!" + end, "b" + end]
    with pytest.raises(ValueError, match="conversation roles must alternate"):  # as in transformers
        model("mistral_nemo").sample({"messages": messages}, tmp_path)


@pytest.mark.parametrize("family", ["smollm2", "qwen2_5", "llama3_2", "mistral_nemo", "deepseek_v3"])
def test_prompt_and_completion_are_the_conversation_that_they_make(family, model, tmp_path):
    one = model(family)
    sample = one.sample({"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}, tmp_path)
    one.check(sample, CONVERSATION)
    assert one.learned(sample) == ["d" + one.text(one.encoder.end)]


def test_empty_text_and_null_keys(model, tmp_path):
    one = model("qwen2_5")
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": "c"}]
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, empty[1]]}
    one.check(one.sample(parts, tmp_path), empty)
    pair = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    one.check(one.sample({"messages": None, **pair}, tmp_path), said)


def test_calls_and_tools_of_padded_rows(model, tmp_path):
    import pyarrow
    from pyarrow import parquet

    def row(arguments: dict, properties: dict) -> dict:
        parameters = {"type": "object", "properties": properties}
        tool = {"type": "function", "function": {"name": "get_temp", "description": "d", "parameters": parameters}}
        return {"messages": [ASKED, called(arguments, content=None), *ANSWERED], "tools": [tool]}

    rows = [
        row({"town": "Graz"}, {"town": {"type": "string"}}),
        row({"x": 1, "y": 2}, {"x": {"type": "number"}, "y": {"type": "number", "description": "the other"}}),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    one = model("qwen2_5")
    for record, written in zip(read_records([tmp_path / "a.parquet"]), rows, strict=True):
        [sample] = one.encoder.encode(recognise(record))
        assert "null" not in one.text(sample.ids)
        # Arrow sorts no keys, but gives each tool its own in the order of the column
        messages = [{**m, "content": m["content"] or ""} for m in written["messages"]]
        one.check(sample, messages, recognise(record).tools)
        assert recognise(record).tools == written["tools"]


@pytest.mark.parametrize("family", ["smollm2", "qwen2_5"])
def test_the_templates_end_of_turn_is_learned_where_eos_is_another_token(family, model, tmp_path):
    """As in many finetuned base models: EOS is <|endoftext|>, the template ends replies with <|im_end|>."""
    source = model(family).tokenizer.dir
    config = json.loads((source / "tokenizer_config.json").read_text())
    config = {**config, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    one = Model(tmp_path)
    assert one.tokenizer.stop_ids == {one.tokenizer.token_to_id("<|endoftext|>")}
    end = [one.tokenizer.token_to_id("<|im_end|>")]
    assert one.encoder.end == end
    assert {one.tokenizer.eos_id, *end} == {i for stop in one.style.stop_sequences(one.tokenizer) for i in stop}
    sample = one.sample({"messages": CONVERSATION}, tmp_path)  # one, not one for each reply
    one.check(sample, CONVERSATION)
    assert one.learned(sample) == ["b<|im_end|>", "d<|im_end|>"]


def test_what_a_template_leaves_out_is_refused(model, tmp_path):
    """A call, and a turn, that nobody would see."""
    record = {"messages": [ASKED, called({"town": "Graz"}), *ANSWERED]}
    with pytest.raises(ValueError, match="message 2 calls 'get_temp', which the prompt style does not write"):
        model("smollm2").sample(record, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = model("smollm2").tokenizer
    encoder = ConversationEncoder(tokenizer, choose_prompt_style(tmp_path, tokenizer=tokenizer), True, None)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *CONVERSATION]}))
    with pytest.raises(ValueError, match="message 1 is from 'system', which the checkpoint's chat template leaves out"):
        encoder.encode(recognise(next(read_records([path]))))
