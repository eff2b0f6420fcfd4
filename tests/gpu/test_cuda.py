"""What only a GPU can show: its kernels give the CPU's numbers, and the commands run there in their default settings."""

import pytest
import torch

from litgpt import LLM
from litgpt.config import Config
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT, starts_of_documents
from litgpt.parallel.process_group import ProcessGroup
from tests import checkpoint_files, shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = {
    "block_size": 256,
    "n_layer": 4,
    "n_head": 8,
    "n_query_groups": 2,
    "n_embd": 256,
    "intermediate_size": 512,
    "vocab_size": 1000,
    **shapes.LLAMA,
}
KINDS = {
    "grouped-query": {},
    "sliding-window": {"sliding_window_size": 16, "sliding_window_indices": [1, 0]},
    "soft-capped": {"attention_logit_softcapping": 30.0, "final_logit_softcapping": 20.0},
}


@pytest.fixture(params=KINDS)
def model(request) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(Config(**SHAPE, **KINDS[request.param]))
    gpt.init_weights()
    return gpt.eval()


@pytest.fixture
def idx(model) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (3, 96), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_float32_logits_equal_those_of_the_cpu(model, idx):
    expected = model(idx)
    torch.testing.assert_close(model.cuda()(idx.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_packed_documents_equal_documents_apart(model, idx):
    ids = torch.arange(96).expand_as(idx) // 40
    expected = torch.cat([model(part) for part in idx.split(40, dim=1)], dim=1)
    positions = torch.arange(96).expand_as(idx) % 40
    found = model.cuda()(idx.cuda(), positions.cuda(), ids.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_packed_documents_need_no_mask(model, idx):
    """The kernel for unequal lengths says what the mask says, to what bfloat16 can tell apart."""
    ids, positions = torch.arange(96).expand_as(idx) // 40, torch.arange(96).expand_as(idx) % 40
    inputs = [part.cuda() for part in (idx, positions, ids)]
    model = model.to("cuda", torch.bfloat16)
    starts = starts_of_documents(positions, ids).cuda()
    torch.testing.assert_close(model(*inputs, document_starts=starts), model(*inputs), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_answers_equal_those_of_the_cpu(model, idx, compiled):
    requests = [Request(row[: 20 + 30 * i].tolist(), 24, Sampling(temperature=0)) for i, row in enumerate(idx)]
    expected = Engine(model).complete(requests)
    assert Engine(model.cuda(), compile=compiled).complete(requests) == expected


def test_gradients_in_bfloat16_point_where_those_in_float32_do(model, idx):
    def gradient(dtype: torch.dtype) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            model(idx.cuda()).float().logsumexp(-1).mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model.cuda()
    exact, rounded = gradient(torch.float32), gradient(torch.bfloat16)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


def test_pretraining_then_generating(tmp_path, capsys):
    from litgpt.__main__ import main

    out = tmp_path / "out"
    words = ["pretrain", "--config", "config_hub/pretrain/quickstart.yaml", "--out_dir", str(out), "--devices", "1"]
    assert main([*words, "--train.max_steps", "60", "--train.log_interval", "20"]) == 0
    assert "bf16-mixed" in (out / "logs.txt").read_text()
    assert main(["generate", str(out / "final"), "--prompt", "ROMEO:", "--max_new_tokens", "16"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_group_exchanges_over_nccl(tmp_path):
    group = ProcessGroup(0, 1, torch.device("cuda:0"))
    group.rendezvous(tmp_path)
    tensor = torch.arange(6.0, device="cuda", dtype=torch.bfloat16).view(2, 3)
    expected = tensor.clone()
    with group.together():
        assert group.all_reduce_min(1e12) == 1e12
        group.all_reduce(tensor)
        group.broadcast(tensor)
        assert torch.equal(group.all_gather(tensor), expected)
    assert torch.equal(tensor, expected)
    group.abort()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["sequential", "tensor_parallel"])
def test_two_gpus_say_what_one_says(tmp_path, strategy):
    llm = LLM.load(checkpoint_files.chat_model(tmp_path / "model"), precision="32-true")
    expected = llm.generate(["Hello", "How are you?"], top_k=1, max_new_tokens=12)
    llm.distribute(devices=2, precision="32-true", generate_strategy=strategy)
    assert llm.generate(["Hello", "How are you?"], top_k=1, max_new_tokens=12) == expected
