"""The tour from pretraining over finetuning to inference, evaluation, serving and export."""

import json
import re

import requests
import yaml

from tests.documents.place import PRETRAINING, TINY, Place
from tests.documents.table import Row, makes, output, prints
from tests.documents.workflows import NOT_FROM_PYPI, answered, extras
from tests.shell import Done

TASKS = "hellaswag,gsm8k,truthfulqa_mc2,mmlu,winogrande,arc_challenge"
TINY_LLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
RECIPE = "config_hub/finetune/phi-2/lora.yaml"
CHAT = {"stdin": "Why are LLMs so useful?\n\n", "extra": "--max_new_tokens 8"}


def sorted_models(place: Place, done: Done) -> None:
    """All names, in alphabetical order, the short ones as `pretrain` takes them among them."""
    lines = done.out.splitlines()
    assert lines == sorted(lines)
    for name in ("Camel-Platypus2-13B", "CodeLlama-13b-Python-hf", "tiny-llama-1.1b", "pythia-14m", "Gemma-2b"):
        assert any(re.match(rf"{re.escape(name)} ", line) for line in lines), name
    assert "EleutherAI/pythia-410m" in done.out


def only_tiny_llamas(place: Place, done: Done) -> None:
    assert set(done.out.splitlines()) == {TINY_LLAMA, "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}


def tokenizer_alone(directory: str):
    def check(place: Place, done: Done) -> None:
        names = {path.name for path in (place.directory / "checkpoints" / directory).iterdir()}
        assert "tokenizer.json" in names
        assert not any(name.endswith((".safetensors", ".pth")) for name in names)

    return check


def chatted(place: Place, done: Done) -> None:
    for text in ("Now chatting with phi-2.", "To exit, press 'Enter' on an empty prompt.", "Seed set to 1234"):
        assert text in done.out
    assert done.out.count(">> Prompt: ") == 2
    assert ">> Reply: " in done.out
    assert re.search(r"Time for inference: [\d.]+ sec total, [\d.]+ tokens/sec, 8 tokens", done.out + done.err)


def as_in_the_recipe(place: Place, done: Done) -> None:
    """What the document shows of the settings and of the run."""
    kept = yaml.safe_load((place.directory / "out/finetune/lora-phi-2/hyperparameters.yaml").read_text())
    assert kept["data"]["class_path"] == "litgpt.data.Alpaca2k"
    train = {"max_steps": 5, "global_batch_size": 8, "micro_batch_size": 4, "max_seq_length": 512, "epochs": 1}
    assert train.items() <= kept["train"].items()
    assert {name: kept[name] for name in ("lora_r", "lora_alpha", "seed", "devices")} == {
        **{"lora_r": 8, "lora_alpha": 16, "seed": 1337, "devices": 1}
    }
    for text in (
        *("Seed set to 1337", "Number of trainable parameters: ", "Number of non-trainable parameters: "),
        *("Epoch 1 | iter 10 step 5 | loss train: ", "Training time: ", "Memory used: "),
        "Saved merged weights to 'out/finetune/lora-phi-2/final/lit_model.pth'",
        "LoRA weights to 'out/finetune/lora-phi-2/final/lit_model.pth.lora'",
    ):
        assert text in done.out, text


def predicted(place: Place, port: int) -> None:
    """What the document's request gets, in its own words."""
    code = f"""import requests, json
response = requests.post(
    "http://127.0.0.1:{port}/predict",
    json={{"prompt": "Fix typos in the following sentence: Exampel input"}}
)
print(response.json()["output"])"""
    exec(compile(code, "the document", "exec"), {})
    reply = requests.post(f"http://127.0.0.1:{port}/predict", json={"prompt": "Hello"}, timeout=60)
    assert isinstance(reply.json()["output"], str)


def loads_elsewhere(place: Place, done: Done) -> None:
    """The evidently meant result: transformers loads the folder."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from litgpt.sources.load import load_model

    folder, ids = place.directory / "out/converted_model", torch.arange(20)[None]
    assert AutoModel.from_pretrained(folder).config.model_type == "phi"
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(logits, load_model(place.directory / "checkpoints/microsoft/phi-2")(ids))


def refused_by_transformers(place: Place, done: Done) -> None:
    assert "`state_dict` cannot be passed together with a model name" in done.err
    loads_elsewhere(place, done)


def scored(place: Place, done: Done) -> None:
    assert re.search(r"\|choosing *\|", done.out), done.out
    assert "hf (" in done.out


def local_tasks(place: Place) -> str:
    """A folder with a task of its own, whose questions lie on this disk."""
    folder = place.directory / "tasks"
    folder.mkdir(exist_ok=True)
    questions = [{"question": f"{n} and one?", "choices": [str(n + 1), str(n)], "answer": 0} for n in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": "choosing",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "choosing.yaml").write_text(yaml.safe_dump(task))
    return str(folder)


AUTO_MODEL = """import torch
from transformers import AutoModel

state_dict = torch.load('out/converted_model/model.pth')
model = AutoModel.from_pretrained(
    "microsoft/phi-2", state_dict=state_dict
)

model.save_pretrained("out/converted_model/")"""

ROWS = [
    Row("pip install 'litgpt[all]'", run="", then=extras, reason=NOT_FROM_PYPI),
    Row("git clone https://github.com/Lightning-AI/litgpt.git", run="", then=extras, reason=NOT_FROM_PYPI),
    Row("cd litgpt", run="", then=extras, reason=NOT_FROM_PYPI),
    Row("pip install -e '.[all]'", run="", then=extras, reason="It installs the tree that the tests run in."),
    Row("litgpt pretrain list", then=sorted_models),
    output("Camel-Platypus2-13B"),
    Row("litgpt download list | grep  TinyLlama", then=only_tiny_llamas),
    output(TINY_LLAMA),
    Row(
        f"""litgpt download \\
   {TINY_LLAMA} \\
   --tokenizer_only true""",
        then=tokenizer_alone(TINY_LLAMA),
    ),
    Row(
        f"""litgpt pretrain tiny-llama-1.1b \\
  --data OpenWebText \\
  --tokenizer_dir {TINY_LLAMA}""",
        extra=f"{TINY} --model_config.n_query_groups 1 --data.val_split_fraction 0.05 {PRETRAINING} --train.max_seq_length 64 --overwrite true",
        then=makes("out/pretrain/final/lit_model.pth", "out/pretrain/final/tokenizer.json"),
        off="OpenWebText",
    ),
    Row("litgpt pretrain --help", then=prints("usage: litgpt pretrain", "--tokenizer_dir", "--train.max_tokens")),
    Row("litgpt download list", then=prints("mistralai/Mixtral-8x7B-Instruct-v0.1\n", "meta-llama/Llama-2-7b-hf\n")),
    output(".."),
    Row(
        "litgpt download microsoft/phi-2",
        then=makes(
            "checkpoints/microsoft/phi-2/lit_model.pth",
            says=(
                "Converting checkpoint files to LitGPT format.",
                "Saving converted checkpoint to checkpoints/microsoft/phi-2",
            ),
        ),
    ),
    output(
        "model-00001-of-00002.safetensors: 100%|████████████████████████████████| 5.00G/5.00G [00:40<00:00, 124MB/s]"
    ),
    Row(
        "ls -lh checkpoints/microsoft/phi-2/",
        needs=("checkpoints/microsoft/phi-2/lit_model.pth",),
        then=prints(
            *("config.json", "generation_config.json", "lit_model.pth", "model-00001-of-0000", "model_config.yaml"),
            *("tokenizer.json", "tokenizer_config.json"),
        ),
    ),
    output("total 11G"),
    Row("litgpt chat microsoft/phi-2", then=chatted, **CHAT),
    output("Now chatting with phi-2."),
    Row("litgpt download microsoft/phi-2", then=makes("checkpoints/microsoft/phi-2/lit_model.pth")),
    Row(
        f"""litgpt finetune_lora microsoft/phi-2\\
  --config {RECIPE} \\
  --train.max_steps 5""",
        extra="--overwrite true",
        then=as_in_the_recipe,
    ),
    Row(
        f"""litgpt finetune_lora microsoft/phi-2\\
  --config https://raw.githubusercontent.com/Lightning-AI/litgpt/main/{RECIPE} \\
  --train.max_steps 5""",
        extra="--overwrite true",
        then=as_in_the_recipe,
        reason="Run with the address of a website on loopback in the place of GitHub's.",
    ),
    output("{'checkpoint_dir': PosixPath('checkpoints/microsoft/phi-2'), # TODO"),
    Row("litgpt chat out/finetune/lora-phi-2/final/", needs=("out/finetune/lora-phi-2/final",), then=chatted, **CHAT),
    output("Now chatting with phi-2."),
    Row("litgpt download microsoft/phi-2", then=makes("checkpoints/microsoft/phi-2/lit_model.pth")),
    output(
        "model-00001-of-00002.safetensors: 100%|████████████████████████████████| 5.00G/5.00G [00:40<00:00, 124MB/s]"
    ),
    Row("litgpt chat microsoft/phi-2", then=chatted, **CHAT),
    output("Now chatting with phi-2."),
    Row(
        """from litgpt import LLM

llm = LLM.load("microsoft/phi-2")
text = llm.generate("What do Llamas eat?", top_k=1, max_new_tokens=30)
print(text)""",
        "python",
        then=answered,
    ),
    Row(
        'llm = LLM.load("path/to/my/local/checkpoint")',
        "python",
        run="""from litgpt import LLM
llm = LLM.load("checkpoints/microsoft/phi-2")""",
        needs=("checkpoints/microsoft/phi-2/lit_model.pth",),
        reason="The path stands for one of the user's own.",
    ),
    Row(
        f"""litgpt evaluate microsoft/phi-2
  --batch_size 16 \\
  --tasks "{TASKS}" """.strip(),
        run=f'litgpt evaluate microsoft/phi-2 --batch_size 16 --tasks "{TASKS}"',
        extra="--tasks choosing --include_path {tasks}",
        then=prints("choosing"),
        reason="A backslash is missing behind the first line; as typed, a shell runs it without tasks, which lists them.",
        off="evaluate",
    ),
    Row("litgpt download microsoft/phi-2", then=makes("checkpoints/microsoft/phi-2/lit_model.pth")),
    Row("litgpt serve microsoft/phi-2", extra="--port {port}", serves=predicted),
    Row(
        """import requests, json
 response = requests.post(
     "http://127.0.0.1:8000/predict",
     json={"prompt": "Fix typos in the following sentence: Exampel input"}
)
print(response.json()["output"])""",
        "options",
        run="",
        reason="The second line is indented by mistake. Asked of the server of the row before, at a port of its own.",
    ),
    output("Instruct: Fix typos in the following sentence: Exampel input"),
    Row(
        "litgpt convert_from_litgpt microsoft/phi-2 out/converted_model/",
        run="rm -rf out/converted_model; litgpt convert_from_litgpt microsoft/phi-2 out/converted_model/",
        needs=("checkpoints/microsoft/phi-2/lit_model.pth",),
        then=makes("out/converted_model/model.pth", "out/converted_model/model.safetensors"),
    ),
    Row(
        "cp checkpoints/microsoft/phi-2/config.json out/converted_model/config.json",
        needs=("out/converted_model/model.pth",),
        then=loads_elsewhere,
    ),
    Row(
        AUTO_MODEL,
        "python",
        needs=("out/converted_model/model.pth",),
        code=1,
        then=refused_by_transformers,
        reason="transformers 5 no longer takes `state_dict` next to a name; it says so. What is meant, safetensors that "
        "from_pretrained loads, convert_from_litgpt has written already: AutoModel.from_pretrained('out/converted_model').",
    ),
    Row(
        "⚡ ~/litgpt ls -lh out/converted_model",
        run="ls -lh out/converted_model",
        needs=("out/converted_model/model.pth",),
        then=prints("config.json", "model.pth", "model.safetensors"),
        reason="A prompt stands before it.",
    ),
    output("total 16G"),
    Row(
        """cp checkpoints/microsoft/phi-2/tokenizer*
out/converted_model""",
        run="cp checkpoints/microsoft/phi-2/tokenizer* out/converted_model",
        needs=("out/converted_model/model.pth",),
        then=makes("out/converted_model/tokenizer.json"),
        reason="A backslash is missing behind the first line.",
    ),
    Row(
        rf"""lm_eval --model hf \
    --model_args pretrained="out/converted_model" \
    --tasks "{TASKS}" \
    --device "cuda:0" \
    --batch_size 4""",
        run='lm_eval --model hf --model_args pretrained="out/converted_model" --tasks choosing --include_path {tasks} '
        "--device cpu --batch_size 4",
        needs=("out/converted_model/model.pth",),
        then=scored,
        reason="Run on a task whose questions are on this disk, and on a CPU.",
    ),
]
INLINE = {
    "litgpt download list": "a row",
    "litgpt chat": "a row",
    "litgpt evaluate": "a row",
    "litgpt finetune_lora --help": "run",
    "--max_steps 5": "run",
    "--train.max_steps 5": "a row",
    "--multiline true": "run",
    "--precision bf16-true": "run",
    "litgpt download ... --access_token ...": "run",
}
SPOKEN = [
    # What the text around the blocks names, as commands.
    Row("litgpt finetune_lora --help", then=prints("usage: litgpt finetune_lora", "--lora_r")),
    Row(
        "--max_steps 5",
        "options",
        run=f"litgpt finetune_lora microsoft/phi-2 --config {RECIPE} --max_steps 5 --print_config",
        then=prints("max_steps: 5"),
    ),
    Row(
        "--multiline true",
        "options",
        run="litgpt chat microsoft/phi-2 --multiline true --max_new_tokens 2",
        stdin="Hello,\nwho are you?\n\n\n",
        then=prints("Now chatting with phi-2."),
    ),
    Row(
        "--precision bf16-true",
        "options",
        run="litgpt chat microsoft/phi-2 --precision bf16-true",
        then=chatted,
        **CHAT,
    ),
    Row(
        "litgpt download ... --access_token ...",
        run="env -u HF_TOKEN litgpt download meta-llama/Llama-2-7b-hf --checkpoint_dir other --access_token hf_of_the_test",
        then=makes("other/meta-llama/Llama-2-7b-hf/lit_model.pth"),
    ),
    Row(
        "litgpt download ... --access_token ...",
        run="env -u HF_TOKEN litgpt download meta-llama/Llama-2-7b-hf --checkpoint_dir none",
        code=1,
        then=prints("--access_token"),
        reason="Without a token, a gated repository is refused, and the option is named.",
    ),
]
