"""Requests made up from the server's OpenAPI description never make it fail."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

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
