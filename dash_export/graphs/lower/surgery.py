"""Read the graphs of a bundle, chain them, and edit them for lowerings."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir

from dash_export.bundle.records import DAMAGED
from dash_export.errors import BAD_GRAPH, BundleError
from dash_export.graphs.portable.stored import fold_conversions
from dash_export.graphs.portable.writer import INLINE_BYTES, GraphWriter, external, save_graph


def load_graph(path: Path) -> ir.Model:
    """Return a graph, weights as float32 (stored.py). Raises BundleError for a damaged one, and for data elsewhere."""
    try:
        proto = onnx.load(path, load_external_data=False)
        model: ir.Model = ir.from_proto(proto)
        ir.to_proto(model)  # fails for names that are not text: onnx reads them as bytes
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # protobuf and onnx_ir raise many kinds; the file is from outside
        raise BundleError(f"{path} is not a readable ONNX graph ({error}). {DAMAGED}") from error
    if not len(model.graph):
        raise BundleError(f"{path} holds no graph. {DAMAGED}")
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    attributes = [item for node in nodes for item in node.attributes.values()]
    tensors = [value.const_value for value in model.graph.initializers.values()]
    tensors += [item.value for item in attributes if item.type == ir.AttributeType.TENSOR]
    try:
        for tensor in tensors:
            if isinstance(tensor, ir.ExternalTensor):
                _check_external(path, tensor)
        fold_conversions(model)
    except BAD_GRAPH as error:
        raise BundleError(f"{path}: its weights cannot be read ({error}). {DAMAGED}") from error
    return model


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """Raise BundleError unless the tensor's file lies beside the graph (not behind a link), has one name, is whole."""
    location = str(tensor.location)
    file = path.parent / location
    try:
        beside = location not in (".", "..") and Path(location).name == location
        stays = beside and file.resolve().parent == file.parent.resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL byte, a loop of links
        stays = False
    if not stays:
        raise BundleError(
            f"{path}: the external data of {tensor.name} ({location}) leaves the bundle. Do not use this bundle."
        )
    if not file.exists():
        raise BundleError(f"{file}, with {tensor.name}, is missing. {DAMAGED}")
    if file.stat().st_nlink > 1:
        raise BundleError(
            f"{file} has a second name (a hard link), and weights that another name can change are not read. Copy the "
            "bundle (cp -r) and use the copy."
        )
    if tensor.length not in (None, tensor.nbytes):
        raise BundleError(f"{path}: {tensor.name} has another size than its shape. {DAMAGED}")
    if file.stat().st_size < (tensor.offset or 0) + tensor.nbytes:
        raise BundleError(f"{file} is cut short: {tensor.name} is not whole. {DAMAGED}")


def absorb(target: GraphWriter, source: ir.Model, wiring: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """Move all of `source` into `target` and return its outputs by name.

    `wiring` gives the value for an input of `source`; any other input is merged with the target's input of that name,
    or becomes a new one. Initializers of one name are merged (shared tables, shape constants).
    """
    graph, into = source.graph, target.graph
    outputs = {str(value.name): value for value in graph.outputs}
    inputs = {str(value.name): value for value in into.inputs}
    graph.outputs.clear()
    for value in list(graph.inputs):
        graph.inputs.remove(value)
        name = str(value.name)
        if name in wiring:
            value.replace_all_uses_with(wiring[name])
        elif name in inputs:
            value.replace_all_uses_with(inputs[name])
        else:
            into.inputs.append(value)
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        known = into.initializers.get(name)
        if known is None:
            into.register_initializer(value)
        else:
            value.replace_all_uses_with(known)
    nodes = list(graph)
    graph.remove(nodes)
    into.extend(nodes)
    return outputs


def constant_value(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return the array of an initializer, None for anything computed."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def drop_unused_inputs(graph: ir.Graph) -> None:
    """Remove inputs that no node reads any more and that are no output."""
    for value in list(graph.inputs):
        if not value.uses() and value not in graph.outputs:
            graph.inputs.remove(value)


def save_extending(lowered: ir.Model, path: Path, extended: Sequence[Path] = ()) -> list[Path]:
    """Save a lowered graph. Large weights whose bytes the finished engines `extended` have stay in the files of those,
    whatever their names and shapes are there.
    """
    graphs = [load_graph(other).graph for other in extended]
    found = [value.const_value for graph in graphs for value in graph.initializers.values()]
    known = {_digest(tensor): tensor for tensor in found if isinstance(tensor, ir.ExternalTensor)}
    for value in lowered.graph.initializers.values() if known else ():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > INLINE_BYTES and (twin := known.get(_digest(tensor))):
            shape, offset = tensor.shape.numpy(), twin.offset or 0
            value.const_value = external(str(value.name), str(twin.location), tensor.dtype, shape, offset)
    return save_graph(lowered, path, [f"{other.stem}.data" for other in extended])


def _digest(tensor: ir.TensorProtocol) -> bytes:
    return hashlib.sha256(tensor.tobytes()).digest()
