"""What a session gives back: one response per token, finished generations, scores, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dash_export.errors import DashError, RequestError

TokenIds = npt.NDArray[np.int64]
NO_TOKEN = -1


@dataclass(frozen=True)
class Statistics:
    """Running figures of one generation. Times in seconds; the first token comes out of the prefill."""

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    layers: int = 0

    def counted(self, seconds: float) -> Statistics:
        """One more token, `seconds` after the step began; the first token's time is the prefill's."""
        first = self.tokens == 0
        return replace(
            self,
            tokens=self.tokens + 1,
            prefill_seconds=seconds if first else self.prefill_seconds,
            decode_seconds=0.0 if first else self.decode_seconds + seconds,
        )

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, the prefill apart."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def layers_per_token(self) -> float:
        """Mean layers run per decode step."""
        return self.layers / self.decode_steps if self.decode_steps else 0.0


@dataclass(frozen=True)
class Response:
    """One step of a stream. `actions` is int8 [layers] (0 run, 1 skip) of the step that made `token`; the prefill's
    token is dense.

    The last response of a stream has a `finish_reason`: `stop` (end of turn or a stop string), `length` or `cancelled`;
    or, in a batch, `error`, with the error and no token (NO_TOKEN).
    """

    text: str
    token: int
    actions: npt.NDArray[np.int8]
    seconds: float
    statistics: Statistics
    finish_reason: str | None = None
    error: DashError | None = None

    @classmethod
    def failed(cls, error: DashError, layers: int, statistics: Statistics) -> Response:
        """The last one of an answer that ends by an error of its own."""
        return cls("", NO_TOKEN, np.zeros(layers, np.int8), 0.0, statistics, "error", error)


@dataclass(frozen=True)
class Generation:
    """A finished generation: text, token ids [n], actions int8 [n, layers] (the skip map), figures."""

    text: str
    tokens: TokenIds
    actions: npt.NDArray[np.int8]
    statistics: Statistics
    finish_reason: str

    @classmethod
    def gathered(cls, responses: Sequence[Response]) -> Generation:
        """All responses of one stream, of which there is one at least."""
        last = responses[-1]
        return cls(
            "".join(response.text for response in responses),
            np.array([response.token for response in responses], np.int64),
            np.array([response.actions for response in responses]),
            last.statistics,
            last.finish_reason or "length",
        )


@dataclass(frozen=True)
class Score:
    """Teacher-forced scoring of n tokens: log_likelihoods float32 [n - 1] (nats, of token i + 1 given those before),
    greedy bool [n - 1] (whether token i + 1 is the likeliest, which greedy decode would write), actions int8
    [n, layers], damage float32 [n, units], the policy's output (zero where there is no network), and, where they were
    asked for, logits float32 [n, vocab].
    """

    log_likelihoods: npt.NDArray[np.float32]
    greedy: npt.NDArray[np.bool_]
    actions: npt.NDArray[np.int8]
    damage: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None = None

    @property
    def perplexity(self) -> float:
        """Raises RequestError for the score of a single token, before which there is nothing to predict it from."""
        if not len(self.log_likelihoods):
            raise RequestError("One token has no perplexity: score two or more.")
        return float(np.exp(-self.log_likelihoods.mean(dtype=np.float64)))


@dataclass
class Counters:
    """What a session has done since it was made."""

    prefill_tokens: int = 0
    decode_steps: int = 0
    layers_run: int = 0
    cache_growths: int = 0
