"""From logits to a token, in numpy: penalty, temperature, top-k, top-p, min-p, in Hugging Face's order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dash_export.errors import NOT_NUMBERS, BackendError, RequestError
from dash_export.files.typed_json import FreeText, check_fields, shown

TokenIds = npt.NDArray[np.int64]
Prompt = str | Sequence[int] | TokenIds
"""Text or token ids [n]."""
Logits = npt.NDArray[np.float32]
MOST_LOGPROBS, MOST_STOPS, LONGEST_STOP = 20, 16, 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty`
    1 are off. `frequency_penalty` and `presence_penalty` (OpenAI's; 0 is off) count the tokens of the answer so far.
    `logit_bias`: token id -> nats that are added to its logit. `ignore_eos`: a token that ends a text does not end the
    answer. `logprobs`: give the log-likelihood of each token and of so many of the most likely ones. `grammar`: the
    grammar that the answer must follow, in llguidance's Lark (`guidance.json_grammar` makes one of a JSON schema).
    Raises RequestError for a value that is no number or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[FreeText, ...] = ()
    grammar: FreeText | None = None

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        greedy, penalty = self.temperature == 0.0, self.repetition_penalty
        for name, valid, expected in (
            ("temperature", greedy or 1e-3 <= self.temperature <= 100.0, "0 (greedy) or between 0.001 and 100"),
            ("top_k", self.top_k >= 0, ">= 0 (0 is off)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1] (1 is off)"),
            ("min_p", 0.0 <= self.min_p < 1.0, "in [0, 1) (0 is off)"),
            ("repetition_penalty", 1e-2 <= penalty <= 100.0, "between 0.01 and 100 (1 is off)"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2 (0 is off)"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2 (0 is off)"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"0 to {MOST_LOGPROBS}, or None",
            ),
            (
                "logit_bias",
                all(token >= 0 and -100 <= nats <= 100 for token, nats in self.logit_bias.items()),
                "token ids with numbers between -100 and 100",
            ),
            ("seed", self.seed is None or self.seed >= 0, ">= 0"),
            (
                "stop",
                len(self.stop) <= MOST_STOPS and all(0 < len(one) <= LONGEST_STOP for one in self.stop),
                f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} letters",
            ),
        ):
            if not valid:
                raise RequestError(f"{name} must be {expected}, not {shown(getattr(self, name))}.")


class Draw(NamedTuple):
    """How a device draws the next token ahead: `sharpness` 1 / temperature, 0 for the likeliest token; `lowest`
    -log(min_p); `share` of the mass, in [0, 1), at which the draw lands.
    """

    sharpness: float
    top_k: int
    top_p: float
    lowest: float
    share: float


class Sampler:
    """One request's sampler; with a seed the same logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._share = self._rng.random()
        self._begins: int | None = None

    @property
    def draw(self) -> Draw | None:
        """The next call's draw; None where logits alone do not say what may follow: for a penalty, bias or grammar."""
        s = self._sampling
        counts = s.frequency_penalty or s.presence_penalty or s.logit_bias
        if s.repetition_penalty != 1.0 or counts or s.grammar is not None:
            return None
        sharpness, lowest = 1 / s.temperature if s.temperature else 0.0, -math.log(s.min_p) if s.min_p else math.inf
        return Draw(sharpness, s.top_k, s.top_p, lowest, self._share)

    def __call__(self, logits: Logits, context: Sequence[int]) -> int:
        """Return a token id, given logits [vocab] float32, which stay unchanged, and the tokens so far. Raises
        BackendError where the logits are not numbers.
        """
        s = self._sampling
        if self._begins is None:
            self._begins = len(context)
        if s.frequency_penalty or s.presence_penalty:
            logits = with_count_penalties(logits, context[self._begins :], s)
        if s.repetition_penalty != 1.0 and context:
            logits = with_repetition_penalty(logits, context, s.repetition_penalty)
        if s.logit_bias:
            logits = with_bias(logits, s.logit_bias)
        if s.temperature == 0.0:
            token = int(logits.argmax())  # a NaN, if there is one: no second pass over the vocabulary
            if not np.isfinite(logits[token]):
                raise BackendError(NOT_NUMBERS)
            return token
        candidates, weights = distribution(logits, s)
        share, self._share = self._share, self._rng.random()
        place = drawn(weights, share)
        return place if candidates is None else int(candidates[place])


def with_repetition_penalty(logits: Logits, context: Sequence[int], penalty: float) -> Logits:
    """Return logits of tokens in `context` divided by `penalty` if positive, else times it (CTRL, arXiv 1909.05858)."""
    logits = logits.copy()
    seen = np.asarray(context)
    seen = seen[seen >= 0]  # embeddings have no token id; a token that occurs twice is penalised once
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    return logits


def with_bias(logits: Logits, bias: dict[int, float]) -> Logits:
    """Return logits with each token's bias added. Raises RequestError for a token that is not in the vocabulary."""
    tokens = np.array([*bias], np.int64)
    if tokens.max() >= logits.size:
        raise RequestError(f"logit_bias: token ids must be from 0 to {logits.size - 1}, not {tokens.max()}.")
    logits = logits.copy()
    logits[tokens] += np.array([*bias.values()], np.float32)
    return logits


def with_count_penalties(logits: Logits, answer: Sequence[int], s: Sampling) -> Logits:
    """Return logits lowered for the answer's tokens: by frequency_penalty for each time, by presence_penalty once."""
    tokens, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
    logits = logits.copy()
    logits[tokens] -= np.float32(s.frequency_penalty) * counts + np.float32(s.presence_penalty)
    return logits


def most_likely(logits: Logits, token: int, count: int) -> tuple[tuple[int, float], ...]:
    """Return (token, log-likelihood in nats) of `token`, then of the `count` most likely ones."""
    largest = logits.max()
    total = float(largest) + np.log(np.exp(logits - largest).sum(dtype=np.float64))
    count = min(count, logits.size)
    best = np.sort(np.argpartition(logits, -count)[-count:]) if count else np.array([], np.int64)
    ranked = best[np.argsort(-logits[best], kind="stable")].tolist()
    return tuple((one, float(logits[one] - total)) for one in (token, *ranked))


Weights = npt.NDArray[np.floating[Any]]


def distribution(logits: Logits, s: Sampling) -> tuple[npt.NDArray[np.int64] | None, Weights]:
    """Return the candidates left by top-k, top-p and min-p (None: all tokens), in order, and their weights:
    probabilities, times a number, in float32 (after top-k float64), which is ten times as fast. Raises BackendError
    where logits are not numbers.
    """
    candidates, scores = None, logits
    if 0 < s.top_k < logits.size:
        candidates = np.sort(np.argpartition(logits, -s.top_k)[-s.top_k :])
        scores = logits[candidates].astype(np.float64)
    with np.errstate(over="ignore"):  # far below the largest: a weight of zero
        weights = np.exp((scores - scores.max()) * (1 / s.temperature))
    mass = float(weights.sum(dtype=np.float64))
    if not np.isfinite(mass):
        raise BackendError(NOT_NUMBERS)
    if s.top_p == 1 and not s.min_p:
        return candidates, weights
    keep = _nucleus(weights, s.top_p * mass) if s.top_p < 1 else np.flatnonzero(weights >= s.min_p)
    keep = np.sort(keep[weights[keep] >= s.min_p])  # the largest weight is 1
    return keep if candidates is None else candidates[keep], weights[keep]


def _nucleus(weights: Weights, wanted: float) -> npt.NDArray[np.int64]:
    """Return the places of the largest weights, sorted; one stays while the sum before it is below `wanted`. Sorting a
    vocabulary takes as long as a small model, so small weights are sorted only if needed.
    """
    for least in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0):
        places = np.flatnonzero(weights >= least)
        if weights[places].sum(dtype=np.float64) >= wanted:
            break
    places = places[np.argsort(-weights[places], kind="stable")]
    return places[: 1 + np.searchsorted(weights[places].cumsum(dtype=np.float64), wanted)]


BLOCK = 512


def drawn(weights: Weights, share: float) -> int:
    """Return the place at which the running sum of the weights passes `share`, in [0, 1), of all: first among sums of
    BLOCK weights, as a running sum over a vocabulary takes twice as long as all else here.
    """
    block, left = _passed(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)), share)
    place, _ = _passed(weights[block * BLOCK : (block + 1) * BLOCK], left)
    return block * BLOCK + place


def _passed(weights: Weights, share: float) -> tuple[int, float]:
    """Return the place at which the running sum passes `share` of all, and how far within its weight, in [0, 1]."""
    sums = weights.cumsum(dtype=np.float64)
    # Rounding may not lead beyond the last weight that is not zero.
    place = int(min(np.searchsorted(sums, share * sums[-1], side="right"), np.searchsorted(sums, sums[-1])))
    return place, max(0.0, float((share * sums[-1] - sums[place]) / weights[place] + 1))
