"""The `ort` dialect: the parts of a model in the operators that ONNX Runtime runs best on a CPU.

Weights are taken by name from the portable graphs; all else is written here, in the order in which it runs. Attention
is one GroupQueryAttention, which writes the cache too (inputs `seqlens_k` [batch] int32 and `total_length` [1] int32
replace mask, positions and write indices). An Add and the norm after it are one node. Projections of the same value
are joined into one matrix: wide matrices stream faster. Weights are quantised as the recipe says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from dash_export.bundle.layout import FINAL_STATE, new_names, past_names, present_names, short_name
from dash_export.bundle.recipe import BITS, QUANTISED, Recipe
from dash_export.bundle.records import DRAFTER, Manifest
from dash_export.core.drafter import EMBEDDING, STATE
from dash_export.core.units import Unit
from dash_export.errors import BackendError
from dash_export.graphs.lower.ort_products import CONTRIB, ProductWriter
from dash_export.graphs.lower.rounded import Roundings, to_nearest
from dash_export.graphs.portable.ggml import BLOCKS, FOUR_BITS
from dash_export.graphs.portable.model_writer import HIDDEN_SHAPE
from dash_export.graphs.portable.portable import HEAD_MATRIX, SCALE, TOKENS, draft_outputs
from dash_export.graphs.portable.stored import STORED
from dash_export.models.bypasses import DRAFTER_MATRIX
from dash_export.models.spec import EMBED_WEIGHT, FINAL_NORM

HEAD_MULTIPLE, ROTARY_MULTIPLE = 8, 16
"""GroupQueryAttention takes heads whose size is a multiple of the first, and rotates a multiple of the second."""

UNIT_GAIN = "unit_gain"


@dataclass(frozen=True)
class Sum:
    """State left + right, [batch, sequence, hidden], not computed yet: the next norm's node computes the sum too."""

    left: ir.Value
    right: ir.Value
    name: str


State = ir.Value | Sum


Choice = tuple[ir.Value, ir.Value, ir.Value]
"""(skipped, K, V): K and V of a layer from the bypass, for the rows where `skipped` [batch, sequence, 1] is true."""


def engine_graph(
    name: str, doc: str, parts: Mapping[str, ir.Model], manifest: Manifest, recipe: Recipe, roundings: Roundings
) -> ir.Model:
    """Return the graph of one engine, from portable graphs by name and in their order. Raises BackendError for heads of
    a size that GroupQueryAttention does not take.

    The parts are `embed`, layers and `head`, with the `policy` that reads the input of one of these layers; or the
    drafter, all at the precision of bypasses; or a bypass; or a bypass and the layers of its unit. In the last case
    `skipped` [batch, sequence, 1] bool chooses, row by row, the bypass or the layers: for the state, and for the K and
    V that later tokens attend to.
    """
    if manifest.decoder.head_dim % HEAD_MULTIPLE:
        raise BackendError(
            f"ONNX Runtime's attention takes heads whose size is a multiple of {HEAD_MULTIPLE}, and this model's have "
            f"{manifest.decoder.head_dim}: use --target portable."
        )
    if DRAFTER in parts:
        own = recipe.weights.bypass
        weights = replace(recipe.weights, layers=own, ungated=own, qkv=own, head=own)
        # What was calibrated is of the model's own layer of that name.
        g = OrtWriter(name, doc, parts, manifest, replace(recipe, weights=weights), to_nearest)
        g.drafter(manifest.model.num_layers - 1)
        return g.model()
    g = OrtWriter(name, doc, parts, manifest, recipe, roundings)
    entering = g.embed() if "embed" in parts else g.input("hidden", (*HIDDEN_SHAPE, manifest.decoder.hidden_size))
    layers = [int(part.removeprefix("layer_")) for part in parts if part.startswith("layer_")]
    unit = next((unit for unit in manifest.policy.units if unit.bypass in parts), None)
    state: State = entering
    if unit is not None:
        bypassed, projected = g.bypass(unit, entering)
        if not layers:
            g.new_rows(unit, projected)
            g.state_output(bypassed)
            return g.model()
        skipped = g.input("skipped", ("batch", "sequence", 1), ir.DataType.BOOL)
        for layer, key, value in zip(unit.layers, projected[::2], projected[1::2], strict=True):
            state = g.layer(layer, state, (skipped, key, value))
        g.state_output(g.op("Where", [skipped, bypassed, g.computed(state)], "hidden_chosen"))
        return g.model()
    for layer in layers:
        state = g.layer(layer, state, None)
    if "policy" in parts:
        g.policy(manifest.policy.read)
    if "head" in parts:
        g.head(state)
    else:
        g.state_output(g.computed(state))
    return g.model()


class OrtWriter(ProductWriter):
    """Writer of one engine's graph: a method per part of the model, then the pieces of these parts."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.entering: dict[int, ir.Value] = {}
        """Layer -> the state that enters it."""

    def embed(self) -> ir.Value:
        rows = self.embedding_rows()
        if self.traits.embedding_scale == 1:
            return rows
        scale = self.initializer("embed.scale", np.array([self.traits.embedding_scale], np.float32))
        return self.op("Mul", [rows, scale], "embed/scaled")

    def embedding_rows(self) -> ir.Value:
        ids = self.input("input_ids", HIDDEN_SHAPE, ir.DataType.INT64)
        # A row must be whole blocks.
        if self.recipe.embedding not in QUANTISED or self.facts.hidden_size % self.recipe.block_size:
            return self.op("Gather", [self.stored(EMBED_WEIGHT), ids], "embed")
        own = getattr(self.weights[EMBED_WEIGHT], "meta", {}).get(STORED)
        if own is not None and self.recipe.rounding == "as-is" and self.keeps_rows(own.kind):
            values = [self.initializer(str(part.name), part) for part in (own.factors, own.others)]
            return self.gathered(own.kind, values, ids)
        table, bits = self.array(EMBED_WEIGHT), BITS[self.recipe.embedding]
        # The quantiser makes blocks along the first axis of [in, out], so the table's rows are passed as columns.
        block, (codes, scales, zeros) = self.quantized("embed", np.ascontiguousarray(table.T), bits)
        packed, *grid = self.blocks("embed.weight", bits, codes.reshape(len(table), -1), scales, zeros)
        options = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        return self.contrib("GatherBlockQuantized", [packed, ids, *grid], "embed", **options)

    def keeps_rows(self, kind: str) -> bool:
        """Return whether the embedding keeps the file's blocks: where these have less than 8 bits, unless its codes of
        8 bits are those of a tied head, too.
        """
        return BLOCKS[kind].bits < 8 and not (self.facts.tie_embeddings and kind not in FOUR_BITS)

    def layer(self, layer: int, state: State, choice: Choice | None) -> State:
        name, weights = f"layer_{layer:02d}", f"model.layers.{layer}"
        normed, hidden = self.read(state, f"{weights}.input_layernorm.weight", f"{name}/input_layernorm")
        self.entering[layer] = hidden
        adds = self.traits.residual_scale
        mixed = self.projected(layer, self.attention(layer, normed, choice), "attention", "o_proj", times=adds)
        before_mlp, after_mlp = (f"{weights}.{which}_feedforward_layernorm.weight" for which in ("pre", "post"))
        norms = after_mlp in self.weights  # of what attention and MLP add
        if norms:
            mixed, _ = self.norm(mixed, f"{weights}.post_attention_layernorm.weight", f"{name}/attention/norm")
        state = Sum(hidden, mixed, f"{name}/after_attention")
        gain = before_mlp if norms else f"{weights}.post_attention_layernorm.weight"
        normed, hidden = self.read(state, gain, f"{name}/after_attention/norm")
        wide = self.projected(layer, normed, "mlp", "gate_proj", "up_proj")
        gate, up = self.parts(wide, [self.shape(f"{weights}.mlp.{which}_proj.weight")[1] for which in ("gate", "up")])
        if self.traits.activation == "silu":
            gate = self.contrib("QuickGelu", [gate], f"{name}/mlp/silu", alpha=1.0)
        else:
            gate = self.op("Gelu", [gate], f"{name}/mlp/gelu", approximate="tanh")
        gated = self.op("Mul", [gate, up], f"{name}/mlp/gated")
        down = self.projected(layer, gated, "mlp", "down_proj", times=adds)
        if norms:
            down, _ = self.norm(down, after_mlp, f"{name}/mlp/norm")
        state, number = Sum(hidden, down, f"{name}/after_mlp"), 0
        while (update := f"{weights}.update_{number}.weight") in self.weights:  # updates of pruned units
            normed, hidden = self.read(state, UNIT_GAIN, f"{name}/norm_{number}")
            state = Sum(hidden, self.linear(normed, f"{name}/update_{number}", [update]), f"{name}/updated_{number}")
            number += 1
        return state

    def attention(self, layer: int, normed: ir.Value, choice: Choice | None) -> ir.Value:
        """Return the heads of all tokens side by side, [batch, sequence, heads * head_dim]; the cache is written."""
        name, norms = f"layer_{layer:02d}/attention", f"model.layers.{layer}.self_attn"
        heads, kv_heads, size = self.facts.num_heads, self.facts.num_kv_heads, self.facts.head_dim
        # Queries are scaled beforehand: the product of one row with many is twice as fast without a factor to apply.
        head_norms, scale = f"{norms}.q_norm.weight" in self.weights, self.facts.attention_scale
        times = 1.0 if head_norms else scale
        packed = self.projected(layer, normed, "attention", "q_proj", "k_proj", "v_proj", times=times)
        rope = self.traits.rope(layer)
        rotates = bool(rope) and self.rotary_size(rope) % ROTARY_MULTIPLE == 0
        inputs: list[ir.Value | None] = [packed, None, None]
        if choice is not None or head_norms or (rope and not rotates):
            query, key, value = self.parts(packed, [size * count for count in (heads, kv_heads, kv_heads)])
            if choice is not None:
                skipped, chosen_key, chosen_value = choice
                key = self.op("Where", [skipped, chosen_key, key], f"{name}/key_chosen")
                value = self.op("Where", [skipped, chosen_value, value], f"{name}/value_chosen")
            if head_norms:
                query = self.head_norm(query, heads, f"{norms}.q_norm.weight", f"{name}/q_norm", scale)
                key = self.head_norm(key, kv_heads, f"{norms}.k_norm.weight", f"{name}/k_norm")
            if rope and not rotates:
                query = self.rotated(rope, query, heads, f"{name}/q_rotary")
                key = self.rotated(rope, key, kv_heads, f"{name}/k_rotary")
            inputs = [query, key, value]
        shape = ("batch", kv_heads, "capacity", size)
        inputs += [self.input(short_name(past), shape) for past in past_names(layer)]
        inputs.append(self.input("seqlens_k", ("batch",), ir.DataType.INT32))
        inputs.append(self.input("total_length", (1,), ir.DataType.INT32))
        inputs += self.tables(rope) if rotates else []
        options = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": int(rotates), "scale": 1.0}
        if window := self.traits.window(layer):
            options["local_window_size"] = window
        if self.traits.score_cap:
            options["softcap"] = self.traits.score_cap
        found, *presents = self.node("GroupQueryAttention", inputs, f"{name}/attention", 3, CONTRIB, **options)
        for present, output in zip(present_names(layer), presents, strict=True):
            self.output(output, short_name(present), shape)
        return found

    def bypass(self, unit: Unit, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """Return the state after the skipped unit, and K and V of each of its layers, before head norm and RoPE."""
        name = unit.bypass
        normed, _ = self.read(hidden, UNIT_GAIN, f"{name}/norm")
        found = self.linear(normed, f"{name}/product", [f"{name}.weight"])
        parts = self.parts(found, self.array(f"{name}.sizes").tolist())
        if len(parts) == 2 * len(unit.layers):
            return self.op("Identity", [hidden], f"{name}/passed"), parts
        return self.op("Add", [hidden, parts.pop(0)], f"{name}/updated"), parts

    def new_rows(self, unit: Unit, projected: Sequence[ir.Value]) -> None:
        """Output K and V as [batch, sequence, kv_heads * head_dim] for the host to write into the caches. This takes
        fewer nodes than caches in the graph, and no transposed heads.
        """
        heads = self.facts.num_kv_heads
        for layer, key, value in zip(unit.layers, projected[::2], projected[1::2], strict=True):
            name = f"{unit.bypass}/layer_{layer:02d}"
            if (gain := f"model.layers.{layer}.self_attn.k_norm.weight") in self.weights:
                key = self.head_norm(key, heads, gain, f"{name}/k_norm")
            if rope := self.traits.rope(layer):
                key = self.rotated(rope, key, heads, f"{name}/k_rotary")
            for output, new in zip((key, value), new_names(layer), strict=True):
                self.output(output, short_name(new), (*HIDDEN_SHAPE, heads * self.facts.head_dim))

    def policy(self, read: int) -> None:
        state, _ = self.norm(self.entering[read], UNIT_GAIN, "policy/norm")
        score = self.op("MatMul", [state, self.stored("policy.weight")], "policy/score")
        score = self.op("Add", [score, self.stored("policy.bias")], "policy/biased")
        units = len(self.array("policy.bias"))
        self.output(self.op("Softplus", [score], "policy/damage"), "damage", (*HIDDEN_SHAPE, units))

    def head(self, state: State) -> None:
        """Output the logits, and the normed state, of the tokens from `first_logit` on."""
        first = self.input("first_logit", (1,), ir.DataType.INT64)
        bounds = [first, self.stored("head.end"), self.stored("head.axis")]
        wanted = self.op("Slice", [self.computed(state), *bounds], "head/wanted")
        normed, _ = self.norm(wanted, FINAL_NORM, "head/norm")
        logits = self.logits(normed, HEAD_MATRIX)
        self.output(logits, "logits", ("batch", "logits", self.facts.vocab_size))
        self.output(normed, FINAL_STATE, ("batch", "logits", self.facts.hidden_size))

    def logits(self, normed: ir.Value, matrix: str) -> ir.Value:
        logits = self.linear(normed, "head/logits", [matrix], self.traits.logits_scale)
        if cap := self.traits.logits_cap:
            most = self.initializer("head.cap", np.array([cap], np.float32))
            turned = self.op("Tanh", [self.op("Div", [logits, most], "head/over_cap")], "head/tanh")
            logits = self.op("Mul", [turned, most], "head/capped")
        return logits

    def drafter(self, layer: int) -> None:
        shape = (*HIDDEN_SHAPE, self.facts.hidden_size)
        state, embedding = (self.input(name, shape) for name in ("state", "embedding"))
        normed, _ = self.norm(embedding, UNIT_GAIN, f"{DRAFTER}/norm")
        node = f"layer_{layer:02d}/{DRAFTER}"
        left = self.linear(state, f"{node}/state", [STATE])
        right = self.linear(normed, f"{node}/embedding", [EMBEDDING])
        passed = self.layer(layer, Sum(left, right, f"{node}/entering"), None)
        normed, _ = self.norm(passed, FINAL_NORM, f"{DRAFTER}/final_norm")
        self.output(normed, "state_out", shape)
        draft_outputs(self, self.logits(normed, DRAFTER_MATRIX), *map(self.stored, (TOKENS, *SCALE)))

    def state_output(self, state: ir.Value) -> None:
        self.output(state, "hidden_out", (*HIDDEN_SHAPE, self.facts.hidden_size))

    def computed(self, state: State) -> ir.Value:
        return self.op("Add", [state.left, state.right], state.name) if isinstance(state, Sum) else state

    def read(self, state: State, gain: str, node: str) -> tuple[ir.Value, ir.Value]:
        """Return (what attention, MLP or bypass reads of the state, the state itself)."""
        if self.traits.norms_after:
            hidden = self.computed(state)
            return hidden, hidden
        return self.norm(state, gain, node)

    def norm(self, state: State, gain: str, node: str) -> tuple[ir.Value, ir.Value]:
        """Return (RMSNorm of the state, the state itself)."""
        epsilon = self.facts.rms_norm_eps
        if not isinstance(state, Sum):
            return self.op("RMSNormalization", [state, self.stored(gain)], node, epsilon=epsilon), state
        inputs = [state.left, state.right, self.stored(gain)]
        normed, *rest, total = self.node("SkipSimplifiedLayerNormalization", inputs, node, 4, CONTRIB, epsilon=epsilon)
        for value in rest:
            value.name = ""
        return normed, total

    def head_norm(self, value: ir.Value, heads: int, gain: str, node: str, times: float = 1.0) -> ir.Value:
        """Norm each head of [batch, sequence, heads * head_dim], or all at once (`norms_after`), and multiply by
        `times`; GroupQueryAttention cannot.
        """
        weight = self.initializer(f"{node}/gain", self.array(gain) * np.float32(times))
        if self.traits.norms_after:
            return self.op("RMSNormalization", [value, weight], node, epsilon=self.facts.rms_norm_eps)
        split = self.initializer(f"{node}/heads", np.array([0, 0, heads, self.facts.head_dim]))
        value = self.op("Reshape", [value, split], f"{node}/split")
        value = self.op("RMSNormalization", [value, weight], node, epsilon=self.facts.rms_norm_eps)
        merge = self.initializer("shape.merge_heads", np.array([0, 0, -1]))
        return self.op("Reshape", [value, merge], f"{node}/merged")

    def rotary_size(self, rope: str) -> int:
        """Return how many dimensions of a head are rotated."""
        facts = self.facts
        return 2 * len(facts.window_frequencies if rope == "rope.window" else facts.rope_frequencies)

    def tables(self, rope: str) -> list[ir.Value]:
        shape = ("positions", self.rotary_size(rope) // 2)
        return [self.input(f"{rope}.{turn}", shape) for turn in ("cos", "sin")]

    def rotated(self, rope: str, value: ir.Value, heads: int, node: str) -> ir.Value:
        """Apply RoPE to [batch, sequence, heads * head_dim]."""
        positions = self.input("position_ids", HIDDEN_SHAPE, ir.DataType.INT64)
        tables, size = self.tables(rope), self.rotary_size(rope)
        options = {"num_heads": heads} | ({} if size == self.facts.head_dim else {"rotary_embedding_dim": size})
        return self.op("RotaryEmbedding", [value, *tables, positions], node, **options)

    def projected(self, layer: int, source: ir.Value, part: str, *names: str, times: float = 1.0) -> ir.Value:
        """Project one value with several matrices; the results lie side by side."""
        weights = [f"model.layers.{layer}.{part.replace('attention', 'self_attn')}.{name}.weight" for name in names]
        return self.linear(source, f"layer_{layer:02d}/{part}/{'+'.join(names)}", weights, times)
