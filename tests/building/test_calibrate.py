"""Calibrated int4: GPTQ against rounding to nearest, what engines hold, and that it is kept."""

import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from dash_export.building import build, calibrate
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import ROUNDINGS as FILE
from dash_export.bundle.recipe import load_recipe, with_weights
from dash_export.core.policy import narrowed
from dash_export.errors import BackendError, BundleError
from dash_export.files.artifacts import ArtifactStore, no_progress
from dash_export.files.resources import resource_folder
from dash_export.graphs.lower.grid import grid_from, packed
from dash_export.graphs.lower.rounded import Rounded, roundings_lookup, write_roundings
from dash_export.models import Checkpoint, open_checkpoint
from tests.tiny import save_model, tiny_bundle, tiny_policy

UNIT, DOWN = "layers_02-03", "layer_03/mlp/down_proj"


def test_a_matrix_too_large_to_invert(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the work. `down_proj` is the widest."""
    monkeypatch.setattr(calibrate, "available_memory", lambda: 40 * 96**2 - 1)
    ways = r"keep the 4 bits of a GGUF file \(--target cpu-gguf\), or round to the nearest \(--rounding nearest\)"
    with pytest.raises(BackendError, match=rf"96 inputs takes 0\.0 GB of memory, and 0\.0 GB are free: {ways}"):
        next(
            calibrate.calibrate_matrices(
                Bundle.open(tiny_root), load_recipe("cpu"), ArtifactStore(tmp_path), "", no_progress
            )
        )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """An odd number of inputs and a short last block."""
    rng = np.random.default_rng(0)
    codes, zeros = (rng.integers(0, 16, (rows, 5)).astype(np.uint8) for rows in (71, 3))
    one = Rounded(codes, rng.random((3, 5), np.float32), zeros, 32)
    write_roundings(tmp_path / FILE, "key", [("a", one)])
    other = roundings_lookup(tmp_path / FILE)("a")
    assert other is not None
    np.testing.assert_array_equal(one.dequantized(), other.dequantized())
    assert other.block == 32
    write_roundings(tmp_path / FILE, "key", [("b", 2.5), ("c", np.inf)])
    assert roundings_lookup(tmp_path / FILE)("b") == 2.5
    with pytest.raises(BundleError, match="the range of c is none"):
        roundings_lookup(tmp_path / FILE)("c")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`cpu`, and `cuda`, which every machine lowers for, in blocks of 32; all int4."""
    folder, found = tmp_path_factory.mktemp("recipe"), {}
    for name, replaced in (("cpu", '"int8"'), ("cuda", '"fp16"')):
        text = (resource_folder("engines") / f"{name}.toml").read_text(encoding="utf-8")
        text = text.replace("block_size = 64", "block_size = 32").replace("block_size = 128", "block_size = 32")
        for part in ("layers", "qkv", "ungated", "head"):
            text = text.replace(f"{part} = {replaced}", f'{part} = "int4"')
        path = folder / f"small-{name}.toml"
        path.write_text(text)
        found[name] = str(path)
    return found


@pytest.fixture(scope="module")
def target(targets: dict[str, str]) -> str:
    return targets["cuda"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, targets: dict[str, str]) -> Bundle:
    made = Bundle.open(tiny_bundle(tmp_path_factory.mktemp("roundings"), form="linear"))
    build(made, targets["cuda"], verify=True)
    build(made, targets["cuda"], rounding="nearest", verify=True)
    build(made, targets["cpu"])
    return made


@pytest.fixture
def own(bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(bundle.root, tmp_path / "own.dash")))


def kept(bundle: Bundle, node: str, name: str = "small-cuda") -> Rounded:
    found = roundings_lookup(bundle.path(f"engines/{name}") / FILE)(node)
    assert found is not None, node
    return found


def held(bundle: Bundle, target: str, engine: str, node: str, start: int = 0) -> list[np.ndarray]:
    """What the first node whose name has `node` in it reads, from the input number `start` on."""
    model = onnx.load(bundle.path(bundle.load_build(target).engines[engine].file))
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    found = next(item for item in model.graph.node if node in item.name)
    return [arrays[name] for name in found.input[start:] if name in arrays]


def codes(bundle: Bundle, target: str = "small-cuda") -> np.ndarray:
    return held(bundle, target, UNIT, f"{DOWN}/weight")[0].astype(np.float32)


@pytest.mark.parametrize(
    ("engine", "node"),
    [
        (UNIT, DOWN),
        ("layer_05", "head/logits"),
        ("layers_00-01", "layer_00/attention/o_proj"),
        ("layer_04", "layer_04/attention/q_proj"),
    ],
)
def test_engines_for_a_cpu_hold_what_was_calibrated(engine: str, node: str, bundle: Bundle) -> None:
    scale = np.float32(16**-0.5 if node.endswith("q_proj") else 1)  # packed with K and V, and scaled for attention
    *wanted, _ = packed([grid_from(kept(bundle, node, "small-cpu"))])
    wanted[1] = wanted[1] * scale
    for whole, part in zip(held(bundle, "small-cpu", engine, node, 1), wanted, strict=True):
        np.testing.assert_array_equal(whole.reshape(-1, *part.shape[1:])[: len(part)], part)


def test_graphs_for_a_gpu_hold_what_was_calibrated(bundle: Bundle) -> None:
    last = bundle.load_build("small-cuda").segments[-1].name
    for engine, node in ((UNIT, DOWN), (UNIT, "layer_03/attention/v_proj"), (last, "head/logits")):
        expected = kept(bundle, node)
        values, scales = held(bundle, "small-cuda", engine, f"{node}/weight")
        np.testing.assert_array_equal(values.astype(np.float32), expected.codes.astype(np.float32) - 8)
        np.testing.assert_array_equal(scales, expected.scales.astype(scales.dtype))
        assert expected.block == 32
    assert not np.array_equal(codes(bundle), codes(bundle, "small-cuda-nearest"))
    assert not bundle.path(f"engines/small-cuda-nearest/{FILE}").exists()
    one, other = (bundle.load_build(f"small-cuda{name}").verification for name in ("", "-nearest"))
    assert one is not None
    assert other is not None
    assert one.engines[UNIT]["hidden_out"] != other.engines[UNIT]["hidden_out"], "verified as it is built"


refuse = Mock(side_effect=AssertionError("calibrated again"))


def test_it_is_kept(own: Bundle, targets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine made again asks nobody; without the file all are made anew, for all follow it."""
    known = own.load_build("small-cuda")
    assert all(FILE not in record.name for record in known.files), "nobody loads it"
    files = [own.path(engine.file) for engine in known.engines.values()]
    before, expected = [path.stat().st_mtime_ns for path in files], codes(own)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "calibrate_matrices", refuse)
        assert build(own, targets["cpu"]) == own.load_build("small-cpu")
        own.path(known.engines[UNIT].file).unlink()
        build(own, targets["cuda"])
    np.testing.assert_array_equal(codes(own), expected)
    own.path(f"engines/small-cuda/{FILE}").unlink()
    build(own, targets["cuda"])
    assert not set(before) & {path.stat().st_mtime_ns for path in files}


def test_without_onnx_runtime(own: Bundle, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(own.path("engines/small-cuda"))
    monkeypatch.setattr(calibrate, "has_reference", lambda: False)
    with pytest.raises(
        BackendError, match=r"onnxruntime is not installed here.*or lower the graphs on a machine that has it"
    ):
        build(own, target)
    build(own, target, rounding="nearest")


@pytest.mark.parametrize("content", [b"", b"PK", "half", "compressed"])
def test_a_damaged_file(content: bytes | str, bundle: Bundle, tmp_path: Path) -> None:
    """Or one that would fill the memory."""
    path, whole = tmp_path / FILE, bundle.path(f"engines/small-cuda/{FILE}").read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    if content == "compressed":
        np.savez_compressed(path, **{f"{DOWN}.codes": np.zeros(1 << 20, np.uint8), "key": np.array("x")})
    said = "is compressed" if content == "compressed" else "is damaged .* Delete it and build again"
    with pytest.raises(BundleError, match=said):
        roundings_lookup(path)(DOWN)


def test_what_is_not_of_this_matrix(own: Bundle, target: str) -> None:
    path = own.path(f"engines/small-cuda/{FILE}")
    with np.load(path) as arrays:
        changed = dict(arrays)
    for name in (f"{DOWN}.codes", f"{DOWN}.scales", f"{DOWN}.zeros"):
        changed[name] = changed[name][:, :-1]
    np.savez(path, **changed)
    own.path("engines/small-cuda/build.json").unlink()
    with pytest.raises(BundleError, match="not of this matrix"):
        build(own, target)


def test_another_head_is_calibrated_anew(bundle: Bundle, own: Bundle, target: str, tmp_path: Path) -> None:
    """Alone: layers do not depend on it."""
    save_model(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"] = -weights["lm_head.weight"][::-1].copy()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "model")
    changed = export(checkpoint, own.root, tiny_policy(checkpoint, "linear"))
    build(changed, target)
    same = [np.array_equal(kept(changed, node).codes, kept(bundle, node).codes) for node in ("head/logits", DOWN)]
    assert same == [False, True]


def test_other_units_keep_it(
    own: Bundle, targets: dict[str, str], tiny_model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where layers outside of units are rounded alike."""
    apart = tmp_path / "apart.toml"
    apart.write_text(Path(targets["cpu"]).read_text().replace('ungated = "int4"', 'ungated = "int8"'))
    build(own, str(apart))
    fewer = export(tiny_model, own.root, narrowed(tiny_policy(tiny_model, "linear"), (4,)))
    monkeypatch.setattr(calibrate, "calibrate_matrices", refuse)
    assert "layers_02-03" not in build(fewer, targets["cpu"]).engines
    with pytest.raises(BackendError, match="calibrated again"):
        build(fewer, str(apart))


def test_an_interrupted_calibration_goes_on_after_its_last_whole_layer(
    own: Bundle, targets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes to the same codes. A layer has four groups of matrices, so the tenth call is of the third layer. Layers
    are written beside the bundle: /tmp may be small, or memory.
    """
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    folder, whole = own.path("engines/small-cpu"), calibrate.gptq
    expected = folder.joinpath(FILE).read_bytes()
    shutil.rmtree(folder)
    calls, stop = list[int](), 10

    def counted(*given: Any) -> Rounded:
        calls.append(len(given[0]))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(calibrate, "gptq", counted)
    with pytest.raises(KeyboardInterrupt):
        build(own, targets["cpu"])
    kept = {path.name for path in folder.rglob("*")}
    assert kept == {".journal.json", "calibration", "layer_00.npz", "layer_01.npz"}
    calls.clear()
    stop = 0
    build(own, targets["cpu"])
    assert len(calls) == 6 * 4 + 1 - 2 * 4
    assert folder.joinpath(FILE).read_bytes() == expected
    assert not (folder / "calibration").exists()


@pytest.mark.parametrize("family", ["olmo2", "llama"])
def test_the_range_of_a_bypass_that_reads_the_state_itself(family: str, tmp_path: Path) -> None:
    """OLMo 2's Q projection reads that state, too; what other families' bypasses read is normed."""
    bundle = Bundle.open(tiny_bundle(tmp_path, form="linear", family=family, pad_token_id=0))
    recipe = with_weights(load_recipe("h100"), weights="fp8", rounding="gptq")
    ranges = dict(calibrate.calibrate_matrices(bundle, recipe, ArtifactStore(tmp_path / "kept"), "", no_progress))
    assert isinstance(ranges["layer_02/attention/q_proj"], float)
    for unit, layer in (("02-03", "02"), ("04-04", "04")):
        wanted = ranges[f"layer_{layer}/attention/q_proj"] if family == "olmo2" else None
        assert ranges.get(f"bypass_{unit}/product") == wanted
