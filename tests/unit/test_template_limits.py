"""A chat template is a program from a stranger: whatever it does, it ends soon and in little memory."""

import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType

import pytest

from litgpt.data.records import Conversation
from litgpt.data.sample_encoding import ConversationEncoder
from litgpt.prompts import ChatTemplate, rendering
from litgpt.prompts.rendering import TemplateLimitError, render_template, rendered_ahead
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files

HELLO = [{"role": "user", "content": "Hello"}]
GOOD = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
DOUBLING = "{{% set ns = namespace(x={0}, y={0}) %}}{{% for i in range(60) %}}{1}{{% endfor %}}"
NESTING = "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
BOMBS = {
    # Jinja computes what is constant when it reads the template, and the rest when it renders it.
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "format of a date": "{{ strftime_now('%c' * 10**8) }}",
    "product": "{{ 'x' * 10**10 }}",
    "product of a variable": "{% set n = 10**10 %}{{ messages[0].content * n }}",
    "list": "{{ messages * 10**10 }}",
    "power": "{% set n = 10**9 %}{{ (9 + messages|length) ** n }}",
    "filter": "{{ messages[0].content|center(10**10) }}",
    "indentation": "{{ messages|tojson(indent=10**10) }}",
    "width": "{{ '%10000000000s' % messages[0].content }}",
    "format": "{{ '{:10000000000}'.format(messages[0].content) }}",
    "method": "{{ messages[0].content.ljust(10**10) }}",
    "replacement": "{% set x = 'a' * 10**6 %}{{ x.replace('a', x) }}",
    "joined": "{{ range(99999)|join('x' * 10**6) }}",
    "concatenation": DOUBLING.format("'ab'", "{% set ns.x = ns.x ~ ns.x %}") + "{{ ns.x }}",
    "block": DOUBLING.format("'ab'", "{% set z %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = z %}") + "{{ ns.x }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 10**5 }}{% endfor %}",
    "text": "{{ 'x' * (17 * 2**20) }}",
    "nested lists": DOUBLING.format("[1]", NESTING) + "{{ ns.x|tojson }}",
    "comparison": DOUBLING.format("[1]", NESTING) + "{{ ns.x == ns.y }}",  # one step in C
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.3)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped(name):
    with pytest.raises(TemplateLimitError) as caught:
        ChatTemplate(BOMBS[name]).render(HELLO)
    message = str(caught.value)
    assert "The checkpoint's chat template takes more than" in message
    assert "0.3 seconds of processor time" in message or "96 MB of memory" in message or "16 million char" in message
    assert "\n" not in message
    assert ChatTemplate(GOOD).render(HELLO) == "user: Hello"  # and others go on


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ raise_exception('x' * 10**7) }}",
        f"{{{{ {'(' * 3000}1{')' * 3000} }}}}",
        "{{ 1 // 0 }}",
        "{% include '/etc/hostname' %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_other_mischief_is_a_short_refusal(template):
    with pytest.raises(ValueError, match=r"chat template (refuses this conversation|is not valid Jinja): ") as caught:
        ChatTemplate(template).render(HELLO)
    assert len(str(caught.value)) < 1200


def test_long_conversations_are_no_bombs(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 30)
    turns = [{"role": "user", "content": "Straße 🙂 \udcff" * 300_000}] + HELLO * 2000
    text = ChatTemplate(GOOD).render(turns)
    assert text == "".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def test_bombs_from_many_threads_keep_nobody_out():
    """Each has its limit, however many there are."""

    def render(template: str) -> str:
        try:
            return render_template(template, {"messages": HELLO})
        except TemplateLimitError:
            return "stopped"

    with ThreadPoolExecutor(16) as pool:
        bombs = [pool.submit(render, BOMBS["loops"]) for _ in range(8)]
        good = [pool.submit(render, GOOD) for _ in range(50)]
        assert {future.result() for future in good} == {"user: Hello"}
        assert {future.result() for future in bombs} == {"stopped"}


def test_ctrl_c_while_a_template_renders(monkeypatch):
    """What it answers later is not taken for the answer to the next."""
    monkeypatch.setattr(rendering, "SECONDS", 60)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            render_template(BOMBS["loops"], {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render_template(GOOD, {"messages": HELLO}) == "user: Hello"


def test_values_that_are_not_plain():
    day = datetime.date(2026, 1, 2)
    message = MappingProxyType({"role": MappingProxyType({"a": [day]}), "content": Decimal("1.50")})
    assert ChatTemplate("{{ m }}{{ messages[0].role.a[0].year }}").render([message], m=(1, 2)) == "(1, 2)2026"
    with pytest.raises(ValueError, match="cannot be given to the checkpoint's chat template"):
        ChatTemplate(GOOD).render([{"role": lambda: 0}])
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deep"):
        ChatTemplate(GOOD).render([{"role": deep}])


def test_a_forked_process_has_renderers_of_its_own():
    assert render_template(GOOD, {"messages": HELLO}) == "user: Hello"
    child = os.fork()
    if child == 0:  # pragma: no cover
        texts = {render_template(GOOD, {"messages": [{"role": i, "content": ""}]}) for i in range(300)}
        os._exit(0 if texts == {f"{i}: " for i in range(300)} else 1)
    assert {render_template(GOOD, {"messages": [{"role": -i, "content": ""}]}) for i in range(1, 300)} == {
        f"{-i}: " for i in range(1, 300)
    }
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="/proc shows what a process has; not here")
def test_the_process_has_no_secrets_and_ends_with_its_parent():
    program = (
        "import os; from litgpt.prompts import rendering\n"
        "rendering.render_template('{{ 1 }}', {}); print(rendering._processes._idle[0].process.pid, flush=True)\n"
        "os.read(0, 1); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "HF_TOKEN": "hf_secret", "TZ": "UTC"}
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = Path("/proc", parent.stdout.readline().strip())
    held = (child / "environ").read_text()
    assert "TZ=UTC" in held
    assert "hf_secret" not in held
    parent.communicate("x")
    deadline = time.monotonic() + 60
    while child.exists():
        assert time.monotonic() < deadline, "it stays"
        time.sleep(0.01)


@pytest.fixture
def ways(monkeypatch) -> list[int]:
    """How many requests each way to a process takes along."""
    taken: list[int] = []
    ask = rendering._Process.ask

    def counted(process, *requests):
        taken.append(len(requests))
        return ask(process, *requests)

    monkeypatch.setattr(rendering._Process, "ask", counted)
    return taken


def test_several_are_rendered_at_once(ways):
    asked = [(GOOD, {"messages": [{"role": i, "content": "x" * i}]}) for i in range(50)]
    with rendered_ahead(asked):
        assert ways == [50]
        for source, variables in asked[::-1]:
            (said,) = variables["messages"]
            assert render_template(source, variables) == f"{said['role']}: {said['content']}"
        assert ways == [50]
        assert render_template(GOOD, {"messages": HELLO}) == "user: Hello"  # not among them
    assert render_template(*asked[1]) == "1: x"  # a template may say what time it is
    assert ways == [50, 1, 1]


@pytest.mark.parametrize("name", ["loops", "list", "text"])
def test_a_bomb_among_several_is_found_when_it_is_asked_for(name):
    good = (GOOD, {"messages": HELLO})
    with rendered_ahead([good, (BOMBS[name], {"messages": HELLO}), ("{{ 1 // 0 }}", {}), good]):
        assert render_template(*good) == "user: Hello"
        with pytest.raises(TemplateLimitError):
            render_template(BOMBS[name], {"messages": HELLO})
        with pytest.raises(ValueError, match="refuses"):
            render_template("{{ 1 // 0 }}", {})


def test_more_than_a_pipe_holds(ways):
    """Requests and answers: neither side waits until the other reads."""
    asked = [("{{ text * 20 }}", {"text": str(i) * 10_000}) for i in range(9)] * 9
    with rendered_ahead(iter(asked)):
        for source, variables in asked[:12]:
            assert render_template(source, variables) == variables["text"] * 20
    assert ways[0] < 81
    with rendered_ahead([("{{ text }}", {"text": "x" * 10**6})]):
        assert render_template("{{ text }}", {"text": "x" * 10**6}) == "x" * 10**6


def test_a_conversation_takes_one_way(ways, tmp_path, monkeypatch):
    tokenizer = Tokenizer(tokenizer_files.byte_level(tmp_path, {}))
    style = ChatTemplate(GOOD)
    said = [
        {"role": role, "content": f"<|im_end|> {i}"} for i, role in enumerate(("system", *("user", "assistant") * 3))
    ]
    encoder = ConversationEncoder(tokenizer, style, True, None)
    encoded = encoder.encode(Conversation(said, "messages", "here"))  # asks once whether it writes a system message
    ways.clear()
    assert encoder.encode(Conversation(said, "messages", "here")) == encoded
    assert ways == [6]
    monkeypatch.setattr(ChatTemplate, "ahead", lambda *_, **__: nullcontext())
    assert encoder.encode(Conversation(said, "messages", "here")) == encoded
    assert ways == [6] + [1] * 9


def test_what_is_rendered_ahead_may_need_a_rendering_itself(monkeypatch, ways):
    monkeypatch.setattr(rendering._processes, "_places", threading.BoundedSemaphore(1))

    def asked():
        yield GOOD, {"messages": [{"role": "x", "content": render_template(GOOD, {"messages": HELLO})}]}

    with rendered_ahead(asked()):
        assert render_template(*next(asked())) == "x: user: Hello"
    assert ways == [1, 1, 1]
