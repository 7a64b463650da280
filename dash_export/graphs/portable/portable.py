"""The portable graphs of a decoder: `embed`, `layer_NN`, `bypass_AA-BB`, `policy`, `drafter`, `head`. ONNX opset 24,
nothing traced.

States are batch x sequence x hidden, caches batch x kv_heads x capacity x head_dim. A cache has one row per position, a
step writes its new rows in place (TensorScatter), and `attention_mask` [batch, 1, sequence, capacity] (bool) says which
rows a query may read. RoPE's tables, `rope.cos` and `rope.sin` [positions, rotary_dim / 2], are inputs too (rope.py).
Weights are named as in the checkpoint.
"""

import numpy as np
import onnx_ir as ir

from dash_export.bundle.layout import FINAL_STATE, past_names, present_names
from dash_export.bundle.records import DRAFTER
from dash_export.core.drafter import EMBEDDING, STATE, Drafter
from dash_export.core.policy import SkipPolicy
from dash_export.graphs.portable.model_writer import HIDDEN_SHAPE, ModelWriter
from dash_export.graphs.portable.writer import GraphWriter
from dash_export.models.bypasses import DRAFTER_MATRIX, drafting, full_bypass
from dash_export.models.spec import EMBED_WEIGHT, FINAL_NORM, HEAD_WEIGHT, Checkpoint, DecoderSpec

EMBED_FILE = "embed.data"
HEAD_MATRIX = "head/weight"
"""Name of the node that transposes EMBED_WEIGHT (a tied head) or HEAD_WEIGHT for the logits."""
TOKENS, SCALE = "drafter.tokens", ("drafter.slope", "drafter.offset")
"""Initializers of a drafter's graph: ids of its short vocabulary; how its probability becomes a chance."""
WINDOW = "dash_export.window"
"""Metadata key of an Attention node: how many tokens a query may attend to, 0 for all."""


def embed_graph(checkpoint: Checkpoint) -> ir.Model:
    """Return the graph input_ids [batch, sequence] int64 -> hidden [batch, sequence, hidden] float32."""
    g = PortableWriter("embed", "Token embedding.", checkpoint.spec, checkpoint)
    ids = g.input("input_ids", HIDDEN_SHAPE, ir.DataType.INT64)
    g.state_output(g.scaled(g.looked_up(EMBED_WEIGHT, ids, EMBED_FILE), "embedding_scale"))
    return g.model()


def head_graph(checkpoint: Checkpoint) -> ir.Model:
    """Return the graph hidden [batch, sequence, hidden], first_logit [1] int64 -> logits [batch, sequence -
    first_logit, vocab] float32, and the normed final state that gives them, [batch, sequence - first_logit, hidden]
    float32.

    `first_logit` spares a prefill the logits of all but its last position. A tied head reads the embedding's file.
    """
    spec = checkpoint.spec
    g = PortableWriter("head", "Final norm and language-model head.", spec, checkpoint)
    hidden, first = g.state_input(), g.input("first_logit", (1,), ir.DataType.INT64)
    end, axis = g.initializer("head.end", np.array([np.iinfo(np.int64).max])), g.initializer("head.axis", np.array([1]))
    wanted = g.op("Slice", [hidden, first, end, axis], "head/wanted")
    normed = g.norm(wanted, FINAL_NORM, "head/norm")
    table = g.weight(EMBED_WEIGHT, file=EMBED_FILE) if spec.tie_embeddings else g.weight(HEAD_WEIGHT)
    logits = g.op("MatMul", [normed, g.op("Transpose", [table], HEAD_MATRIX, perm=[1, 0])], "head/logits")
    logits = g.as_logits(logits)
    g.output(logits, "logits", ("batch", "logits", spec.vocab_size))
    g.output(normed, FINAL_STATE, ("batch", "logits", spec.hidden_size))
    return g.model()


def layer_graph(checkpoint: Checkpoint, layer: int) -> ir.Model:
    """Return the graph of one layer: hidden -> hidden_out [batch, sequence, hidden]. It reads and writes the KV cache.

    Other inputs: position_ids [batch, sequence] int64, write_indices [batch] int64 (the cache row of the first new
    token), attention_mask [batch, 1, sequence, capacity] bool. Updates of units that were pruned behind the layer are
    part of its graph.
    """
    g = PortableWriter(f"layer_{layer:02d}", f"Decoder layer {layer}.", checkpoint.spec, checkpoint)
    passed, *caches = _layer(g, layer, g.state_input())
    for number in range(checkpoint.spec.updates.count(layer)):
        node = g.graph.name
        update = g.linear(layer, g.bypass_input(passed, f"{node}/norm_{number}"), f"update_{number}")
        passed = g.op("Add", [passed, update], f"{node}/updated_{number}")
    g.state_output(passed)
    g.cache_outputs(layer, *caches)
    return g.model()


def drafter_graph(checkpoint: Checkpoint, drafter: Drafter) -> ir.Model:
    """Return the graph of `core/drafter.py`: state, embedding [batch, sequence, hidden] -> state_out, the estimate of
    the normed final state; draft [batch, sequence] int64, a token id, and chance [batch, sequence], that of its being
    accepted. It reads and writes the KV cache of the last layer, and takes the other inputs of `layer_graph`.
    """
    own, shape = drafting(checkpoint, drafter), (*HIDDEN_SHAPE, checkpoint.spec.hidden_size)
    g, last = PortableWriter(DRAFTER, f"Drafter ({drafter.origin}).", own.spec, own), own.spec.num_layers - 1
    state, embedding = g.input("state", shape), g.unit_norm(g.input("embedding", shape), "drafter/norm")
    parts = [
        g.op("MatMul", [value, g.weight(name, transpose=True)], f"drafter/{name.partition('.')[0]}")
        for value, name in ((state, STATE), (embedding, EMBEDDING))
    ]
    passed, *caches = _layer(g, last, g.op("Add", parts, "drafter/entering"))
    normed = g.norm(passed, FINAL_NORM, "drafter/final_norm")
    logits = g.as_logits(g.op("MatMul", [normed, g.weight(DRAFTER_MATRIX, transpose=True)], "drafter/logits"))
    g.output(normed, "state_out", shape)
    slope, offset = (np.array(value, np.float32) for value in (drafter.slope, drafter.offset))
    scale = g.initializer(SCALE[0], slope), g.initializer(SCALE[1], offset)
    draft_outputs(g, logits, g.initializer(TOKENS, drafter.tokens), *scale)
    g.cache_outputs(last, *caches)
    return g.model()


def draft_outputs(g: GraphWriter, logits: ir.Value, tokens: ir.Value, slope: ir.Value, offset: ir.Value) -> None:
    """Output the likeliest of `tokens`, and the chance of its being accepted."""
    place = g.op("ArgMax", [logits], "drafter/place", axis=-1, keepdims=0)
    g.output(g.op("Gather", [tokens, place], "drafter/chosen"), "draft", HIDDEN_SHAPE, ir.DataType.INT64)
    last, one = g.initializer("drafter.last", np.array([-1])), g.initializer("drafter.one", np.array(1, np.float32))
    least = g.initializer("drafter.least", np.array(1e-7, np.float32))
    likely = g.op("Softmax", [logits], "drafter/probabilities", axis=-1)
    likely = g.op("ReduceMax", [likely, last], "drafter/probability", keepdims=0)
    rest = g.op("Max", [g.op("Sub", [one, likely], "drafter/rest"), least], "drafter/bounded_rest")
    odds = g.op("Log", [g.op("Div", [likely, rest], "drafter/odds")], "drafter/logit")
    odds = g.op("Add", [g.op("Mul", [odds, slope], "drafter/scaled"), offset], "drafter/calibrated")
    g.output(g.op("Sigmoid", [odds], "drafter/chance"), "chance", HIDDEN_SHAPE)


def _layer(g: "PortableWriter", layer: int, hidden: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the state after the layer, and its caches."""
    spec, name = g.spec, f"layer_{layer:02d}"
    positions, rows = g.step_inputs()
    mask = g.mask(layer, positions)

    normed = g.read(layer, hidden, "input_layernorm")
    keys, values = (g.heads(layer, name, g.linear(layer, normed, f"self_attn.{which}_proj"), which) for which in "kv")
    keys, values = g.cached(layer, name, keys, values, positions, rows)
    queries = g.heads(layer, name, g.linear(layer, normed, "self_attn.q_proj"), "q")
    queries = g.rotated(layer, queries, positions, f"{name}/attention/q_rotary")
    cap = {"softcap": spec.traits.score_cap} if spec.traits.score_cap else {}
    attended = [queries, keys, values, mask]
    mixed = g.op("Attention", attended, f"{name}/attention/attention", scale=spec.attention_scale, **cap)
    mixed.producer().metadata_props[WINDOW] = str(spec.traits.window(layer))  # type: ignore[union-attr]
    mixed = g.op("Transpose", [mixed], f"{name}/attention/tokens_first", perm=[0, 2, 1, 3])
    merged = g.initializer("shape.merge_heads", np.array([0, 0, -1]))
    mixed = g.op("Reshape", [mixed, merged], f"{name}/attention/merge_heads")
    mixed = g.branch(layer, g.linear(layer, mixed, "self_attn.o_proj"), "post_attention_layernorm")
    after = g.op("Add", [hidden, mixed], f"{name}/after_attention")

    # With `post_norms`, `post_attention_layernorm` follows attention.
    normed = g.read(layer, after, "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm")
    gate = g.linear(layer, normed, "mlp.gate_proj")
    if spec.traits.activation == "silu":
        gate = g.op("Mul", [gate, g.op("Sigmoid", [gate], f"{name}/mlp/sigmoid")], f"{name}/mlp/silu")
    else:
        gate = g.op("Gelu", [gate], f"{name}/mlp/gelu", approximate="tanh")
    up = g.linear(layer, normed, "mlp.up_proj")
    down = g.linear(layer, g.op("Mul", [gate, up], f"{name}/mlp/gated"), "mlp.down_proj")
    down = g.branch(layer, down, "post_feedforward_layernorm")
    return g.op("Add", [after, down], f"{name}/after_mlp"), keys, values


def bypass_graph(checkpoint: Checkpoint, policy: SkipPolicy, place: int) -> ir.Model:
    """Return the graph of skipped unit `place`: hidden -> hidden + update (see `core/policy.py`). One product
    gives the update and the K and V of all the unit's layers, which are written to their caches.
    """
    unit, bypass = policy.units[place], policy.bypasses[place]
    spec, name = checkpoint.spec, unit.bypass
    g = PortableWriter(name, f"Layers {unit}, skipped: {'linear' if bypass else 'none'} bypass.", spec, checkpoint)
    hidden = g.state_input()
    positions, rows = g.step_inputs()
    matrices = full_bypass(bypass, unit, checkpoint)
    state = g.bypass_input(hidden, f"{name}/norm")

    found = g.product(state, matrices, name, name)
    updates = [spec.hidden_size] if bypass else []
    sizes = [*updates, *[spec.key_value_size] * (2 * len(unit.layers))]
    parts = g.split(found, sizes, f"{name}.sizes", f"{name}/parts")
    passed = (
        g.op("Add", [hidden, parts.pop(0)], f"{name}/updated")
        if bypass
        else g.op("Identity", [hidden], f"{name}/passed")
    )
    g.state_output(passed)
    for layer in unit.layers:
        own = f"{name}/layer_{layer:02d}"
        keys, values = (g.heads(layer, own, parts.pop(0), which) for which in "kv")
        g.cache_outputs(layer, *g.cached(layer, own, keys, values, positions, rows))
    return g.model()


def policy_graph(spec: DecoderSpec, policy: SkipPolicy) -> ir.Model:
    """Return the graph hidden [batch, sequence, hidden], the input of the policy's layer `read`, -> damage [batch,
    sequence, units] float32, nats: the formula of `core/policy.py`.
    """
    network = policy.network
    assert network is not None
    g = PortableWriter("policy", f"Damage of skipping each unit ({policy.origin}).", spec)
    state = g.unit_norm(g.state_input(), "policy/norm")
    score = g.op("MatMul", [state, g.initializer("policy.weight", network["weight"])], "policy/score")
    score = g.op("Add", [score, g.initializer("policy.bias", network["bias"])], "policy/biased")
    g.output(g.op("Softplus", [score], "policy/damage"), "damage", (*HIDDEN_SHAPE, len(policy.units)))
    return g.model()


class PortableWriter(ModelWriter):
    """Writer with the pieces that the portable graphs of a decoder have in common."""

    spec: DecoderSpec

    def step_inputs(self) -> tuple[ir.Value, ir.Value]:
        positions = self.input("position_ids", HIDDEN_SHAPE, ir.DataType.INT64)
        return positions, self.input("write_indices", ("batch",), ir.DataType.INT64)

    def linear(self, layer: int, value: ir.Value, weight: str) -> ir.Value:
        full = f"model.layers.{layer}.{weight}"
        node = f"layer_{layer:02d}/{weight.replace('self_attn', 'attention').replace('.', '/')}"
        product = self.op("MatMul", [value, self.weight(f"{full}.weight", transpose=True)], node)
        if f"{full}.bias" not in self.spec.weight_shapes():
            return product
        return self.op("Add", [product, self.weight(f"{full}.bias")], f"{node}/bias")

    def norm(self, value: ir.Value, gain: str, node: str) -> ir.Value:
        return self.op("RMSNormalization", [value, self.weight(gain)], node, epsilon=self.spec.rms_norm_eps)

    def layer_norm(self, layer: int, value: ir.Value, weight: str, name: str = "") -> ir.Value:
        return self.norm(value, f"model.layers.{layer}.{weight}.weight", f"{name or f'layer_{layer:02d}'}/{weight}")

    def read(self, layer: int, state: ir.Value, weight: str) -> ir.Value:
        """Return what attention or MLP reads: the normed state, or with norms only after these the state itself."""
        return state if self.spec.traits.norms_after else self.layer_norm(layer, state, weight)

    def bypass_input(self, state: ir.Value, node: str) -> ir.Value:
        """Return what a bypass reads: the state as layers read it, but normed with unit gain."""
        return state if self.spec.traits.norms_after else self.unit_norm(state, node)

    def unit_norm(self, value: ir.Value, node: str) -> ir.Value:
        gain = self.initializer("unit_gain", np.ones(self.spec.hidden_size, np.float32))
        return self.op("RMSNormalization", [value, gain], node, epsilon=self.spec.rms_norm_eps)

    def heads(self, layer: int, name: str, value: ir.Value, which: str) -> ir.Value:
        """Turn [batch, sequence, heads * head_dim] into [batch, heads, sequence, head_dim]. With `qk_norm` norm each
        head of Q and K (Qwen3, Gemma 3), or all heads at once (OLMo 2).
        """
        norms, at_once = self.spec.qk_norm and which != "v", self.spec.traits.norms_after
        if norms and at_once:
            value = self.layer_norm(layer, value, f"self_attn.{which}_norm", name)
        count = self.spec.num_heads if which == "q" else self.spec.num_kv_heads
        shape = self.initializer(f"shape.{which}_heads", np.array([0, 0, count, self.spec.head_dim]))
        value = self.op("Reshape", [value, shape], f"{name}/attention/{which}_heads")
        if norms and not at_once:
            value = self.layer_norm(layer, value, f"self_attn.{which}_norm", name)
        return self.op("Transpose", [value], f"{name}/attention/{which}_heads_first", perm=[0, 2, 1, 3])

    def rotated(self, layer: int, value: ir.Value, positions: ir.Value, name: str) -> ir.Value:
        if not (rope := self.spec.traits.rope(layer)):
            return value
        own = len(self.spec.window_frequencies if rope == "rope.window" else self.spec.rope_frequencies)
        tables = [self.input(f"{rope}.{turn}", ("positions", own)) for turn in ("cos", "sin")]
        part = {} if 2 * own == self.spec.head_dim else {"rotary_embedding_dim": 2 * own}
        return self.op("RotaryEmbedding", [value, *tables, positions], name, **part)

    def mask(self, layer: int, positions: ir.Value) -> ir.Value:
        """Return the mask of readable rows: the runtime's, cut to the last rows where the layer has a window."""
        given = self.input("attention_mask", ("batch", 1, "sequence", "capacity"), ir.DataType.BOOL)
        name = f"layer_{layer:02d}/mask"
        if not (window := self.spec.traits.window(layer)):
            return given
        width = self.initializer(f"mask.{window}", np.array(window))
        axes = self.initializer("mask.axes", np.array([1, 3]))
        first = self.op("Sub", [positions, width], f"{name}/before_first")
        first = self.op("Unsqueeze", [first, axes], f"{name}/before_first_row")
        capacity = self.op("Squeeze", [self.op("Shape", [given], f"{name}/shape", start=3, end=4)], f"{name}/capacity")
        zero, one = (self.initializer(f"mask.step.{value}", np.array(value)) for value in (0, 1))
        rows = self.op("Range", [zero, capacity, one], f"{name}/rows")
        return self.op("And", [given, self.op("Greater", [rows, first], f"{name}/near")], f"{name}/both")

    def branch(self, layer: int, value: ir.Value, norm: str) -> ir.Value:
        """Return what attention or MLP adds to the state: `value`, normed and scaled as the family does."""
        value = self.layer_norm(layer, value, norm) if self.spec.post_norms else value
        return self.scaled(value, "residual_scale", str(value.name))

    def as_logits(self, product: ir.Value) -> ir.Value:
        return self.capped(self.scaled(product, "logits_scale"), self.spec.traits.logits_cap)

    def scaled(self, value: ir.Value, trait: str, name: str = "") -> ir.Value:
        if (scale := getattr(self.spec.traits, trait)) == 1:
            return value
        return self.op("Mul", [value, self.initializer(trait, np.array(scale, np.float32))], f"{name or trait}/scaled")

    def capped(self, value: ir.Value, cap: float) -> ir.Value:
        """Return cap * tanh(value / cap); `value` itself when `cap` is 0."""
        if not cap:
            return value
        most = self.initializer("logits_cap", np.array(cap, np.float32))
        turned = self.op("Tanh", [self.op("Div", [value, most], "head/over_cap")], "head/tanh")
        return self.op("Mul", [turned, most], "head/capped")

    def cached(
        self, layer: int, name: str, keys: ir.Value, values: ir.Value, positions: ir.Value, rows: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Write new keys (rotated here) and values [batch, heads, sequence, head_dim] to the caches; return these."""
        shape = ("batch", self.spec.num_kv_heads, "capacity", self.spec.head_dim)
        past_key, past_value = (self.input(past, shape) for past in past_names(layer))
        keys = self.rotated(layer, keys, positions, f"{name}/attention/k_rotary")
        keys = self.op("TensorScatter", [past_key, keys, rows], f"{name}/attention/write_key", axis=2)
        values = self.op("TensorScatter", [past_value, values, rows], f"{name}/attention/write_value", axis=2)
        return keys, values

    def cache_outputs(self, layer: int, *caches: ir.Value) -> None:
        for value, present in zip(caches, present_names(layer), strict=True):
            self.output(value, present, ("batch", self.spec.num_kv_heads, "capacity", self.spec.head_dim))
