"""Weights once more as ONNX Runtime's kernels take them, stored beside the weights.

What a kernel packs while it is loaded is memory of the process's own, for every engine that has the weight. Packed
ahead it is mapped from the file: engines with a weight in common have it in memory once, and so do processes. Before
ONNX Runtime takes a stored one it packs the weight itself and compares: on another kind of CPU, or in another version,
it keeps its own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort

from dash_export.errors import BackendError, BundleError
from dash_export.graphs.compose import PREPACKED
from dash_export.runtime.backends.onnxruntime import shared_pool_options

PACKING_REVISION = 1
"""Raised whenever what is stored changes, so that files made by an earlier version are not reused."""
PAGE = 4096


def store_prepacked(files: list[Path], folder: Path) -> list[Path]:
    """Append to an engine's weights what its kernels make of them, and tell so in its graph. `files` as `save_graph`
    gives them; weights of other engines that it maps lie in `folder`, and what they tell already is kept. Raises
    BackendError where ONNX Runtime does not take the engine.
    """
    graph, *data = files
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:  # of other engines' weights: `load_graph` has put it there
        for prop in [prop for prop in tensor.metadata_props if prop.key.startswith(PREPACKED)]:
            tensor.external_data.add(key=prop.key, value=prop.value)
            tensor.metadata_props.remove(prop)
    if data:
        _append(model, graph, data[0], folder)
    onnx.save(model, graph)
    return files


def prepacked_bytes(graph: Path) -> int:
    """Of an engine's own weights file, what is stored packed. Raises BundleError where the graph is not readable."""
    try:
        model = onnx.load(graph, load_external_data=False)
        own = [tensor for tensor in model.graph.initializer if _place(tensor) == f"{graph.stem}.data"]
        told = [entry.value for tensor in own for entry in tensor.external_data if entry.key.startswith(PREPACKED)]
        return sum(length for value in told for _, length in _pieces(value))
    except Exception as error:  # protobuf raises many kinds; the file may be from outside
        raise BundleError(f"{graph} is damaged ({error}). Delete it and build again.") from error


def _append(model: onnx.ModelProto, graph: Path, data: Path, folder: Path) -> None:
    places = {tensor.name: _place(tensor) for tensor in model.graph.initializer}
    own = {tensor.name: tensor for tensor in model.graph.initializer if places[tensor.name] == data.name}
    with tempfile.TemporaryDirectory(dir=graph.parent) as name, data.open("ab") as file:
        # Copies: onnx and onnx_ir refuse to read weights that have two names, as hard links would.
        others = {folder / place for place in places.values() if place not in ("", data.name)}
        for path in (graph, data, *others):
            shutil.copy(path, name)
        saved, weights = _saved(Path(name) / graph.name)
        with weights.open("rb") as packed:
            for tensor in saved.graph.initializer:
                for entry in tensor.external_data if tensor.name in own else ():
                    if entry.key.startswith(PREPACKED):
                        pieces = []
                        for offset, length in _pieces(entry.value):
                            file.write(bytes(-file.tell() % PAGE))
                            pieces.append(f"{file.tell()};{length};0")
                            packed.seek(offset)
                            piece = packed.read(length)
                            if len(piece) < length:
                                raise BackendError(f"ONNX Runtime did not write all of {graph.name}'s packed weights.")
                            file.write(piece)
                        told = "|".join([entry.value.partition("|")[0], *pieces])
                        own[tensor.name].external_data.add(key=entry.key, value=told)


def _saved(graph: Path) -> tuple[onnx.ModelProto, Path]:
    """What ONNX Runtime makes of an engine, and the file of its weights, packed ones among them."""
    options = shared_pool_options()
    optimized, weights = graph.with_name("optimized.onnx"), graph.with_name("optimized.data")
    options.optimized_model_filepath = str(optimized)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", weights.name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a family of its own
        raise BackendError(f"ONNX Runtime {ort.__version__} does not pack {graph.name}: {error}") from error
    return onnx.load(optimized, load_external_data=False), weights


def _place(tensor: onnx.TensorProto) -> str:
    """The file that holds it, or nothing."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _pieces(value: str) -> Iterator[tuple[int, int]]:
    """(offset, length) of the buffers that an entry names."""
    for piece in value.split("|")[1:]:
        offset, length, *_ = map(int, piece.split(";"))
        yield offset, length
