"""Calibrated int4: GPTQ against rounding to nearest, what engines hold, that it is kept, and what a kit brings."""

from __future__ import annotations

import ast
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from dash_export.building import build, calibrate
from dash_export.building.calibrate import calibrated, gptq
from dash_export.building.kit import write_kit
from dash_export.bundle import Bundle
from dash_export.errors import BackendError, BundleError
from dash_export.exporting import export
from dash_export.graphs.ort_quantize import pack, quantize_block
from dash_export.graphs.rounded import Rounded, Roundings, stored_roundings, write_roundings
from dash_export.models import open_checkpoint
from dash_export.names import ROUNDINGS as FILE
from dash_export.resources import resource_folder
from dash_export.targets import load_recipe
from tests.building.test_kit import run
from tests.tiny import save_model, tiny_checkpoint, tiny_policy

UNIT, DOWN = "layers_02-03", "layer_03/mlp/down_proj"
PARTS = ("layers", "qkv", "ungated", "head")
ROWS, COLUMNS, BLOCK = 96, 40, 32


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    """Inputs of low rank plus noise, a few of them much larger; a matrix."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((2000, 12)) @ rng.standard_normal((12, ROWS))
    inputs = mixed + 0.3 * rng.standard_normal((2000, ROWS))
    inputs[:, [5, 50]] *= 20
    return inputs.astype(np.float32), rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)


def moments(inputs: np.ndarray) -> np.ndarray:
    return inputs.astype(np.float64).T @ inputs


def nearest(matrix: np.ndarray, bits: int = 4) -> np.ndarray:
    """ONNX Runtime's own rounding, as float32."""
    packed, scales, zeros = quantize_block(matrix, bits, BLOCK, False)
    blocks = len(matrix) // BLOCK
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(matrix.shape[1], -1).T
    offsets = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(matrix.shape[1], -1)[:, :blocks].T
    return Rounded(codes, np.ascontiguousarray(scales.T), offsets, bits, BLOCK).dequantized()


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_product_is_closer_than_with_nearest_weights(case: tuple[np.ndarray, np.ndarray], symmetric: bool) -> None:
    inputs, matrix = case
    rounded = gptq(matrix, moments(inputs), 4, BLOCK, symmetric)
    errors = [np.square(inputs @ (other - matrix)).mean() for other in (rounded.dequantized(), nearest(matrix))]
    assert errors[0] < 0.4 * errors[1]
    assert not symmetric or (rounded.zeros == 8).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_refining_brings_the_product_closer(
    case: tuple[np.ndarray, np.ndarray], symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, matrix = case
    errors = []
    for turns in (0, 1, 3):
        monkeypatch.setattr(calibrate, "REFINEMENTS", turns)
        rounded = gptq(matrix, moments(inputs), 4, BLOCK, symmetric)
        errors.append(np.square(inputs @ (rounded.dequantized() - matrix)).mean())
    assert errors[2] < errors[1] < 0.97 * errors[0]


def test_a_column_of_zeros_stays_one(case: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, matrix = case
    matrix = matrix.copy()
    matrix[:, 3] = 0
    matrix[:BLOCK, 5] = 0
    found = gptq(matrix, moments(inputs), 4, BLOCK, False).dequantized()
    assert np.isfinite(found).all()
    assert not found[:, 3].any()


def test_without_knowledge_of_inputs_it_is_close_to_the_weights(case: tuple[np.ndarray, np.ndarray]) -> None:
    matrix = case[1]
    rounded = gptq(matrix, np.zeros((ROWS, ROWS)), 4, BLOCK, False)
    assert np.square(rounded.dequantized() - matrix).mean() < 1.1 * np.square(nearest(matrix) - matrix).mean()


def test_a_last_short_block_has_its_own_grid(case: tuple[np.ndarray, np.ndarray]) -> None:
    inputs, matrix = case
    rounded = gptq(matrix[:80], moments(inputs[:, :80]), 4, BLOCK, False)
    assert rounded.scales.shape == (3, COLUMNS)
    packed, scales, zeros = pack(rounded)
    assert packed.shape == (COLUMNS, 3, BLOCK // 2)
    assert scales.shape == (COLUMNS, 3)
    assert zeros.shape == (COLUMNS, 2)


def test_packing_is_what_onnx_runtime_packs(case: tuple[np.ndarray, np.ndarray]) -> None:
    matrix = case[1]
    expected = quantize_block(matrix, 4, BLOCK, False)
    blocks = ROWS // BLOCK
    codes = np.stack([expected[0] & 15, expected[0] >> 4], axis=-1).reshape(COLUMNS, -1).T
    zeros = np.stack([expected[2] & 15, expected[2] >> 4], axis=-1).reshape(COLUMNS, -1)[:, :blocks].T
    rounded = Rounded(codes, np.ascontiguousarray(expected[1].T), zeros, 4, BLOCK)
    for found, wanted in zip(pack(rounded), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`cpu` in blocks of 32, and `cuda`, which every machine lowers for; all int4."""
    folder, found = tmp_path_factory.mktemp("recipe"), {}
    for name, replaced in (("cpu", '"int8"'), ("cuda", '"fp16"')):
        text = (resource_folder("engines") / f"{name}.toml").read_text(encoding="utf-8").replace("= 64", "= 32")
        for part in PARTS:
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
    root = tmp_path_factory.mktemp("roundings")
    checkpoint = tiny_checkpoint(root / "model")
    made = export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint, "linear"))
    build(made, targets["cuda"], verify=True)
    build(made, targets["cuda"], rounding="nearest", verify=True)
    build(made, targets["cpu"])
    return made


def own_copy(bundle: Bundle, folder: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(bundle.root, folder / "own.dash")))


def kept(bundle: Bundle, name: str = "small-cuda") -> Roundings:
    return stored_roundings(bundle.path(f"engines/{name}") / FILE)


def matrix(bundle: Bundle, build_name: str, engine: str, node: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a matrix in a lowered graph."""
    model = onnx.load(bundle.path(bundle.load_build(build_name).engines[engine].file))
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    (found,) = (item for item in model.graph.node if item.name == f"{node}/weight")
    values, scales = (arrays[name] for name in found.input)
    return values.astype(np.float32), scales


def packed_of(bundle: Bundle, engine: str, part: str) -> list[np.ndarray]:
    """Packed codes, scales and zero points of the matrix whose node's name has `part` in it, in an engine for a CPU."""
    model = onnx.load(bundle.path(bundle.load_build("small-cpu").engines[engine].file))
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits" and part in node.name)
    arrays = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    return [arrays[name] for name in node.input[1:4]]


def test_engines_for_a_cpu_hold_what_was_calibrated(bundle: Bundle) -> None:
    rounded = kept(bundle, "small-cpu")
    for engine, node in (
        (UNIT, DOWN),
        ("layer_05", "head/logits"),
        ("layers_00-01", "layer_00/attention/o_proj"),
        ("layer_04", "layer_04/attention/q_proj"),
    ):
        matrix = rounded(node)
        assert matrix is not None
        scale = np.float32(16**-0.5 if node.endswith("q_proj") else 1)  # packed with K and V, and scaled for attention
        for index, (whole, part) in enumerate(zip(packed_of(bundle, engine, node), pack(matrix), strict=True)):
            wanted = part * scale if index == 1 else part
            np.testing.assert_array_equal(whole.reshape(-1, *wanted.shape[1:])[: len(wanted)], wanted)


def test_graphs_hold_what_was_calibrated(bundle: Bundle) -> None:
    rounded = kept(bundle)
    for engine, node in (
        (UNIT, DOWN),
        (UNIT, "layer_03/attention/v_proj"),
        (bundle.load_build("small-cuda").segments[-1].name, "head/logits"),
    ):
        expected = rounded(node)
        assert expected is not None
        values, scales = matrix(bundle, "small-cuda", engine, node)
        np.testing.assert_array_equal(values, expected.codes.astype(np.float32) - 8)
        np.testing.assert_array_equal(scales, expected.scales.astype(scales.dtype))
        assert expected.block == (32 if node == DOWN else 64)
    calibrated, nearest = (matrix(bundle, name, UNIT, DOWN)[0] for name in ("small-cuda", "small-cuda-nearest"))
    assert not np.array_equal(calibrated, nearest)
    assert rounded("layer_03/input_layernorm") is None
    assert kept(bundle, "small-cuda-nearest")(DOWN) is None


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_what_is_kept_is_what_was_calibrated(name: str, bundle: Bundle, targets: dict[str, str]) -> None:
    roundings = kept(bundle, f"small-{name}")
    found = dict(calibrated(bundle, load_recipe(targets[name]), lambda *_: None))
    assert {DOWN, "layer_00/attention/q_proj", "head/logits"} <= set(found)
    for node, one in found.items():
        other = roundings(node)
        assert other is not None
        for part in ("codes", "scales", "zeros", "block"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


def test_an_odd_matrix_with_a_short_last_block_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes, zeros = (rng.integers(0, 16, (rows, 5)).astype(np.uint8) for rows in (71, 3))
    one = Rounded(codes, rng.random((3, 5), np.float32), zeros, 4, 32)
    write_roundings(tmp_path / FILE, "key", [("a", one)])
    other = stored_roundings(tmp_path / FILE)("a")
    assert other is not None
    np.testing.assert_array_equal(one.dequantized(), other.dequantized())


def test_threads_take_turns_in_pythons_parser(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy parses a file's header as Python: "AST constructor recursion depth mismatch", before 3.11.8."""
    sound, inside, together = ast.parse, [0], []

    def parse(*given: Any, **named: Any) -> ast.AST:
        inside[0] += 1
        together.append(inside[0])
        time.sleep(0.001)
        try:
            return sound(*given, **named)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(ast, "parse", parse)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(kept(bundle), [DOWN] * 16))
    assert set(together) == {1}


def refuse(*_given: object) -> None:
    raise AssertionError("calibrated again")


def test_an_engine_made_again_asks_nobody(
    bundle: Bundle, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_copy(bundle, tmp_path)
    monkeypatch.setattr(calibrate, "calibrated", refuse)
    file = own.path(own.load_build("small-cuda").engines[UNIT].file)
    file.unlink()
    build(own, target)
    np.testing.assert_array_equal(*(matrix(made, "small-cuda", UNIT, DOWN)[0] for made in (own, bundle)))


def test_engines_follow_what_they_are_made_of(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = own_copy(bundle, tmp_path)
    assert all(FILE not in record.name for record in own.load_build("small-cuda").files), "nobody loads it"
    files = [own.path(engine.file) for engine in own.load_build("small-cuda").engines.values()]
    before = [path.stat().st_mtime_ns for path in files]
    own.path(f"engines/small-cuda/{FILE}").unlink()
    build(own, target)
    assert not set(before) & {path.stat().st_mtime_ns for path in files}


def test_without_onnx_runtime(bundle: Bundle, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_copy(bundle, tmp_path)
    shutil.rmtree(own.path("engines/small-cuda"))
    monkeypatch.setattr(calibrate, "find_spec", lambda _name: None)
    with pytest.raises(BackendError, match=r"onnxruntime is not installed here.*or build from a kit"):
        build(own, target)
    build(own, target, rounding="nearest")


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_file(content: bytes | None, bundle: Bundle, tmp_path: Path) -> None:
    whole = bundle.path(f"engines/small-cuda/{FILE}").read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BundleError, match=r"is damaged .* Delete it and build again"):
        stored_roundings(tmp_path / FILE)(DOWN)


def test_a_file_that_fills_the_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / FILE, **{f"{DOWN}.codes": np.zeros(1 << 20, np.uint8), "key": np.array("x")})
    with pytest.raises(BundleError, match="is compressed"):
        stored_roundings(tmp_path / FILE)(DOWN)


def test_a_kit_brings_it(bundle: Bundle, target: str, tmp_path: Path) -> None:
    kit = write_kit(bundle, target, [], "as a test", tmp_path / "kit")
    engines = kit / bundle.root.name / "engines" / "small-cuda"
    assert (engines / FILE).read_bytes() == bundle.path(f"engines/small-cuda/{FILE}").read_bytes()
    record = json.loads((kit / "kit.json").read_text())
    assert f"{bundle.root.name}/engines/small-cuda/{FILE}" in {item["name"] for item in record["files"]}
    assert record["verification"] == bundle.load_build("small-cuda").details["verification"]
    done = run(kit)
    assert done.returncode == 0, done.stdout + done.stderr
    own = Bundle.open(kit / bundle.root.name)
    assert "rounding layer" not in done.stdout
    np.testing.assert_array_equal(*(matrix(made, "small-cuda", UNIT, DOWN)[0] for made in (own, bundle)))
    assert run(kit, "--check").returncode == 0, "what the build wrote is no damage"


def test_a_kit_takes_what_is_there(
    bundle: Bundle, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "calibrated", refuse)
    kit = write_kit(bundle, target, [], "as a test", tmp_path / "kit")
    assert (kit / bundle.root.name / "engines" / "small-cuda" / FILE).is_file()
    elsewhere = own_copy(bundle, tmp_path)
    elsewhere.path(f"engines/small-cuda/{FILE}").unlink()
    with pytest.raises(AssertionError, match="calibrated again"):
        write_kit(elsewhere, target, [], "as a test", tmp_path / "other")


def test_verified_against_what_is_built(bundle: Bundle) -> None:
    errors = bundle.load_build("small-cuda").details["verification"]["engines"][UNIT]
    nearest = bundle.load_build("small-cuda-nearest").details["verification"]["engines"][UNIT]
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
    head, layer = (kept(changed)(node) for node in ("head/logits", DOWN))
    old_head, old_layer = (kept(bundle)(node) for node in ("head/logits", DOWN))
    assert head is not None
    assert old_head is not None
    assert not np.array_equal(head.codes, old_head.codes)
    assert layer is not None
    assert old_layer is not None
    np.testing.assert_array_equal(layer.codes, old_layer.codes)


def test_to_nearest_under_the_same_name(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = own_copy(bundle, tmp_path)
    path = tmp_path / "small-cuda.toml"
    path.write_text(
        Path(target).read_text().replace('"gptq"', '"nearest"').replace("block_size = 128", "block_size = 16")
    )
    build(own, str(path))
    assert matrix(own, "small-cuda", UNIT, DOWN)[1].shape[0] == 96 // 16
    assert not own.path(f"engines/small-cuda/{FILE}").exists()


def test_a_matrix_that_no_block_divides(target: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", intermediate_size=104)
    odd = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint))
    build(odd, target, verify=True)
    rounded = kept(odd)
    assert rounded(DOWN) is None
    assert rounded("layer_03/mlp/up_proj") is not None


def test_in_bfloat16(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = own_copy(bundle, tmp_path)
    path = tmp_path / "wide.toml"
    path.write_text(Path(target).read_text().replace('"fp16"', '"bf16"').replace('"7.5", ', ""))
    made = build(own, str(path), verify=True)
    assert "bf16 is not there" in made.details["verification"]["compared"]


def test_what_is_not_of_this_matrix(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = own_copy(bundle, tmp_path)
    path = own.path(f"engines/small-cuda/{FILE}")
    with np.load(path) as arrays:
        changed = dict(arrays)
    for name in (f"{DOWN}.codes", f"{DOWN}.scales", f"{DOWN}.zeros"):
        changed[name] = changed[name][:, :-1]
    np.savez(path, **changed)
    own.path("engines/small-cuda/build.json").unlink()
    with pytest.raises(BundleError, match="not of this matrix"):
        build(own, target)


def test_nothing_is_calibrated_where_nothing_is_int4(bundle: Bundle, target: str, tmp_path: Path) -> None:
    own = own_copy(bundle, tmp_path)
    build(own, target, weights="int8")
    assert not own.path(f"engines/small-cuda-int8/{FILE}").exists()


def test_a_finished_build_calibrates_nothing(
    bundle: Bundle, targets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "calibrated", refuse)
    assert build(bundle, targets["cpu"]) == bundle.load_build("small-cpu")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_calibration_leaves_nothing(
    error: BaseException, bundle: Bundle, targets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in the thread that Ctrl-C comes to, and is not begun again."""
    calls = []

    def stop(*_: object) -> None:
        assert threading.current_thread() is threading.main_thread()
        calls.append(1)
        raise error

    own = own_copy(bundle, tmp_path)
    shutil.rmtree(own.path("engines/small-cpu"))
    monkeypatch.setattr(calibrate, "gptq", stop)
    with pytest.raises(type(error)):
        build(own, targets["cpu"])
    assert {path.name for path in own.path("engines/small-cpu").iterdir()} <= {".journal.json"}
    assert len(calls) == 1
