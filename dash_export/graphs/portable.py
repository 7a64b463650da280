"""The portable graphs of a decoder: `embed`, `layer_NN`, `bypass_AA-BB`, `policy`, `head`. ONNX
opset 24, nothing traced.

Shapes, everywhere: batch x sequence x hidden for states, batch x kv_heads x capacity x head_dim for a cache. A cache
has one row per position, a step writes its new rows in place (TensorScatter), and `attention_mask` [batch, 1, sequence,
capacity] (bool) says which rows a query may read. Weights are named as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.decision import Unit
from dash_export.graphs.writer import GraphWriter, external, lazy_weight
from dash_export.models.bypasses import full_bypass
from dash_export.models.spec import FINAL_NORM, Checkpoint, DecoderSpec
from dash_export.names import past_names, present_names
from dash_export.policy import Bypass, SkipPolicy, key_value_size

ROPE_FILE = "rope.data"
EMBED_FILE = "embed.data"
EMBED_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
SHARED_FILES = (ROPE_FILE, EMBED_FILE)

_BLOCK = 1 << 14
"""Positions whose angles are in memory at a time."""

HIDDEN_SHAPE = ("batch", "sequence")


def rope_tables(spec: DecoderSpec) -> Iterator[npt.NDArray[np.float32]]:
    """`cos`, then `sin`, each [max_positions, head_dim / 2], in blocks: every layer's graph refers to this one file."""
    frequencies = np.asarray(spec.rope_frequencies)
    for turned in (np.cos, np.sin):
        for start in range(0, spec.max_positions, _BLOCK):
            positions = np.arange(start, min(start + _BLOCK, spec.max_positions))
            yield turned(np.outer(positions, frequencies)).astype(np.float32)


def embed_graph(checkpoint: Checkpoint) -> ir.Model:
    """input_ids [batch, sequence] int64 -> hidden [batch, sequence, hidden] float32."""
    spec = checkpoint.spec
    g = GraphWriter("embed", "Token embedding.")
    ids = g.input("input_ids", HIDDEN_SHAPE, ir.DataType.INT64)
    table = g.initializer(EMBED_WEIGHT, lazy_weight(EMBED_WEIGHT, checkpoint.weights[EMBED_WEIGHT]))
    g.output(g.op("Gather", [table, ids], "embed"), "hidden_out", (*HIDDEN_SHAPE, spec.hidden_size))
    return g.model()


def head_graph(checkpoint: Checkpoint) -> ir.Model:
    """hidden [batch, sequence, hidden], first_logit [1] int64 -> logits [batch, sequence - first_logit, vocab] float32.

    `first_logit` spares a prefill the logits of all but its last position. A tied head reads the embedding's file.
    """
    spec = checkpoint.spec
    g = GraphWriter("head", "Final norm and language-model head.")
    hidden = g.input("hidden", (*HIDDEN_SHAPE, spec.hidden_size))
    first = g.input("first_logit", (1,), ir.DataType.INT64)
    end, axis = g.initializer("head.end", np.array([np.iinfo(np.int64).max])), g.initializer("head.axis", np.array([1]))
    wanted = g.op("Slice", [hidden, first, end, axis], "head/wanted")
    normed = g.op(
        "RMSNormalization",
        [wanted, _vector(g, checkpoint, FINAL_NORM)],
        "head/norm",
        epsilon=spec.rms_norm_eps,
    )
    if spec.tie_embeddings:
        shape = (spec.vocab_size, spec.hidden_size)
        table = g.initializer(EMBED_WEIGHT, external(EMBED_WEIGHT, EMBED_FILE, ir.DataType.FLOAT, shape))
    else:
        table = g.initializer(HEAD_WEIGHT, lazy_weight(HEAD_WEIGHT, checkpoint.weights[HEAD_WEIGHT]))
    logits = g.op("MatMul", [normed, g.op("Transpose", [table], "head/weight", perm=[1, 0])], "head/logits")
    g.output(logits, "logits", ("batch", "logits", spec.vocab_size))
    return g.model()


def layer_graph(checkpoint: Checkpoint, layer: int) -> ir.Model:
    """One decoder layer. hidden -> hidden_out [batch, sequence, hidden]; reads and writes the layer's cache.

    Other inputs: position_ids [batch, sequence] int64, write_indices [batch] int64 (the cache row of the first new
    token), attention_mask [batch, 1, sequence, capacity] bool (true where the query may read).
    """
    spec = checkpoint.spec
    g = GraphWriter(f"layer_{layer:02d}", f"Decoder layer {layer}.")
    name = f"layer_{layer:02d}"
    hidden = g.input("hidden", (*HIDDEN_SHAPE, spec.hidden_size))
    steps = _step_inputs(g)
    mask = g.input("attention_mask", ("batch", 1, "sequence", "capacity"), ir.DataType.BOOL)
    normed, keys, values = _write_cache(g, checkpoint, layer, name, hidden, steps)
    queries = _heads(g, checkpoint, layer, name, normed, "q", spec.num_heads)
    queries = _rotate(g, spec, queries, steps[0], f"{name}/attention/q_rotary")
    mixed = g.op("Attention", [queries, keys, values, mask], f"{name}/attention/attention", scale=spec.head_dim**-0.5)
    mixed = g.op("Transpose", [mixed], f"{name}/attention/tokens_first", perm=[0, 2, 1, 3])
    mixed = g.op(
        "Reshape", [mixed, g.initializer("shape.merge_heads", np.array([0, 0, -1]))], f"{name}/attention/merge_heads"
    )
    mixed = _linear(g, checkpoint, layer, name, mixed, "self_attn.o_proj")
    after = g.op("Add", [hidden, mixed], f"{name}/after_attention")
    normed = _norm(g, checkpoint, layer, name, after, "post_attention_layernorm")
    gate = _linear(g, checkpoint, layer, name, normed, "mlp.gate_proj")
    gate = g.op("Mul", [gate, g.op("Sigmoid", [gate], f"{name}/mlp/sigmoid")], f"{name}/mlp/silu")
    up = _linear(g, checkpoint, layer, name, normed, "mlp.up_proj")
    down = _linear(g, checkpoint, layer, name, g.op("Mul", [gate, up], f"{name}/mlp/gated"), "mlp.down_proj")
    passed = g.op("Add", [after, down], f"{name}/after_mlp")
    for number in range(spec.updates.count(layer)):
        state = _unit_norm(g, spec, passed, f"{name}/norm_{number}")
        update = _linear(g, checkpoint, layer, name, state, f"update_{number}")
        passed = g.op("Add", [passed, update], f"{name}/updated_{number}")
    g.output(passed, "hidden_out", (*HIDDEN_SHAPE, spec.hidden_size))
    _cache_outputs(g, spec, layer, keys, values)
    return g.model()


def bypass_graph(checkpoint: Checkpoint, unit: Unit, bypass: Bypass) -> ir.Model:
    """What a skipped unit does: one product for its update and for K and V of all its layers, which are written to the
    caches; hidden -> hidden + update (`dash_export/policy.py` has the formula).
    """
    spec, name = checkpoint.spec, unit.bypass
    g = GraphWriter(name, f"Layers {unit}, skipped: {bypass.form} bypass.")
    hidden = g.input("hidden", (*HIDDEN_SHAPE, spec.hidden_size))
    steps = _step_inputs(g)
    matrices = full_bypass(bypass, unit, checkpoint)
    state = _unit_norm(g, spec, hidden, f"{name}/norm")

    found = g.op("MatMul", [state, g.initializer(f"{name}.weight", matrices["weight"])], f"{name}/product")
    found = g.op("Add", [found, g.initializer(f"{name}.bias", matrices["bias"])], f"{name}/biased")
    updates = [spec.hidden_size] if bypass.weights else []
    sizes = np.array([*updates, *[key_value_size(spec)] * (2 * len(unit.layers))])
    parts = g.split(found, g.initializer(f"{name}.sizes", sizes), f"{name}/parts", len(sizes))
    passed = (
        g.op("Add", [hidden, parts.pop(0)], f"{name}/updated")
        if bypass.weights
        else g.op("Identity", [hidden], f"{name}/passed")
    )
    g.output(passed, "hidden_out", (*HIDDEN_SHAPE, spec.hidden_size))
    for layer in unit.layers:
        keys, values = (
            _split_heads(g, checkpoint, layer, f"{name}/layer_{layer:02d}", parts.pop(0), which, spec.num_kv_heads)
            for which in ("k", "v")
        )
        keys, values = _write_rows(g, spec, layer, f"{name}/layer_{layer:02d}", keys, values, steps)
        _cache_outputs(g, spec, layer, keys, values)
    return g.model()


def policy_graph(spec: DecoderSpec, policy: SkipPolicy) -> ir.Model:
    """What enters the policy's layer `read`, hidden [batch, sequence, hidden], -> damage [batch, sequence, units]
    float32, nats: the formula of `dash_export/policy.py`.
    """
    network = policy.network
    assert network is not None
    g = GraphWriter("policy", f"Damage of skipping each unit ({policy.origin}).")
    hidden = g.input("hidden", (*HIDDEN_SHAPE, spec.hidden_size))
    state = _unit_norm(g, spec, hidden, "policy/norm")
    score = g.op("MatMul", [state, g.initializer("policy.weight", network["weight"])], "policy/score")
    score = g.op("Add", [score, g.initializer("policy.bias", network["bias"])], "policy/biased")
    g.output(g.op("Softplus", [score], "policy/damage"), "damage", (*HIDDEN_SHAPE, len(policy.units)))
    return g.model()


def _step_inputs(g: GraphWriter) -> tuple[ir.Value, ir.Value]:
    positions = g.input("position_ids", HIDDEN_SHAPE, ir.DataType.INT64)
    return positions, g.input("write_indices", ("batch",), ir.DataType.INT64)


def _write_cache(
    g: GraphWriter, checkpoint: Checkpoint, layer: int, name: str, hidden: ir.Value, steps: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Norm, K/V projections, RoPE, cache write. Returns (normed, keys, values)."""
    spec = checkpoint.spec
    normed = _norm(g, checkpoint, layer, name, hidden, "input_layernorm")
    keys, values = (_heads(g, checkpoint, layer, name, normed, which, spec.num_kv_heads) for which in ("k", "v"))
    return normed, *_write_rows(g, spec, layer, name, keys, values, steps)


def _write_rows(
    g: GraphWriter,
    spec: DecoderSpec,
    layer: int,
    name: str,
    keys: ir.Value,
    values: ir.Value,
    steps: tuple[ir.Value, ir.Value],
) -> tuple[ir.Value, ir.Value]:
    """New keys, not yet rotated, and values [batch, heads, sequence, head_dim] -> the caches with them."""
    positions, rows = steps
    shape = ("batch", spec.num_kv_heads, "capacity", spec.head_dim)
    past_key, past_value = (g.input(past, shape) for past in past_names(layer))
    keys = _rotate(g, spec, keys, positions, f"{name}/attention/k_rotary")
    keys = g.op("TensorScatter", [past_key, keys, rows], f"{name}/attention/write_key", axis=2)
    values = g.op("TensorScatter", [past_value, values, rows], f"{name}/attention/write_value", axis=2)
    return keys, values


def _cache_outputs(g: GraphWriter, spec: DecoderSpec, layer: int, keys: ir.Value, values: ir.Value) -> None:
    for value, present in zip((keys, values), present_names(layer), strict=True):
        g.output(value, present, ("batch", spec.num_kv_heads, "capacity", spec.head_dim))


def _heads(
    g: GraphWriter, checkpoint: Checkpoint, layer: int, name: str, normed: ir.Value, which: str, heads: int
) -> ir.Value:
    """Project and split into heads."""
    value = _linear(g, checkpoint, layer, name, normed, f"self_attn.{which}_proj")
    return _split_heads(g, checkpoint, layer, name, value, which, heads)


def _split_heads(
    g: GraphWriter, checkpoint: Checkpoint, layer: int, name: str, value: ir.Value, which: str, heads: int
) -> ir.Value:
    """[batch, sequence, heads * head_dim] -> [batch, heads, sequence, head_dim], with Qwen3's per-head norm where it
    has one.
    """
    spec = checkpoint.spec
    shape = g.initializer(f"shape.{which}_heads", np.array([0, 0, heads, spec.head_dim]))
    value = g.op("Reshape", [value, shape], f"{name}/attention/{which}_heads")
    if spec.qk_norm and which != "v":
        value = _norm(g, checkpoint, layer, name, value, f"self_attn.{which}_norm")
    return g.op("Transpose", [value], f"{name}/attention/{which}_heads_first", perm=[0, 2, 1, 3])


def _rotate(g: GraphWriter, spec: DecoderSpec, value: ir.Value, positions: ir.Value, name: str) -> ir.Value:
    half = spec.head_dim // 2
    shape = (spec.max_positions, half)
    cos = g.initializer("rope.cos", external("rope.cos", ROPE_FILE, ir.DataType.FLOAT, shape))
    sin = g.initializer(
        "rope.sin", external("rope.sin", ROPE_FILE, ir.DataType.FLOAT, shape, offset=4 * spec.max_positions * half)
    )
    return g.op("RotaryEmbedding", [value, cos, sin, positions], name)


def _linear(g: GraphWriter, checkpoint: Checkpoint, layer: int, name: str, value: ir.Value, weight: str) -> ir.Value:
    full = f"model.layers.{layer}.{weight}"
    node = f"{name}/{weight.replace('self_attn', 'attention').replace('.', '/')}"
    matrix = g.initializer(
        f"{full}.weight", lazy_weight(f"{full}.weight", checkpoint.weights[f"{full}.weight"], transpose=True)
    )
    product = g.op("MatMul", [value, matrix], node)
    if f"{full}.bias" not in checkpoint.spec.weight_shapes():
        return product
    return g.op("Add", [product, _vector(g, checkpoint, f"{full}.bias")], f"{node}/bias")


def _norm(g: GraphWriter, checkpoint: Checkpoint, layer: int, name: str, value: ir.Value, weight: str) -> ir.Value:
    gain = _vector(g, checkpoint, f"model.layers.{layer}.{weight}.weight")
    return g.op("RMSNormalization", [value, gain], f"{name}/{weight}", epsilon=checkpoint.spec.rms_norm_eps)


def _unit_norm(g: GraphWriter, spec: DecoderSpec, value: ir.Value, node: str) -> ir.Value:
    gain = g.initializer("unit_gain", np.ones(spec.hidden_size, np.float32))
    return g.op("RMSNormalization", [value, gain], node, epsilon=spec.rms_norm_eps)


def _vector(g: GraphWriter, checkpoint: Checkpoint, weight: str) -> ir.Value:
    return g.initializer(weight, lazy_weight(weight, checkpoint.weights[weight]))
