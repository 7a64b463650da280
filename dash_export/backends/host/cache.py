"""KV cache of one session or of a batch: keys and values of every layer in one block of memory, written in place and
grown in steps. One block fits on huge pages: at 4,096 cached tokens a decoded token takes 5 to 8 % less time.
"""

from __future__ import annotations

import math
import mmap

import numpy as np
import numpy.typing as npt

from dash_export.core.facts import DecoderFacts

TILE = 16
"""Rows in a tile. Some kernels take rows two at a time (ONNX Runtime's int4 in blocks of 64), others up to 16, and they
may round leftover rows differently. A prompt whose prefix is cached gives the same result as a new prompt if the part
to compute begins at a multiple of TILE.
"""


def whole_tiles(tokens: int) -> int:
    """Return `tokens` rounded down to a multiple of TILE, and at least 0."""
    return max(0, tokens // TILE * TILE)


def pass_length(left: int, most: int) -> int:
    """Return how many tokens of a prompt the next pass takes, of `left`: whole TILEs, but for the prompt's end. The
    last of several passes never has one token alone.
    """
    chunk = whole_tiles(most) or most
    return max(chunk - TILE, 2) if left == chunk + 1 and chunk > 2 else min(left, chunk)


class Sequences:
    """Cached lengths: `lengths[i]` is how many tokens of sequence i a cache holds."""

    def __init__(self, many: int) -> None:
        self.lengths = [0] * many

    @property
    def length(self) -> int:
        """Cached tokens of the only sequence, or of the first of a batch."""
        return self.lengths[0]

    @length.setter
    def length(self, rows: int) -> None:
        self.lengths[0] = rows


class KVCache(Sequences):
    """KV cache on the host. `keys` and `values`, float32 [layers, sequences, kv_heads, capacity, head_dim], are views
    of one block. Rows of a sequence from its length on are free: zero or stale, never read.
    """

    def __init__(self, model: DecoderFacts, step: int, sequences: int = 1, capacity: int = 0) -> None:
        super().__init__(sequences)
        self._model, self._step = model, step
        self.position_nbytes = 8 * model.num_layers * model.num_kv_heads * model.head_dim
        shape = (model.num_layers, 2, sequences, model.num_kv_heads, capacity, model.head_dim)
        self._hold(np.zeros(shape, np.float32))

    def _hold(self, block: npt.NDArray[np.float32]) -> None:
        self._block, self.capacity, self.nbytes = block, block.shape[4], block.nbytes
        self.keys, self.values = block[:, 0], block[:, 1]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` tokens of every sequence, rounded up to a multiple of the step. Where that is more than
        the capacity, the arrays move and must be bound again. Raises MemoryError, and then the cache is unchanged.
        """
        if rows <= self.capacity:
            return
        # Grow by at least half the capacity: then all copies of a long generation together stay linear in its length.
        wanted = min(max(rows, self.capacity + self.capacity // 2), max(rows, self._model.max_positions))
        larger = KVCache(self._model, self._step, len(self.lengths), -(-wanted // self._step) * self._step)
        for index in range(len(self.lengths)):
            larger.take(index, self, index)
        vars(self).update(vars(larger))

    def alone(self, index: int) -> KVCache:
        """Return a new cache that holds sequence `index` alone; its capacity is the sequence's length. It is kept, not
        computed with, in a mapping of its own: many sizes that come and go leave gaps between what `malloc` places.
        Raises MemoryError.
        """
        twin, capacity = KVCache(self._model, self._step), self.lengths[index]
        shape = (*self._block.shape[:2], 1, self._block.shape[3], capacity, self._block.shape[5])
        try:
            memory = mmap.mmap(-1, max(1, capacity * self.position_nbytes))
        except OSError as error:
            raise MemoryError(str(error)) from error
        twin._hold(np.frombuffer(memory, np.float32, math.prod(shape)).reshape(shape))
        twin.take(0, self, index)
        return twin

    def take(self, index: int, source: KVCache, other: int = 0) -> None:
        """Replace sequence `index` by a copy of sequence `other` of `source`. Raises as `reserve`."""
        length = source.lengths[other]
        self.reserve(length)
        self._block[:, :, index, :, :length] = source._block[:, :, other, :, :length]
        self.lengths[index] = length

    def rows(self, layers: range, index: int) -> npt.NDArray[np.float32]:
        """View one sequence's K and V of consecutive layers by row: [capacity, layers, 2, kv_heads, head_dim]."""
        return np.moveaxis(self._block[layers.start : layers.stop, :, index], 3, 0)
