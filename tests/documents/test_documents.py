"""Every line of the four documents, run: a shell's in a shell, Python's in this process, with what it must leave.

A row that stands for a subcommand or data module which is not there yet is left out (`off`), and counted as such.
"""

import contextlib
import io
import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import COMMANDS
from tests.documents import pretraining, training_recipes, workflows, zero_to_litgpt
from tests.documents.place import RAW, ROOT, Place, free_port, made
from tests.documents.table import Row, lines_of
from tests.hub_server import connect
from tests.shell import Done

DOCUMENTS = {
    "workflows": workflows,
    "zero to litgpt": zero_to_litgpt,
    "training recipes": training_recipes,
    "pretraining": pretraining,
}
RUN = ("shell", "python", "yaml", "json", "options")


def is_there(name: str) -> bool:
    """Whether a row's subcommand, data module or recipe has come."""
    import litgpt.data

    return not name or name in COMMANDS or name in litgpt.data.__all__ or (ROOT / name).is_file()


def rows() -> Iterator[pytest.param]:
    for title, document in DOCUMENTS.items():
        for number, row in enumerate([*document.ROWS, *getattr(document, "SPOKEN", [])]):
            if row.kind in RUN and is_there(row.off):
                first = " ".join((row.run or row.typed).replace("\\", "").split())[:60]
                yield pytest.param(row, id=f"{title} {number}: {first}")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    pytest.importorskip("pyarrow", reason="the stand-ins of public data sets are parquet files")
    with made(tmp_path_factory.mktemp("d")) as place:
        (place.directory / "config/pythia-160m.yaml").write_text(workflows.CONFIG)
        (place.directory / "config/pythia-1b.yaml").write_text(
            workflows.CONFIG.replace("pythia-160m", "pythia-1b").replace("n_head: 12", "n_head: 8")
        )
        (place.directory / "pretrain_script.sh").write_text(workflows.STARTED)
        (place.directory / "as_typed.sh").write_text(workflows.SCRIPT.replace("/shared/data", "data"))
        yield place


@pytest.mark.parametrize("row", list(rows()))
def test_it_does_what_the_document_says(place: Place, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in row.needs:
        place.need(path)
    if row.kind == "json":
        (place.directory / row.run).write_text(row.typed, encoding="utf-8")
        return
    if row.kind == "yaml":
        (place.directory / row.extra).write_text(row.typed)
        done = place.run(row.run)
    elif row.kind == "python":
        done = run_python(place, row, monkeypatch)
    elif row.run == "":
        done = Done(0, "", "")
    elif row.serves:
        port = free_port()
        with place.serving(f"{row.run or row.typed} {row.extra.format(port=port)}", port):
            row.serves(place, port)
        return
    else:
        script = before_comment((row.run or row.typed).replace(RAW, place.website))
        script = f"{script} {row.extra}".replace("{tasks}", zero_to_litgpt.local_tasks(place))
        done = place.run(script, row.stdin)
    assert done.code == row.code, f"{done.out[-3000:]}\n{done.err[-3000:]}"
    assert "Traceback" not in done.err or row.kind == "python", done.err
    if row.then:
        row.then(place, done)


def before_comment(script: str) -> str:
    """A script whose last line has no comment, so that words can be put behind it."""
    return re.sub(r"[ \t]+#[^\n]*\Z", "", script.rstrip())


def run_python(place: Place, row: Row, monkeypatch: pytest.MonkeyPatch) -> Done:
    """Runs code in the place's directory, with the hub on loopback."""
    connect(place.hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", place.shell.environment["HF_TOKEN"])
    monkeypatch.setenv("HF_HOME", place.shell.environment["HF_HOME"])
    monkeypatch.chdir(place.directory)
    printed, code, error = io.StringIO(), 0, ""
    names = dict(row.names or {}, __name__="the document")
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(row.run or row.typed, "the document", "exec"), names)
        except Exception as raised:
            if not row.code:
                raise
            code, error = 1, f"{type(raised).__name__}: {raised}"
    if row.serves:
        row.serves(place, names)
    return Done(code, printed.getvalue(), error)


def typed(document: Any, start: str) -> str:
    """The first row of a document that begins so, as it stands there."""
    return next(row.typed for row in document.ROWS if row.typed.startswith(start))


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (workflows.LORA_WITH_COMMENTS, 2, "unexpected argument ' '"),
        (typed(pretraining, "~ ls"), 126, "directory"),
    ],
)
def test_what_a_user_gets_who_types_it_as_it_stands(place: Place, script: str, code: int, said: str) -> None:
    done = place.run(script)
    assert done.code == code, done.err
    assert said in done.err
    assert "Traceback" not in done.err


DOCUMENTS_HERE = os.environ.get("LITGPT_SEEDS")


@pytest.mark.skipif(not DOCUMENTS_HERE, reason="the documents are no part of the tree; LITGPT_SEEDS names their folder")
@pytest.mark.parametrize(("number", "title"), list(enumerate(DOCUMENTS)))
def test_no_line_is_missing(number: int, title: str) -> None:
    """Block by block, in order: each is made of rows, to the last line."""
    (file,) = Path(DOCUMENTS_HERE).glob(f"{number:03}_*")
    text = file.read_text(encoding="utf-8")
    left = list(DOCUMENTS[title].ROWS)
    for content in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.S | re.M):
        lines = lines_of(textwrap.dedent(content))
        while lines:
            assert left, f"no row for: {lines[0]}"
            row = left.pop(0)
            wanted = lines_of(row.typed)
            if row.kind in ("output", "prose"):
                assert lines[0] == wanted[0]
                lines = []
            else:
                assert lines[: len(wanted)] == wanted
                lines = lines[len(wanted) :]
    assert not left, f"not in the document: {left[0].typed}"
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    spoken = {code for code in re.findall(r"`([^`\n]+)`", outside) if re.match(r"litgpt |--\w|pip ", code)}
    assert spoken <= DOCUMENTS[title].INLINE.keys()


def test_the_options_that_scale_a_command_down_are_stated() -> None:
    """What is put behind a command is options, never another command or a redirection."""
    rows = [row for document in DOCUMENTS.values() for row in document.ROWS]
    extras = [row.extra for row in rows if row.kind == "shell" and row.extra]
    assert extras
    assert [extra for extra in extras if not shlex.split(extra)[0].startswith("--")] == []
