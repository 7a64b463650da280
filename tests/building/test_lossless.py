"""`cpu-q4_0`: what a GGUF file holds in Q4_0 is what the engines hold."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dash_export.building import build
from dash_export.exporting import export
from dash_export.graphs.ort_quantize import quantize_block
from dash_export.models import open_checkpoint
from tests.models.helpers import tiny_model, write_gguf
from tests.tiny import tiny_policy

Q4_0 = gguf.GGMLQuantizationType.Q4_0
PROJECTIONS = {
    "attention/q_proj+k_proj+v_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/o_proj": ("self_attn.o_proj",),
    "mlp/gate_proj+up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp/down_proj": ("mlp.down_proj",),
}


def values(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[out, in] of two codes a byte [out, blocks, block / 2], offset by 8, and scales [out, blocks]."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32) - 8
    return (codes * scales.reshape(len(packed), -1, 1)).reshape(len(packed), -1)


def test_every_code_is_found_again() -> None:
    weights = (np.random.default_rng(0).standard_normal((96, 576)) * 0.05).astype(np.float32)
    weights[0, :32] = 0.0
    weights[1, :32] = np.abs(weights[1, :32])
    weights[2, :32] = -np.abs(weights[2, :32])
    weights[3, 5] = 3.0
    stored = gguf.dequantize(gguf.quantize(weights, Q4_0), Q4_0)
    packed, scales, _ = quantize_block(np.ascontiguousarray(stored.T), 4, 32, True)
    np.testing.assert_array_equal(values(packed, scales), stored)


def initializers(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.mark.parametrize("layer", [0, 2])
def test_engines_hold_the_file_s_weights(layer: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", num_hidden_layers=6), quantize="Q4_0")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    bundle = export(checkpoint, tmp_path / "tiny.dash", tiny_policy(checkpoint))
    build(bundle, "cpu-q4_0")
    record = bundle.load_build("cpu-q4_0")
    name = next(segment.name for segment in record.segments if layer in segment.layers)
    held = initializers(bundle.path(record.engines[name].file))
    for node, projections in PROJECTIONS.items():
        packed, scales = (held[f"layer_{layer:02d}/{node}.weight.{part}"] for part in ("q4", "scales"))
        parts = [checkpoint.weights[f"model.layers.{layer}.{part}.weight"] for part in projections]
        expected = np.concatenate([part.read_rows(0, part.shape[0]) for part in parts])
        if "q_proj" in node:  # queries come out scaled for attention, by a power of two here
            expected[: parts[0].shape[0]] *= np.float32(checkpoint.spec.head_dim**-0.5)
        np.testing.assert_array_equal(values(packed, scales)[: len(expected)], expected)
