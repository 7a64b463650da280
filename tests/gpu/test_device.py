"""Memory, copies, streams and events of CUDA itself."""

from __future__ import annotations

import numpy as np
import pytest

from dash_export.errors import BackendError
from dash_export.runtime.device.cuda import CudaResources

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> CudaResources:
    try:
        return CudaResources()
    except BackendError as error:
        pytest.skip(f"no GPU here: {error}")


def test_memory_begins_at_zero_and_copies_are_exact(device: CudaResources) -> None:
    stream, memory = device.stream("main"), device.memory(4096)
    host, back = device.pinned(4096), device.pinned(4096)
    back[:] = 7
    stream.download(back, memory)
    stream.synchronize()
    assert not back.any()
    host[:] = np.random.default_rng(0).integers(0, 256, 4096)
    stream.upload(memory, host)
    other = device.memory(4096)
    stream.copy(other.part(1024, 2048), memory.part(0, 2048))
    stream.download(back, other)
    stream.synchronize()
    np.testing.assert_array_equal(back[1024:3072], host[:2048])
    assert not back[:1024].any()
    assert not back[3072:].any()


def test_rows_land_at_their_pitch(device: CudaResources) -> None:
    stream, source, target = device.stream("main"), device.memory(3 * 64), device.memory(3 * 256)
    host, back = device.pinned(3 * 64), device.pinned(3 * 256)
    host[:] = np.arange(192)
    stream.upload(source, host)
    stream.copy_rows(target.part(128, 3 * 256 - 128), 256, source, 64, 64, 3)
    stream.download(back, target)
    stream.synchronize()
    np.testing.assert_array_equal(back.reshape(3, 256)[:, 128:192].reshape(-1), host)


def test_events_order_streams(device: CudaResources) -> None:
    """A large copy on one stream, waited for by the other."""
    size = 64 << 20
    one, two, made = device.stream("one"), device.stream("two"), device.event("made")
    source, middle, end = device.pinned(size), device.memory(size), device.memory(size)
    back = device.pinned(size)
    for value in range(1, 6):
        source[:] = value
        one.upload(middle, source)
        one.record(made)
        two.wait(made)
        two.copy(end, middle)
        two.download(back, end)
        two.synchronize()
        assert (back == value).all()


def test_out_of_memory_says_what_is_free(device: CudaResources) -> None:
    with pytest.raises(BackendError, match=r"were asked for and .* MB are free"):
        device.memory(1 << 50)
    device.memory(1024)  # and the device goes on
