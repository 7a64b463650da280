"""The `ort` dialect: the parts of a model in the operators that ONNX Runtime runs best on a CPU.

Weights are taken by name from the portable graphs; all else is written here, in the order in which it runs. Attention
is one GroupQueryAttention, which writes the cache too (inputs `seqlens_k` [batch] int32 and `total_length` [1] int32
replace mask, positions and write indices). Add and the norm after it are one node. Projections that read one value are
one matrix: wide ones stream faster. Weights are quantised as the recipe says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.graphs.ort_quantize import ACCURACY_LEVEL, BITS, CONTRIB, quantize_block, quantized
from dash_export.graphs.portable import EMBED_WEIGHT, HEAD_WEIGHT, HIDDEN_SHAPE
from dash_export.graphs.rounded import Roundings, to_nearest, weight_precision
from dash_export.graphs.writer import GraphWriter
from dash_export.manifest import Manifest
from dash_export.models.spec import FINAL_NORM
from dash_export.names import new_names, past_names, present_names, short_name
from dash_export.targets import Recipe

ROTARY_MULTIPLE = 16
"""GroupQueryAttention rotates only heads whose size is a multiple of this."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sum:
    """left + right, [batch, sequence, hidden], not computed yet: the norm that reads it gives it too."""

    left: ir.Value
    right: ir.Value
    name: str


State = ir.Value | Sum


def write(
    name: str,
    doc: str,
    parts: Mapping[str, ir.Model],
    manifest: Manifest,
    recipe: Recipe,
    roundings: Roundings = to_nearest,
) -> ir.Model:
    """An engine of portable graphs, by name and in their order: `embed`, layers and `head`, with the `policy` that
    reads what enters one of them; a bypass; or a bypass and then its unit's layers, of which `skipped` [batch,
    sequence, 1] bool chooses row by row: the state, and the K and V that later tokens attend to.
    """
    g = OrtWriter(name, doc, parts, manifest, recipe, roundings)
    entering = g.embed() if "embed" in parts else g.input("hidden", (*HIDDEN_SHAPE, manifest.model.hidden_size))
    chosen: dict[int, tuple[ir.Value, ir.Value]] = {}
    bypass = next((part for part in parts if part.startswith("bypass")), None)
    layers = [int(part.removeprefix("layer_")) for part in parts if part.startswith("layer_")]
    if bypass is not None:
        bypassed, chosen = g.bypass(bypass, entering)
        if not layers:
            g.state_output(bypassed)
            g.new_rows(bypass, chosen)
            return g.model()
        skipped = g.input("skipped", ("batch", "sequence", 1), ir.DataType.BOOL)
    state: State = entering
    for layer in layers:
        state = g.layer(layer, state, (skipped, *chosen[layer]) if bypass is not None else None)
    if "policy" in parts:
        g.policy(manifest.policy.read)
    if "head" in parts:
        g.head(state)
    elif bypass is not None:
        g.state_output(g.op("Where", [skipped, bypassed, g.computed(state)], "hidden_chosen"))
    else:
        g.state_output(g.computed(state))
    return g.model()


class OrtWriter(GraphWriter):
    """An engine in the making; one method per part."""

    def __init__(
        self,
        name: str,
        doc: str,
        parts: Mapping[str, ir.Model],
        manifest: Manifest,
        recipe: Recipe,
        roundings: Roundings,
    ) -> None:
        super().__init__(name, doc)
        self.graph.opset_imports[CONTRIB] = 1
        self.facts, self.gated = manifest.model, manifest.policy.layers
        self.recipe, self.roundings = recipe.weights, roundings
        self.weights = {
            weight: value.const_value
            for part in parts.values()
            for weight, value in part.graph.initializers.items()
            if value.const_value is not None
        }
        self.entering: dict[int, ir.Value] = {}
        """What enters each layer."""

    def array(self, weight: str) -> Floats:
        array: Floats = self.weights[weight].numpy()
        return array

    def stored(self, weight: str) -> ir.Value:
        """A portable graph's constant as it is."""
        return self.initializer(weight, self.weights[weight])

    def state_output(self, state: ir.Value) -> None:
        self.output(state, "hidden_out", (*HIDDEN_SHAPE, self.facts.hidden_size))

    # Parts of a model

    def embed(self) -> ir.Value:
        ids = self.input("input_ids", HIDDEN_SHAPE, ir.DataType.INT64)
        bits, block = BITS.get(self.recipe.embedding), self.recipe.block_size
        if bits is None:
            return self.op("Gather", [self.stored(EMBED_WEIGHT), ids], "embed")
        table = self.array(EMBED_WEIGHT)
        # The quantiser blocks the first axis of [in, out]: rows of the table are columns there.
        codes, scales, zeros = quantize_block(np.ascontiguousarray(table.T), bits, block, self.recipe.symmetric)
        packed, scale, zero = self.blocks(EMBED_WEIGHT, bits, codes.reshape(len(table), -1), scales, zeros)
        inputs = [packed, ids, scale, *([] if zero is None else [zero])]
        return self.contrib(
            "GatherBlockQuantized", inputs, "embed", bits=bits, block_size=block, gather_axis=0, quantize_axis=1
        )

    def layer(self, layer: int, state: State, choice: tuple[ir.Value, ir.Value, ir.Value] | None) -> State:
        """`choice`: which rows are skipped, and K and V of these."""
        name, weights = f"layer_{layer:02d}", f"model.layers.{layer}."
        normed, hidden = self.norm(state, f"{weights}input_layernorm.weight", f"{name}/input_layernorm")
        self.entering[layer] = hidden
        mixed = self.attention(layer, normed, choice)
        mixed = self.projections(mixed, f"{name}/attention", f"{weights}self_attn", ("o_proj",))
        state = Sum(hidden, mixed, f"{name}/after_attention")
        normed, hidden = self.norm(
            state, f"{weights}post_attention_layernorm.weight", f"{name}/post_attention_layernorm"
        )
        wide = self.projections(normed, f"{name}/mlp", f"{weights}mlp", ("gate_proj", "up_proj"))
        gate, up = self.parts(
            wide, [self.array(f"{weights}mlp.{which}_proj.weight").shape[1] for which in ("gate", "up")]
        )
        silu = self.contrib("QuickGelu", [gate], f"{name}/mlp/silu", alpha=1.0)
        gated = self.op("Mul", [silu, up], f"{name}/mlp/gated")
        state = Sum(hidden, self.projections(gated, f"{name}/mlp", f"{weights}mlp", ("down_proj",)), f"{name}/hidden")
        updates = sum(weight.startswith(f"{weights}update_") and weight.endswith(".weight") for weight in self.weights)
        for number in range(updates):  # of units that were pruned
            normed, hidden = self.unit_norm(state, f"{name}/norm_{number}")
            update = self.projections(normed, name, weights.rstrip("."), (f"update_{number}",))
            state = Sum(hidden, update, f"{name}/updated_{number}")
        return state

    def attention(self, layer: int, normed: ir.Value, choice: tuple[ir.Value, ir.Value, ir.Value] | None) -> ir.Value:
        """Heads of all tokens side by side, from the normed state; the cache is written."""
        facts, name, weights = self.facts, f"layer_{layer:02d}/attention", f"model.layers.{layer}.self_attn"
        heads, kv_heads, size = facts.num_heads, facts.num_kv_heads, facts.head_dim
        # Queries come scaled: the product of one row with many is twice as fast where it has no factor to apply.
        scale, head_norms = size**-0.5, f"{weights}.q_norm.weight" in self.weights
        packed = self.projections(
            normed, name, weights, ("q_proj", "k_proj", "v_proj"), first_times=1.0 if head_norms else scale
        )
        rotates = size % ROTARY_MULTIPLE == 0
        inputs: list[ir.Value | None] = [packed, None, None]
        if choice is not None or head_norms or not rotates:
            query, key, value = self.parts(packed, [size * count for count in (heads, kv_heads, kv_heads)])
            if choice is not None:
                skipped, other_key, other_value = choice
                key = self.op("Where", [skipped, other_key, key], f"{name}/key_chosen")
                value = self.op("Where", [skipped, other_value, value], f"{name}/value_chosen")
            if head_norms:
                query = self.head_norm(query, heads, f"{weights}.q_norm.weight", f"{name}/q_norm", scale)
                key = self.head_norm(key, kv_heads, f"{weights}.k_norm.weight", f"{name}/k_norm")
            if not rotates:
                query = self.rotated(query, heads, f"{name}/q_rotary")
                key = self.rotated(key, kv_heads, f"{name}/k_rotary")
            inputs = [query, key, value]
        shape = ("batch", kv_heads, "capacity", size)
        inputs += [self.input(short_name(past), shape) for past in past_names(layer)]
        inputs += [self.input("seqlens_k", ("batch",), ir.DataType.INT32)]
        inputs += [self.input("total_length", (1,), ir.DataType.INT32)]
        inputs += [self.stored("rope.cos"), self.stored("rope.sin")] if rotates else []
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": int(rotates), "scale": 1.0}
        found, *presents = self.node("GroupQueryAttention", inputs, f"{name}/attention", 3, CONTRIB, **attributes)
        for present, output in zip(present_names(layer), presents, strict=True):
            self.output(output, short_name(present), shape)
        return found

    def bypass(self, name: str, hidden: ir.Value) -> tuple[ir.Value, dict[int, tuple[ir.Value, ir.Value]]]:
        """(state after the skipped unit, K and V by layer as they are projected)."""
        normed, hidden = self.unit_norm(hidden, f"{name}/norm")
        found = self.linear(
            normed, f"{name}/product", f"{name}.weight", [self.array(f"{name}.weight")], [self.array(f"{name}.bias")]
        )
        parts = self.parts(found, self.array(f"{name}.sizes").tolist())
        passed = (
            self.op("Add", [hidden, parts.pop(0)], f"{name}/updated")
            if len(parts) % 2
            else self.op("Identity", [hidden], f"{name}/passed")
        )
        first, last = map(int, name.removeprefix("bypass_").split("-"))
        rows = zip(parts[::2], parts[1::2], strict=True)
        return passed, dict(zip(range(first, last + 1), rows, strict=True))

    def new_rows(self, name: str, rows: Mapping[int, tuple[ir.Value, ir.Value]]) -> None:
        """K and V of a bypass alone become outputs [batch, sequence, kv_heads * head_dim], which the host writes where
        they go: fewer nodes, and no turned heads.
        """
        heads = self.facts.num_kv_heads
        for layer, (key, value) in rows.items():
            node = f"{name}/layer_{layer:02d}"
            if (gain := f"model.layers.{layer}.self_attn.k_norm.weight") in self.weights:
                key = self.head_norm(key, heads, gain, f"{node}/k_norm")
            key = self.rotated(key, heads, f"{node}/k_rotary")
            for output, new in zip((key, value), new_names(layer), strict=True):
                self.output(output, short_name(new), (*HIDDEN_SHAPE, heads * self.facts.head_dim))

    def policy(self, read: int) -> None:
        state, _ = self.unit_norm(self.entering[read], "policy/norm")
        score = self.op("MatMul", [state, self.stored("policy.weight")], "policy/score")
        score = self.op("Add", [score, self.stored("policy.bias")], "policy/biased")
        self.output(
            self.op("Softplus", [score], "policy/damage"), "damage", (*HIDDEN_SHAPE, len(self.array("policy.bias")))
        )

    def head(self, state: State) -> None:
        """Of the tokens from `first_logit` on."""
        first = self.input("first_logit", (1,), ir.DataType.INT64)
        bounds = [first, self.stored("head.end"), self.stored("head.axis")]
        wanted = self.op("Slice", [self.computed(state), *bounds], "head/wanted")
        normed, _ = self.norm(wanted, FINAL_NORM, "head/norm")
        table = self.array(HEAD_WEIGHT if HEAD_WEIGHT in self.weights else EMBED_WEIGHT)
        logits = self.linear(normed, "head/logits", "head.weight", [np.ascontiguousarray(table.T)])
        self.output(logits, "logits", ("batch", "logits", len(table)))

    # Pieces of these

    def computed(self, state: State) -> ir.Value:
        return self.op("Add", [state.left, state.right], state.name) if isinstance(state, Sum) else state

    def norm(self, state: State, gain: str, node: str) -> tuple[ir.Value, ir.Value]:
        """(RMSNorm of the state, the state itself)."""
        epsilon = self.facts.rms_norm_eps
        if not isinstance(state, Sum):
            return self.op("RMSNormalization", [state, self.stored(gain)], node, epsilon=epsilon), state
        inputs = [state.left, state.right, self.stored(gain)]
        normed, *unused, total = self.node(
            "SkipSimplifiedLayerNormalization", inputs, node, 4, CONTRIB, epsilon=epsilon
        )
        for value in unused:
            value.name = ""
        total.name = state.name
        return normed, total

    def unit_norm(self, state: State, node: str) -> tuple[ir.Value, ir.Value]:
        return self.norm(state, "unit_gain", node)

    def head_norm(self, value: ir.Value, heads: int, gain: str, node: str, scale: float = 1.0) -> ir.Value:
        """The norm of each head of [batch, sequence, heads * head_dim], which the kernel of attention does not have."""
        size = self.facts.head_dim
        split = self.constant(f"{node}/heads", np.array([0, 0, heads, size]))
        weight = self.constant(f"{node}/gain", self.array(gain) * np.float32(scale))
        value = self.op("Reshape", [value, split], f"{node}/split")
        value = self.op("RMSNormalization", [value, weight], node, epsilon=self.facts.rms_norm_eps)
        return self.op("Reshape", [value, self.constant("shape.merge_heads", np.array([0, 0, -1]))], f"{node}/merged")

    def rotated(self, value: ir.Value, heads: int, node: str) -> ir.Value:
        """RoPE on [batch, sequence, heads * head_dim]."""
        positions = self.input("position_ids", HIDDEN_SHAPE, ir.DataType.INT64)
        tables = [self.stored("rope.cos"), self.stored("rope.sin")]
        return self.op("RotaryEmbedding", [value, *tables, positions], node, num_heads=heads)

    def parts(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        return self.split(
            value, self.constant(f"{value.name}/sizes", np.array(sizes)), f"{value.name}/split", len(sizes)
        )

    def projections(
        self, source: ir.Value, node: str, weights: str, names: Sequence[str], first_times: float = 1.0
    ) -> ir.Value:
        """Projections of one value side by side, `{weights}.{name}`, as nodes of a portable graph `{node}/{name}`."""
        matrices = [self.array(f"{weights}.{name}.weight") for name in names]
        biases = [
            self.array(key)
            if (key := f"{weights}.{name}.bias") in self.weights
            else np.zeros(len(matrix.T), np.float32)
            for name, matrix in zip(names, matrices, strict=True)
        ]
        if not any(f"{weights}.{name}.bias" in self.weights for name in names):
            biases = []
        together = "+".join(names)
        return self.linear(source, f"{node}/{together}", f"{weights}.{together}.weight", matrices, biases, first_times)

    def linear(
        self,
        source: ir.Value,
        node: str,
        weight: str,
        matrices: Sequence[Floats],
        biases: Sequence[Floats] = (),
        first_times: float = 1.0,
    ) -> ir.Value:
        """source @ matrices + biases, the matrices [in, out] side by side and quantised where the recipe says so; the
        first one and its bias times a factor.
        """
        block, bits = self.recipe.block_size, BITS.get(weight_precision(node, self.recipe, self.gated))
        if first_times != 1:
            matrices = [matrices[0] * np.float32(first_times), *matrices[1:]]
            biases = [biases[0] * np.float32(first_times), *biases[1:]] if biases else []
        bias = self.constant(f"{node}.bias", np.concatenate(biases)) if biases else None
        rows, columns = len(matrices[0]), sum(matrix.shape[1] for matrix in matrices)
        if bits is None or min(rows, columns) < block:  # not a matrix of a few columns
            wide = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=1)
            value = self.op("MatMul", [source, self.constant(weight, wide)], node)
            return value if bias is None else self.op("Add", [value, bias], f"{node}/bias")
        found = quantized(node, matrices, bits, self.recipe, self.roundings, first_times)
        inputs = [source, *self.blocks(weight, bits, *found), *([] if bias is None else [None, bias])]
        return self.contrib(
            "MatMulNBits", inputs, node, K=rows, N=columns, bits=bits, block_size=block, accuracy_level=ACCURACY_LEVEL
        )

    def blocks(
        self, weight: str, bits: int, codes: npt.NDArray[Any], scales: Floats, zeros: npt.NDArray[Any]
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        zero = None if self.recipe.symmetric else self.constant(f"{weight}.zero_points", zeros)
        return self.constant(f"{weight}.q{bits}", codes), self.constant(f"{weight}.scales", scales), zero

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        return self.initializer(name, np.ascontiguousarray(array))

    def contrib(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        return self.node(op_type, inputs, name, 1, CONTRIB, **attributes)[0]
