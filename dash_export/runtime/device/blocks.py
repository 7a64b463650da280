"""Several small arrays in one block of memory, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.runtime.device.base import ALIGNMENT, Device, Memory, Stream

Layout = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]


def size_of(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """Bytes."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def aligned(nbytes: int) -> int:
    """Rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Block:
    """`host`: pinned arrays by name; `memory`: the same arrays on the device."""

    def __init__(self, device: Device, layout: Layout) -> None:
        total = sum(aligned(size_of(*each)) for each in layout.values())
        self._pinned = device.pinned(total)
        self._memory = device.memory(total)
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.memory: dict[str, Memory] = {}
        offset = 0
        for name, (shape, dtype) in layout.items():
            nbytes = size_of(shape, dtype)
            self.host[name] = self._pinned[offset : offset + nbytes].view(dtype).reshape(shape)
            self.memory[name] = self._memory.part(offset, nbytes)
            offset += aligned(nbytes)

    def upload(self, stream: Stream) -> None:
        """All arrays to the device in one copy."""
        stream.upload(self._memory, self._pinned)

    def download(self, stream: Stream) -> None:
        """All arrays to the host in one copy."""
        stream.download(self._pinned, self._memory)
