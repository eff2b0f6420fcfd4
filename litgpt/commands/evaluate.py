"""Evaluate a model: on the tasks of lm-evaluation-harness, and by its perplexity."""

from __future__ import annotations

import time
from pathlib import Path

from litgpt.cli.secret import Secret
from litgpt.evaluation.tasks import OWN, TaskList, require_harness

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
    access_token: Secret | None = None,
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
    kv_cache: str | None = None,
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
        limit: Evaluate only the first N documents of each task, to try things; below 1, this fraction of them.
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
        kv_cache: int8 keeps keys and values in 8 bits.
        precision: 32-true, bf16-true, 16-true (weights and computation), bf16-mixed, 16-mixed (float32 weights). By
            default bf16-true where the device computes it in hardware, else 32-true.
        devices: Number of devices, or their numbers as 0,2: each has the whole model, in a process of its own, and they
            share the requests. On a CPU, the number of processes.
    """
    names = [name.strip() for name in (tasks or LIST).split(",") if name.strip()]
    if names == [LIST]:
        TaskList(include_path or ()).print((filter or "").split())
        return
    if filter is not None:
        raise ValueError("--filter is for --tasks list, which shows the known tasks. Leave it out.")
    if checkpoint_dir is None:
        raise ValueError("Name a model to evaluate: `litgpt evaluate DIR --tasks ...`.")
    # Here, so that the list of tasks is there without what only a model needs.
    from litgpt.evaluation import report
    from litgpt.evaluation.perplexity import Perplexity
    from litgpt.evaluation.work import Evaluated, Work, chosen_style, results_of, tell
    from litgpt.llm.replicas import Replicas, replica_devices

    started, slots, precision = time.time(), _slots(batch_size), _precision(dtype, precision)
    if force_conversion:
        tell("--force_conversion has nothing to do: the model is evaluated as it is, no converted copy is made.")
    # What can be wrong with the tasks is said before the model is loaded.
    work: list[Work] = []
    if own_names := [name for name in names if name != OWN]:
        require_harness()
        from litgpt.evaluation.harness import HarnessOptions, Tasks, parse_gen_kwargs

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
        work.append(Tasks(TaskList(include_path or ()).load(own_names), options))
    if OWN in names:
        if data is None:
            raise ValueError("--tasks perplexity reads a text: give --data FILE_OR_FOLDER.")
        work.append(Perplexity(data, max_seq_length, stride, limit))
    elif data is not None or stride is not None or max_seq_length is not None:
        raise ValueError("--data, --stride and --max_seq_length are for --tasks perplexity. Add it, or leave them out.")
    if not own_names:
        of_tasks = {
            "num_fewshot": num_fewshot is not None,
            "include_path": bool(include_path),
            "apply_chat_template": apply_chat_template is not False,
            "fewshot_as_multiturn": fewshot_as_multiturn,
            "system_instruction": system_instruction is not None,
            "gen_kwargs": gen_kwargs is not None,
            "log_samples": log_samples,
            "predict_only": predict_only,
        }
        if given := [f"--{name}" for name, is_given in of_tasks.items() if is_given]:
            raise ValueError(
                f"{', '.join(given)}: for tasks of the harness only; --tasks perplexity reads the text as it is. "
                f"Leave {'it' if len(given) == 1 else 'them'} out."
            )
    if out_dir is not None:  # before the work, and not after it
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--out_dir {out_dir} cannot be written to ({error.strerror}). Choose another directory."
            ) from error
    with Replicas(
        checkpoint_dir,
        replica_devices(devices, device),
        max_slots=slots,
        precision=precision,
        quantize=quantize,
        kv_cache=kv_cache,
        access_token=access_token,
    ) as replicas:
        llm = replicas.llm
        style = chosen_style(llm.prompt_style, apply_chat_template) if own_names else llm.prompt_style
        model = Evaluated(replicas.run, llm.tokenizer, llm.config, style, llm.name)
        parts, interruption = results_of(work, model)
        if interruption is not None and not parts:
            tell("Nothing is done yet, so nothing is written.")
            raise interruption
        results = report.merged(
            *parts,
            report.facts(
                checkpoint=checkpoint_dir,
                started=started,
                model=model,
                template=model.template if apply_chat_template else None,
                system_instruction=system_instruction,
                fewshot_as_multiturn=fewshot_as_multiturn,
                settings={
                    "precision": replicas.precision,
                    "quantize": quantize,
                    "kv_cache": kv_cache,
                    "devices": replicas.count,
                },
                options={
                    "batch_size": batch_size,
                    "device": str(llm.device),
                    "limit": limit,
                    "gen_kwargs": gen_kwargs,
                    "num_fewshot": num_fewshot,
                    **{f"{kind}_seed": seed for kind in ("random", "numpy", "torch", "fewshot")},
                },
            ),
        )
    results["partial"] = interruption is not None
    print(report.tables(results))
    out_dir = out_dir or _folder(checkpoint_dir) / "evaluate"
    file = report.save(results, out_dir, save_filepath, log_samples or predict_only)
    tell(f"Results are in {file}" + (f" and {save_filepath}" if save_filepath else ""))
    if interruption is not None:
        raise interruption


def _slots(batch_size: int | str) -> int | None:
    """How many requests run at a time; None leaves it to the engine."""
    text = str(batch_size)
    if text == "auto" or text.startswith("auto:"):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch_size {batch_size} is not valid: give a number of 1 or more, or auto.")
    return int(text)


def _precision(dtype: str | None, precision: str | None) -> str | None:
    """What --dtype and --precision say together."""
    name = (dtype or "auto").removeprefix("torch.")
    if name == "auto":
        return precision
    if name not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not valid: give {', '.join(DTYPES)} or auto.")
    if precision not in (None, DTYPES[name]):
        raise ValueError(f"--dtype {dtype} and --precision {precision} contradict each other. Give one of them.")
    return DTYPES[name]


def _folder(checkpoint: Path) -> Path:
    """The directory of a checkpoint, next to a .gguf file that of the file."""
    from litgpt.sources.find import find_checkpoint

    place = find_checkpoint(checkpoint, incomplete=True)
    return place if place.is_dir() else place.parent
