"""Calibrated rounding of a bundle's int4 matrices: GPTQ on what the layers are really fed.

GPTQ (Frantar et al., arXiv 2210.17323) rounds a matrix so that its *product* with what the model feeds it changes
least, not its weights: input by input; the error that each rounding makes in the product is moved onto the inputs not
yet rounded, as far as the calibration data say that they go together. What comes out is refined, in turn: scales by
least squares for the codes there are, then code by code what is best beside all others (cyclic coordinate descent, as
QuantEase, arXiv 2309.01885, does it).

A layer is fed by the rounded layers before it, so later ones make up for earlier ones' errors. In memory at a time: one
layer's weights and moments, and the hidden states of the calibration text.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.artifacts import Progress, content_key, sha256_file
from dash_export.building.engine_graphs import Artifact, graphs_key
from dash_export.building.graph_runs import graph_run, step_inputs
from dash_export.bundle import Bundle
from dash_export.errors import BackendError
from dash_export.graphs.rounded import BITS, Rounded, block_of, roundings_key, weight_precision, write_roundings
from dash_export.graphs.surgery import constant_value, load_graph
from dash_export.names import ROUNDINGS
from dash_export.resources import resource_folder
from dash_export.runtime.text import Text
from dash_export.targets import Recipe

TEXT = "quantise.txt"
"""Shipped text that int4 weights are calibrated on."""
WINDOW = 256
WINDOWS = 64
BATCH = 8
"""Windows that go through a layer together."""
ROUNDING_REVISION = 2
"""Raised whenever matrices are rounded or kept otherwise, so that files made by an earlier version are not reused."""

Floats = npt.NDArray[np.float32]


def calibration_key(bundle: Bundle, recipe: Recipe) -> str:
    """What a calibrated engine depends on besides its own graph: the text, and the layers that feed it. Nothing where
    nothing is calibrated.
    """
    if recipe.weights.rounding == "nearest" or not recipe.weights.has_int4:
        return ""
    text = sha256_file(resource_folder("calibration") / TEXT)
    return content_key(text, graphs_key(bundle, ["embed", *_layers(bundle)]))


def rounding_artifact(bundle: Bundle, recipe: Recipe, folder: Path, progress: Progress) -> Artifact:
    """The file of all matrices that the recipe rounds to int4; the one in the build's `folder` where it is of the same,
    as in a kit. Writing it raises BackendError where ONNX Runtime is missing: not before, for a build kit brings it.
    """
    parts = calibration_key(bundle, recipe), graphs_key(bundle, ["head"]), asdict(recipe.weights)
    key = content_key(ROUNDING_REVISION, *parts, bundle.manifest.policy.layers)

    def write(out: Path) -> list[Path]:
        if roundings_key(folder / ROUNDINGS) == key:
            return [Path(shutil.copy(folder / ROUNDINGS, out))]
        if find_spec("onnxruntime") is None:
            raise BackendError(
                "Calibrated rounding runs the model's layers in ONNX Runtime, and onnxruntime is not installed here. "
                "Run: pip install 'dash-export[cpu,export]'; or build from a kit that a machine with it writes "
                "(--kit), or with --rounding nearest."
            )
        write_roundings(out / ROUNDINGS, key, calibrated(bundle, recipe, progress))
        return [out / ROUNDINGS]

    return Artifact("roundings", key, write, role="aside")


def calibrated(bundle: Bundle, recipe: Recipe, progress: Progress) -> Iterator[tuple[str, Rounded]]:
    """(node, rounding) of every matrix that the recipe rounds to int4, layer by layer, the head last."""
    model = bundle.manifest.model
    embed = graph_run(bundle.graph("embed"))
    states = [embed({"input_ids": windows})["hidden_out"] for windows in _windows(bundle)]
    rounds = partial(_is_rounded, bundle, recipe)
    for layer, name in enumerate(_layers(bundle)):
        probe = _Probe(load_graph(bundle.graph(name)), model.num_kv_heads, model.head_dim)
        wanted = {node for node in probe.sources if rounds(node)}
        moments = probe.moments(states, wanted)
        replaced = {}
        for node in sorted(wanted):
            rounded = _rounded(recipe, probe.matrix(node), moments[probe.sources[node]])
            if rounded is not None:
                replaced[node] = rounded.dequantized()
                yield node, rounded
        states = [probe(state, replaced)["hidden_out"] for state in states]
        progress(f"rounding layer {layer}", layer + 1, model.num_layers)
    if rounds("head/logits"):
        rounded = _rounded(recipe, *_head(bundle, states))
        if rounded is not None:
            yield "head/logits", rounded
        progress("rounding head", 1, 1)


def _layers(bundle: Bundle) -> list[str]:
    return [f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)]


def _is_rounded(bundle: Bundle, recipe: Recipe, node: str) -> bool:
    known = node.endswith("_proj") or node == "head/logits"
    return known and weight_precision(node, recipe.weights, bundle.manifest.policy.layers) == "int4"


def _rounded(recipe: Recipe, matrix: Floats, moments: npt.NDArray[np.float64]) -> Rounded | None:
    """None where no block divides the matrix, and it is left as it is. ONNX Runtime pads a last, shorter block."""
    weights = recipe.weights
    block = weights.block_size if recipe.dialect == "ort" else block_of(len(matrix), weights.block_size)
    return None if block is None else gptq(matrix, moments, BITS, block, weights.symmetric)


def _head(bundle: Bundle, states: list[Floats]) -> tuple[Floats, npt.NDArray[np.float64]]:
    """The head's matrix [hidden, vocab] and the moments of what it is fed."""
    graph = load_graph(bundle.graph("head")).graph
    norm = next(node for node in graph if node.op_type == "RMSNormalization")
    table = next(table for node in graph if (table := constant_value(node.inputs[0])) is not None)
    gain, epsilon = constant_value(norm.inputs[1]), norm.attributes["epsilon"].as_float()
    moments = np.zeros((table.shape[1], table.shape[1]))
    for state in states:
        moments += _moments(state / np.sqrt(np.square(state).mean(axis=-1, keepdims=True) + epsilon) * gain)
    return table.T, moments


def _ort_errors(graph: str) -> AbstractContextManager[None]:
    from dash_export.runtime.backends.onnxruntime import ort_errors

    return ort_errors(graph)


class _Probe:
    """A layer graph whose matrices are inputs and whose matrices' inputs are outputs."""

    def __init__(self, model: ir.Model, kv_heads: int, head_dim: int) -> None:
        import onnxruntime as ort  # not there where engines are only compiled

        from dash_export.runtime.backends.onnxruntime import shared_pool_options

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
        with _ort_errors(self._name):
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
        with _ort_errors(self._name):
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
    """Token ids [WINDOWS / BATCH, BATCH, WINDOW], spread over the shipped text."""
    text = (resource_folder("calibration") / TEXT).read_text(encoding="utf-8")
    ids = np.array(Text(bundle.root).encode(text), np.int64)
    ids = np.resize(ids, max(len(ids), WINDOW))
    starts = np.linspace(0, len(ids) - WINDOW, WINDOWS).astype(int)
    return ids[starts[:, None] + np.arange(WINDOW)].reshape(-1, BATCH, WINDOW)


SHRINK = tuple(1 - 0.03 * step for step in range(12))
"""A grid that leaves out a block's extremes is finer for everything else: shares of the range that are tried."""
DAMPING = 0.01
"""Share of the mean squared input that is added to every input's own: what the data have never seen stays bounded."""
REFINEMENTS = 3
"""Turns of refining: together a tenth less squared error (SmolLM2-135M), of which the first turn brings two thirds."""
_COLUMNS = 4096
_STRIDE = 32


def gptq(matrix: Floats, moments: npt.NDArray[np.float64], bits: int, block: int, symmetric: bool) -> Rounded:
    """Round `matrix` [in, out] to `bits` with one scale and zero point per block of `block` inputs and column.

    `moments` [in, in]: sum over calibration tokens of x x^T, x the matrix's input. Grids are fixed first, each block's
    by the squared error weighted with the inputs' mean squares; inputs are then rounded in the order of these, largest
    first (GPTQ's "act-order" with static groups). Columns do not depend on each other. Inputs that no block covers are
    the last, shorter one's.
    """
    rows, columns = matrix.shape
    squares = np.diag(moments).copy()
    mean = squares.mean() if squares.any() else 1.0
    order = np.argsort(-squares, kind="stable")
    damped = moments[np.ix_(order, order)] + np.eye(rows) * (DAMPING * mean)
    curvature = damped.astype(np.float32)
    # The Cholesky factor of the inverse holds, row by row, how an error is shared out among what is left.
    shares = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    weights = (squares / mean + 1e-6).astype(np.float32)
    blocks = -(-rows // block)
    codes = np.empty((rows, columns), np.uint8)
    scales, zeros = np.empty((blocks, columns), np.float32), np.empty((blocks, columns), np.uint8)
    for start in range(0, columns, _COLUMNS):  # the head of a large vocabulary would need gigabytes at once
        part = slice(start, start + _COLUMNS)
        for index in range(blocks):
            inside = slice(index * block, (index + 1) * block)
            scales[index, part], zeros[index, part] = _grid(matrix[inside, part], weights[inside], bits, symmetric)
        wanted, grid = matrix[order, part], order // block
        found = _round(wanted.copy(), shares, scales[grid, part], zeros[grid, part], bits)
        for _ in range(REFINEMENTS):
            steps = found - zeros[grid, part].astype(np.float32)
            scales[:, part] = _refit(steps, scales[:, part], grid, wanted, curvature)
            found = _descend(found, scales[grid, part], zeros[grid, part], wanted, curvature, bits)
        codes[order, part] = found
    return Rounded(codes, scales, zeros, bits, block)


def _grid(values: Floats, weights: Floats, bits: int, symmetric: bool) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Scale and zero point of one block [block, columns], per column."""
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    whole = 2 * np.maximum(-low, high * middle / (middle - 1)) if symmetric else high - low
    best = np.full(values.shape[1], np.inf, np.float32)
    scale, zero = np.ones_like(best), np.full_like(best, middle)
    for share in SHRINK:
        step = np.where(whole > 0, whole * np.float32(share) / top, 1).astype(np.float32)
        nearest = np.full_like(best, middle) if symmetric else np.rint(-low * np.float32((1 + share) / 2) / step)
        for shift in (0,) if symmetric else (-1, 0, 1):
            offset = np.clip(nearest + np.float32(shift), 0, top)
            error = (np.clip(np.rint(values / step) + offset, 0, top) - offset) * step - values
            squared = weights @ np.square(error)
            better = squared < best
            best = np.where(better, squared, best)
            scale, zero = np.where(better, step, scale), np.where(better, offset, zero)
    return scale, zero.astype(np.uint8)


def _round(left: Floats, shares: Floats, scales: Floats, zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[Any]:
    """Codes of rows in the order given. `left`: what is still to be represented; scales and zeros per row."""
    rows, columns = left.shape
    codes = np.empty(left.shape, np.uint8)
    for start in range(0, rows, _STRIDE):
        stop = min(start + _STRIDE, rows)
        errors = np.empty((stop - start, columns), np.float32)
        for row in range(start, stop):
            zero = zeros[row].astype(np.float32)
            code = np.clip(np.rint(left[row] / scales[row]) + zero, 0, (1 << bits) - 1)
            codes[row] = code
            error = (left[row] - (code - zero) * scales[row]) / shares[row, row]
            left[row + 1 : stop] -= shares[row, row + 1 : stop, None] * error
            errors[row - start] = error
        left[stop:] -= shares[start:stop, stop:].T @ errors
    return codes


def _refit(steps: Floats, scales: Floats, grid: npt.NDArray[np.int64], wanted: Floats, curvature: Floats) -> Floats:
    """The scales [blocks, out] with which `steps` (codes less zero points, [in, out]) come closest to `wanted`, a
    blocks x blocks system per column. `grid`: each row's block.
    """
    blocks, columns = scales.shape
    inside = [np.flatnonzero(grid == index) for index in range(blocks)]
    system, right = np.empty((columns, blocks, blocks)), np.empty((columns, blocks, 1))
    pull = curvature @ wanted
    for index, rows in enumerate(inside):
        product = steps * (curvature[:, rows] @ steps[rows])
        system[:, :, index] = np.stack([product[others].sum(axis=0) for others in inside], axis=1)
        right[:, index, 0] = (steps[rows] * pull[rows]).sum(axis=0)
    diagonal = np.einsum("nbb->nb", system)
    diagonal += 1e-6 * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    found = np.linalg.solve(system, right)[..., 0].T
    return np.where(found > 0, found, scales).astype(np.float32)


def _descend(
    codes: npt.NDArray[np.uint8],
    scales: Floats,
    zeros: npt.NDArray[np.uint8],
    wanted: Floats,
    curvature: Floats,
    bits: int,
) -> npt.NDArray[np.uint8]:
    """One pass over all codes, each set to what is best with the others as they are."""
    rows, columns = codes.shape
    codes = codes.copy()
    slope = curvature @ ((codes - zeros.astype(np.float32)) * scales - wanted)
    for start in range(0, rows, _STRIDE):
        stop = min(start + _STRIDE, rows)
        moved = np.empty((stop - start, columns), np.float32)
        for row in range(start, stop):
            best = np.rint(codes[row] - slope[row] / (curvature[row, row] * scales[row]))
            code = np.clip(best, 0, (1 << bits) - 1)
            moved[row - start] = (code - codes[row]) * scales[row]
            codes[row] = code
            slope[row + 1 : stop] += curvature[row + 1 : stop, row, None] * moved[row - start]
        slope[stop:] += curvature[stop:, start:stop] @ moved
    return codes
