"""The border of the HTTP layer: every error leaves as `{"error": {message, type, param, code}}`.

Knows `AdapterHubError`, pydantic's and Starlette's exceptions. Nothing else may reach a client.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from adapterhub.errors import AdapterHubError, NotFoundError, OverloadedError, RequestError
from server.http.replies import ErrorBody, ErrorDetail
from server.http.service import get_request_id, get_service

__all__ = ["error_body", "install_error_handlers"]

_log = logging.getLogger(__name__)
_JSON = "application/json"


def _error_type(status: int) -> str:
    """Return OpenAI's coarse `type` for a status."""
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"


def error_body(error: AdapterHubError, status: int | None = None, code: str | None = None) -> ErrorBody:
    """Describe an error to a client."""
    kind = _error_type(status or error.http_status)
    return ErrorBody(error=ErrorDetail(message=str(error), type=kind, param=error.param, code=code or error.code))


def _respond(
    request: Request,
    error: AdapterHubError,
    *,
    status: int | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    status = status or error.http_status
    all_headers = dict(headers or {}) | {"x-request-id": get_request_id(request)}
    if isinstance(error, OverloadedError):
        all_headers["retry-after"] = str(get_service(request).engine.status().retry_after_s)
    if status == 409:
        all_headers["x-should-retry"] = "false"  # The openai client would repeat a conflict that time does not cure.
    body = error_body(error, status, code).model_dump_json()
    return Response(body, status, all_headers, media_type=_JSON)


async def _on_hub_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, AdapterHubError)
    if exc.http_status >= 500:
        _log.warning("%s failed: %s", get_request_id(request), exc)
    return _respond(request, exc)


async def _on_unexpected(request: Request, exc: Exception) -> Response:
    _log.error("%s failed unexpectedly: %r", get_request_id(request), exc)
    error = AdapterHubError("The server made a mistake.", f"Report request {get_request_id(request)!r} with its log.")
    return _respond(request, error)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    path, status = request.url.path, exc.status_code
    if status == 404:
        hint = (
            "Routes: /v1/chat/completions, /v1/completions, /v1/models, /admin/v1/adapters, /health/ready; see /docs."
        )
        return _respond(request, NotFoundError(f"No route {path!r}.", hint), code="unknown_route")
    if status == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        error = RequestError(f"{request.method} is not allowed for {path!r}.", f"Use {allowed}.")
        return _respond(request, error, status=status, code="method_not_allowed", headers=exc.headers)
    if status == 413:
        error = RequestError("The body is too large.", "Send shorter prompts or fewer of them.")
        return _respond(request, error, status=status, code="body_too_large")
    error = RequestError(f"The body cannot be read: {exc.detail}.", "Send a JSON object in UTF-8.")
    return _respond(request, error, status=status)


async def _on_invalid_body(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    content_type = request.headers.get("content-type", "")
    if isinstance(exc.body, bytes) and exc.body:
        error = RequestError(f"The content type is {content_type!r}.", f"Send JSON with 'content-type: {_JSON}'.")
        return _respond(request, error, status=415, code="unsupported_media_type")
    return _respond(request, _first_problem(exc))


def _first_problem(exc: RequestValidationError) -> RequestError:
    problems: list[Mapping[str, Any]] = [*exc.errors()]
    first = problems[0]
    location: tuple[Any, ...] = tuple(first["loc"])[1:]  # Without the word "body".
    if first["type"] == "json_invalid":
        where = f" at character {location[0]}" if location else ""
        what = f"The body is not valid JSON: {first['ctx']['error']}{where}."
        return RequestError(what, "Send one JSON object.")
    # A union fails once per kind; what went furthest into the body says most.
    same_field = [one for one in problems if tuple(one["loc"])[1:2] == location[:1]]
    problem = max(same_field, key=lambda one: len(_locate(exc.body, one)[0]))
    path, value = _locate(exc.body, problem)
    if not path:
        return RequestError(f"The body is {_shown(value)}, not a JSON object.", "Send one JSON object.")
    field = ".".join(path)
    if problem["type"] == "missing":
        return RequestError(f"The field {field!r} is missing.", "Add it.").at(field)
    message = str(problem["msg"]).removesuffix(".")
    return RequestError(f"The field {field!r} has the value {_shown(value)}.", f"{message}.").at(field)


def _locate(body: object, problem: Mapping[str, Any]) -> tuple[list[str], object]:
    """Follow pydantic's location into the body as sent, past the names of a union's kinds; return path and value."""
    path: list[str] = []
    value: Any = body
    location: tuple[Any, ...] = tuple(problem["loc"])[1:]
    for depth, part in enumerate(location, start=1):
        is_missing = problem["type"] == "missing" and depth == len(location)
        if isinstance(value, dict) and (part in value or is_missing):
            value = cast("dict[str, Any]", value).get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = cast("list[Any]", value)[part]
        else:
            continue
        path.append(str(part))
    return path, cast("object", value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` leave in the one shape."""
    app.add_exception_handler(AdapterHubError, _on_hub_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected)
