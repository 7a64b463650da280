"""A thin layer over onnx_ir: nodes by name, weights straight from the checkpoint into external data, atomic files."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export import __version__
from dash_export.models.spec import Weight, row_blocks

OPSET = 24
INLINE_BYTES = 16 << 10
"""Size up to which a tensor is in the .onnx file, where a reader sees it; larger ones are external, and mapped."""
PAGE = 4096

Shape = Sequence[int | str]


class GraphWriter:
    """Writer of one graph. Every value and node has the name that the caller gives it."""

    def __init__(self, name: str, doc: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET}, doc_string=doc)

    def input(self, name: str, shape: Shape, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return the input of that name; add it where there is none yet."""
        for known in self.graph.inputs:
            if known.name == name:
                return known
        value = ir.val(name, dtype, shape)
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Shape, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        """Make a value an output."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self.graph.outputs.append(value)

    def initializer(self, name: str, tensor: ir.TensorProtocol | npt.NDArray[Any]) -> ir.Value:
        return constant(self.graph, name, tensor)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Append a node and return its outputs: a single one is named as the node, several are `<name>/<index>`."""
        node = ir.node(op_type, inputs, attributes or None, domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = name if outputs == 1 else f"{name}/{index}"
        self.graph.append(node)
        return list(node.outputs)

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Append a node with one output, and return that."""
        return self.node(op_type, inputs, name, 1, **attributes)[0]

    def split(self, value: ir.Value, sizes: Sequence[int], constant: str, name: str) -> list[ir.Value]:
        """Split the last axis of `value` into parts of these sizes, which the initializer `constant` has."""
        return self.node("Split", [value, self.initializer(constant, np.array(sizes))], name, len(sizes), axis=-1)

    def model(self) -> ir.Model:
        return ir.Model(self.graph, ir_version=11, producer_name="dash-export", producer_version=__version__)


def constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol | npt.NDArray[Any]) -> ir.Value:
    """Return the graph's initializer of that name; register it where there is none yet."""
    known = graph.initializers.get(name)
    if known is not None:
        return known
    if isinstance(tensor, np.ndarray):
        tensor = ir.tensor(np.asarray(tensor, order="C"), name=name)
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


def lazy_weight(
    name: str, weight: Weight, transpose: bool = False, dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.LazyTensor:
    """Return a checkpoint tensor that is read only when it is written: [out, in] or, transposed, [in, out]."""
    shape = tuple(reversed(weight.shape)) if transpose else weight.shape

    def read() -> ir.TensorProtocol:
        # Filled block by block: never more than one full-size array plus one block in memory.
        array: npt.NDArray[Any] = np.empty(shape, dtype.numpy())
        start = 0
        for block in row_blocks(weight):
            target = array.T if transpose else array
            target[start : start + len(block)] = block
            start += len(block)
        return ir.Tensor(array, name=name)

    return ir.LazyTensor(read, dtype, ir.Shape(shape), name=name)


def external(name: str, location: str, dtype: ir.DataType, shape: Sequence[int], offset: int = 0) -> ir.ExternalTensor:
    """Return a reference to a tensor in a file that another graph wrote."""
    length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return ir.ExternalTensor(location, offset, int(length), dtype, shape=ir.Shape(shape), name=name, base_dir="")


def save_graph(model: ir.Model, path: Path, shared: Collection[str] = ()) -> list[Path]:
    """Write `path` and, where the graph has large weights of its own, `<stem>.data` beside it. Return the files
    written.

    External tensors whose location is in `shared` are files other graphs use too: they stay references. Weights are
    aligned to pages so that a runtime maps them. The caller gives a temporary folder and renames.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        apart = isinstance(tensor, ir.ExternalTensor) and str(tensor.location) not in shared
        if tensor is not None and (apart or isinstance(tensor, ir.LazyTensor)) and tensor.nbytes <= INLINE_BYTES:
            # Read now: during serialisation a fault of the tensor would become an error of onnx_ir's, and a reference
            # would point to no file.
            value.const_value = ir.Tensor(tensor.numpy(), name=tensor.name)
    own = [value for value in model.graph.initializers.values() if _is_own(value.const_value, shared)]
    files = [path]
    if own:
        data = path.with_suffix(".data")
        tensors = [value.const_value for value in own if value.const_value is not None]
        written = ir.external_data.convert_tensors_to_external(
            tensors, path.parent, data.name, alignment=PAGE, align_threshold=INLINE_BYTES
        )
        for value, tensor in zip(own, written, strict=True):
            value.const_value = tensor
        files.append(data)
    ir.save(model, path)
    return files


def _is_own(tensor: ir.TensorProtocol | None, shared: Collection[str]) -> bool:
    if tensor is None or (isinstance(tensor, ir.ExternalTensor) and str(tensor.location) in shared):
        return False
    return tensor.nbytes > INLINE_BYTES


def external_references(tensors: Iterable[ir.LazyTensor], location: str) -> list[ir.ExternalTensor]:
    """Return references to the tensors in a file that `save_placed` wrote."""
    start, found = 0, []
    for tensor in tensors:
        found.append(external(str(tensor.name), location, tensor.dtype, tensor.shape.numpy(), start))
        start += -(-tensor.nbytes // PAGE) * PAGE
    return found


def save_placed(path: Path, tensors: Sequence[ir.LazyTensor]) -> None:
    """Write tensors that several graphs read, each on pages of its own."""
    with path.open("wb") as file:
        for tensor, place in zip(tensors, external_references(tensors, path.name), strict=True):
            file.seek(place.offset or 0)
            file.write(tensor.tobytes())
