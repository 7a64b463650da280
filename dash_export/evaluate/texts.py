"""Divergence and perplexity over a text: teacher-forced windows, a dense prefix, the rest under each setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS, Actions
from dash_export.divergence import DenseRows, nll
from dash_export.errors import RequestError
from dash_export.evaluate.candidates import Candidate, Result
from dash_export.evaluate.intervals import Interval, interval
from dash_export.runtime import DashRuntime, Session

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextResult(Result):
    """`kl`: KL(dense || candidate), nats per token; `perplexity_ratio`: to dense, window by window; `top1`: share of
    tokens whose most likely successor is dense's. Dense is that of the measured build.
    """

    kl: Interval
    perplexity: Interval
    perplexity_ratio: Interval
    top1: Interval


def windows(
    runtime: DashRuntime, text: str, name: str, count: int, window: int, prefix: int = DENSE_POSITIONS
) -> list[TokenIds]:
    """At most `count` windows of `window` tokens without overlap, spread evenly over the text.

    Raises RequestError for a text of less than one window, and for a window that is longer than the model's context or
    that its dense prefix leaves nothing of.
    """
    longest = runtime.engines.model.max_positions
    if window < prefix + 2:
        raise RequestError(f"A window must be longer than its dense prefix of {prefix} tokens by two or more.")
    if window > longest:
        raise RequestError(f"A window of {window} tokens is longer than the model's context of {longest}.")
    ids = runtime.text.encode_in_pieces(text)
    if len(ids) < window:
        raise RequestError(
            f"{name} has {len(ids)} tokens, less than one window of {window}: give a longer text or a shorter window."
        )
    starts = np.linspace(0, len(ids) - window, min(count, len(ids) // window)).astype(int)
    return [ids[start : start + window] for start in starts]


def score_text(
    candidates: Sequence[Candidate],
    parts: Sequence[TokenIds],
    prefix: int,
    progress: Progress = no_progress,
) -> list[TextResult]:
    """Every candidate over every window, against the first one, which is dense.

    Positions from `prefix` (2 or more) on are counted: their layers may be skipped, and what they predict is scored.
    """
    sums = np.zeros((len(candidates), len(parts), 3))  # KL, negative log-likelihood, agreeing tokens
    for number, part in enumerate(parts):
        following = part[prefix + 1 :]
        logits, dense_actions = _scored(candidates[0].session(), part, prefix)
        dense, likely = DenseRows(logits), logits.argmax(axis=-1)
        for index, candidate in enumerate(candidates):
            if index == 0:
                actions, kl = dense_actions, 0.0
            else:
                logits, actions = _scored(candidate.session(), part, prefix)
                # A divergence is never negative; where nothing was skipped, rounding can make it so.
                kl = max(0.0, float(dense.kl(logits).sum()))
            candidate.took(actions)
            same = int((logits.argmax(axis=-1) == likely).sum())
            sums[index, number] = kl, float(nll(logits, following).sum()), same
            progress("text", number * len(candidates) + index + 1, len(parts) * len(candidates))
    counts = [len(part) - 1 - prefix for part in parts]
    dense_nll = sums[0, :, 1]
    return [
        TextResult(
            *candidate.taken(),
            len(parts),
            interval(own[:, 0], counts),
            interval(own[:, 1], counts, np.exp),
            interval(own[:, 1] - dense_nll, counts, np.exp),
            interval(own[:, 2], counts),
        )
        for candidate, own in zip(candidates, sums, strict=True)
    ]


def _scored(session: Session, part: TokenIds, prefix: int) -> tuple[npt.NDArray[np.float32], Actions]:
    """Logits and actions at the counted positions; the last one has no token after it to score."""
    score = session.score(part, prefix, keep_logits=True)
    assert score.logits is not None
    return score.logits[prefix : len(part) - 1], score.actions[prefix : len(part) - 1]
