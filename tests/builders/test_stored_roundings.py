"""Calibrated int4 on GPU targets: what the graphs hold, that it is kept, and that a build kit brings it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from dash_export.builders import build, building
from dash_export.builders.building import roundings_of
from dash_export.builders.kit import write_kit
from dash_export.builders.stored_roundings import FILE, stored_roundings
from dash_export.bundle import Bundle
from dash_export.errors import BackendError, BundleError
from dash_export.exporting import export
from dash_export.graphs.rounded import Rounded
from dash_export.models import open_checkpoint
from dash_export.resources import resource_folder
from dash_export.targets import load_recipe
from tests.builders.test_kit import run
from tests.tiny import save_model, tiny_checkpoint, tiny_policy

UNIT, DOWN = "layers_02-03", "layer_03/mlp/down_proj"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`cuda`, which every machine lowers for, all int4: 96 inputs take blocks of 32."""
    text = (resource_folder("engines") / "cuda.toml").read_text(encoding="utf-8")
    for part in ("layers", "qkv", "ungated", "head"):
        text = text.replace(f'{part} = "fp16"', f'{part} = "int4"')
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, target: str) -> Bundle:
    root = tmp_path_factory.mktemp("roundings")
    checkpoint = tiny_checkpoint(root / "model")
    made = export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint, "linear"))
    build(made, target, verify=True)
    build(made, target, rounding="nearest", verify=True)
    return made


def matrix(bundle: Bundle, build_name: str, engine: str, node: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a matrix in a lowered graph."""
    model = onnx.load(bundle.path(bundle.load_build(build_name).engines[engine].file))
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    (found,) = (item for item in model.graph.node if item.name == f"{node}/weight")
    values, scales = (arrays[name] for name in found.input)
    return values.astype(np.float32), scales


def test_graphs_hold_what_was_calibrated(bundle: Bundle) -> None:
    rounded = stored_roundings(bundle.path("engines/small"))
    for engine, node in (
        (UNIT, DOWN),
        (UNIT, "layer_03/attention/v_proj"),
        (bundle.load_build("small").segments[-1].name, "head/logits"),
    ):
        expected = rounded(node)
        assert expected is not None
        values, scales = matrix(bundle, "small", engine, node)
        np.testing.assert_array_equal(values, expected.codes.astype(np.float32) - 8)
        np.testing.assert_array_equal(scales, expected.scales.astype(scales.dtype))
        assert expected.block == (32 if node == DOWN else 64)
    assert not np.array_equal(matrix(bundle, "small", UNIT, DOWN)[0], matrix(bundle, "small-nearest", UNIT, DOWN)[0])
    assert rounded("layer_03/input_layernorm") is None
    assert stored_roundings(bundle.path("engines/small-nearest"))(DOWN) is None


def test_what_is_kept_is_what_was_calibrated(bundle: Bundle, target: str, tmp_path: Path) -> None:
    kept = stored_roundings(bundle.path("engines/small"))
    with roundings_of(bundle, load_recipe(target), tmp_path, lambda *_: None) as roundings:
        for node in (DOWN, "layer_00/attention/q_proj", "head/logits"):
            one, other = roundings(node), kept(node)
            assert one is not None
            assert other is not None
            np.testing.assert_array_equal(one.codes, other.codes)
            np.testing.assert_array_equal(one.scales, other.scales)
            np.testing.assert_array_equal(one.zeros, other.zeros)
            assert one.block == other.block


def refuse(_package: str, _node: str) -> Rounded | None:
    raise AssertionError("calibrated again")


def test_an_engine_made_again_asks_nobody(
    bundle: Bundle, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    monkeypatch.setattr(building, "find_spec", lambda _name: None)
    monkeypatch.setattr(building, "_not_here", refuse)
    file = own.path(own.load_build("small").engines[UNIT].file)
    file.unlink()
    build(own, target)
    np.testing.assert_array_equal(*(matrix(made, "small", UNIT, DOWN)[0] for made in (own, bundle)))


def test_engines_follow_what_they_are_made_of(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    assert all(FILE not in record.name for record in own.load_build("small").files), "nobody loads it"
    files = [own.path(engine.file) for engine in own.load_build("small").engines.values()]
    before = [path.stat().st_mtime_ns for path in files]
    own.path(f"engines/small/{FILE}").unlink()
    build(own, target)
    assert not set(before) & {path.stat().st_mtime_ns for path in files}


def test_without_onnx_runtime(bundle: Bundle, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    shutil.rmtree(own.path("engines/small"))
    monkeypatch.setattr(building, "find_spec", lambda _name: None)
    with pytest.raises(BackendError, match=r"onnxruntime is not installed here.*or build from a kit"):
        build(own, target)
    build(own, target, rounding="nearest")


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_file(content: bytes | None, bundle: Bundle, tmp_path: Path) -> None:
    whole = bundle.path(f"engines/small/{FILE}").read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match=r"is damaged .* Delete it and build again"):
        stored_roundings(tmp_path)(DOWN)


def test_a_file_that_fills_the_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / FILE, **{f"{DOWN}.codes": np.zeros(1 << 20, np.uint8), "key": np.array("x")})
    with pytest.raises(BundleError, match="is compressed"):
        stored_roundings(tmp_path)(DOWN)


def test_a_kit_brings_it(bundle: Bundle, target: str, tmp_path: Path) -> None:
    kit = write_kit(bundle, target, [], "as a test", tmp_path / "kit")
    engines = kit / bundle.root.name / "engines" / "small"
    assert (engines / FILE).read_bytes() == bundle.path(f"engines/small/{FILE}").read_bytes()
    record = json.loads((kit / "kit.json").read_text())
    assert f"{bundle.root.name}/engines/small/{FILE}" in {item["name"] for item in record["files"]}
    assert record["verification"] == bundle.load_build("small").details["verification"]
    done = run(kit)
    assert done.returncode == 0, done.stdout + done.stderr
    own = Bundle.open(kit / bundle.root.name)
    assert "rounding layer" not in done.stdout
    np.testing.assert_array_equal(*(matrix(made, "small", UNIT, DOWN)[0] for made in (own, bundle)))
    assert run(kit, "--check").returncode == 0, "what the build wrote is no damage"


def test_a_kit_takes_what_is_there(
    bundle: Bundle, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "find_spec", lambda _name: None)
    monkeypatch.setattr(building, "_not_here", refuse)
    kit = write_kit(bundle, target, [], "as a test", tmp_path / "kit")
    assert (kit / bundle.root.name / "engines" / "small" / FILE).is_file()
    elsewhere = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    elsewhere.path(f"engines/small/{FILE}").unlink()
    with pytest.raises(AssertionError, match="calibrated again"):
        write_kit(elsewhere, target, [], "as a test", tmp_path / "other")


def test_verified_against_what_is_built(bundle: Bundle) -> None:
    errors = bundle.load_build("small").details["verification"]["engines"][UNIT]
    nearest = bundle.load_build("small-nearest").details["verification"]["engines"][UNIT]
    assert errors["hidden_out"] != nearest["hidden_out"]


def test_another_head_is_calibrated_anew(bundle: Bundle, target: str, tmp_path: Path) -> None:
    """Alone: layers do not depend on it."""
    checkpoint = open_checkpoint(bundle.root.parent / "model")
    own = Path(shutil.copytree(bundle.root, tmp_path / "own.dash"))
    save_model(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"] = -weights["lm_head.weight"][::-1].copy()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    changed = export(open_checkpoint(tmp_path / "model"), own, tiny_policy(checkpoint, "linear"))
    build(changed, target)
    head, layer = (stored_roundings(changed.path("engines/small"))(node) for node in ("head/logits", DOWN))
    old_head, old_layer = (stored_roundings(bundle.path("engines/small"))(node) for node in ("head/logits", DOWN))
    assert head is not None
    assert old_head is not None
    assert not np.array_equal(head.codes, old_head.codes)
    assert layer is not None
    assert old_layer is not None
    np.testing.assert_array_equal(layer.codes, old_layer.codes)


def test_to_nearest_under_the_same_name(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    path = tmp_path / "small.toml"
    path.write_text(
        Path(target).read_text().replace('"gptq"', '"nearest"').replace("block_size = 128", "block_size = 16")
    )
    build(own, str(path))
    assert matrix(own, "small", UNIT, DOWN)[1].shape[0] == 96 // 16
    assert not own.path(f"engines/small/{FILE}").exists()


def test_a_matrix_that_no_block_divides(target: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", intermediate_size=104)
    odd = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint))
    build(odd, target, verify=True)
    rounded = stored_roundings(odd.path("engines/small"))
    assert rounded(DOWN) is None
    assert rounded("layer_03/mlp/up_proj") is not None


def test_in_bfloat16(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    path = tmp_path / "wide.toml"
    path.write_text(Path(target).read_text().replace('"fp16"', '"bf16"').replace('"7.5", ', ""))
    made = build(own, str(path), verify=True)
    assert "bf16 is not there" in made.details["verification"]["compared"]


def test_what_is_not_of_this_matrix(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    path = own.path(f"engines/small/{FILE}")
    with np.load(path) as arrays:
        changed = dict(arrays)
    for name in (f"{DOWN}.codes", f"{DOWN}.scales"):
        changed[name] = changed[name][:, :-1]
    np.savez(path, **changed)
    own.path("engines/small/build.json").unlink()
    with pytest.raises(BundleError, match="not of this matrix"):
        build(own, target)


def test_nothing_is_calibrated_where_nothing_is_int4(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))
    build(own, target, weights="int8")
    assert not own.path(f"engines/small-int8/{FILE}").exists()
