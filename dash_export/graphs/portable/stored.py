"""Weights of a portable graph as the checkpoint stores them, and as a lowering takes them.

In a bundle a matrix has its checkpoint's bytes. A Cast converts 16-bit floats, a function the blocks of a GGUF file
(ggml.py). Matrices of any other type, and all vectors, are stored as float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.bundle.records import DAMAGED
from dash_export.errors import BundleError
from dash_export.graphs.portable.ggml import BLOCKS, DOMAIN, block_function, dequantized, split_blocks
from dash_export.graphs.portable.writer import GraphWriter, lazy_weight
from dash_export.models.spec import Weight

STORED = "stored"
"""Key in the `meta` of a restored matrix: its `Stored` blocks, if it is made of blocks."""
_TURNED = "turned"
_FLOATS = {"F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Stored:
    """The blocks of a matrix [out, in]: factors [out, blocks, factors], and all other bytes [out, blocks, bytes]."""

    kind: str
    factors: ir.TensorProtocol
    others: ir.TensorProtocol

    def read(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
        """Return (factors, other bytes). Raises BundleError for factors that are NaN or infinite."""
        factors = self.factors.numpy()
        if not np.isfinite(factors).all():
            raise BundleError(f"{self.factors.name:.100} has numbers that are none. {DAMAGED}")
        return factors, self.others.numpy()


class StoredWriter(GraphWriter):
    """Writer of a graph with weights as they are stored, which nodes convert."""

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc)
        self._functions: set[str] = set()

    def as_float(self, kind: str, values: Sequence[ir.Value], node: str) -> ir.Value:
        """Return the weight of a kind's tensors (`stored_tensors`), float32."""
        if not kind:
            return values[0]
        if kind == "Cast":
            return self.op("Cast", values, node, to=ir.DataType.FLOAT)
        self._functions.add(kind)
        return self.node(kind, values, node, 1, DOMAIN)[0]

    def gathered(self, kind: str, values: Sequence[ir.Value], ids: ir.Value) -> ir.Value:
        """Return rows of the embedding, gathered before their conversion: ONNX Runtime would convert all of it."""
        rows = [self.op("Gather", [value, ids], f"embed/{value.name}" if kind else "embed") for value in values]
        return self.as_float(kind, rows, "embed")

    def model(self) -> ir.Model:
        model = super().model()
        for kind in sorted(self._functions):
            made = block_function(kind)
            model.functions[made.identifier()] = made
            model.graph.opset_imports[DOMAIN] = 1
        return model


def stored_tensors(name: str, weight: Weight, transpose: bool) -> tuple[str, list[ir.LazyTensor]]:
    """Return (kind, tensors) of a weight: "" and the float32 weight; "Cast" and the 16-bit weight; or a block type with
    its factors and its other bytes, which are never transposed.
    """
    if len(weight.shape) == 2 and weight.packed is not None and weight.dtype in BLOCKS:
        return weight.dtype, _blocks(name, weight)
    if len(weight.shape) == 2 and weight.dtype in _FLOATS:
        return "Cast", [lazy_weight(f"{name}.stored", weight, transpose, _FLOATS[weight.dtype])]
    return "", [lazy_weight(name, weight, transpose)]


def _blocks(name: str, weight: Weight) -> list[ir.LazyTensor]:
    block, packed, (rows, columns) = BLOCKS[weight.dtype], weight.packed, weight.shape

    def read(which: int) -> ir.TensorProtocol:
        assert packed is not None
        parts = split_blocks(weight.dtype, packed(0, rows))
        weight.check_finite(parts[0], 0, rows)
        return ir.Tensor(parts[which], name=names[which])

    names, dtypes = (f"{name}.factors", f"{name}.blocks"), (ir.DataType.FLOAT16, ir.DataType.UINT8)
    shapes = [ir.Shape((rows, columns // block.weights, last)) for last in (block.factors, sum(block.fields))]
    return [ir.LazyTensor(partial(read, which), dtypes[which], shapes[which], name=names[which]) for which in range(2)]


def fold_conversions(model: ir.Model) -> None:
    """Replace every node that only converts constants by its result: float32, read on demand. Raises BundleError for
    blocks of an unknown type or of another shape, and for a constant that is converted twice.
    """
    graph, seen = model.graph, set[str]()
    for node in list(graph):
        lookups = _lookups(node)
        values = [lookup.inputs[0] for lookup in lookups] or list(node.inputs)
        tensors = [value.const_value for value in values if value is not None and value.is_initializer()]
        if None in tensors or len(tensors) < len(values):
            continue
        (output,) = node.outputs
        name = str(output.name)
        if lookups:  # the parts of a table are named `<table>.<part>`
            name = str(values[0].name).rpartition(".")[0] or name  # type: ignore[union-attr]
        if (found := _restored(node, name, tensors)) is None:
            continue
        if twice := seen & (sources := {str(one.name) for one in values if one is not None}):
            raise BundleError(f"{min(twice):.100} is converted twice. {DAMAGED}")
        seen |= sources
        value = ir.val(name, const_value=found)
        graph.register_initializer(value)
        given = value
        if lookups:
            again = ir.node("Gather", [value, lookups[0].inputs[1]], name=node.name)
            graph.insert_before(node, again)
            (given,) = again.outputs
            given.name = output.name
        output.replace_all_uses_with(given, replace_graph_outputs=True)
        graph.remove([node, *lookups], safe=True)
        for source in set(values):
            if source is not None and not source.uses():
                del graph.initializers[str(source.name)]
    model.functions.clear()
    model.opset_imports.pop(DOMAIN, None)


def _lookups(node: ir.Node) -> list[ir.Node]:
    """Return the Gather nodes of an embedding whose rows `node` converts, all by the same ids; [] for other nodes."""
    found = [value.producer() for value in node.inputs if value is not None]
    sound = [
        item for item in found if item is not None and item.op_type == "Gather" and not (item.attributes or item.domain)
    ]
    same = len(sound) == len(node.inputs) and len({*(item.inputs[1] for item in sound), None}) == 2
    alone = all(len(item.outputs[0].uses()) == 1 for item in sound)
    return sound if same and alone and (node.op_type == "Cast" or node.domain == DOMAIN) else []


def _restored(node: ir.Node, name: str, tensors: Sequence[Any]) -> ir.LazyTensor | None:
    shapes = [tuple(tensor.shape.numpy()) for tensor in tensors]

    def lazy(make: Callable[[], npt.NDArray[Any]], shape: Sequence[int]) -> ir.LazyTensor:
        return ir.LazyTensor(lambda: ir.Tensor(make(), name=name), ir.DataType.FLOAT, ir.Shape(shape), name=name)

    made = isinstance(tensors[0], ir.LazyTensor)  # by `fold_conversions`: transpose it once, never cast again
    if node.op_type == "Cast" and node.attributes["to"].value == ir.DataType.FLOAT and not made:
        return lazy(lambda: tensors[0].numpy().astype(np.float32), shapes[0])
    turned = made and tensors[0].meta.get(_TURNED)
    turns = node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]
    if turns and not turned and len(shapes[0]) == 2 and tensors[0].dtype == ir.DataType.FLOAT:
        found = lazy(lambda: np.ascontiguousarray(tensors[0].numpy().T), shapes[0][::-1])
        found.meta.update({**getattr(tensors[0], "meta", {}), _TURNED: True})
        return found
    if node.domain != DOMAIN:
        return None
    block = BLOCKS.get(node.op_type)
    if block is not None and len(tensors) == 2 and all(len(shape) == 3 for shape in shapes):
        rows, blocks, _ = shapes[0]
        kinds = [
            (rows, blocks, block.factors, ir.DataType.FLOAT16),
            (rows, blocks, sum(block.fields), ir.DataType.UINT8),
        ]
        if [(*shape, tensor.dtype) for shape, tensor in zip(shapes, tensors, strict=True)] == kinds:
            stored = Stored(node.op_type, *tensors)
            found = lazy(lambda: dequantized(stored.kind, *stored.read()), (rows, blocks * block.weights))
            found.meta[STORED] = stored
            return found
    raise BundleError(f"{name:.100} is no {node.op_type:.100} of {DOMAIN}. {DAMAGED}")
