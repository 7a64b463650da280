"""The portable graphs of an image encoder: `embed`, `layer_NN`, `bypass_AA-BB`, `policy`, `head`. ONNX opset 24.

States are batch x tokens x hidden: special tokens (class, registers), then the patches. Nothing is kept between inputs,
and one decision is made for a whole picture.
"""

import math

import numpy as np
import onnx_ir as ir

from dash_export.bundle.layout import POOLED, STATES
from dash_export.core.policy import SkipPolicy, Weights
from dash_export.core.units import Unit
from dash_export.graphs.portable.model_writer import ModelWriter
from dash_export.models.encoders import resized
from dash_export.models.spec import (
    CLASS_TOKEN,
    CLASSIFIER,
    PATCH,
    POSITIONS,
    REGISTERS,
    EncoderCheckpoint,
    EncoderSpec,
    Float32Array,
)

SHARPNESS = 1.702
"""Factor in CLIP's approximation of Gelu: x * sigmoid(1.702 x)."""


def embed_graph(checkpoint: EncoderCheckpoint) -> ir.Model:
    """Return the graph pixel_values [batch, 3, height, width] float32 -> hidden_out [batch, tokens, hidden]."""
    spec = checkpoint.spec
    g = EncoderWriter("embed", "Patches with their positions.", spec, checkpoint)
    pixels = g.input("pixel_values", ("batch", 3, *spec.image_size))
    bias = [g.weight(f"{PATCH}.bias")] if "patch" in spec.biased else []
    sides = [spec.patch_size] * 2
    found = g.op(
        "Conv", [pixels, g.weight(f"{PATCH}.weight"), *bias], "embed/patches", kernel_shape=sides, strides=sides
    )
    found = g.op("Reshape", [found, g.constant("embed.rows", [0, 0, -1])], "embed/rows")
    found = g.op("Transpose", [found], "embed/tokens", perm=[0, 2, 1])
    before, places = positions(checkpoint)
    if places is not None:
        found = g.op("Add", [found, g.initializer("embed.positions", places)], "embed/placed")
    if before is not None:
        batch = g.op("Shape", [pixels], "embed/batch", start=0, end=1)
        shape = g.op("Concat", [batch, g.constant("embed.special", before.shape[1:])], "embed/special_shape", axis=0)
        special = g.op("Expand", [g.initializer("embed.before", before), shape], "embed/special")
        found = g.op("Concat", [special, found], "embed/all", axis=1)
    g.state_output(g.layer_norm(found, "model.entry_norm", "embed/norm") if spec.entry_norm else found)
    return g.model()


def positions(checkpoint: EncoderCheckpoint) -> tuple[Float32Array | None, Float32Array | None]:
    """Return the special tokens [1, special, hidden] with their positions, and the positions of the patches [1,
    patches, hidden], for pictures of the spec's size; None where there are none.
    """
    spec, special, places = checkpoint.spec, list[Float32Array](), None
    if spec.class_token:
        special.append(checkpoint.read(CLASS_TOKEN))
    if spec.table_size:
        table_height, table_width = spec.table_size
        height, width = (side // spec.patch_size for side in spec.image_size)
        table = resized(checkpoint.read(POSITIONS), (table_height, table_width), (height, width), spec.antialias)
        own = table.shape[1] - height * width
        places = table[:, own:]
        if own:
            special[0] = special[0] + table[:, :own]
    if spec.registers:
        special.append(checkpoint.read(REGISTERS))
    return np.concatenate(special, axis=1) if special else None, places


def layer_graph(checkpoint: EncoderCheckpoint, layer: int) -> ir.Model:
    """Return the graph of one layer: hidden -> hidden_out [batch, tokens, hidden]."""
    spec, name, own = checkpoint.spec, f"layer_{layer:02d}", f"model.layers.{layer}"
    g = EncoderWriter(name, f"Encoder layer {layer}.", spec, checkpoint)
    hidden = g.state_input()
    normed = g.layer_norm(hidden, f"{own}.norm1", f"{name}/norm1")
    queries, keys, values = (g.linear(normed, f"{own}.{which}", f"{name}/attention/{which}") for which in "qkv")
    if spec.rope_theta:
        queries, keys = (
            g.rotated(value, f"{name}/attention/{which}") for value, which in ((queries, "q"), (keys, "k"))
        )
    found = g.attention(queries, keys, values, f"{name}/attention/attention")
    found = g.linear(found, f"{own}.o", f"{name}/attention/o")
    after = g.added(hidden, found, f"{own}.scale1", f"{name}/after_attention")
    normed = g.layer_norm(after, f"{own}.norm2", f"{name}/norm2")
    g.state_output(g.added(after, g.mlp(normed, own, name), f"{own}.scale2", f"{name}/after_mlp"))
    return g.model()


def head_graph(checkpoint: EncoderCheckpoint) -> ir.Model:
    """Return the graph hidden -> pooled [batch, hidden], states [batch, tokens, hidden] and, where the model has a
    classifier, logits [batch, labels].
    """
    spec = checkpoint.spec
    g = EncoderWriter("head", "Final norm and pooling.", spec, checkpoint)
    hidden = g.state_input()
    normed = g.layer_norm(hidden, "model.norm", "head/norm")
    pooled = g.probed(normed) if spec.pooling == "probe" else g.op("Gather", [normed, g.zero()], "head/class", axis=1)
    g.output(pooled, POOLED, ("batch", spec.hidden_size))
    if spec.labels:
        parts = {"class": pooled, "mean": None}
        if "mean" in spec.classifies:
            _, patches = g.apart(normed, "head")
            parts["mean"] = g.op("ReduceMean", [patches, g.constant("head.tokens", [1])], "head/mean", keepdims=0)
        read = [parts[name] for name in spec.classifies]
        joined = read[0] if len(read) == 1 else g.op("Concat", read, "head/joined", axis=-1)
        assert joined is not None
        g.output(g.linear(joined, CLASSIFIER, "head/classifier"), "logits", ("batch", spec.labels))
    g.output(g.op("Identity", [normed if spec.normed_states else hidden], "head/states"), STATES, g.state_shape)
    return g.model()


def bypass_graph(checkpoint: EncoderCheckpoint, unit: Unit, bypass: Weights) -> ir.Model:
    """Return the graph of a skipped unit, hidden -> hidden_out: hidden + x @ weight + bias, x = hidden normed with unit
    gain; patches and special tokens have a product each. Without weights the state passes unchanged.
    """
    name = unit.bypass
    g = EncoderWriter(name, f"Layers {unit}, skipped: {'linear' if bypass else 'none'} bypass.", checkpoint.spec)
    hidden = g.state_input()
    if not bypass:
        g.state_output(g.op("Identity", [hidden], f"{name}/passed"))
        return g.model()
    special, patches = g.apart(g.unit_norm(hidden, f"{name}/norm"), name)
    update = g.product(patches, bypass, name, f"{name}/patches")
    if special is not None:
        own = {key.removeprefix("special."): array for key, array in bypass.items() if key.startswith("special.")}
        parts = [g.product(special, own, f"{name}.special", f"{name}/special"), update]
        update = g.op("Concat", parts, f"{name}/update", axis=1)
    g.state_output(g.op("Add", [hidden, update], f"{name}/updated"))
    return g.model()


def policy_graph(spec: EncoderSpec, policy: SkipPolicy) -> ir.Model:
    """Return the graph hidden [batch, tokens, hidden], the input of the policy's layer `read`, -> damage [batch, units]
    float32 (the formula of `dash_export/core/policy.py`): infinite for a picture that is foreign.
    """
    network = policy.network
    assert network is not None
    g = EncoderWriter("policy", f"Damage of skipping each unit ({policy.origin}).", spec)
    weights = {name: g.initializer(f"policy.{name}", array) for name, array in network.items()}
    special, patches = g.apart(g.unit_norm(g.state_input(), "policy/norm"), "policy")
    axis = g.constant("policy.tokens", [1])
    mean = g.op("ReduceMean", [patches, axis], "policy/mean", keepdims=0)
    square = g.op("ReduceMean", [g.op("Mul", [patches, patches], "policy/square"), axis], "policy/squares", keepdims=0)
    variance = g.op("Sub", [square, g.op("Mul", [mean, mean], "policy/mean_square")], "policy/variance")
    spread = g.op("Sqrt", [g.op("Relu", [variance], "policy/positive")], "policy/spread")
    features = [mean, spread]
    if special is not None:
        features.insert(0, g.op("Gather", [special, g.zero()], "policy/class", axis=1))
    joined = g.op("Concat", features, "policy/features", axis=-1)
    centred = g.op("Sub", [joined, weights["mean"]], "policy/centred")
    kept = g.op("MatMul", [centred, weights["components"]], "policy/components")
    score = g.op("Add", [g.op("MatMul", [kept, weights["weight"]], "policy/score"), weights["bias"]], "policy/biased")
    far = g.op("ReduceMean", [g.op("Mul", [kept, kept], "policy/kept_square"), axis], "policy/far", keepdims=1)
    inside = g.length(g.op("Mul", [kept, weights["spread"]], "policy/inside"), "policy/within")
    outside = g.op("Sub", [g.length(centred, "policy/length"), inside], "policy/outside")
    found = g.op("Concat", [far, outside], "policy/distances", axis=1)
    over = g.op("Greater", [found, weights["limit"]], "policy/over")
    beyond = g.op("Cast", [over], "policy/each", to=ir.DataType.FLOAT)
    beyond = g.op("ReduceMax", [beyond, axis], "policy/any", keepdims=1)
    foreign = g.op("Greater", [beyond, g.initializer("policy.none", np.array([0.0], np.float32))], "policy/foreign")
    infinite = g.initializer("policy.infinite", np.array([np.inf], np.float32))
    damage = g.op("Where", [foreign, infinite, g.op("Softplus", [score], "policy/softplus")], "policy/damage")
    g.output(damage, "damage", ("batch", len(policy.units)))
    return g.model()


class EncoderWriter(ModelWriter):
    """Writer with the pieces that the graphs of an encoder have in common."""

    spec: EncoderSpec

    @property
    def state_shape(self) -> tuple[str | int, ...]:
        return "batch", self.spec.tokens, self.spec.hidden_size

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

    def rotated(self, value: ir.Value, node: str) -> ir.Value:
        """Rotate the patches of [batch, tokens, hidden] by their places (DINOv3); special tokens stay as they are."""
        tables = zip(("cos", "sin"), rope(self.spec), strict=True)
        cos, sin = (self.initializer(f"rope.{name}", table) for name, table in tables)
        batch = self.op("Shape", [value], f"{node}/batch", start=0, end=1)
        shape = self.op("Concat", [batch, self.constant("rope.tokens", [self.spec.tokens])], f"{node}/shape", axis=0)
        places = self.initializer("rope.places", np.arange(self.spec.tokens)[None])
        places = self.op("Expand", [places, shape], f"{node}/places")
        return self.op("RotaryEmbedding", [value, cos, sin, places], f"{node}/rotary", num_heads=self.spec.num_heads)

    def apart(self, value: ir.Value, node: str) -> tuple[ir.Value | None, ir.Value]:
        """Return (special tokens or None, patches) of [batch, tokens, hidden]."""
        if not self.spec.special:
            return None, value
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
