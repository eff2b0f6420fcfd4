"""The command: what it lists, refuses, records, and leaves when it is interrupted; every kind of checkpoint."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, save_lora
from litgpt.checkpoint import CONFIG, copy_companion_files
from litgpt.config import Config
from tests.evaluation.test_harness_parity import compare, near, ours, plain, theirs

ROOT = Path(__file__).parents[2]


def run(*words: str, tasks: Path, **how) -> subprocess.Popen:
    command = [sys.executable, "-m", "litgpt", "evaluate", *words, "--include_path", str(tasks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, **how)


def answers(samples: dict[str, list]) -> list:
    return [plain(one["filtered_resps"]) for of_task in samples.values() for one in of_task]


def test_the_index_of_tasks_is_that_of_the_harness_and_can_be_searched(tasks, capsys):
    from lm_eval.tasks._index import TaskIndex

    from litgpt.evaluation.tasks import TaskList, index_of

    folder = Path(sys.modules["lm_eval"].__file__).parent / "tasks"
    for part in (folder / "mmlu", folder / "gsm8k", folder / "arc", tasks):
        mine, theirs = index_of([part]), TaskIndex.build([part])
        assert mine.keys() == theirs.keys()
        for name, entry in theirs.items():
            found = mine[name]
            assert (found.kind, found.yaml_path, found.tags) == (entry.kind, entry.yaml_path, entry.tags)
    TaskList([tasks]).print(["gsm8k", "task"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["gsm8k", "task"] for line in lines)
    assert all("gsm8k" in line.lower() for line in lines)
    with pytest.raises(ValueError, match="Did you mean 'hellaswag'"):
        TaskList([tasks]).chosen(["choices", "helaswag"])
    assert {"choices", "continued"} <= set(TaskList([tasks]).chosen(["c*", "choices"])[0])


def test_the_list_of_tasks_is_there_without_torch(tasks):
    """It is searched with grep, and so is to come soon."""
    script = "import sys; from litgpt.__main__ import main; code = main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    words = ["evaluate", "--tasks", "list", "--filter", "hellaswag", "--include_path", str(tasks)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert any(line.split()[:2] == ["hellaswag", "task"] for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "choices", "--data", "x.txt"], "are for --tasks perplexity"),
        (["--tasks", "perplexity"], "give --data FILE_OR_FOLDER"),
        (["--tasks", "choices", "--batch_size", "0"], "--batch_size 0 is not valid"),
        (["--tasks", "choices", "--limit", "0"], "--limit 0"),
        (["--tasks", "choices", "--dtype", "float8"], "--dtype float8 is not valid"),
        (["--tasks", "choices", "--dtype", "float32", "--precision", "bf16-true"], "contradict each other"),
        (["--tasks", "choices", "--fewshot_as_multiturn", "true"], "give --apply_chat_template true, too"),
        (["--tasks", "choices", "--apply_chat_template", "tols"], "no chat template 'tols'"),
        (["--tasks", "choices", "--device", "cuda:7"], "--device cuda:7: there is none here"),
        (["--tasks", "writing", "--gen_kwargs", "num_beams=4"], "Task writing sets num_beams"),
        (["--tasks", "writing", "--gen_kwargs", "max_gen_toks=500"], "asks for answers of up to 500 tokens"),
        (["--tasks", "choices", "--filter", "x"], "--filter is for --tasks list"),
    ],
)
def test_what_cannot_act_is_refused_by_name(tiny_llama, tasks, tmp_path, capsys, words, message):
    if "cuda" in message and torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    words += ["--include_path", str(tasks), "--out_dir", str(tmp_path)]
    assert main(["evaluate", str(tiny_llama), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_a_place_for_results_that_cannot_be_is_named_before_the_work(tiny_llama, tasks, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = ["--tasks", "choices", "--include_path", str(tasks), "--out_dir", str(tmp_path / "file/below")]
    assert main(["evaluate", str(tiny_llama), *words]) == 1
    printed = capsys.readouterr()
    assert f"--out_dir {tmp_path / 'file/below'} cannot be written to" in printed.err
    assert "Scoring" not in printed.err


def test_without_the_harness_the_command_that_installs_it_is_named(tiny_llama, tasks, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(tiny_llama), "--tasks", "choices", "--include_path", str(tasks)]) == 1
    assert "pip install 'litgpt[all]'" in capsys.readouterr().err


def test_a_data_set_that_cannot_be_had_is_named_with_its_task(tiny_llama, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets.config
    import huggingface_hub.constants

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")
    folder = tmp_path / "tasks"
    folder.mkdir()
    settings = json.loads((tasks / "choices.yaml").read_text())
    settings |= {"task": "elsewhere", "dataset_path": "nobody/nothing", "dataset_kwargs": {}}
    (folder / "elsewhere.yaml").write_text(json.dumps(settings))
    assert main(["evaluate", str(tiny_llama), "--tasks", "elsewhere", "--include_path", str(folder)]) == 1
    printed = capsys.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached: only data sets that are on this machine." in printed
    # What would else try again and again is told to look here only.
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    error = printed.splitlines()[-1]
    assert error.startswith("error: Task elsewhere: its data set cannot be had")
    assert "HF_DATASETS_OFFLINE=1" in error


def test_results_of_two_processes_are_those_of_one(tiny_qwen3, tasks, tmp_path):
    names = ["choices", "reading", "writing"]
    _, one = ours(tiny_qwen3, tasks, names, tmp_path / "one", "--batch_size", "4")
    results, two = ours(
        tiny_qwen3, tasks, names, tmp_path / "two", "--batch_size", "4", "--devices", "2", "--device", "cpu"
    )
    assert answers(two) == near(answers(one))
    assert results["litgpt"]["devices"] == 2


def test_a_run_that_is_interrupted_leaves_what_is_done(tiny_llama, tasks, tmp_path):
    """The whole of the first kind of request is done, and part of the second, when Ctrl-C comes."""
    names = ["choices", "writing"]
    words = ["--tasks", ",".join(names), "--out_dir", str(tmp_path), "--precision", "32-true", "--log_samples", "true"]
    process = run(str(tiny_llama), *words, "--gen_kwargs", "max_gen_toks=150,until=@", tasks=tasks)
    for line in process.stderr:
        if "First prompt of writing" in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["partial"] is True
    assert "PARTIAL: choices: 8 of 8 documents" in out
    (file,) = tmp_path.glob("samples_choices_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    reference = theirs(tiny_llama, tasks, ["choices"])
    compare(results, {"choices": samples}, reference, ["choices"])


def test_the_part_that_is_done_is_whole_documents(tiny_llama, tasks, tmp_path, monkeypatch):
    """Ctrl-C in the middle: figures of those documents alone all of whose requests are answered."""
    from litgpt.evaluation import template_lm as adapter

    real = adapter.score

    def interrupted(run, sequences):
        for number, scored in enumerate(real(run, sequences)):
            if number == 14:
                raise KeyboardInterrupt
            yield scored

    monkeypatch.setattr(adapter, "score", interrupted)
    words = [
        "--out_dir",
        str(tmp_path),
        "--precision",
        "32-true",
        "--log_samples",
        "true",
        "--include_path",
        str(tasks),
    ]
    assert main(["evaluate", str(tiny_llama), "--tasks", "choices", *words]) == 130
    results = json.loads((tmp_path / "results.json").read_text())
    counts = results["n-samples"]["choices"]
    assert 0 < counts["effective"] <= 3
    assert counts["original"] == 8
    (file,) = tmp_path.glob("samples_choices_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    expected = {one["doc_id"]: one for one in theirs(tiny_llama, tasks, ["choices"])["samples"]["choices"]}
    assert len(samples) == counts["effective"]
    for one in samples:
        assert one["doc_hash"] == expected[one["doc_id"]]["doc_hash"]
        assert plain(one["filtered_resps"]) == near(plain(expected[one["doc_id"]]["filtered_resps"]))


@pytest.fixture(scope="module")
def converted(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "lit"
    assert main(["convert_to_litgpt", str(tiny_llama), "--out_dir", str(out), "--dtype", "float32"]) == 0
    return out


def test_lora_weights_are_evaluated_on_their_base(converted, tasks, tmp_path):
    from litgpt.sources.load import load_model

    model = load_model(converted, dtype=torch.float32)
    settings = LoRASettings(r=4, alpha=8, query=True, value=True)
    apply_lora(model, settings)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(weight) / 5 for name, weight in model.state_dict().items() if is_lora(name)}
    (tmp_path / "lora").mkdir()
    save_lora(tmp_path / "lora", weights, settings, str(converted))
    model.config.save(tmp_path / "lora")
    copy_companion_files(converted, tmp_path / "lora")
    names = ["choices", "writing"]
    _, alone = ours(tmp_path / "lora", tasks, names, tmp_path / "a")
    _, base = ours(converted, tasks, names, tmp_path / "b")
    assert answers(alone) != near(answers(base))
    assert main(["merge_lora", str(tmp_path / "lora")]) == 0
    _, merged = ours(tmp_path / "lora", tasks, names, tmp_path / "c")
    assert answers(merged) == near(answers(alone))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_checkpoints_are_evaluated_as_they_are(converted, tasks, tmp_path, kind):
    words = ["convert_lit_checkpoint", str(converted), "--out_dir", str(tmp_path / "q"), "--quantize", kind]
    assert main(words) == 0
    _, of_file = ours(tmp_path / "q", tasks, ["choices"], tmp_path / "a")
    _, on_load = ours(converted, tasks, ["choices"], tmp_path / "b", "--quantize", kind)
    assert answers(of_file) == near(answers(on_load))


def test_gguf_files_are_evaluated_as_they_are(converted, tasks, tmp_path):
    file = tmp_path / "model.gguf"
    assert main(["convert_from_litgpt", str(converted), str(file)]) == 0
    names = ["choices", "reading", "writing"]
    _, of_file = ours(file, tasks, names, tmp_path / "a")
    _, of_directory = ours(converted, tasks, names, tmp_path / "b")
    assert answers(of_file) == near(answers(of_directory))
    assert Config.from_file(converted / CONFIG).block_size == 192
