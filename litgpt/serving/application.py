"""The server's application: routes, and what stands around them."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

import litgpt
from litgpt.cli.secret import Secret
from litgpt.serving import description, errors, openai_api, page, predict
from litgpt.serving.event_stream import ClientGone
from litgpt.serving.guard import LARGEST_BODY, Guard, HostCheck
from litgpt.serving.origins import OriginCheck, Origins
from litgpt.serving.request_log import LogRequests
from litgpt.serving.service import Service


def create_app(
    service: Service,
    *,
    api_path: str = "/predict",
    stream: bool = False,
    api_key: Secret | str | None = None,
    largest_body: int = LARGEST_BODY,
    hosts: Sequence[str] = ("*",),
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Args:
        service: The state; requests are answered with 503 until it has a model.
        api_path: Where `/predict` is.
        stream: Whether it streams.
        api_key: What clients must send; None asks for nothing.
        largest_body: Bytes of a request.
        hosts: Names that the server goes by, as for `HostCheck`.
        origins: Of web pages of others that may use it, such as https://example.com, or "*".
    """
    app = FastAPI(
        title="litgpt",
        version=litgpt.__version__,
        description="A language model behind `POST /predict` and OpenAI's API.",
        docs_url=None,  # FastAPI's page loads its scripts from elsewhere
        redoc_url=None,
    )
    # The last is the first that sees a request.
    app.add_middleware(Guard, api_key=api_key, largest_body=largest_body)
    app.state.origins = Origins(origins)
    app.add_middleware(OriginCheck, origins=app.state.origins)
    app.add_middleware(HostCheck, hosts=hosts)
    errors.install(app)
    app.add_middleware(app.state.origins.cors)
    app.add_middleware(LogRequests, log=service.requests)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)  # nginx's number; nobody reads it

    @app.get("/health", tags=["Operation"])
    async def health() -> JSONResponse:
        """200 when the model is ready, 503 with the progress before."""
        state = service.state
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    @app.get("/metrics", tags=["Operation"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    app.include_router(page.router())
    app.include_router(description.router(app.openapi))
    app.include_router(predict.router(service, api_path, stream))
    app.include_router(openai_api.router(service))
    return app
