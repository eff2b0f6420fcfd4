"""The document about four workflows: finetuning on records of one's own, LoRA, pretraining from scratch, deployment."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import metadata

import yaml

from litgpt.checkpoint import WEIGHTS
from litgpt.formats.gguf.file import GGUFFile
from tests.documents.place import PRETRAINING, TINY, TUNING, Place
from tests.documents.table import Row, makes, prints, prose, without_comments
from tests.shell import Done

QUICK = "--train.max_steps 1 --data.num_workers 0 --eval.max_new_tokens 2 --overwrite true"
NOT_FROM_PYPI = (
    "The package of this name on PyPI is the other project. This one is installed from its source tree with the same "
    "extras, pip install -e '.[extra]'."
)


def extras(place: Place, done: Done) -> None:
    assert {"all", "extra"} <= set(metadata("litgpt").get_all("Provides-Extra"))


def answered(place: Place, done: Done) -> None:
    assert done.out.strip()


def accumulates(count: int):
    return prints(f"x {count} accumulation")


def trained_at(rate: float):
    def check(place: Place, done: Done) -> None:
        kept = yaml.safe_load((place.directory / "out/finetune/hyperparameters.yaml").read_text())
        assert kept["train"]["learning_rate"] == rate
        assert (place.directory / "out/finetune/final" / WEIGHTS).is_file()
        assert "x 16 accumulation" in done.out

    return check


def targets(place: Place, done: Done) -> None:
    kept = yaml.safe_load((place.directory / "out/finetune/lora/hyperparameters.yaml").read_text())
    given = {name: kept[f"lora_{name}"] for name in ("r", "alpha", "dropout", "query", "key", "value", "mlp", "head")}
    assert given == {
        **{"r": 16, "alpha": 32, "dropout": 0.05, "query": True, "key": False, "value": True},
        **{"mlp": False, "head": False},
    }
    assert kept["lora_projection"]


def named_in_gguf(place: Place, done: Done) -> None:
    assert GGUFFile(place.directory / "models/phi2.gguf").metadata["general.name"] == "microsoft/phi-2"


def described(place: Place, done: Done) -> None:
    settings = yaml.safe_load(done.out)
    written = yaml.safe_load((place.directory / "config/pythia-160m.yaml").read_text())
    assert {**settings["model_config"], "model_name": settings["model_name"]} == written


def two_processes(place: Place, done: Done) -> None:
    """Both took part in one run: a step is made of the sequences of two devices."""
    assert re.search("x 2 devices", done.out), done.out
    assert done.out.count("Training time") == 1
    assert list(place.directory.glob("out/pretrain/final/lit_model.pth"))


def several_answers(place: Place, done: Done) -> None:
    assert len(done.out.strip()) > 20


def asked(place: Place, names: dict) -> None:
    """The application answers several clients at once."""
    from fastapi.testclient import TestClient

    client = TestClient(names["app"])
    with ThreadPoolExecutor(6) as threads:
        ask = partial(client.post, "/generate", params={"prompt": "Hello", "max_tokens": 5})
        replies = [future.result() for future in [threads.submit(ask) for _ in range(6)]]
    assert [reply.status_code for reply in replies] == [200] * 6
    assert all(isinstance(reply.json()["response"], str) for reply in replies)
    assert names["llm"].engine.running == 0


CONFIG = """\
model_name: pythia-160m
block_size: 2048
vocab_size: 50304
n_layer: 12
n_head: 12
n_embd: 768
rotary_percentage: 0.25
parallel_residual: true
bias: true"""
LORA_WITH_COMMENTS = r"""litgpt finetune_lora \
  microsoft/phi-2 \
  --data JSON \
  --data.json_path data/my_dataset.json \
  --lora_r 16 \          # LoRA rank (8-64, higher=more capacity)
  --lora_alpha 32 \      # LoRA scaling (typically 2×r)
  --lora_dropout 0.05 \  # Prevent overfitting
  --lora_query true \    # Apply LoRA to query projection
  --lora_key false \     # Usually not needed
  --lora_value true \    # Apply LoRA to value projection
  --lora_projection true \  # Apply LoRA to output projection
  --lora_mlp false \     # Usually not needed
  --lora_head false      # Usually not needed"""
BEHIND_A_BACKSLASH = (
    "A backslash with a space and a comment behind it does not continue a line. A shell ends the command there, which "
    "gets a space as one word too many and says so; it runs without the comments."
)

ROWS = [
    Row("pip install 'litgpt[extra]'", run="", then=extras, reason=NOT_FROM_PYPI),
    Row(
        """from litgpt import LLM
llm = LLM.load("microsoft/phi-2")
result = llm.generate(
    "What is the capital of France?",
    max_new_tokens=50,
    temperature=0.7
)
print(result)""",
        "python",
        then=answered,
    ),
    Row("litgpt download list", then=prints("microsoft/phi-2\n", "google/gemma-2b\n", "meta-llama/Llama-2-7b-hf\n")),
    prose("Fine-Tuning Setup:"),
    Row(
        "litgpt download meta-llama/Meta-Llama-3-8B", then=makes("checkpoints/meta-llama/Meta-Llama-3-8B/lit_model.pth")
    ),
    Row("litgpt download microsoft/phi-2", then=makes("checkpoints/microsoft/phi-2/lit_model.pth")),
    Row("litgpt download google/gemma-2b", then=makes("checkpoints/google/gemma-2b/lit_model.pth")),
    Row(
        """[
  {
    "instruction": "What is the capital of France?",
    "input": "",
    "output": "The capital of France is Paris."
  },
  {
    "instruction": "Translate to Spanish: Hello, how are you?",
    "input": "",
    "output": "Hola, ¿cómo estás?"
  }
]""",
        "json",
        run="data/my_dataset.json",
    ),
    Row(
        r"""litgpt finetune \
  meta-llama/Meta-Llama-3-8B \
  --data JSON \
  --data.json_path data/my_dataset.json \
  --train.max_steps 1000 \
  --train.learning_rate 2e-5 \
  --train.micro_batch_size 1 \
  --train.global_batch_size 16""",
        extra=f"--train.logger_name tensorboard {QUICK}",
        then=trained_at(2e-5),
    ),
    Row(
        r"""litgpt finetune_lora \
  microsoft/phi-2 \
  --data JSON \
  --data.json_path data/my_dataset.json \
  --lora_r 16 \
  --lora_alpha 32 \
  --lora_dropout 0.05 \
  --train.max_steps 1000 \
  --train.learning_rate 1e-4""",
        extra=QUICK,
        then=makes("out/finetune/lora/final/lit_model.pth.lora", "out/finetune/lora/final/lit_model.pth"),
    ),
    Row(
        "tail -f out/finetune/logs.txt",
        run="tail -n 1000 -f out/finetune/logs.txt & sleep 0.3; kill $!",
        needs=("out/finetune/logs.txt",),
        then=prints("step 1", "loss train"),
        reason="It goes on until it is stopped, which the test does.",
    ),
    Row(
        "tensorboard --logdir out/finetune/lightning_logs",
        extra="--inspect",
        needs=("out/finetune/logs.txt",),
        then=prints("Event statistics", "loss"),
    ),
    prose("LoRA Training:"),
    Row(
        LORA_WITH_COMMENTS,
        run=without_comments(LORA_WITH_COMMENTS),
        extra=QUICK,
        then=targets,
        reason=BEHIND_A_BACKSLASH,
    ),
    Row(
        r"""litgpt finetune_lora \
  microsoft/phi-2 \
  --data JSON \
  --data.json_path data/my_dataset.json \
  --lora_r 16 \
  --train.epochs 3 \
  --train.learning_rate 1e-4 \
  --train.micro_batch_size 4 \
  --train.global_batch_size 32 \
  --out_dir out/phi2-lora""",
        extra=QUICK,
        then=makes("out/phi2-lora/final/lit_model.pth.lora", "out/phi2-lora/final/lit_model.pth"),
    ),
    Row(
        r"""litgpt merge_lora \
  out/phi2-lora/final \
  --out_dir out/phi2-merged""",
        needs=("out/phi2-lora/final",),
        then=makes("out/phi2-merged/lit_model.pth"),
    ),
    Row(
        """from litgpt import LLM
llm = LLM.load("out/phi2-merged")""",
        "python",
        needs=("out/phi2-merged",),
    ),
    prose("Pretraining:"),
    Row(
        r"""python scripts/prepare_dataset.py \
  --source_path data/my_corpus.txt \
  --checkpoint_dir checkpoints/tokenizer \
  --destination_path data/pretrain \
  --split train,val""",
        run="litgpt prepare_dataset --source_path data/my_corpus.txt --checkpoint_dir checkpoints/tokenizer "
        "--destination_path data/pretrain --split train,val",
        then=makes("data/pretrain/train", "data/pretrain/val"),
        reason="There is no folder of scripts: what one of them did is the subcommand of its name.",
        off="prepare_dataset",
    ),
    Row(
        CONFIG,
        "yaml",
        run="litgpt pretrain --config config/pythia-160m.yaml --print_config",
        extra="config/pythia-160m.yaml",
        then=described,
    ),
    Row(
        r"""litgpt pretrain \
  --config config/pythia-160m.yaml \
  --data.data_dir data/pretrain \
  --train.max_tokens 10_000_000_000""",
        extra=f"{TINY} {PRETRAINING} --train.max_seq_length 64 --overwrite true",
        needs=("data/pretrain", "config/pythia-160m.yaml"),
        then=makes("out/pretrain/final/lit_model.pth", "out/pretrain/final/tokenizer.json"),
        off="prepare_dataset",
    ),
    Row(
        r"""litgpt pretrain \
  --config config/pythia-1b.yaml \
  --data.data_dir data/pretrain \
  --devices 8 \
  --train.max_tokens 100_000_000_000""",
        extra=f"{TINY} {PRETRAINING} --train.global_batch_size 2 --train.max_seq_length 64 --overwrite true --devices 2",
        needs=("data/pretrain", "config/pythia-1b.yaml"),
        then=two_processes,
        off="prepare_dataset",
    ),
    Row(
        r"""sbatch --nodes=8 --gpus-per-node=8 \
  pretrain_script.sh""",
        run="sbatch --nodes=2 --gpus-per-node=1 pretrain_script.sh",
        needs=("data/pretrain", "config/pythia-1b.yaml"),
        then=two_processes,
        reason="sbatch runs a script once, on the first node; srun in it starts the command on all.",
        off="prepare_dataset",
    ),
    Row(
        r"""litgpt pretrain \
  --config config/pythia-1b.yaml \
  --data.data_dir /shared/data/pretrain \
  --devices 8 \
  --num_nodes 8 \
  --train.global_batch_size 512 \
  --train.max_tokens 300_000_000_000""",
        run="sbatch --nodes=8 --gpus-per-node=8 as_typed.sh",
        code=1,
        then=prints(
            "--num_nodes 8: a batch script runs on the first node alone, and nothing starts litgpt on the others. Start "
            "it with `srun --ntasks-per-node=8 litgpt ...`."
        ),
        needs=("data/pretrain", "config/pythia-1b.yaml", "as_typed.sh"),
        reason="The script's content without srun would wait for 63 processes that nobody starts: it is refused, with "
        "the word that is missing. The row before runs it with that word.",
    ),
    prose("Model Deployment:"),
    Row(
        """from litgpt import LLM

llm = LLM.load("out/phi2-lora/final")

print(llm.generate("What is machine learning?"))

for token in llm.generate("Explain quantum computing", stream=True):
    print(token, end="", flush=True)

prompts = ["Hello", "Goodbye", "Thank you"]
results = [llm.generate(p) for p in prompts]""",
        "python",
        needs=("out/phi2-lora/final",),
        then=several_answers,
    ),
    Row(
        r"""litgpt convert_lit_checkpoint \
  out/phi2-lora/final \
  --dtype bfloat16 \
  --quantize bnb.nf4""",
        needs=("out/phi2-lora/final",),
        then=makes("out/phi2-lora/final-bnb.nf4/lit_model.pth"),
    ),
    Row(
        r"""litgpt convert_lit_checkpoint \
  out/phi2-lora/final \
  --quantize bnb.nf4-dq  # Double quantization""",
        needs=("out/phi2-lora/final",),
        then=makes("out/phi2-lora/final-bnb.nf4-dq/lit_model.pth"),
    ),
    Row(
        r"""python scripts/convert_lit_checkpoint.py \
  --checkpoint_path out/phi2-lora/final \
  --output_path models/phi2.gguf \
  --model_name microsoft/phi-2""",
        run="litgpt convert_lit_checkpoint --checkpoint_path out/phi2-lora/final --output_path models/phi2.gguf "
        "--model_name microsoft/phi-2",
        needs=("out/phi2-lora/final",),
        then=named_in_gguf,
        reason="There is no folder of scripts: what one of them did is the subcommand of its name.",
    ),
    Row(
        """from fastapi import FastAPI
from litgpt import LLM

app = FastAPI()
llm = LLM.load("out/phi2-lora/final")

@app.post("/generate")
def generate(prompt: str, max_tokens: int = 100):
    result = llm.generate(
        prompt,
        max_new_tokens=max_tokens,
        temperature=0.7
    )
    return {"response": result}""",
        "python",
        needs=("out/phi2-lora/final",),
        serves=asked,
    ),
    Row(
        "litgpt finetune_lora  # Only needs 12-16GB",
        run="litgpt finetune_lora",
        code=2,
        then=prints("missing: checkpoint_dir. Usage: litgpt finetune_lora CHECKPOINT_DIR"),
        reason="It stands for the command of the section before it; alone, it asks for the model.",
    ),
    Row(
        r"""litgpt finetune_lora \
  ... \
  --train.gradient_accumulation_iters 4  # Accumulate gradients""",
        "options",
        run=f"litgpt finetune_lora microsoft/phi-2 {TUNING} --train.gradient_accumulation_iters 4",
        extra="--overwrite true",
        then=accumulates(4),
        reason="The dots stand for the rest of a command. (They accumulate gradients; what recomputes activations is "
        "--train.activation_checkpointing.)",
    ),
    Row(
        r"""--train.micro_batch_size 1 \
--train.global_batch_size 32 \
--train.gradient_accumulation_iters 32  # Effective batch=32""",
        "options",
        run=f"litgpt finetune_lora microsoft/phi-2 {TUNING} --train.micro_batch_size 1 --train.global_batch_size 32 "
        "--train.gradient_accumulation_iters 32",
        extra="--overwrite true",
        then=accumulates(32),
    ),
    Row("litgpt download list", then=prints("meta-llama/Meta-Llama-3-8B\n")),
    Row(
        "litgpt download meta-llama/Meta-Llama-3-8B", then=makes("checkpoints/meta-llama/Meta-Llama-3-8B/lit_model.pth")
    ),
    Row(
        "ls checkpoints/",
        needs=("checkpoints/microsoft/phi-2/lit_model.pth",),
        then=prints("microsoft"),
        reason="It shows the organisations; the models of one lie in its folder.",
    ),
    Row(
        "--lora_r 8  # Instead of 16 or 32",
        "options",
        run=f"litgpt finetune_lora microsoft/phi-2 {TUNING} --lora_r 8",
        extra="--overwrite true",
        then=makes("out/finetune/lora/final/lit_model.pth.lora"),
    ),
    Row(
        r"""--lora_query true \
--lora_value true \
--lora_projection false \  # Disable this
--lora_mlp false  # And this""",
        "options",
        run=f"litgpt finetune_lora microsoft/phi-2 {TUNING} --lora_query true --lora_value true "
        "--lora_projection false --lora_mlp false",
        extra="--overwrite true",
        then=makes("out/finetune/lora/final/lit_model.pth.lora"),
        reason=BEHIND_A_BACKSLASH,
    ),
]
(SCRIPT,) = (row.typed for row in ROWS if "--num_nodes 8" in row.typed)
# The batch script with srun, on two nodes of one device; the options behind scale it down.
STARTED = f"""#!/bin/bash
srun --ntasks-per-node=1 {SCRIPT.replace("/shared/data", "data")} \\
  --devices 1 --num_nodes 2 --train.max_seq_length 64 {TINY} {PRETRAINING} --train.global_batch_size 2 --overwrite true
"""
INLINE: dict[str, str] = {
    "--train.logger_name tensorboard": "behind `litgpt finetune`",
}
