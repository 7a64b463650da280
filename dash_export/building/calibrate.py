"""Calibration on a text: GPTQ rounding of a bundle's int4 matrices, and the input ranges of its fp8 matrices.

GPTQ (Frantar et al., arXiv 2210.17323) rounds a matrix so that its *product* with its real inputs changes least, not
its weights. It rounds one input's weights at a time, and moves the error that this makes in the product onto the inputs
not yet rounded, as far as the calibration data correlate them. The result is refined once: first the scales, by least
squares for the codes found; then the codes one by one, each the best given all others (cyclic coordinate descent, as
in QuantEase, arXiv 2309.01885).

A layer's inputs are the outputs of the rounded layers before it, so later layers make up for errors of earlier ones.
In memory at a time: the weights and moments of one layer, and the hidden states of the calibration text.
"""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.artifacts import Progress, content_key, sha256_file
from dash_export.building.engine_graphs import Artifact, graphs_key, write_whole
from dash_export.building.graph_runs import Arrays, graph_run, step_inputs
from dash_export.bundle import Bundle
from dash_export.errors import BackendError
from dash_export.graphs.rounded import Rounded, block_of, roundings_key, weight_precision, write_roundings
from dash_export.graphs.surgery import constant_value, load_graph
from dash_export.names import ROUNDINGS, past_names
from dash_export.resources import resource_folder
from dash_export.runtime.cpus import available_memory
from dash_export.runtime.text import Text
from dash_export.targets import CALIBRATED, Precision, Recipe

TEXT = "quantise.txt"
"""Shipped text that int4 and fp8 weights are calibrated on."""
WINDOW = 256
WINDOWS = 64
"""With half as many the squared error on other text is 7 % (MLP's first product) to 29 % (its last) higher."""
BATCH = 8
"""Windows that go through a layer in one run."""
ROUNDING_REVISION = 3
"""Increased when matrices are rounded or stored differently, so that files of an earlier revision are not reused."""

Floats = npt.NDArray[np.float32]
Moments = npt.NDArray[np.float64]


def calibration_key(bundle: Bundle, recipe: Recipe) -> str:
    """Return the key of what calibrated engines depend on besides their own graphs: the text, and the layers whose
    outputs are their inputs. "" where nothing is calibrated.
    """
    if recipe.weights.rounding != "gptq" or not recipe.weights.calibrates:
        return ""
    text = sha256_file(resource_folder("calibration") / TEXT)
    return content_key(text, graphs_key(bundle, ["embed", *_layers(bundle)]))


def rounding_artifact(bundle: Bundle, recipe: Recipe, folder: Path, progress: Progress) -> Artifact:
    """Return the artifact of the file of all int4 roundings and fp8 ranges. Writing it copies the file in the build's
    `folder` where that has the same key, as in a kit. Else it calibrates, and raises BackendError where ONNX Runtime is
    missing; only then, because with a kit's file none is needed.
    """
    weights = recipe.weights
    parts = calibration_key(bundle, recipe), graphs_key(bundle, ["head"]), asdict(weights)
    apart = weights.layers != weights.ungated or weights.bypass == "fp8"  # only then it matters which units there are
    key = content_key(ROUNDING_REVISION, *parts, bundle.manifest.policy.layers if apart else None)

    def write(out: Path) -> list[Path]:
        if roundings_key(folder / ROUNDINGS) == key:
            return [Path(shutil.copy(folder / ROUNDINGS, out))]
        if find_spec("onnxruntime") is None:
            raise BackendError(
                "Calibrated rounding runs the model's layers in ONNX Runtime, and onnxruntime is not installed here. "
                "Run: pip install 'dash-export[cpu,export]'; or build from a kit that a machine with it writes "
                "(--kit), or with --rounding nearest."
            )
        write_roundings(out / ROUNDINGS, key, calibrate_matrices(bundle, recipe, out, progress))
        return [out / ROUNDINGS]

    return Artifact("roundings", key, write, role="aside")


def calibrate_matrices(
    bundle: Bundle, recipe: Recipe, scratch: Path, progress: Progress
) -> Iterator[tuple[str, Rounded | float]]:
    """Yield (node, rounding) for every matrix that the recipe rounds to int4, and (node, largest absolute input) for
    every fp8 matrix: layer by layer, the head last. `scratch`: folder for one layer's float32 weights.
    """
    model, gated = bundle.manifest.model, bundle.manifest.policy.layers
    embed = graph_run(bundle.graph("embed"))
    states = [embed({"input_ids": windows})["hidden_out"] for windows in _windows(bundle)]
    places = step_inputs(model, 0, WINDOW, WINDOW)
    feeds = {
        name: array if name.startswith("rope.") else np.repeat(array, BATCH, axis=0) for name, array in places.items()
    }
    # What other bypasses read is normed, and needs no measuring.
    begins = {unit.first: unit for unit in bundle.manifest.policy.units if model.traits.norms_after}
    empty = np.zeros((BATCH, model.num_kv_heads, WINDOW, model.head_dim), np.float32)
    for layer, name in enumerate(_layers(bundle)):
        graph = load_graph(bundle.graph(name))
        known = [node for node in graph.graph if node.op_type == "MatMul" and str(node.name).endswith("_proj")]
        precisions = {node: weight_precision(str(node.name), recipe.weights, gated) for node in known}
        own_feeds = feeds | dict.fromkeys(past_names(layer), empty)
        if layer in begins and recipe.weights.bypass == "fp8":
            yield f"{begins[layer].bypass}/product", max(map(_largest, states))
        yield from _round_layer(graph, scratch / f"{name}.onnx", precisions, recipe, states, own_feeds)
        states = [found["hidden_out"] for found in _outputs(graph, scratch / f"{name}.onnx", states, own_feeds)]
        progress(f"rounding layer {layer}", layer + 1, model.num_layers)
    if recipe.weights.head in CALIBRATED:
        nodes = {node.name: node for node in load_graph(bundle.graph("head")).graph}
        gain, table = constant_value(nodes["head/norm"].inputs[1]), constant_value(nodes["head/logits"].inputs[1])
        assert gain is not None
        assert table is not None
        scales = (np.sqrt(np.square(state).mean(axis=-1, keepdims=True) + model.rms_norm_eps) for state in states)
        normed = [state / scale * gain for state, scale in zip(states, scales, strict=True)]
        if recipe.weights.head == "fp8":
            yield "head/logits", max(map(_largest, normed))
        else:
            for rounded in _round_group(recipe, [table], np.sum([_moments(state) for state in normed], axis=0)):
                yield "head/logits", rounded
        progress("rounding head", 1, 1)


def _layers(bundle: Bundle) -> list[str]:
    return [f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)]


def _round_layer(
    model: ir.Model,
    file: Path,
    precisions: dict[ir.Node, Precision],
    recipe: Recipe,
    states: list[Floats],
    feeds: Arrays,
) -> Iterator[tuple[str, Rounded | float]]:
    """Round the layer's int4 matrices, in its graph too, and measure the largest input of its fp8 matrices. While it
    measures, the graph's only outputs are the inputs of all these matrices.
    """
    readers: defaultdict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node, precision in precisions.items():
        assert node.inputs[0] is not None
        if precision in CALIBRATED:
            readers[node.inputs[0]].append(node)
    rounded_sources = {source for source, group in readers.items() if "int4" in map(precisions.get, group)}
    rows = max(
        (
            len(matrix)
            for node in precisions
            if precisions[node] == "int4"
            if (matrix := constant_value(node.inputs[1])) is not None
        ),
        default=0,
    )
    if (needed := _INVERSE_BYTES * rows**2) > (free := available_memory()):
        kept = "keep the 4 bits of a GGUF file (--target cpu-gguf), or " * (recipe.engine is None)
        raise BackendError(
            f"Calibrating a matrix of {rows} inputs takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            f"free: {kept}round to the nearest (--rounding nearest)."
        )
    moments: dict[ir.Value, Any] = dict.fromkeys(rounded_sources, 0.0)
    largest = dict.fromkeys(readers, 0.0)
    for source in readers:
        source.type = ir.TensorType(ir.DataType.FLOAT)
    outputs = list(model.graph.outputs)
    model.graph.outputs[:] = list(readers)
    for found in _outputs(model, file, states, feeds) if readers else ():
        for source in readers:
            largest[source] = max(largest[source], _largest(found[str(source.name)]))
            if source in moments:
                moments[source] += _moments(found[str(source.name)])
    model.graph.outputs[:] = outputs
    for source, nodes in readers.items():
        yield from ((str(node.name), largest[source]) for node in nodes if precisions[node] == "fp8")
        group = [node for node in nodes if precisions[node] == "int4"]
        if not group:
            continue
        weights = [node.inputs[1] for node in group]
        matrices = [array for weight in weights if (array := constant_value(weight)) is not None]
        for node, weight, rounded in zip(group, weights, _round_group(recipe, matrices, moments[source]), strict=False):
            assert weight is not None
            weight.const_value = ir.tensor(rounded.dequantized(), name=weight.name)
            yield str(node.name), rounded


def _outputs(model: ir.Model, file: Path, states: list[Floats], feeds: Arrays) -> Iterator[Arrays]:
    """Run a layer on each batch of states, and yield its outputs. A folder beside `file` has it, so named."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        run = graph_run(write_whole(model.clone(), Path(folder) / file.name))
        for state in states:
            yield run(feeds | {"hidden": state})


def _round_group(recipe: Recipe, matrices: list[Floats], moments: Moments) -> Iterator[Rounded]:
    """Round matrices that have the same input. Yield nothing where no block size divides the input: the matrices then
    stay as they are. For ONNX Runtime (`ort`) any block size does: it pads a last, shorter block.
    """
    weights = recipe.weights
    block = weights.block_size if recipe.dialect == "ort" else block_of(len(matrices[0]), weights.block_size)
    if block is not None:
        rounded = gptq(np.concatenate(matrices, axis=1), moments, block, weights.symmetric)
        ends = np.cumsum([matrix.shape[1] for matrix in matrices])
        for end, matrix in zip(ends, matrices, strict=True):
            own = slice(end - matrix.shape[1], end)
            yield Rounded(rounded.codes[:, own], rounded.scales[:, own], rounded.zeros[:, own], block)


def _largest(vectors: Floats) -> float:
    return float(np.abs(vectors).max())


def _moments(vectors: Floats) -> Moments:
    """Return the sum of x x^T over vectors x [..., width]: [width, width]."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    product: Moments = (rows.T @ rows).astype(np.float64)
    return product


def _windows(bundle: Bundle) -> npt.NDArray[np.int64]:
    """Return token ids [WINDOWS / BATCH, BATCH, WINDOW], in windows spread over the shipped text."""
    text = (resource_folder("calibration") / TEXT).read_text(encoding="utf-8")
    tokenizer = Text(bundle.root)
    first, ids = tokenizer.beginning, np.array(tokenizer.encode(text, special=False), np.int64)
    own = WINDOW - len(first)
    ids = np.resize(ids, max(len(ids), own))
    starts = np.linspace(0, len(ids) - own, WINDOWS).astype(int)
    rows = ids[starts[:, None] + np.arange(own)]
    return np.hstack([np.tile(first, (WINDOWS, 1)), rows]).reshape(-1, BATCH, WINDOW)


SHRINK = tuple(1 - 0.03 * step for step in range(12))
"""Shares of a block's range to try: a grid that leaves out the block's extremes is finer for everything else."""
DAMPING = 0.01
"""Share of the mean squared input that is added to every input's own: it bounds the effect of inputs never seen."""
TOP, MIDDLE = 15, 8
"""The largest code of 4 bits, and the code of zero on a symmetric grid."""
_COLUMNS, _SYSTEM_BYTES = 4096, 1 << 30
"""Columns that are rounded together: at most so many, with so much memory for the systems that refine their scales."""
_INVERSE_BYTES = 40
"""Memory for each pair of a matrix's inputs: moments, and what their inverse takes (float64)."""
_STRIDE = 32


def gptq(matrix: Floats, moments: Moments, block: int, symmetric: bool) -> Rounded:
    """Round `matrix` [in, out] to 4 bits, with a scale and a zero point for each column and block of `block` inputs.

    `moments` [in, in]: sum of x x^T over calibration tokens, x the matrix's input. First each block's grid (scale, zero
    point) is chosen, by the squared error weighted with the inputs' mean squares. Then the inputs are rounded, those of
    the largest mean square first (GPTQ's "act-order" with static groups). Columns do not depend on each other. Inputs
    after the last whole block make a shorter one. A first round of refining saves 3 to 7 % of the squared error, two
    more would save another 2 to 4 %.
    """
    rows, columns = matrix.shape
    squares = np.diag(moments).copy()
    mean = squares.mean() if squares.any() else 1.0
    order = np.argsort(-squares, kind="stable")
    damped = moments[np.ix_(order, order)]
    damped[np.diag_indices(rows)] += DAMPING * mean
    # Each row of the inverse's Cholesky factor says how an input's error is shared out among the inputs after it.
    shares = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    shares /= np.diag(shares)[:, None].copy()
    curvature = damped.astype(np.float32)
    del damped
    felt = (curvature / np.diag(curvature)).astype(np.float32)
    weights = (squares / mean + 1e-6).astype(np.float32)
    blocks = -(-rows // block)
    codes = np.empty((rows, columns), np.uint8)
    scales, zeros = np.empty((blocks, columns), np.float32), np.empty((blocks, columns), np.uint8)
    step = min(_COLUMNS, max(1, _SYSTEM_BYTES // (8 * blocks**2)))
    for start in range(0, columns, step):  # the head of a large vocabulary would need gigabytes at once
        part = slice(start, start + step)
        for index in range(blocks):
            inside = slice(index * block, (index + 1) * block)
            scales[index, part], zeros[index, part] = _grid(matrix[inside, part], weights[inside], symmetric)
        wanted, grid = matrix[order, part], order // block
        scale, zero = scales[grid, part], zeros[grid, part].astype(np.float32)
        found = _sweep(wanted, np.zeros_like(wanted), shares, scale, zero, free=True)
        scales[:, part] = _refit(found - zero, scales[:, part], grid, wanted, curvature)
        scale = scales[grid, part]
        values: Floats = (found.astype(np.float32) - zero) * scale
        codes[order, part] = _sweep(values, felt.T @ (values - wanted), felt, scale, zero, free=False)
    return Rounded(codes, scales, zeros, block)


def _sweep(
    values: Floats, pull: Floats, spread: Floats, scales: Floats, zeros: Floats, *, free: bool
) -> npt.NDArray[np.uint8]:
    """Round rows in the order given and return their codes. A row's code is the nearest to its value less `pull`, what
    the errors of other rows add to it; rounding a row adds to `pull`, in place, by `spread` [from, to]. `free` (GPTQ):
    rows to come make up for what rounding missed. Else (coordinate descent) rows to come are still at their `values`,
    and `pull` changes by how far a rounded row has moved from its own.
    """
    rows, columns = values.shape
    codes = np.empty(values.shape, np.uint8)
    for start in range(0, rows, _STRIDE):
        stop = min(start + _STRIDE, rows)
        moved = np.empty((stop - start, columns), np.float32)
        for row in range(start, stop):
            wanted = values[row] - pull[row]
            codes[row] = np.clip(np.rint(wanted / scales[row]) + zeros[row], 0, TOP)
            found = (codes[row] - zeros[row]) * scales[row]
            moved[row - start] = wanted - found if free else found - values[row]
            pull[row + 1 : stop] += spread[row, row + 1 : stop, None] * moved[row - start]
        pull[stop:] += spread[start:stop, stop:].T @ moved
    return codes


def _grid(values: Floats, weights: Floats, symmetric: bool) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Return scale and zero point, per column, of one block [block, columns]: those of least weighted squared error."""
    low, high = np.minimum(values.min(axis=0), 0), np.maximum(values.max(axis=0), 0)
    whole = 2 * np.maximum(-low, high * MIDDLE / (MIDDLE - 1)) if symmetric else high - low
    best = np.full(values.shape[1], np.inf, np.float32)
    scale, zero = np.ones_like(best), np.full_like(best, MIDDLE)
    for share in SHRINK:
        step = np.where(whole > 0, whole * np.float32(share) / TOP, 1).astype(np.float32)
        nearest = np.full_like(best, MIDDLE) if symmetric else np.rint(-low * np.float32((1 + share) / 2) / step)
        for shift in (0,) if symmetric else (-1, 0, 1):
            offset = np.clip(nearest + np.float32(shift), 0, TOP)
            error = (np.clip(np.rint(values / step) + offset, 0, TOP) - offset) * step - values
            squared = weights @ np.square(error)
            better = squared < best
            best = np.where(better, squared, best)
            scale, zero = np.where(better, step, scale), np.where(better, offset, zero)
    return scale, zero.astype(np.uint8)


def _refit(steps: Floats, scales: Floats, grid: npt.NDArray[np.int64], wanted: Floats, curvature: Floats) -> Floats:
    """Return the scales [blocks, out] with which `steps` (codes less zero points, [in, out]) come closest to `wanted`
    in the matrix's product: one blocks x blocks system per column. `grid`: each row's block.
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
