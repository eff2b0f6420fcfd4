"""Files that somebody made to hurt: each ends in one clean error that names the file, before it takes time or memory.

`tests/fuzz` looks for more of them.
"""

import io
import json
import os
import shutil
import struct
import zipfile

import pytest
import torch
import yaml

from litgpt.prompts import choose_prompt_style
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model
from litgpt.sources.peft import import_peft
from litgpt.tokenizer.tokenizer import Tokenizer
from tests.fuzz import seeds

pytestmark = pytest.mark.timeout(60)  # what is believed here takes minutes, or all memory
DEEP = "[" * 100_000
BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {q: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 20)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return seeds.make(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def copy(originals, tmp_path):
    """A copy of a checkpoint, to damage."""

    def make(kind):
        original = originals[kind]
        return (shutil.copytree if original.is_dir() else shutil.copy)(original, tmp_path / original.name)

    return make


@pytest.fixture
def refused(originals):
    """What is said of a checkpoint, which everything is done with that reads its files."""

    def use(path, kind):
        if kind == "peft":
            import_peft(path, open_checkpoint(originals["lit"]))
        source = open_model(path)
        load_model(source)
        tokenizer = Tokenizer(source.files)
        tokenizer.decode(tokenizer.encode_ids("Hello, world!"))
        choose_prompt_style(source.files, config=source.config, tokenizer=tokenizer).apply("Hello")

    def message(path, kind=None):
        with pytest.raises(ValueError) as caught:
            use(path, kind)
        assert len(str(caught.value)) < 4000
        return str(caught.value)

    return message


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


# --- JSON

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [DEEP, '{"a":' * 100_000, "[1]", "", b'{"a": "\xff"}', '{"a": 1' + "0" * 5000 + "}"],
    ids=["lists", "objects", "list", "empty", "bytes", "integer"],
)
def test_json_that_is_no_object_is_named(copy, refused, name, content):
    directory = copy("hf")
    (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert name in refused(directory)


def test_large_json_is_not_read(copy, refused):
    directory = copy("hf")
    with (directory / "config.json").open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(10**12)  # takes no space on the disk
    assert "config.json' has 1,000,000,000,000 bytes" in refused(directory)


def test_many_values_are_not_made(copy, refused):
    directory = copy("hf")
    (directory / "config.json").write_text('{"a": [' + "[]," * 5_000_000 + "1]}")
    assert "values" in refused(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": 3}, "text_config is a number"),
        ({"architectures": 3}, "architectures is 3"),
        ({"architectures": [["a"]]}, "architectures is"),
        ({"hidden_size": "x", "head_dim": None}, "n_embd='x'"),
        ({"num_attention_heads": 0, "head_dim": None}, "head_dim does not follow"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers is inf"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers is an integer of"),
        ({"num_hidden_layers": 9000}, "9,000 layers"),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
        ({"hidden_size": 10**12, "intermediate_size": 10**12}, "1000000000000"),
        ({"vocab_size": 10**9}, "wrong shape"),
        ({"rope_theta": "x"}, "'x'"),
        ({"rope_scaling": [1]}, "rope_scaling is a list"),
        ({"rope_scaling": {"rope_type": ["a"], "factor": 2}}, "rope type is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "factor='x'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 0}}, "beta_fast=0"),
        ({"hidden_act": ["x"]}, "hidden_act=['x']"),
        ({"tie_word_embeddings": "x"}, "tie_embeddings='x'"),
        ({"quantization_config": [1]}, "quantization_config is a list"),
        ({"num_nextn_predict_layers": 10**12}, "num_nextn_predict_layers is"),
    ],
)
def test_entries_of_config_json_are_what_they_should_be(copy, refused, changes, message):
    directory = copy("hf")
    edit(directory / "config.json", **changes)
    said = refused(directory)
    assert message in said
    assert str(directory) in said


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("generation_config.json", {"eos_token_id": float("nan")}),
        ("generation_config.json", {"eos_token_id": [[1]]}),
        ("generation_config.json", {"eos_token_id": True}),
        ("generation_config.json", {"eos_token_id": 10**12}),
        ("generation_config.json", {"text_config": 3}),
        ("tokenizer_config.json", {"eos_token": {"content": 3}}),
        ("tokenizer_config.json", {"eos_token": {"content": "a", "lstrip": "b"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [3]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000000000000": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}),
    ],
)
def test_tokens_are_texts_with_ids(copy, refused, name, changes):
    directory = copy("hf")
    edit(directory / name, **changes)
    assert name in refused(directory)


def test_a_negative_id_is_none(copy):
    directory = copy("hf")
    edit(directory / "generation_config.json", eos_token_id=[-1, 2], bos_token_id=-1)
    tokenizer = Tokenizer(directory)
    assert tokenizer.stop_ids == {0, 2}
    assert tokenizer.bos_id is None


@pytest.mark.parametrize("template", [[1, 2], {"default": 3}, [{"name": "default"}], 7])
def test_chat_templates_are_texts(copy, refused, template):
    directory = copy("hf")
    (directory / "prompt_style.yaml").unlink()
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    edit(directory / "tokenizer_config.json", chat_template=template)
    assert "tokenizer_config.json is damaged" in refused(directory)


# --- YAML


@pytest.mark.parametrize("name", ["model_config.yaml", "prompt_style.yaml"])
@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        "a:\n" * 3 + BOMB,
        BOMB,
        MERGE_BOMB,
        "a: &a\n  b: *a\n",
        "n_layer: 2024-99-99",
        "n_layer: " + "9" * 5000,
        "[1]",
        "",
    ],
    ids=["deep", "twice", "aliases", "merges", "itself", "date", "integer", "list", "empty"],
)
def test_yaml_stands_for_no_more_than_it_says(copy, refused, name, content):
    directory = copy("lit")
    (directory / name).write_text(content)
    assert name in refused(directory)


def test_large_yaml_is_not_read(copy, refused):
    directory = copy("lit")
    (directory / "model_config.yaml").write_text("n_layer: 2\n" + "# a\n" * 500_000)
    assert "model_config.yaml' has 2,000,011 bytes" in refused(directory)


def test_yaml_may_say_a_thing_twice(copy):
    directory = copy("lit")
    content = yaml.safe_load((directory / "model_config.yaml").read_text())
    shared = [1, 0]
    content |= {
        "sliding_window_size": 4,
        "sliding_window_indices": shared,
        "rope_local_base_freq": 1e4,
        "rope_indices": shared,
    }
    (directory / "model_config.yaml").write_text(yaml.safe_dump(content))
    assert "&id" in (directory / "model_config.yaml").read_text()
    assert open_checkpoint(directory).config.rope_indices == shared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**8}, "n_layer=100000000"),
        ({"n_layer": 9000}, "9,000 layers"),
        ({"n_layer": float("nan")}, "n_layer=nan"),
        ({"norm_eps": float("inf")}, "norm_eps=inf"),
        ({"n_embd": 10**12}, "n_embd=1000000000000"),
        ({"head_size": 10**12}, "head_size=1000000000000"),
        ({"padded_vocab_size": 2**30, "n_embd": 2**20}, "wrong shape"),
        ({"mlp_class_name": "LLaMAMoE", "n_expert": 10**8, "n_expert_per_token": 1}, "n_expert=100000000"),
        ({"mlp_class_name": "LLaMAMoE", "n_expert": 9000, "n_expert_per_token": 1}, "parameters"),
        ({"name": ["a"]}, "name=['a']"),
        ({"rope_adjustments": {"factor": "x"}}, "factor='x'"),
        ({"rope_adjustments": {"factor": 0}}, "factor=0"),
        ({"latent_attention": {"q_lora_rank": True}}, "q_lora_rank=True"),
    ],
)
def test_figures_of_model_config_are_bounded_by_the_weights(copy, refused, changes, message):
    directory = copy("lit")
    content = yaml.safe_load((directory / "model_config.yaml").read_text())
    (directory / "model_config.yaml").write_text(yaml.safe_dump({**content, **changes}))
    said = refused(directory)
    assert message in said
    assert "model_config.yaml" in said


# --- the index


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "../outside.safetensors", "a/../../b", "C:\\a", "a\0b", "", 3, [3]]
)
def test_an_index_names_files_in_its_directory(copy, refused, name):
    directory = copy("hf")
    shutil.copy(min(directory.glob("*.safetensors")), directory.parent / "outside.safetensors")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][min(content["weight_map"])] = name
    index.write_text(json.dumps(content))
    assert "model.safetensors.index.json' is not a valid weight index" in refused(directory)


def test_files_may_be_links_to_elsewhere(copy, tmp_path):
    """As in the Hub's cache: snapshots/COMMIT/FILE -> ../../blobs/HASH."""
    directory, blobs = copy("hf"), tmp_path / "blobs"
    blobs.mkdir()
    snapshot = tmp_path / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in directory.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        link = snapshot / file.relative_to(directory)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert load_model(snapshot).config.n_layer == 2


# --- safetensors


def rewrite_header(file, change):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    text = change(header) or json.dumps(header)
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw[8 + length :])


def first_entry(**changes):
    return lambda header: header[min(header)].update(changes)


def overlap(header):
    one, other = sorted(header)[:2]
    header[one] = header[other]


def leave_gap(header):
    del header[min(header)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: DEEP, "nested more than"),
        (lambda header: "[1]", "a list"),
        (lambda header: '{"a": 3}', "the type of 'a'"),
        (lambda header: json.dumps(header)[:-1] + "," + json.dumps(header)[1:], "key twice"),
        (overlap, "overlaps"),
        (leave_gap, "gap"),
        (first_entry(shape=[-1, -2]), "shape"),
        (first_entry(shape=[True, 5]), "shape"),
        (first_entry(shape=[2.0]), "shape"),
        (first_entry(shape="ab"), "shape"),
        (first_entry(shape=[2**62, 2**62]), "shape"),
        (first_entry(shape=[0, 2**70]), "shape"),
        (first_entry(shape=[1] * 1000), "shape"),
        (first_entry(data_offsets=[0.0, 1e3]), "offsets"),
        (first_entry(data_offsets=[False, True]), "offsets"),
        (first_entry(data_offsets=[-4, 4]), "offsets"),
        (first_entry(data_offsets=[0, 2**70]), "offsets"),
        (first_entry(dtype=["F32"]), "type"),
        (first_entry(dtype="F31"), "type"),
    ],
)
def test_a_safetensors_header_is_checked_before_it_is_believed(copy, refused, change, message):
    directory = copy("hf")
    file = max(directory.glob("*.safetensors"))
    rewrite_header(file, change)
    said = refused(directory)
    assert message in said
    assert file.name in said


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, (10**15).to_bytes(8, "little") + b"{}", b"\2" + b"\0" * 7 + b"{}x"]
)
def test_a_safetensors_file_is_as_long_as_its_header_says(copy, refused, content):
    directory = copy("hf")
    file = max(directory.glob("*.safetensors"))
    file.write_bytes(content)
    assert file.name in refused(directory)


# --- pickles


class Command:
    """Runs a command where a pickle of it is loaded."""

    def __reduce__(self):
        return os.system, ("exit 3",)


def test_a_pickle_names_nothing_to_run(copy, refused):
    directory = copy("bin")
    torch.save({"a": Command()}, directory / "pytorch_model.bin")
    assert "holds other Python objects than tensors" in refused(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: torch.zeros(1).expand(tensor.shape), "not a plain tensor"),
        (lambda tensor: tensor.to_sparse(), "not a plain tensor"),
        (lambda tensor: tensor.to("meta"), "not a plain tensor"),
    ],
)
def test_tensors_have_their_values_in_the_file(copy, refused, change, message):
    directory = copy("bin")
    file = directory / "pytorch_model.bin"
    torch.save({name: change(tensor) for name, tensor in torch.load(file).items()}, file)
    assert message in refused(directory)


def test_one_tensor_does_not_stand_for_many(copy, refused):
    directory = copy("bin")
    same = torch.zeros(1000)
    torch.save({str(number): same for number in range(1000)}, directory / "pytorch_model.bin")
    assert "would have 4,000,000 bytes" in refused(directory)


def test_tensors_have_names(copy, refused):
    directory = copy("bin")
    torch.save({1: torch.zeros(2)}, directory / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(directory)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_records_of_an_archive_are_as_torch_writes_them(copy, refused, compression):
    """Compressed ones may be bombs, and are mapped as if they were not; short ones have other tensors behind them."""
    directory = copy("bin")
    file = directory / "pytorch_model.bin"
    buffer = io.BytesIO()
    with zipfile.ZipFile(file) as given, zipfile.ZipFile(buffer, "w", compression) as changed:
        for name in given.namelist():
            content = given.read(name)
            changed.writestr(name, content[:16] if "/data/" in name else content)
    file.write_bytes(buffer.getvalue())
    assert "pytorch_model.bin" in refused(directory)


def test_a_pickle_that_torch_quotes_at_length(copy, refused):
    directory = copy("bin")
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02c" + b"a" * 500_000 + b"\nb\n.")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    assert "holds other Python objects than tensors" in refused(directory)


@pytest.mark.parametrize("content", [b"", b"PK\5\6" + b"\0" * 18, b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b"."])
def test_a_pickle_may_be_anything(copy, refused, content):
    directory = copy("bin")
    (directory / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refused(directory)


# --- adapters


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"unknown": 1}},
        {"lora": {"r": 10**12}},
        {"lora": {"r": "x"}},
        {"lora": {"r": True}},
        {"lora": {"alpha": float("nan")}},
        {"lora": [1]},
        {"base": [1]},
    ],
)
def test_lora_says_what_it_is(copy, refused, changes):
    directory = copy("lora")
    file = directory / "lit_model.pth.lora"
    torch.save({**torch.load(file), **changes}, file)
    assert "lit_model.pth.lora" in refused(directory)


@pytest.mark.parametrize("content", [DEEP, BOMB, "[1]", "", "lora_r: x", "lora_r: 4\ncheckpoint_dir: [1]"])
def test_hyperparameters_say_it_where_lora_does_not(copy, refused, content):
    directory = copy("lora")
    file = directory / "lit_model.pth.lora"
    torch.save(torch.load(file)["model"], file)
    (directory / "hyperparameters.yaml").write_text(content)
    assert str(directory) in refused(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_dropout": [1]}, "lora_dropout=[1]"),
        ({"alpha_pattern": [1]}, "alpha_pattern=[1]"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern '('"),
        ({"alpha_pattern": {"((.*)*)*x": 1}}, "could take for ever"),
        ({"alpha_pattern": {"(a|a)*x": 1}}, "could take for ever"),
        ({"bias": [1]}, "bias=[1]"),
    ],
)
def test_a_peft_adapter_says_what_it_is(copy, refused, changes, message):
    directory = copy("peft")
    edit(directory / "adapter_config.json", **changes)
    assert message in refused(directory, "peft")


@pytest.mark.parametrize("content", [DEEP, "[]", "", b"\xff"], ids=["deep", "list", "empty", "bytes"])
def test_an_adapter_config_is_json(copy, refused, content):
    directory = copy("peft")
    (directory / "adapter_config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert "adapter_config.json" in refused(directory, "peft")


# --- tokenizers


def pre_tokenizer(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def replacing(kind, parts, **pattern):
    step = {"type": "Replace", "pattern": pattern, "content": "a" * 100}
    return {kind: {"type": "Sequence", parts: [step] * 10}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (pre_tokenizer("(a+)+$"), "could take for ever"),
        (replacing("decoder", "decoders", String="a"), "ever longer"),
        (replacing("decoder", "decoders", String=""), "ever longer"),
        (replacing("normalizer", "normalizers", Regex="."), "ever longer"),
    ],
)
def test_a_tokenizer_takes_no_time_out_of_proportion(copy, refused, changes, message):
    directory = copy("hf")
    edit(directory / "tokenizer.json", **changes)
    assert message in refused(directory)


# --- GGUF


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def number(value):
    return struct.pack("<II", 4, value)


def named(architecture="llama"):
    return [("general.architecture", struct.pack("<I", 8) + text(architecture))]


def write_gguf(file, pairs=(), tensors=(), counts=None, body=b"\0" * 64):
    parts = [b"GGUF", struct.pack("<IQQ", 3, *(counts or (len(tensors), len(pairs))))]
    parts += [text(key) + value for key, value in pairs]
    for name, dimensions, kind, offset in tensors:
        parts += [text(name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts += [struct.pack("<IQ", kind, offset)]
    file.write_bytes(b"".join(parts) + body)


ARRAY, NESTED = struct.pack("<I", 9), struct.pack("<IQ", 9, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairs": [*named(), ("general.alignment", number(0))]}, "general.alignment is 0"),
        ({"pairs": [*named(), ("general.alignment", number(24))]}, "general.alignment is 24"),
        ({"pairs": [*named(), ("general.alignment", struct.pack("<I", 8) + text("x"))]}, "general.alignment is 'x'"),
        ({"pairs": [("general.architecture", number(3))]}, "general.architecture is 3"),
        ({"pairs": [("general.architecture", ARRAY + struct.pack("<IQI", 4, 1, 3))]}, "general.architecture is [3]"),
        ({"pairs": [("a", ARRAY + NESTED * 100_000)]}, "array in its metadata is of arrays"),
        ({"pairs": [("a", ARRAY + struct.pack("<IQ", 4, 2**60))]}, "values in an array"),
        ({"pairs": [("a", ARRAY + struct.pack("<IQ", 8, 2**60))]}, "values in an array"),
        ({"pairs": [("a", struct.pack("<IQ", 8, 2**63))]}, "bytes in a string"),
        ({"pairs": [("a", struct.pack("<I", 77))]}, "unknown type 77"),
        ({"pairs": named() * 2}, "comes twice"),
        ({"pairs": named(), "counts": (2**60, 1)}, "tensors"),
        ({"pairs": named(), "counts": (0, 2**60)}, "metadata"),
        ({"pairs": named(), "counts": (10**6, 1)}, "truncated"),
        ({"pairs": [*named(), ("split.count", struct.pack("<I", 8) + text("x"))]}, "split.count is 'x'"),
        ({"pairs": [*named(), ("split.count", number(3))]}, "one of several parts"),
        ({"pairs": named(), "tensors": [("a", [2**40, 2**40], 0, 0)]}, "shape of 'a'"),
        ({"pairs": named(), "tensors": [("a", [1] * 100, 0, 0)]}, "100 dimensions"),
        ({"pairs": named(), "tensors": [("a", [], 0, 0)]}, "shape of 'a'"),
        ({"pairs": named(), "tensors": [("a", [0, 2**63], 0, 0)]}, "shape of 'a'"),
        ({"pairs": named(), "tensors": [("a", [33], 8, 0)]}, "shape of 'a'"),
        ({"pairs": named(), "tensors": [("a", [4], 0, 0), ("b", [4], 0, 0)]}, "offset of 'b'"),
        ({"pairs": named(), "tensors": [("a", [4], 0, 0), ("a", [4], 0, 32)]}, "comes twice"),
        ({"pairs": named(), "tensors": [("a", [4], 0, 3)]}, "offset of 'a'"),
        ({"pairs": named(), "tensors": [("a", [4], 0, 2**62)]}, "truncated"),
        ({"pairs": named(), "tensors": [("a", [4], 999, 0)]}, "999"),
        ({"pairs": named(), "tensors": [("token_embd.weight", [4], 0, 0)]}, "metadata lack"),
    ],
)
def test_a_gguf_header_is_checked_before_it_is_believed(tmp_path, refused, given, message):
    file = tmp_path / "a.gguf"
    write_gguf(file, **given)
    said = refused(file)
    assert message in said
    assert "a.gguf" in said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", struct.pack("<I", 10**8), "n_layer=100000000"),
        ("llama.block_count", struct.pack("<I", 9000), "9,000 layers"),
        ("llama.attention.head_count", struct.pack("<I", 0), "wrong kind"),
        ("llama.embedding_length", struct.pack("<I", 2**32 - 1), "of 2147483647 values"),
        ("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", float("nan")), "norm_eps=nan"),
        ("tokenizer.ggml.eos_token_id", struct.pack("<I", 2**32 - 1), "number 4,294,967,295"),
    ],
)
def test_figures_of_a_gguf_file_are_bounded_by_its_tensors(copy, refused, key, value, message):
    file = copy("gguf")
    raw = bytearray(file.read_bytes())
    place = raw.index(text(key)) + len(text(key)) + 4
    raw[place : place + 4] = value
    file.write_bytes(raw)
    assert message in refused(file)
