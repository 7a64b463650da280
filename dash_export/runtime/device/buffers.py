"""Memory of steps on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.runtime.device.cuda import Cuda


class PromptMemory:
    """Memory of one session's prompts. Every step of many tokens asks for the same buffers in the same order, so each
    step takes over the buffers of the step before, whatever its length. A buffer that is too small is replaced by one
    of at least twice its size.
    """

    def __init__(self, device: Cuda) -> None:
        self._device, self._kept, self._asked = device, list[Any](), 0

    def again(self) -> PromptMemory:
        """Start again with the first buffer."""
        self._asked = 0
        return self

    def memory(self, nbytes: int) -> Any:
        return self._next(self._device.memory, nbytes).part(0, nbytes)

    def pinned(self, nbytes: int) -> Any:
        return self._next(self._device.pinned, nbytes)[:nbytes]

    def _next(self, make: Callable[[int], Any], nbytes: int) -> Any:
        place, self._asked = self._asked, self._asked + 1
        if place == len(self._kept):
            self._kept.append(make(nbytes))
        elif self._kept[place].nbytes < nbytes:
            self._kept[place] = make(max(nbytes, 2 * self._kept[place].nbytes))
        return self._kept[place]


class Mirror:
    """An array on the device (`memory`) and in pinned memory: `host`, the first of `hosts`."""

    def __init__(
        self, device: Cuda | PromptMemory, shape: tuple[int, ...], dtype: npt.DTypeLike, hosts: int = 1
    ) -> None:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.hosts: list[npt.NDArray[Any]] = [device.pinned(nbytes).view(dtype).reshape(shape) for _ in range(hosts)]
        self.host = self.hosts[0]
        self.memory: Any = device.memory(nbytes)
