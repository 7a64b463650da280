"""Memory, copies, streams, events and graphs: on the stand-in that other tests run on, and on a card."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest

from dash_export.backends.cuda.cuda import BESIDE, MAIN, Cuda, Mirror
from dash_export.core.sampling import Draw, Sampler, Sampling
from dash_export.errors import BackendError
from tests.backends.cuda.conftest import SAMPLED
from tests.standin import installed
from tests.standin.cuda import Card


@pytest.fixture(params=["stand-in", pytest.param("card", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    with installed(Card(0)) if request.param == "stand-in" else nullcontext():
        try:
            yield Cuda()
        except BackendError as error:
            pytest.skip(f"no GPU here: {error}")


def test_memory_begins_at_zero_and_copies_are_exact(device: Cuda) -> None:
    """Whole, from a place on, and rows at their pitch, over an event that orders two streams."""
    source, target = Mirror(device, (192,), np.uint8), Mirror(device, (3, 256), np.uint8)
    source.host[:], target.host[:] = np.arange(192), 7
    device.copy(BESIDE, source.memory, source.host)
    device.record(BESIDE, "made")
    device.wait(MAIN, "made")
    device.copy_rows(MAIN, target.memory.part(128), 256, source.memory, 64, 64, 3)
    device.copy(MAIN, target.host, target.memory)
    device.synchronize(MAIN)
    np.testing.assert_array_equal(target.host[:, 128:192].reshape(-1), source.host)
    assert not target.host[:, :128].any()
    assert not target.host[:, 192:].any()


def test_a_graph_decides(device: Cuda) -> None:
    """A recorded step decides anew at every launch: branches, the kernel's arithmetic, rows at a place that moves."""
    damage, limits = Mirror(device, (2,), np.float32), Mirror(device, (2,), np.float64)
    skipped, chosen = Mirror(device, (2,), np.bool_), Mirror(device, (2, 64), np.uint8)
    half = [Mirror(device, (64,), np.uint8) for _ in range(2)]
    for value, each in enumerate(half):
        each.host[:] = value + 1
        device.copy(MAIN, each.memory, each.host)

    def step(graph: Any) -> None:
        for each in (damage, limits):
            device.copy(MAIN, each.memory, each.host)
        graph.decide(MAIN, damage.memory, limits.memory, skipped.memory)
        for unit in range(2):
            to = chosen.memory.part(64 * unit)
            run, skip = (partial(device.copy, to=to, source=each.memory) for each in half)
            graph.branch(MAIN, unit, run, skip)
        for each in (skipped, chosen):
            device.copy(MAIN, each.host, each.memory)

    try:
        graph = device.graph(MAIN, 2, step)
    except BackendError as error:
        pytest.skip(f"no graphs with decisions here: {error}")
    rng = np.random.default_rng(0)
    for place in range(8):
        damage.host[:], limits.host[:] = rng.random(2), rng.random(2)
        limits.host[place % 3 :] = damage.host[place % 3 :]  # equal is not below; nor is 0, of a dense token
        graph.launch(MAIN)
        device.synchronize(MAIN)
        skips = damage.host.astype(np.float64) < limits.host
        np.testing.assert_array_equal(skipped.host, skips)
        np.testing.assert_array_equal(chosen.host, np.where(skips, 2, 1)[:, None].repeat(64, axis=1))


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (3, 1), (1, 5)])
@pytest.mark.parametrize("recorded", [False, True])
def test_new_rows_go_to_their_tokens(recorded: bool, sequences: int, tokens: int, device: Cuda) -> None:
    """Of two layers' K and V, with two heads, at once; to positions that are read when the kernel runs."""
    pairs, heads, width, capacity = 4, 2, 24, 9
    new = Mirror(device, (pairs, sequences, heads, tokens, width), np.uint8)
    caches = Mirror(device, (pairs, sequences, heads, capacity, width), np.uint8)
    position, table = Mirror(device, (sequences, tokens), np.int64), Mirror(device, (pairs, 2), np.uint64)
    sizes = [each.memory.nbytes // pairs for each in (caches, new)]
    memories = [(caches.memory.part(pair * sizes[0]), new.memory.part(pair * sizes[1])) for pair in range(pairs)]
    table.host[:] = [[each.address for each in pair] for pair in memories]
    device.copy(MAIN, table.memory, table.host)
    numbers = [(tokens, ctypes.c_int), (width // 2, ctypes.c_longlong), (capacity * width // 2, ctypes.c_longlong)]

    def write(_: Any = None) -> None:
        for each in (new, position):
            device.copy(MAIN, each.memory, each.host)
        blocks = (sequences * tokens, pairs, heads)
        device.kernel("write_rows", MAIN, blocks, 64, (table.memory, position.memory), numbers)
        device.copy(MAIN, caches.host, caches.memory)

    launch = partial(device.graph(MAIN, 0, write).launch, MAIN) if recorded else write
    rng, expected = np.random.default_rng(0), np.zeros(caches.host.shape, np.uint8)
    for place in range(4):
        new.host[:] = rng.integers(0, 255, new.host.shape)
        position.host[:] = place + np.arange(sequences)[:, None] + np.arange(tokens)
        for sequence, places in enumerate(position.host):
            expected[:, sequence][:, :, places] = new.host[:, sequence]
        launch()
        device.synchronize(MAIN)
        np.testing.assert_array_equal(caches.host, expected)


def test_a_token_follows_the_likeliest(device: Cuda) -> None:
    """Which is numpy's: of equals the first, and -0 equals 0."""
    rng = np.random.default_rng(0)
    logits, draws, ids, positions = following(device, 4, 700)
    rows = logits.host
    rows[:] = np.round(rng.normal(size=rows.shape), 1)
    rows[1] = -np.abs(rows[1]) - 1
    rows[2] = np.where(rng.random(700) < 0.5, -0.0, 0.0)
    rows[3, 13] = np.inf
    positions.host[:] = 3, 1, 4, 1
    memories = [each.memory for each in (logits, draws, ids, positions)]
    for each in (logits, draws, positions):
        device.copy(MAIN, each.memory, each.host)
    graph = device.graph(MAIN, 0, lambda graph: graph.follow(MAIN, *memories))
    for _ in range(2):  # what it sums up in is as it was
        graph.launch(MAIN)
    for each in (ids, positions):
        device.copy(MAIN, each.host, each.memory)
    device.synchronize(MAIN)
    assert ids.host.tolist() == rows.argmax(-1).tolist()
    assert positions.host.tolist() == [5, 3, 6, 3]


@pytest.mark.parametrize("vocab", [40, 1300])
@pytest.mark.parametrize("sampling", SAMPLED, ids=str)
def test_a_token_is_drawn_as_the_host_draws_it(sampling: Sampling, vocab: int, device: Cuda) -> None:
    """In one of two sequences, again and again: nothing is left of the draw before. Bins are coarse: seldom another."""
    logits, draws, ids, positions = following(device, 2, vocab)
    memories = [each.memory for each in (logits, draws, ids, positions)]
    graph = device.graph(MAIN, 0, lambda graph: graph.follow(MAIN, *memories))
    rng, samplers, same, rounds = np.random.default_rng(0), [Sampler(sampling), Sampler(Sampling())], 0, 12
    for _ in range(rounds):
        logits.host[:] = rng.normal(size=(2, vocab)) * 4
        draws.host[:] = [sampler.draw for sampler in samplers]
        for each in (logits, draws):
            device.copy(MAIN, each.memory, each.host)
        graph.launch(MAIN)
        device.copy(MAIN, ids.host, ids.memory)
        device.synchronize(MAIN)
        drawn = [sampler(row, ()) for sampler, row in zip(samplers, logits.host, strict=True)]
        assert ids.host[1] == drawn[1], "the likeliest"
        same += int(ids.host[0] == drawn[0])
    assert same >= rounds - 1


def following(device: Cuda, sequences: int, vocab: int) -> list[Mirror]:
    """What `CudaGraph.follow` reads and writes: logits, draws, ids and positions."""
    shapes: list[tuple[tuple[int, ...], str]] = [((sequences, vocab), "f4"), ((sequences, len(Draw._fields)), "f8")]
    return [Mirror(device, *each) for each in (*shapes, ((sequences,), "i8"), ((sequences,), "i8"))]


def test_out_of_memory_says_what_is_free(device: Cuda) -> None:
    with pytest.raises(BackendError, match=r"were asked for and .* MB are free"):
        device.memory(1 << 50)
    device.memory(1024)  # and the device goes on
