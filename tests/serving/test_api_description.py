"""Requests made up from the server's OpenAPI description never make it fail."""

from html.parser import HTMLParser

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from litgpt.serving.description import page

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/predict"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def description(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


class Reader(HTMLParser):
    """What a page shows, and what it loads or leads to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.ids, self.addresses, self.tags = "", [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(f"#{value}")
            elif name in ("src", "href"):
                self.addresses.append(value)
            else:
                assert not name.startswith(("on", "style", "action"))
        self.text += "\n"

    def handle_data(self, data):
        self.text += data


def test_the_page_of_the_description_is_complete_and_loads_nothing_from_elsewhere(served):
    response = httpx.get(f"{served.url}/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = Reader(response.text)
    assert not page.tags & {"script", "iframe", "img", "object"}
    for method, path in OPERATIONS:
        assert f"\n{method} {path}" in page.text
    schemas = httpx.get(f"{served.url}/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "PredictRequest", "ResponseFormat"):
        table = Reader(response.text.partition(f'id="{name}"')[2].partition("</table>")[0]).text
        for field in schemas[name]["properties"]:
            assert f"\n{field}\n" in table
    assert "at least 0, at most 100" in page.text
    for address in page.addresses:
        if address.startswith("#"):
            assert address in page.ids
        else:
            assert "//" not in address
            assert not address.startswith("/")  # it stands behind a proxy's path, too
            assert httpx.get(f"{served.url}/{address}").status_code == 200


def test_what_stands_in_the_description_is_text_on_its_page():
    schema = {"properties": {"<i>": {"type": "<b>", "default": "<u>", "description": "`<s>`"}}}
    text = page(
        {
            "info": {"title": "<a>", "version": "1", "description": "<em>"},
            "paths": {"/<p>": {"post": {"description": "<q>"}}},
            "components": {"schemas": {"<h>": schema}},
        }
    )
    for tag in "ibusaqh":
        assert f"<{tag}>" not in text.replace("<p>", "")
        assert f"&lt;{tag}&gt;" in text
    assert "<code>&lt;s&gt;</code>" in text
    assert "POST /&lt;p&gt;" in text


def test_all_operations_are_described(served):
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert sorted((method.upper(), path) for path, methods in paths.items() for method in methods) == sorted(OPERATIONS)


@pytest.mark.parametrize("count", [15, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_makes_the_server_fail(served, description, method, path, count):
    operation = description[path][method]

    @given(case=operation.as_strategy())
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case) -> None:
        if isinstance(case.body, dict) and method == "POST":
            for field in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
                if isinstance(case.body.get(field), int):  # the answers' lengths are not what is tested
                    case.body[field] = min(case.body[field], 3)
        case.call_and_validate(base_url=served.url, checks=[not_a_server_error])

    check()
    assert httpx.get(f"{served.url}/health").status_code == 200
