"""The memory of a card that is not there, by its addresses; and how a broken rule is told."""

from bisect import bisect
from typing import Any

import cuda.bindings.runtime as rt
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
OK, POISON = rt.cudaError_t.cudaSuccess, 0xFF


class BrokenRuleError(AssertionError):
    """A rule of CUDA's or TensorRT's; the first word is the error that it would be."""


def rule(kept: object, broken: str) -> None:
    if not kept:
        raise BrokenRuleError(broken)


class Memory:
    """What was allocated on the card and, pinned, on the host. It is rubbish at first."""

    def __init__(self) -> None:
        self.total = 8 << 30
        self._memory: dict[int, Bytes] = {}
        self._starts: list[int] = []
        self._pinned: set[int] = set()

    def drain(self) -> None:
        """Everything that is under way ends."""
        raise NotImplementedError

    def view(self, address: int, nbytes: int) -> Bytes:
        """Memory that was allocated, all of it in one allocation."""
        start = self._start(address)
        whole = self._memory.get(start)
        at = address - start
        if whole is None or at < 0 or at + nbytes > whole.nbytes:
            raise BrokenRuleError(f"cudaErrorIllegalAddress: {nbytes} bytes at {address:x}")
        return whole[at : at + nbytes]

    def _start(self, address: int) -> int:
        return self._starts[bisect(self._starts, address) - 1] if self._starts else 0

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:  # noqa: N802
        if nbytes > self.total:
            return rt.cudaError_t.cudaErrorMemoryAllocation, None
        made = np.full(nbytes + 256, POISON, np.uint8)
        aligned = made[-made.ctypes.data % 256 :][:nbytes]
        self._memory[aligned.ctypes.data] = aligned
        self._starts = sorted(self._memory)
        return OK, aligned.ctypes.data

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == rt.cudaHostAllocDefault
        code, address = self.cudaMalloc(nbytes)
        self._pinned.add(address)
        return code, address

    def cudaFree(self, address: int) -> tuple[Any]:  # noqa: N802
        """CUDA waits for everything first."""
        self.drain()
        del self._memory[address]
        self._pinned.discard(address)
        self._starts = sorted(self._memory)
        return (OK,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemGetInfo(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.total - sum(each.nbytes for each in self._memory.values()), self.total
