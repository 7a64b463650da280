"""Which layers a model can spare: the divergence from its dense self when layers are skipped, over real text.

Every setting is run for real through the engines, in teacher-forced windows whose first tokens are dense. One window at
a time is compared, so memory holds the dense distribution of one window (64 MB for a vocabulary of 128k), whatever the
text's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS, Action
from dash_export.divergence import DenseRows, surprise
from dash_export.errors import RequestError
from dash_export.runtime import DashRuntime, Session

TokenIds = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

WINDOW = 128
ESSENTIAL_FACTOR = 4.0
"""A layer whose divergence is over this many times the median one is essential."""
GREEDY_CANDIDATES = 8
"""A greedy step tries this many layers, the least damaging alone: every try costs a pass over the text."""


@dataclass(frozen=True)
class Damage:
    """What skipping a set of layers does: mean KL from dense (nats per token) and perplexity over the text."""

    skipped: tuple[int, ...]
    kl: float
    perplexity: float


def text_windows(runtime: DashRuntime, text: str, tokens: int, window: int = WINDOW) -> list[TokenIds]:
    """About `tokens` tokens of `text` as windows, spread evenly over it. Raises RequestError for too short a text."""
    ids = runtime.text.encode_in_pieces(text)
    window = min(window, runtime.engines.model.max_positions)
    if len(ids) < window:
        raise RequestError(
            f"The calibration text has {len(ids)} tokens; at least {window} are needed. Give a longer text."
        )
    count = max(1, min(tokens // window, len(ids) // window))
    starts = np.linspace(0, len(ids) - window, count).astype(int)
    return [ids[start : start + window] for start in starts]


class Calibrator:
    """Measures settings over one text, against the dense mode of the same build."""

    def __init__(self, runtime: DashRuntime, windows: Sequence[TokenIds], progress: Progress = no_progress) -> None:
        self._session: Session = runtime.session("dense")
        self._windows = windows
        self._layers = runtime.engines.model.num_layers
        self._progress = progress
        self.gated = runtime.bundle.manifest.policy.gated
        self.tokens = sum(len(window) - DENSE_POSITIONS for window in windows)

    def dense(self) -> Damage:
        """The model as it is."""
        return self.measure([()], "dense")[0]

    def single_layers(self) -> list[Damage]:
        """Each gated layer skipped alone."""
        return self.measure([(layer,) for layer in self.gated], "one layer at a time")

    def greedy_sets(self, singles: Sequence[Damage], largest: int) -> list[Damage]:
        """The best set of one layer, then the best layer to add to it, and so on up to `largest` layers."""
        ranked = sorted(singles, key=lambda damage: damage.kl)
        if not ranked or largest < 1:
            return []
        sets = [ranked[0]]
        while len(sets) < min(largest, len(ranked)):
            chosen = sets[-1].skipped
            candidates = [damage.skipped[0] for damage in ranked if damage.skipped[0] not in chosen][:GREEDY_CANDIDATES]
            tried = self.measure(
                [tuple(sorted((*chosen, layer))) for layer in candidates], f"sets of {len(chosen) + 1}"
            )
            sets.append(min(tried, key=lambda damage: damage.kl))
        return sets

    def measure(self, sets: Sequence[tuple[int, ...]], name: str = "sets") -> list[Damage]:
        """Every set of skipped layers over every window."""
        divergence = np.zeros(len(sets))
        nll = np.zeros(len(sets))
        done, total = 0, len(sets) * len(self._windows)
        for window in self._windows:
            following = window[DENSE_POSITIONS + 1 :]
            logits = self._logits(window, ())
            dense, dense_nll = DenseRows(logits), surprise(logits, following).sum()
            for index, skipped in enumerate(sets):
                if skipped:
                    logits = self._logits(window, skipped)
                    divergence[index] += dense.kl(logits).sum()
                    nll[index] += surprise(logits, following).sum()
                else:
                    nll[index] += dense_nll
                done += 1
                self._progress(name, done, total)
        predicted = self.tokens - len(self._windows)  # the last token of a window has no follower
        return [
            Damage(skipped, float(kl / self.tokens), float(np.exp(total / predicted)))
            for skipped, kl, total in zip(sets, divergence, nll, strict=True)
        ]

    def _logits(self, window: TokenIds, skipped: Iterable[int]) -> Floats:
        actions = np.zeros((len(window), self._layers), np.int8)
        actions[DENSE_POSITIONS:, list(skipped)] = Action.SKIP
        return self._session.logits(window, actions=actions)[DENSE_POSITIONS:]


def essential_layers(singles: Sequence[Damage], factor: float = ESSENTIAL_FACTOR) -> tuple[int, ...]:
    """Layers whose divergence alone is over `factor` times the median: they should never be skipped."""
    if not singles:
        return ()
    limit = factor * median(damage.kl for damage in singles)
    return tuple(damage.skipped[0] for damage in singles if damage.kl > limit)
