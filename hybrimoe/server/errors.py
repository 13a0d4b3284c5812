"""Errors as clients of OpenAI's interface read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

__all__ = ["ApiError", "error_body", "error_response"]


class ApiError(Exception):
    """A request that cannot be answered. The message is for the client and holds nothing of its text."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


def error_body(error: ApiError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": _kind(error), "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "5"} if error.status == 503 else None
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(error_body(error), error.status, headers)


def _kind(error: ApiError) -> str:
    if error.status in (401, 403):
        return "authentication_error"
    if error.status == 503:
        return "unavailable_error"
    return "invalid_request_error" if error.status < 500 else "server_error"
