"""The chat page in a real browser: Debian's Chromium without a window, driven by Playwright."""

import asyncio
import json
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from litgpt.serving import page as chat_page
from litgpt.serving.server import Server, listen
from litgpt.serving.service import Service
from tests.serving.conftest import PATIENCE, Brake, running, wait_for, wait_until_ready

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
expect = playwright.expect
expect.set_options(timeout=1000 * PATIENCE)

CHROMIUM = next(
    (
        path
        for path in (
            "/usr/lib/chromium/chromium",
            *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
        )
        if path and Path(path).is_file()
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")


@dataclass
class Script:
    """A server that has the page, and says what a test wants.

    An answer is a Response, or the pieces of a streamed text, with an event where it is to wait for the test.
    """

    url: str = ""
    answers: deque = field(default_factory=deque)
    requests: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["tiny"])
    gone: threading.Event = field(default_factory=threading.Event)
    """A client left before its answer was whole."""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(chat_page.router())

        @app.get("/health")
        async def health():
            return {"status": "ok", "seconds": 1, "models": self.models}

        @app.get("/v1/models")
        async def models():
            return {"object": "list", "data": [{"id": name, "max_model_len": 64} for name in self.models]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            self.requests.append(await request.json())
            self.keys.append(request.headers.get("authorization"))
            answer = self.answers.popleft()
            if isinstance(answer, JSONResponse):
                return answer
            return StreamingResponse(self._events(answer), media_type="text/event-stream")

        return app

    async def _events(self, pieces) -> AsyncIterator[str]:
        def event(delta, finish=None, **more):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return f"data: {json.dumps({'choices': [choice], 'usage': None, **more})}\n\n"

        yield event({"role": "assistant", "content": ""})
        try:
            for piece in pieces:
                if isinstance(piece, threading.Event):
                    while not piece.is_set():
                        await asyncio.sleep(0.005)
                elif isinstance(piece, dict):
                    yield f"data: {json.dumps(piece)}\n\n"
                    return
                else:
                    yield event({"content": piece})
        except asyncio.CancelledError:
            self.gone.set()
            raise
        yield event({}, "stop")
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def refusal(status: int, code: str, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": code}}, status, headers)


@pytest.fixture(scope="module")
def browser():
    options = [] if getattr(os, "geteuid", lambda: 1)() else ["--no-sandbox"]  # root has no sandbox
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def script_server() -> Iterator[Script]:
    script = Script()
    server = Server(script.app(), Service(1, 1), list)
    listener = listen("127.0.0.1", 0)
    script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.serve_on, args=(listener,))
    thread.start()
    wait_until_ready(script.url)
    yield script
    server.stop(finish=False)
    thread.join(PATIENCE)


@pytest.fixture
def script(script_server) -> Script:
    script_server.answers.clear()
    script_server.requests.clear()
    script_server.keys.clear()
    script_server.gone.clear()
    script_server.models[:] = ["tiny"]
    return script_server


@pytest.fixture
def open_page(browser):
    """Opens the page at an address; in the end nothing may have been asked for elsewhere, and nothing gone wrong."""
    contexts, problems, strangers = [], [], []

    def opened(url: str, expected: str = "^$", **options):
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 700}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("request", lambda request: request.url.startswith(url) or strangers.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))

        def said(message) -> None:
            if message.type in ("error", "warning") and not re.search(expected, message.text):
                problems.append(message.text)

        page.on("console", said)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems
    assert not strangers


def ask(page, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def wait_until_whole(page) -> None:
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")


def answer_text(page):
    return page.locator(".turn").last.locator(".answer > .text")


# -- against the real server


def test_an_answer_streams_and_is_what_the_api_says(served, open_page):
    page = open_page(served.url)
    expect(page.locator("#model-name")).to_have_text("tiny-random")
    page.locator("#open-settings").click()
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 24, "seed": 3}
    for name, value in settings.items():
        page.locator(f"[name={name}]").fill(str(value))
    page.locator("[name=system]").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hello")
    body = sent.value.post_data_json
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert {name: body[name] for name in settings} == settings
    assert body["messages"] == messages
    wait_until_whole(page)
    response = httpx.post(
        f"{served.url}/v1/chat/completions", json={**settings, "messages": messages}, timeout=PATIENCE
    )
    content = response.json()["choices"][0]["message"]["content"]
    assert json.loads(page.evaluate("localStorage['litgpt.conversation']"))[0]["answer"] == content
    expect(page.locator(".figures")).to_have_text(
        re.compile(r"^Cut off: .* · 24 tokens · ([\d.]+ tokens/s · )?first after")
    )


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "models.localhost"])
def test_the_page_may_ask_by_whatever_name_of_this_machine_it_was_opened(served, open_page, name):
    page = open_page(served.url.replace("127.0.0.1", name))
    expect(page.locator("#model-name")).to_have_text("tiny-random")
    ask(page, "Hello")
    wait_until_whole(page)
    expect(answer_text(page)).not_to_be_empty()


def test_stop_frees_the_slot_and_keeps_what_was_written(served, open_page):
    page = open_page(served.url)
    brake = Brake(served, after=8)
    try:
        ask(page, "Hello")
        expect(answer_text(page)).not_to_be_empty()
        assert served.engine.running == 1
        expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
        page.locator("#send").click()
        wait_for(lambda: served.service.taken == 0)
        brake.release()
        served.wait_until_idle()
        assert brake.steps <= brake.after + 2
        wait_until_whole(page)
        expect(page.locator(".figures")).to_contain_text("Stopped")
        expect(answer_text(page)).not_to_be_empty()
    finally:
        brake.remove()


def test_it_says_that_the_model_loads_and_answers_when_it_has(chat_directory, open_page):
    loaded = threading.Event()

    def before_loading():
        loaded.wait(PATIENCE)

    with running(chat_directory, before_loading=before_loading, api_key="k-secret") as server:
        server.service.say("reading the weights")
        page = open_page(server.url, expected="status of (503|401)")
        expect(page.locator("#banner")).to_contain_text("reading the weights")
        loaded.set()
        expect(page.locator("#banner")).to_contain_text("asks for an API key")
        page.locator("[name=key]").fill("k-secret")
        page.locator("[name=max_tokens]").fill("3")
        page.locator("[name=max_tokens]").press("Enter")
        expect(page.locator("#model-name")).to_have_text("tiny-random")
        expect(page.locator("#banner")).to_be_hidden()
        ask(page, "Hello")
        wait_until_whole(page)
        expect(answer_text(page)).not_to_be_empty()
        assert page.evaluate("[sessionStorage['litgpt.key'], JSON.stringify(localStorage).includes('k-secret')]") == [
            '"k-secret"',
            False,
        ]


# -- against a server that says exactly this


def test_pieces_are_shown_as_they_come(script, open_page):
    page = open_page(script.url)
    steps = [threading.Event() for _ in range(3)]
    script.answers.append(["One", steps[0], " **two", steps[1], "** three", steps[2]])
    ask(page, "Count")
    answer = answer_text(page)
    for text, step in zip(("One", "One **two", "One two three"), steps, strict=True):
        expect(answer).to_have_text(text)
        expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
        step.set()
    wait_until_whole(page)
    expect(answer.locator("strong")).to_have_text("two")
    expect(page.locator(".figures")).to_contain_text("7 tokens")


ATTACK = """<script>window.ran = 1</script> <img src=x onerror="window.ran = 2"> <b onclick=1>bold?</b>

[a](javascript:window.ran=3) [b](JaVaScRiPt:window.ran=4) [c](data:text/html,<script>1</script>) <javascript:window.ran=5>
[d](java&#115;cript:window.ran=6) [e](\\javascript:window.ran=7) [f](//elsewhere.invalid) [g](vbscript:x "t")

![pixel](https://elsewhere.invalid/pixel.png) [good](https://example.com/a_(b)?c=d&e=f "title") https://example.com/x_y_z.

<iframe src="https://elsewhere.invalid"></iframe> <svg onload="window.ran = 8"> <style>body{display:none}</style>
&lt;script&gt;window.ran = 9&lt;/script&gt; `<script>window.ran = 10</script>`

```html" onmouseover="window.ran=11
<script>window.ran = 12</script>
```

| <script>window.ran = 13</script> | [x](javascript:1) |
|---|---|
| <img src=x onerror=window.ran=14> | y |
"""


def test_nothing_that_a_model_writes_runs_or_is_loaded(script, open_page):
    page = open_page(script.url)
    script.answers.append([ATTACK[at : at + 5] for at in range(0, len(ATTACK), 5)])
    ask(page, ATTACK)
    wait_until_whole(page)
    made = page.evaluate("[...new Set([...document.querySelectorAll('#turns *')].map((one) => one.localName))]")
    assert set(made) <= {
        *("article", "div", "p", "details", "summary", "span", "button", "i", "br"),
        *("a", "code", "pre", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td"),
    }
    links = page.evaluate(
        "[...document.querySelectorAll('#turns a')].map((one) => [one.textContent, one.href, one.rel])"
    )
    assert [link[:2] for link in links] == [
        ["image: pixel", "https://elsewhere.invalid/pixel.png"],
        ["good", "https://example.com/a_(b)?c=d&e=f"],
        ["https://example.com/x_y_z", "https://example.com/x_y_z"],
        ["https://elsewhere.invalid", "https://elsewhere.invalid/"],  # the iframe's address, as text
    ]
    assert all("noopener" in link[2] for link in links)
    assert not page.evaluate("[...document.querySelectorAll('#turns *')].some((one) => "
                             "one.getAttributeNames().some((name) => name.startsWith('on')))")  # fmt: skip
    expect(answer_text(page)).to_contain_text('<img src=x onerror="window.ran = 2">')
    expect(page.locator(".question .text")).to_have_text(ATTACK, use_inner_text=True)
    assert page.evaluate("window.ran") is None


def test_the_browser_would_refuse_what_the_page_never_does(script, browser):
    page = browser.new_page()
    page.goto(script.url)
    refused = page.evaluate(
        """() => {
            const tried = [];
            try { document.body.innerHTML = "<b>"; } catch (error) { tried.push(error.name); }
            try { document.createElement("script").textContent = "1"; } catch (error) { tried.push(error.name); }
            const image = new Image();
            return new Promise((done) => {
                document.addEventListener("securitypolicyviolation", (event) => {
                    if (event.effectiveDirective === "img-src") done([...tried, event.effectiveDirective]);
                });
                image.src = "https://elsewhere.invalid/x.png";
            });
        }"""
    )
    page.close()
    assert refused == ["TypeError", "TypeError", "img-src"]
    headers = httpx.get(script.url).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


MARKDOWN = [
    ("# A *b*\n## C\ntext", "<h2>A <em>b</em></h2><h3>C</h3><p>text</p>"),
    ("a\nb\\\nc\n\nd", "<p>a<br>b<br>c</p><p>d</p>"),
    ("**a *b* c** _d_ e_f_g ~~h~~ ***i*** 2 * 3 * 4",
     "<p><strong>a <em>b</em> c</strong> <em>d</em> e_f_g <del>h</del> <em><strong>i</strong></em> 2 * 3 * 4</p>"),
    ("``a ` b`` `` ` `` `c", "<p><code>a ` b</code> <code>`</code> `c</p>"),
    ("- a\n- b\n  - c\n\n    d\n- [x] e",
     "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li>"
     '<li class="task"><input type="checkbox" disabled=""><p>e</p></li></ul>'),
    ("3. a\n4. b\n\ntext\n1984. Then", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><p>text<br>1984. Then</p>'),
    ("> a\n> - b\n>> c\n\n---", "<blockquote><p>a</p><ul><li><p>b</p></li></ul><blockquote><p>c</p></blockquote></blockquote><hr>"),
    ("| a | b |\n|:-:|--:|\n| `x` | y\\|z |\n| 1 |\n\nend",
     '<div class="table" tabindex="0"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody>'
     '<tr><td class="center"><code>x</code></td><td class="right">y|z</td></tr>'
     '<tr><td class="center">1</td><td class="right"></td></tr></tbody></table></div><p>end</p>'),
    ("1. a\n   ```py\n   if x:\n       y\n\n   # z\n   ```\n2. b",
     '<ol><li><p>a</p><figure class="code"><figcaption><span>py</span><button class="copy-code" type="button">Copy</button>'
     '</figcaption><pre tabindex="0"><code>if x:\n    y\n\n# z</code></pre></figure></li><li><p>b</p></li></ol>'),
    ("\\*a\\* &amp; &#65; &copy; [x] [y](z) [**w**](<https://e.com/a b>)",
     '<p>*a* &amp; A &amp;copy; [x] [y](z) <a href="https://e.com/a%20b" target="_blank" rel="noopener noreferrer nofollow" '
     'title="https://e.com/a%20b"><strong>w</strong></a></p>'),
]  # fmt: skip
RENDER = """async ([text, step]) => {
    const { render } = await import("./static/markdown.js");
    const box = document.createElement("div");
    for (let end = step; end < text.length; end += step) render(box, text.slice(0, end));
    render(box, text);
    return box.innerHTML;
}"""


def test_markdown_is_rendered_whole_and_piece_by_piece(script, open_page):
    page = open_page(script.url)
    for text, html in MARKDOWN:
        assert page.evaluate(RENDER, [text, len(text)]) == html
        assert page.evaluate(RENDER, [text, 1]) == html


# The unit of each, repeated, and what is before and after it.
SLOW = [
    *(
        "*a ",
        "**a",
        "*a_ ",
        "a*",
        "_",
        "~~a",
        "[",
        "![a](",
        '[a](b "',
        "`a``",
        " ``",
        "<",
        "&",
        "\\",
        "https://",
        "- ",
        ">",
    ),
    *("-\n", "a\n> b\n", "```\n~~~\n", "a\n1. b\n"),
    *(
        ("", " ", "|\n-"),
        ("```", " ", "`"),
        ("# a", " #", ""),
        ("".join("`" * n + " " for n in range(1, 400)), "a", ""),
        ("", "[a", "](b)"),
        ("a**b", "c* ", ""),
    ),
]


@pytest.mark.timeout(120)  # it takes 2 seconds; one of them with quadratic work takes minutes
def test_text_made_to_be_slow_is_not(script, open_page):
    page = open_page(script.url)
    for shape in SLOW:
        before, unit, after = shape if isinstance(shape, tuple) else ("", shape, "")
        text = before + unit * (100_000 // len(unit)) + after
        page.evaluate(
            """async (text) => {
                const { render } = await import("./static/markdown.js");
                render(document.createElement("div"), text);
            }""",
            text,
        )


def test_retry_edit_new_chat_and_what_is_kept(script, open_page):
    page = open_page(script.url)
    script.answers.extend([["first"], ["second"], ["third"], ["fourth"]])
    ask(page, "One")
    wait_until_whole(page)
    page.get_by_role("button", name="Retry").click()
    expect(answer_text(page)).to_have_text("second")
    wait_until_whole(page)
    ask(page, "Two")
    expect(answer_text(page)).to_have_text("third")
    wait_until_whole(page)
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Two and a half")
    page.get_by_label("Edit the message").press("Enter")
    expect(answer_text(page)).to_have_text("fourth")
    wait_until_whole(page)
    history = [("user", "One"), ("assistant", "second"), ("user", "Two and a half")]
    assert [(one["role"], one["content"]) for one in script.requests[-1]["messages"]] == history
    page.reload()
    expect(page.locator(".question .text")).to_have_text(["One", "Two and a half"])
    expect(answer_text(page)).to_have_text("fourth")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="Back to the last conversation").click()
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)


def test_errors_are_said_in_words(script, open_page):
    page = open_page(script.url, expected="status of|ERR_")
    problem = page.locator(".problem")
    script.answers.append(refusal(429, "queue_full", "The queue is full.", **{"Retry-After": "1"}))
    script.answers.append(refusal(503, "loading", "The model is not ready yet.", **{"Retry-After": "1"}))
    script.answers.append(["at last"])
    ask(page, "Patience")
    expect(page.locator(".figures")).to_contain_text("The server is busy; next try in 1 s")
    expect(page.locator(".figures")).to_contain_text("The model is being loaded; next try in 1 s")
    expect(answer_text(page)).to_have_text("at last")
    wait_until_whole(page)

    page.get_by_role("button", name="New chat").click()
    script.answers.append(refusal(400, "context_length_exceeded", "The prompt has 99 tokens, the context 64."))
    script.answers.append(["half", {"error": {"message": "The server made a mistake."}}])
    script.answers.append(JSONResponse("no object", 502))
    ask(page, "Long")
    expect(problem).to_have_text("The prompt has 99 tokens, the context 64.")
    page.get_by_role("button", name="Retry").click()
    expect(problem).to_have_text("The server made a mistake.")
    expect(answer_text(page)).to_have_text("half")
    page.get_by_role("button", name="Retry").click()
    expect(problem).to_have_text("The server answered 502 Bad Gateway.")
    page.context.set_offline(True)
    page.get_by_role("button", name="Retry").click()
    expect(problem).to_contain_text("cannot be reached")
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden()
    script.answers.append(refusal(401, "invalid_api_key", "No."))
    ask(page, "Key?")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("k-new")
    page.get_by_label("API key").press("Enter")
    script.answers.append(["welcome"])
    page.get_by_role("button", name="Retry").click()
    expect(answer_text(page)).to_have_text("welcome")
    wait_until_whole(page)
    assert script.keys[-1] == "Bearer k-new"
    # "Long" was never answered: two questions in a row would confuse the model
    assert [one["content"] for one in script.requests[-1]["messages"]] == ["Key?"]


def test_keys_alone_are_enough(script, open_page):
    page = open_page(script.url)
    keys = page.keyboard
    expect(page.locator("#message")).to_be_focused()
    waits = threading.Event()
    script.answers.extend([["Some", waits], ["thing"], ["else"]])
    keys.type("Hello")
    keys.press("Shift+Enter")
    keys.type("there")
    keys.press("Enter")
    expect(answer_text(page)).to_have_text("Some")
    assert script.requests[-1]["messages"][-1]["content"] == "Hello\nthere"
    keys.press("Escape")
    wait_until_whole(page)
    expect(page.locator(".figures")).to_contain_text("Stopped")
    assert script.gone.wait(PATIENCE)
    keys.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_have_value("Hello\nthere")
    keys.press("Escape")
    expect(page.locator("#message")).to_be_focused()
    for _ in range(9):  # back to Retry
        keys.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('retry')"):
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    keys.press("Enter")
    expect(answer_text(page)).to_have_text("thing")
    wait_until_whole(page)
    expect(page.locator("#message")).to_be_focused()
    expect(page.locator("#turns")).to_have_attribute("aria-live", "polite")
    assert page.locator("#turns").get_attribute("aria-busy") is None


def test_dark_and_light(script, open_page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = open_page(script.url).evaluate(background)
    page = open_page(script.url, color_scheme="dark")
    dark = page.evaluate(background)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))
    page.locator("#theme").click()
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
    page.locator("#theme").click()
    assert page.evaluate(background) == dark
    assert page.evaluate("localStorage['litgpt.theme']") is None  # as the system has it


def test_a_phone_is_wide_enough(script, open_page):
    page = open_page(script.url, viewport={"width": 320, "height": 568}, has_touch=True, is_mobile=True)
    script.models[:] = ["a-model-with-a-rather-long-name/" + "x" * 60, "another"]
    page.reload()
    row = "| " + " | ".join(f"column {n}" for n in range(9)) + " |"
    text = f"{'x' * 200}\n\n{row}\n{re.sub('[^|]+', '---', row)}\n{row}\n\n- a\n  - b\n    ```\n    {'y' * 200}\n    ```\n# {'z' * 99}"
    script.answers.append([text])
    ask(page, "w" * 200)
    wait_until_whole(page)
    expect(page.locator("table")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    page.locator("#open-settings").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    box = page.get_by_role("button", name="Done").bounding_box()
    assert box["x"] + box["width"] <= 320
    page.get_by_role("button", name="Done").click()
    assert page.locator("#send").bounding_box()["y"] < 568


def test_code_is_copied_and_a_model_is_chosen(script, open_page):
    script.models[:] = ["one", "two"]
    page = open_page(script.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Model").select_option("two")
    code = "def f(x):\n\treturn x < 1 & 2\n"
    script.answers.append([f"Here:\n\n```python\n{code}```\n"])
    ask(page, "Code")
    wait_until_whole(page)
    assert script.requests[-1]["model"] == "two"
    expect(page.locator("figcaption span")).to_have_text("python")
    page.locator(".copy-code").click()
    expect(page.locator(".copy-code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code.rstrip("\n")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("two")


def test_thoughts_are_folded_away(script, open_page):
    page = open_page(script.url)
    waits = threading.Event()
    script.answers.append(["<think>\nHm, ", "*so*", waits, ".\n</think>\n\n", "Yes."])
    ask(page, "Is it so?")
    expect(page.locator("summary")).to_have_text("Thinking …")
    waits.set()
    wait_until_whole(page)
    expect(page.locator("summary")).to_have_text("Thoughts")
    expect(answer_text(page)).to_have_text("Yes.")
    expect(page.locator(".thoughts .markdown")).to_be_hidden()
    page.locator("summary").click()
    expect(page.locator(".thoughts .markdown")).to_have_text("Hm, so.")
