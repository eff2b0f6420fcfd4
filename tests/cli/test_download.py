"""`litgpt download` and the listings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.config import Config
from litgpt.models import find_known, known_checkpoints
from tests.hub_server import Hub, serve_hub


@pytest.fixture
def download(tmp_path):
    """`litgpt download` in a process of its own, in a directory of its own, with a hub of its own."""
    hub = Hub()
    with serve_hub(hub):

        def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
            env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment}
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), env.get("PYTHONPATH")]))
            command = [sys.executable, "-m", "litgpt", "download", *words]
            return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

        run.hub = hub
        yield run


def tiny_llama(directory: Path) -> tuple[dict[str, bytes], Config, dict[str, torch.Tensor]]:
    """A Hugging Face repository's files, with its configuration and weights in our terms."""
    from litgpt.checkpoint import save_model
    from litgpt.convert import export_hf, open_checkpoint
    from litgpt.model import GPT

    config = Config(
        name="tiny", block_size=32, vocab_size=60, padded_vocab_size=64, n_layer=2, n_head=2, n_embd=16,
        n_query_groups=1, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", intermediate_size=24,
    )  # fmt: skip
    torch.manual_seed(1)
    model = GPT(config)
    model.init_weights()
    (directory / "ours").mkdir(parents=True)
    (directory / "theirs").mkdir()
    save_model(directory / "ours", model, config)
    export_hf(open_checkpoint(directory / "ours"), directory / "theirs")
    files = {file.name: file.read_bytes() for file in (directory / "theirs").iterdir()}
    return files, config, model.state_dict()


def test_download_and_convert(download, tmp_path):
    files, config, weights = tiny_llama(tmp_path / "made")
    download.hub.repositories["org/tiny"] = {**files, "tokenizer.json": b"{}", "README.md": b"hello"}
    result = download("org/tiny", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert "Converting checkpoint files to LitGPT format." in result.stdout
    assert "Saving converted checkpoint to checkpoints/org/tiny" in result.stdout
    directory = tmp_path / "checkpoints/org/tiny"
    present = {path.name for path in directory.iterdir()}
    assert {"lit_model.pth", "model_config.yaml", "config.json", "model.safetensors", "tokenizer.json"} <= present
    assert "README.md" not in present
    converted = torch.load(directory / "lit_model.pth", weights_only=True)
    assert converted.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(converted[name], tensor.bfloat16()), name
    assert yaml.safe_load((directory / "model_config.yaml").read_text())["n_embd"] == config.n_embd


def test_without_conversion_into_another_directory(download, tmp_path):
    download.hub.repositories["org/tiny"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    result = download("org/tiny", "--convert_checkpoint", "false", "--checkpoint_dir", "elsewhere")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "elsewhere/org/tiny/model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "elsewhere/org/tiny/lit_model.pth").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_short_names_resolve(download, tmp_path):
    download.hub.repositories["EleutherAI/pythia-14m"] = {"tokenizer.json": b"{}", "model.safetensors": b"weights"}
    result = download("Pythia-14M", "--tokenizer_only", "true")
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "checkpoints/EleutherAI/pythia-14m"
    assert (directory / "tokenizer.json").exists()
    assert not (directory / "model.safetensors").exists()
    assert download.hub.fetched() == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["microsft/phi-2"], 1, "error: There is no repository 'microsft/phi-2' on the hub (answer 404). Did you mean 'microsoft/phi-2'"),
        (["org/gated"], 1, "error: org/gated is gated: accept its terms"),
        (["org/tiny", "--tokeniser_only"], 2, "error: --tokeniser_only: unknown setting. Did you mean 'tokenizer_only'?"),
        (["--tokenizer_only"], 2, "error: missing: repo_id."),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_clearly(download, words, code, message):
    download.hub.repositories["org/gated"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    download.hub.tokens["org/gated"] = "hf_secret"
    result = download(*words, "--convert_checkpoint", "false")
    assert result.returncode == code
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr


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
