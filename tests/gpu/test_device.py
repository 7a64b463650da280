"""Memory, copies, streams and events of CUDA itself."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from dash_export.errors import BackendError
from dash_export.runtime.device.base import Decisions
from dash_export.runtime.device.blocks import Block
from dash_export.runtime.device.cuda import CudaStream
from dash_export.runtime.device.cuda_graph import IF, IF_ELSE, CudaRecording
from dash_export.runtime.device.cuda_resources import CudaResources

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


@pytest.mark.parametrize("other", [False, True], ids=["if-else", "two-ifs"])
def test_a_graph_decides(other: bool, device: CudaResources, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step decides anew at every launch: branches, the kernel's arithmetic, rows at a place that moves."""
    if (obstacle := device.graph_obstacle()) is not None:
        pytest.skip(f"no graphs with decisions here: {obstacle}")
    assert device._graphs is not None
    if other:
        monkeypatch.setattr(device._graphs, "version", IF)
    elif device._graphs.version < IF_ELSE:
        pytest.skip("IF with ELSE needs CUDA 12.8")
    layout = {
        "damage": ((2,), np.float32),
        "limit": ((2,), np.float64),
        "handles": ((2, 2), np.uint64),
        "position": ((1,), np.int64),
        "sources": ((2, 64), np.uint8),
        "rows": ((2, 16), np.uint8),
    }
    given = Block(device, layout)
    taken = Block(device, {"skipped": ((2,), np.bool_), "chosen": ((2, 64), np.uint8)})
    tables, back = device.memory(2 * 8 * 16), device.pinned(2 * 8 * 16)
    given.host["sources"][:] = [[1], [2]]
    given.host["rows"][:] = np.arange(32).reshape(2, 16)
    main, beside = device.stream("main"), device.stream("beside")
    begun, done = device.event("begun"), device.event("done")
    sources = [given.memory["sources"].part(64 * which, 64) for which in range(2)]
    memory = [given.memory["damage"], given.memory["limit"], taken.memory["skipped"], given.memory["handles"]]

    def step(recording: CudaRecording) -> None:
        given.upload(main)
        main.record(begun)
        beside.wait(begun)
        recording.write_rows(beside, tables, 8 * 16, given.memory["rows"], 16, given.memory["position"])
        beside.record(done)
        decided = recording.decide(main, Decisions(*memory, given.host["handles"]))
        for unit in range(2):
            chosen = taken.memory["chosen"].part(64 * unit, 64)
            run, skip = (partial(CudaStream.copy, to=chosen, source=source) for source in sources)
            recording.branch(main, decided[unit], run, skip)
        main.wait(done)
        taken.download(main)
        main.download(back, tables)

    graph = device.record(main, step)
    rng = np.random.default_rng(0)
    tables_expected = np.zeros((2, 8, 16), np.uint8)
    for position in range(8):
        given.host["damage"][:] = rng.random(2)
        given.host["limit"][:] = rng.random(2)
        given.host["position"][:] = position
        graph.launch(main)
        main.synchronize()
        skips = given.host["damage"].astype(np.float64) < given.host["limit"]
        np.testing.assert_array_equal(taken.host["skipped"], skips)
        np.testing.assert_array_equal(taken.host["chosen"], np.where(skips, 2, 1)[:, None].repeat(64, axis=1))
        tables_expected[:, position] = given.host["rows"]
        np.testing.assert_array_equal(back.reshape(2, 8, 16), tables_expected)


def test_out_of_memory_says_what_is_free(device: CudaResources) -> None:
    with pytest.raises(BackendError, match=r"were asked for and .* MB are free"):
        device.memory(1 << 50)
    device.memory(1024)  # and the device goes on
