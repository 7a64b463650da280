"""How far one next-token distribution is from another, row by row over the whole vocabulary (numpy only).

Everything is in nats. Rows are taken a few at a time, so that temporaries stay in the processor's cache and beside the
logits only one float32 copy of them is held.
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
            z = logits[rows] - logits[rows].max(axis=-1, keepdims=True)
            p = np.exp(z)
            mass = p.sum(axis=-1, keepdims=True)
            p /= mass
            self._p[rows] = p
            self._own[rows] = (p * (z - np.log(mass))).sum(axis=-1)
        _check(self._own)

    def kl(self, logits: Logits) -> Nats:
        """KL(p || q) = sum p (log p - log q) of every row, [rows]; q = softmax(logits), logits [rows, vocab]."""
        found = np.zeros(len(logits))
        for rows in _blocks(len(logits)):
            z = logits[rows] - logits[rows].max(axis=-1, keepdims=True)
            log_mass = np.log(np.exp(z).sum(axis=-1))
            found[rows] = self._own[rows] - ((self._p[rows] * z).sum(axis=-1) - log_mass)
        _check(found)
        return found


def surprise(logits: Logits, tokens: npt.NDArray[np.int64]) -> Nats:
    """-log softmax(logits) at the tokens that followed, [n]; logits [n or more, vocab], further rows are not read."""
    found = np.zeros(len(tokens))
    for rows in _blocks(len(tokens)):
        z = logits[rows.start : rows.stop]
        z = z - z.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(z, tokens[rows][:, None], axis=-1)[:, 0]
        found[rows] = np.log(np.exp(z).sum(axis=-1)) - chosen
    return found


def _check(found: Nats) -> None:
    """A NaN would be the smallest of all divergences to whoever bounds it by 0."""
    if not np.isfinite(found).all():
        raise BackendError(NOT_NUMBERS)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
