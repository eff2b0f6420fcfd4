"""LoRA on quantised weights: two real processes (gloo) train as one does, with the weights copied or sharded."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

RUN = """
import sys
import torch
from litgpt.parallel.fabric import make_fabric
from litgpt.config import Config
from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora
from litgpt.model import GPT
from litgpt.quantization.layers import quantized_layers, replace_linears
from litgpt.training.loss import NextTokenLoss
from litgpt.training.state import Saved, whole_weights
from tests.training.conftest import SHAPE

devices, strategy, kind, result = int(sys.argv[1]), *sys.argv[2:]
fabric = make_fabric(devices, precision="32-true", strategy=strategy)
fabric.launch()
torch.manual_seed(1)
gpt = GPT(Config(**{**SHAPE, "n_embd": 64}, vocab_size=64, padded_vocab_size=64))
gpt.init_weights()
replace_linears(gpt, kind, torch.float32)
apply_lora(gpt, LoRASettings(r=4, dropout=0.0, key=True, mlp=True, projection=True))
model = fabric.setup_module(NextTokenLoss(gpt))
shares = [p.numel() for _, layer in quantized_layers(gpt) for p in layer.quantized.parameters()]
local = [getattr(p, "_local_tensor", p).numel() for _, layer in quantized_layers(gpt)
         for p in layer.quantized.parameters()]
assert (sum(local) < 0.6 * sum(shares)) == (strategy == "fsdp"), (sum(local), sum(shares))
# Not AdamW: its first steps divide each gradient by itself, which makes whole steps of last bits. 8-bit products round
# their inputs, so that on some CPUs there are such.
optimizer = fabric.setup_optimizers(torch.optim.SGD([p for p in gpt.parameters() if p.requires_grad], lr=0.3))
idx = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
rows = idx.tensor_split(fabric.world_size)[fabric.global_rank]
losses = []
for _ in range(3):
    loss = model(rows[:, :-1], rows[:, 1:]) * fabric.world_size / (8 * 15)  # gradients are averaged over ranks
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean"))
assert losses[-1] < losses[0]
weights = whole_weights(gpt, Saved("", is_lora))
if fabric.global_rank == 0:
    torch.save({"losses": torch.stack(losses), **weights}, result)
"""


def run(folder: Path, devices: int, strategy: str, kind: str) -> dict[str, torch.Tensor]:
    script, result = folder / "run.py", folder / f"{strategy}{devices}.pth"
    script.write_text(RUN)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), str(devices), strategy, kind, str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(result)


@pytest.mark.parametrize(("kind", "strategies"), [("bnb.nf4-dq", ("ddp", "fsdp")), ("bnb.int8-training", ("fsdp",))])
def test_two_ranks_equal_one(tmp_path, kind, strategies):
    one = run(tmp_path, 1, "auto", kind)
    for strategy in strategies:
        two = run(tmp_path, 2, strategy, kind)
        assert one.keys() == two.keys()
        torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-4, msg=f"{strategy}: {name}")
