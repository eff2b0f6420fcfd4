"""Two real processes (gloo), each with a part of every layer, say what one says with the whole model."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from litgpt import LLM
from litgpt.checkpoint import save_model
from litgpt.config import Config
from litgpt.generation.engine import Engine, Request
from litgpt.generation.rank_engine import RanksLost
from litgpt.generation.sampling import Sampling
from litgpt.llm.leader import Leader
from litgpt.model import GPT
from litgpt.parallel.process_group import ProcessGroup
from litgpt.parallel.tensor_parallel import check_split, split_model
from litgpt.sources.checkpoint import open_checkpoint
from tests import checkpoint_files
from tests.training.conftest import on_two_ranks

SMALL = {
    "block_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 50, "padded_vocab_size": 50,
    "intermediate_size": 48, "rotary_percentage": 1.0, "parallel_residual": False, "norm_class_name": "RMSNorm",
}  # fmt: skip
MIXTURE = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16}
SHAPES = {
    "GptNeoxMLP": {"mlp_class_name": "GptNeoxMLP", "bias": True, "norm_class_name": "LayerNorm",
                   "parallel_residual": True, "rotary_percentage": 0.25, "lm_head_bias": True},
    "LLaMAMLP, grouped": {"mlp_class_name": "LLaMAMLP", "bias": False, "n_query_groups": 2, "norm_qk": True},
    "GemmaMLP, one group, tied": {"mlp_class_name": "GemmaMLP", "bias": False, "n_query_groups": 1,
                                  "tie_embeddings": True, "scale_embeddings": True, "post_attention_norm": True,
                                  "post_mlp_norm": True, "attention_logit_softcapping": 20.0,
                                  "sliding_window_size": 8, "sliding_window_indices": [1, 0]},
    "LLaMAMoE, biases, sinks": {**MIXTURE, "bias": True, "mlp_bias": True, "attention_sinks": True,
                                "n_query_groups": 2, "swiglu_limit": 7.0},
    "LLaMAMoE, shared experts, latent": {**MIXTURE, "bias": False, "n_shared_expert": 2, "first_k_dense_replace": 1,
                                         "latent_attention": {"q_lora_rank": 12, "kv_lora_rank": 16, "v_head_dim": 8,
                                                              "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}},
    "olmo2 norm, one group": {"mlp_class_name": "LLaMAMLP", "bias": False, "n_query_groups": 1, "norm_qk": True,
                              "norm_qk_type": "olmo2", "padded_vocab_size": 51},
}  # fmt: skip
PROMPTS = [[1, 2, 3, 4, 5], list(range(20)), [7]]

RANK = """
import json, subprocess, sys
import torch
import torch.distributed as dist
from functools import partial
from pathlib import Path
from litgpt.sources.load import load_model
from litgpt.generation.rank_engine import RankEngine, follow
from litgpt.parallel.process_group import ProcessGroup
from litgpt.parallel.tensor_parallel import split_model
from tests.training.test_tensor_parallel import requests

class Channel:
    def __init__(self, folder, group):
        self.store, self.group, self.count = dist.FileStore(str(folder / "news"), 2), group, 0
    def tell(self, news):
        self.count += 1
        self.store.set(str(self.count), json.dumps(news))
    def hear(self):
        self.count += 1
        return json.loads(self.store.get(str(self.count)))
    def check(self):
        pass

folder, rank, results = Path(sys.argv[1]), len(sys.argv) - 2, {}
if rank == 0:
    other = subprocess.Popen([sys.executable, *sys.argv, "other"])
for directory in sorted((folder / "models").iterdir()):
    group = ProcessGroup(rank, 2, torch.device("cpu"))
    model = load_model(directory, split=partial(split_model, group=group))
    meeting = folder / directory.name
    meeting.mkdir(exist_ok=True)
    group.rendezvous(meeting)
    channel = Channel(meeting, group)
    with torch.inference_mode(), group.together():
        logits = model(torch.arange(24)[None])
        everywhere = group.all_gather(logits.contiguous()).chunk(2, dim=-1)
    if rank == 1:
        follow(model, channel)
        continue
    engine = RankEngine(model, channel, max_slots=2)
    cancelled = engine.submit(requests()[0])
    engine.step()
    engine.cancel(cancelled)
    tokens = engine.complete(requests())
    channel.tell(None)
    results[directory.name] = {
        "tokens": tokens, "same": torch.equal(*everywhere), "size": sum(p.numel() for p in model.parameters()),
    }
    torch.save(logits, directory / "logits.pth")
if rank == 0:
    assert other.wait() == 0
    print("RESULTS " + json.dumps(results))
"""


def requests() -> list[Request]:
    samplings = [Sampling(0), Sampling(0), Sampling(0.9, 20)]
    return [Request(p, 15, replace(s, seed=i)) for i, (p, s) in enumerate(zip(PROMPTS, samplings, strict=True))]


def test_two_ranks_say_what_one_says(tmp_path):
    models = {}
    for name, changes in SHAPES.items():
        torch.manual_seed(0)
        model = GPT(Config(name=name, **{**SMALL, **changes})).eval()
        model.init_weights()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p * 2 + torch.randn_like(p) * 0.1)  # biases and norms, too
        (tmp_path / "models" / name).mkdir(parents=True)
        save_model(tmp_path / "models" / name, model, model.config)
        models[name] = model
    out = on_two_ranks(RANK, tmp_path, tmp_path, fresh=True)  # it starts the other itself
    results = json.loads(re.search(r"RESULTS (.*)", out)[1])
    assert results.keys() == models.keys()
    for name, model in models.items():
        with torch.inference_mode():
            expected = model(torch.arange(24)[None])
        logits = torch.load(tmp_path / "models" / name / "logits.pth")
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item(), msg=name)
        assert results[name]["same"], name
        assert results[name]["tokens"] == Engine(model).complete(requests()), name
        assert results[name]["size"] < 0.75 * model.num_parameters(), name


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Blocks of 64 values lie within one rank's part here: both quantise to the same."""
    directory = checkpoint_files.chat_model(tmp_path_factory.mktemp("chat") / "model")
    sizes = {"n_embd": 128, "n_head": 2, "intermediate_size": 128, "mlp_class_name": "LLaMAMLP", "bias": False}
    torch.manual_seed(0)
    sizes |= {"block_size": 512, "vocab_size": 700, "padded_vocab_size": 704}
    model = GPT(Config(name="tiny", **{**SMALL, **sizes}))
    model.init_weights()
    save_model(directory, {name: 3 * p for name, p in model.state_dict().items()}, model.config)
    return directory


def test_the_command_answers_with_quantised_parts(litgpt_main, directory):
    options = [directory, "--prompt", "Hello", "--top_k", 1, "--precision", "32-true", "--max_new_tokens", 12]
    options += ["--quantize", "bnb.nf4"]
    assert litgpt_main("generate_tp", *options, "--devices", 2) == litgpt_main("generate", *options)
    assert not followers()


def test_an_llm_shares_its_work_and_says_so_where_a_process_dies(directory):
    llm = LLM.load(directory, precision="32-true")
    prompts = ["Hello", "How are you?", "What do llamas eat?", "Hello again"]
    expected = [llm.generate(prompt, top_k=1, max_new_tokens=16) for prompt in prompts]
    threads = torch.get_num_threads()
    llm.distribute(devices=2, precision="32-true", generate_strategy="tensor_parallel", fixed_kv_cache_size=200)
    assert len(followers()) == 1
    assert sum(p.numel() for p in llm.parameters()) < 0.75 * GPT(llm.config).num_parameters()

    def ask(prompt: str) -> str:
        left = llm.generate(prompt, max_new_tokens=100, stream=True)
        next(left)
        left.close()
        return llm.generate(prompt, top_k=1, max_new_tokens=16)

    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(ask, prompts)) == expected
    llm.eval()  # takes a new engine, on all ranks
    assert llm.generate(prompts, top_k=1, max_new_tokens=16) == expected
    for use in (lambda: llm(torch.ones(1, 4, dtype=torch.int64)), lambda: llm.save(directory / "out")):
        with pytest.raises(ValueError, match=r"split over processes \(tensor_parallel\)"):
            use()
    with pytest.raises(RuntimeError, match="cannot be called directly"):
        llm.model(torch.ones(1, 4, dtype=torch.int64))

    stream = llm.generate("Hello", top_k=1, max_new_tokens=150, stream=True)
    next(stream)
    os.kill(followers()[0], signal.SIGKILL)
    with pytest.raises(RanksLost, match=r"Rank 1.*killed by signal 9.*Load the model again"):
        list(stream)
    with pytest.raises(RanksLost, match="killed by signal 9"):
        llm.generate("Hello")
    llm.distribute(precision="32-true")
    assert torch.get_num_threads() == threads
    assert llm.generate(prompts, top_k=1, max_new_tokens=16) == expected


def test_what_goes_wrong_on_one_rank_ends_all(directory, monkeypatch):
    job = {"checkpoint": str(directory / "nowhere"), "dtype": "float32", "quantize": None}
    leader = Leader([torch.device("cpu")] * 2, job)
    with pytest.raises(RanksLost, match=r"Rank 1.*FileNotFoundError: .*nowhere"):
        leader.rendezvous()
    leader.close()
    llm = LLM.load(directory, precision="32-true")
    llm.distribute(devices=2, precision="32-true", generate_strategy="tensor_parallel")

    def fail(self: Engine) -> None:
        raise MemoryError

    monkeypatch.setattr(Engine, "_decode", fail)
    with pytest.raises(RanksLost, match=r"Rank 0 has lost step with the others \(MemoryError\)"):
        llm.generate("Hello", max_new_tokens=4)
    assert not followers()


LEFT = """
import os, signal, sys
from litgpt import LLM

llm = LLM.load(sys.argv[1], precision="32-true")
llm.distribute(devices=2, precision="32-true", generate_strategy="tensor_parallel")
stream = llm.generate("Hello", max_new_tokens=400, stream=True)
next(stream)
print(llm.placement.leader.others[0].process.pid, flush=True)
if sys.argv[2] == "killed":  # while nobody waits for anybody
    stream.close()
    llm.generate("Hello", max_new_tokens=1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "over"])
def test_no_process_outlives_the_first(directory, end):
    done = subprocess.run([sys.executable, "-c", LEFT, directory, end], stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0)
    deadline = time.monotonic() + 120  # no claim about time: it ends a test that would wait forever
    while Path(f"/proc/{done.stdout.strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def followers(leader: int | None = None) -> list[int]:
    """The other ranks that a process has started, by default this one."""
    found = []
    for child in psutil.Process(leader).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if "follower" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def test_each_rank_reads_views_of_the_file(tmp_path):
    source = open_checkpoint(checkpoint_files.chat_model(tmp_path))
    with torch.device("meta"):
        take = split_model(GPT(source.config), ProcessGroup(1, 2, torch.device("cpu")))
    views = set()
    for name, tensor in source.weights():
        part = take(name, tensor)
        if part.numel() == tensor.numel() // 2:
            views |= {name} if part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() else set()
    mlps = {f"transformer.h.{n}.mlp.{linear}.weight" for n in range(2) for linear in ("fc_1", "fc_2", "proj")}
    assert mlps <= views


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "its 4 heads are not divisible by 3"),
        ({"n_head": 12, "head_size": 8, "n_query_groups": 6}, 4, "its 6 key/value heads are neither"),
        ({"intermediate_size": 50}, 4, "an MLP's width of 50 is not divisible by 4"),
        ({**MIXTURE, "moe_intermediate_size": 6}, 4, "an MLP's width of 6 is not divisible by 4"),
        ({"norm_qk": True, "norm_qk_type": "olmo2", "norm_class_name": "LayerNorm"}, 2, "its LayerNorm over all heads"),
    ],
)
def test_what_cannot_be_split_is_refused_with_its_reason(changes, ranks, message):
    config = Config(name="tiny", **{**SMALL, "mlp_class_name": "LLaMAMLP", **changes})
    with pytest.raises(ValueError, match=f"devices={ranks} cannot split tiny: {message}"):
        check_split(config, ranks)


@pytest.mark.parametrize(("option", "value"), [("--quantize", "bnb.int8"), ("--compile", "true"), ("--devices", 0)])
def test_options_that_cannot_act_are_refused(capsys, tmp_path, option, value):
    from litgpt.__main__ import main

    directory = checkpoint_files.chat_model(tmp_path)
    devices = () if option == "--devices" else ("--devices", "2")
    assert main(["generate_tp", str(directory), *devices, option, str(value)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {option} {value}")


@pytest.fixture
def litgpt_main(capsys):
    from litgpt.__main__ import main

    def run(*argv: object) -> str:
        assert main([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    return run
