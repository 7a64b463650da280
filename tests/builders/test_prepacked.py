"""Packed weights on disk: mapped, shared, and the same answers."""

from __future__ import annotations

import gc
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from dash_export import DashRuntime
from dash_export.builders import build, onnxruntime
from dash_export.builders.prepacked import prepacked_bytes, store_prepacked
from dash_export.bundle import Bundle
from dash_export.errors import BackendError, BundleError
from dash_export.exporting import export
from dash_export.graphs.compose import PREPACKED
from dash_export.graphs.rounded import to_nearest
from dash_export.names import PREFILL
from dash_export.resources import resource_folder
from dash_export.runtime.cpus import saturates_int8
from dash_export.runtime.rules import FixedRule
from dash_export.targets import recipe_from_dict
from tests.tiny import random_ids, tiny_bundle, tiny_checkpoint, tiny_policy

IDS = random_ids(20, seed=5)


def recipe(folder: Path, prepacked: bool, **replaced: str) -> Path:
    """`cpu-shared`, each weight rounded to its nearest, with other values where given."""
    text = (resource_folder("engines") / "cpu-shared.toml").read_text(encoding="utf-8")
    for key, value in {"rounding": "nearest", **replaced}.items():
        text, found = re.subn(rf'^{key} = ".*"', f'{key} = "{value}"', text, flags=re.MULTILINE)
        assert found
    text = text.replace("context = 256", "context = 32").replace("repeats = 60", "repeats = 3")
    path = folder / f"{'shared' if prepacked else 'own'}.toml"
    path.write_text(text.replace("prepacked = true", f"prepacked = {str(prepacked).lower()}"))
    return path


FP32 = dict.fromkeys(("layers", "qkv", "ungated", "head", "embedding", "bypass"), "fp32")


@pytest.fixture(scope="module", params=[{}, FP32], ids=["int4 and int8", "fp32"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with two builds: `shared` with packed weights on disk, and `own` without."""
    folder = tmp_path_factory.mktemp("prepacked")
    bundle = Bundle.open(tiny_bundle(folder, form="linear", hidden_size=128, intermediate_size=512))
    for prepacked in (True, False):
        build(bundle, str(recipe(folder, prepacked, **request.param)), verify=prepacked)
    return bundle


def stored(graph: Path) -> dict[tuple[str, str], str]:
    """(file, offset) of every tensor whose packed weights are on disk -> where they are."""
    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if PREPACKED + "0" in entries:
            found[entries["location"], entries.get("offset", "0")] = entries[PREPACKED + "0"]
    return found


def answers(bundle: Bundle, target: str, skipped: tuple[int, ...] = ()) -> list[np.ndarray]:
    session = DashRuntime.load(bundle.root, target).session()
    session.prefill(IDS[:8])
    return [session.decode_one(int(token), FixedRule(skipped))[0].copy() for token in IDS[8:]]


@pytest.mark.parametrize("skipped", [(), (0,), (0, 1)])
def test_same_answers(built: Bundle, skipped: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(answers(built, "shared", skipped), answers(built, "own", skipped))


def test_engines_with_a_weight_in_common_map_one_packed_form(built: Bundle) -> None:
    record = built.load_build("shared")
    of = {name: stored(built.path(engine.file)) for name, engine in record.engines.items()}
    for segment, unit in (("layers_02-03", "02-03"), ("layer_04", "04-04")):
        assert of[f"mixed_{unit}"] == of[segment] | of[f"bypass_{unit}"] != {}
    assert stored(built.path(built.load_build("own").engines["layers_02-03"].file)) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_that_is_stored_packed_is_mapped(built: Bundle) -> None:
    runtime = DashRuntime.load(built.root, "shared")
    mapped = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        region, _, offset, _, _, *path = line.split(maxsplit=5)
        first, end = (int(part, 16) for part in region.split("-"))
        mapped.setdefault(Path(*path), []).append((int(offset, 16), end - first))
    folder = built.path("engines/shared")
    told = [stored(built.path(engine.file)) for engine in runtime.build.engines.values()]
    for (file, _), entry in (item for engine in told for item in engine.items()):
        offset, length = map(int, entry.split("|")[1].split(";")[:2])
        assert any(
            start <= offset and offset + length <= start + size for start, size in mapped.get(folder / file, [])
        ), (file, entry)
    DashRuntime.load(built.root, "own")
    gc.collect()  # the build maps what mixed engines share
    assert "engines/own/layers_02-03.data\n" not in Path("/proc/self/maps").read_text()


def test_an_engine_s_size_is_of_what_it_reads(built: Bundle) -> None:
    """But for graphs and what pages are filled up with."""
    sizes, expected = (
        {name: engine.bytes for name, engine in built.load_build(target).engines.items()}
        for target in ("shared", "own")
    )
    assert sizes.keys() == expected.keys()
    for name, size in sizes.items():
        assert expected[name] <= size < 1.1 * expected[name] + 20_000, name


def test_packed_again_where_the_cpu_is_another(built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = built.load_build("shared")
    keys = {name: engine.key for name, engine in record.engines.items()}
    loaded = recipe_from_dict(record.recipe, "shared")

    def now() -> dict[str, str]:
        jobs = list(onnxruntime.artifacts(built, loaded, record.segments, tmp_path, to_nearest))
        return {job.name: job.key for job in jobs if job.role == "engine"}

    assert now().items() <= keys.items()
    monkeypatch.setattr(onnxruntime, "cpu_name", lambda: "another")
    assert not now().items() & keys.items()


def test_turned_off_and_on(built: Bundle, tmp_path: Path) -> None:
    own = Bundle.open(Path(shutil.copytree(built.root, tmp_path / "own.dash")))
    recorded = own.load_build("shared").recipe["weights"]
    replaced = {name: recorded[name] for name in FP32}
    expected = answers(own, "shared", (0,))
    engine = own.path("engines/shared/layers_02-03.onnx")
    for prepacked in (False, True):
        path = recipe(tmp_path, prepacked, **replaced).rename(tmp_path / "shared.toml")
        build(own, str(path))
        assert bool(stored(engine)) == prepacked
        np.testing.assert_array_equal(answers(own, "shared", (0,)), expected)


@pytest.mark.skipif(saturates_int8(), reason="sums of int8 products overflow on this CPU")
def test_with_an_engine_for_prompts(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", hidden_size=128, intermediate_size=512)
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint, "linear"))
    for prepacked in (True, False):
        build(bundle, str(recipe(tmp_path, prepacked)), prefill="int8")
    names = ("shared-prefill-int8", "own-prefill-int8")
    np.testing.assert_array_equal(*(answers(bundle, name, (1,)) for name in names))
    record = bundle.load_build(names[0])
    assert stored(bundle.path(record.engines[PREFILL].file))
    for name, engine in bundle.load_build(names[1]).engines.items():
        assert engine.bytes <= record.engines[name].bytes < 1.1 * engine.bytes + 20_000, name


def test_what_onnx_runtime_refuses(tmp_path: Path) -> None:
    (tmp_path / "layer.onnx").write_bytes(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [onnx.helper.make_node("Nothing", ["x"], ["y"])],
                "layer",
                [onnx.helper.make_tensor_value_info("x", 1, [1])],
                [onnx.helper.make_tensor_value_info("y", 1, [1])],
            )
        ).SerializeToString()
    )
    (tmp_path / "layer.data").write_bytes(b"")
    with pytest.raises(BackendError, match=r"does not pack layer\.onnx"):
        store_prepacked([tmp_path / "layer.onnx", tmp_path / "layer.data"], tmp_path)


def test_a_graph_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "layer.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(BundleError, match="is damaged"):
        prepacked_bytes(tmp_path / "layer.onnx")
