"""Reading JSON and YAML of unknown origin."""

import json
import os

import pytest

from litgpt.checkpoint.weight_index import parse_weight_index
from litgpt.cli.untrusted import (
    MAX_DEPTH,
    is_count,
    is_slow,
    parse_json,
    parse_json_object,
    parse_yaml,
    read_bounded,
    read_json_object,
    read_yaml_mapping,
    shown,
)


def nested(levels):
    return "[" * levels + "]" * levels


def test_json_is_read_as_python_reads_it():
    content = {"a": [1, 2.5, None, True, "ü"], "b": {"c": {}}, "d": float("inf")}
    assert parse_json_object(json.dumps(content), "x") == content
    assert parse_json_object(b"\xef\xbb\xbf" + json.dumps(content).encode(), "x") == content


def test_depth_has_a_bound():
    assert parse_json(nested(MAX_DEPTH))
    for levels in (MAX_DEPTH + 1, 500, 10**6):
        with pytest.raises(ValueError, match="nested more than"):
            parse_json(nested(levels))
    assert parse_json(nested(500), deep=True)
    with pytest.raises(ValueError, match="nested more than"):
        parse_json(nested(10**6), deep=True)


def test_a_key_may_come_twice_where_that_is_usual():
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="key twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', unique_keys=True)


def test_messages_name_the_file_and_the_remedy(tmp_path):
    file = tmp_path / "a.json"
    for content, reason in (("{", "is not valid JSON"), ("3", "a number"), ("null", "empty"), ('"a"', "a text")):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"'{file}' .*{reason}.*\. Do this\.$"):
            read_json_object(file, remedy="Do this.")
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "none.json")


def test_only_files_are_read_and_only_so_much_of_them(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_bounded(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a file"):
        read_bounded(tmp_path / "pipe")
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bounded(file, limit=5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes, where such a file has 4 at most"):
        read_bounded(file, limit=4)


def test_yaml_is_read_as_python_reads_it(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &x [1, 2.5, null, true, ü]\nb: {c: *x}\nd: 2024-01-02\n<<: {e: 1e-5}\n")
    content = read_yaml_mapping(file)
    assert content["a"] == content["b"]["c"] == [1, 2.5, None, True, "ü"]
    assert content["e"] == "1e-5"
    assert parse_yaml("", "x", "") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested(MAX_DEPTH + 2), "nested"),
        ("".join(" " * level + "a:\n" for level in range(300)), "nested"),
        ("a: &a\n- *a\n", "stands for itself"),
        ("a: *b", "undefined alias"),
        ("a: [", "line 1"),
        ("!!python/object/apply:os.system [ls]", "constructor"),
        ("{[]: 1}", "unhashable"),
        ("a: 2024-99-99", "month"),
        (b"\xff\xff", "utf-8"),
    ],
)
def test_yaml_that_is_none(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text, "a.yaml", "")


@pytest.mark.parametrize(
    ("pattern", "slow"),
    [
        (r"(a+)+$", True),
        (r"(?:a*b)*", True),
        (r"((a{2,}))+", True),
        (r"(?:\d{3})*\b", False),
        (r"[(+]+(?:x[+*]y)*", False),
        (r"\(a+\)+", False),
        (
            r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            False,
        ),
    ],
)
def test_expressions_that_double_with_every_letter(pattern, slow):
    assert is_slow(pattern) is slow


def test_a_choice_that_is_repeated_may_be_slow_too():
    assert not is_slow("(a|a)*")
    assert is_slow("(a|a)*", alternatives=True)
    assert is_slow(".*.*.*.*.*x", alternatives=True)
    assert not is_slow(r"model\.layers\.\d+\.(q|v)_proj", alternatives=True)


def test_values_are_shown_in_short():
    assert shown("a" * 10**6) == repr("a" * 60)[:60] + "..."
    assert shown(10**5000).startswith("an integer of")
    assert shown([[1] * 100] * 100) == "[[1, 1, 1, 1, ...], [1, 1, 1, 1, ...], [1, 1, 1, 1, ...], [1..."
    assert shown({"a": 1}) == "an object of 1 entries"
    assert shown(float("nan")) == "nan"


def test_counts():
    assert is_count(0)
    assert is_count(5, at_most=5)
    assert not any(map(is_count, (-1, True, 1.0, "1", None, 2**63)))


def test_a_weight_index():
    content = {"weight_map": {"a": "x.safetensors", "b": "sub/y.safetensors"}, "metadata": {}}
    assert parse_weight_index(json.dumps(content).encode(), "i") == content["weight_map"]
    for wrong in ({}, {"weight_map": []}, {"weight_map": {"a": ".."}}, {"weight_map": {"a": "x", "b": None}}):
        with pytest.raises(ValueError, match="'i' is not a valid weight index"):
            parse_weight_index(json.dumps(wrong).encode(), "i")
