"""Divergence of one next-token distribution from another, row by row over the whole vocabulary (numpy only).

Everything is in nats. Rows are taken a few at a time: beside the logits only one float32 copy of them is held.
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
    """The distributions p = softmax(logits) that others are compared with: those of the dense mode of the same build.

    `logits` is [rows, vocab]; it is not kept. Raises BackendError where they are not numbers, like `kl`.
    """

    def __init__(self, logits: Logits) -> None:
        self._p = np.empty(logits.shape, np.float32)
        self._own = np.zeros(len(logits))  # sum p log p
        for rows in _blocks(len(logits)):
            log_p = _log_softmax(logits[rows])
            self._p[rows] = p = np.exp(log_p)
            self._own[rows] = (p * log_p).sum(axis=-1)
        _check(self._own)

    def kl(self, logits: Logits) -> Nats:
        """KL(p || q) = sum p (log p - log q) of every row, [rows]; q = softmax(logits), logits [rows, vocab]."""
        found = np.zeros(len(logits))
        for rows in _blocks(len(logits)):
            found[rows] = self._own[rows] - (self._p[rows] * _log_softmax(logits[rows])).sum(axis=-1)
        _check(found)
        return found


def nll(logits: Logits, tokens: npt.NDArray[np.int64]) -> Nats:
    """-log softmax(logits) at the tokens that followed, [n]; logits [n or more, vocab], further rows are not read."""
    found = np.zeros(len(tokens))
    for rows in _blocks(len(tokens)):
        log_q = _log_softmax(logits[rows.start : rows.stop])
        found[rows] = -np.take_along_axis(log_q, tokens[rows][:, None], axis=-1)[:, 0]
    return found


def _log_softmax(logits: Logits) -> Logits:
    z: Logits = logits - logits.max(axis=-1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return z


def _check(found: Nats) -> None:
    """A NaN would be the smallest of all divergences to whoever bounds it by 0."""
    if not np.isfinite(found).all():
        raise BackendError(NOT_NUMBERS)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
