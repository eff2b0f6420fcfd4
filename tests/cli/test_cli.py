"""The program and its command-line layer, with small commands made here."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
import yaml

import litgpt as package
from litgpt import __main__ as program
from litgpt import cli
from litgpt.__main__ import COMMANDS, Command
from litgpt.cli.flat import flattened
from litgpt.cli.signature import Signature


@dataclass
class TrainArgs:
    """How long to train"""

    max_steps: int | None = None
    """Steps until the end"""
    micro_batch_size: int = 4
    """Sequences at a time"""
    max_time: float | None = None
    tie_embeddings: bool | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError("train.micro_batch_size has to be at least 1.")


@dataclass
class LogArgs:
    run: str | None = None
    metadata: dict | None = None


class Data:
    """A base class, with its subclasses next to it."""


@dataclass
class Text(Data):
    """Text of some folder."""

    path: Path
    """Where the text is"""
    seed: int = 42
    mask_prompt: bool = False
    api_key: str | None = None


@dataclass
class Table(Data):
    rows: int = 1
    seed: int = 0


@dataclass
class Spec:
    class_path: str = "torch.optim.AdamW"
    init_args: dict[str, Any] = field(default_factory=dict)


def command(
    checkpoint_dir: Path,
    out_dir: Path = Path("out"),
    data: Data | None = None,
    train: TrainArgs = TrainArgs(micro_batch_size=2),  # noqa: B008
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: Spec = Spec(init_args={"lr": 0.0004, "betas": [0.9, 0.95]}),  # noqa: B008
    model_config: cli.ConfigOverrides | None = None,
    devices: int | str = "auto",
    precision: Literal["32-true", "bf16-true"] | None = None,
    resume: bool | Literal["auto"] | Path = False,
    multiline: bool = False,
    prompt: str = "What?",
    access_token: str | None = None,
    separator: str | None = None,
    place: Path | None = None,
    lora_key: bool = False,
) -> SimpleNamespace:
    """Do what a test wants.

    Args:
        checkpoint_dir: Where the weights are.
        prompt: What to ask.
    """
    return SimpleNamespace(**locals(), settings=cli.resolved_settings())


def run(*argv: object, function: Any = command) -> Any:
    return cli.run(function, [str(word) for word in argv], prog="litgpt command")


def refused(*argv: object) -> str:
    """The message of a wrong command line."""
    with pytest.raises(cli.UsageError) as caught:
        run(*argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- values ---------------------------------------------------------------------------------------------------------


def test_defaults_and_positional():
    got = run("some/dir")
    assert got.checkpoint_dir == Path("some/dir")
    assert got.train == TrainArgs(micro_batch_size=2)
    assert got.optimizer == Spec(init_args={"lr": 0.0004, "betas": [0.9, 0.95]})
    assert got.data is None
    assert got.model_config is None
    assert run("--checkpoint_dir", "some/dir").checkpoint_dir == Path("some/dir")


@pytest.mark.parametrize("text", ["10_000_000", "1e7", "10000000", "1.0e7"])
@pytest.mark.parametrize("form", ["{}={}", "{} {}"])
def test_integers(text, form):
    got = run("dir", *form.format("--train.max_steps", text).split())
    assert got.train.max_steps == 10_000_000
    assert isinstance(got.train.max_steps, int)


def test_large_integers_stay_exact():
    assert run("dir", "--train.max_steps", "9007199254740993").train.max_steps == 9007199254740993


TEXTS = ["1e6", "a: b", "[1, 2]", " x ", "-1", "", "true", "-- she said", "{a: 1}"]
NOTHING = ["\n---\n", "---", "# Title", "#", "&a", " # x\n", "--- # x", "%YAML", "!!null x"]  # to YAML


def test_text_stays_text(tmp_path):
    for text in (*TEXTS, *NOTHING):
        assert run("dir", "--prompt", text).prompt == text
        assert run("dir", "--separator", text).separator == text
        assert run("dir", "--data", "Text", "--data.path", "x", f"--data.api_key={text}").data.api_key == text
    for text in NOTHING:
        assert run("dir", "--place", text).place == Path(text)
        assert run("dir", "--log.run", text).log.run == text
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"separator": text}))
        assert run("dir", "--config", tmp_path / "config.yaml").separator == text
    assert run("dir", "--prompt", "null").prompt == "null"
    for text in ("null", "~"):
        assert run("dir", "--separator", text).separator is None
        assert run("dir", "--place", text).place is None
    assert run("dir", "--prompt=--train.x 1").prompt == "--train.x 1"


def test_unions():
    assert run("dir", "--devices", "2").devices == 2
    assert run("dir", "--devices", "auto").devices == "auto"
    assert run("dir", "--resume", "auto").resume == "auto"
    assert run("dir", "--resume", "true").resume is True
    assert run("dir", "--resume").resume is True
    assert run("dir", "--resume", "out/x").resume == Path("out/x")
    assert run("dir", "--precision", "bf16-true").precision == "bf16-true"
    assert run("dir", "--train.max_time", "4e-1").train.max_time == 0.4
    assert run("dir", "--train.max_steps", "null").train.max_steps is None


def test_booleans():
    assert run("dir").multiline is False
    for words in (["--multiline", "true"], ["--multiline"], ["--multiline=yes"], ["--multiline", "1"]):
        assert run("dir", *words).multiline is True
    assert run("--multiline", "dir").checkpoint_dir == Path("dir")
    assert run("dir", "--multiline", "False").multiline is False
    assert refused("dir", "--multiline", "maybe") == "--multiline: expected true or false, got 'maybe'."


def test_dashes_are_underscores():
    assert run("dir", "--out-dir", "x").out_dir == Path("x")


def test_wrong_types_name_option_value_and_type():
    assert refused("dir", "--train.max_steps", "1.5") == "--train.max_steps: expected an integer (or null), got '1.5'."
    assert refused("dir", "--precision", "64") == "--precision: expected '32-true' or 'bf16-true' (or null), got '64'."
    assert refused("dir", "--train.micro_batch_size", "null").endswith("expected an integer, got 'null'.")
    data = ("--data", "Text", "--data.path", "x")
    assert refused("dir", *data, "--data.seed", "y") == "--data.seed: expected an integer, got 'y'."
    assert refused("dir", "--model_config.n_layer", "2.5") == "--model_config.n_layer: expected an integer, got '2.5'."
    assert refused("dir", "--optimizer.lr", "x").startswith("--optimizer.lr: expected a number")


def test_a_name_that_is_no_text_is_named():
    """A file name in another encoding reaches a program with lone surrogates in it."""
    assert refused("caf\udce9").startswith("--checkpoint_dir: it is no text in UTF-8. Rename the file or directory")
    refusal = refused("dir", "--data", "Text", "--data.path", "caf\udce9")
    assert refusal.startswith("--data.path: it is no text in UTF-8.")


def test_the_settings_that_differ_from_the_defaults_are_few(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {max_steps: 7, micro_batch_size: 4}\noptimizer: {init_args: {lr: 0.0004}}\n")
    shown = []

    def function(
        checkpoint_dir: Path,
        data: Data | None = None,
        train: TrainArgs = TrainArgs(),  # noqa: B008
        access_token: str | None = None,
        optimizer: Spec = Spec(init_args={"lr": 0.0004}),  # noqa: B008
    ) -> None:
        shown.append(cli.describe_settings(tmp_path))

    data = ("--data", "Text", "--data.path", "x", "--data.api_key", "sk-0815-4711-0815")
    run("dir", "--config", file, *data, "--train.learning_rate", "1e-4", "--access_token", "hf_0815", function=function)
    assert shown == [
        f"Settings (the others are the defaults; all are in {tmp_path / 'hyperparameters.yaml'}):\n  checkpoint_dir: dir\n  data: Text\n"
        "  data.path: x\n  train.max_steps: 7\n  train.learning_rate: 0.0001"
    ]
    assert cli.describe_settings(None) is None


def test_names_that_other_programs_have():
    assert refused("dir", "--lr", "1") == "--lr: unknown setting. Here it is --train.learning_rate."
    assert refused("dir", "--steps", "1").endswith(" Here it is --train.max_steps.")
    assert refused("--model", "dir").endswith(
        " Here the checkpoint_dir stands right after the command, without a name before it."
    )
    assert refused("-m", "dir") == (
        "-m: options have their full names here, `--name value`. Here the checkpoint_dir stands right after the "
        "command, without a name before it."
    )
    assert refused("dir", "-x") == "-x: options have their full names here, `--name value`."
    assert str(run("./dir").checkpoint_dir) == "./dir"
    assert run("./dir").checkpoint_dir == Path("dir")


def test_a_groups_own_check_is_heard():
    with pytest.raises(ValueError, match=r"^train.micro_batch_size has to be at least 1\.$"):
        run("dir", "--train.micro_batch_size", 0)


def test_missing_and_surplus_words():
    assert "missing: checkpoint_dir. Usage: litgpt command CHECKPOINT_DIR" in refused()
    assert """unexpected argument 'b': options are written `--name value`. For a prompt: --prompt "b\"""" in refused(
        "a", "b"
    )
    assert "--prompt needs a value" in refused("dir", "--prompt")
    assert "--prompt needs a value" in refused("dir", "--prompt", "--multiline")


def test_two_positionals():
    def convert(checkpoint_dir: Path, output_dir: Path) -> tuple[Path, Path]:
        """Convert."""
        return checkpoint_dir, output_dir

    assert run("a", "b", function=convert) == (Path("a"), Path("b"))
    assert run("a", "--output_dir", "b", function=convert) == (Path("a"), Path("b"))


def test_whole_groups_as_text(tmp_path):
    assert run("dir", "--train", '{"max_steps": 3, "max_time": 1e1}').train == TrainArgs(3, 2, 10.0)
    long = ", ".join(['"max_steps": 3'] * 100)
    assert run("dir", "--train", "{" + long + "}").train.max_steps == 3
    (tmp_path / "train.yaml").write_text("max_steps: 4")
    assert run("dir", "--train", tmp_path / "train.yaml").train.max_steps == 4
    assert run("dir", "--log.metadata.team", "blue", "--log.metadata.n", "1").log.metadata == {"team": "blue", "n": "1"}


def test_settings_without_their_group():
    assert run("dir", "--max_steps", "5").train.max_steps == 5
    assert run("dir", "--n_layer", "5").model_config == {"n_layer": 5}
    assert run("dir", "--model_config.n_layer", "1e1").model_config == {"n_layer": 10}
    # A field of two groups belongs to the first.
    got = run("dir", "--tie_embeddings", "true")
    assert got.train.tie_embeddings is True
    assert got.model_config is None


def test_unknown_names_all_at_once():
    message = refused("dir", "--train.max_step", 1, "--outdir", "x", "--model_config.n_layr", 2, "--zzzzqq", 3)
    assert "--train.max_step: unknown setting. Did you mean '--train.max_steps'" in message
    assert "--outdir: unknown setting. Did you mean '--out_dir'" in message
    assert "--model_config.n_layr: unknown setting. Did you mean '--model_config.n_layer'" in message
    assert "--zzzzqq: unknown setting.\n" in message + "\n"
    assert "Did you mean '--train.micro_batch_size'" in refused("dir", "--micro_batchsize", 2)


# --- classes --------------------------------------------------------------------------------------------------------


def test_class_by_name_in_any_order():
    expected = Text(Path("texts"), seed=1)
    assert run("dir", "--data", "Text", "--data.path", "texts", "--data.seed", "1").data == expected
    assert run("dir", "--data.path", "texts", "--data.seed=1", "--data=Text").data == expected
    assert (
        run("dir", "--data.init_args.path", "texts", "--data.seed", "1e0", "--data.class_path", "Text").data == expected
    )
    assert run("dir", "--data", f"{__name__}.Text", "--data", '{"path": "texts", "seed": 1}').data == expected
    assert run("dir", "--data", "Text", "--data.path", "x", "--data.mask_prompt").data.mask_prompt is True
    assert run("dir", "--data", "null").data is None


def test_class_that_only_one_can_be():
    assert run("dir", "--data.rows", "3").data == Table(rows=3)
    assert "needs --data NAME as well, one of: Table, Text" in refused("dir", "--data.seed", "3")
    assert "Did you mean '--data.rows'" in refused("dir", "--data.row", "3")


def test_class_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "my_own_data.py").write_text(
        f"from {__name__} import Data\nclass Mine(Data):\n    def __init__(self, size: int = 3): self.size = size\n"
        "class Other: pass\n"
    )
    got = run("dir", "--data", "my_own_data.Mine", "--data.size", "4")
    assert got.data.size == 4
    assert got.settings["data"] == {"class_path": "my_own_data.Mine", "init_args": {"size": 4}}
    assert "'my_own_data.Other' is not a subclass of Data" in refused("dir", "--data", "my_own_data.Other")
    assert "Did you mean 'Mine'" in refused("dir", "--data", "my_own_data.Min")
    assert "no module 'my_owm_data'" in refused("dir", "--data", "my_owm_data.Mine")


def test_a_broken_module_of_ones_own_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_broken_data.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        run("dir", "--data", "my_broken_data.Mine")


def test_wrong_class_and_wrong_init_args():
    message = refused("dir", "--data", "Txt", "--optimizer.lrr", 1)
    assert "there is no Data 'Txt'. Did you mean 'Text'? Known: Table, Text" in message
    assert "--optimizer.lrr: AdamW has no such setting. Did you mean '--optimizer.lr'?" in message
    assert refused("dir", "--data", "Text") == "--data.path is missing."


def test_optimizer_spellings():
    default = {"lr": 0.0004, "betas": [0.9, 0.95]}
    assert run("dir", "--optimizer", "AdamW").optimizer == Spec("torch.optim.AdamW", default)
    assert run("dir", "--optimizer.lr", "0.005").optimizer == Spec("torch.optim.AdamW", {**default, "lr": 0.005})
    assert run("dir", "--optimizer.init_args.lr", "5e-3").optimizer.init_args["lr"] == 0.005
    # Another class starts from its own defaults.
    sgd = Spec("torch.optim.SGD", {"lr": 0.1})
    assert run("dir", "--optimizer", "SGD", "--optimizer.lr", "0.1").optimizer == sgd
    assert run("dir", "--optimizer.lr", "0.1", "--optimizer", "torch.optim.SGD").optimizer == sgd
    assert run("dir", "--optimizer.class_path", "torch.optim.SGD", "--optimizer.lr", "1e-1").optimizer == sgd
    text = '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}'
    assert run("dir", "--optimizer", text).optimizer == sgd
    assert "Did you mean 'AdamW'" in refused("dir", "--optimizer", "AdmW")


# --- help and settings ----------------------------------------------------------------------------------------------


def test_help_shows_texts_types_and_defaults(capsys):
    assert run("--help") is None
    text = capsys.readouterr().out
    assert text.startswith("usage: litgpt command checkpoint_dir [--option value ...]")
    for part in (
        "Do what a test wants.",
        "Where the weights are.",
        "Steps until the end",
        "(type: int, default: 2)",
        "one of Table, Text, or your own package.module.Class",
        "default: torch.optim.AdamW",
        "--config FILE_OR_URL",
    ):
        assert part in text, part
    for name in ("--train.micro_batch_size", "--model_config.FIELD", "--data.KEY", "--access_token"):
        assert name in text


def test_class_help(capsys):
    run("dir", "--data.help", "Text")
    text = capsys.readouterr().out
    assert "settings of tests.cli.test_cli.Text" in text
    assert "--data.path" in text
    assert "Where the text is" in text
    assert "default: 42" in text
    run("--data.help")
    assert capsys.readouterr().out.split("\n")[1:3] == ["Table", "Text"]
    run("--optimizer.help=SGD")
    text = capsys.readouterr().out
    assert "--optimizer.momentum" in text
    assert "params" not in text.split()


def test_print_config_can_be_read_back(capsys, tmp_path):
    words = [
        "--data.rows",
        "7",
        "--optimizer",
        "SGD",
        "--train.max_steps",
        "1e3",
        "--n_layer",
        "3",
        "--access_token",
        "s",
    ]
    assert run("dir", *words, "--print_config") is None
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["train"]["max_steps"] == 1000
    (tmp_path / "printed.yaml").write_text(text)
    again = vars(run("--config", tmp_path / "printed.yaml"))
    first = vars(run("dir", *words))
    assert again.pop("access_token") is None
    assert first.pop("access_token") == "s"
    assert again == first
    # It also helps who does not know the required settings yet.
    run("--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["checkpoint_dir"] is None


def test_saved_settings_work_as_config_and_hold_no_secret(tmp_path):
    def train(checkpoint_dir: Path, data: Data | None = None, access_token: str | None = None, lora_key: bool = False,
              log: LogArgs = LogArgs(), max_new_tokens: int | None = None) -> tuple:  # noqa: B008  # fmt: skip
        """Train."""
        cli.save_hyperparameters(tmp_path / "run")
        return checkpoint_dir, data, access_token, lora_key, log

    secrets = ["--access_token", "hf_secret", "--data.api_key", "sk_secret", "--log.metadata.wandb_key", "wb_secret"]
    words = ["dir", "--data", "Text", "--data.path", "p", "--lora_key", "true", "--log.metadata.team", "blue", *secrets]
    assert run(*words, function=train)[2] == "hf_secret"
    text = (tmp_path / "run/hyperparameters.yaml").read_text()
    assert "secret" not in text
    settings = yaml.safe_load(text)
    assert settings["lora_key"] is True
    assert settings["max_new_tokens"] is None
    again = run("--config", tmp_path / "run/hyperparameters.yaml", function=train)
    assert again == (Path("dir"), Text(Path("p")), None, True, LogArgs(metadata={"team": "blue"}))


def test_settings_exist_only_while_a_command_runs(tmp_path):
    assert run("dir").settings["train"]["micro_batch_size"] == 2
    assert cli.resolved_settings() is None
    cli.save_hyperparameters(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- options that several commands have in common --------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What both commands take."""

    speed: int = 3
    """Steps a second."""
    train: TrainArgs = field(default_factory=TrainArgs)
    """How long."""

    def __post_init__(self) -> None:
        if self.speed < 1:
            raise ValueError(f"--go_speed {self.speed}: too slow.")


def with_shared(
    place: Path, shared: Annotated[Shared, cli.Flat("go_")] = Shared(speed=5), last: str = "z"
) -> dict[str, object]:
    """Go.

    Args:
        place: Where to.
        go_speed: Steps a minute.
        last: The end.
    """
    return cli.spread(with_shared, locals())


def test_fields_of_a_flat_group_are_options(capsys):
    assert cli.run(with_shared, ["there"], "go") == {
        "place": Path("there"), "go_speed": 5, "go_train": TrainArgs(), "last": "z",
    }  # fmt: skip
    given = cli.run(with_shared, ["there", "--go_speed", "7", "--go_train.max_steps", "9"], "go")
    assert (given["go_speed"], given["go_train"].max_steps) == (7, 9)
    with pytest.raises(cli.UsageError, match=r"--go_sped: unknown setting\. Did you mean '--go_speed'"):
        cli.run(with_shared, ["there", "--go_sped", "7"], "go")
    with pytest.raises(ValueError, match="--go_speed 0: too slow"):
        cli.run(with_shared, ["there", "--go_speed", "0"], "go")
    cli.run(with_shared, ["--help"], "go")
    help_text = capsys.readouterr().out
    # What the command says of a field comes before what the group does.
    assert help_text.index("Where to.") < help_text.index("Steps a minute. (type: int, default: 5)")
    assert help_text.index("Steps a minute.") < help_text.index("The end.")


# --- the program ----------------------------------------------------------------------------------------------------


def test_overview(litgpt):
    for words in ((), ("--help",), ("-h",)):
        result = litgpt(*words)
        assert result.code == 0
        for name, row in COMMANDS.items():
            assert f"  {name} " in result.out
            assert row.help in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_help(command, litgpt):
    result = litgpt(command, "--help")
    assert result.code == 0, result.err
    module, function = COMMANDS[command].target.split(":")
    parameters = Signature(flattened(getattr(importlib.import_module(module), function))).parameters.values()
    assert parameters
    for parameter in parameters:
        if parameter.kind == "value":
            words = " ".join(result.out.split())
            entry = re.search(rf"--{parameter.name} ([A-Z_0-9]+|\{{.*?\}}) (.*?)\((required|type)", words)
            assert entry, f"--{parameter.name} is not in the help"
            assert entry[2], f"--{parameter.name} is without a word of help"


def test_version(litgpt):
    assert litgpt("--version") == (0, f"litgpt {package.__version__}\n", "")


def test_unknown_subcommand(litgpt):
    result = litgpt("pretrian")
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: unknown subcommand 'pretrian'. Did you mean 'pretrain'?")
    assert "Did you mean '--version'" in litgpt("--verson").err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(value: int = 1) -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(program, "COMMANDS", {"fail": Command(f"{__name__}:failing", "Fail")})
    monkeypatch.setattr(sys.modules[__name__], "failing", setup, raising=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("train.x 3 is odd: choose 2"), "train.x 3 is odd: choose 2"),
        (FileNotFoundError("No checkpoint in 'x'"), "No checkpoint in 'x'"),
        (PermissionError(13, "Permission denied", "out/x"), "Permission denied: 'out/x'"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ImportError("mlflow is missing: pip install mlflow"), "mlflow is missing: pip install mlflow"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "the Python package 'wandb' is not installed"),
        (MemoryError(), "out of memory"),
    ],
)
def test_users_errors_are_one_clean_block(error, message, litgpt, monkeypatch):
    raising(error, monkeypatch)
    result = litgpt("fail")
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith(f"error: {message}")
    assert "Traceback" not in result.err
    assert "Traceback" in litgpt("fail", "--debug").err
    assert "Traceback" in litgpt("--debug", "fail").err
    monkeypatch.setenv("LITGPT_DEBUG", "1")
    assert "Traceback" in litgpt("fail").err


@pytest.mark.parametrize(
    "error", [TypeError("f() takes 1"), AssertionError("B != 2"), ModuleNotFoundError("x", name="litgpt.nothing")]
)
def test_our_own_errors_show_where(error, litgpt, monkeypatch):
    raising(error, monkeypatch)
    result = litgpt("fail")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "This looks like a bug in litgpt" in result.err


def test_interrupt(litgpt, monkeypatch):
    raising(KeyboardInterrupt(), monkeypatch)
    assert litgpt("fail") == (130, "", "\nInterrupted.\n")


def test_usage_errors_exit_2(litgpt, monkeypatch):
    raising(ValueError(), monkeypatch)
    result = litgpt("fail", "--valu", "2")
    assert result.code == 2
    assert result.err == "error: --valu: unknown setting. Did you mean '--value'?\n"


def python(*words: str, **settings: Any) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, **settings)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["pretrian"], ["download", "list"], ["pretrain"]])
def test_quick_answers_import_nothing_heavy(words):
    code = (
        "import sys; from litgpt.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning_fabric', 'numpy', 'transformers', 'huggingface_hub', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = python("-c", code, *words)
    assert result.returncode == 0, result.stderr


def test_only_the_chosen_commands_module_is_imported():
    code = (
        "import sys; from litgpt.__main__ import main; main(['download', '--help']);"
        "others = [m for m in sys.modules if m.startswith('litgpt.commands.') and m != 'litgpt.commands.download'];"
        "sys.exit(f'imported {others}' if others or 'torch' in sys.modules else 0)"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes close differently there")
def test_a_closed_pipe_is_quiet():
    pipeline = f"{sys.executable} -m litgpt download list | head -1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {pipeline}"], capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1


def test_the_package_exports_lazily():
    code = "import sys, litgpt; assert 'torch' not in sys.modules; litgpt.Config; assert 'torch' not in sys.modules"
    assert python("-c", code).returncode == 0
    assert package.Config.__name__ == "Config"
    assert package.GPT.__name__ == "GPT"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_no_module_of_the_working_directory_takes_the_place_of_ours(tmp_path):
    """`python -m` looks there first; it may be a stranger's checkpoint."""
    for name in ("yaml", "csv", "typing", "huggingface_hub", "planted"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nclass Planted: pass\n")

    def python(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "litgpt", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert "EleutherAI/pythia" in python("download", "list").stdout
    assert not (tmp_path / "ran").exists()
    # What the user names is looked for there.
    assert (
        "'planted.Planted' is not a subclass of" in python("pretrain", "pythia-14m", "--data", "planted.Planted").stderr
    )
