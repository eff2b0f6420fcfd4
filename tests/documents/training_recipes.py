"""The document of training recipes: a block of settings and a command for each model, then options for this and that."""

from typing import Any

import requests
import yaml

from litgpt.checkpoint import WEIGHTS
from tests.documents.place import TUNING, Place
from tests.documents.table import Check, Row, makes, prints
from tests.documents.workflows import QUICK, accumulates, answered
from tests.shell import Done

TINY_LLAMA, LLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "meta-llama/Llama-2-7b-hf"
# Without --data it is Alpaca, whose file lies where a download puts it.
ON_ALPACA = QUICK.replace("--data.num_workers 0 ", "")


def settles_as(typed: str, recipe: str) -> Check:
    """The settings come to what the block says, and the recipe of that model that comes with litgpt says the same."""
    written = yaml.safe_load(typed)

    def check(place: Place, done: Done) -> None:
        from tests.cli.test_finetune_recipes import settings_of

        ours = yaml.safe_load(done.out)
        hub = settings_of(recipe)
        for name, value in written.items():
            value = float(value) if name in ("learning_rate", "min_lr") else value
            assert (ours["train"][name] if name in ours["train"] else ours[name]) == value
            if name in DIFFERENT.get(recipe, ()):
                continue
            recipes = (
                hub["optimizer.init_args.lr"] if name == "learning_rate" else hub.get(f"train.{name}", hub.get(name))
            )
            assert recipes == value, (recipe, name)

    return check


# Settings in which a recipe that comes with litgpt differs from the block, which has the wider say.
DIFFERENT: dict[str, tuple[str, ...]] = {}


def settings(typed: str, model: str, recipe: str) -> Row:
    """A block of settings; saved as a file, it serves as `--config`."""
    command = "finetune_full" if recipe.endswith("full") else "finetune_lora"
    file = f"config/{recipe.replace('/', '-')}.yaml"
    run = f"litgpt {command} {model} --config {file} --print_config"
    return Row(typed, "yaml", run=run, extra=file, then=settles_as(typed, recipe))


def tuned(kind: str = "lora", **expected: Any) -> Check:
    """A run of that kind ended well, with these settings."""

    def check(place: Place, done: Done) -> None:
        out = place.directory / "out/finetune" / kind
        assert (out / "final" / WEIGHTS).is_file()
        kept = yaml.safe_load((out / "hyperparameters.yaml").read_text())
        found = {name: kept["train"].get(name, kept.get(name)) for name in expected}
        assert found == expected

    return check


def command(typed: str, **expected: Any) -> Row:
    kind = "full" if "finetune_full" in typed else "lora"
    return Row(typed, extra=QUICK, then=tuned(kind, **expected))


def no_such_model(typed: str) -> Row:
    return Row(
        typed,
        extra="--overwrite true",
        code=1,
        then=prints("meta-llama/Llama-3.2-8B", "Did you mean", "meta-llama/Llama-3.2-3B"),
        reason="There is no Llama 3.2 of 8 billion parameters; what is asked for is not found, and a name that is close "
        "is offered. (The 8B models are Meta-Llama-3-8B and Llama-3.1-8B.)",
    )


def block(**values: Any) -> str:
    """Settings, one a line."""
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def common(batch: int, micro: int, epochs: int, warmup: int = 10, **more: Any) -> str:
    first = {"global_batch_size": batch, "micro_batch_size": micro, "lr_warmup_steps": warmup, "epochs": epochs}
    return block(**first, max_seq_length=512, **more)


LORA = {"lora_r": 8, "lora_alpha": 16}
FOUR_BITS = {**LORA, "quantize": '"bnb.nf4"'}
MISTRAL, FALCON, GEMMA = "mistralai/Mistral-7B-v0.1", "tiiuae/falcon-7b", "google/gemma-7b"


def answers(place: Place, port: int) -> None:
    reply = requests.post(f"http://127.0.0.1:{port}/predict", json={"prompt": "Hello"}, timeout=60)
    assert isinstance(reply.json()["output"], str)


def options(typed: str, then: Check, model: str = LLAMA, data: str = TUNING, **more: Any) -> Row:
    """Words to put behind a command."""
    meant = " ".join(typed.partition("#")[0].split())
    return Row(
        typed,
        "options",
        run=f"litgpt finetune_lora {model} {data} {meant}",
        extra="--overwrite true",
        then=then,
        **more,
    )


def held_back(place: Place, done: Done) -> None:
    assert "Held out: 10.0%" in done.out


def scheduled(place: Place, done: Done) -> None:
    tuned(learning_rate=3e-4, lr_warmup_steps=100, min_lr=3e-6, lr_decay_iters=10000)(place, done)


def as_file(place: Place, done: Done) -> None:
    makes(f"checkpoints/{LLAMA}-merged/lit_model.pth")(place, done)


ROWS = [
    settings(common(8, 8, 3, **LORA, lora_dropout=0.05), TINY_LLAMA, "tiny-llama/lora"),
    command(
        f"""litgpt finetune_lora {TINY_LLAMA} \\
  --data JSON \\
  --data.json_path data/alpaca_sample.json \\
  --train.global_batch_size 8 \\
  --train.micro_batch_size 8 \\
  --train.lr_warmup_steps 10 \\
  --train.epochs 3 \\
  --train.max_seq_length 512 \\
  --lora_r 8 \\
  --lora_alpha 16""",
        micro_batch_size=8,
        max_seq_length=512,
        lora_alpha=16,
    ),
    settings(common(8, 2, 4, **LORA, lora_dropout=0.05), LLAMA, "llama-2-7b/lora"),
    command(
        f"""litgpt finetune_lora {LLAMA} \\
  --data JSON \\
  --data.json_path data/alpaca.json \\
  --train.global_batch_size 8 \\
  --train.micro_batch_size 2 \\
  --train.lr_warmup_steps 10 \\
  --train.epochs 4 \\
  --lora_r 8 \\
  --lora_alpha 16""",
        micro_batch_size=2,
        epochs=4,
    ),
    settings(common(8, 1, 2, **LORA, lora_dropout=0.05), "meta-llama/Meta-Llama-3-8B", "llama-3-8b/lora"),
    no_such_model(
        r"""litgpt finetune_lora meta-llama/Llama-3.2-8B \
  --data JSON \
  --data.json_path data/custom_dataset.json \
  --train.global_batch_size 8 \
  --train.micro_batch_size 1 \
  --train.lr_warmup_steps 10 \
  --train.epochs 2 \
  --lora_r 8"""
    ),
    settings(common(8, 2, 4, **LORA), MISTRAL, "mistral-7b/lora"),
    command(
        f"""litgpt finetune_lora {MISTRAL} \\
  --data JSON \\
  --data.json_path data/alpaca.json \\
  --train.global_batch_size 8 \\
  --train.micro_batch_size 2 \\
  --train.epochs 4 \\
  --lora_r 8""",
        lora_r=8,
    ),
    settings(common(8, 4, 1, **LORA), "microsoft/phi-2", "phi-2/lora"),
    command(
        r"""litgpt finetune_lora microsoft/phi-2 \
  --data JSON \
  --data.json_path data/alpaca_sample.json \
  --train.global_batch_size 8 \
  --train.micro_batch_size 4 \
  --train.epochs 1 \
  --lora_r 8""",
        epochs=1,
    ),
    settings(common(8, 1, 4, **LORA), FALCON, "falcon-7b/lora"),
    command(
        f"""litgpt finetune_lora {FALCON} \\
  --data JSON \\
  --data.json_path data/alpaca.json \\
  --train.global_batch_size 8 \\
  --train.micro_batch_size 1 \\
  --train.epochs 4 \\
  --lora_r 8""",
        micro_batch_size=1,
    ),
    settings(common(6, 1, 2, 200, **LORA), GEMMA, "gemma-7b/lora"),
    command(
        f"""litgpt finetune_lora {GEMMA} \\
  --data JSON \\
  --data.json_path data/alpaca.json \\
  --train.global_batch_size 6 \\
  --train.micro_batch_size 1 \\
  --train.lr_warmup_steps 200 \\
  --train.epochs 2 \\
  --lora_r 8""",
        global_batch_size=6,
        lr_warmup_steps=200,
    ),
    settings(common(8, 8, 3, **FOUR_BITS), TINY_LLAMA, "tiny-llama/qlora"),
    command(
        f"""litgpt finetune_lora {TINY_LLAMA} \\
  --quantize bnb.nf4 \\
  --data JSON \\
  --data.json_path data/alpaca_sample.json \\
  --train.global_batch_size 8 \\
  --train.micro_batch_size 8 \\
  --train.epochs 3 \\
  --lora_r 8""",
        quantize="bnb.nf4",
    ),
    settings(common(8, 2, 4, min_lr="6.0e-5", **FOUR_BITS), LLAMA, "llama-2-7b/qlora"),
    command(
        f"""litgpt finetune_lora {LLAMA} \\
  --quantize bnb.nf4 \\
  --data JSON \\
  --data.json_path data/alpaca.json \\
  --train.global_batch_size 8 \\
  --train.micro_batch_size 2 \\
  --train.epochs 4 \\
  --lora_r 8""",
        quantize="bnb.nf4",
    ),
    settings(common(8, 2, 2, **FOUR_BITS), "meta-llama/Meta-Llama-3-8B", "llama-3-8b/qlora"),
    no_such_model(
        r"""litgpt finetune_lora meta-llama/Llama-3.2-8B \
  --quantize bnb.nf4 \
  --data JSON \
  --data.json_path data/custom_dataset.json \
  --train.global_batch_size 8 \
  --train.micro_batch_size 2 \
  --train.epochs 2 \
  --lora_r 8"""
    ),
    settings(common(8, 2, 4, **FOUR_BITS), MISTRAL, "mistral-7b/qlora"),
    settings(common(8, 4, 1, **FOUR_BITS), "microsoft/phi-2", "phi-2/qlora"),
    settings(common(8, 1, 4, **FOUR_BITS), FALCON, "falcon-7b/qlora"),
    settings(common(6, 2, 2, 200, **FOUR_BITS), "google/gemma-2b", "gemma-2b/qlora"),
    settings(common(6, 1, 2, 200, **FOUR_BITS), GEMMA, "gemma-7b/qlora"),
    settings(common(8, 2, 3, 100, learning_rate="5e-5"), TINY_LLAMA, "tiny-llama/full"),
    command(
        f"""litgpt finetune_full {TINY_LLAMA} \\
  --data JSON \\
  --data.json_path data/alpaca.json \\
  --train.global_batch_size 8 \\
  --train.micro_batch_size 2 \\
  --train.lr_warmup_steps 100 \\
  --train.epochs 3 \\
  --train.learning_rate 5e-5""",
        learning_rate=5e-5,
    ),
    settings(common(8, 1, 2, 100, learning_rate="3e-5"), "microsoft/phi-2", "phi-2/full"),
    command(
        r"""litgpt finetune_full microsoft/phi-2 \
  --data JSON \
  --data.json_path data/alpaca.json \
  --train.global_batch_size 8 \
  --train.micro_batch_size 1 \
  --train.epochs 2 \
  --train.learning_rate 3e-5""",
        learning_rate=3e-5,
    ),
    Row(
        f"""litgpt finetune_lora {LLAMA} \\
  --train.learning_rate 3e-4 \\
  --train.lr_warmup_steps 100 \\
  --train.min_lr 3e-6 \\
  --train.lr_decay_iters 10000""",
        extra=ON_ALPACA,
        then=scheduled,
    ),
    Row(
        f"""litgpt finetune_lora {LLAMA} \\
  --train.global_batch_size 128 \\
  --train.micro_batch_size 2""",
        extra=ON_ALPACA,
        then=accumulates(64),
    ),
    Row(
        f"""litgpt finetune_lora {LLAMA} \\
  --precision bf16-mixed  # BF16 mixed precision""",
        extra=ON_ALPACA,
        then=tuned(precision="bf16-mixed"),
    ),
    options(
        "--precision 16-mixed  # FP16 mixed precision",
        prints("--precision 16-mixed needs a GPU; this is cpu. Choose another"),
        code=1,
        reason="In 16 bits with an exponent of 5, gradients have to be scaled, which takes a GPU; on a CPU it is refused.",
    ),
    Row(
        r"""litgpt finetune_lora meta-llama/Llama-3.1-8B \
  --train.max_seq_length 8192 \
  --train.micro_batch_size 1  # Reduce batch for memory""",
        extra=f"{ON_ALPACA} --train.global_batch_size 1",
        then=tuned(max_seq_length=8192),
    ),
    options("--quantize bnb.nf4  # 4-bit QLoRA", tuned(quantize="bnb.nf4")),
    options("--train.micro_batch_size 1", tuned(micro_batch_size=1)),
    options("--lora_r 4  # Instead of 8", tuned(lora_r=4)),
    Row(
        f"""litgpt finetune_lora {LLAMA} \\
     --devices 4  # Use 4 GPUs with FSDP""",
        extra=f"{ON_ALPACA} --train.micro_batch_size 1 --train.global_batch_size 2 --devices 2",
        then=prints("x 2 devices"),
    ),
    options(
        "--train.gradient_accumulation_iters 16",
        accumulates(16),
        reason="What the document calls gradient checkpointing is --train.activation_checkpointing; the option accumulates.",
    ),
    Row(
        """[
  {
    "instruction": "What is the capital of France?",
    "input": "",
    "output": "The capital of France is Paris."
  },
  {
    "instruction": "Translate to Spanish:",
    "input": "Hello world",
    "output": "Hola mundo"
  }
]""",
        "json",
        run="data/my_dataset.json",
    ),
    Row(
        f"""litgpt finetune_lora {LLAMA} \\
  --data JSON \\
  --data.json_path data/my_dataset.json \\
  --data.val_split_fraction 0.1  # 10% validation""",
        extra=QUICK,
        then=held_back,
    ),
    Row(
        f"litgpt merge_lora checkpoints/{LLAMA}/final_lora.pth",
        needs=(f"checkpoints/{LLAMA}/final_lora.pth",),
        run=f"rm -rf checkpoints/{LLAMA}-merged; litgpt merge_lora checkpoints/{LLAMA}/final_lora.pth",
        then=as_file,
    ),
    Row(
        f"""litgpt generate checkpoints/{LLAMA}-merged/ \\
  --prompt "What is machine learning?" """.rstrip(),
        needs=(f"checkpoints/{LLAMA}-merged",),
        then=answered,
    ),
    Row(
        f"litgpt serve checkpoints/{LLAMA}-merged/",
        extra="--port {port}",
        needs=(f"checkpoints/{LLAMA}-merged",),
        serves=answers,
    ),
]
INLINE: dict[str, str] = {}
