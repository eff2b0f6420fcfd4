"""Where the documents' lines are run: a directory, a hub and a website on loopback, and a shell."""

import json
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.documents import stand_ins
from tests.hub_server import Hub, serve_hub
from tests.shell import Done, Shell

ROOT = Path(__file__).parents[2]
TOKEN = "hf_of_the_test"
GATED = ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "google/gemma-2b")
REPOSITORIES = {
    "microsoft/phi-2": None,
    "meta-llama/Meta-Llama-3-8B": None,
    "meta-llama/Llama-3.1-8B": "Llama-3.1-8B",
    "meta-llama/Llama-2-7b-hf": None,
    "google/gemma-2b": None,
    "google/gemma-7b": None,
    "mistralai/Mistral-7B-v0.1": None,
    "tiiuae/falcon-7b": None,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": None,
    "EleutherAI/pythia-14m": None,
    "EleutherAI/pythia-160m": None,
}
RAW = "https://raw.githubusercontent.com"
# What a row needs that a row before it makes, where it is run alone.
TUNING = (
    "--data JSON --data.json_path data/alpaca.json --data.num_workers 0 --train.max_steps 1 --eval.max_new_tokens 2"
)
TINY = "--model_config.n_layer 2 --model_config.n_embd 32 --model_config.n_head 2 --model_config.intermediate_size 64"
PRETRAINING = "--train.max_steps 1 --train.micro_batch_size 1 --train.global_batch_size 1 --eval.max_iters 1"
MADE_BY = {
    "checkpoints/microsoft/phi-2/lit_model.pth": "litgpt download microsoft/phi-2",
    "checkpoints/meta-llama/Llama-2-7b-hf/lit_model.pth": "litgpt download meta-llama/Llama-2-7b-hf",
    "out/phi2-lora/final": f"litgpt finetune_lora microsoft/phi-2 --out_dir out/phi2-lora {TUNING}",
    "out/phi2-merged": "litgpt merge_lora out/phi2-lora/final --out_dir out/phi2-merged",
    "out/finetune/logs.txt": f"litgpt finetune microsoft/phi-2 --train.logger_name tensorboard {TUNING}",
    "out/finetune/lora-phi-2/final": f"litgpt finetune_lora microsoft/phi-2 --out_dir out/finetune/lora-phi-2 {TUNING}",
    "out/converted_model/model.pth": "litgpt convert_from_litgpt microsoft/phi-2 out/converted_model/",
    "checkpoints/meta-llama/Llama-2-7b-hf/final_lora.pth": (
        f"litgpt finetune_lora meta-llama/Llama-2-7b-hf --out_dir out/llama {TUNING} --overwrite true\n"
        "cp out/llama/final/lit_model.pth.lora checkpoints/meta-llama/Llama-2-7b-hf/final_lora.pth"
    ),
    "checkpoints/meta-llama/Llama-2-7b-hf-merged": (
        "litgpt merge_lora checkpoints/meta-llama/Llama-2-7b-hf/final_lora.pth"
    ),
    "new_pretrained_checkpoint/final": (
        "litgpt pretrain pythia-160m --initial_checkpoint_dir EleutherAI/pythia-160m --out_dir new_pretrained_checkpoint "
        f"--data TextFiles --data.train_data_path custom_pretraining_data --logger_name csv {PRETRAINING}"
    ),
    "new_pretrained_checkpoint_converted": (
        "litgpt convert_pretrained_checkpoint ./new_pretrained_checkpoint/final ./new_pretrained_checkpoint_converted"
    ),
    "data/pretrain": (
        "litgpt prepare_dataset --source_path data/my_corpus.txt --checkpoint_dir checkpoints/tokenizer "
        "--destination_path data/pretrain --split train,val"
    ),
}
NEEDED_FOR = {
    "out/phi2-merged": "out/phi2-lora/final",
    "out/converted_model/model.pth": "checkpoints/microsoft/phi-2/lit_model.pth",
    "checkpoints/meta-llama/Llama-2-7b-hf-merged": "checkpoints/meta-llama/Llama-2-7b-hf/final_lora.pth",
    "new_pretrained_checkpoint_converted": "new_pretrained_checkpoint/final",
}


class Place:
    """A directory to work in, with what the documents take for granted: text files, records, a corpus."""

    def __init__(self, directory: Path, hub: Hub, website: str, shell: Shell) -> None:
        self.directory, self.hub, self.website, self.shell = directory, hub, website, shell

    def run(self, script: str, stdin: str = "") -> Done:
        return self.shell.run(script, self.directory, stdin)

    def need(self, path: str) -> None:
        """Makes what a row before would have made."""
        if (self.directory / path).exists():
            return
        if path in NEEDED_FOR:
            self.need(NEEDED_FOR[path])
        self.shell.run(MADE_BY[path], self.directory, check=True)

    @contextmanager
    def serving(self, command: str, port: int) -> Iterator[subprocess.Popen]:
        """A server that has loaded its model, and is stopped at the end."""
        process = self.shell.start(command, self.directory)
        printed: list[str] = []
        reader = threading.Thread(target=lambda: printed.extend(process.stdout), daemon=True)
        reader.start()
        try:
            until = time.monotonic() + 120
            while True:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                assert process.poll() is None, "".join(printed)
                assert time.monotonic() < until, "".join(printed)
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            process.wait(60)
            reader.join(10)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def website(root: Path) -> Iterator[str]:
    """Files over HTTP, as raw.githubusercontent.com has the recipes."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


SRUN = """\
#!/bin/bash
# Starts a command on every node of the allocation, as often as it is told, each process with what SLURM tells it.
tasks=1
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks-per-node=* ]] && tasks=${1#*=}
  shift
done
export SLURM_NTASKS_PER_NODE=$tasks SLURM_NTASKS=$((SLURM_NNODES * tasks)) SLURM_STEP_ID=0
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$((rank % tasks)) SLURM_NODEID=$((rank / tasks)) "$@" &
  started="$started $!"
done
for process in $started; do wait "$process" || failed=1; done
exit ${failed:-0}
"""
SBATCH = """\
#!/bin/bash
# Runs a batch script once, as on the first node of an allocation.
for word; do
  case $word in
    --nodes=*) nodes=${word#*=} ;;
    --*) ;;
    *) script=$word ;;
  esac
done
export SLURM_JOB_ID=1 SLURM_JOB_NAME=$script SLURM_NNODES=$nodes SLURM_NTASKS=$nodes SLURM_NODELIST=localhost
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
export MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
bash -e "$script"
"""


@contextmanager
def made(directory: Path) -> Iterator[Place]:
    """The place, below an empty directory whose path is short."""
    work, site = directory / "work", directory / "site"
    recipes = site / "Lightning-AI/litgpt/main"
    recipes.mkdir(parents=True)
    (recipes / "config_hub").symlink_to(ROOT / "config_hub")
    for folder in ("data/alpaca", "data/shared", "custom_pretraining_data", "custom_pretraining_data_2", "config"):
        (work / folder).mkdir(parents=True)
    for part in range(2):
        (work / f"custom_pretraining_data/combined_{part + 1}.txt").write_text(stand_ins.text(part))
        (work / f"custom_pretraining_data_2/combined_{part + 1}.txt").write_text(stand_ins.text(part + 10))
    (work / "data/my_corpus.txt").write_text(stand_ins.text(5))
    records = json.dumps(stand_ins.instructions(40))
    names = ("alpaca", "alpaca_sample", "custom_dataset", "my_dataset", "alpaca/alpaca_data_cleaned_archive")
    for name in names:
        (work / f"data/{name}.json").write_text(records)
    hub = Hub()
    for number, (repo_id, name) in enumerate(REPOSITORIES.items()):
        hub.repositories[repo_id] = stand_ins.checkpoint(repo_id, directory / f"made-{number}", name)
    hub.repositories |= stand_ins.data_sets()
    hub.tokens = dict.fromkeys(GATED, TOKEN)
    shell = directory / "shell"
    shell.mkdir()
    with ExitStack() as stack:
        stack.enter_context(serve_hub(hub))
        address = stack.enter_context(website(site))
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(directory / "hf"),
            "HF_HUB_OFFLINE": "0",
            "LITGPT_CACHE_DIR": str(directory / "cache"),
        }
        place = Place(work, hub, address, stack.enter_context(Shell(shell, environment=environment)))
        for name, script in (("srun", SRUN), ("sbatch", SBATCH)):
            program = shell / "bin" / name
            program.write_text(script)
            program.chmod(0o755)
        tokenizer = work / "checkpoints/tokenizer"
        tokenizer.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tokenizer / name).write_bytes(hub.repositories["EleutherAI/pythia-14m"][name])
        yield place
