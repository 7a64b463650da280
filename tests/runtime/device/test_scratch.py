"""Contexts of one stream share one block of scratch memory, which grows; those that are dropped are forgotten."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dash_export.runtime.device.cuda import CudaMemory
from dash_export.runtime.device.tensorrt import Scratch, TensorRTContext, TensorRTEngine


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


def test_a_dropped_context_is_bound_anew() -> None:
    """Making one takes TensorRT milliseconds, and every length of prompt wants its own binding."""
    made: list[Any] = []

    class Context(Raw):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: dict[str, tuple[int, ...]] = {}
            made.append(self)

        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            return (profile, stream) == (1, 7)

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            return name == "hidden" and address > 0

    block, _ = scratch()
    strategies = SimpleNamespace(USER_MANAGED=2)
    device = cast("Any", block._device)
    device.trt = SimpleNamespace(ExecutionContextAllocationStrategy=strategies)
    device.stream = lambda _: SimpleNamespace(handle=7, synchronize=lambda: None)
    engine = TensorRTEngine(device, Path("layer_05.engine"), block)
    engine._engine = SimpleNamespace(
        create_execution_context=lambda _: Context(), get_device_memory_size_for_profile_v2=lambda _: 100
    )
    memory = {"hidden": CudaMemory(4096, 64)}
    first, second = (engine.context(1, {"hidden": (1, length, 8)}, memory) for length in (5, 6))
    assert len(made) == 2
    assert first is not second
    del first
    gc.collect()
    third = engine.context(1, {"hidden": (1, 9, 8)}, memory)
    assert len(made) == 2
    assert third._context is made[0]
    assert made[0].shapes["hidden"] == (1, 9, 8)
    engine.context(1, {"hidden": (1, 3, 8)}, memory)
    assert len(made) == 3, "two are in use"


def test_dropped_contexts_are_forgotten() -> None:
    block, _ = scratch()
    raw = Raw()
    block.give(TensorRTContext("short-lived", "main", raw, {}, 100))
    gc.collect()
    block.give(TensorRTContext("larger", "main", Raw(), {}, 200))
    assert raw.given == [(4096, 100)]
