"""README and the tutorials: every block runs, or says why not; every link leads somewhere.

The commands are those of the pages, as typed, in a real shell; models and data come from a Hub on loopback, and what
would take long is made small by options behind them (`LESS`). What is not run is at least read: its options exist.
"""

import ast
import json
import shutil
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub_server import connect, serve_hub
from tests.markdown import Block, Page, unlike
from tests.shell import Shell, litgpt_commands
from tests.stand_ins import QUESTIONS, hub

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
LINKED += [*sorted(ROOT.glob("config_hub/**/*.md")), *ROOT.glob("extensions/**/*.md")]

# Behind the options that a page shows, by subcommand.
TRAIN = ["--train.max_steps", 2, "--train.global_batch_size", 2, "--train.micro_batch_size", 1, "--eval.max_iters", 1]
SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_query_groups": 2, "intermediate_size": 64}
SHAPE = [word for name, value in SMALL.items() for word in (f"--model_config.{name}", value)]
FINETUNE = [*TRAIN, "--data.num_workers", 0]
ADAPTER = [*FINETUNE, "--adapter_start_layer", 1]
ANSWER = ["--max_new_tokens", 8]
WAYS = ("full", "adapter", "adapter_v2", "sequentially", "tp", "speculatively")
LESS = {
    "pretrain": [*TRAIN, *SHAPE, "--train.max_seq_length", 32],
    **dict.fromkeys(("finetune", "finetune_full", "finetune_lora", "finetune_dpo"), FINETUNE),
    **dict.fromkeys(("finetune_adapter", "finetune_adapter_v2"), ADAPTER),
    "bench": ["--prompt_tokens", 16, "--new_tokens", 4, "--repetitions", 1, "--compile", "false"],
    **dict.fromkeys(("generate", "chat", *(f"generate_{way}" for way in WAYS)), ANSWER),
}


class World:
    """The shell, the directory that a page's commands run in, and the server that one of them may have started."""

    def __init__(self, shell: Shell, home: Path, port: int) -> None:
        self.shell, self.place, self.port = shell, home, port
        self.server = None
        self.hf_directory = home / "hf_directory"
        shell.run("litgpt download microsoft/phi-2 --convert_checkpoint false", home, check=True)
        shutil.move(home / "checkpoints/microsoft/phi-2", self.hf_directory)

    def enter(self, place: Path) -> None:
        """A fresh directory with the texts, records and directories that the pages take to be there."""
        self.place = place
        (place / "my_data.json").write_text(json.dumps(QUESTIONS))
        (place / "my_texts").mkdir()
        (place / "tests").symlink_to(ROOT / "tests")  # as in a clone
        pairs = ({"prompt": q["instruction"], "chosen": q["output"], "rejected": "No."} for q in QUESTIONS)
        (place / "my_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        shutil.copytree(self.hf_directory, place / "path/to/hf_directory")
        shakespeare = (ROOT / "config_hub/pretrain/data/shakespeare.txt").read_text()
        (place / "my_texts/plays.txt").write_text(shakespeare[:20_000])

    def bash(self, script: str) -> str:
        """Runs a script; one that ends with `litgpt serve` goes on, until the page or another server ends it."""
        script = self.here(script)
        if (litgpt_commands(script) or [[""]])[-1][:1] == ["serve"]:
            self.stop()
            self.server = self.shell.start(script, self.place)
            return self.wait()
        return self.shell.run(script, self.place, stdin="Hello\n", check=True, together=True).out

    def here(self, code: str) -> str:
        """The code with the port that is free here."""
        return code.replace(":8000", f":{self.port}")

    def wait(self) -> str:
        """Until the server answers."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.server.poll() is None, self.server.stdout.read()
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health") as answer:
                return answer.read().decode()
            time.sleep(0.05)
        raise TimeoutError("the server does not answer")

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.communicate()
            self.server = None


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    less = {**LESS, "serve": ["--port", port, "--compile", "false"]}
    with tempfile.TemporaryDirectory() as name, serve_hub(hub()) as served:
        home = Path(name)
        places = {"HOME": home, "HF_HOME": home / "hf", "LITGPT_CACHE_DIR": home / "cache", "HF_ENDPOINT": served.url}
        settings = {name: str(value) for name, value in places.items()} | {"HF_HUB_OFFLINE": "0"}
        with Shell(home, less, settings) as shell:
            shell.hub = served
            yield World(shell, home, port)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, world, tmp_path, monkeypatch):
    world.enter(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    connect(world.shell.hub, monkeypatch)
    names = {"__name__": "notebook"}
    printed = ""
    try:
        for block in Page(page).blocks:
            if block.reason:
                continue
            if block.title:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.text)
            elif block.language == "bash":
                printed = world.bash(block.text)
            elif block.language == "python":
                printed = notebook(block, world.here(block.text), names)
            else:
                missing = unlike(block.text, printed)
                assert missing is None, f"{block.place}: {missing!r} is not in\n{printed[-6000:]}"
    finally:
        world.stop()


def notebook(block: Block, code: str, names: dict[str, Any]) -> str:
    """Runs a piece of Python in this process, and gives what it printed."""
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        exec(compile("\n" * block.line + code, str(block.page), "exec"), names)
    return printed.getvalue()


READERS = {
    "yaml": yaml.safe_load,
    "json": json.loads,
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    "python": ast.parse,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_can_be_run_or_says_why_not(page):
    blocks = Page(page).blocks
    assert len(blocks) == page.read_text().count("```") / 2
    ran = False  # whether a block before has printed something
    for block in blocks:
        if block.reason:
            assert len(block.reason.split()) > 1, block.place
            ran = False
        elif block.title:
            READERS[block.language](block.text)
            others = [other.text for other in blocks if other is not block and not other.reason]
            assert any(Path(block.title).stem in text for text in others), f"{block.place} is not used"
        elif block.language == "text":
            assert ran, f"{block.place}: what is it the output of?"
        else:
            assert block.language in ("bash", "python"), block.place
            ran = True


NOT_RUN = [block for page in PAGES for block in Page(page).blocks if block.reason and block.language == "bash"]
COMMANDS_NOT_RUN = [
    pytest.param(words, id=f"{block.place} {words[0]}")
    for block in NOT_RUN
    for words in litgpt_commands(block.text)
    if words[-1] != "list" and "--help" not in words and "..." not in words
]


@pytest.mark.parametrize("words", COMMANDS_NOT_RUN)
def test_the_options_of_what_is_not_run_exist(words, litgpt, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = litgpt(*words, "--print_config")
    assert result.code == 0, result.err
    assert result.out


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    assert Page(page).broken_links() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_up_to_date(page, monkeypatch):
    text = page.read_text()
    if "<!-- table: " not in text:
        return
    monkeypatch.syspath_prepend(ROOT / "tutorials")
    import tables

    assert tables.update(text) == text, "python tutorials/tables.py"


def test_the_manual_has_the_pages_that_people_link_to():
    names = {path.stem for path in PAGES}
    assert names >= {"0_to_litgpt", "pretrain", "pretrain_tinyllama", "prepare_dataset", "finetune", "finetune_full"}
    assert names >= {"finetune_lora", "finetune_adapter", "finetune_dpo", "inference", "python-api", "evaluation"}
    assert names >= {"deploy", "quantize", "oom", "convert_hf_checkpoint", "convert_lit_models", "resource-tables"}
    assert names >= {"download_model_weights", "training-recipes", "distributed"}
    linked = {Path(link).stem for link in Page(ROOT / "README.md").links if "tutorials/" in link}
    assert linked == names - {"README"}
