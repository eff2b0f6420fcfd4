"""`litgpt validate`: what passes, and each kind of damage is found and named."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from litgpt.checkpoint import CONFIG, WEIGHTS
from litgpt.config import Config
from tests import checkpoint_files, tokenizer_files

SIZES = {"vocab_size": 704, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0}
PARAMETERS = 2 * 704 * 32 + 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 42\n"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A checkpoint of each kind; tests damage copies."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder / "one_file")
    model.save_pretrained(folder / "shards", max_shard_size="100KB")
    for name in ("one_file", "shards"):
        tokenizer_files.byte_level(folder / name, {"chat_template": tokenizer_files.CHATML})
    checkpoint_files.chat_model(folder / "lit")
    return folder


@pytest.fixture
def directory(originals, tmp_path, request):
    name = getattr(request, "param", "shards")
    return shutil.copytree(originals / name, tmp_path / name)


@pytest.fixture
def validate(litgpt):
    """The JSON report of a run; its exit code must agree with it."""

    def run(directory, *options):
        result = litgpt("validate", directory, "--json", *options)
        report = json.loads(result.out)
        assert result.code == (1 if report["valid"] is False else 0)
        assert result.err == ""
        return report

    return run


def errors(report):
    return [(problem["group"], problem["message"]) for problem in report["problems"] if problem["fails"]]


def warnings(report):
    return [(problem["group"], problem["message"]) for problem in report["problems"] if not problem["fails"]]


def only_error(report):
    assert not report["valid"]
    assert len(errors(report)) == 1, report["problems"]
    return next(problem for problem in report["problems"] if problem["fails"])


def rewrite(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "removed"}))


def shards(directory):
    return sorted(directory.glob("model-*.safetensors"))


# --- what passes


@pytest.mark.parametrize("directory", ["shards", "one_file", "lit"], indirect=True)
def test_a_sound_checkpoint_passes(validate, directory):
    report = validate(directory, "--check_values")
    assert report["problems"] == []
    assert report["kind"] == ("litgpt" if directory.name == "lit" else "Hugging Face")
    summary = report["summary"]
    assert summary["architecture"] == "LlamaForCausalLM"
    assert summary["prompt_format"] == "the checkpoint's chat template"
    if directory.name != "lit":
        assert summary["parameters"] == PARAMETERS
        assert summary["dtypes"] == {"float32": PARAMETERS}
        assert (summary["context"], summary["rows"], summary["tokens"]) == (64, 704, 400)
        assert summary["special_tokens"] == {"bos": None, "eos": 0, "pad": None, "stop": [0]}


def test_a_real_gguf_file_passes(litgpt, validate, smollm2_gguf):
    report = validate(smollm2_gguf)
    assert report["kind"] == "GGUF"
    assert report["summary"]["parameters"] == 134_515_008
    assert report["summary"]["tied_head"]
    assert sum(report["summary"]["dtypes"].values()) == 134_515_008
    text = litgpt("validate", smollm2_gguf)
    assert text.code == 0
    assert "134,515,008 in float32" in text.out
    assert text.out.endswith("The checkpoint passes.\n")


def test_the_memory_is_estimated_for_what_is_asked(litgpt, validate, directory):
    options = ("--precision", "bf16-true", "--batch_size", 3, "--context", 50)
    memory = validate(directory, *options, "--lora_r", 4, "--devices", 2)["memory"]
    settings = {"precision": "bf16-true", "batch_size": 3, "context": 50, "lora_r": 4, "devices": 2}
    assert settings.items() <= memory.items()
    assert memory["methods"]["inference"]["parts"]["weights"] == 2 * PARAMETERS
    assert memory["methods"]["full"]["parts"]["weights"] == 2 * PARAMETERS // 2
    # Two layers; A and B of queries (32 -> 32) and values (32 -> 16), in float32; shared by two devices.
    assert memory["methods"]["lora"]["parts"]["trained_weights"] == 4 * 2 * 4 * (64 + 48) // 2
    for method in memory["methods"].values():
        assert method["total"] == sum(method["parts"].values())
        assert method["fits"] == (method["total"] <= memory["device_bytes"])
    lines = litgpt("validate", directory, *options).out.splitlines()
    assert any(line.split() == ["inference", "LoRA", "QLoRA", "full"] for line in lines)
    assert "Memory in GB at bf16-true for 3 x 50 tokens at a time, LoRA with r=8:" in lines


def test_a_weight_file_and_a_name_below_checkpoints_serve_too(validate, originals, tmp_path, monkeypatch):
    assert validate(originals / "one_file" / "model.safetensors")["valid"]
    shutil.copytree(originals / "lit", tmp_path / "checkpoints" / "org" / "model")
    monkeypatch.chdir(tmp_path)
    assert validate("org/model")["checkpoint"] == "checkpoints/org/model"


def test_it_says_what_is_looked_at(litgpt, originals):
    directory = originals / "one_file"
    file = litgpt("validate", directory / "model.safetensors").out
    named = "A checkpoint is more than one file: the whole directory of model.safetensors is checked."
    assert file.splitlines()[:2] == [f"{directory} (Hugging Face)", named]
    assert "  weights         ok by names and shapes (--check_values true reads the values, too)\n" in file
    whole = litgpt("validate", directory, "--check_values").out
    assert "more than one file" not in whole
    assert "  weights         ok\n" in whole


def test_what_is_not_looked_at_is_not_called_ok(litgpt, validate, directory, tmp_path):
    shards(directory)[0].unlink()
    why = "the errors of files stand before them"
    assert validate(directory)["unchecked"] == {"weights": why}
    lines = litgpt("validate", directory).out.splitlines()
    assert f"  weights         not checked: {why}" in lines
    assert "  tokenizer       ok" in lines
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert [line.split(maxsplit=1)[1] for line in litgpt("validate", file).out.splitlines() if "checked" in line] == [
        "not checked: the file cannot be read"
    ] * 3


def test_what_a_user_mistypes_is_said_in_a_line(litgpt, directory, tmp_path):
    for options in (("--batch_size", 0), ("--context", 65), ("--precision", "8-true"), ("--devices", 0)):
        result = litgpt("validate", directory, *options)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert f"{options[0]} {options[1]}" in result.err
    result = litgpt("validate", tmp_path / "nowhere")
    assert result.code == 1
    assert "No checkpoint" in result.err


def test_the_memory_of_a_known_model_is_estimated_before_it_is_downloaded(litgpt, validate):
    report = validate("checkpoints/meta-llama/Llama-3.2-1B")
    assert (report["checkpoint"], report["kind"], report["valid"]) == ("meta-llama/Llama-3.2-1B", None, None)
    assert report["summary"]["parameters"] == 1_235_814_400
    assert report["memory"]["methods"]["inference"]["parts"]["weights"] >= 2 * 1_235_814_400
    text = litgpt("validate", "Llama-3.2-1B")
    assert text.code == 0
    assert text.out.startswith("meta-llama/Llama-3.2-1B (known; not on this machine)\n")
    assert text.out.endswith("To download and check it: litgpt download meta-llama/Llama-3.2-1B\n")


def test_weights_are_not_read(directory, tmp_path):
    """A checkpoint of 4 GB (holes on disk) is checked without its size showing in memory."""
    shutil.copytree(directory, tmp_path / "large")
    large = tmp_path / "large"
    for file in shards(large):
        file.unlink()
    (large / "model.safetensors.index.json").unlink()
    rewrite(large / "config.json", vocab_size=2**24)
    header, end = {}, 0
    for file in shards(directory):
        for name, tensor in load_file(file).items():
            shape = [2**24, 32] if tensor.shape[0] == 704 else list(tensor.shape)
            begin, end = end, end + 4 * torch.Size(shape).numel()
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (large / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 4e9
    script = """if True:
        import sys, torch
        from litgpt.__main__ import main
        from litgpt.devices.memory import memory_used  # of this process alone: a child begins with its parent's peak
        code = main(["validate", sys.argv[1]])
        print(memory_used(torch.device("cpu")), file=sys.stderr)
        sys.exit(code)
    """
    done = subprocess.run([sys.executable, "-c", script, large], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The checkpoint passes" in done.stdout
    assert float(done.stderr.splitlines()[-1]) < 1.5e9  # bytes; most of it is Python with torch


# --- files


def test_every_missing_shard_is_named(validate, directory):
    first, second = shards(directory)[:2]
    first.unlink()
    second.unlink()
    report = validate(directory)
    assert [group for group, _ in errors(report)] == ["files", "files"]
    for file, (_, message) in zip((first, second), errors(report), strict=True):
        assert f"lacks the weight file {file.name}" in message
    assert report["summary"]["context"] == 64  # config.json is read all the same


def test_a_missing_shard_is_noticed_without_an_index(validate, directory):
    (directory / "model.safetensors.index.json").unlink()
    lost = shards(directory)[1]
    lost.unlink()
    assert lost.name in only_error(validate(directory))["message"]


def test_a_truncated_shard(validate, directory):
    file = shards(directory)[0]
    file.write_bytes(file.read_bytes()[:-100])
    problem = only_error(validate(directory))
    assert problem["group"] == "files"
    assert file.name in problem["message"]
    assert "truncated" in problem["message"]


def test_pointer_files_of_git_lfs(validate, directory):
    file = shards(directory)[0]
    file.write_text(LFS_POINTER)
    (directory / "tokenizer.json").write_text(LFS_POINTER)
    messages = [message for group, message in errors(validate(directory)) if group == "files"]
    assert len(messages) == 2
    assert all("Git LFS pointer" in message and "git lfs pull" in message for message in messages)


def test_an_index_that_does_not_fit_the_shards(validate, directory):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    other = next(shard.name for shard in shards(directory) if shard.name != file)
    content["weight_map"][name] = other
    index.write_text(json.dumps(content))
    report = validate(directory)
    assert report["problems"][0]["details"] == [f"{name} is not in {other}"]
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert validate(directory)["problems"][0]["details"] == [f"{name} in {file} is not listed"]


def test_an_index_that_is_no_json(validate, directory):
    (directory / "model.safetensors.index.json").write_text("{")
    assert "index.json' is not valid JSON" in only_error(validate(directory))["message"]


@pytest.mark.parametrize("directory", ["lit"], indirect=True)
def test_damaged_weights_of_ours(validate, directory):
    file = directory / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in only_error(validate(directory))["message"]
    file.write_bytes(b"")
    assert "it is empty" in only_error(validate(directory))["message"]
    file.write_bytes(whole)
    (directory / CONFIG).unlink()
    assert f"It lacks {CONFIG}" in only_error(validate(directory))["message"]


@pytest.mark.parametrize("directory", ["lit"], indirect=True)
def test_files_of_finetuning(validate, directory):
    (directory / f"{WEIGHTS}.lora").write_bytes(b"nothing")
    (directory / "hyperparameters.yaml").write_text("lora_r: [")
    (directory / "prompt_style.yaml").write_text("class_path: litgpt.prompts.NoSuchStyle\n")
    found = errors(validate(directory))
    assert [group for group, _ in found] == ["files", "files", "tokenizer"]
    for (_, message), name in zip(found, (f"{WEIGHTS}.lora", "hyperparameters.yaml", "prompt_style.yaml"), strict=True):
        assert name in message
    torch.save({"transformer.h.0.attn.qkv.lora_A": torch.zeros(2, 2)}, directory / f"{WEIGHTS}.lora")
    (directory / "hyperparameters.yaml").write_text("lora_r: 8\n")
    (directory / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    report = validate(directory)
    assert report["valid"]
    assert report["summary"]["lora_weights"]
    assert report["summary"]["prompt_format"] == "alpaca"
    (directory / WEIGHTS).unlink()
    (directory / CONFIG).unlink()
    problem = only_error(validate(directory))
    assert problem["group"] == "weights"
    assert "does not say which model it belongs to" in problem["message"]
    assert f"litgpt merge_lora {directory} --pretrained_checkpoint_dir" in problem["message"]


def test_a_truncated_gguf_file(validate, smollm2_gguf, tmp_path):
    file = tmp_path / "model.gguf"
    with smollm2_gguf.open("rb") as whole:
        file.write_bytes(whole.read(10_000_000))
    assert only_error(validate(file))["group"] == "files"


def test_leftovers_of_a_download_are_a_warning(validate, directory):
    (directory / "model.safetensors.incomplete").write_bytes(b"")
    report = validate(directory)
    assert report["valid"]
    assert "interrupted download" in warnings(report)[0][1]


# --- configuration


def test_problems_of_all_groups_come_at_once(validate, directory):
    shards(directory)[0].unlink()
    rewrite(directory / "config.json", hidden_act="relu")
    rewrite(directory / "generation_config.json", eos_token_id=99_999)
    (directory / "tokenizer.json").write_text("{}")
    assert {group for group, _ in errors(validate(directory))} == {"files", "config", "tokenizer"}


def test_an_architecture_that_is_not_supported(validate, directory):
    rewrite(directory / "config.json", architectures=["BertForMaskedLM"], model_type="bert")
    problem = only_error(validate(directory))
    assert problem["group"] == "config"
    assert "BertForMaskedLM" in problem["message"]


@pytest.mark.parametrize("directory", ["lit"], indirect=True)
def test_a_wrong_field_of_ours(validate, directory):
    values = yaml.safe_load((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(yaml.safe_dump(values | {"n_head": 5}))
    problem = only_error(validate(directory))
    assert problem["group"] == "config"
    assert "n_head=5" in problem["message"]


@pytest.mark.parametrize("directory", ["one_file"], indirect=True)
def test_two_configurations_that_disagree(litgpt, validate, directory):
    assert litgpt("convert_to_litgpt", directory).code == 0
    assert validate(directory)["problems"] == []
    rewrite(directory / "config.json", rms_norm_eps=0.5)
    report = validate(directory)
    assert report["valid"]
    assert "norm_eps (1e-06 and 0.5)" in warnings(report)[0][1]


# --- tokenizer


def test_no_tokenizer(validate, directory):
    (directory / "tokenizer.json").unlink()
    assert only_error(validate(directory))["group"] == "tokenizer"


def add_token(directory, token_id, special):
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": token_id, "content": "<|new|>"})
    tokenizer["added_tokens"][-1]["special"] = special
    tokenizer["model"]["vocab"]["<|new|>"] = token_id
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_more_tokens_than_rows(validate, directory):
    add_token(directory, 704, special=False)
    assert "401 tokens, the embedding 704 rows" in only_error(validate(directory))["message"]


def test_a_control_token_beyond_the_rows_fails_where_it_is_used(validate, directory):
    add_token(directory, 704, special=True)
    report = validate(directory)  # as in Gemma 3, whose tokenizer has a token for images
    assert report["valid"]
    assert "control tokens beyond: 704" in warnings(report)[0][1]
    rewrite(directory / "tokenizer_config.json", chat_template="<|new|>{{ messages[0]['content'] }}")
    assert "the id 704, for which the embedding has no row" in only_error(validate(directory))["message"]


def test_special_tokens_that_disagree(validate, directory):
    rewrite(directory / "generation_config.json", eos_token_id=[1, 5])
    report = validate(directory)
    assert report["valid"]
    assert "The eos token is 0 by the tokenizer and 1 and 5 by generation_config.json" in warnings(report)[0][1]
    rewrite(directory / "generation_config.json", eos_token_id=[0, 5])  # one more that ends an answer is usual
    assert validate(directory)["problems"] == []
    rewrite(directory / "generation_config.json", eos_token_id=704)
    assert "says eos_token_id 704, but the embedding has 704 rows" in only_error(validate(directory))["message"]


def test_a_special_token_that_the_vocabulary_lacks(validate, directory):
    rewrite(directory / "tokenizer_config.json", pad_token="<pad>")
    assert "names '<pad>' as pad_token" in warnings(validate(directory))[0][1]


@pytest.mark.parametrize("template", ["{% for message in messages %}", "{{ raise_exception('no users') }}"])
def test_a_broken_chat_template(validate, directory, template):
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    rewrite(directory / "tokenizer_config.json", chat_template=template)
    assert only_error(validate(directory))["group"] == "tokenizer"


# --- weights


def test_every_key_and_shape(validate, directory):
    file = shards(directory)[0]
    tensors = load_file(file)
    name = next(name for name in tensors if "proj" in name)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    tensors[name] = torch.zeros(3, 5)
    save_file(tensors, file)
    index["weight_map"]["model.layers.0.mlp.extra.weight"] = file.name
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    problem = only_error(validate(directory))
    assert problem["group"] == "weights"
    assert len(problem["details"]) == 2
    assert any("extra" in line and "unexpected" in line for line in problem["details"])
    assert any(name in line and "[3, 5]" in line for line in problem["details"])


@pytest.mark.parametrize("directory", ["lit"], indirect=True)
def test_weights_of_another_shape_than_ours_says(litgpt, validate, directory):
    config = Config.from_checkpoint(directory, n_layer=7)
    config.save(directory)
    problem = only_error(validate(directory))
    assert problem["group"] == "weights"
    assert len(problem["details"]) > 20
    assert all(line.startswith("missing: transformer.h.") for line in problem["details"])
    result = litgpt("validate", directory)
    assert result.code == 1
    assert f"... and {len(problem['details']) - 20} more (--json shows all)" in result.out
    assert result.out.endswith("The checkpoint fails: 1 error.\n")


@pytest.mark.parametrize("directory", ["one_file"], indirect=True)
def test_values_are_looked_at_on_request(validate, directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    matrices = [name for name in tensors if tensors[name].dim() == 2][:2]
    assert len(matrices) == 2
    tensors[matrices[0]][1, 3] = torch.nan
    tensors[matrices[1]].zero_()
    save_file(tensors, file)
    assert validate(directory)["valid"]
    found = validate(directory, "--check_values")["problems"]
    assert [problem["group"] for problem in found] == ["weights", "weights"]
    assert "NaN or infinite" in found[0]["message"]
    assert "zero" in found[1]["message"]
    assert [len(problem["details"]) for problem in found] == [1, 1]


@pytest.mark.parametrize("directory", ["one_file"], indirect=True)
def test_weights_that_are_no_fractions(validate, directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file)
    problem = only_error(validate(directory))
    assert problem["group"] == "weights"
    assert problem["details"] == [
        f"wrong type: {name} is int8, and config.json does not say how it is quantised",
    ]
