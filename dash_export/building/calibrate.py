"""Calibration on a text: GPTQ rounding of a bundle's int4 matrices, and the input ranges of its fp8 matrices.

A layer's inputs are the outputs of the rounded layers before it, so later layers make up for errors of earlier ones.
In memory at a time: the weights and moments of one layer, and the hidden states of the calibration text. A calibration
that was killed goes on after its last whole layer.
"""

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.backends.base import has_reference
from dash_export.backends.host.cpus import available_memory
from dash_export.building.engine_graphs import graphs_key, write_whole
from dash_export.building.gptq import Floats, Moments, gptq
from dash_export.building.graph_runs import Arrays, graph_run, step_inputs
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import CALIBRATION, ROUNDINGS, past_names
from dash_export.bundle.recipe import CALIBRATED, Precision, Recipe
from dash_export.errors import BackendError
from dash_export.files.artifacts import TEMPORARY, Artifact, ArtifactStore, Progress, content_key, sha256_file
from dash_export.files.outputs import own_folder
from dash_export.files.resources import resource_folder
from dash_export.graphs.lower.rounded import (
    Rounded,
    block_of,
    roundings_key,
    roundings_lookup,
    weight_precision,
    write_roundings,
)
from dash_export.graphs.lower.surgery import constant_value, load_graph
from dash_export.text.tokenizer import Text

TEXT = "quantise.txt"
"""Shipped text that int4 and fp8 weights are calibrated on."""
WINDOW = 256
WINDOWS = 64
"""With half as many the squared error on other text is 7 % (MLP's first product) to 29 % (its last) higher."""
BATCH = 16
"""Windows that go through a layer in one run."""
ROUNDING_REVISION = 3
"""Increased when matrices are rounded or stored differently, so that files of an earlier revision are not reused."""

_INVERSE_BYTES = 40
"""Memory for each pair of a matrix's inputs: moments, their factor and what these take meanwhile (float64)."""


def calibration_key(bundle: Bundle, recipe: Recipe) -> str:
    """Return the key of what calibrated engines depend on besides their own graphs: the text, and the layers whose
    outputs are their inputs. "" where nothing is calibrated, as for an encoder.
    """
    if bundle.manifest.model.decides == "input" or recipe.weights.rounding != "gptq" or not recipe.weights.calibrates:
        return ""
    text = sha256_file(resource_folder("calibration") / TEXT)
    return content_key(text, graphs_key(bundle, ["embed", *_layers(bundle)]))


def rounding_artifact(bundle: Bundle, recipe: Recipe, folder: Path, progress: Progress) -> Artifact:
    """Return the artifact of the file of all int4 roundings and fp8 ranges. Writing it copies the file in the build's
    `folder` where that has the same key, as one that came with the bundle. Else it calibrates, keeping whole layers in
    `folder` in case it is killed, and raises BackendError where ONNX Runtime is missing; only then.
    """
    weights = recipe.weights
    parts = calibration_key(bundle, recipe), graphs_key(bundle, ["head"]), asdict(weights)
    apart = weights.layers != weights.ungated or weights.bypass == "fp8"  # only then it matters which units there are
    key = content_key(ROUNDING_REVISION, *parts, bundle.manifest.policy.layers if apart else None)

    def write(out: Path) -> list[Path]:
        if roundings_key(folder / ROUNDINGS) == key:
            return [Path(shutil.copy(folder / ROUNDINGS, out))]
        if not has_reference():
            raise BackendError(
                "Calibrated rounding runs the model's layers in ONNX Runtime, and onnxruntime is not installed here. "
                "Run: pip install 'dash-export[cpu,export]'; or lower the graphs on a machine that has it (`build` "
                "there, and copy the bundle), or build with --rounding nearest."
            )
        layers = ArtifactStore(own_folder(folder / CALIBRATION))
        write_roundings(out / ROUNDINGS, key, calibrate_matrices(bundle, recipe, layers, key, progress))
        return [out / ROUNDINGS]

    return Artifact("roundings", key, write, role="aside")


def calibrate_matrices(
    bundle: Bundle, recipe: Recipe, store: ArtifactStore, key: str, progress: Progress
) -> Iterator[tuple[str, Rounded | float]]:
    """Yield (node, rounding) for every matrix that the recipe rounds to int4, and (node, largest absolute input) for
    every fp8 matrix: layer by layer, the head last. What `store` has of a layer, under `key`, is not computed again.
    """
    model, gated = bundle.manifest.decoder, bundle.manifest.policy.layers
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
        scratch = store.folder / f"{name}.onnx"
        if store.current(name, key) is None:
            found = _round_layer(graph, scratch, precisions, recipe, states, own_feeds)
            store.make(name, key, partial(_write_layer, f"{name}.npz", key, found))
        rounded = roundings_lookup(store.folder / f"{name}.npz")
        for node in known:
            if (kept := rounded(str(node.name))) is not None:
                yield str(node.name), kept
            if isinstance(kept, Rounded) and (weight := node.inputs[1]) is not None:
                weight.const_value = ir.tensor(kept.dequantized(), name=weight.name)
        states = [outputs["hidden_out"] for outputs in _outputs(graph, scratch, states, own_feeds)]
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
            moments: Moments | None = None
            for state in normed:
                moments = _with_moments(moments, state)
            assert moments is not None
            for matrix in _round_group(recipe, [table], moments):
                yield "head/logits", matrix
        progress("rounding head", 1, 1)


def _write_layer(file: str, key: str, found: Iterable[tuple[str, Rounded | float]], out: Path) -> list[Path]:
    write_roundings(out / file, key, found)
    return [out / file]


def _layers(bundle: Bundle) -> list[str]:
    return [f"layer_{layer:02d}" for layer in range(bundle.manifest.decoder.num_layers)]


def _round_layer(
    model: ir.Model,
    file: Path,
    precisions: dict[ir.Node, Precision],
    recipe: Recipe,
    states: list[Floats],
    feeds: Arrays,
) -> Iterator[tuple[str, Rounded | float]]:
    """Round the layer's int4 matrices, and measure the inputs of its fp8 ones, as the graph's only outputs."""
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
        kept = "keep the 4 bits of a GGUF file (--target cpu-gguf), or " * (not recipe.on_device)
        raise BackendError(
            f"Calibrating a matrix of {rows} inputs takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            f"free: {kept}round to the nearest (--rounding nearest)."
        )
    moments = dict[ir.Value, Moments]()
    largest = dict.fromkeys(readers, 0.0)
    for source in readers:
        source.type = ir.TensorType(ir.DataType.FLOAT)
    outputs = list(model.graph.outputs)
    model.graph.outputs[:] = list(readers)
    for found in _outputs(model, file, states, feeds) if readers else ():
        for source in readers:
            largest[source] = max(largest[source], _largest(found[str(source.name)]))
            if source in rounded_sources:
                moments[source] = _with_moments(moments.get(source), found[str(source.name)])
    model.graph.outputs[:] = outputs
    for source, nodes in readers.items():
        yield from ((str(node.name), largest[source]) for node in nodes if precisions[node] == "fp8")
        group = [node for node in nodes if precisions[node] == "int4"]
        if not group:
            continue
        matrices = [array for node in group if (array := constant_value(node.inputs[1])) is not None]
        for node, rounded in zip(group, _round_group(recipe, matrices, moments[source]), strict=False):
            yield str(node.name), rounded


def _outputs(model: ir.Model, file: Path, states: list[Floats], feeds: Arrays) -> Iterator[Arrays]:
    """Run a layer on each batch of states, and yield its outputs. A folder beside `file` has it, so named."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f"{TEMPORARY}{os.getpid()}-") as folder:
        run = graph_run(write_whole(model.clone(), Path(folder) / file.name))
        for state in states:
            yield run(feeds | {"hidden": state})


def _round_group(recipe: Recipe, matrices: list[Floats], moments: Moments) -> Iterator[Rounded]:
    """Round matrices of the same input; nothing where no block size divides it. A CPU build pads a shorter block."""
    weights = recipe.weights
    block = block_of(len(matrices[0]), weights.block_size) if recipe.on_device else weights.block_size
    if block is not None:
        rounded = gptq(np.concatenate(matrices, axis=1), moments, block, weights.symmetric)
        ends = np.cumsum([matrix.shape[1] for matrix in matrices])
        for end, matrix in zip(ends, matrices, strict=True):
            own = slice(end - matrix.shape[1], end)
            yield Rounded(rounded.codes[:, own], rounded.scales[:, own], rounded.zeros[:, own], block)


def _largest(vectors: Floats) -> float:
    return float(np.abs(vectors).max())


def _with_moments(total: Moments | None, vectors: Floats) -> Moments:
    """Return `total`, changed, plus the sum of x x^T over vectors x [..., width]: [width, width]."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    product: Floats = rows.T @ rows
    if total is None:
        return product.astype(np.float64)
    return np.add(total, product, out=total)


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
