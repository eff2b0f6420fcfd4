"""`--config`: files, addresses, stacking, flat keys, the recipes of the manual and of earlier versions."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from litgpt import cli
from litgpt.cli import config_files, resources
from tests.cli.test_cli import Spec, Table, Text, TrainArgs, run


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(*argv: object) -> str:
    with pytest.raises(ValueError) as caught:
        run(*argv)
    return str(caught.value)


def test_files_stack_and_options_win_wherever_they_stand(tmp_path):
    first = write(tmp_path / "1.yaml", "checkpoint_dir: dir\nprompt: one\ntrain: {max_steps: 1, max_time: 1}\n")
    second = write(tmp_path / "2.yaml", "prompt: two\ntrain:\n  max_steps: 2\n")
    got = run("--config", first, "--config", second)
    assert (got.prompt, got.train.max_steps, got.train.max_time) == ("two", 2, 1.0)
    got = run("--config", second, f"--config={first}")
    assert (got.prompt, got.train.max_steps) == ("one", 1)
    got = run("--prompt", "three", "--config", first, "--train.max_steps=3", "--config", second)
    assert (got.prompt, got.train.max_steps, got.train.max_time) == ("three", 3, 1.0)
    assert run("other", "--config", first).checkpoint_dir == Path("other")


def test_values_as_yaml_writes_them(tmp_path):
    file = write(
        tmp_path / "c.yaml",
        "checkpoint_dir: dir\nprompt: 5\ntrain:\n  max_steps: 1e6\n  micro_batch_size: 8.0\n  max_time: 6e-5\n"
        "log:\n  run: null\n  metadata: {a: {b: 1}}\nresume: false\ndevices: 2\neval_: null\n".replace(
            "eval_: null\n", ""
        ),
    )
    got = run("--config", file)
    assert got.prompt == "5"
    assert got.train == TrainArgs(1_000_000, 8, 6e-5)
    assert got.log.metadata == {"a": {"b": 1}}
    assert got.resume is False
    assert got.devices == 2


def test_null_groups_and_empty_files_change_nothing(tmp_path):
    file = write(tmp_path / "c.yaml", "train: null\nlog:\ndata: null\nmodel_config: null\n")
    empty = write(tmp_path / "empty.yaml", "# nothing\n")
    assert run("dir", "--config", file, "--config", empty).train == TrainArgs(micro_batch_size=2)


def test_flat_keys_go_where_they_belong(tmp_path):
    file = write(
        tmp_path / "c.yaml",
        "n_layer: 12\nblock_size: 2048\nparallel_residual: true\nmax_steps: 7\nlearning_rate: 5e-5\nlora_key: true\n",
    )
    got = run("dir", "--config", file)
    assert got.model_config == {"n_layer": 12, "block_size": 2048, "parallel_residual": True}
    assert got.train == TrainArgs(7, 2, learning_rate=5e-5)
    assert got.lora_key is True


def test_flat_and_nested_keys_mix_over_layers(tmp_path):
    file = write(tmp_path / "c.yaml", "max_steps: 7\ntrain:\n  max_time: 1\nmodel_config: {n_embd: 8}\nn_layer: 2\n")
    got = run("dir", "--config", file, "--train.max_steps", 8, "--n_layer", 3)
    assert (got.train.max_steps, got.train.max_time) == (8, 1.0)
    assert got.model_config == {"n_embd": 8, "n_layer": 3}


def test_unknown_keys_at_every_depth_at_once(tmp_path):
    file = write(
        tmp_path / "c.yaml",
        "promt: x\ntrain:\n  micro_batchsize: 2\nmodel_config:\n  n_layers: 2\n"
        "data:\n  class_path: Table\n  init_args: {row: 1}\noptimizer:\n  lrr: 1\n",
    )
    message = refused("dir", "--config", file)
    for name, hint in (
        ("promt", "'prompt'"),
        ("train.micro_batchsize", "'micro_batch_size'"),
        ("model_config.n_layers", "'n_layer'"),
        ("--data.row", "'--data.rows'"),
        ("--optimizer.lrr", "'--optimizer.lr'"),
    ):
        line = next(line for line in message.splitlines() if f"{name}:" in line)
        assert f"Did you mean {hint}" in line
    assert "c.yaml: promt: unknown setting" in message


def test_a_group_that_is_no_mapping(tmp_path):
    file = write(tmp_path / "c.yaml", "train: [1, 2]\n")
    assert "train: needs settings as `name: value`, got [1, 2]" in refused("dir", "--config", file)


@pytest.mark.parametrize(
    "text",
    [
        "data: Table\n",
        "data: {class_path: Table, init_args: {rows: 1}}\n",
        "data:\n  class_path: tests.cli.test_cli.Table\n  rows: 1\n",
        "data: {rows: 1}\n",
    ],
)
def test_data_in_yaml(text, tmp_path):
    got = run("dir", "--config", write(tmp_path / "c.yaml", text))
    assert got.data == Table()
    assert got.settings["data"] == {"class_path": "tests.cli.test_cli.Table", "init_args": {"rows": 1, "seed": 0}}


def test_options_over_data_in_yaml(tmp_path):
    file = write(tmp_path / "c.yaml", "data: {class_path: Text, init_args: {path: a, seed: 3}}\n")
    assert run("dir", "--config", file, "--data.path", "b").data == Text(Path("b"), seed=3)
    assert run("dir", "--config", file, "--data", "Text", "--data.path", "b").data == Text(Path("b"), seed=3)
    # Another class does not inherit what was said about the first.
    assert run("dir", "--config", file, "--data", "Table").data == Table()


def test_an_unknown_class_may_be_replaced(tmp_path):
    file = write(tmp_path / "c.yaml", "data: {class_path: Unheard, init_args: {x: 1}}\n")
    assert run("dir", "--config", file, "--data", "Table").data == Table()
    assert "there is no Data 'Unheard'" in refused("dir", "--config", file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer: SGD\n", Spec("torch.optim.SGD", {})),
        ("optimizer: {lr: 4e-4}\n", Spec("torch.optim.AdamW", {"lr": 4e-4, "betas": [0.9, 0.95]})),
        ("optimizer: {class_path: SGD, lr: 0.1}\n", Spec("torch.optim.SGD", {"lr": 0.1})),
        (
            "optimizer:\n  class_path: torch.optim.AdamW\n  init_args:\n    lr: 6e-4\n    betas:\n    - 0.8\n    - 0.9\n",
            Spec("torch.optim.AdamW", {"lr": 6e-4, "betas": [0.8, 0.9]}),
        ),
    ],
)
def test_optimizer_in_yaml(text, expected, tmp_path):
    got = run("dir", "--config", write(tmp_path / "c.yaml", text)).optimizer
    assert got == expected
    assert isinstance(got.init_args.get("lr", 1.0), float)


def test_files_that_cannot_be_read(tmp_path):
    assert "is not valid YAML in line 2: " in refused("dir", "--config", write(tmp_path / "1.yaml", "a: [1\nb: 2"))
    assert "does not hold settings" in refused("dir", "--config", write(tmp_path / "2.yaml", "- a\n- b\n"))
    assert "is a directory" in refused("dir", "--config", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no file 'nowhere.yaml'"):
        run("dir", "--config", "nowhere.yaml")


# --- addresses ------------------------------------------------------------------------------------------------------


@contextmanager
def web(pages: dict[str, bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_addresses():
    pages = {"/a.yaml": b"prompt: fetched\n", "/page": b"<html>a: b</html>", "/binary": b"\xff\xfe\xff"}
    with web(pages) as url:
        assert run("dir", "--config", f"{url}/a.yaml", "--max_steps", 1).prompt == "fetched"
        assert "the server answers 404" in refused("dir", "--config", f"{url}/b.yaml")
        assert "give the address of the raw file" in refused("dir", "--config", f"{url}/page")
        assert "is not a text file" in refused("dir", "--config", f"{url}/binary")
    message = refused("dir", "--config", f"{url}/a.yaml")
    assert "cannot be fetched" in message
    assert "config_hub" in message


PLANTED = "open('ran', 'w').close()\nclass Planted: pass\n"


@pytest.mark.parametrize(
    ("page", "option"),
    [
        ("data: planted.Planted", "data"),
        ("data: {class_path: planted.Planted, init_args: {rows: 1}}", "data"),
        ("data: '{class_path: \"planted.\\x50lanted\"}'", "data"),  # YAML in a text of YAML
        ("data.class_path: planted.Planted", "data"),
        ("optimizer: planted.Planted", "optimizer"),
        ("optimizer: {init_args: {lr: planted.Planted}}", "optimizer.init_args.lr"),
        ("optimizer: {init_args: {lr: {class_path: planted.Planted}}}", "optimizer.init_args.lr"),
        ("prompt: planted.Planted", "prompt"),  # whatever it is an option of
        ("data: {class_path: folder.module.Planted}", "data"),
        ("data: not_here.Planted\nlog: {metadata: {class_path: not_here.Planted}}", "log.metadata"),
    ],
)
def test_an_address_names_no_code(page, option, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/module.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    with web({"/a.yaml": page.encode()}) as url:
        message = refused("dir", "--config", f"{url}/a.yaml")
    assert "is code, and settings from a web address name none" in message
    assert f"name it on the command line, too: --{option} " in message
    assert not (tmp_path / "ran").exists()


def test_what_the_user_names_too_may_come_from_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, table = ("tests.cli.test_cli.Text", "tests.cli.test_cli.Table")
    pages = {
        "/a.yaml": f"data: {{class_path: {text}, init_args: {{path: fetched, seed: 7}}}}\n".encode(),
        "/short.yaml": b"data: {class_path: Table, init_args: {rows: 5}}\nprompt: data.json\n",
        "/ours.yaml": b"optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}\n",
    }
    own = write(tmp_path / "own.yaml", f"data: {text}\n")
    with web(pages) as url:
        assert run("dir", "--config", f"{url}/a.yaml", "--data", text).data == Text(Path("fetched"), seed=7)
        assert run("dir", "--config", f"{url}/a.yaml", "--config", own).data == Text(Path("fetched"), seed=7)
        assert "is code" in refused("dir", "--config", f"{url}/a.yaml", "--data", table)
        got = run("dir", "--config", f"{url}/short.yaml")  # one of the option's own, and a file that is no module
        assert (got.data, got.prompt) == (Table(5), "data.json")
        assert run("dir", "--config", f"{url}/ours.yaml").optimizer == Spec("torch.optim.SGD", {"lr": 0.5})


def test_an_address_reads_no_files_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "local.yaml", "{micro_batch_size: 3}\n")
    with web({"/a.yaml": b"train: local.yaml\n"}) as url:
        assert "train: needs settings as `name: value`" in refused("dir", "--config", f"{url}/a.yaml")
    assert run("dir", "--train", "local.yaml").train.micro_batch_size == 3


@contextmanager
def leading_to(location: str, body: bytes = b"") -> Iterator[str]:
    """A server that sends on to another address; or, without one, a byte at a time until the test is over."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if location else 200)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(body)
            while not location and not over.wait(0.02):
                self.wfile.write(b"#")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/a.yaml"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("place", ["ftp://127.0.0.1:9/a.yaml", "file:///etc/hostname", "data:text/plain,prompt:x"])
def test_an_address_leads_to_no_other_kind_of_place(place):
    with leading_to(place) as url:
        message = refused("dir", "--config", url)
    assert f"{place}, which is not followed" in message or f"'{place}' is not allowed" in message


def test_an_address_may_lead_to_another():
    with web({"/b.yaml": b"prompt: fetched"}) as url, leading_to(f"{url}/b.yaml") as first:
        assert run("dir", "--config", first).prompt == "fetched"


def test_a_bomb_within_a_text_from_an_address():
    levels = ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    with web({"/a.yaml": f"prompt: '[&a0 [x], {levels}]'\n".encode()}) as url:
        assert refused("dir", "--config", f"{url}/a.yaml").startswith(
            "prompt: this text is nested or repeated too much"
        )


def test_a_server_that_goes_on_for_ever(monkeypatch, capsys):
    monkeypatch.setattr(config_files, "TOTAL_TIMEOUT", 0.5)
    monkeypatch.setattr(config_files, "PATIENCE", 0.1)
    with leading_to("") as url:
        assert "has not arrived after 0.5 seconds" in refused("dir", "--config", url)
    assert f"Waiting for --config {url}" in capsys.readouterr().err
    with leading_to("", b"# \n" * 100_000) as url:
        assert "is larger than 256 KB" in refused("dir", "--config", url)


def test_a_file_that_stands_for_a_billion_settings(tmp_path):
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    bomb = write(tmp_path / "bomb.yaml", f"a0: &a0 [x]\n{levels}")
    assert "nested or repeated too much" in refused("dir", "--config", bomb)
    assert "nested or repeated too much" in refused("dir", "--config", write(tmp_path / "deep.yaml", "[" * 9000))
    merged = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 20)}]}}\n" for n in range(1, 9))
    bomb = write(tmp_path / "merged.yaml", f"a0: &a0 {{x: 1}}\n{merged}")
    assert "nested or repeated too much" in refused("dir", "--config", bomb)


# --- packaged recipes -----------------------------------------------------------------------------------------------


def test_packaged_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = resources.config_hub() / "pretrain/quickstart.yaml"
    assert resources.find("config_hub/pretrain/quickstart.yaml").samefile(packaged)
    assert resources.find("pretrain/quickstart.yaml").samefile(packaged)
    # A file of one's own comes first.
    own = tmp_path / "config_hub/pretrain/quickstart.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert resources.find("config_hub/pretrain/quickstart.yaml").samefile(own)


def test_recipes_in_a_wheel(tmp_path, monkeypatch):
    (tmp_path / "litgpt/config_hub/pretrain").mkdir(parents=True)
    recipe = write(tmp_path / "litgpt/config_hub/pretrain/only_there.yaml", "{}")
    monkeypatch.setattr(resources, "_PLACES", (tmp_path / "litgpt/config_hub", tmp_path / "config_hub"))
    assert resources.find("config_hub/pretrain/only_there.yaml") == recipe


def test_missing_recipes_get_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'config_hub/pretrain/quickstart.yaml'"):
        resources.find("config/quickstart.yaml")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'config_hub/pretrain/quickstart.yaml'"):
        resources.find("config_hub/pretrain/quickstrat.yaml")
    for place in ("../litgpt/cli/run.py", "config_hub/../litgpt/hub.py", "/nowhere/x.yaml"):
        with pytest.raises(FileNotFoundError):
            resources.find(place)


# --- real commands --------------------------------------------------------------------------------------------------


def pretrain_settings(*argv: object) -> dict:
    """What `litgpt pretrain` makes of a command line, without running it."""
    from litgpt.cli.flat import flattened
    from litgpt.cli.resolve import resolve
    from litgpt.cli.run_command import gather
    from litgpt.cli.signature import Signature
    from litgpt.cli.words import split
    from litgpt.commands.pretrain import setup

    signature = Signature(flattened(setup))
    return resolve(gather(split([str(word) for word in argv], signature), signature), signature)[0]


def test_every_packaged_pretraining_recipe_parses():
    recipes = sorted((resources.config_hub() / "pretrain").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        values = pretrain_settings("--config", recipe)
        assert values["model_name"], recipe


RECIPE_0_5_13 = """\
model_name: stories15M
model_config:
  name: stories15M
  hf_config: {}
  scale_embeddings: false
  block_size: 256
  padded_vocab_size: 32000
  n_layer: 6
  n_head: 6
  n_query_groups: 6
  n_embd: 288
  head_size: 48
  rotary_percentage: 1.0
  parallel_residual: false
  bias: false
  norm_class_name: RMSNorm
  mlp_class_name: LLaMAMLP
  intermediate_size: 768
out_dir: out/pretrain/stories15M
precision: bf16-mixed
initial_checkpoint_dir: null
resume: false
data:
  class_path: litgpt.data.TextFiles
  init_args: {train_data_path: texts, num_workers: 8}
train:
  save_interval: 1000
  log_interval: 1
  global_batch_size: 512
  micro_batch_size: 128
  lr_warmup_steps: 1000
  lr_warmup_fraction: null
  epochs: null
  max_tokens: 9700000000
  max_steps: null
  max_time: null
  max_seq_length: 256
  tie_embeddings: true
  max_norm: 1.0
  min_lr: 6e-5
eval: {interval: 2000, max_new_tokens: null, max_iters: 100, initial_validation: false, final_validation: false,
  evaluate_example: first}
log: {project: null, run: null, group: null, teamspace: null, metadata: null, log_model: false, save_logs: true,
  checkpoint_name: null}
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 4e-4
    weight_decay: 0.1
    betas:
    - 0.9
    - 0.95
devices: auto
num_nodes: 1
tokenizer_dir: checkpoints/meta-llama/Llama-2-7b-hf
logger_name: csv
seed: 42
"""


def test_a_recipe_of_litgpt_0_5_13(tmp_path):
    values = pretrain_settings("--config", write(tmp_path / "recipe.yaml", RECIPE_0_5_13), "--train.max_steps", 5)
    assert values["model_config"]["intermediate_size"] == 768
    assert values["train"].min_lr == 6e-5
    assert values["train"].max_steps == 5
    assert values["optimizer"].init_args == {"lr": 4e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert values["data"].num_workers == 8
    assert values["log"].save_logs is True
    assert values["tokenizer_dir"] == Path("checkpoints/meta-llama/Llama-2-7b-hf")


def test_recipes_with_flat_model_and_training_keys(tmp_path):
    model = write(
        tmp_path / "pythia-160m.yaml",
        "model_name: pythia-160m\nblock_size: 2048\nvocab_size: 50304\nn_layer: 12\nn_head: 12\nn_embd: 768\n"
        "rotary_percentage: 0.25\nparallel_residual: true\nbias: true\n",
    )
    training = write(
        tmp_path / "train.yaml",
        "global_batch_size: 8\nmicro_batch_size: 2\nlr_warmup_steps: 10\nepochs: 3\nmax_seq_length: 512\n"
        "learning_rate: 5e-5\nmin_lr: 6.0e-5\n",
    )
    values = pretrain_settings("--config", model, "--config", training, "--train.max_tokens", "10_000_000_000")
    assert values["model_name"] == "pythia-160m"
    assert values["model_config"] == {
        "block_size": 2048, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768,
        "rotary_percentage": 0.25, "parallel_residual": True, "bias": True,
    }  # fmt: skip
    train = values["train"]
    assert (train.global_batch_size, train.epochs, train.learning_rate, train.max_tokens) == (8, 3, 5e-5, 10**10)


def test_command_lines_of_the_manual(tmp_path, monkeypatch):
    values = pretrain_settings(
        "pythia-14m", "--tokenizer_dir", "EleutherAI/pythia-14m", "--data", "TextFiles",
        "--data.train_data_path", "custom_pretraining_data", "--train.lr_warmup_steps=200", "--optimizer.lr", "0.005",
        "--train.logger_name", "tensorboard", "--resume", "auto", "--out_dir", "./new", "--train.max_tokens", "1_000_000",
    )  # fmt: skip
    assert values["optimizer"].class_path == "torch.optim.AdamW"
    assert values["optimizer"].init_args["lr"] == 0.005
    assert values["train"].lr_warmup_steps == 200
    assert values["resume"] == "auto"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/pretrain").mkdir(parents=True)
    (tmp_path / "data/pretrain/book.txt").touch()  # what lies there decides what reads it
    values = pretrain_settings("pythia-14m", "--data.data_dir", "data/pretrain", "--devices", 8, "--num_nodes", 8)
    assert values["data"].train_data_path == Path("data/pretrain")
    assert values["devices"] == 8


def test_printed_settings_of_pretrain_are_a_config(litgpt, tmp_path):
    words = [
        "pythia-14m",
        "--data.train_data_path",
        "texts",
        "--optimizer",
        "SGD",
        "--n_layer",
        2,
        "--max_steps",
        "1e3",
    ]
    result = litgpt("pretrain", *words, "--print_config")
    assert result.code == 0, result.err
    printed = write(tmp_path / "printed.yaml", result.out)
    assert yaml.safe_load(result.out)["data"]["class_path"] == "litgpt.data.TextFiles"
    assert litgpt("pretrain", "--config", printed, "--print_config").out == result.out


@pytest.mark.parametrize("command", ["pretrain", "generate", "chat", "download"])
def test_help_of_the_real_commands(command, litgpt):
    result = litgpt(command, "--help")
    assert result.code == 0, result.err
    assert result.out.startswith(f"usage: litgpt {command} ")
    unexplained = [line for line in result.out.splitlines() if line.startswith("  --") and line.rstrip().endswith("(")]
    assert unexplained == []


def test_data_help_of_pretrain(litgpt):
    assert "--data.train_data_path" in litgpt("pretrain", "--data.help", "TextFiles").out
    result = litgpt("pretrain", "--data.help", "TextFile")
    assert result.code == 2
    assert "Did you mean 'TextFiles'" in result.err


def test_usage_error_type():
    assert issubclass(cli.UsageError, ValueError)
