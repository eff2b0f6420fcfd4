"""Records: their forms, and the files that they come from."""

import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from litgpt.data import JSON, bounded_text, record_files, table_files
from litgpt.data.record_files import read_records
from litgpt.data.records import Record, read_conversations, recognise

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def messages(record: dict, columns: dict | None = None) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in recognise(Record("here", record), columns).messages]


@pytest.mark.parametrize(
    ("record", "form", "said"),
    [
        ({"instruction": "Hi", "output": "Ho"}, "instruction/input/output", [("user", "Hi"), ("assistant", "Ho")]),
        ({"prompt": "Hi", "completion": "Ho"}, "prompt/completion", [("user", "Hi"), ("assistant", "Ho")]),
        (
            {"instruction": "Hi", "output": "Ho", "system": "Be kind.", "id": 7},
            "instruction/input/output",
            [("system", "Be kind."), ("user", "Hi"), ("assistant", "Ho")],
        ),
        (
            {
                "prompt": "not this",
                "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
            },
            "messages",
            [("user", "Hi"), ("assistant", "Ho")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Ho"},
                    {"from": "human", "value": "And?"},
                    {"from": "gpt", "value": "No."},
                ]
            },
            "conversations (ShareGPT)",
            [("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "No.")],
        ),
        ({"conversations": ["Hi", "Ho"]}, "conversations (ShareGPT)", [("user", "Hi"), ("assistant", "Ho")]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    {"role": "assistant", "content": "Ho"},
                ]
            },
            "messages",
            [("user", "Hi"), ("assistant", "Ho")],
        ),
    ],
)
def test_forms_are_recognised_by_their_keys(record, form, said):
    assert recognise(Record("here", record)).form == form
    assert messages(record) == said


def test_the_input_stands_beside_the_instruction():
    assert recognise(Record("here", ALPACA)).input == "1 and 2"
    assert messages(ALPACA) == [("user", "Add."), ("assistant", "3")]


def test_columns_rename_what_a_data_set_calls_the_keys():
    longform = {"input": "Write.", "output": "Once upon"}
    found = recognise(Record("here", longform), {"instruction": "input", "output": "output"})
    assert (found.messages[0]["content"], found.input) == ("Write.", "")
    dolly = {"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "summarization"}
    found = recognise(Record("here", dolly), {"input": "context", "output": "response"})
    assert (found.input, found.messages[1]["content"]) == ("A text.", "Short.")


@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}]},
        {"tool_calls": [{"name": "add", "arguments": {"a": 1, "b": None}}]},
        {"tool_calls": '[{"name": "add", "parameters": {"a": 1, "b": null}}]', "content": None},
        {"function_call": {"name": "add", "arguments": '{"a": 1, "b": null}'}, "content": ""},
    ],
)
def test_calls_of_tools_are_what_templates_take(said):
    record = {
        "messages": [
            {"role": "user", "content": "1 + 1"},
            {"role": "assistant", **said},
            {"role": "tool", "content": "2"},
        ]
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    assert recognise(Record("here", record)).messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"from": "function_call", "value": "add(1)"}, "message 1: its call of a tool holds a text that is not JSON"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "message 1: a call of a tool is an object without a name"),
        (
            {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{"}]},
            "message 1: the argument list of the call of 'add' holds a text that is not JSON",
        ),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "message 1 has 'weight': 0.5; 0 or 1"),
        ({"role": "assistant", "content": "a", "train": False}, "every message of the assistant is marked as not"),
        ({"role": "assistant", "content": [{"type": "text", "text": 3}]}, "message 1, part 1: its 'text' is 3"),
    ],
)
def test_messages_that_say_nothing_usable_are_named(said, message):
    with pytest.raises(ValueError, match=message):
        recognise(Record("here", {"messages": [said]}))


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "mask", "masked"])
def test_a_message_says_whether_it_is_learned(key):
    no, yes = (1, 0) if key in ("mask", "masked") else (0, 1)
    chat = [{"role": "assistant", "content": text, key: value} for text, value in (("a", no), ("b", yes), ("c", None))]
    found = recognise(Record("here", {"messages": chat})).messages
    assert [message.get("weight", 1) for message in found] == [0, 1, 1]
    assert not any(key in message for message in found if key != "weight")
    assert [
        message.get("weight", 1)
        for message in recognise(
            Record(
                "here",
                {
                    "messages": [
                        {"role": "assistant", "content": "a", key: bool(no)},
                        {"role": "assistant", "content": "b", key: bool(yes)},
                    ]
                },
            )
        ).messages
    ] == [0, 1]


def test_null_means_absent():
    both = {"messages": None, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    assert recognise(Record("here", both)).form == "conversations (ShareGPT)"
    assert messages(both) == [("user", "Hi"), ("assistant", "Ho")]
    mixed = [
        {"from": "human", "value": "Hi", "role": None, "content": None},
        {"from": None, "value": None, "role": "assistant", "content": "Ho"},
        {"from": None, "value": None, "role": "user", "content": [{"type": "text", "text": None}]},
    ]
    assert messages({"conversations": mixed}) == [("user", "Hi"), ("assistant", "Ho"), ("user", "")]
    assert messages({"instruction": "a", "input": None, "output": "b", "system": None, "messages": None}) == [
        ("user", "a"),
        ("assistant", "b"),
    ]


def test_the_developer_is_the_system():
    chat = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    assert messages({"messages": chat, "system": "not this"})[0] == ("system", "a")


@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}], {"role": "user", "content": "Hi"}])
@pytest.mark.parametrize("completion", ["Ho", [{"role": "assistant", "content": "Ho"}]])
def test_prompt_and_completion_may_be_messages(prompt, completion):
    record = {"prompt": prompt, "completion": completion}
    found = recognise(Record("here", record))
    assert messages(record) == [("user", "Hi"), ("assistant", "Ho")]
    assert found.is_chat == (not isinstance(prompt, str) or not isinstance(completion, str))


def test_what_the_assistant_said_in_a_prompt_is_given_not_learned():
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = recognise(Record("here", {"prompt": before, "completion": [{"role": "assistant", "content": "d"}]}))
    assert [message.get("weight", 1) for message in found.messages] == [1, 0, 1, 1]
    with pytest.raises(ValueError, match="in its 'prompt', message 1 has no 'content'"):
        recognise(Record("here", {"prompt": [{"role": "user"}], "completion": "a"}))


def test_arrow_pads_what_a_row_does_not_have(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")

    def row(name: str, **arguments: object) -> dict:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "string", "enum": None if key == "a" else ["x"]} for key in arguments}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        return {
            "messages": [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}],
            "tools": [tool],
        }

    parquet.write_table(pyarrow.Table.from_pylist([row("f", a="1"), row("g", b="2", c=None)]), tmp_path / "a.parquet")
    first, second = read_conversations(read_records([tmp_path / "a.parquet"]))
    assert first.messages[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": "1"}}
    assert second.messages[0]["tool_calls"][0]["function"] == {"name": "g", "arguments": {"b": "2"}}
    assert first.tools[0]["function"]["parameters"]["properties"] == {"a": {"type": "string"}}
    assert set(second.tools[0]["function"]["parameters"]["properties"]) == {"b", "c"}


def test_tools_stand_beside_the_messages():
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert recognise(Record("here", {**chat, "tools": tools})).tools == tools
    assert recognise(Record("here", {**chat, "tools": json.dumps(tools)})).tools == tools
    assert [recognise(Record("here", {**chat, "tools": none})).tools for none in (None, [], "")] == [None] * 3
    with pytest.raises(ValueError, match="its 'tools' key holds a text that is not JSON"):
        recognise(Record("here", {**chat, "tools": "add"}))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a", "response": "b"}, "has no 'output' for the form instruction/input/output .*'response'"),
        ({"prompt": "a", "answer": "b"}, "has no 'completion' for the form prompt/completion"),
        ({"text": "a"}, "has no 'instruction', 'output' for the form instruction"),
        ({"instruction": "a", "output": 3}, "its 'output' is 3, not a text"),
        ({"instruction": "a", "output": None}, "its 'output' is null, not a text"),
        ("just text", "a record is an object with keys .* not a text"),
        ({"messages": []}, "a list of messages is expected, not an empty list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn: no message of the assistant"),
        ({"messages": [{"role": "user", "text": "a"}]}, "message 1 has no 'content'; its keys are 'role', 'text'"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "message 1 is from 'narrator'; expected user"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 holds a list; only text"),
    ],
)
def test_what_fits_no_form_is_explained(record, message):
    with pytest.raises(ValueError, match=message):
        recognise(Record("here", record))
    with pytest.raises(ValueError, match="here: has no 'question'; its keys are 'a'"):
        read_conversations([Record("here", {"a": 1})], {"instruction": "question"})


# --- files


def write(path: Path, records: object) -> Path:
    """`records` as lines where the name says so, else as one JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ".jsonl" in path.suffixes
    text = "\n".join(map(json.dumps, records)) + "\n" if lines else json.dumps(records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def records(count: int, start: int = 0) -> list[dict]:
    return [{"instruction": f"Question {i}", "output": f"Answer {i}"} for i in range(start, start + count)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_kind_of_file_holds_the_same_records(name, tmp_path):
    path = write(tmp_path / name, records(3))
    found = list(read_records([path]))
    assert [record.values for record in found] == records(3)
    assert found[1].where == f"{path}, {'line' if 'jsonl' in name else 'record'} 2"


def test_parquet_holds_the_same_records(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    found = list(read_records([tmp_path / "a.parquet"]))
    assert [record.values for record in found] == chats
    assert found[2].where.endswith("a.parquet, row 3")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"b\.parquet is damaged"):
        list(read_records([tmp_path / "b.parquet"]))


def test_lines_in_a_json_file_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, records(2))) + "\n\n", encoding="utf-8")
    assert [record.values for record in read_records([path])] == records(2)


def test_an_object_may_hold_both_splits(tmp_path):
    path = write(tmp_path / "a.json", {"train": records(3), "validation": records(1, 9)})
    assert [r.values for r in read_records([path], "val")] == records(1, 9)
    assert JSON(json_path=path).files() == ([path], [path])
    other = write(tmp_path / "b.json", {"version": 1, "data": records(2)})
    assert len(list(read_records([other]))) == 2
    assert JSON(json_path=other).files() == ([other], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"b": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.json", b'[{"a": 1},\n {"b" 2}]', r"a\.json, line 2: not valid JSON .Expecting ':' delimiter, column 7"),
        ("a.json", b'{"rows": 3}', "an object with the keys 'rows'. A list of records"),
        ("a.json", b'"text"', "a list of records is expected"),
        ("a.jsonl", b'{"a": "caf\xe9"}\n', "is not UTF-8 text .*iconv"),
        ("a.json", b'["caf\xe9"]', "is not UTF-8 text .*iconv"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_records([tmp_path / name]))


def test_records_that_fit_no_form_are_named_with_their_line(tmp_path):
    bad = [{"instruction": "x"}] * 5
    other = [{"messages": [{"role": role, "content": "x"}]} for role in ("a", "b", "c", "d")]
    path = write(tmp_path / "a.jsonl", [*records(2), *bad, *other])
    with pytest.raises(ValueError, match=r"line 3: has no 'output'") as failed:
        JSON(json_path=path).conversations("train")
    lines = str(failed.value).splitlines()  # one for each thing that is wrong, not for each record
    assert [re.search(r"line (\d+): ", line)[1] for line in lines[:-1]] == ["3", "8", "9"]
    assert lines[0].endswith("(4 more such records)")
    assert lines[-1] == "Something else is wrong with 2 more records."


# --- what a path stands for


def test_a_folder_with_train_and_val_files(tmp_path):
    train, val = write(tmp_path / "train.json", records(3)), write(tmp_path / "val.jsonl", records(1))
    assert JSON(json_path=tmp_path).files() == ([train], [val])


def test_a_folder_with_train_and_val_folders(tmp_path):
    train = [write(tmp_path / "train" / f"{i}.json", records(2)) for i in range(2)]
    val = write(tmp_path / "validation/0.jsonl", records(1))
    assert JSON(json_path=tmp_path).files() == (train, [val])


def test_any_other_folder_is_all_for_training(tmp_path):
    paths = [write(tmp_path / name, records(2)) for name in ("a.json", "b.jsonl", "deeper/c.json")]
    write(tmp_path / "notes.txt", records(1))
    assert JSON(json_path=tmp_path).files() == (paths, [])
    val = write(tmp_path / "val.json", records(1))
    assert JSON(json_path=tmp_path).files() == (paths, [val])


def test_a_validation_path_of_its_own(tmp_path):
    train, val = write(tmp_path / "a.json", records(3)), write(tmp_path / "b.json", records(1))
    assert JSON(json_path=train, val_json_path=val).files() == ([train], [val])
    assert JSON(json_path=tmp_path, val_json_path=val).files() == ([train], [val])
    with pytest.raises(ValueError, match="nothing is left to train on"):
        JSON(json_path=train, val_json_path=train).files()


def test_contradicting_settings_are_refused(tmp_path):
    write(tmp_path / "train.json", records(3)), write(tmp_path / "val.json", records(1))
    with pytest.raises(ValueError, match=r"val_split_fraction=0\.1: there are validation records \(val\.json\)"):
        JSON(json_path=tmp_path, val_split_fraction=0.1).files()
    with pytest.raises(ValueError, match=r"val_json_path=.* has validation records of its own"):
        JSON(json_path=tmp_path, val_json_path=tmp_path / "val.json").files()
    with pytest.raises(ValueError, match=r"val_split_fraction=1\.0 is not in \[0, 1\)"):
        JSON(json_path=tmp_path, val_split_fraction=1.0)
    with pytest.raises(ValueError, match=r"ignore_index=0"):
        JSON(json_path=tmp_path, ignore_index=0)
    with pytest.raises(ValueError, match=r"on_long='cut'"):
        JSON(json_path=tmp_path, on_long="cut")


def test_missing_paths_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"json_path=FILE_OR_FOLDER is missing"):
        JSON().files()
    with pytest.raises(FileNotFoundError, match=r"json_path=nowhere\.json: no such file"):
        JSON(json_path=Path("nowhere.json")).files()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"holds no \.json or \.jsonl file to train on \(it holds notes\.txt\)"):
        JSON(json_path=tmp_path).files()


# --- files that are too much


def bomb(path: Path, begin: bytes, filler: bytes, size: int) -> Path:
    """A small compressed file that holds `size` bytes and more."""
    block = filler * ((1 << 23) // len(filler))
    if path.suffix == ".gz":
        part = gzip.compress(block, 9)
        path.write_bytes(gzip.compress(begin) + part * (size // len(block) + 1))
    else:
        part = zstandard.compress(block)
        path.write_bytes(zstandard.compress(begin) + part * (size // len(block) + 1))
    assert path.stat().st_size < size / 200
    return path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "rows.csv.gz", "a.json.gz", "a.json.zst"])
def test_what_unpacks_to_far_more_is_refused_in_bounded_memory(name, tmp_path, monkeypatch):
    """A file of a megabyte that unpacks to hundreds: it says which limit there is, and what to do."""
    limit = 1 << (20 if name == "rows.csv.gz" else 23)
    for module in (bounded_text, table_files):
        monkeypatch.setattr(module, "MAX_RECORD", limit)
    monkeypatch.setattr(bounded_text, "max_whole_bytes", lambda: limit)
    filler = b'"\n",' if name == "rows.csv.gz" else b"x"
    path = bomb(tmp_path / name, b'["' if "json" in name else b"", filler, 40 * limit)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            list(read_records([path]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert peak < 80 << 20
    assert said.startswith(str(path))
    assert f"more than {limit:,} " in said
    assert ("Split it into several records" in said) != (".json" in path.suffixes)
    if ".json" in path.suffixes:
        assert f"{'gzip' if name.endswith('gz') else 'zstd'} -dc {name} | jq -cn" in said
        assert said.endswith("> a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_record_of_very_many_values_is_refused_before_they_are_made(name, tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "MAX_RECORD_VALUES", 1000)
    monkeypatch.setattr(record_files, "max_whole_bytes", lambda: 1000 * bounded_text.BYTES_PER_VALUE)
    assert len(list(read_records([write(tmp_path / name, records(3))]))) == 3
    path = write(tmp_path / name, [{"a": [[]] * 2000}])
    with pytest.raises(ValueError, match=r"a\.json.*it has about 4,00\d values, where 1,000 are the most"):
        list(read_records([path]))


def test_a_plain_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_text, "max_whole_bytes", lambda: 1000)
    path = write(tmp_path / "a.json", records(100))
    with pytest.raises(ValueError, match=r"a\.json: more than 1,000 bytes\. .* cat a\.json \| jq .* > a\.jsonl"):
        list(read_records([path]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_damaged_is_named(name, tmp_path):
    compress = zstandard.compress if name.endswith("zst") else gzip.compress
    content = compress(b'{"instruction": "a", "output": "b"}\n' * 10_000)
    for damaged in (content[: len(content) // 2], b"nonsense"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or cut off"):
            list(read_records([tmp_path / name]))


# --- files as other programs write them


ROWS = [{"instruction": 'Grüße, "Welt"', "output": "42"}, {"instruction": "line\nbreak; x", "output": "007"}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_the_mark_of_a_text_says_its_encoding(name, encoding, tmp_path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if name == "a.json":
        text = json.dumps(ROWS, ensure_ascii=False)
    if name == "a.csv":
        text = 'instruction,output\n"Grüße, ""Welt""",42\n"line\nbreak; x",007\n'
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [record.values for record in read_records([tmp_path / name])] == ROWS


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_values_of_a_csv_file_are_texts(name, mark, tmp_path):
    (tmp_path / name).write_text(f'output{mark}instruction\n42{mark}"a{mark} b"\n{mark}c\n')
    found = list(read_records([tmp_path / name]))
    assert [record.values for record in found] == [
        {"output": "42", "instruction": f"a{mark} b"},
        {"output": "", "instruction": "c"},
    ]
    assert found[1].where == f"{tmp_path / name}, line 3"
    (tmp_path / name).write_text("output\na,b,c;d\te;f\tg\n")
    if name == "a.tsv":
        with pytest.raises(ValueError, match="line 2: has more fields than the first row"):
            list(read_records([tmp_path / name]))


@pytest.mark.parametrize("kind", ["new_file", "new_stream"])
def test_arrow_holds_the_same_records(kind, tmp_path):
    ipc, pyarrow = pytest.importorskip("pyarrow.ipc"), pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS * 700)
    with getattr(ipc, kind)(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("dataset_info.json", "state.json"):  # as `datasets` saves them next to it
        (tmp_path / name).write_text('{"features": {}}')
    train, val = JSON(json_path=tmp_path).files()
    assert ([path.name for path in train], val) == (["data-00000-of-00001.arrow"], [])
    found = list(read_records(train))
    assert [record.values for record in found] == ROWS * 700
    assert found[1399].where.endswith("arrow, row 1400")
    (tmp_path / "b.arrow").write_bytes(b"ARROW1 nothing")
    with pytest.raises(ValueError, match=r"b\.arrow is damaged"):
        list(read_records([tmp_path / "b.arrow"]))


def test_tables_of_other_kinds_are_taken_where_there_is_nothing_else(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\nx,y\n")
    assert JSON(json_path=tmp_path).files() == ([tmp_path / "a.csv"], [])
    write(tmp_path / "a.jsonl", records(1))
    assert JSON(json_path=tmp_path).files() == ([tmp_path / "a.jsonl"], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ARROW1\0\0\xff\xff", "is an Arrow file"),
        (b"\xff\xff\xff\xff\x10\0\0\0\xfe", "is an Arrow file"),
        (b"PAR1\x15\xff", "is a parquet file"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        (b"PK\x03\x04\xff", r"a ZIP archive \(.zip, .xlsx"),
        (
            "{}".encode("utf-16-le") * 9 + b"\xff",
            r"is text in UTF-16LE, not in UTF-8. Convert it: iconv -f UTF-16LE -t UTF-8",
        ),
        (bytes(range(256)) + bytes(2000), "binary data of an unknown kind"),
        ('["caf\xe9"]'.encode("latin1"), r"is not UTF-8 text \(invalid.*iconv -f CP1252 -t UTF-8 .* > a-utf8.json"),
    ],
)
def test_what_is_no_text_is_called_what_it_is(content, message, tmp_path):
    from litgpt.data.text_reading import read_chunks, whole_file

    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_records([tmp_path / "a.json"]))
    with pytest.raises(ValueError, match=message):  # --data TextFiles
        "".join(read_chunks(whole_file(tmp_path / "a.json")))


def test_text_files_in_utf_16_get_the_right_remedy(tmp_path):
    from litgpt.data.text_reading import read_chunks, whole_file

    (tmp_path / "a.txt").write_bytes("Hallo".encode("utf-16"))
    with pytest.raises(
        ValueError, match=r"a\.txt is text in UTF-16, not in UTF-8\. Convert it: iconv -f UTF-16 -t UTF-8"
    ):
        "".join(read_chunks(whole_file(tmp_path / "a.txt")))


def test_a_pipe_is_no_data(tmp_path):
    """As `<(...)` makes one: it can be read once."""
    from litgpt.data.text_files import text_files

    os.mkfifo(tmp_path / "a.json")
    for read in (lambda path: JSON(json_path=path).files(), lambda path: text_files(path, "train_data_path")):
        with pytest.raises(ValueError, match=r"a\.json is neither a file nor a folder.*write it to a file"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({f"key {n}": 1 for n in range(9999)}), r"the keys 'key 0', .*'key 4', \.\.\.\. A list"),
        (json.dumps({"x" * 9999: 1}), r"the keys 'x{40}'\. A list"),
        ('[{"instruction": "a", "id": ' + "9" * 5000 + "}]", "it has an integer of more than 4,300 digits"),
    ],
)
def test_what_is_said_of_a_file_is_short(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        list(read_records([tmp_path / "a.json"]))
    assert len(str(refused.value)) < 500
