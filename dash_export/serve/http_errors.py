"""Errors with their HTTP status, in the form of OpenAI's API and in our wording."""

import logging
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from dash_export.errors import NOT_NUMBERS, ContextLengthError, DashError, PolicyError, RequestError
from dash_export.runtime.rows import NO_MEMORY
from dash_export.serve.fields import UNKNOWN, UNSUPPORTED
from dash_export.serve.tickets import MISTAKE, BusyServerError, DeadlineError

logger = logging.getLogger(__name__)


class HttpError(Exception):
    """Error with its HTTP status; `param` names the wrong field, `code` is OpenAI's code of the error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def record(self) -> dict[str, Any]:
        """Return the error as OpenAI's API has it."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def http_error(error: DashError, prompt: str = "messages") -> HttpError:
    """Return the error that a client gets for `error`; `prompt`: the field that has the prompt. An error that is not
    the client's is logged, and the client gets MISTAKE instead of its text, unless that is NO_MEMORY or NOT_NUMBERS.
    """
    if isinstance(error, ContextLengthError):
        return HttpError(400, str(error), prompt, "context_length_exceeded")
    for kind, status in ((BusyServerError, 429), (DeadlineError, 504), (RequestError, 400), (PolicyError, 400)):
        if isinstance(error, kind):
            return HttpError(status, str(error))
    logger.error("a request failed", exc_info=error)
    return HttpError(500, str(error) if str(error) in (NO_MEMORY, NOT_NUMBERS) else MISTAKE)


def wrong_field(error: ValidationError, body: bytes | bytearray) -> HttpError:
    """Return the error that names the wrong field of a JSON body, like `stop` or `messages.1.role`. Where a field may
    be of several kinds pydantic has a mistake for each: those that lead furthest into the body are told.
    """
    mistakes = error.errors(include_url=False, include_input=False)
    whole: Any = from_json(body) if mistakes[0]["loc"] else None  # else the body may be no JSON
    told: dict[tuple[Any, ...], list[str]] = {}
    codes = dict[tuple[Any, ...], str]()
    for one in mistakes:
        here, path = whole, list[Any]()
        absent = one["loc"][-1:] if one["type"] == "missing" else ()  # or null, which is left out
        for part in one["loc"][: len(one["loc"]) - len(absent)]:
            with suppress(LookupError, TypeError):  # the name of a kind
                here = here[part]
                path.append(part)
        path += absent
        told.setdefault(tuple(path), []).append(one["msg"].removeprefix("Value error, "))
        codes[tuple(path)] = one["type"]
    furthest = max(told, key=len)
    field = ".".join(map(str, furthest))[:100] or None
    code = codes[furthest] if codes[furthest] in (UNKNOWN, UNSUPPORTED) else None
    return HttpError(400, f"{field or 'The body'}: {'; or '.join(dict.fromkeys(told[furthest]))}.", field, code)
