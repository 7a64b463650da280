"""`cpu-gguf`: what a GGUF file holds in 4 bits is what the engines hold."""

from pathlib import Path

import gguf
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.building.graph_runs import graph_run
from dash_export.graphs.lower.grid import BLOCK, grid_of, packed
from dash_export.graphs.portable.ggml import split_blocks
from dash_export.graphs.portable.stored import Stored
from dash_export.models import open_checkpoint
from tests.models.helpers import tiny_model, write_gguf
from tests.tiny import random_ids, tiny_policy

pytestmark = pytest.mark.usefixtures("unmeasured")

PROJECTIONS = {
    "attention/q_proj+k_proj+v_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/o_proj": ("self_attn.o_proj",),
    "mlp/gate_proj+up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp/down_proj": ("mlp.down_proj",),
}


def blocks_of(kind: str, rows: int = 96, columns: int = 512) -> np.ndarray:
    rng, quantization = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    if kind == "Q4_K":  # which gguf does not write: any bits are weights, but for the two scales
        blocks = rng.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
        blocks[..., 4:16] &= 0x1F
        blocks[..., :4] = np.frombuffer(np.array([3e-3, 1e-3], np.float16).tobytes(), np.uint8)
        blocks[4, :, :2] = 0
        return blocks.reshape(rows, -1)
    weights = (rng.standard_t(4, (rows, columns)) * 0.05).astype(np.float32)
    weights[0, :BLOCK] = 0.0
    weights[1, :BLOCK] = np.abs(weights[1, :BLOCK])
    weights[2, :BLOCK] = -np.abs(weights[2, :BLOCK])
    weights[3, 5] = 3.0
    return np.asarray(gguf.quantize(weights, quantization))


def stored(kind: str, packed_rows: np.ndarray) -> Stored:
    factors, others = split_blocks(kind, packed_rows)
    return Stored(kind, ir.tensor(factors), ir.tensor(others))


@pytest.mark.parametrize(("kind", "factor"), [("Q4_0", 1.0), ("Q4_1", 0.3), ("Q4_K", 0.3)])
def test_a_grid_is_the_file_s(kind: str, factor: float) -> None:
    rows = blocks_of(kind)
    weights = factor * gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    grid = grid_of(stored(kind, rows))
    assert grid is not None
    grid = grid.times(factor)
    found = grid.scales[..., None] * (grid.codes - grid.zeros[..., None].astype(np.float32)) + grid.rests[..., None]
    np.testing.assert_allclose(found.reshape(weights.shape), weights, atol=1e-6 * np.abs(weights).max())
    assert grid.has_rests() == (kind != "Q4_0")
    codes, scales, zeros, more = packed([grid])
    assert more == (16 if grid.has_rests() else 0)
    assert codes.shape[1] == scales.shape[1] == 16 + more // 16
    assert zeros.shape[1] == -(-scales.shape[1] // 2)


def test_what_has_no_such_grid() -> None:
    """More bits than four; weights far from zero on one side."""
    assert grid_of(stored("Q5_0", blocks_of("Q5_0"))) is None
    far = np.random.default_rng(0).uniform(5, 5.1, (4, 64)).astype(np.float32)
    assert grid_of(stored("Q4_1", gguf.quantize(far, gguf.GGMLQuantizationType.Q4_1))) is None


def initializers(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def test_engines_hold_the_file_s_weights(tmp_path: Path) -> None:
    layer = 2
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", num_hidden_layers=6), quantize="Q4_0")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint))
    record = build(bundle, "cpu-gguf")
    name = next(segment.name for segment in record.segments if layer in segment.layers)
    held = initializers(bundle.path(record.engines[name].file))
    for node, projections in PROJECTIONS.items():
        codes, scales, zeros = (
            held[f"layer_{layer:02d}/{node}.weight.{part}"] for part in ("q4", "scales", "zero_points")
        )
        levels = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float32)
        zero = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(zeros), -1)[:, : codes.shape[1], None]
        found = ((levels - zero) * scales[..., None]).reshape(len(codes), -1)
        parts = [checkpoint.weights[f"model.layers.{layer}.{part}.weight"] for part in projections]
        expected = np.concatenate([part.read_rows(0, part.shape[0]) for part in parts])
        if "q_proj" in node:  # queries come out scaled for attention, by a power of two here
            expected[: parts[0].shape[0]] *= np.float32(checkpoint.spec.head_dim**-0.5)
        np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "tied"), [("Q8_0", True), ("Q5_0", False), ("Q4_0", True)])
def test_an_embedding_takes_no_more_than_in_the_file(kind: str, tied: bool, tmp_path: Path) -> None:
    """In 8 bits a tied head maps its codes; in fewer its rows are the file's, bit for bit."""
    write_gguf(tmp_path / "a.gguf", tiny_model("llama", num_hidden_layers=6, tie_word_embeddings=tied), quantize=kind)
    checkpoint, ids = open_checkpoint(tmp_path / "a.gguf"), random_ids(20)
    bundle = export(checkpoint, tmp_path / "a.dash", tiny_policy(checkpoint))
    engines = build(bundle, "cpu-gguf").engines
    paths = [bundle.path(record.file) for record in (engines["embed"], list(engines.values())[-1])]
    shared = [
        entry.value
        for tensor in onnx.load(paths[1], load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if tensor.name.startswith("head/logits") and entry.key == "location"
    ]
    expected = checkpoint.read("model.embed_tokens.weight")[ids]
    found = graph_run(paths[0])({"input_ids": ids[None]})["hidden_out"][0]
    if kind == "Q8_0":
        assert set(shared) == {"embed.data"}
        np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 120)
    else:
        assert "embed.data" not in shared
        np.testing.assert_array_equal(found, expected)


def test_answers_are_those_of_the_file(tmp_path: Path) -> None:
    """But for activations in 8 bits, of which int8 weights show the size."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2", num_hidden_layers=6), quantize="Q4_1")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint, "linear"))
    ids = random_ids(60)

    def logits(**options: str) -> np.ndarray:
        runtime = DashRuntime.load(bundle.root, build(bundle, options.pop("target", "cpu"), **options).target)
        return runtime.session("token", trade_off=0.5).logits(ids, actions=actions)

    actions = np.zeros((60, 6), np.int8)
    actions[20:, 2:4] = actions[30:, 4] = 1
    exact = logits(weights="fp32")
    nearest = np.abs(logits(rounding="nearest") - exact).mean()
    as_is, int8 = (np.abs(logits(**how) - exact).mean() for how in ({"target": "cpu-gguf"}, {"weights": "int8"}))
    assert as_is < 1.5 * int8
    assert as_is < nearest / 4
