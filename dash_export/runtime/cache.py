"""The KV cache of one session, or of a batch: one key and one value array per layer, written in place, growing in
steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dash_export.bundle import ModelFacts


class KVCache:
    """`keys[l]` and `values[l]` are float32 [sequences, kv_heads, capacity, head_dim]; rows of a sequence from its
    length on are free (zero or stale, never read).
    """

    def __init__(self, model: ModelFacts, step: int, sequences: int = 1) -> None:
        self._model = model
        self._step = step
        self.lengths = [0] * sequences
        self.capacity = 0
        self.keys: list[npt.NDArray[np.float32]] = []
        self.values: list[npt.NDArray[np.float32]] = []

    @property
    def length(self) -> int:
        """Of the only sequence, or of the first of a batch."""
        return self.lengths[0]

    @length.setter
    def length(self, rows: int) -> None:
        self.lengths[0] = rows

    def reserve(self, rows: int) -> bool:
        """Make room for `rows` tokens of every sequence, rounded up to a step. True when the arrays moved and must be
        bound again.
        """
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
        shape = (len(self.lengths), self._model.num_kv_heads, self.capacity, self._model.head_dim)
        new = np.zeros(shape, np.float32)
        if old is not None:
            for index, length in enumerate(self.lengths):
                new[index, :, :length] = old[index, :, :length]
        return new

    def copy(self) -> KVCache:
        """Another cache with the same contents."""
        twin = KVCache(self._model, self._step, len(self.lengths))
        twin.lengths, twin.capacity = list(self.lengths), self.capacity
        twin.keys, twin.values = ([array.copy() for array in arrays] for arrays in (self.keys, self.values))
        return twin

    def take(self, index: int, source: KVCache, other: int = 0) -> None:
        """Sequence `index` becomes a copy of sequence `other` of `source`, for which there must be room."""
        length = source.lengths[other]
        for into, arrays in ((self.keys, source.keys), (self.values, source.values)):
            for mine, theirs in zip(into, arrays, strict=True):
                mine[index, :, :length] = theirs[other, :, :length]
        self.lengths[index] = length

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))
