"""Evaluate a model: on the tasks of lm-evaluation-harness, and by its perplexity."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from litgpt.evaluation.tasks import OWN, TaskList

DTYPES = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}
LIST = "list"


def setup(
    checkpoint_dir: Path | None = None,
    *,
    tasks: str | None = None,
    out_dir: Path | None = None,
    force_conversion: bool = False,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str | None = None,
    limit: float | None = None,
    seed: int = 1234,
    save_filepath: Path | None = None,
    access_token: str | None = None,
    filter: str | None = None,
    include_path: list[Path] | None = None,
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool = False,
    system_instruction: str | None = None,
    gen_kwargs: str | None = None,
    log_samples: bool = False,
    predict_only: bool = False,
    data: Path | None = None,
    max_seq_length: int | None = None,
    stride: int | None = None,
    quantize: str | None = None,
    precision: str | None = None,
    devices: int | str = 1,
) -> None:
    """Evaluate a model on tasks of EleutherAI's lm-evaluation-harness, or by its perplexity on your own text.

    The table goes to stdout; results.json has the harness's form. Ctrl-C leaves the figures of what is done by then.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        tasks: Names with commas between them, such as "hellaswag,gsm8k"; patterns as mmlu_*, and .yaml files of tasks,
            are possible. `perplexity` reads --data, and needs no harness. Without this option, or with `list`, the
            known tasks are printed.
        out_dir: Where results.json and samples go; by default `evaluate` in the checkpoint directory.
        force_conversion: Has nothing to do: the model is evaluated as it is, no converted copy is made.
        num_fewshot: How many solved examples stand before each question; by default as the task says.
        batch_size: How many requests are worked on at a time; auto takes as many as are useful and fit into memory.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        dtype: float32, bfloat16 or float16: another way to say --precision.
        limit: Evaluate only the first so many documents of each task; below 1, that part of them. For trying things.
        seed: Of the examples that are drawn, and of answers where a task draws them.
        save_filepath: Another file for the results.
        access_token: For a gated model that has to be downloaded first.
        filter: With `--tasks list`: print only lines with this word (or words, with spaces between them).
        include_path: Folders of tasks of your own, in the harness's YAML.
        apply_chat_template: Put the tasks as conversations in the model's own format; a name chooses among several
            templates of the checkpoint.
        fewshot_as_multiturn: The examples are earlier turns of the conversation; needs --apply_chat_template.
        system_instruction: A text at the beginning of each prompt; with --apply_chat_template the system message.
        gen_kwargs: Settings of generation in place of the tasks' own, such as max_gen_toks=64,temperature=0.
        log_samples: Write every document with its prompts and answers into samples_TASK_DATE.jsonl.
        predict_only: Only write the answers, as samples, without figures.
        data: For `--tasks perplexity`: a .txt file (one document), a .jsonl file with "text" (one in each line), or a
            folder of such files.
        max_seq_length: For perplexity: how many tokens the model sees at a time; by default its context.
        stride: For perplexity: how many tokens each window after the first predicts; by default half of what the model
            sees at a time.
        quantize: Load the weights in 4 or 8 bits; `litgpt generate --help` lists how. By default as the checkpoint has
            them.
        precision: 32-true, bf16-true, 16-true (weights and computation), bf16-mixed, 16-mixed (float32 weights). By
            default bf16-true where the device computes it in hardware, else 32-true.
        devices: Number of devices, or their numbers as 0,2: each has the whole model, in a process of its own, and they
            share the requests. On a CPU, the number of processes.
    """
    started = time.time()
    names = [name.strip() for name in (tasks or LIST).split(",") if name.strip()]
    if names == [LIST]:
        TaskList(include_path or ()).print((filter or "").split())
        return
    if filter is not None:
        raise ValueError("--filter is for --tasks list, which shows the known tasks. Leave it out.")
    if checkpoint_dir is None:
        raise ValueError("Name a model to evaluate: `litgpt evaluate DIR --tasks ...`.")
    if fewshot_as_multiturn and not apply_chat_template:
        raise ValueError("--fewshot_as_multiturn makes turns of a conversation: give --apply_chat_template true, too.")
    if limit is not None and limit <= 0:
        raise ValueError(f"--limit {limit} is not possible: give a number of documents, or a part of them below 1.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num_fewshot {num_fewshot} is not possible: give 0 or more.")
    slots = _slots(batch_size)
    precision = _precision(dtype, precision)
    measures_perplexity = OWN in names
    if measures_perplexity != (data is not None):
        raise ValueError(
            "--tasks perplexity reads a text: give --data FILE_OR_FOLDER."
            if measures_perplexity
            else "--data is for --tasks perplexity: add it, or leave --data out."
        )
    if not measures_perplexity and (stride or max_seq_length):
        raise ValueError("--stride and --max_seq_length are for --tasks perplexity. Leave them out.")
    names = [name for name in names if name != OWN]

    # What can be wrong with the tasks is said before the model is loaded; so is what cannot be downloaded.
    from litgpt.commands.inference import say
    from litgpt.evaluation import report

    if force_conversion:
        say("--force_conversion has nothing to do: the model is evaluated as it is, no converted copy is made.")
    loaded: dict[str, Any] = {"tasks": {}}
    options = None
    if names:
        task_list = TaskList(include_path or ())
        from litgpt.evaluation.harness import HarnessOptions, parse_gen_kwargs

        options = HarnessOptions(
            num_fewshot,
            limit,
            apply_chat_template,
            fewshot_as_multiturn,
            system_instruction,
            parse_gen_kwargs(gen_kwargs),
            predict_only,
            seed,
        )
        loaded = task_list.load(names)
    documents = []
    if measures_perplexity:
        from litgpt.evaluation import perplexity

        documents = perplexity.read_documents(data)
        if limit is not None:
            documents = documents[: int(limit) if limit >= 1 else max(1, round(limit * len(documents)))]

    import torch

    from litgpt.distributed import seed_everything
    from litgpt.evaluation.bos import bos_policy, prefix_token
    from litgpt.llm.replicas import load_replicas
    from litgpt.prompts import ChatTemplate

    torch.set_grad_enabled(False)
    seed_everything(seed)
    with load_replicas(
        checkpoint_dir,
        devices=devices,
        device=device,
        slots=slots,
        precision=precision,
        quantize=quantize,
        access_token=access_token,
    ) as replicas:
        llm = replicas.llm
        if isinstance(apply_chat_template, str):
            if not isinstance(llm.prompt_style, ChatTemplate):
                raise ValueError(
                    f"--apply_chat_template {apply_chat_template} names a chat template, and the checkpoint has none. "
                    "`true` puts tasks in the prompt format that it has."
                )
            llm.prompt_style = llm.prompt_style.named(apply_chat_template)
        parts, template, interrupted = [], None, None
        if names:
            from litgpt.evaluation.adapter import EngineLM
            from litgpt.evaluation.harness import Run

            lm = EngineLM(
                replicas.run, llm.tokenizer, llm.config, llm.prompt_style, name=llm.name, seed=seed, tell=_show
            )
            if apply_chat_template:
                template = lm.chat_template(apply_chat_template)
            run = Run(lm, loaded, options)
            try:
                parts.append(run.evaluate())
            except KeyboardInterrupt as error:
                interrupted = error
                say("\nInterrupted. What is done is kept:")
                if (part := run.part()) is not None:
                    parts.append(part)
        if measures_perplexity and interrupted is None:
            window = max_seq_length or llm.config.block_size
            if not 2 <= window <= llm.config.block_size:
                raise ValueError(
                    f"--max_seq_length {window} is not possible: give 2 to {llm.config.block_size}, the context."
                )
            stride = stride or window // 2
            if not 1 <= stride <= window:
                raise ValueError(f"--stride {stride} is not possible: give 1 to {window}.")
            prefix = prefix_token(llm.tokenizer)
            try:
                perplexity.measure(replicas.run, llm.tokenizer, documents, window=window, stride=stride, prefix=prefix)
            except KeyboardInterrupt as error:
                interrupted = error
                say("\nInterrupted. What is done is kept:")
                documents = [document for document in documents if document.num_tokens and not document.windows_left]
            if documents:
                print(perplexity.table(documents))
                print()
                parts.append(perplexity.results(documents, data, window, stride))
        if not parts:
            say("Nothing is done yet, so nothing is written.")
            raise interrupted
        results = report.merged(
            *parts,
            report.facts(
                name=llm.name,
                checkpoint=checkpoint_dir,
                started=started,
                template=template,
                system_instruction=system_instruction,
                fewshot_as_multiturn=fewshot_as_multiturn,
                model={
                    "precision": replicas.precision,
                    "quantize": quantize,
                    "devices": replicas.count,
                    "max_length": llm.config.block_size,
                    "bos": bos_policy(llm.tokenizer),
                },
                options={
                    "batch_size": batch_size,
                    "device": str(llm.device),
                    "limit": limit,
                    "gen_kwargs": options.gen_kwargs if options else None,
                    "num_fewshot": num_fewshot,
                    "random_seed": seed,
                    "numpy_seed": seed,
                    "torch_seed": seed,
                    "fewshot_seed": seed,
                },
            ),
        )
        results["partial"] = interrupted is not None
        place = out_dir or _folder(checkpoint_dir, Path(llm.tokenizer.dir)) / "evaluate"
        if interrupted is not None:
            for name, counts in results["n-samples"].items():
                print(f"PARTIAL: {name}: {counts['effective']} of {counts['original']} documents")
        print(report.table(results))
        if results.get("groups"):
            print()
            print(report.table(results, "groups"))
        file = report.save(results, place, save_filepath, log_samples or predict_only)
        say(f"Results are in {file}" + (f" and {save_filepath}" if save_filepath else ""))
        if interrupted is not None:
            raise interrupted


def print_tasks() -> None:
    """Prints the known tasks."""
    TaskList().print()


def _slots(batch_size: int | str) -> int | None:
    """How many requests run at a time; None leaves it to the engine."""
    text = str(batch_size)
    if text == "auto" or text.startswith("auto:"):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch_size {batch_size} is not possible: give a number of 1 or more, or auto.")
    return int(text)


def _precision(dtype: str | None, precision: str | None) -> str | None:
    """What --dtype and --precision say together."""
    name = str(dtype or "auto").removeprefix("torch.")
    if name == "auto":
        return precision
    if name not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not possible: give {', '.join(DTYPES)} or auto.")
    if precision not in (None, DTYPES[name]):
        raise ValueError(f"--dtype {dtype} and --precision {precision} contradict each other. Give one of them.")
    return DTYPES[name]


def _folder(checkpoint: Path, files: Path) -> Path:
    """The directory of a checkpoint, beside a .gguf file that of the file."""
    from litgpt.checkpoint import resolve_checkpoint_dir

    try:
        place = resolve_checkpoint_dir(checkpoint, incomplete=True)
    except FileNotFoundError:
        return files
    return place if place.is_dir() else place.parent


def _show(task: str, prompt: str, continuation: str | None) -> None:
    """The first prompt of a task, as the model gets it."""
    line = "-" * 20
    end = "" if continuation is None else f"\n{line} and the first answer that is scored {line}\n{continuation}"
    text = f"{line} First prompt of {task} {line}\n{prompt}{end}\n{line * 2}"
    print(text.encode("utf-8", "replace").decode("utf-8"), file=sys.stderr, flush=True)
    if os.environ.get("LITGPT_DEBUG"):
        print(repr(prompt), file=sys.stderr)
