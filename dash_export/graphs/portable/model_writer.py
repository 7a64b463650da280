"""Writer with the pieces that the portable graphs of all kinds of models have in common."""

import numpy as np
import onnx_ir as ir

from dash_export.core.policy import Weights
from dash_export.graphs.portable.stored import StoredWriter, stored_tensors
from dash_export.graphs.portable.writer import external_references
from dash_export.models.spec import AnyCheckpoint, AnySpec

HIDDEN_SHAPE = ("batch", "sequence")


class ModelWriter(StoredWriter):
    """Writer of one portable graph: states, and weights by name as the checkpoint stores them."""

    def __init__(self, name: str, doc: str, spec: AnySpec, checkpoint: AnyCheckpoint | None = None) -> None:
        super().__init__(name, doc)
        self.spec = spec
        self.weights = checkpoint.weights if checkpoint is not None else {}

    def state_input(self) -> ir.Value:
        return self.input("hidden", (*HIDDEN_SHAPE, self.spec.hidden_size))

    def state_output(self, state: ir.Value) -> None:
        self.output(state, "hidden_out", (*HIDDEN_SHAPE, self.spec.hidden_size))

    def weight(self, name: str, transpose: bool = False, file: str = "") -> ir.Value:
        """Return a weight as stored, converted to float32 by nodes. `file`: the file of a weight that graphs share."""
        kind, values = self._stored(name, transpose, file)
        node, turned = f"{self.graph.name}/{name}", transpose and kind not in ("", "Cast")
        found = self.as_float(kind, values, f"{node}/rows" if turned else node)
        found = self.op("Transpose", [found], node, perm=[1, 0]) if turned else found
        found.name = name
        return found

    def looked_up(self, name: str, ids: ir.Value, file: str) -> ir.Value:
        return self.gathered(*self._stored(name, False, file), ids)

    def _stored(self, name: str, transpose: bool, file: str) -> tuple[str, list[ir.Value]]:
        kind, tensors = stored_tensors(name, self.weights[name], transpose)
        return kind, [
            self.initializer(str(item.name), item) for item in (external_references(tensors, file) if file else tensors)
        ]

    def product(self, value: ir.Value, matrices: Weights, name: str, node: str) -> ir.Value:
        """Return value @ weight + bias of a bypass, whose weight is stored in float16."""
        stored = self.initializer(f"{name}.weight.stored", matrices["weight"].astype(np.float16))
        weight = self.op("Cast", [stored], f"{node}/weight", to=ir.DataType.FLOAT)
        weight.name = f"{name}.weight"
        found = self.op("MatMul", [value, weight], f"{node}/product")
        return self.op("Add", [found, self.initializer(f"{name}.bias", matrices["bias"])], f"{node}/biased")
