"""Divergence of one next-token distribution from another, row by row over the whole vocabulary, in nats (numpy only).

Two rows are processed at a time: what is made of them stays in the caches of a CPU.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dash_export.errors import NOT_NUMBERS, BackendError

Logits = npt.NDArray[np.float32]
Nats = npt.NDArray[np.float64]

_ROWS = 2


class DenseRows:
    """Reference distributions p = softmax(logits), logits [rows, vocab]: those of the dense mode of the same build.
    Raises BackendError for NaN or infinity, and so does `kl`.
    """

    def __init__(self, logits: Logits) -> None:
        self._log_p = np.empty(logits.shape, np.float32)
        for rows, log_p in _log_softmax(logits):
            self._log_p[rows] = log_p
            _check(log_p)

    def kl(self, logits: Logits) -> Nats:
        """Return KL(p || q) = sum p (log p - log q) of every row, [rows]; q = softmax(logits), logits [rows, vocab]."""
        found = np.zeros(len(logits))
        for rows, log_q in _log_softmax(logits):
            log_p = self._log_p[rows]
            found[rows] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        _check(found)
        return found


def nll(logits: Logits, tokens: npt.NDArray[np.int64]) -> Nats:
    """Return -log softmax(logits) [n] at the tokens [n] that followed. Logits [n or more, vocab]: spare rows unused."""
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
    """Raise BackendError for NaN or infinity: where divergence is clipped at 0, a NaN would count as the smallest."""
    if not np.isfinite(found).all():
        raise BackendError(NOT_NUMBERS)
