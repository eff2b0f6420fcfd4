"""`litgpt download` against a server on loopback, the commands that download by themselves, and the listings."""

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, save

from litgpt.catalog import find_known, known_checkpoints
from litgpt.config import Config
from litgpt.export import lit
from litgpt.sources.source import Source
from tests import shapes, tokenizer_files
from tests.hub_server import Hub, commit_of, serve_hub

PATIENCE = 300  # seconds that a busy machine is given
LLAMA = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "n_query_groups": 1, "vocab_size": 700, "padded_vocab_size": 704,
    **shapes.LLAMA,
    "intermediate_size": 64, "block_size": 512,
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub for this process, an empty cache, and an empty working directory; the client reads all of it once."""
    with serve_hub(Hub()) as hub:
        constants = "huggingface_hub.constants"
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("litgpt.hub.transfer.WAITS", (0, 0))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield hub


@pytest.fixture(scope="session")
def llama_files(tmp_path_factory) -> tuple[dict[str, bytes], Config, dict[str, torch.Tensor]]:
    """A Hugging Face repository's files, with its configuration and weights in our terms."""
    from litgpt.checkpoint import save_model
    from litgpt.export.hf_writer import export_hf
    from litgpt.model import GPT
    from litgpt.sources.checkpoint import open_checkpoint

    config = Config(name="tiny", **LLAMA)
    torch.manual_seed(1)
    model = GPT(config)
    model.init_weights()
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    tokenizer_files.byte_level(ours, {"chat_template": tokenizer_files.CHATML, "eos_token": "<|im_end|>"})
    save_model(ours, model, config)
    export_hf(open_checkpoint(ours), theirs)
    files = {file.name: file.read_bytes() for file in theirs.iterdir()}
    return {**files, "README.md": b"hello", "original/consolidated.00.pth": b"x"}, config, model.state_dict()


def in_a_process(hub: Hub, directory: Path, *words: str, code: str = "", **environment: str) -> subprocess.Popen:
    """`litgpt download`, or some code, in a process of its own."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(directory / "home"), **environment}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), env.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "litgpt", "download", *words]
    return subprocess.Popen(command, cwd=directory, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def present(directory: str | Path) -> set[str]:
    return {path.name for path in Path(directory).iterdir()}


def test_download_and_convert(litgpt, hub, llama_files):
    files, config, weights = llama_files
    hub.repositories["org/tiny"] = files
    result = litgpt("download", "org/tiny", "--dtype", "bfloat16")
    assert (result.code, result.err) == (0, "")
    assert "Converting checkpoint files to LitGPT format." in result.out
    assert "Saving converted checkpoint to checkpoints/org/tiny" in result.out
    directory = Path("checkpoints/org/tiny")
    assert {"lit_model.pth", "model_config.yaml", "config.json", "model.safetensors", "tokenizer.json"} <= present(
        directory
    )
    assert not {"README.md", "original"} & present(directory)
    assert present("checkpoints/org") == {"tiny"}
    converted = torch.load(directory / "lit_model.pth", weights_only=True)
    assert converted.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(converted[name], tensor.bfloat16()), name
    assert yaml.safe_load((directory / "model_config.yaml").read_text())["n_embd"] == config.n_embd


def test_an_unlisted_repository_downloads_and_generates(litgpt, hub, llama_files):
    """What a user types first: the id of a repository that is in no list."""
    hub.repositories["some-org/unlisted-llama"] = llama_files[0]
    hub.tokens["some-org/unlisted-llama"] = "hf_right"
    options = ("--prompt", "Hello", "--top_k", 1, "--max_new_tokens", 8, "--access_token", "hf_right")
    first = litgpt("generate", "some-org/unlisted-llama", *options)
    assert first.code == 0, first.err
    assert "Downloading some-org/unlisted-llama" in first.err
    assert "hf_right" not in first.err + first.out
    hub.requests.clear()
    second = litgpt("generate", "some-org/unlisted-llama", *options)
    assert (second.code, second.out) == (0, first.out)
    assert hub.requests == []
    # What `litgpt download` makes of it answers the same.
    assert litgpt("download", "some-org/unlisted-llama", *options[-2:], "--checkpoint_dir", "other").code == 0
    assert litgpt("generate", "other/some-org/unlisted-llama", *options).out == first.out


def test_pretraining_takes_an_access_token(litgpt, hub, llama_files):
    """For the model to start from and for a tokenizer, downloaded before anything else is done."""
    gated = ("org/gated-model", "org/gated-tokenizer")
    for name in gated:
        hub.repositories[name] = llama_files[0]
        hub.tokens[name] = "hf_right"
    words = ("pretrain", "some-model", "--initial_checkpoint_dir", gated[0], "--tokenizer_dir", gated[1])
    words += ("--dry_run", "true", "--devices", 1)
    refused = litgpt(*words)
    assert refused.code == 1
    assert "pass a token of that account as --access_token" in refused.err
    allowed = litgpt(*words, "--access_token", "hf_right")
    assert allowed.code == 0, allowed.err
    assert "--dry_run: nothing was trained." in allowed.out
    assert "hf_right" not in allowed.err + allowed.out
    assert "model.safetensors" in present("checkpoints/org/gated-model")
    assert "model.safetensors" not in present("checkpoints/org/gated-tokenizer")


def test_without_conversion_into_another_directory(litgpt, hub, llama_files):
    hub.repositories["org/tiny"] = llama_files[0]
    result = litgpt("download", "org/tiny", "--convert_checkpoint", "false", "--checkpoint_dir", "elsewhere")
    assert (result.code, result.out) == (0, "Saved the checkpoint to elsewhere/org/tiny\n")
    assert "lit_model.pth" not in present("elsewhere/org/tiny")
    assert not Path("checkpoints").exists()
    assert litgpt("generate", "elsewhere/org/tiny", "--prompt", "Hello", "--max_new_tokens", 3).code == 0


def test_weights_never_hide_behind_others_that_were_converted(litgpt, hub, llama_files):
    hub.repositories["org/tiny"] = llama_files[0]
    assert litgpt("download", "org/tiny").code == 0
    hub.revisions["org/tiny", "v2"] = {**llama_files[0], "model.safetensors": b"other"}
    result = litgpt("download", "org/tiny", "--convert_checkpoint", "false", "--revision", "v2")
    assert result.code == 1
    assert "lit_model.pth' exists, and every command would load it instead" in result.err
    assert hub.fetched().count("model.safetensors") == 1


def test_keep_hf_files_false_leaves_the_weights_once(litgpt, hub, llama_files):
    files, _, weights = llama_files
    shards = {"model-00001-of-00002.safetensors": files["model.safetensors"]}
    index = {"weight_map": dict.fromkeys(("a", "b"), "model-00001-of-00002.safetensors")}
    hub.repositories["org/tiny"] = {name: content for name, content in files.items() if name != "model.safetensors"}
    hub.repositories["org/tiny"] |= {**shards, "model.safetensors.index.json": json.dumps(index).encode()}
    result = litgpt("download", "org/tiny", "--keep_hf_files", "false")
    assert result.code == 0, result.err
    assert "Removed the downloaded weights" in result.out
    left = present("checkpoints/org/tiny")
    assert {"lit_model.pth", "model_config.yaml", "config.json", "tokenizer.json"} <= left
    assert not {*shards, "model.safetensors.index.json"} & left
    converted = torch.load("checkpoints/org/tiny/lit_model.pth", weights_only=True)
    assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())
    assert litgpt("generate", "org/tiny", "--prompt", "Hello", "--max_new_tokens", 3).code == 0


@pytest.mark.parametrize("moment", ["save_model", "same_values", "unlink"])
def test_keep_hf_files_false_can_be_interrupted_anywhere(litgpt, hub, llama_files, monkeypatch, moment):
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    def interrupt_the_second(path: Path, **options: object) -> None:
        removed.append(path)
        interrupt() if len(removed) > 1 else unlink(path)

    files, removed, unlink = dict(llama_files[0]), [], Path.unlink
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    files["model-00001-of-00001.safetensors"] = files.pop("model.safetensors")
    hub.repositories["org/tiny"] = {**files, "model.safetensors.index.json": json.dumps(index).encode()}
    assert litgpt("download", "org/tiny", "--convert_checkpoint", "false").code == 0
    with monkeypatch.context() as patch:
        if moment == "unlink":
            patch.setattr("pathlib.Path.unlink", interrupt_the_second)
        elif moment == "same_values":
            patch.setattr("litgpt.sources.fit.same_values", interrupt)
        else:
            patch.setattr("litgpt.export.lit.save_model", interrupt)
        assert litgpt("download", "org/tiny", "--keep_hf_files", "false").code == 130
    answer = litgpt("generate", "checkpoints/org/tiny", "--prompt", "Hello", "--max_new_tokens", 3)
    assert answer.code == 0, answer.err
    assert litgpt("download", "org/tiny", "--keep_hf_files", "false").code == 0
    assert not list(Path("checkpoints/org/tiny").glob("*.safetensors*"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_keep_hf_files_false_compares_first(litgpt, hub, llama_files, monkeypatch, dtype):
    def convert_wrongly(source: Source, directory: Path, *arguments: object, **options: object) -> None:
        save_lit(source, directory, *arguments, **options)
        weights = torch.load(directory / "lit_model.pth", weights_only=True)
        weights["transformer.h.1.mlp.proj.weight"][3, 5] += 1
        torch.save(weights, directory / "lit_model.pth")

    save_lit = lit.save_lit
    hub.repositories["org/tiny"] = llama_files[0]
    monkeypatch.setattr(lit, "save_lit", convert_wrongly)
    options = ("--dtype", dtype) if dtype else ()
    result = litgpt("download", "org/tiny", "--keep_hf_files", "false", *options)
    assert result.code == 1
    assert "lit_model.pth' differs from the downloaded weights (transformer.h.1.mlp.proj.weight)" in result.err
    assert "model.safetensors" in present("checkpoints/org/tiny")


def test_short_names_resolve(litgpt, hub):
    hub.repositories["EleutherAI/pythia-14m"] = {"tokenizer.json": b"{}", "model.safetensors": b"weights"}
    result = litgpt("download", "Pythia-14M", "--tokenizer_only", "true")
    assert result.code == 0, result.err
    assert present("checkpoints/EleutherAI/pythia-14m") == {"tokenizer.json"}
    assert hub.fetched() == ["tokenizer.json"]


def test_what_is_not_supported_is_said_before_any_weight_comes(litgpt, hub, llama_files):
    files = llama_files[0]
    other = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "state_size": 16,
        "auto_map": {"x": "evil.py"},
    }
    hub.repositories["org/other"] = {**files, "config.json": json.dumps(other).encode(), "evil.py": b"raise SystemExit"}
    result = litgpt("download", "org/other")
    assert result.code == 1
    assert result.err.startswith(
        "error: org/other is not downloaded: The architecture of this checkpoint (MambaForCausalLM)"
    )
    assert "--tokenizer_only true" in result.err
    assert result.err.count("\n") == 1
    assert hub.fetched() == ["config.json"]
    assert not Path("checkpoints").exists()
    assert litgpt("generate", "org/other", "--prompt", "x").err.endswith(result.err.removeprefix("error: "))
    assert litgpt("download", "org/other", "--tokenizer_only", "true").code == 0
    assert not {"evil.py", "model.safetensors"} & present("checkpoints/org/other")


def test_a_feature_that_is_not_supported_is_named(litgpt, hub, llama_files):
    config = {**json.loads(llama_files[0]["config.json"]), "hidden_act": "xielu"}
    hub.repositories["org/other"] = {**llama_files[0], "config.json": json.dumps(config).encode()}
    result = litgpt("download", "org/other")
    assert result.code == 1
    assert "org/other is not downloaded: config.json (LlamaForCausalLM) cannot be used" in result.err
    assert "hidden_act" in result.err
    assert hub.fetched() == ["config.json"]


@pytest.fixture
def known_tiny(monkeypatch):
    """A known checkpoint as small as ours."""
    from dataclasses import replace

    known = dict(known_checkpoints())
    template = find_known("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    config = {"name": "tiny", "hf_config": {"org": "known-org", "name": "tiny"}, **LLAMA}
    known["known-org/tiny"] = replace(template, repo_id="known-org/tiny", name="tiny", config=config)
    monkeypatch.setattr("litgpt.catalog.known_checkpoints", lambda: known)


@pytest.mark.parametrize(
    ("repo_id", "config", "options"),
    [
        ("known-org/tiny", None, []),
        ("org/copy", None, ["--model_name", "tiny"]),
        ("org/copy", {"architectures": ["TheirOwnClass"], "model_type": "own"}, ["--model_name", "tiny"]),
    ],
)
def test_a_known_models_figures_stand_in_for_config_json(
    litgpt, hub, llama_files, known_tiny, repo_id, config, options
):
    files, _, weights = llama_files
    hub.repositories[repo_id] = {name: content for name, content in files.items() if name != "config.json"}
    if config:
        hub.repositories[repo_id]["config.json"] = json.dumps(config).encode()
    result = litgpt("download", repo_id, *options)
    assert result.code == 0, result.err
    assert "The figures of tiny are used in place of config.json." in result.err
    converted = torch.load(f"checkpoints/{repo_id}/lit_model.pth", weights_only=True)
    assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())
    # Not converted, the files load as well.
    options += ["--convert_checkpoint", "false", "--checkpoint_dir", "other"]
    assert litgpt("download", repo_id, *options).code == 0
    answer = litgpt("generate", f"other/{repo_id}", "--prompt", "Hello", "--max_new_tokens", 3)
    assert answer.code == 0, answer.err


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def stale(files, method=GPTQ):
    content = json.loads(files["config.json"]) | {"quantization_config": method}
    return {**files, "config.json": json.dumps(content).encode()}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stale_quantization_config_over_plain_weights_is_downloaded(litgpt, hub, llama_files, sharded):
    """As from a directory: the headers of the weights show that they are plain, before any is fetched."""
    files, _, weights = llama_files
    hub.repositories["org/stale"] = stale(files)
    if sharded:
        del hub.repositories["org/stale"]["model.safetensors"]
        tensors = load(files["model.safetensors"])
        places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
        for shard in set(places.values()):
            part = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
            hub.repositories["org/stale"][shard] = save(part)
        index = json.dumps({"weight_map": places}).encode()
        hub.repositories["org/stale"]["model.safetensors.index.json"] = index
    result = litgpt("download", "org/stale")
    assert result.code == 0, result.err
    assert "The quantization_config in config.json (quant_method: gptq) is ignored: the weights are plain" in result.err
    converted = torch.load("checkpoints/org/stale/lit_model.pth", weights_only=True)
    assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())


def test_weights_that_are_quantised_are_refused_before_they_are_fetched(litgpt, hub, llama_files):
    files = llama_files[0]
    tensors = load(files["model.safetensors"])
    name = next(iter(tensors))
    quantised = save({**tensors, name.replace(".weight", ".qweight"): torch.zeros(8, 8, dtype=torch.int32)})
    as_pickle = {key: value for key, value in files.items() if not key.endswith(".safetensors")}
    for number, repository in enumerate(
        (
            stale({**files, "model.safetensors": quantised}),
            stale(files, {"quant_method": "bitnet"}),  # plain, and rounded in use
            stale({**files, "model.safetensors": b"\xff" * 100_000}),
            stale({**as_pickle, "pytorch_model.bin": b"x" * 100_000}),  # it does not say before it is fetched
        )
    ):
        hub.repositories[f"org/quantised-{number}"] = repository
        result = litgpt("download", f"org/quantised-{number}")
        assert result.code == 1
        assert "are not supported" in result.err
        assert "quant_method" in result.err
        assert not Path(f"checkpoints/org/quantised-{number}").exists()


def test_without_config_json_a_name_is_asked_for(litgpt, hub, llama_files):
    hub.repositories["org/copy"] = {name: content for name, content in llama_files[0].items() if name != "config.json"}
    for options in ([], ["--model_name", "nobody-knows"]):
        result = litgpt("download", "org/copy", *options)
        assert result.code == 1
        assert "org/copy is not downloaded: it has no config.json." in result.err
        assert "--model_name" in result.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["microsft/phi-2"], 1, "error: There is no repository 'microsft/phi-2' on the hub (answer 401). Did you mean 'microsoft/phi-2'"),
        (["org/gated"], 1, "error: org/gated is gated: accept its terms"),
        (["org/gguf"], 1, "error: org/gguf holds GGUF files only: a.gguf."),
        (["org/tiny", "--tokeniser_only"], 2, "error: --tokeniser_only: unknown setting. Did you mean '--tokenizer_only'?"),
        (["--tokenizer_only"], 2, "error: missing: repo_id."),
        (["org/tiny", "--revision", "v7"], 1, "error: org/tiny has no such revision (--revision v7)"),
        (["org/tiny", "--dtype", "bf17"], 1, "error: --dtype bf17: there is no such type"),
        (["org/tiny", "--dtype", "bf16", "--convert_checkpoint", "false"], 1, "error: --dtype bf16 cannot be combined with --convert_checkpoint false"),
        (["org/tiny", "--keep_hf_files", "false", "--tokenizer_only", "true"], 1, "error: --keep_hf_files false cannot be combined with --tokenizer_only true"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_clearly(litgpt, hub, llama_files, words, code, message):
    for repo_id in ("org/gated", "org/tiny"):
        hub.repositories[repo_id] = llama_files[0]
    hub.repositories["org/gguf"] = {"a.gguf": b"GGUF", "config.json": llama_files[0]["config.json"]}
    hub.tokens["org/gated"] = "hf_secret"
    result = litgpt("download", *words)
    assert result.code == code
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1
    assert not Path("checkpoints").exists()


def test_room_for_the_conversion_is_checked_before(litgpt, hub, llama_files, monkeypatch):
    from shutil import _ntuple_diskusage

    files, _, weights = llama_files
    hub.repositories["org/tiny"] = files
    wanted = sum(len(content) for name, content in files.items() if name != "README.md" and "/" not in name)
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        converted = sum(tensor.numel() for tensor in weights.values()) * itemsize
        monkeypatch.setattr(
            "shutil.disk_usage", lambda path, free=wanted + converted - 1: _ntuple_diskusage(0, 0, free)
        )
        result = litgpt("download", "org/tiny", "--dtype", dtype)
        assert result.code == 1
        assert "No room for org/tiny" in result.err
        assert "for the converted weights" in result.err
        assert "model.safetensors" not in hub.fetched()
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=wanted + converted: _ntuple_diskusage(0, 0, free))
        assert litgpt("download", "org/tiny", "--dtype", dtype, "--checkpoint_dir", dtype).code == 0
        hub.requests.clear()


def test_a_killed_process_is_resumed_by_the_next(hub, llama_files, tmp_path):
    weights = os.urandom(12_000_000)
    gathering = tmp_path / "checkpoints/org/.big.partial"
    hub.repositories["org/big"] = {**llama_files[0], "model.safetensors": weights}
    words = ("org/big", "--convert_checkpoint", "false")
    for way, enough, code in ((signal.SIGKILL, 3_000_000, -signal.SIGKILL), (signal.SIGINT, 6_000_000, 130)):
        hub.most = enough + 2_000_000
        process = in_a_process(hub, tmp_path, *words)
        while sum(path.stat().st_size for path in gathering.glob(".model*")) < enough:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(way)
        errors = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == code
        assert "Traceback" not in errors
        assert not (tmp_path / "checkpoints/org/big").exists()
    assert "The same command goes on where this one stopped." in errors
    hub.most = math.inf
    process = in_a_process(hub, tmp_path, *words)
    assert process.communicate(timeout=PATIENCE)[1] == ""
    assert process.returncode == 0
    assert (tmp_path / "checkpoints/org/big/model.safetensors").read_bytes() == weights
    # Each began where the one before had come to, and the last was sent the rest.
    (first, _), (second, _), (third, rest) = hub.parts["model.safetensors"]
    assert first == 0
    assert 3_000_000 <= second < 6_000_000 <= third
    assert third + rest == len(weights)
    assert present(tmp_path / "checkpoints/org") == {"big"}


def test_two_processes_do_not_disturb_one_another(hub, llama_files, tmp_path):
    hub.repositories["org/big"] = {"model.safetensors": os.urandom(5_000_000)}
    hub.most = 1_000_000
    code = (
        "import pathlib; from litgpt.hub import open_repository; repository = open_repository('org/big');"
        "repository.fetch(repository.files, pathlib.Path('checkpoints/org/big'))"
    )
    both = [in_a_process(hub, tmp_path, code=code) for _ in range(2)]
    speaks = select.select([process.stderr for process in both], [], [], PATIENCE)[0]
    assert [file.readline()[:66] for file in speaks] == [
        "Waiting for another process to download into 'checkpoints/org/big'"
    ]
    hub.most = math.inf
    errors = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert ([process.returncode for process in both], errors) == ([0, 0], ["", ""])
    assert hub.sent["model.safetensors"] == 5_000_000


def test_offline_from_the_cache_alone(hub, llama_files, tmp_path):
    files = llama_files[0]
    hub.repositories["org/tiny"] = {name: content for name, content in files.items() if "/" not in name}
    fill = "from huggingface_hub import snapshot_download; snapshot_download('org/tiny')"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", fill], env=env, check=True, capture_output=True, timeout=PATIENCE)
    hub.requests.clear()
    process = in_a_process(hub, tmp_path, "org/tiny", "--revision", commit_of("org/tiny"), HF_HUB_OFFLINE="1")
    errors = process.communicate(timeout=PATIENCE)[1]
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "checkpoints/org/tiny/model.safetensors").read_bytes() == files["model.safetensors"]
    process = in_a_process(hub, tmp_path, "org/absent", HF_HUB_OFFLINE="1")
    assert (
        "HF_HUB_OFFLINE is set, and the Hub cache has no org/absent at revision main"
        in process.communicate(timeout=PATIENCE)[1]
    )
    assert process.returncode == 1
    assert hub.requests == []


def test_download_list(litgpt):
    result = litgpt("download", "list")
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines == sorted(known_checkpoints())
    assert all(line.count("/") == 1 and " " not in line for line in lines)
    assert "TinyLlama/TinyLlama-1.1B-Chat-v1.0" in lines
    assert litgpt("download") == result


def test_pretrain_list(litgpt):
    result = litgpt("pretrain", "list")
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines == sorted(lines)
    assert len(lines) == len(known_checkpoints())
    for line in lines:
        name, repo_id = line.split()
        assert find_known(name).repo_id == find_known(repo_id).repo_id == repo_id
    assert any(line.startswith("tiny-llama-1.1b ") for line in lines)
    assert litgpt("pretrain") == result
