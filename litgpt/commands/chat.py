"""Talk with a model."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path

try:
    import termios
except ImportError:  # Windows
    termios = None

from litgpt.cli.notes import notes_wait
from litgpt.cli.secret import Secret
from litgpt.cli.suggest import did_you_mean
from litgpt.generation.sampling import Sampling
from litgpt.llm.llm import LLM
from litgpt.llm.loading import LoadOptions, load_parts
from litgpt.llm.terminal import Stopwatch, announce_compilation, clean, cut_line, say
from litgpt.prompts import format_of_options
from litgpt.prompts.styles import Message

HELP = """/reset       forget the conversation
/save FILE   write the conversation to FILE, as JSON where the name ends in .json
/help        this list
/quit        leave, as /exit, an empty prompt or Ctrl-D do
Enter sends the prompt. With --multiline true a prompt may have several lines; !submit on a line of its own sends it.
Ctrl-C stops a reply."""

LEAVING = ("!quit", "/quit", "/exit")
REPLY = 1024  # tokens that are kept free for a reply, at most half of the context


def setup(
    checkpoint_dir: Path,
    *,
    max_new_tokens: int | None = None,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 0.8,
    system_prompt: str | None = None,
    prompt_style: str | None = None,
    chat_template: str | None = None,
    quantize: str | None = None,
    kv_cache: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    multiline: bool = False,
    seed: int = 1234,
    access_token: Secret | None = None,
) -> None:
    """Talk with a model on the terminal; prompts may also be piped in, one per line.

    The conversation goes on from prompt to prompt, in the model's own chat format. A model that was only pretrained
    has none: it continues each prompt's text, and every prompt starts afresh. /help lists what else can be typed.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        max_new_tokens: A reply ends after that many tokens, if the model does not end it before. By default it goes on
            to the end of its turn, or of the context; that of a model without a chat format, which continues the text,
            for 256 tokens.
        top_k: Sample only from the k most likely tokens; 1 always takes the most likely one.
        top_p: Draw from the most likely tokens that together reach this probability.
        min_p: Draw from tokens at least this fraction as likely as the most likely one.
        temperature: Below 1 the replies get more certain, above 1 more varied; 0 always takes the most likely token.
        system_prompt: Replaces the system message of the model's prompt format.
        prompt_style: Name of a prompt format, a class package.module.Class, or a chat template's .jinja file, in place
            of the checkpoint's own; `default` gives the model the bare prompt.
        chat_template: Name of one of the checkpoint's chat templates, where it has several; by default the usual one.
        quantize: Keep the weights in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8; for CPUs
            int4 or int8, or gguf, the blocks of a GGUF file as they lie in it. By default as the checkpoint has them.
        kv_cache: int8 keeps keys and values in 8 bits, in about half of the memory. By default they have the type
            that is computed in.
        precision: 32-true, bf16-true, 16-true (weights and computation), bf16-mixed, 16-mixed (float32 weights). By
            default bf16-true where the device computes it in hardware, else 32-true.
        compile: Compile the decoding: on a CPU in the background, for later runs too; a GPU's first answer waits.
        multiline: A prompt may have several lines; !submit on a line of its own sends it.
        seed: Of the first reply; the others count on from it.
        access_token: For a gated model that has to be downloaded first.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, seed=seed)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {max_new_tokens} is not valid: give 1 or more.")
    style = format_of_options(prompt_style, chat_template)
    llm = LLM(load_parts(checkpoint_dir, LoadOptions(precision, quantize, compile, style, access_token, kv_cache)))
    print(f"Now chatting with {llm.name}.")
    if multiline:
        print("To send a prompt, enter '!submit' on a line of its own. To exit, enter '!quit' or press Ctrl-D.")
    else:
        print("To exit, press 'Enter' on an empty prompt.")
    print(f"\nSeed set to {seed}", flush=True)
    say("Ctrl-C stops a reply; /help lists what else can be typed.")
    if compile:
        announce_compilation(llm)
    Chat(llm, max_new_tokens, sampling, system_prompt).run(read_lines if multiline else read_line)


class Chat:
    """One conversation: what was said, and how it goes on."""

    def __init__(
        self,
        llm: LLM,
        max_new_tokens: int | None,
        sampling: Sampling,
        system_prompt: str | None = None,
    ) -> None:
        self.llm = llm
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self.turns: list[Message] = []  # what the model still remembers
        self.transcript: list[Message] = [*self.system]  # everything, for /save
        self.written: set[Path] = set()
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    def run(self, read: Callable[[], str]) -> None:
        """Reads prompts and answers them until an empty one or the end of the input."""
        _edit_lines()
        while True:
            try:
                prompt = clean(read())
                if not prompt.strip() or prompt.strip().lower() in LEAVING:
                    return
                if not self.run_command(prompt.strip()):
                    self.answer(prompt)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                del self.turns[len(self.turns) // 2 * 2 :]  # a prompt whose reply never began
                print("\nTo exit, press 'Enter' on an empty prompt, or Ctrl-D.")

    def run_command(self, line: str) -> bool:
        """Does what a line such as `/save FILE` says; False where it is a prompt."""
        word, _, rest = line.partition(" ")
        if word in self.commands:
            self.commands[word](rest.strip())
            return True
        if line[:1] == "/" and line[1:].isalpha():
            say(f"There is no {line}.{did_you_mean(line, [*self.commands, *LEAVING])} /help lists what there is.")
            return True
        return False

    def answer(self, prompt: str) -> None:
        """Adds one turn to the conversation, printing the reply as it comes. Ctrl-C ends the reply."""
        self.turns.append({"role": "user", "content": prompt})
        try:
            ids = self._fitting_prompt()
        except ValueError as error:
            self.turns.pop()
            say(str(error))
            return
        stopwatch = Stopwatch()
        request = self.llm.codec.request(ids, self.max_new_tokens, self.sampling)
        self.sampling = self.sampling.following(1)
        reply = ""
        stream = self.llm.live.stream(request)
        with notes_wait():
            with _unseen_typing(), contextlib.suppress(KeyboardInterrupt), contextlib.closing(stream):
                print(">> Reply: ", end="", flush=True)
                for piece in self.llm.codec.text(stopwatch.count(stream), ids):
                    reply += piece
                    print(piece, end="", flush=True)
            print("\n", flush=True)
        if line := cut_line(self.llm, stopwatch, len(ids), self.max_new_tokens):
            say(line)
        say(f"Time for inference: {stopwatch.report()}\n")
        self._remember(prompt, reply)

    def reset(self, _: str = "") -> None:
        """Forgets the conversation."""
        self.turns = []
        self.transcript = [*self.system]
        print("The conversation starts afresh.")

    def save(self, name: str) -> None:
        """Writes the whole conversation to a file; one that somebody else wrote is left alone."""
        if not name:
            say("/save needs the name of a file.")
            return
        file = Path(name).expanduser()
        if file.exists() and file not in self.written:
            say(f"{file} exists. Give another name.")
            return
        try:
            file.write_text(self._as_text(as_json=file.suffix == ".json"), encoding="utf-8")
        except OSError as error:
            say(f"{file} cannot be written ({error.strerror}).")
            return
        self.written.add(file)
        print(f"Saved the conversation to {file}")

    # -- inside

    def _fitting_prompt(self) -> list[int]:
        """The conversation's token ids, its oldest turns left out where it is longer than the context.

        Raises:
            ValueError: the last prompt alone is too long, or the prompt format refuses the conversation.
        """
        context = self.llm.config.block_size
        reserved = min(self.max_new_tokens or REPLY, context // 2)  # for the reply
        ids = self.llm.codec.encode([*self.system, *self.turns])
        dropped = 0
        while len(ids) + reserved > context and len(self.turns) > 2:
            del self.turns[:2]
            dropped += 1
            ids = self.llm.codec.encode([*self.system, *self.turns])
        if dropped:
            turns = "its oldest turn is" if dropped == 1 else f"its {dropped} oldest turns are"
            say(f"The conversation is longer than the model's context of {context} tokens: {turns} dropped.")
        if not ids:
            raise ValueError("The prompt is empty.")
        if len(ids) >= context:
            raise ValueError(
                f"This prompt has {len(ids)} tokens, and the model's context has room for {context}, reply included. "
                "Shorten it."
            )
        return ids

    def _remember(self, prompt: str, reply: str) -> None:
        said: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        self.transcript += said
        self.turns.pop()
        if not self.llm.prompt_style.continues_text:
            self.turns += said

    def _as_text(self, as_json: bool) -> str:
        if as_json:
            return json.dumps({"messages": self.transcript}, ensure_ascii=False, indent=2) + "\n"
        labels = {"system": "System", "user": ">> Prompt", "assistant": ">> Reply"}
        return "".join(f"{labels[message['role']]}: {message['content']}\n\n" for message in self.transcript)


def read_line() -> str:
    """One prompt of one line; EOFError at the end of the input."""
    line = input(">> Prompt: ")
    _echo(line)
    return line


def read_lines() -> str:
    """One prompt of several lines, up to `!submit` or the end of the input; "" to leave."""
    lines: list[str] = []
    print(">> Prompt: ", end="", flush=True)
    while True:
        try:
            line = input()
        except EOFError:
            if lines:
                return "\n".join(lines)
            raise
        _echo(line)
        if line.strip().lower() in LEAVING:
            return ""
        if line.strip() == "!submit":
            if any(map(str.strip, lines)):
                return "\n".join(lines)
            lines, line = [], ""
            print(">> Prompt: ", end="", flush=True)
            continue
        lines.append(line)
        if len(lines) == 1 and line.startswith("/"):
            return line


def _echo(line: str) -> None:
    """A piped-in prompt stands in the output as a typed one does."""
    if not sys.stdin.isatty():
        print(line, flush=True)


@contextlib.contextmanager
def _unseen_typing() -> Generator[None]:
    """What is typed meanwhile on a terminal does not appear in the reply: it waits for the next prompt."""
    if not sys.stdin.isatty() or termios is None:
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    unseen = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(keyboard, termios.TCSANOW, unseen)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _edit_lines() -> None:
    """Line editing and history on a terminal."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401
