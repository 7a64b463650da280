"""The KV cache of one session: one key and one value array per layer, written in place, growing in steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dash_export.bundle import ModelFacts


class KVCache:
    """`keys[l]` and `values[l]` are float32 [1, kv_heads, capacity, head_dim]; rows from `length` on are free (zero or
    stale, never read).
    """

    def __init__(self, model: ModelFacts, step: int) -> None:
        self._model = model
        self._step = step
        self.length = 0
        self.capacity = 0
        self.keys: list[npt.NDArray[np.float32]] = []
        self.values: list[npt.NDArray[np.float32]] = []

    def reserve(self, rows: int) -> bool:
        """Make room for `rows` tokens, rounded up to a step. True when the arrays moved and must be bound again."""
        if rows <= self.capacity:
            return False
        # Half as much again beyond what is there: the copies of a long generation stay linear in its length.
        wanted = max(rows, self.capacity + self.capacity // 2)
        limit = -(-self._model.max_positions // self._step) * self._step
        self.capacity = min(-(-wanted // self._step) * self._step, max(limit, rows))
        for arrays in (self.keys, self.values):
            arrays[:] = [self._grown(arrays[layer] if arrays else None) for layer in range(self._model.num_layers)]
        return True

    def _grown(self, old: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
        new = np.zeros((1, self._model.num_kv_heads, self.capacity, self._model.head_dim), np.float32)
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))
