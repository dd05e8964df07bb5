"""The ASGI application: all routes over one queue, errors as JSON, the guard."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hires._version import __version__
from hires.errors import HiresError
from hires.server.a1111 import routes as a1111
from hires.server.errors import http_status
from hires.server.guard import Guard
from hires.server.queue import JobQueue
from hires.server.routes import jobs, openai, page
from hires.server.settings import Library, Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI application; its queue works from start-up to shutdown."""
    library = Library(settings)
    queue = JobQueue(settings, library)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue.start()
        yield
        queue.close()

    app = FastAPI(title="hires", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.queue = queue
    for routes in (jobs.router(queue), a1111.router(queue), openai.router(queue), page.router(queue)):
        app.include_router(routes)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(HiresError, _failed)
    app.add_middleware(Guard, settings=settings)
    return app


def _error_response(request: Request, status: int, reason: str, code: str | None = None) -> JSONResponse:
    """An error as the API that was called gives it: FastAPI's and A1111's `detail`, or OpenAI's `error`."""
    if request.url.path.startswith("/v1/"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": reason, "type": kind, "param": None, "code": code}}, status)
    return JSONResponse({"detail": reason, "error": code or "HTTPException", "errors": reason}, status)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    reasons = []
    for entry in error.errors()[:8]:
        where = ".".join(str(part) for part in entry.get("loc", ()) if part != "body")
        reasons.append(f"{where[:120]}: {str(entry.get('msg', 'is not understood'))[:200]}")
    reason = "; ".join(reasons) or "the request is not understood"
    return _error_response(request, 422, reason, "RequestValidationError")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    response = _error_response(request, error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> JSONResponse:
    status = http_status(error)
    if status == 500:
        log.warning("%s: %s", request.url.path, error)
    return _error_response(request, status, str(error), type(error).__name__)
