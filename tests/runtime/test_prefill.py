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
from dash_export.bundle import Bundle
from dash_export.errors import BackendError
from dash_export.runtime import engine_set
from dash_export.runtime.cpus import saturates_int8
from dash_export.runtime.engine_set import FEWEST_TOKENS
from dash_export.targets import load_recipe, with_weights
from tests.tiny import random_ids, tiny_bundle

LENGTH = 40
pytestmark = pytest.mark.skipif(saturates_int8(), reason="on this processor sums of int8 products overflow")


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory: pytest.TempPathFactory) -> tuple[DashRuntime, DashRuntime]:
    """(as it was, with prompts in int8)"""
    root = tiny_bundle(tmp_path_factory.mktemp("prefill"), "cpu", form="linear")
    made = build(root, "cpu", weights="fp32", prefill="int8")
    assert made.target == "cpu-fp32-prefill-int8"
    return DashRuntime.load(root, "cpu-fp32"), DashRuntime.load(root, made.target)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_not_built_where_sums_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_weights(load_recipe("cpu"), prefill="int8")
    require_builder(recipe)
    monkeypatch.setattr(here, "saturates_int8", lambda: True)
    with pytest.raises(BackendError, match="--prefill same"):
        require_builder(recipe)


def test_not_used_where_sums_overflow(
    runtimes: tuple[DashRuntime, DashRuntime], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Built elsewhere: the layers' engines are there all the same."""
    exact, fast = runtimes
    monkeypatch.setattr(engine_set, "saturates_int8", lambda: True)
    moved = DashRuntime.load(fast.bundle.root, fast.build.target)
    assert "sums of int8 products overflow" in caplog.text
    ids = random_ids(LENGTH)
    np.testing.assert_array_equal(moved.session().prefill(ids), exact.session().prefill(ids))


def test_what_is_in_it(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    _, fast = runtimes
    path = fast.bundle.path(fast.build.engines["prefill"].file)
    found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    # Q/K/V, output and gate/up of six layers in integers; down in blocks; the head as the recipe has it.
    assert (found["DynamicQuantizeMatMul"], found["MatMulNBits"], found["MatMul"]) == (18, 6, 1)
    assert set(fast.build.engines) - {"prefill"} == set(runtimes[0].build.engines)


def test_the_default_recipe(tmp_path: Path) -> None:
    """int4, GPTQ, a quantised head and embedding."""
    root = tiny_bundle(tmp_path, "cpu", form="linear")
    made = build(root, "cpu", prefill="int8", verify=True)
    path = Bundle.open(root).path(made.engines["prefill"].file)
    found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    assert (found["DynamicQuantizeMatMul"], found["MatMulNBits"], found["GatherBlockQuantized"]) == (18, 7, 1)
    assert "prefill" not in build(root, "cpu").engines
    exact, coarse, fast = (
        log_softmax(DashRuntime.load(root, name).session().prefill(random_ids(LENGTH)))
        for name in ("cpu-fp32", "cpu", made.target)
    )
    lost = [(np.exp(exact) * (exact - other)).sum() for other in (coarse, fast)]
    assert 0 < lost[1] < lost[0], "int8 loses less than int4"


def test_switching_it_on_makes_nothing_else_anew(tmp_path: Path) -> None:
    """In a recipe of one's own."""
    bundle = Bundle.open(tiny_bundle(tmp_path))
    own = tmp_path / "own.toml"
    builds = []
    for prefill in ("same", "int8"):
        own.write_text(f"[weights]\nprefill = '{prefill}'\nlayers = 'int8'\nhead = 'int8'\n")
        made = build(bundle, str(own))
        builds.append((made, bundle.path(made.engines["layer_04"].file).stat().st_mtime_ns))
    (without, before), (with_it, after) = builds
    assert before == after
    assert set(with_it.engines) - set(without.engines) == {"prefill"}


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
    for first in (1, LENGTH):
        session = runtimes[1].session()
        session.prefill(ids[:first])
        for start in range(first, len(ids), LENGTH):
            fast = log_softmax(session.prefill(ids[start : start + LENGTH]))
        assert (np.exp(exact) * (exact - fast)).sum() < 0.02
        assert session.tokens == ids.tolist()


def test_a_prompt_of_several_passes(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    """The last one too short."""
    ids = random_ids(2 + 2 * LENGTH + FEWEST_TOKENS - 1)
    exact = log_softmax(runtimes[0].session().prefill(ids))
    session = runtimes[1].session()
    session.prefill_chunk = LENGTH
    fast = log_softmax(session.prefill(ids))
    assert (np.exp(exact) * (exact - fast)).sum() < 0.02
    assert session.tokens == ids.tolist()


def test_several_sequences_together(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    prompts = [random_ids(LENGTH, seed=seed).tolist() for seed in (1, 2, 1)]
    first, _, again = runtimes[1].generate_batch(prompts, 8, size=2)
    for other in (again, runtimes[1].generate(prompts[0], 8)):
        np.testing.assert_array_equal(first.tokens, other.tokens)


def test_scores_are_the_layers_engines(runtimes: tuple[DashRuntime, DashRuntime]) -> None:
    ids = random_ids(LENGTH)
    np.testing.assert_array_equal(*(runtime.score(ids).log_likelihoods for runtime in runtimes))
