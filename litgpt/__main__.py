"""The `litgpt` program: the table of subcommands, and what the user sees when one of them fails.

Nothing heavy is imported here: `litgpt --help` answers from the table, and a subcommand imports its own module only.
"""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import litgpt
from litgpt.cli.secret import command_line, hide
from litgpt.cli.slow_imports import announce


class Command(NamedTuple):
    """One row of the table."""

    target: str
    """`module:function`; the function's signature and docstring are the subcommand's options."""
    help: str
    """One line for `litgpt --help`."""
    listing: str | None = None
    """`module:function` that answers the bare subcommand and `<subcommand> list`, without importing torch."""


COMMANDS = {
    "download": Command(
        "litgpt.commands.download:setup",
        "Download a checkpoint or only its tokenizer; `download list` shows the known ones",
        "litgpt.commands.download:print_known_checkpoints",
    ),
    "prepare_dataset": Command(
        "litgpt.commands.prepare_dataset:setup",
        "Tokenise text, JSON or parquet files or a Hub data set for pretraining",
    ),
    "pretrain": Command(
        "litgpt.commands.pretrain:setup",
        "Train a model on text, from scratch or from a checkpoint; `pretrain list` shows the known models",
        "litgpt.commands.download:print_known_models",
    ),
    "finetune": Command("litgpt.commands.finetune_full:finetune", "Finetune all weights of a model"),
    "finetune_full": Command("litgpt.commands.finetune_full:setup", "The same, into out/finetune/full"),
    "finetune_lora": Command(
        "litgpt.commands.finetune_lora:setup", "Finetune a model with LoRA: small matrices alongside frozen weights"
    ),
    "finetune_adapter": Command(
        "litgpt.commands.finetune_adapter:setup", "Finetune a model with LLaMA-Adapter: learned prompts"
    ),
    "finetune_adapter_v2": Command(
        "litgpt.commands.finetune_adapter_v2:setup", "Finetune a model with Adapter v2: prompts, biases and scales"
    ),
    "finetune_dpo": Command(
        "litgpt.commands.finetune_dpo:setup", "Finetune a model on pairs of a preferred and another reply: DPO, IPO"
    ),
    "generate": Command("litgpt.commands.generate:setup", "Print what a model answers to a prompt"),
    "generate_full": Command(
        "litgpt.commands.generate_full:setup", "The same with weights that finetune_full has written"
    ),
    "generate_adapter": Command(
        "litgpt.commands.generate_adapter:setup", "The same with what finetune_adapter has learned"
    ),
    "generate_adapter_v2": Command(
        "litgpt.commands.generate_adapter_v2:setup", "The same with what finetune_adapter_v2 has learned"
    ),
    "generate_sequentially": Command(
        "litgpt.commands.generate_sequentially:setup", "The same with blocks on several devices, for large models"
    ),
    "generate_tp": Command(
        "litgpt.commands.generate_tp:setup", "The same with several devices, each with a part of every layer"
    ),
    "generate_speculatively": Command(
        "litgpt.commands.generate_speculatively:setup",
        "The same answer sooner: tokens are drafted, then checked",
    ),
    "chat": Command("litgpt.commands.chat:setup", "Talk with a model"),
    "serve": Command("litgpt.commands.serve:setup", "Answer requests over HTTP, OpenAI's API among them"),
    "bench": Command(
        "litgpt.commands.bench:setup",
        "Measure how many tokens a second a model reads and writes, as llama-bench does",
    ),
    "evaluate": Command(
        "litgpt.commands.evaluate:setup",
        "Evaluate a model on lm-evaluation-harness's tasks, or by perplexity; `evaluate list` shows the tasks",
        "litgpt.evaluation.tasks:print_tasks",
    ),
    "merge_lora": Command(
        "litgpt.commands.merge_lora:setup", "Put finetuned LoRA weights into the model they belong to"
    ),
    "convert": Command(
        "litgpt.commands.convert:setup",
        "Write a checkpoint in another format: Hugging Face's, GGUF, PEFT's or litgpt's own",
    ),
    "convert_to_litgpt": Command(
        "litgpt.commands.convert_to_litgpt:setup",
        "Convert a Hugging Face directory, a GGUF file or a PEFT adapter to a checkpoint",
    ),
    "convert_from_litgpt": Command(
        "litgpt.commands.convert_from_litgpt:setup",
        "Export a checkpoint in the Hugging Face format or to GGUF, or its LoRA weights in PEFT's",
    ),
    "convert_lit_checkpoint": Command(
        "litgpt.commands.convert_lit_checkpoint:setup",
        "Write a checkpoint with quantised weights, in another type, or as GGUF",
    ),
    "convert_pretrained_checkpoint": Command(
        "litgpt.commands.convert_pretrained_checkpoint:setup",
        "Strip the training state off a pretraining checkpoint",
    ),
    "validate": Command("litgpt.commands.validate:setup", "Check a checkpoint, and estimate the memory it needs"),
}

# What a user can cause and mend. ImportError is among them only as raised by our own code, with a remedy.
USER_ERRORS = (ValueError, OSError)
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")  # by name: torch must not be imported for it


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 1 (failed), 2 (wrong usage), 130 (interrupted)."""
    argv = list(command_line() if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("LITGPT_DEBUG", "0") not in ("", "0")
    argv = [argument for argument in argv if argument != "--debug"]
    code = 1
    try:
        code = dispatch(argv)
        sys.stdout.flush()  # a closed pipe shows here and not in the interpreter's own exit
        return code
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
            return 1
        code = exit.code or 0
        return code
    except KeyboardInterrupt as interrupt:
        if debug:
            print_traceback()
        if first_cause(interrupt) is not None:
            print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone. Nothing more can be written, not even at exit.
        if debug:
            print_traceback()
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return report(error, debug)
    finally:
        if "litgpt.parallel.launcher" in sys.modules:
            sys.modules["litgpt.parallel.launcher"].end(failed=code != 0)


def first_cause(error: BaseException) -> BaseException | None:
    """What to say of an error; None where this is one of several processes, and another one says it."""
    launcher = sys.modules.get("litgpt.parallel.launcher")  # only a run on several devices has imported it
    return error if launcher is None else launcher.first_cause(error)


def dispatch(argv: list[str]) -> int:
    """Choose the subcommand and run it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"litgpt {litgpt.__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    command = COMMANDS.get(name) or COMMANDS.get(name.replace("-", "_"))
    if command is None:
        return unknown_command(name)
    if command.listing and arguments in ([], ["list"]):
        load(command.listing)()
        return 0
    if arguments in (["--help"], ["-h"]):
        from litgpt.cli.help_cache import cached_help

        print(cached_help(name, lambda: call(command, name, arguments)), end="")
        return 0
    call(command, name, arguments)
    return 0


def call(command: Command, name: str, arguments: list[str]) -> None:
    """Import a command and run it."""
    silence_third_parties()
    announce()
    from litgpt import cli

    cli.run(load(command.target), arguments, prog=f"litgpt {name}")


def overview() -> str:
    """The text of `litgpt --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"""usage: litgpt <subcommand> [arguments]

Language models from download to deployment.

subcommands:
{rows}

options:
  -h, --help     Show this text; `litgpt <subcommand> --help` shows a subcommand's options
  -V, --version  Show the version
  --debug        Show the traceback of an error (as LITGPT_DEBUG=1 does)"""


def unknown_command(name: str) -> int:
    from litgpt.cli.suggest import did_you_mean

    what = "option" if name.startswith("-") else "subcommand"
    candidates = ["--help", "--version", "--debug"] if what == "option" else COMMANDS
    print(
        f"error: unknown {what} {name!r}.{did_you_mean(name, candidates)} `litgpt --help` lists them.", file=sys.stderr
    )
    return 2


def load(target: str) -> Callable[..., Any]:
    """`package.module:function` -> the function."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def report(error: Exception, debug: bool) -> int:
    """Say on stderr what went wrong, as fits its cause, and return the exit code."""
    if debug:
        print_traceback()
    cause = first_cause(error)
    if cause is None:
        return getattr(error, "exit_code", 1)
    message = user_message(cause)
    if message is None:
        if not debug:
            print_traceback()
        print(
            f"error: {type(cause).__name__}: {hide(str(cause))}\nThis looks like a bug in litgpt, not a mistake of "
            "yours: please report it with the traceback above.",
            file=sys.stderr,
        )
        return 1
    if (names := sys.modules.get("litgpt.cli.option_names")) is not None:  # a command has begun
        message = names.on_command_line(message)
    print(f"error: {hide(message)}", file=sys.stderr)
    return getattr(cause, "exit_code", 1)


def user_message(error: BaseException) -> str | None:
    """The clean message for an error that the user can mend; None for what must be a bug."""
    if isinstance(error, ImportError):
        if error.name is None:  # raised by litgpt with the remedy in its message
            return str(error)
        package = error.name.partition(".")[0]
        if package == "litgpt" or not isinstance(error, ModuleNotFoundError):
            return None
        return f"the Python package {package!r} is not installed: pip install 'litgpt[all]' or pip install {package}"
    if type(error).__name__ in OUT_OF_MEMORY:
        return f"out of memory: {first_line(error) or 'the machine has no more'}"
    if isinstance(error, FileNotFoundError | PermissionError | OSError) and error.strerror:
        names = " -> ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
        return f"{error.strerror}: {names}" if names else error.strerror
    if isinstance(error, USER_ERRORS):
        return str(error) or type(error).__name__
    return None


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def print_traceback() -> None:
    import traceback

    print(hide(traceback.format_exc()), end="", file=sys.stderr)


def silence_third_parties() -> None:
    """Hide warnings of libraries that no user of this program can act on."""
    import warnings

    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in (
        r".*LeafSpec.*is deprecated.*",
        r".*`srun` command is available.*",
        r".*pkg_resources is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
