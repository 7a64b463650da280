"""Costs of units, by a clock that is given."""

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import pytest

from dash_export import DashRuntime
from dash_export.backends.base import Launch
from dash_export.backends.onnxruntime.ort_engine import OrtBackend
from dash_export.building import build, cost_table, pipeline
from dash_export.building.cost_table import measure_cost, measure_passes
from dash_export.building.exporting import export
from dash_export.core.passes import ROWS
from tests.tiny import drafter_only, tiny_checkpoint
from tests.tiny_encoder import encoder_bundle


def test_what_a_unit_costs(tiny_runtime: Callable[..., DashRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes longer and longer. Units 2-3 and 4 are skipped in turn; all else always runs."""
    passes = count()

    def timed(launches: Iterable[Launch]) -> list[float]:
        assert len(list(launches)) == 5
        repeat, parity = divmod(next(passes), 2)
        found = [100.0, 400.0, 200.0, 30.0, 300.0] if parity else [100.0, 400.0, 40.0, 100.0, 300.0]
        return [(1 + repeat / 100) * time for time in found]

    monkeypatch.setattr(cost_table, "_timed", timed)
    runtime = tiny_runtime()
    table = measure_cost(runtime.bundle, runtime.build, OrtBackend(0))
    assert table.cost == pytest.approx((160 / 1100, 70 / 1100), rel=0.02)
    assert set(table.bypass_us) == {"bypass_02-03", "bypass_04-04"}
    assert table.segment_us["layers_02-03"] / table.bypass_us["bypass_02-03"] == pytest.approx(5, rel=0.02)


def test_an_exit_is_no_part_of_what_leaving_there_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment takes 100 us, each exit 10, the guard 20."""
    runtime = DashRuntime.load(encoder_bundle(tmp_path), "portable")
    segments, read = runtime.build.segments, runtime.bundle.manifest.policy.read
    gates = [segment.gated for segment in segments]
    guard = 1 + next(place for place, segment in enumerate(segments) if segment.last + 1 >= read)
    passes = count()

    def timed(launches: Iterable[Launch]) -> list[float]:
        skipped, place = next(passes) % 2, count()
        found = [10.0 if gated and next(place) % 2 == skipped else 100.0 for gated in gates]
        found.insert(guard, 20.0)
        assert len(list(launches)) == len(found)
        return found

    monkeypatch.setattr(cost_table, "_timed", timed)
    table = measure_cost(runtime.bundle, runtime.build, OrtBackend(0))
    dense = 100 * len(gates)
    assert table.exits == pytest.approx([10 / dense] * sum(gates), abs=1e-5)
    assert table.cost == pytest.approx([100 / dense] * sum(gates), abs=1e-5)
    assert table.asks == pytest.approx(20 / dense, abs=1e-5)


def test_what_rows_of_a_pass_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes longer and longer, with a drafter; a context is cut to what the model takes."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    bundle = export(checkpoint, tmp_path / "tiny.dash", drafter_only(checkpoint))
    monkeypatch.setattr(pipeline, "measure_passes", lambda *_: None)
    made, turn = build(bundle, "cpu", weights="fp32"), count()
    monkeypatch.setattr(cost_table, "PASSES", ((40, 3), (4096, 2)))

    def timed(launches: Iterable[Launch]) -> list[float]:
        for launch in launches:
            launch()
        repeat, place = divmod(next(turn), len(ROWS) + 1)
        rows, slower = [*ROWS, 0][place], 1 + 0.5 * (repeat >= 4)
        return [(1 + repeat / 1000) * (100 + slower * 10 * (rows - 1) if rows else 3 * 7)]

    monkeypatch.setattr(cost_table, "_timed", timed)
    found = measure_passes(bundle, made, OrtBackend(0))
    assert found is not None
    assert found.sound
    assert (found.rows, found.contexts) == (ROWS, (40, 512 - 16))
    assert found.times[0] == pytest.approx([1 + 0.1 * (rows - 1) for rows in ROWS], rel=0.01)
    assert found.times[1] == pytest.approx([1 + 0.15 * (rows - 1) for rows in ROWS], rel=0.01)
    assert found.draft == pytest.approx(0.07, rel=0.01)
    assert found.of_rows(40)[1:9] == pytest.approx([1 + 0.1 * rows for rows in range(8)], rel=0.01)
    assert found.of_rows(268)[12] == pytest.approx(1 + 0.125 * 11, rel=0.01)
    assert found.of_rows(0) == found.of_rows(40)
    assert found.of_rows(10_000)[16] == pytest.approx(1 + 0.15 * 15, rel=0.01)
    assert next(turn) == (4 + 3) * (len(ROWS) + 1), "one of each is not counted"


def test_passes_of_an_encoder_are_not_measured(tmp_path: Path) -> None:
    runtime = DashRuntime.load(encoder_bundle(tmp_path), "portable")
    assert measure_passes(runtime.bundle, runtime.build, OrtBackend(0)) is None
    assert runtime.build.cost.passes is None
