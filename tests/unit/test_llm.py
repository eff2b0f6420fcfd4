"""`LLM`, the Python API: what it answers, that it is a module like any other, and that its answers are of today's weights."""

import copy
import gc
import inspect
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import litgpt.api
import pytest
import torch
import torch.nn.functional as F

from litgpt import LLM, PromptStyle, Tokenizer
from litgpt.adaptation.adapter import apply_adapter, apply_adapter_v2, is_adapter, is_adapter_v2, save_adapter
from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, lora_layers, merge_lora, save_lora
from litgpt.checkpoint import WEIGHTS, copy_companion_files
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.llm.loading import LoadOptions, load_parts
from litgpt.llm.reply import ChatSettings, GenerateSettings, SamplingSettings
from litgpt.prompts import save_prompt_style
from litgpt.sources.load import load_model
from tests import checkpoint_files


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoint_files.chat_model(tmp_path_factory.mktemp("chat") / "org" / "tiny")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return checkpoint_files.bare_model(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def llm(directory):
    return LLM.load(directory, precision="32-true")


@pytest.fixture
def trained(directory):
    return LLM.load(directory, distribute=None)


def fresh_answer(llm: LLM, prompt: str, count: int = 8) -> str:
    """What an engine says that never ran before."""
    ids = llm.codec.encode([{"role": "user", "content": prompt}])
    return llm.tokenizer.decode(Engine(copy.deepcopy(llm.model).eval()).complete([Request(ids, count, Sampling(0))])[0])


def greedy(llm: LLM, prompt="Hello", count: int = 8, **options):
    return llm.generate(prompt, top_k=1, max_new_tokens=count, **options)


# --- answers


def test_one_prompt_several_a_stream_and_token_ids_are_one_answer(llm):
    text = greedy(llm)
    assert text == fresh_answer(llm, "Hello") != ""
    ids = greedy(llm, return_as_token_ids=True)
    assert ids.dtype == torch.int64
    assert ids.shape == (8,)
    assert llm.tokenizer.decode(ids) == text
    assert "".join(greedy(llm, stream=True)) == text
    assert list(greedy(llm, stream=True, return_as_token_ids=True)) == ids.tolist()
    several = greedy(llm, ["Hello", "How are you?", "Hello"])
    assert several == [text, fresh_answer(llm, "How are you?"), text]
    assert [a.tolist() for a in greedy(llm, ["Hello"], return_as_token_ids=True)] == [ids.tolist()]
    assert llm.generate("Hello", temperature=0, max_new_tokens=8) == text
    assert greedy(llm, []) == []


def test_a_conversation_goes_on(llm):
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    first = llm.chat(messages, top_k=1, max_new_tokens=8)
    assert first == greedy(llm, sys_prompt="Be brief") != greedy(llm)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And?"}]
    ids = llm.codec.encode(messages)
    second = llm.tokenizer.decode(Engine(llm.model).complete([Request(ids, 8, Sampling(0))])[0])
    assert llm.chat(messages, top_k=1, max_new_tokens=8) == second != first
    assert "".join(llm.chat(messages, top_k=1, max_new_tokens=8, stream=True)) == second
    assert llm.tokenizer.decode(llm.chat(messages, top_k=1, max_new_tokens=8, return_as_token_ids=True)) == second


def test_a_model_without_turns_goes_on_with_the_text(bare):
    llm, tokenizer = LLM.load(bare, precision="32-true"), Tokenizer(bare)
    ids = tokenizer.encode_ids("To be, or not")
    answer = Engine(llm.model).complete([Request(ids, 8, Sampling(0))])[0]
    assert "To be, or not" + greedy(llm, "To be, or not") == tokenizer.decode([*ids, *answer])


def test_seeds_decide_what_is_drawn(llm):
    def draw(prompt="Hello", **options):
        return llm.generate(prompt, max_new_tokens=8, temperature=1.5, **options)

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(["Hello", "Hello"], seed=1) == [draw(seed=1), draw(seed=2)]
    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert draw() == first != draw()
    assert draw(seed=1, top_p=0.0) == draw(seed=1, min_p=1.0) == greedy(llm)


def test_stop_texts_end_an_answer(llm):
    whole = greedy(llm, count=16)
    stop = re.search(r"[ -~]{2}", whole[1:])[0]
    before = whole[: whole.index(stop)]
    assert greedy(llm, count=16, stop=stop) == before
    assert greedy(llm, count=16, stop=["never", stop]) == before
    assert "".join(greedy(llm, count=16, stop=stop, stream=True)) == before
    ids = greedy(llm, count=16, stop=stop, return_as_token_ids=True)
    assert stop in llm.tokenizer.decode(ids)
    assert stop not in llm.tokenizer.decode(ids[:-1])
    assert greedy(llm, count=16) == whole
    assert llm.engine.running == 0


def test_a_stream_that_is_left_frees_its_slot(llm):
    stream = llm.generate("Hello", max_new_tokens=200, stream=True)
    next(stream)
    stream.close()
    assert greedy(llm) == fresh_answer(llm, "Hello")
    assert llm.engine.running == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "Hi", "temperature": -1}, "temperature -1 is not valid"),
        ({"prompt": "Hi", "max_new_tokens": 0}, "max_new_tokens 0 is not valid"),
        ({"prompt": "word " * 600}, "model's context of 512 tokens"),
        ({"prompt": ["Hi", "word " * 600]}, "model's context of 512 tokens"),
        ({"prompt": ["Hi"], "stream": True}, "stream=True takes one prompt"),
        ({"prompt": None}, "prompt is None: give a text, or a list of texts"),
        ({"prompt": "Hi", "seed": 2**70}, "seed 1180591620717411303424 is not valid"),
        ({"prompt": "Hi", "stop": [3]}, "stop 3 is not valid"),
        ({"prompt": "Hi", "stop": 3}, "stop 3 is not valid"),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, "give a text, or a list of texts; chat takes messages"),
    ],
)
def test_what_cannot_be_answered_is_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(**options)
    assert not llm.engine.busy


@pytest.mark.parametrize(("method", "settings"), [(LLM.generate, GenerateSettings), (LLM.chat, ChatSettings)])
def test_the_settings_by_name_are_the_arguments(method, settings):
    parameters = inspect.signature(method).parameters
    form = {"self", "prompt", "messages", "return_as_token_ids", "stream"}
    assert set(settings.__annotations__) == set(parameters) - form
    chosen = {name: parameters[name].default for name in SamplingSettings.__annotations__}
    assert Sampling(**chosen) == Sampling()  # what benchmark takes by default is what generate does


def test_the_prompt_style_may_be_replaced(directory):
    llm = LLM.load(directory, precision="32-true", prompt_style="alpaca")
    assert type(llm.prompt_style).__name__ == "Alpaca"
    other = greedy(llm)
    llm.prompt_style = PromptStyle.from_name("chatml")
    assert greedy(llm) == fresh_answer(llm, "Hello") != other


def test_many_threads_join_one_batch(directory):
    llm = LLM.load(directory, precision="32-true")
    prompts = [f"Number {i}" for i in range(8)]
    expected = [fresh_answer(llm, prompt, 24) for prompt in prompts]
    together, step, gate = [], llm.engine.step, threading.Barrier(8)

    def counted():
        together.append(llm.engine.running + llm.engine.waiting)
        return step()

    llm.engine.step = counted

    def ask(prompt):
        gate.wait()
        return greedy(llm, prompt, 24)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, prompts)) == expected
    assert max(together) > 3
    assert len(together) < 4 * 24  # one after the other would take 8 times 24


def test_a_stream_that_is_open_when_the_program_ends_is_left_quietly(directory):
    program = f"""
from litgpt import LLM
stream = LLM.load({str(directory)!r}).generate("Hi", stream=True, max_new_tokens=100)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_the_benchmark_measures_every_iteration_from_the_beginning(llm):
    steps = []
    prefill = llm.engine._prefill
    llm.engine._prefill = lambda: (
        steps.append(sum(len(s.request.prompt) - s.num_prefilled for s in llm.engine._prefilling)),
        prefill(),
    )[1]
    answer, figures = llm.benchmark(num_iterations=3, prompt="Hello", top_k=1, max_new_tokens=8, stream=True)
    del llm.engine._prefill
    assert answer == greedy(llm)
    assert {len(values) for values in figures.values()} == {3}
    assert figures["Tokens generated"] == [8] * 3
    for total, first, speed in zip(
        *(figures[n] for n in ("Seconds total", "Seconds to first token", "Inference speed in tokens/sec")), strict=True
    ):
        assert 0 < first < total
        assert speed == pytest.approx(8 / total)
    assert min(figures["Peak memory in GB"]) > 0.05
    length = len(llm.codec.encode([{"role": "user", "content": "Hello"}]))
    assert [step for step in steps if step] == [length] * 3  # nothing was known from the iteration before
    two, figures = llm.benchmark(prompt=["Hello", "Hi"], top_k=1, max_new_tokens=8)
    assert two == [answer, greedy(llm, "Hi")]
    assert figures["Tokens generated"] == [16]
    with pytest.raises(ValueError, match="num_iterations=0"):
        llm.benchmark(0)


# --- a module like any other


def batch(llm: LLM) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(3, 700, (2, 12))


def test_forward_gives_logits_and_the_mean_loss_of_the_next_tokens(trained):
    ids = batch(trained)
    logits = trained(ids)
    assert logits.shape == (2, 12, 704)
    targets = ids.clone()
    targets[0, :5] = -100
    again, loss = trained(ids, targets)
    assert torch.equal(again, logits)
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    torch.testing.assert_close(loss, reference)
    weights = list(trained.parameters())
    ours, theirs = (torch.autograd.grad(value, weights) for value in (loss, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    seen = trained(ids, targets, loss_fn=lambda a, b: (a.shape, b.tolist()))[1]
    assert seen == ((2, 11, 704), targets[:, 1:].tolist())
    assert trained(ids, torch.full_like(ids, -100))[1] == 0
    with pytest.raises(ValueError, match=r"target_ids \[2, 11\]"):
        trained(ids, ids[:, 1:])


def step(optimizer_class, **settings):
    def change(llm):
        optimizer = optimizer_class(llm.parameters(), lr=0.05, **settings)
        ids = batch(llm)
        llm.train()
        llm(ids, ids)[1].backward()
        optimizer.step()

    return change


def step_of_the_gpt_alone(llm):
    """In evaluation mode, with an optimizer that does not count up the tensors' versions, and without calling `llm`."""
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=0.05, fused=True)
    llm.model.eval()
    llm.model(batch(llm)).square().mean().backward()
    optimizer.step()


def step_without_a_trace(llm):
    llm.train()
    ids = batch(llm)
    llm(ids, ids)[1].backward()
    for p in llm.parameters():
        p.data -= p.grad


def load_others(llm):
    llm.load_state_dict({name: tensor.flip(0) for name, tensor in llm.state_dict().items()})


def assign_others(llm):
    llm.load_state_dict({name: tensor.flip(0) for name, tensor in llm.state_dict().items()}, assign=True)


CHANGES = {
    "SGD": step(torch.optim.SGD),
    "AdamW": step(torch.optim.AdamW, foreach=False),
    "AdamW foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "of the GPT alone": step_of_the_gpt_alone,
    "through .data": step_without_a_trace,
    "load_state_dict": load_others,
    "load_state_dict assign": assign_others,
    "bfloat16": lambda llm: llm.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_is_of_the_weights_as_they_are(trained, change):
    prompt = "To be, or not to be, that is the question"
    before = greedy(trained, prompt)
    CHANGES[change](trained)
    after = greedy(trained, prompt)
    assert after == fresh_answer(trained, prompt)
    assert change == "bfloat16" or after != before
    CHANGES[change](trained)
    assert greedy(trained, prompt) == fresh_answer(trained, prompt)


def test_without_a_change_what_is_known_is_not_read_again(llm):
    engine, seen = llm.engine, []
    request = llm.codec.request(llm.codec.encode([{"role": "user", "content": "Hello there"}]), 4, Sampling(0))
    for _ in range(2):
        seen.append([output.cached_tokens for output in llm.worker.generate(request)][-1])
    assert seen == [0, len(request.prompt) - 1]
    with torch.no_grad():
        llm(torch.tensor([request.prompt]))
    assert llm.engine is engine


@pytest.mark.parametrize("messages", ["Hi", ["Hi"]])
def test_chat_says_what_messages_are(llm, messages):
    with pytest.raises(ValueError, match=r"give a list of messages, as \[\{'role': 'user', 'content': 'Hello'\}\]"):
        llm.chat(messages)


def test_a_stream_says_why_it_ended(llm):
    ids = llm.codec.encode([{"role": "user", "content": "Hello there"}])

    def stream(**changes):
        stream, tokens = llm.live.stream(replace(llm.codec.request(ids, 30, Sampling(0, seed=5)), **changes)), []
        while True:
            try:
                tokens.append(next(stream))
            except StopIteration as end:
                return tokens, end.value

    whole, reason = stream()
    assert (len(whole), reason) == (30, "length")
    assert stream(stops=[[whole[17]]]) == (whole[: whole.index(whole[17])], "stop")


def test_answers_are_given_in_evaluation_mode_and_training_goes_on(trained):
    apply_lora(trained.model, LoRASettings(dropout=0.5))
    with torch.no_grad():
        for layer in lora_layers(trained.model):
            layer.lora_B.normal_(std=0.1)
    trained.train()
    trained.model.transformer.h[0].eval()
    modes = [module.training for module in trained.modules()]
    assert True in modes
    assert False in modes
    assert greedy(trained) == fresh_answer(trained, "Hello") == greedy(trained)
    stream = greedy(trained, stream=True)
    next(stream)
    assert not any(module.training for module in trained.model.modules())
    stream.close()
    assert [module.training for module in trained.modules()] == modes


def test_a_state_dict_has_the_names_of_a_checkpoint(trained, directory):
    weights = trained.state_dict()
    assert weights.keys() == trained.model.state_dict().keys()
    outer = torch.nn.Module()
    outer.llm = trained
    assert "llm.lm_head.weight" in outer.state_dict()
    outer.load_state_dict({name: tensor * 2 for name, tensor in outer.state_dict().items()})
    assert torch.equal(trained.model.lm_head.weight, load_model(directory).lm_head.weight * 2)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        trained.load_state_dict({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"})


def test_trainer_setup_takes_a_trainers_checkpoint(trained, tmp_path):
    changed = {f"llm.{name}": tensor + 1 for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": changed, "epoch": 3}, tmp_path / "last.ckpt")
    trained.trainer_setup()
    trained.trainer_setup(tmp_path / "last.ckpt")
    assert torch.equal(trained.model.lm_head.weight, changed["llm.lm_head.weight"])
    del changed["llm.lm_head.weight"]
    torch.save({"state_dict": changed}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        trained.trainer_setup(tmp_path / "last.ckpt")


def test_a_copy_stands_alone(trained):
    before = greedy(trained)
    twin = copy.deepcopy(trained)
    load_others(twin)
    assert greedy(twin) == fresh_answer(twin, "Hello") != before
    assert greedy(trained) == before


def test_what_nobody_holds_any_more_is_freed(directory):
    def engines():
        gc.collect()
        return [thread for thread in threading.enumerate() if thread.name == "litgpt-engine"]

    before = engines()
    llm = LLM.load(directory)
    greedy(llm)
    load_others(llm)
    greedy(llm)
    assert len(engines()) == len(before) + 1
    del llm
    assert engines() == before


# --- loading, moving, saving


def test_it_is_found_under_both_names_and_says_what_it_loads(directory, capfd):
    assert litgpt.api.LLM is LLM
    llm = LLM.load(str(directory), precision="bf16-true")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "Loading tiny-random (bf16-true, cpu)\n"
    assert (llm.name, llm.device.type, llm.training) == ("tiny-random", "cpu", False)
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}
    assert llm.config.n_layer == 2


def test_to_be_trained_it_stays_as_it_is_in_float32(trained):
    assert trained.training
    assert {(p.dtype, p.device.type, p.requires_grad) for p in trained.parameters()} == {(torch.float32, "cpu", True)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zero"}, "init='zero'"),
        ({"distribute": "all"}, "distribute='all'"),
        ({"distribute": None, "precision": "32-true"}, "precision='32-true' cannot be combined with distribute=None"),
        ({"distribute": None, "quantize": "bnb.nf4"}, "quantize='bnb.nf4' cannot be combined with distribute=None"),
        ({"init": "random", "quantize": "bnb.nf4"}, "cannot be combined with init='random'"),
        ({"precision": "8-true"}, "precision=8-true is not known"),
        ({"quantize": "bnb.nf5"}, "quantize=bnb.nf5 is not for inference"),
        ({"quantize": "bnb.nf4", "precision": "bf16-mixed"}, "precision=bf16-mixed cannot be combined with"),
    ],
)
def test_loading_options_that_cannot_act_are_refused(directory, options, message):
    with pytest.raises(ValueError, match=message):
        LLM.load(directory, **options)


def test_random_weights_take_the_shape_and_a_tokenizer(directory, tmp_path):
    torch.manual_seed(1)
    llm = LLM.load(directory, init="random", distribute=None)
    assert llm.config == load_model(directory).config
    torch.manual_seed(1)
    again = LLM.load(directory, init="random", tokenizer_dir=directory, precision="32-true")
    assert all(torch.equal(a, b) for a, b in zip(llm.parameters(), again.parameters(), strict=True))
    assert not torch.equal(llm.model.lm_head.weight, load_model(directory).lm_head.weight)
    known = LLM.load("pythia-14m", init="random", tokenizer_dir=directory, distribute=None)
    assert known.config.name == "pythia-14m"
    known.save(tmp_path / "out")
    assert greedy(LLM.load(tmp_path / "out", precision="32-true")) == greedy(known)
    assert "GPTNeoX" in (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(ValueError, match="Give tokenizer_dir"):
        LLM.load("pythia-14m", init="random")
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*pythia-14m"):
        LLM.load("pythia-14mm", init="random", tokenizer_dir=directory)


def test_saved_and_loaded_it_says_the_same(trained, tmp_path):
    step(torch.optim.SGD)(trained)
    trained.save(tmp_path / "out", prompt_style="alpaca")
    again = LLM.load(tmp_path / "out", precision="32-true")
    assert type(again.prompt_style).__name__ == "Alpaca"
    trained.prompt_style = again.prompt_style
    assert greedy(again) == greedy(trained)
    assert again.name == "tiny-random"
    with pytest.raises(ValueError, match="exists already"):
        trained.save(tmp_path / "out")


def test_what_no_plain_checkpoint_holds_is_not_saved(trained, tmp_path):
    apply_lora(trained.model, LoRASettings())
    with pytest.raises(ValueError, match=r"merge_lora\(llm\.model\)"):
        trained.save(tmp_path / "out")
    merge_lora(trained.model)
    trained.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["bnb.nf4-dq", "bnb.int8", "int4"])
def test_quantised_weights_are_saved_as_they_are(directory, kind, tmp_path):
    llm = LLM.load(directory, quantize=kind, precision="32-true")
    llm.save(tmp_path / "out")
    again = LLM.load(tmp_path / "out", precision="32-true")
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids), llm(ids))
    assert greedy(again) == greedy(llm)
    with pytest.raises(
        ValueError, match=rf"quantize=bnb\.fp4 has no effect here: the weights in .*out' are {kind} already"
    ):
        again.distribute(quantize="bnb.fp4")
    assert greedy(again) == greedy(llm)  # it is as it was
    again.distribute(precision="bf16-true")
    expected = LLM.load(tmp_path / "out", precision="bf16-true", quantize=kind)
    assert torch.equal(again(ids), expected(ids))
    apply_lora(again.model, LoRASettings())
    with pytest.raises(ValueError, match=r"merge_lora\(llm\.model\)"):
        again.save(tmp_path / "other")


def test_distribute_gives_what_loading_so_would_give(directory):
    llm = LLM.load(directory, precision="bf16-true")
    llm.distribute(precision="32-true")
    assert greedy(llm) == greedy(LLM.load(directory, precision="32-true"))
    assert {p.dtype for p in llm.parameters()} == {torch.float32}
    llm.distribute(precision="bf16-true", quantize="bnb.nf4")
    loaded = LLM.load(directory, precision="bf16-true", quantize="bnb.nf4").state_dict()
    assert loaded.keys() == llm.state_dict().keys() > {"transformer.h.0.attn.qkv.quantized.codes"}
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in llm.state_dict().items())
    llm.distribute(accelerator="cpu", devices=1, precision="bf16-mixed")
    assert {p.dtype for p in llm.parameters()} == {torch.float32}
    assert llm.engine.autocast == torch.bfloat16
    assert not llm.training


def test_distribute_keeps_what_was_trained(trained):
    step(torch.optim.SGD)(trained)
    weight = trained.model.lm_head.weight.clone()
    trained.distribute(precision="bf16-true")
    assert torch.equal(trained.model.lm_head.weight, weight.bfloat16())
    assert trained.training
    trained.distribute(precision="bf16-true", quantize="bnb.int8")
    assert "transformer.h.0.attn.qkv.quantized.codes" in trained.state_dict()
    with pytest.raises(ValueError, match="no longer those of the checkpoint"):
        trained.distribute(precision="32-true")


def test_a_fixed_cache_bounds_prompt_and_answer(directory):
    llm = LLM.load(directory, precision="32-true")
    llm.distribute(precision="32-true", fixed_kv_cache_size=40)
    ids = greedy(llm, "Hi", 400, return_as_token_ids=True)
    assert len(ids) + len(llm.codec.encode([{"role": "user", "content": "Hi"}])) == 40
    assert llm.engine.cache_manager.cache.max_length == 40
    with pytest.raises(ValueError, match="model's context of 40 tokens"):
        greedy(llm, "word " * 40)
    llm.distribute(precision="32-true", fixed_kv_cache_size="max_model_supported")
    greedy(llm)
    assert llm.engine.cache_manager.cache.max_length == 512


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_loading_tells_how_far_it_is(directory, quantize):
    shares = []
    load_parts(directory, LoadOptions("bf16-true", quantize), tell=shares.append)
    assert len(shares) > 10
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1


def test_blocks_lie_on_several_devices(directory, llm):
    several = LLM.load(directory, precision="32-true")
    several.distribute(devices=2, precision="32-true", generate_strategy="sequential")
    assert several.model.transformer.h[1]._forward_pre_hooks  # fetches what it reads
    assert greedy(several, ["Hello", "Hi there"], 12) == greedy(llm, ["Hello", "Hi there"], 12)
    load_others(several)
    with pytest.raises(ValueError, match="Save it, and load"):
        several.distribute(devices=2, generate_strategy="sequential")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generate_strategy": "tensor_parallel", "devices": 3}, "devices=3 cannot split tiny-random"),
        (
            {"generate_strategy": "tensor_parallel", "devices": 2, "quantize": "bnb.int8"},
            "bnb.int8 cannot be combined with",
        ),
        ({"generate_strategy": "sequential", "devices": 3}, "devices=3: tiny-random has 2 blocks"),
        ({"accelerator": "tpu"}, "accelerator=tpu"),
        ({"devices": 2}, "devices=2 is not supported without `generate_strategy`"),
        ({"fixed_kv_cache_size": 1024}, "fixed_kv_cache_size=1024"),
        ({"generate_strategy": "magic"}, "generate_strategy=magic is unknown"),
        ({"quantize": "bnb.int8-training"}, "is not for inference"),
    ],
)
def test_a_distribution_that_cannot_be_is_refused_and_changes_nothing(llm, options, message):
    engine = llm.engine
    with pytest.raises(ValueError, match=message):
        llm.distribute(**options)
    assert llm.engine is engine


# --- what was finetuned, without merged weights next to it


def tuned(directory, path, kind):
    """A directory as `litgpt finetune_*` leaves it without merging, and the model that it means."""
    model = load_model(directory)
    path.mkdir()
    copy_companion_files(directory, path)
    settings = LoRASettings(r=4, head=True, mlp=True)
    if kind == "lora":
        apply_lora(model, settings)
    else:
        (apply_adapter_v2 if kind == "v2" else apply_adapter)(model, 5, 1)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    mine = {"lora": is_lora, "v1": is_adapter, "v2": is_adapter_v2}[kind]
    weights = {name: p.detach() for name, p in model.named_parameters() if mine(name)}
    if kind == "lora":
        save_lora(path, weights, settings, str(directory))
    else:
        save_adapter(path, weights, str(directory))
    save_prompt_style("alpaca", path)
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "v1", "v2"])
def test_finetuned_weights_alone_open_on_their_base(directory, tmp_path, kind):
    expected = tuned(directory, tmp_path / "tuned", kind)
    llm = LLM.load(tmp_path / "tuned", precision="32-true")
    assert type(llm.prompt_style).__name__ == "Alpaca"
    ids = batch(llm)
    with torch.no_grad():
        torch.testing.assert_close(llm(ids), expected(ids), rtol=1e-3, atol=1e-2)  # logits of about 100
        assert (llm(ids) - load_model(directory)(ids)).abs().max() > 0.1
    prompt = llm.codec.encode([{"role": "user", "content": "Hello"}])
    answer = Engine(expected).complete([Request(prompt, 8, Sampling(0))])[0]
    assert greedy(llm, return_as_token_ids=True).tolist() == answer
    quantized = LLM.load(tmp_path / "tuned", precision="bf16-true", quantize="bnb.nf4")
    assert len(greedy(quantized, return_as_token_ids=True)) == 8


def test_a_base_that_is_not_there_is_named(directory, tmp_path):
    tuned(directory, tmp_path / "tuned", "v1")
    content = torch.load(tmp_path / "tuned" / "lit_model.pth.adapter")
    torch.save({"model": content["model"], "base": str(tmp_path / "nowhere")}, tmp_path / "tuned/lit_model.pth.adapter")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*litgpt generate_adapter"):
        LLM.load(tmp_path / "tuned")


def test_merged_weights_beside_lora_win(directory, tmp_path):
    tuned(directory, tmp_path / "tuned", "lora")
    for name in (WEIGHTS, "model_config.yaml"):
        (tmp_path / "tuned" / name).write_bytes((directory / name).read_bytes())
    llm = LLM.load(tmp_path / "tuned", precision="32-true")
    assert torch.equal(llm.model.lm_head.weight, load_model(directory).lm_head.weight)
