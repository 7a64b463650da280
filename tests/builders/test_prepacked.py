"""Packed weights on disk: mapped, shared, and the same answers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from dash_export import DashRuntime
from dash_export.builders import build
from dash_export.bundle import Bundle
from dash_export.graphs.compose import PREPACKED
from dash_export.resources import resource_folder
from dash_export.runtime.rules import FixedRule
from tests.tiny import random_ids, stretched_bundle

IDS = random_ids(20, seed=5)


def recipe(folder: Path, weights: str, prepacked: bool) -> Path:
    """`cpu-shared` at these weights, each rounded to its nearest."""
    text = (resource_folder("engines") / "cpu-shared.toml").read_text(encoding="utf-8")
    for precision in ("int4", "int8"):
        text = text.replace(f'"{precision}"', f'"{weights}"')
    text = text.replace('"gptq"', '"nearest"').replace("prepacked = true", f"prepacked = {str(prepacked).lower()}")
    path = folder / f"{weights}-{'shared' if prepacked else 'own'}.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module", params=["fp32", "int4"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str, str]:
    """A bundle, its build with packed weights on disk, and its like without."""
    folder = tmp_path_factory.mktemp("prepacked")
    bundle = Bundle.open(stretched_bundle(folder, hidden_size=128, intermediate_size=512))
    paths = [recipe(folder, request.param, prepacked) for prepacked in (True, False)]
    for path in paths:
        build(bundle, str(path))
    return bundle, paths[0].stem, paths[1].stem


def stored(graph: Path) -> dict[tuple[str, str], str]:
    """(file, offset) of every tensor whose packed weights are on disk -> where they are."""
    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if PREPACKED + "0" in entries:
            found[entries["location"], entries.get("offset", "0")] = entries[PREPACKED + "0"]
    return found


@pytest.mark.parametrize("skipped", [(), (3, 4, 5, 9)])
def test_same_answers(built: tuple[Bundle, str, str], skipped: tuple[int, ...]) -> None:
    bundle, shared, own = built
    answers = []
    for target in (shared, own):
        session = DashRuntime.load(bundle.root, target).session()
        session.prefill(IDS[:8])
        answers.append([session.decode_one(int(token), FixedRule(skipped))[0].copy() for token in IDS[8:]])
    np.testing.assert_array_equal(*answers)


def test_engines_with_a_weight_in_common_map_one_packed_form(built: tuple[Bundle, str, str]) -> None:
    bundle, shared, own = built
    record = bundle.load_build(shared)
    of = {name: stored(bundle.path(engine.file)) for name, engine in record.engines.items()}
    for stretch in record.stretches:
        parts = [of[f"{'skip' if stretch.skips else 'layer'}_{layer:02d}"] for layer in stretch.layers]
        assert of[stretch.name] == {place: told for part in parts for place, told in part.items()}
        assert stretch.skips or of[stretch.name]
    for segment in record.segments:
        if f"{segment.name}.policy" in of:
            assert of[f"{segment.name}.policy"].items() >= of[segment.name].items() != set()
    assert stored(bundle.path(bundle.load_build(own).engines["layer_02"].file)) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_runs_is_mapped(built: tuple[Bundle, str, str]) -> None:
    bundle, shared, own = built
    mapped = []
    for target in (shared, own):
        runtime = DashRuntime.load(bundle.root, target)
        mapped.append(f"engines/{target}/layer_03.data\n" in Path("/proc/self/maps").read_text())
        del runtime
    assert mapped == [True, False]


def test_an_engine_s_size_is_of_what_it_reads(built: tuple[Bundle, str, str]) -> None:
    bundle, shared, own = built
    sizes, expected = (
        {name: engine.bytes for name, engine in bundle.load_build(target).engines.items()} for target in (shared, own)
    )
    assert sizes.keys() == expected.keys()
    for name, size in sizes.items():
        assert expected[name] <= size < 1.2 * expected[name] + 20_000, name


def test_is_built_again_only_where_something_changed(built: tuple[Bundle, str, str], tmp_path: Path) -> None:
    bundle, shared, _ = built
    files = {path: path.stat().st_mtime_ns for path in bundle.path(f"engines/{shared}").iterdir()}
    weights = shared.partition("-")[0]
    build(bundle, str(recipe(tmp_path, weights, True)))
    assert {path: path.stat().st_mtime_ns for path in files if "journal" not in path.name} == {
        path: time for path, time in files.items() if "journal" not in path.name
    }
