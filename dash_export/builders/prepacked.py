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

from dash_export.graphs.compose import PREPACKED
from dash_export.runtime.backends.onnxruntime import start_thread_pool

PAGE = 4096


def store_prepacked(files: list[Path], folder: Path) -> list[Path]:
    """Append to an engine's weights what its kernels make of them, and tell so in its graph. `files` as `save_graph`
    gives them; weights of other engines that it maps lie in `folder`, and what they tell already is kept.
    """
    graph, *data = files
    model = onnx.load(graph, load_external_data=False)
    if data:
        _append(model, graph, data[0], folder)
    for tensor in model.graph.initializer:
        for prop in tensor.metadata_props:
            tensor.external_data.add(key=prop.key, value=prop.value)
        del tensor.metadata_props[:]
    onnx.save(model, graph)
    return files


def prepacked_bytes(graph: Path) -> int:
    """Of what is stored packed for the tensors of this engine: bytes that it does not read besides."""
    model = onnx.load(graph, load_external_data=False)
    return sum(
        length
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key.startswith(PREPACKED)
        for _, length in _pieces(entry.value)
    )


def _append(model: onnx.ModelProto, graph: Path, data: Path, folder: Path) -> None:
    places = {tensor.name: _place(tensor) for tensor in model.graph.initializer}
    own = {tensor.name: tensor for tensor in model.graph.initializer if places[tensor.name] == data.name}
    with tempfile.TemporaryDirectory(dir=graph.parent) as name, data.open("ab") as file:
        others = {folder / place for place in places.values() if place not in ("", data.name)}
        for path in (graph, data, *others):
            shutil.copy(path, name)
        saved, packed = _saved(Path(name) / graph.name)
        for tensor in saved.graph.initializer:
            for entry in tensor.external_data if tensor.name in own else ():
                if entry.key.startswith(PREPACKED):
                    pieces = []
                    for offset, length in _pieces(entry.value):
                        file.write(bytes(-file.tell() % PAGE))
                        pieces.append(f"{file.tell()};{length};0")
                        file.write(packed[offset : offset + length])
                    told = "|".join([entry.value.partition("|")[0], *pieces])
                    own[tensor.name].metadata_props.add(key=entry.key, value=told)


def _saved(graph: Path) -> tuple[onnx.ModelProto, bytes]:
    """What ONNX Runtime makes of an engine, and the weights of that, packed ones among them."""
    start_thread_pool(0)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    optimized, weights = graph.with_name("optimized.onnx"), graph.with_name("optimized.data")
    options.optimized_model_filepath = str(optimized)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", weights.name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return onnx.load(optimized, load_external_data=False), weights.read_bytes()


def _place(tensor: onnx.TensorProto) -> str:
    """The file that holds it, or nothing."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _pieces(value: str) -> Iterator[tuple[int, int]]:
    """(offset, length) of the buffers that an entry names."""
    for piece in value.split("|")[1:]:
        offset, length, *_ = map(int, piece.split(";"))
        yield offset, length
