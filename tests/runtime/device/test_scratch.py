"""Contexts of one stream share one block of scratch memory, which grows; those that are dropped are forgotten."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

from dash_export.runtime.device.cuda import CudaMemory
from dash_export.runtime.device.tensorrt import Scratch, TensorRTContext


class Raw:
    """TensorRT's own context, of which only this is asked."""

    def __init__(self) -> None:
        self.given: list[tuple[int, int]] = []

    def set_device_memory(self, address: int, size: int) -> None:
        self.given.append((address, size))


def scratch() -> tuple[Scratch, list[int]]:
    """A block on a device whose addresses count up, and the sizes it was asked for."""
    asked: list[int] = []

    def memory(nbytes: int) -> CudaMemory:
        asked.append(nbytes)
        return CudaMemory(4096 * len(asked), nbytes)

    device: Any = SimpleNamespace(memory=memory, moves=0, stream=lambda _: SimpleNamespace(synchronize=lambda: None))
    return Scratch(device, "main"), asked


def test_one_block_of_the_largest_size() -> None:
    block, asked = scratch()
    raws = [Raw() for _ in range(3)]
    contexts = [
        TensorRTContext(str(size), "main", raw, {}, size) for raw, size in zip(raws, (100, 300, 200), strict=True)
    ]
    for context in contexts:
        block.give(context)
    assert asked == [100, 300]
    assert block._device.moves == 1, "contexts moved once: a recording made before is void"
    # All of them end in the block that is there now, each with its own size.
    assert [raw.given[-1] for raw in raws] == [(8192, 100), (8192, 300), (8192, 200)]


def test_dropped_contexts_are_forgotten() -> None:
    block, _ = scratch()
    raw = Raw()
    block.give(TensorRTContext("short-lived", "main", raw, {}, 100))
    gc.collect()
    block.give(TensorRTContext("larger", "main", Raw(), {}, 200))
    assert raw.given == [(4096, 100)]
