"""Tokens and keys are in no output: not printed, written, recorded or shown by `ps`."""

import contextlib
import copy
import inspect
import io
import json
import pickle
import pprint
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import litgpt.data
from litgpt.__main__ import COMMANDS, load, main
from litgpt.cli import secret
from litgpt.cli.flat import flattened
from litgpt.cli.hints import admits, constructor_hints
from litgpt.cli.secret import NAME, Secret, hide, reveal
from litgpt.cli.signature import Signature
from litgpt.data import HFDataset
from tests import checkpoint_files

TOKEN = "hf_WhatNobodyMaySee"


def test_a_secret_shows_nothing_of_itself():
    @dataclass
    class Options:
        access_token: Secret

    token = Secret(Secret(TOKEN))
    options = Options(token)
    for shown in (repr(token), str(token), f"{token}", f"{token:>40}", f"{token} {token!r}", repr(options)):
        assert TOKEN not in shown
        assert "***" in shown
    assert TOKEN not in pprint.pformat({"options": options, "token": token})
    for write in (json.dumps, yaml.safe_dump, "".join):
        with pytest.raises((TypeError, yaml.YAMLError)) as caught:
            write([token])
        assert TOKEN not in str(caught.value)
    for same in (copy.deepcopy(token), pickle.loads(pickle.dumps(token))):  # for processes that load data
        assert (same, reveal(same)) == (token, TOKEN)
    assert reveal(None) is None
    assert TOKEN not in repr(HFDataset("a/b", access_token=TOKEN))
    assert "access_token" not in HFDataset("a/b").settings()


def signatures() -> list[tuple[str, dict[str, typing.Any]]]:
    """Option -> type hint of every command, and of every class of data."""
    found = []
    for name, command in COMMANDS.items():
        signature = Signature(flattened(load(command.target)))
        hints = {one.name: one.annotation for one in signature.parameters.values()}
        for one in signature.of_kind("group"):
            hints |= {f"{one.name}.{field}": hint for field, hint in one.fields.items()}
        found.append((name, hints))
    data = [getattr(litgpt.data, name) for name in litgpt.data.__all__]
    return found + [(cls.__name__, constructor_hints(cls)) for cls in data if inspect.isclass(cls)]


def test_every_option_for_a_secret_is_of_that_type():
    seen = 0
    for name, hints in signatures():
        for option, hint in hints.items():
            if NAME.fullmatch(option.rpartition(".")[2]) and not admits(hint, bool):
                assert admits(hint, Secret), (name, option)
                assert not admits(hint, str), (name, option)
                seen += 1
    assert seen > 15


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Illegal header value b'Bearer {TOKEN}'", "Illegal header value b'Bearer ***'"),
        ("key wandb_of_the_environment", "key ***"),
        ("https://me:password@host/x@y and s3://id:key@bucket", "https://***@host/x@y and s3://***@bucket"),
        ("https://host/x?X-Amz-Signature=abc&part=2&token=d", "https://host/x?X-Amz-Signature=***&part=2&token=***"),
        ("mail me@host, https://host/me@here", "mail me@host, https://host/me@here"),
    ],
)
def test_texts_for_people(text, expected, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wandb_of_the_environment")
    monkeypatch.setenv("ANY_TOKEN", "default")  # too short for one
    monkeypatch.setenv("TLS_KEY", "/etc/none/of/them")
    Secret(TOKEN)
    assert hide(text) == expected
    assert hide("the default is /etc/none/of/them") == "the default is /etc/none/of/them"


def test_a_finetuning_run(tmp_path, monkeypatch, capfd):
    """Everything that it prints and writes: logs.txt, hyperparameters.yaml, TensorBoard's and metrics' files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", f"{TOKEN}_of_wandb")
    model = checkpoint_files.chat_model(tmp_path / "model")
    Path("data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 20))
    words = ["finetune_lora", model, "--access_token", f"{TOKEN}_1", "--out_dir", "out", "--train.max_steps", "1"]
    words += ["--data", "JSON", "--data.json_path", "data.json", "--data.val_split_fraction", "0.2"]
    words += ["--train.global_batch_size", "1", "--logger_name", "tensorboard"]
    words += [
        "--log.metadata",
        f"{{api_key: {TOKEN}_2, url: 'https://me:{TOKEN}_3@host', names: [{{token: {TOKEN}_4}}]}}",
    ]
    assert main([str(word) for word in words]) == 0
    printed = capfd.readouterr()
    assert "***" in printed.out  # the settings are shown
    assert TOKEN not in printed.out + printed.err
    files = [file for file in Path("out").rglob("*") if file.is_file()]
    assert {"logs.txt", "hyperparameters.yaml"} <= {file.name for file in files}
    assert any("tfevents" in file.name for file in files)
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_errors(debug, tmp_path, monkeypatch, capsys):
    """A token that is not a valid header is shown by the HTTP client, an address by everybody."""
    monkeypatch.chdir(tmp_path)
    address = f"http://me:{TOKEN}@127.0.0.1:9/x.yaml"
    assert main(["pretrain", "--config", address, *debug]) == 1
    error = capsys.readouterr().err
    assert "--config http://***@127.0.0.1:9/x.yaml" in error
    assert TOKEN not in error
    (tmp_path / "a.yaml").write_text(f"access_token: [{TOKEN}]\n")
    assert main(["download", "org/model", "--config", "a.yaml", *debug]) == 2
    error = capsys.readouterr().err
    assert "access_token" in error
    assert TOKEN not in error
    with monkeypatch.context() as patch:

        def fails(*_):
            raise RuntimeError(f"Bearer {TOKEN}")  # a bug, with its traceback

        patch.setattr("litgpt.__main__.dispatch", fails)
        Secret(TOKEN)
        assert main(["download"]) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: Bearer ***" in error
    assert TOKEN not in error


WORDS = ["serve", "x", "--access_token", f"{TOKEN}_1", "", f"--api-key={TOKEN}_2", "--config"]
WORDS += [f"https://me:{TOKEN}_3@host/x", "--data.access_token", f"{TOKEN}_4", "--lora_key", "true"]
PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from litgpt.cli.secret import command_line

words = command_line()
shown = Path("/proc/self/cmdline")
print([words, sys.argv[1:], shown.read_text().split(chr(0))[2:-1] if shown.exists() else None])
if "CHILD" not in os.environ:
    sys.stdout.flush()
    subprocess.run([sys.executable, *sys.argv], env={**os.environ, "CHILD": "1"}, check=True)
"""


def test_the_command_line_that_others_see(tmp_path):
    """Also of a process that is started with the same `sys.argv`, as the ranks of a training run are."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program, *WORDS], capture_output=True, text=True, check=True)
    own, child = map(eval, done.stdout.splitlines())
    assert own[0] == child[0] == WORDS
    for argv in (own[1], child[1]):  # which wandb records
        assert TOKEN not in str(argv)
        assert len(argv) == len(WORDS)
    if own[2] is None:
        assert "list of processes" in done.stderr  # no system that lets it be changed
        return
    for line in (own[2], child[2]):
        assert TOKEN not in str(line)
        assert [word for word in line if "*" not in word and "$" not in word] == [w for w in WORDS if TOKEN not in w]


def test_where_the_command_line_cannot_be_changed(monkeypatch, capsys):
    monkeypatch.setattr(secret, "_overwrite", lambda *_: False)
    monkeypatch.setattr(secret.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["litgpt", "download", "org/model", "--access_token", TOKEN])
    monkeypatch.setenv("LITGPT_SECRET_0", "")
    assert secret.command_line()[-1] == TOKEN
    assert "can see --access_token in its list of processes. HF_TOKEN" in capsys.readouterr().err


def test_a_stream_without_secrets():
    """However a line comes: in parts, with others, or without an end."""
    reveal("sk-of-the-stream")
    written = io.StringIO()
    with contextlib.redirect_stderr(written), secret.hidden_secrets():
        print("one", "sk-of-the-stream", file=sys.stderr)
        sys.stderr.write("two sk-of-")
        sys.stderr.writelines(["the-stream\nthree ", "sk-of-the-stream\nfour sk-of-the-stream"])
        assert written.getvalue() == "one ***\ntwo ***\nthree ***\n"
        assert not sys.stderr.isatty()
    assert written.getvalue() == "one ***\ntwo ***\nthree ***\nfour ***"
