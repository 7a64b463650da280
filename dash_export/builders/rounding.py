"""Calibrated rounding of a bundle's int4 matrices: what they are really fed, layer by layer, and GPTQ on it.

A layer is fed by the rounded layers before it, so later ones make up for earlier ones' errors. In memory at a time: one
layer's weights and moments, and the hidden states of the calibration text.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from safetensors.numpy import load_file, save

from dash_export.artifacts import TEMPORARY, Progress
from dash_export.builders.gptq import gptq
from dash_export.builders.segments import TEXT
from dash_export.bundle import Bundle
from dash_export.graph_runs import graph_run, step_inputs
from dash_export.graphs.compose import constant_value, load_graph
from dash_export.graphs.precision import weight_precision
from dash_export.graphs.rounded import Rounded, Roundings
from dash_export.graphs.trt.quantize import block_of
from dash_export.resources import resource_folder
from dash_export.runtime.backends.onnxruntime import ort_errors, shared_pool_options
from dash_export.runtime.text import Text
from dash_export.targets import Recipe

WINDOW = 256
WINDOWS = 64
BATCH = 8
"""Windows that go through a layer together."""
BITS = 4

Floats = npt.NDArray[np.float32]


@contextmanager
def calibrated(bundle: Bundle, recipe: Recipe, folder: Path, progress: Progress) -> Iterator[Roundings]:
    """How the recipe rounds each matrix, calibrated: all are made when the first one is asked for, and lie in a
    temporary folder inside `folder` until the end.
    """
    made = _Calibrated(bundle, recipe, folder, progress)
    try:
        yield made
    finally:
        made.close()


class _Calibrated:
    def __init__(self, bundle: Bundle, recipe: Recipe, folder: Path, progress: Progress) -> None:
        self._bundle, self._recipe, self._folder, self._progress = bundle, recipe.weights, folder, progress
        self._divides = recipe.engine is not None
        self._lock = threading.Lock()
        self._scratch: Path | None = None
        self._failure: Exception | None = None

    def __call__(self, node: str) -> Rounded | None:
        if not self._wanted(node):
            return None
        with self._lock:
            if self._failure is not None:
                raise self._failure  # another thread waited for what did not come: it does not begin anew
            if self._scratch is None:
                try:
                    self._scratch = self._make()
                except Exception as error:
                    self._failure = error
                    raise
        path = _file(self._scratch, node)
        if not path.exists():
            return None
        return self._read(path)

    def _read(self, path: Path) -> Rounded:
        # Builders read these from several threads. numpy's own files do not stand that before Python 3.11.8: their
        # headers are parsed as Python, whose parser counts its depth once for all threads (cpython gh-106905).
        arrays = load_file(path)
        block = self._block(len(arrays["codes"]))
        assert block is not None
        return Rounded(**arrays, bits=BITS, block=block)

    def _block(self, rows: int) -> int | None:
        """Inputs that share a scale, of so many; None where the matrix is left as it is."""
        wanted = self._recipe.block_size
        return block_of(rows, wanted) if self._divides else wanted

    def close(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _wanted(self, node: str) -> bool:
        gated = self._bundle.manifest.policy.layers
        known = node.endswith("_proj") or node == "head/logits"
        return known and weight_precision(node, self._recipe, gated) == "int4"

    def _round(self, file: Path, matrix: Floats, moments: npt.NDArray[np.float64]) -> Floats:
        block = self._block(len(matrix))
        if block is None:
            return matrix
        rounded = gptq(matrix, moments, BITS, block, self._recipe.symmetric)
        _write(file, rounded)
        return rounded.dequantized()

    def _make(self) -> Path:
        """All of them, in a new folder."""
        scratch = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self._folder))
        try:
            self._round_all(scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return scratch

    def _round_all(self, scratch: Path) -> None:
        bundle, model = self._bundle, self._bundle.manifest.model
        embed = graph_run(bundle.graph("embed"))
        batches = _windows(bundle).reshape(-1, BATCH, WINDOW)
        states = [embed({"input_ids": windows})["hidden_out"] for windows in batches]
        for layer in range(model.num_layers):
            probe = _Probe(load_graph(bundle.graph(f"layer_{layer:02d}")), model.num_kv_heads, model.head_dim)
            wanted = {node for node in probe.sources if self._wanted(node)}
            moments = probe.moments(states, wanted)
            rounded = {
                node: self._round(_file(scratch, node), probe.matrix(node), moments[probe.sources[node]])
                for node in sorted(wanted)
            }
            states = [probe(state, rounded)["hidden_out"] for state in states]
            self._progress(f"rounding layer {layer}", layer + 1, model.num_layers)
        if self._wanted("head/logits"):
            self._round_head(_file(scratch, "head/logits"), states)

    def _round_head(self, file: Path, states: list[Floats]) -> None:
        graph = load_graph(self._bundle.graph("head")).graph
        norm = next(node for node in graph if node.op_type == "RMSNormalization")
        table = next(table for node in graph if (table := constant_value(node.inputs[0])) is not None)
        gain, epsilon = constant_value(norm.inputs[1]), norm.attributes["epsilon"].as_float()
        moments = np.zeros((table.shape[1], table.shape[1]))
        for state in states:
            normed = state / np.sqrt(np.square(state).mean(axis=-1, keepdims=True) + epsilon) * gain
            moments += _moments(normed)
        self._round(file, table.T, moments)
        self._progress("rounding head", 1, 1)


def _file(scratch: Path, node: str) -> Path:
    return scratch / f"{node.replace('/', '.')}.safetensors"


def _write(file: Path, rounded: Rounded) -> None:
    arrays = {"codes": rounded.codes, "scales": rounded.scales, "zeros": rounded.zeros}
    # Not save_file: its errors are none of Python's, and a full disk is to be told as one.
    file.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


class _Probe:
    """A layer graph whose matrices are inputs and whose matrices' inputs are outputs."""

    def __init__(self, model: ir.Model, kv_heads: int, head_dim: int) -> None:
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "MatMul" and constant_value(node.inputs[1]) is not None]
        self.sources = {str(node.name): str(node.inputs[0].name) for node in nodes if node.inputs[0] is not None}
        self._matrices: dict[str, Any] = {}
        self._weights: dict[str, str] = {}
        for node in nodes:
            source, weight = node.inputs[:2]
            assert source is not None
            assert weight is not None
            self._matrices[str(node.name)] = weight.const_value
            self._weights[str(node.name)] = str(weight.name)
            del graph.initializers[str(weight.name)]
            weight.const_value = None
            graph.inputs.append(weight)
            if source not in graph.outputs:
                source.type = ir.TensorType(ir.DataType.FLOAT)
                graph.outputs.append(source)
        for value in graph.initializers.values():  # a graph in memory has no folder to find its data in
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        self._name = str(graph.name)
        with ort_errors(self._name):
            self._session = ort.InferenceSession(
                ir.to_proto(model).SerializeToString(), shared_pool_options(), providers=["CPUExecutionProvider"]
            )
        cache = np.zeros((BATCH, kv_heads, WINDOW, head_dim), np.float32)
        names = {item.name for item in self._session.get_inputs()}
        one = step_inputs(0, WINDOW, WINDOW)
        self._feeds = {name: np.repeat(array, BATCH, axis=0) for name, array in one.items() if name in names}
        self._feeds |= {name: cache for name in names if name.startswith("past_")}

    def matrix(self, node: str) -> Floats:
        array: Floats = self._matrices[node].numpy()
        return array

    def __call__(self, state: Floats, replaced: Mapping[str, Floats], extra: bool = False) -> dict[str, Floats]:
        weights = {
            self._weights[node]: replaced[node] if node in replaced else self.matrix(node) for node in self._weights
        }
        names = ["hidden_out", *(dict.fromkeys(self.sources.values()) if extra else ())]
        with ort_errors(self._name):
            return dict(zip(names, self._session.run(names, {**self._feeds, **weights, "hidden": state}), strict=True))

    def moments(self, states: list[Floats], nodes: set[str]) -> dict[str, npt.NDArray[np.float64]]:
        """Sum of x x^T over all tokens, for what each of the nodes reads."""
        found: dict[str, npt.NDArray[np.float64]] = {}
        wanted = {self.sources[node] for node in nodes}
        for state in states if wanted else ():
            outputs = self(state, {}, extra=True)
            for name in wanted:
                product = _moments(outputs[name])
                found[name] = found[name] + product if name in found else product
        return found


def _moments(vectors: Floats) -> npt.NDArray[np.float64]:
    """Sum of x x^T over vectors [..., width]."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    product: npt.NDArray[np.float64] = (rows.T @ rows).astype(np.float64)
    return product


def _windows(bundle: Bundle) -> npt.NDArray[np.int64]:
    """Token ids [WINDOWS, WINDOW], spread over the shipped text."""
    text = (resource_folder("calibration") / TEXT).read_text(encoding="utf-8")
    ids = np.array(Text(bundle.root).encode(text), np.int64)
    ids = np.resize(ids, max(len(ids), WINDOW))
    starts = np.linspace(0, len(ids) - WINDOW, WINDOWS).astype(int)
    return ids[starts[:, None] + np.arange(WINDOW)]
