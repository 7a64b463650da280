"""Divergence of one next-token distribution from another, row by row over the whole vocabulary, in nats (numpy only).

Rows are taken a few at a time: beside the logits only one float32 copy of them is held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dash_export.errors import NOT_NUMBERS, BackendError

Logits = npt.NDArray[np.float32]
Nats = npt.NDArray[np.float64]

_ROWS = 16


class DenseRows:
    """The distributions p = softmax(logits), logits [rows, vocab], that others are compared with: those of the dense
    mode of the same build. Raises BackendError where they are not numbers, like `kl`.
    """

    def __init__(self, logits: Logits) -> None:
        self._log_p = np.empty(logits.shape, np.float32)
        for rows, log_p in _log_softmax(logits):
            self._log_p[rows] = log_p
            _check(log_p)

    def kl(self, logits: Logits) -> Nats:
        """KL(p || q) = sum p (log p - log q) of every row, [rows]; q = softmax(logits), logits [rows, vocab]."""
        found = np.zeros(len(logits))
        for rows, log_q in _log_softmax(logits):
            log_p = self._log_p[rows]
            found[rows] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        _check(found)
        return found


def nll(logits: Logits, tokens: npt.NDArray[np.int64]) -> Nats:
    """-log softmax(logits) at the tokens that followed, [n]; logits [n or more, vocab], further rows are not read."""
    found = np.zeros(len(tokens))
    for rows, log_q in _log_softmax(logits[: len(tokens)]):
        found[rows] = -np.take_along_axis(log_q, tokens[rows][:, None], axis=-1)[:, 0]
    return found


def _log_softmax(logits: Logits) -> Iterator[tuple[slice, Logits]]:
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        z: Logits = logits[rows] - logits[rows].max(axis=-1, keepdims=True)
        yield rows, z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _check(found: npt.NDArray[np.floating]) -> None:
    """A NaN would be the smallest of all divergences to whoever bounds it by 0."""
    if not np.isfinite(found).all():
        raise BackendError(NOT_NUMBERS)
