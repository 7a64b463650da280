"""The engine for prompts: whole numbers instead of fp32, everywhere but where it must not be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from dash_export import DashRuntime, build
from dash_export.builders import here
from dash_export.builders.here import require_builder
from dash_export.errors import BackendError
from dash_export.runtime.cpus import saturates_int8
from dash_export.runtime.dispatch import FEWEST_TOKENS
from dash_export.targets import load_recipe, with_weights
from tests.tiny import random_ids, tiny_bundle

LENGTH = 40


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory: pytest.TempPathFactory) -> tuple[DashRuntime, DashRuntime]:
    """(as it was, with prompts in int8)"""
    root = tiny_bundle(tmp_path_factory.mktemp("prefill"), "cpu", kind="low_rank")
    made = build(root, "cpu", weights="fp32", prefill="int8")
    assert made.target == "cpu-fp32-prefill-int8"
    return DashRuntime.load(root, "cpu-fp32"), DashRuntime.load(root, made.target)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.parametrize(
    ("told", "overflows"),
    [
        ("flags\t\t: fpu avx2 avx512f\n", True),
        ("processor: 0\nflags\t: fpu avx512_vnni sse\n", False),
        ("flags\t: avx_vnni\n", False),
        ("Features\t: asimd asimddp\n", False),
    ],
)
def test_not_where_sums_overflow(told: str, overflows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """x86 without VNNI."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert saturates_int8() == overflows
    monkeypatch.undo()
    monkeypatch.setattr(here, "saturates_int8", lambda: overflows)
    recipe = with_weights(load_recipe("cpu"), None, None, None, None, "int8")
    if overflows:
        with pytest.raises(BackendError, match="--prefill same"):
            require_builder(recipe)
    else:
        require_builder(recipe)


def test_what_is_in_it(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    _, fast = runtimes
    path = fast.bundle.path(fast.build.engines["prefill"].file)
    found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    # Q/K/V, output and gate/up of six layers in integers; down in blocks; the head as the recipe has it.
    assert (found["DynamicQuantizeMatMul"], found["MatMulNBits"], found["MatMul"]) == (18, 6, 1)
    assert set(fast.build.engines) - {"prefill"} == set(runtimes[0].build.engines)


@pytest.mark.parametrize("count", [FEWEST_TOKENS + 2, LENGTH])
def test_a_prompt_is_nearly_what_it_was(count: int, runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    ids = random_ids(count)
    exact, fast = (log_softmax(runtime.session().prefill(ids)) for runtime in runtimes)
    assert not np.array_equal(exact, fast)
    assert (np.exp(exact) * (exact - fast)).sum() < 0.02


def test_the_first_positions_are_what_they_were(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    """Elsewhere an activation there is a hundred times any other, and the scale of all."""
    sessions = [runtime.session() for runtime in runtimes]
    for session in sessions:
        session.prefill(random_ids(LENGTH))
    exact, fast = (session.fork()._cache.keys[:, 0, :, :LENGTH] for session in sessions)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(exact[:, :, :2], fast[:, :, :2])
    # The first layer's keys are one product away from the embedding, the last one's many.
    assert (exact[:, :, 2:] != fast[:, :, 2:]).any(axis=(1, 2, 3)).all()
    np.testing.assert_allclose(exact, fast, atol=0.1 * np.abs(exact).max())


def test_short_prompts_and_decode_are_what_they_were(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    ids = random_ids(FEWEST_TOKENS + 1)  # all but the first two are too few
    np.testing.assert_array_equal(*(runtime.session().prefill(ids) for runtime in runtimes))
    first, second = (runtime.session("token", skipped=1.5).generate(ids, 20).tokens for runtime in runtimes)
    np.testing.assert_array_equal(first, second)


def test_a_conversation_goes_on(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    """In pieces, each of which goes through it."""
    ids = random_ids(3 * LENGTH)
    exact = log_softmax(runtimes[0].session().prefill(ids))
    session = runtimes[1].session()
    for start in range(0, len(ids), LENGTH):
        fast = log_softmax(session.prefill(ids[start : start + LENGTH]))
    assert (np.exp(exact) * (exact - fast)).sum() < 0.02
    assert session.tokens == ids.tolist()


def test_who_asks_about_the_prompt_reads_it_layer_by_layer(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    ids = random_ids(LENGTH)
    sessions = [runtime.session("sequence", skipped=2) for runtime in runtimes]
    np.testing.assert_array_equal(*(session.prefill(ids) for session in sessions))
    np.testing.assert_array_equal(*(session.decode_one(3)[1] for session in sessions))
