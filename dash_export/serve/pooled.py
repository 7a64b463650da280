"""/v1/embeddings: the final states of texts, pooled, in OpenAI's form."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dash_export.core.exits import normalized
from dash_export.errors import RequestError
from dash_export.serve.answers import Inbox
from dash_export.serve.protocol import Asked, Prompts
from dash_export.serve.running import RunningAnswers, collected_tokens, in_thread, left, parsed_request, submitted
from dash_export.serve.tickets import Reading, Request

if TYPE_CHECKING:
    from dash_export.serve.app import Server


class EmbeddingsRequest(Asked):
    """POST /v1/embeddings. `pooling`: the state of the last token, or the mean of all."""

    undone: ClassVar[dict[str, Any]] = {"dimensions": None}
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["last", "mean"] = "last"


async def embeddings(server: Server, http: HttpRequest) -> Response:
    """Answer with a vector of length 1 for each text. As many texts as decode together are in the queue at a time."""
    async with parsed_request(server, EmbeddingsRequest, http) as (request, arrival):
        name, scheduler = server.scheduler(request.model.partition("@")[0])
        if not scheduler.runtime.engines.gives_state:
            raise RequestError(f"{name} gives no states, which embeddings are made of: its build is not of a CPU.")
        scheduler.check_queue()
        prompts = await in_thread(server, arrival, lambda: [scheduler.ids(one) for one in request.input])
    reading, vectors = Reading(pooling=request.pooling, only=True), list[Any]()
    ended = partial(server.metrics.answered, "embeddings", name)
    size = min(scheduler.size, scheduler.most_waiting)
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        asked = [Request(ids, 1, deadline=left(server, arrival), reading=reading) for ids in some]
        inbox = Inbox(False)
        answers = submitted(scheduler, asked, [None] * len(asked), inbox, ended, arrival.began)
        await collected_tokens(RunningAnswers(name, scheduler, answers, inbox, cast("Any", request)), http)
        vectors += [answer.ticket.state for answer in answers]
    tokens = sum(map(len, prompts))

    data = listed_vectors(vectors, request.encoding_format)
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": counts})


def listed_vectors(vectors: Sequence[npt.NDArray[Any]], form: Literal["float", "base64"]) -> list[dict[str, Any]]:
    """Return vectors in OpenAI's form, of length 1."""
    plain = [normalized(vector.astype(np.float64)).astype("<f4") for vector in vectors]
    written = [one.tolist() if form == "float" else base64.b64encode(one.tobytes()).decode() for one in plain]
    return [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(written)]
