"""Writer of an encoder's graphs: norms, attention, MLP, pooling, and what exits read."""

import math
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from dash_export.core.exits import LEAST
from dash_export.core.facts import MOST_TOKENS
from dash_export.graphs.portable.model_writer import HIDDEN_SHAPE, ModelWriter
from dash_export.models.spec import EncoderSpec, Float32Array

SHARPNESS = 1.702
"""Factor in CLIP's approximation of Gelu: x * sigmoid(1.702 x)."""


class EncoderWriter(ModelWriter):
    """Writer with the pieces that the graphs of an encoder have in common."""

    spec: EncoderSpec

    @property
    def state_shape(self) -> tuple[str | int, ...]:
        return "batch", self.spec.tokens or HIDDEN_SHAPE[1], self.spec.hidden_size

    def constant(self, name: str, numbers: list[int] | tuple[int, ...]) -> ir.Value:
        return self.initializer(name, np.array(numbers, np.int64))

    def zero(self) -> ir.Value:
        return self.initializer("zero", np.array(0, np.int64))

    def linear(self, value: ir.Value, weight: str, node: str) -> ir.Value:
        product = self.op("MatMul", [value, self.weight(f"{weight}.weight", transpose=True)], node)
        if f"{weight}.bias" not in self.weights:
            return product
        return self.op("Add", [product, self.weight(f"{weight}.bias")], f"{node}/bias")

    def layer_norm(self, value: ir.Value, weight: str, node: str) -> ir.Value:
        parts = [self.weight(f"{weight}.{part}") for part in ("weight", "bias")]
        return self.op("LayerNormalization", [value, *parts], node, axis=-1, epsilon=self.spec.norm_eps)

    def unit_norm(self, value: ir.Value, node: str) -> ir.Value:
        gain = self.initializer("unit_gain", np.ones(self.spec.hidden_size, np.float32))
        return self.op("LayerNormalization", [value, gain], node, axis=-1, epsilon=self.spec.norm_eps)

    def attention(self, queries: ir.Value, keys: ir.Value, values: ir.Value, node: str) -> ir.Value:
        heads = {"q_num_heads": self.spec.num_heads, "kv_num_heads": self.spec.num_heads}
        return self.op("Attention", [queries, keys, values], node, **heads)

    def added(self, state: ir.Value, value: ir.Value, scale: str, node: str) -> ir.Value:
        if scale in self.weights:
            value = self.op("Mul", [value, self.weight(scale)], f"{node}/scaled")
        return self.op("Add", [state, value], node)

    def mlp(self, value: ir.Value, weights: str, node: str) -> ir.Value:
        up = self.linear(value, f"{weights}.up", f"{node}/mlp/up")
        if self.spec.gated:
            gate = self.activated(self.linear(value, f"{weights}.gate", f"{node}/mlp/gate"), f"{node}/mlp/gate")
            up = self.op("Mul", [gate, up], f"{node}/mlp/gated")
        else:
            up = self.activated(up, f"{node}/mlp")
        return self.linear(up, f"{weights}.down", f"{node}/mlp/down")

    def activated(self, value: ir.Value, node: str) -> ir.Value:
        if self.spec.activation in ("gelu", "gelu_tanh"):
            approximate = "tanh" if self.spec.activation == "gelu_tanh" else "none"
            return self.op("Gelu", [value], f"{node}/gelu", approximate=approximate)
        sharp = value
        if self.spec.activation == "quick_gelu":
            factor = self.initializer("sharpness", np.array(SHARPNESS, np.float32))
            sharp = self.op("Mul", [value, factor], f"{node}/sharp")
        return self.op("Mul", [value, self.op("Sigmoid", [sharp], f"{node}/sigmoid")], f"{node}/activated")

    def length(self, value: ir.Value, node: str) -> ir.Value:
        """Return the sum of squares [batch, 1] of [batch, features]."""
        square = self.op("Mul", [value, value], f"{node}/square")
        return self.op("ReduceSum", [square, self.constant("policy.tokens", [1])], node, keepdims=1)

    def exit_read(self, hidden: ir.Value, node: str) -> ir.Value:
        """Return what an exit reads of a state: class token and mean of the patches, normed with unit gain."""
        special, patches = self.apart(hidden, node)
        mean = self.op("ReduceMean", [patches, self.constant("exit.tokens", [1])], f"{node}/mean", keepdims=0)
        parts = [self.unit_norm(mean, f"{node}/patches")]
        if special is not None:
            first = self.op("Gather", [special, self.zero()], f"{node}/class", axis=1)
            parts.insert(0, self.unit_norm(first, f"{node}/first"))
        return self.op("Concat", parts, f"{node}/read", axis=-1) if len(parts) > 1 else parts[0]

    def unit_length(self, value: ir.Value, node: str) -> ir.Value:
        """Return the rows of [batch, hidden], each divided by its length."""
        length = self.op("ReduceL2", [value, self.constant("exit.tokens", [1])], f"{node}/length", keepdims=1)
        least = self.initializer("exit.shortest", np.array(1e-12, np.float32))
        return self.op("Div", [value, self.op("Max", [length, least], f"{node}/some")], node)

    def gap(self, unit: ir.Value, other: ir.Value, node: str) -> ir.Value:
        """Return the logarithm [batch, 1] of 1 - cosine of rows of unit length with those of another array."""
        apart = self.op("Sub", [unit, self.unit_length(other, f"{node}/unit")], f"{node}/apart")
        square = self.op("Mul", [apart, apart], f"{node}/square")
        total = self.op("ReduceSum", [square, self.constant("exit.tokens", [1])], f"{node}/sum", keepdims=1)
        half, least = (self.initializer(f"exit.{name}", np.array(number, np.float32))
                       for name, number in (("half", 0.5), ("least", LEAST)))  # fmt: skip
        raised = self.op("Add", [self.op("Mul", [total, half], f"{node}/half"), least], f"{node}/raised")
        return self.op("Log", [raised], node)

    def rotated(self, value: ir.Value, node: str) -> ir.Value:
        """Rotate the patches of [batch, tokens, hidden] by their places (DINOv3); special tokens stay as they are."""
        tables = zip(("cos", "sin"), rope(self.spec), strict=True)
        cos, sin = (self.initializer(f"rope.{name}", table) for name, table in tables)
        batch = self.op("Shape", [value], f"{node}/batch", start=0, end=1)
        shape = self.op("Concat", [batch, self.constant("rope.tokens", [self.spec.tokens])], f"{node}/shape", axis=0)
        places = self.initializer("rope.places", np.arange(self.spec.tokens)[None])
        places = self.op("Expand", [places, shape], f"{node}/places")
        return self.op("RotaryEmbedding", [value, cos, sin, places], f"{node}/rotary", num_heads=self.spec.num_heads)

    def pooled(self, normed: ir.Value) -> ir.Value:
        """Return the pooled vector [batch, hidden] of normed states."""
        if self.spec.pooling == "probe":
            return self.probed(normed)
        if self.spec.pooling == "mean":
            found = self.op("ReduceMean", [normed, self.constant("pool.tokens", [1])], "head/mean_of_all", keepdims=0)
        else:
            found = self.op("Gather", [normed, self.zero()], "head/class", axis=1)
        for place, dense in enumerate(self.spec.dense):
            found = self.linear(found, f"pool.dense_{place}", f"pool/dense_{place}")
            if dense.activation:
                found = self.op("Tanh", [found], f"pool/dense_{place}/tanh")
        return self.unit_length(found, "pool/unit") if self.spec.unit_length else found

    def apart(self, value: ir.Value, node: str) -> tuple[ir.Value | None, ir.Value]:
        """Return (special tokens or None, patches) of [batch, tokens, hidden]."""
        if not self.spec.special:
            return None, value
        if not self.spec.tokens:  # a text has as many as it has
            ends = [self.constant(f"apart.{name}", [at]) for name, at in (("from", 0), ("to", 1), ("all", MOST_TOKENS))]
            axis = self.constant("apart.axis", [1])
            parts = zip(("special", "others"), pairwise(ends), strict=True)
            first, others = (self.op("Slice", [value, *two, axis], f"{node}/{name}") for name, two in parts)
            return first, others
        sizes = self.constant("special_and_patches", [self.spec.special, self.spec.patches])
        special, patches = self.node("Split", [value, sizes], f"{node}/apart", 2, axis=1)
        return special, patches

    def probed(self, normed: ir.Value) -> ir.Value:
        """Return the pooled vector [batch, hidden] that a learned probe attends for (SigLIP)."""
        probe = self.linear(self.weight("pool.probe"), "pool.q", "pool/q")
        batch = self.op("Shape", [normed], "pool/batch", start=0, end=1)
        shape = self.op("Concat", [batch, self.constant("pool.one", [1, self.spec.hidden_size])], "pool/shape", axis=0)
        keys, values = (self.linear(normed, f"pool.{which}", f"pool/{which}") for which in "kv")
        found = self.attention(self.op("Expand", [probe, shape], "pool/probes"), keys, values, "pool/attention")
        found = self.linear(found, "pool.o", "pool/o")
        found = self.added(
            found, self.mlp(self.layer_norm(found, "pool.norm", "pool/norm"), "pool", "pool"), "", "pool/sum"
        )
        return self.op("Gather", [found, self.zero()], "pool/first", axis=1)


def rope(spec: EncoderSpec) -> tuple[Float32Array, Float32Array]:
    """Return cosines and sines [tokens, head_dim / 2]: of the y and the x of each patch's middle, from -1 to 1, times 2
    pi, times rising frequencies; no rotation for special tokens.
    """
    frequencies = 1 / np.float32(spec.rope_theta) ** np.arange(0, 1, 4 / spec.head_dim, dtype=np.float32)
    sides = [side // spec.patch_size for side in spec.image_size]
    middles = [2 * (np.arange(0.5, side, dtype=np.float32) / np.float32(side)) - 1 for side in sides]
    places = np.stack(np.meshgrid(*middles, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = (np.float32(2 * math.pi) * places[:, :, None] * frequencies).reshape(len(places), -1)
    angles = np.concatenate([np.zeros((spec.special, angles.shape[1]), np.float32), angles])
    return np.cos(angles), np.sin(angles)
