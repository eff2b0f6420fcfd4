"""GGUF files, made on the spot from a known model and tokenizer: what is read equals what was written."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from litgpt.config import Config
from litgpt.formats.gguf.file import GGUFFile
from litgpt.model import GPT, rope_frequencies
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.gguf import model_name
from litgpt.sources.load import load_model
from tests import shapes

TEXTS = [
    "ROMEO: But, soft! what light through yonder window breaks?",
    "  two  spaces, 12345 digits\n\n\tand don't DON'T tabs",
    "naïve café 日本語 \U0001f600 ",
    "<|im_start|>user\nHello<|im_end|>\n",
]
CONFIG = Config(
    n_layer=2,
    n_embd=64,
    n_head=4,
    n_query_groups=2,
    block_size=256,
    vocab_size=320,
    padded_vocab_size=320,
    intermediate_size=96,
    **shapes.LLAMA,
    rope_base=50000,
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE that takes digits apart, as SmolLM's does; it has tokens of several digits to tell the difference."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    assert "12" in tokenizer.get_vocab()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def permuted(tensor, heads):
    """The row order of llama.cpp's own converter: the halves of a head become neighbours."""
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def named(model):
    """The tensors of a Llama GGUF file by name, as float32 arrays."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", state["transformer.wte.weight"]
    yield "output.weight", state["lm_head.weight"]
    yield "output_norm.weight", state["transformer.ln_f.weight"]
    for i in range(CONFIG.n_layer):
        layer = f"transformer.h.{i}"
        q, k, v = np.split(state[f"{layer}.attn.qkv.weight"], [64, 96])
        yield f"blk.{i}.attn_q.weight", permuted(q, CONFIG.n_head)
        yield f"blk.{i}.attn_k.weight", permuted(k, CONFIG.n_query_groups)
        yield f"blk.{i}.attn_v.weight", v
        for theirs, ours in (
            ("attn_output", "attn.proj"),
            ("attn_norm", "norm_1"),
            ("ffn_norm", "norm_2"),
            ("ffn_gate", "mlp.fc_1"),
            ("ffn_up", "mlp.fc_2"),
            ("ffn_down", "mlp.proj"),
        ):
            yield f"blk.{i}.{theirs}.weight", state[f"{layer}.{ours}.weight"]


def add_figures(writer):
    writer.add_context_length(CONFIG.block_size)
    writer.add_embedding_length(CONFIG.n_embd)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.n_layer)
    writer.add_head_count(CONFIG.n_head)
    writer.add_head_count_kv(CONFIG.n_query_groups)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_base)
    writer.add_rope_dimension_count(CONFIG.head_size)


def add_bpe(writer, tokenizer, pre="smollm"):
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in CONTROL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")


def write(path, tensors, kind=Type.F32, settings=add_figures, tokens=None, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    settings(writer)
    if tokens:
        tokens(writer)
    for name, values in tensors:
        plain = values.ndim == 1
        writer.add_tensor(name, values if plain else gguf.quantize(values, kind), raw_dtype=Type.F32 if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plain(model, bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "Tiny-Model.F32.gguf"
    return write(path, named(model), tokens=lambda writer: add_bpe(writer, bpe))


# --- figures and weights


def test_the_configuration_is_that_of_the_metadata(plain):
    config = open_checkpoint(plain).config
    assert config == Config(**{**vars(CONFIG), "name": "Tiny-Model"})
    assert config.norm_eps == 1e-5  # and not the 32-bit number nearest to it


@pytest.mark.parametrize(
    ("kind", "tolerance", "dtype"),
    [
        (Type.F32, 0, torch.float32),
        (Type.F16, 2**-11, torch.float16),
        (Type.BF16, 2**-8, torch.bfloat16),
        (Type.Q8_0, 1 / 127, torch.float32),
        (Type.Q5_1, 1 / 31, torch.float32),
        (Type.Q4_0, 1 / 7, torch.float32),
        (Type.Q4_1, 1 / 15, torch.float32),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_weights_equal_their_source_within_quantisation(tmp_path, model, kind, tolerance, dtype):
    path = write(tmp_path / "m.gguf", named(model), kind)
    source = open_checkpoint(path)
    assert source.dtype == dtype
    expected = model.state_dict()
    layout, read = source.layout(), dict(source.weights())
    assert list(layout) == list(read)
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == (layout[name].dtype, layout[name].shape)
        error = (tensor.float() - expected[name]).abs()
        if tensor.dim() == 1:
            assert error.max() == 0
        else:
            # Blocks of 32 values share a scale, given by the largest of them.
            largest = expected[name].unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
            assert (error.unflatten(-1, (-1, 32)) <= 1.01 * tolerance * largest).all(), name


def test_logits_equal_those_of_the_source(plain, model):
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(load_model(plain)(ids), model(ids))


def test_without_a_head_the_embedding_is_tied(tmp_path, model):
    path = write(tmp_path / "m.gguf", [pair for pair in named(model) if pair[0] != "output.weight"])
    loaded = load_model(path)
    assert loaded.lm_head.weight is loaded.transformer["wte"].weight
    assert torch.equal(loaded.lm_head.weight, model.transformer["wte"].weight)


def test_llama_3_scaling_is_recognised_by_its_factors(tmp_path, model):
    rule = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    stretched = Config(**{**vars(CONFIG), "rope_adjustments": rule})
    factors = (rope_frequencies(CONFIG)[0] / rope_frequencies(stretched)[0])[0].numpy()
    assert factors.max() > 1
    path = write(tmp_path / "m.gguf", [*named(model), ("rope_freqs.weight", factors)])
    assert open_checkpoint(path).config.rope_adjustments == rule
    strange = np.linspace(1, 3, factors.size).astype(np.float32)
    path = write(tmp_path / "strange.gguf", [*named(model), ("rope_freqs.weight", strange)])
    with pytest.raises(ValueError, match="follow no known rule"):
        open_checkpoint(path)


def test_linear_and_yarn_scaling(tmp_path, model):
    def settings(kind):
        def add(writer):
            add_figures(writer)
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(64)

        return add

    config = open_checkpoint(
        write(tmp_path / "l.gguf", named(model), settings=settings(gguf.RopeScalingType.LINEAR))
    ).config
    assert (config.rope_condense_ratio, config.rope_adjustments) == (4, None)
    config = open_checkpoint(
        write(tmp_path / "y.gguf", named(model), settings=settings(gguf.RopeScalingType.YARN))
    ).config
    assert config.rope_adjustments == {"factor": 4.0, "original_max_seq_len": 64, "beta_fast": 32, "beta_slow": 1}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("smollm2-135m-instruct-q8_0.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "meta-llama/Llama-3.2-1B-Instruct"),
        ("Llama-3.2-1B-Instruct-UD-IQ2_XXS.gguf", "meta-llama/Llama-3.2-1B-Instruct"),
        ("my.model-f16.gguf", "my.model"),
        ("Qwen.gguf", "Qwen"),
    ],
)
def test_a_file_name_without_its_type_is_the_name_of_the_model(tmp_path, file, name):
    assert model_name(tmp_path / file) == name


# --- refusals


def test_every_misfit_is_listed(tmp_path, model):
    tensors = dict(named(model))
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(64, dtype=np.float32)
    tensors["output_norm.weight"] = np.zeros(32, dtype=np.float32)
    with pytest.raises(ValueError, match="3 problems") as info:
        open_checkpoint(write(tmp_path / "m.gguf", tensors.items()))
    assert "missing: blk.1.ffn_up.weight [96, 64]" in str(info.value)
    assert "unexpected: blk.0.attn_q.bias [64]" in str(info.value)
    assert "wrong shape: output_norm.weight is [32] in the file, [64] in the metadata" in str(info.value)


SURPLUS = {
    "blk.0.attn.rot_embd.weight": (8,),
    "blk.1.attn_rot_embd.weight": (8,),
    "blk.2.attn_norm.weight": (64,),  # a layer after the last
    "blk.1.nextn.eh_proj.weight": (64, 128),
    "mm.0.weight": (64, 64),
    "v_head.weight": (1, 64),
}


def test_tensors_that_the_model_has_no_place_for_are_left_out_with_a_note(tmp_path, model):
    expected = load_model(open_checkpoint(write(tmp_path / "plain.gguf", named(model)))).state_dict()
    tensors = dict(named(model)) | {name: np.ones(shape, dtype=np.float32) for name, shape in SURPLUS.items()}
    source = open_checkpoint(write(tmp_path / "m.gguf", tensors.items()))
    assert source.note == (
        "6 tensors that LlamaForCausalLM does not have are left out (blk.*.attn.rot_embd.weight, "
        "blk.*.attn_rot_embd.weight, blk.*.attn_norm.weight, blk.*.nextn.eh_proj.weight and 2 other kinds)."
    )
    found = load_model(source).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match=r"missing: blk\.1\.ffn_up\.weight"):
        open_checkpoint(write(tmp_path / "missing.gguf", tensors.items()))


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q.bias", "blk.1.attn_q_norm.weight", "blk.0.ffn_up.scale", "output.bias", "blk.0.attn_sinks.weight"],
)
def test_a_surplus_tensor_that_would_be_missed_is_refused(tmp_path, model, name):
    tensors = dict(named(model)) | {name: np.ones(64, dtype=np.float32)}
    with pytest.raises(ValueError, match=f"unexpected: {name}"):
        open_checkpoint(write(tmp_path / "m.gguf", tensors.items()))


def test_what_is_not_supported_is_refused_by_name(tmp_path, model):
    with pytest.raises(ValueError, match=r"architecture 'mamba'.*only llama"):
        open_checkpoint(write(tmp_path / "a.gguf", named(model), architecture="mamba"))

    def experts(writer):
        add_figures(writer)
        writer.add_expert_count(8)

    with pytest.raises(ValueError, match="mixture of experts"):
        open_checkpoint(write(tmp_path / "b.gguf", named(model), settings=experts))
    with pytest.raises(ValueError, match=r"lack 'llama.context_length'"):
        open_checkpoint(write(tmp_path / "c.gguf", named(model), settings=lambda writer: writer.add_head_count(4)))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, plain, share):
    content = plain.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"Cannot read .*cut\.gguf.*Download it again"):
        open_checkpoint(tmp_path / "cut.gguf")


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ValueError, match="no GGUF file"):
        open_checkpoint(tmp_path / "page.gguf")


def test_the_reader_agrees_with_that_of_the_package(plain):
    ours, theirs = GGUFFile(plain), gguf.GGUFReader(plain)
    values = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == values
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.size, mine.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert np.array_equal(mine.read().numpy(), tensor.data)


# --- the tokenizer


def test_the_tokenizer_gives_the_same_ids(plain, bpe):
    files = open_checkpoint(plain).files
    read = AutoTokenizer.from_pretrained(files)
    for text in TEXTS:
        assert read(text)["input_ids"] == bpe.encode(text).ids, text
        assert read.decode(bpe.encode(text).ids) == bpe.decode(bpe.encode(text).ids, skip_special_tokens=False)
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert read.chat_template.startswith("{% for m")
    assert read.model_max_length == 256
    assert set(CONTROL) <= set(read.all_special_tokens)


def test_the_json_files_say_what_the_metadata_say(plain):
    files = open_checkpoint(plain).files
    config, generation = (json.loads((files / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert (config["architectures"], config["rope_theta"]) == (["LlamaForCausalLM"], 50000.0)
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert generation.items() <= config.items()


def test_an_end_of_turn_token_also_ends_a_reply(tmp_path, model, bpe):
    def tokens(writer):
        add_bpe(writer, bpe)
        writer.add_eot_token_id(0)

    files = open_checkpoint(write(tmp_path / "m.gguf", named(model), tokens=tokens)).files
    assert json.loads((files / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_an_unknown_splitting_is_refused_unless_the_tokenizer_lies_beside(tmp_path, model, bpe):
    path = write(tmp_path / "m.gguf", named(model), tokens=lambda writer: add_bpe(writer, bpe, "brand-new"))
    with pytest.raises(ValueError, match=r"'brand-new'.*tokenizer\.json next to"):
        _ = open_checkpoint(path).files
    bpe.save(str(tmp_path / "tokenizer.json"))
    files = open_checkpoint(path).files
    assert Tokenizer.from_file(str(files / "tokenizer.json")).encode(TEXTS[0]).ids == bpe.encode(TEXTS[0]).ids
    (tmp_path / "alone").mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        _ = open_checkpoint(write(tmp_path / "alone" / "m.gguf", named(model))).files


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory, page_of_text):
    """A real sentencepiece BPE with bytes to fall back to, as Llama 2's is."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    corpus = prefix.with_suffix(".txt")
    corpus.write_text(page_of_text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def test_a_sentencepiece_vocabulary_gives_the_same_ids(tmp_path, model, sentencepiece_model, page_of_text):
    processor = sentencepiece_model
    size = processor.vocab_size()

    def kind(i):
        if processor.is_unknown(i):
            return TokenType.UNKNOWN
        if processor.is_control(i):
            return TokenType.CONTROL
        return TokenType.BYTE if processor.is_byte(i) else TokenType.NORMAL

    def tokens(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([processor.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([processor.get_score(i) for i in range(size)])
        writer.add_token_types([kind(i) for i in range(size)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    assert size == 800
    files = open_checkpoint(write(tmp_path / "m.gguf", named(model), tokens=tokens)).files
    read = AutoTokenizer.from_pretrained(files)
    for text in [*TEXTS[:3], page_of_text, "the window", " the", "light  light", "x" * 50, "\n"]:
        expected = processor.encode(text)
        assert read(text)["input_ids"] == [1, *expected], text
        assert read.decode(expected) == processor.decode(expected)
