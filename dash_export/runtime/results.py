"""Results of a session: one response per token, finished generations and scores; and `Turn`, which makes an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index

import numpy as np
import numpy.typing as npt

from dash_export.core.sampling import Draw, Logits, Sampler, Sampling, TokenIds, most_likely
from dash_export.errors import ContextLengthError, DashError, RequestError
from dash_export.text.guidance import Guide
from dash_export.text.tokenizer import Text, TextStream

NO_TOKEN = -1
MAX_TOKENS = 256
"""Most tokens of an answer where the caller names no number."""


@dataclass(frozen=True)
class Statistics:
    """Running figures of one generation. Prefill gives the first token; `layers` ran for all decoded tokens together.
    `passes` gave the decoded tokens; they checked so many `drafts`, of which `accepted` were the choice.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    layers: int = 0
    passes: int = 0
    drafts: int = 0
    accepted: int = 0

    @property
    def decode_steps(self) -> int:
        return max(0, self.tokens - 1)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, without prefill."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def layers_per_token(self) -> float:
        """Mean layers run per decode step."""
        return self.layers / self.decode_steps if self.decode_steps else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens that a pass gave; 1 without drafts."""
        return self.decode_steps / self.passes if self.passes else 0.0


@dataclass(frozen=True)
class Response:
    """One step of a stream. `actions` is int8 [layers] (0 run, 1 skip) of the step that made `token`; the token that
    prefill gives is dense.

    The last response of a stream has a `finish_reason`: `stop` (end of turn or of the grammar, or a stop string),
    `length` or `cancelled`; or, in a batch, `error`, with the error and no token (NO_TOKEN, as where none is wanted).
    `logprobs`, where asked for: (token, nats) of this token and of the most likely ones. `drafted`: the token was a
    draft.
    """

    text: str
    token: int
    actions: npt.NDArray[np.int8]
    seconds: float
    statistics: Statistics
    finish_reason: str | None = None
    error: DashError | None = None
    logprobs: tuple[tuple[int, float], ...] = ()
    drafted: bool = False


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
        """Join all responses of one stream, at least one."""
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
    """Teacher-forced scores of n tokens. `log_likelihoods` float32 [n - 1]: nats, of token i + 1 given the tokens
    before. `greedy` bool [n - 1]: whether token i + 1 is the likeliest, which greedy decode would write. `actions` int8
    [n, layers]. `damage` float32 [n, units]: the policy's output, zero where there is no network. `logits` float32
    [n, vocab], where asked for.
    """

    log_likelihoods: npt.NDArray[np.float32]
    greedy: npt.NDArray[np.bool_]
    actions: npt.NDArray[np.int8]
    damage: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None = None

    @property
    def perplexity(self) -> float:
        if not len(self.log_likelihoods):
            raise RequestError("One token has no perplexity: score two or more.")
        return float(np.exp(-self.log_likelihoods.mean(dtype=np.float64)))


def answer_length(prompt: int, max_tokens: int | None, free: int, most: int = MAX_TOKENS) -> int:
    """Return how many tokens an answer to `prompt` tokens may have. `max_tokens` None: `most`, or what the `free`
    positions allow. Raises RequestError, and ContextLengthError where prompt and answer do not fit together.
    """
    if max_tokens is None:
        max_tokens = max(1, min(most, free - prompt))
    max_tokens = index(max_tokens)
    if max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, not {max_tokens}.")
    check_room(prompt, max_tokens, free)
    return max_tokens


def checked_tokens(ids: Sequence[int] | TokenIds, vocab: int) -> TokenIds:
    """Return token ids int64 [n], n at least 1. Raises RequestError."""
    try:
        array = np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        raise RequestError(f"Token ids must be one list of integers ({error!s:.100}).") from error
    if array.size == 0:
        raise RequestError("The prompt is empty: give at least one token.")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise RequestError(f"Token ids must be one list of integers, not {array.dtype} {list(array.shape)}.")
    if array.min() < 0 or array.max() >= vocab:
        raise RequestError(f"Token ids must be from 0 to {vocab - 1}; got {array.min()} to {array.max()}.")
    return array.astype(np.int64)


def checked_embeddings(embeddings: npt.NDArray[np.float32], hidden: int) -> npt.NDArray[np.float32]:
    """Return embeddings [n, hidden], n at least 1, of finite numbers. Raises RequestError."""
    array = np.asarray(embeddings)
    fits = array.ndim == 2 and len(array) and array.shape[1] == hidden and array.dtype.kind in "fiu"
    if not fits or not np.isfinite(array).all():
        raise RequestError(f"Embeddings must be finite numbers [n, {hidden}], n at least 1; got {list(array.shape)}.")
    return array.astype(np.float32, copy=False)


def check_room(tokens: int, more: int, free: int) -> None:
    """Raise ContextLengthError where `tokens` and `more` do not fit into the `free` positions."""
    if tokens + more > free:
        raise ContextLengthError(
            f"The context does not hold this: {tokens} prompt tokens and {more} new ones, but {free} positions "
            "are free. Shorten the prompt, ask for fewer tokens or start a new session."
        )


class Turn:
    """Sampler, text and figures of one answer. Its clock starts when it is made."""

    def __init__(
        self,
        text: Text,
        sampling: Sampling,
        max_tokens: int,
        prompt_tokens: int,
        guide: Guide | None = None,
        after: int | None = None,
    ) -> None:
        """Start an answer. `guide`: that of the sampling's grammar, where the caller has read the grammar already.
        `after`: the prompt's last token, where the answer goes on with its text.
        """
        self._text, self._max_tokens = text, max_tokens
        self._logprobs, self._ignores_eos = sampling.logprobs, sampling.ignore_eos
        self._sampler, self._stream = Sampler(sampling), TextStream(text.tokenizer, sampling.stop, after)
        self._guide = guide
        if guide is None and sampling.grammar is not None:
            self._guide = text.guides.guide(sampling.grammar)
        self.statistics = Statistics(prompt_tokens=prompt_tokens)
        self.begin()

    @property
    def draw(self) -> Draw | None:
        """How the next token will be drawn, where that is known beforehand."""
        return self._sampler.draw

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self._max_tokens - self.statistics.tokens

    def forced(self, most: int) -> list[int]:
        """Return the tokens, at most so many, that the grammar leaves no choice about."""
        return [] if self._guide is None else self._guide.forced()[:most]

    def allowed(self, drafts: list[int]) -> list[int]:
        """Return the drafts up to the first that the grammar forbids, but one at least."""
        return drafts if self._guide is None else drafts[: max(1, self._guide.count_allowed(drafts))]

    def begin(self) -> None:
        """Start the clock of a step."""
        self._began = time.perf_counter()

    def note_pass(self, drafts: int) -> None:
        """Count a pass that checks so many drafts."""
        said = self.statistics
        self.statistics = replace(said, passes=said.passes + 1, drafts=said.drafts + drafts)

    def without_tokens(self, actions: npt.NDArray[np.int8]) -> Response:
        """Return the only response where the prompt is all that is wanted."""
        seconds = time.perf_counter() - self._began
        self.statistics = Statistics(self.statistics.prompt_tokens, 0, seconds)
        return Response("", NO_TOKEN, actions, seconds, self.statistics, "length")

    def respond(
        self,
        logits: Logits,
        context: Sequence[int],
        actions: npt.NDArray[np.int8],
        cancelled: bool = False,
        draft: int | None = None,
    ) -> Response:
        """Choose the next token, given the logits [vocab] and `actions` [layers] of a step, the tokens so far, and the
        draft that is accepted if it is the choice.
        """
        allowed = logits if self._guide is None else self._guide.allowed(logits)
        token = self._sampler(allowed, context)
        whole = self._guide is not None and self._guide.take(token)
        ends = token in self._text.eos_ids
        piece = "" if ends else self._stream.push(token)  # not every tokenizer has it as a special one
        seconds, before = time.perf_counter() - self._began, self.statistics
        tokens = before.tokens + 1
        if tokens == 1:
            self.statistics = Statistics(before.prompt_tokens, tokens, seconds)
        else:
            self.statistics = replace(
                before,
                tokens=tokens,
                decode_seconds=before.decode_seconds + seconds,
                layers=before.layers + len(actions) - int(actions.sum()),
                accepted=before.accepted + (token == draft),
            )
        reason = None
        if whole or (ends and not self._ignores_eos) or self._stream.stopped:
            reason = "stop"
        elif tokens == self._max_tokens:
            reason = "length"
        elif cancelled:
            reason = "cancelled"
        if reason is not None and not self._stream.stopped:
            piece += self._stream.finish()
        likely = () if self._logprobs is None else most_likely(logits, token, self._logprobs)
        return Response(piece, token, actions, seconds, self.statistics, reason, None, likely, token == draft)
