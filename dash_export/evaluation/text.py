"""Divergence and perplexity over a text: teacher-forced windows, a dense prefix, the rest under each setting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS, Actions
from dash_export.divergence import DenseRows, surprise
from dash_export.errors import RequestError
from dash_export.evaluation.bootstrap import interval
from dash_export.evaluation.results import TextResult
from dash_export.evaluation.settings import Entrant
from dash_export.runtime import DashRuntime, Session

TokenIds = npt.NDArray[np.int64]
WINDOW = 256
PREFIX = 64
"""Tokens of a window that are dense, like a prompt: nobody is charged for them."""
_SUMS = 4
"""KL, -log q, dense's -log p, agreeing tokens."""


def windows(runtime: DashRuntime, text: str, name: str, count: int, window: int = WINDOW) -> list[TokenIds]:
    """At most `count` windows of `window` tokens without overlap, spread evenly over the text.

    Raises RequestError for a text of less than one window, or a window longer than the model's context.
    """
    longest = runtime.engines.model.max_positions
    if window > longest:
        raise RequestError(f"A window of {window} tokens is longer than the model's context of {longest}.")
    ids = runtime.text.encode_in_pieces(text)
    if len(ids) < window:
        raise RequestError(
            f"{name} has {len(ids)} tokens, less than one window of {window}: give a longer text or a shorter window."
        )
    starts = np.linspace(0, len(ids) - window, min(count, len(ids) // window)).astype(int)
    return [ids[start : start + window] for start in starts]


def check(parts: Sequence[TokenIds], prefix: int) -> int:
    """The prefix, 2 or more. Raises RequestError when it leaves nothing of a window to score."""
    prefix = max(prefix, DENSE_POSITIONS)
    if any(len(part) < prefix + 2 for part in parts):
        raise RequestError(f"A window must be longer than its dense prefix of {prefix} tokens by two or more.")
    return prefix


def measure_text(
    entrants: Sequence[Entrant],
    parts: Sequence[TokenIds],
    prefix: int = PREFIX,
    progress: Progress = no_progress,
) -> list[TextResult]:
    """Every entrant over every window, against the first one, which is dense.

    Positions from `prefix` (at least 2) on are counted: their layers may be skipped, and what they predict is scored.
    Raises RequestError when a window has no such position.
    """
    prefix = check(parts, prefix)
    sums = np.zeros((len(entrants), len(parts), _SUMS))
    for number, part in enumerate(parts):
        reference = _Reference(entrants[0].session(), part, prefix)
        for index, entrant in enumerate(entrants):
            sums[index, number] = reference.compare(entrant, dense=index == 0)
            progress("text", number * len(entrants) + index + 1, len(parts) * len(entrants))
    counts = [len(part) - 1 - prefix for part in parts]
    return [_result(entrant, measured, counts) for entrant, measured in zip(entrants, sums, strict=True)]


def _result(entrant: Entrant, sums: npt.NDArray[np.float64], counts: Sequence[int]) -> TextResult:
    kl, nll, dense_nll, same = sums.T
    return TextResult(
        *entrant.figures(),
        len(counts),
        interval(kl, counts),
        interval(nll, counts, np.exp),
        interval(nll - dense_nll, counts, np.exp),
        interval(same, counts),
    )


class _Reference:
    """One window under dense: its distributions at the counted positions, and the most likely tokens."""

    def __init__(self, session: Session, part: TokenIds, prefix: int) -> None:
        self._part, self._prefix = part, prefix
        # The last position has no token after it to score.
        self._rows = slice(prefix, len(part) - 1)
        self._following = part[prefix + 1 :]
        logits, self._actions = self._logits(session)
        self._dense, self._likely = DenseRows(logits), logits.argmax(axis=-1)
        self._surprise = float(surprise(logits, self._following).sum())

    def compare(self, entrant: Entrant, dense: bool) -> tuple[float, float, float, int]:
        """Sums of KL, of -log q of the tokens that followed, of the same under dense, and of agreeing tokens. `dense`:
        the entrant is the reference itself.
        """
        if dense:
            entrant.took(self._actions)
            return 0.0, self._surprise, self._surprise, len(self._likely)
        logits, actions = self._logits(entrant.session())
        entrant.took(actions)
        same = int((logits.argmax(axis=-1) == self._likely).sum())
        nll = float(surprise(logits, self._following).sum())
        # A divergence is never negative; where nothing was skipped, rounding can make it so.
        return max(0.0, float(self._dense.kl(logits).sum())), nll, self._surprise, same

    def _logits(self, session: Session) -> tuple[npt.NDArray[np.float32], Actions]:
        score = session.score(self._part, self._prefix, keep_logits=True)
        assert score.logits is not None
        return score.logits[self._rows], score.actions[self._rows]
