"""Which compiler `--compile` and `--compiler` mean, and what is said where there is none."""

import sys

import pytest
import torch

from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training import compilers
from litgpt.training.compilers import choose_compiler, compile_blocks

TINY = Config(name="tiny", block_size=8, n_layer=2, n_head=2, n_embd=16, vocab_size=16, padded_vocab_size=16)


@pytest.fixture
def offers(tmp_path, monkeypatch):
    """Installs a package that offers compilers under these names, for torch's registry and ours to find."""

    def install(module: str, **names: str) -> None:
        (tmp_path / "some_compiler.py").write_text(module)
        info = tmp_path / "some_compiler-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-compiler\nVersion: 1.0\n")
        points = "".join(f"{name} = some_compiler:{function}\n" for name, function in names.items())
        (info / "entry_points.txt").write_text(f"[{compilers.ENTRY_POINTS}]\n{points}")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "some_compiler", raising=False)

    return install


def test_torch_is_the_default():
    assert choose_compiler(False, None) is None
    assert (
        choose_compiler(True, None) == choose_compiler(False, "torch") == choose_compiler(True, "torch") == "inductor"
    )


def test_one_that_a_package_offers_compiles_every_block(offers):
    offers(
        "graphs = []\ndef mine(graph, example_inputs):\n    graphs.append(graph)\n    return graph.forward\n",
        mine="mine",
    )
    backend = choose_compiler(False, "mine")
    gpt, idx = GPT(TINY), torch.arange(8)[None]
    expected = gpt(idx)
    names = list(gpt.state_dict())
    torch.compiler.reset()
    said: list[str] = []
    compile_blocks(gpt, backend, said.append)
    assert said == ["Compiling the model's blocks (mine): the first step waits for that, which can take minutes."]
    torch.testing.assert_close(gpt(idx), expected)
    assert sys.modules["some_compiler"].graphs
    assert list(gpt.state_dict()) == names
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thundr", r"compiler=thundr is unknown\. Did you mean 'thunder'\? Choose from: torch, thunder"),
        ("thunder", rf"compiler=thunder is not installed here \(PyTorch {torch.__version__[:3]}.*2\.12 or older.*pip install"),
    ],
)  # fmt: skip
def test_one_that_there_is_not_is_refused(name, message, monkeypatch):
    real = compilers.entry_points
    monkeypatch.setattr(
        compilers, "entry_points", lambda **kind: [point for point in real(**kind) if point.name != "thunder"]
    )
    with pytest.raises(ValueError, match=message):
        choose_compiler(False, name)


def test_one_that_does_not_import_is_one_line_and_nothing_is_begun(offers, tmp_path, capsys):
    offers("raise AttributeError('torch has no such thing')", thunder="thunder")
    words = [
        "pretrain",
        "pythia-14m",
        "--data",
        "TextFiles",
        "--data.train_data_path",
        tmp_path,
        "--compiler",
        "thunder",
    ]
    assert main(list(map(str, [*words, "--out_dir", tmp_path / "out"]))) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: --compiler thunder cannot be loaded with PyTorch {torch.__version__} (AttributeError: "
    )
    assert "It needs Lightning Thunder" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    words = ["finetune_lora", str(tmp_path / "nowhere"), "--compiler", "thunder", "--out_dir", str(tmp_path / "out")]
    assert main(words) == 1
    assert "error: --compiler thunder cannot be loaded" in capsys.readouterr().err
