"""Every figure of every sample against lm-evaluation-harness's own backend for Hugging Face models, in float32."""

import json
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import make_table  # noqa: E402

from litgpt.__main__ import main  # noqa: E402

ALL = ["choices", "letters", "without_context", "reading", "writing", "writing_on", "continued"]


def theirs(model: Path, tasks: Path, names: list[str], batch_size: int = 1, **how) -> dict:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    how = {"fewshot_as_multiturn": False, **how}
    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=names,
        task_manager=manager,
        batch_size=batch_size,
        device="cpu",
        random_seed=1234,
        bootstrap_iters=0,
        **how,
    )


def ours(model: Path, tasks: Path, names: list[str], out: Path, *words: str) -> tuple[dict, dict[str, list]]:
    """Results and samples as the command writes them."""
    code = main(
        [
            *("evaluate", str(model), "--tasks", ",".join(names), "--include_path", str(tasks)),
            *("--out_dir", str(out), "--precision", "32-true", "--log_samples", "true", *words),
        ]
    )
    assert code == 0
    samples = {}
    for name in names:
        (file,) = out.glob(f"samples_{name}_2*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), samples


def plain(value):
    """What JSON makes of it; the harness's files hold numbers as texts."""
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (bool, str)) or value is None:
        text = str(value)
        try:
            return float(text)
        except ValueError:
            return text
    return float(value)


def near(value):
    if isinstance(value, list):
        return [near(part) for part in value]
    return value if isinstance(value, str) else pytest.approx(value, rel=2e-5, abs=2e-4)


def compare(results: dict, samples: dict[str, list], reference: dict, names: list[str]) -> None:
    for name in names:
        expected = reference["samples"][name]
        assert len(samples[name]) == len(expected)
        for one, other in zip(samples[name], expected, strict=True):
            context = [argument[0] for argument in other["arguments"]]
            assert [part["arg_0"] for part in one["arguments"].values()] == context
            assert one["doc_hash"] == other["doc_hash"]
            assert one["prompt_hash"] == other["prompt_hash"]
            assert plain(one["resps"]) == near(plain(other["resps"])), (name, one["doc_id"])
            assert plain(one["filtered_resps"]) == near(plain(other["filtered_resps"]))
            for metric in other["metrics"]:
                assert plain(one[metric]) == near(plain(other[metric]))
        for metric, value in reference["results"][name].items():
            if "stderr" not in metric and "," in metric:
                found = results["results"][name][metric]
                assert f"{found:.4f}" == f"{value:.4f}" or found == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen3"])
def test_each_sample_is_that_of_the_harness(request, model, tasks, tmp_path):
    directory = request.getfixturevalue(model)
    reference = theirs(directory, tasks, ALL)
    results, samples = ours(directory, tasks, ALL, tmp_path, "--batch_size", "8")
    compare(results, samples, reference, ALL)
    # And the task kinds are what they are meant to be: truncated contexts, several windows, answers that stop.
    assert len({str(one["resps"]) for name in ALL for one in samples[name]}) > 30
    assert results["lm_eval_version"] == lm_eval.__version__
    assert results["versions"]["choices"] == 1.5
    assert "choices" in make_table(results)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen3"])
def test_conversations_and_examples_are_those_of_the_harness(request, model, tasks, tmp_path):
    directory = request.getfixturevalue(model)
    names = ["choices", "writing", "continued"]
    how = {"system_instruction": "Be brief.", "num_fewshot": 1}
    words = ["--num_fewshot", "1", "--system_instruction", "Be brief.", "--batch_size", "auto", "--limit", "5"]
    reference = theirs(directory, tasks, names, limit=5, **how)
    compare(*ours(directory, tasks, names, tmp_path / "bare", *words), reference, names)
    reference = theirs(directory, tasks, names, limit=5, apply_chat_template=True, fewshot_as_multiturn=True, **how)
    words += ["--apply_chat_template", "true", "--fewshot_as_multiturn", "true"]
    results, samples = ours(directory, tasks, names, tmp_path / "chat", *words)
    compare(results, samples, reference, names)
    assert "<|im_start|>" in samples["writing"][0]["arguments"]["gen_args_0"]["arg_0"]
    assert samples["continued"][0]["arguments"]["gen_args_0"]["arg_0"].endswith("assistant\nThe answer is")
    assert len(results["chat_template_sha"]) == len(results["system_instruction_sha"]) == 64


def test_a_converted_directory_works_with_the_harness_as_the_manual_types_it(tiny_llama, tasks, tmp_path, monkeypatch):
    """The weights alone out of model.pth; config.json and the tokenizer's files are copied there, as in the manual."""
    from lm_eval.__main__ import cli_evaluate

    assert main(["convert_to_litgpt", str(tiny_llama), "--out_dir", str(tmp_path / "checkpoint")]) == 0
    converted = tmp_path / "converted_model"
    assert main(["convert_from_litgpt", str(tmp_path / "checkpoint"), str(converted)]) == 0
    assert (converted / "model.pth").is_file()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (converted / name).write_bytes((tmp_path / "checkpoint" / name).read_bytes())
    words = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={converted},dtype=float32", "--tasks", "choices"]
    words += [
        "--device",
        "cpu",
        "--batch_size",
        "2",
        "--include_path",
        str(tasks),
        "--output_path",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr("sys.argv", [*words, "--log_samples"])
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))  # 13 seconds less
    cli_evaluate()
    (file,) = (tmp_path / "o").rglob("samples_choices_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    _, samples = ours(tmp_path / "checkpoint", tasks, ["choices"], tmp_path / "ours")
    for one, other in zip(samples["choices"], found, strict=True):
        assert plain(one["filtered_resps"]) == near(plain(other["filtered_resps"]))


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the reference generates without batches
def test_smollm2_in_figures_of_the_harness(smollm2_gguf, tasks, tmp_path):
    assert main(["convert_to_litgpt", str(smollm2_gguf), "--out_dir", str(tmp_path / "lit"), "--dtype", "float32"]) == 0
    assert main(["convert_from_litgpt", str(tmp_path / "lit"), str(tmp_path / "hf"), "--format", "safetensors"]) == 0
    reference = theirs(tmp_path / "hf", tasks, ALL, limit=4)
    words = ["--limit", "4", "--batch_size", "16"]
    compare(*ours(tmp_path / "lit", tasks, ALL, tmp_path / "bare", *words), reference, ALL)
    names = ["choices", "writing", "continued"]
    how = {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": True, "limit": 4}
    reference = theirs(tmp_path / "hf", tasks, names, **how)
    words += ["--num_fewshot", "2", "--apply_chat_template", "true", "--fewshot_as_multiturn", "true"]
    compare(*ours(tmp_path / "lit", tasks, names, tmp_path / "chat", *words), reference, names)
