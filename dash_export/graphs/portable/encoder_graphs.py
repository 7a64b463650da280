"""The portable graphs of an encoder: `embed`, `layer_NN`, `bypass_AA-BB`, `policy`, `head`. ONNX opset 24.

States are batch x tokens x hidden: special tokens (class, registers), then the patches; of a text its tokens, of which
the first is special, without padding: the texts of a batch have one length. Nothing is kept between inputs,
and decisions are made for a whole picture.
"""

import numpy as np
import onnx_ir as ir

from dash_export.bundle.layout import POOLED, STATES
from dash_export.core.exits import BEFORE, MOST, per_layer
from dash_export.core.policy import SkipPolicy
from dash_export.graphs.portable.encoder_writer import EncoderWriter
from dash_export.graphs.portable.model_writer import HIDDEN_SHAPE
from dash_export.models.encoders import resized
from dash_export.models.spec import (
    CLASS_TOKEN,
    CLASSIFIER,
    PATCH,
    PLACES,
    POSITIONS,
    REGISTERS,
    TYPES,
    WORDS,
    EncoderCheckpoint,
    EncoderSpec,
    Float32Array,
    TextSpec,
)

GUARD = ("mean", "components", "spread", "limit")
"""Weights of a policy's guard."""


def embed_graph(checkpoint: EncoderCheckpoint) -> ir.Model:
    """Return the graph pixel_values [batch, 3, height, width] float32, or input_ids [batch, tokens] int64 -> hidden_out
    [batch, tokens, hidden].
    """
    spec = checkpoint.spec
    if isinstance(spec, TextSpec):
        return _words_graph(checkpoint, spec)
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


def _words_graph(checkpoint: EncoderCheckpoint, spec: TextSpec) -> ir.Model:
    g = EncoderWriter("embed", "Words with their positions.", spec, checkpoint)
    ids = g.input("input_ids", HIDDEN_SHAPE, ir.DataType.INT64)
    length = g.op("Shape", [ids], "embed/length", start=1, end=2)
    table = checkpoint.read(PLACES) + (checkpoint.read(TYPES)[:1] if spec.types else 0)
    places = g.op("Slice", [g.initializer("embed.places", table), g.constant("embed.first", [0]), length],
                  "embed/places")  # fmt: skip
    words = g.op("Gather", [g.weight(WORDS), ids], "embed/words", axis=0)
    g.state_output(g.layer_norm(g.op("Add", [words, places], "embed/placed"), "model.entry_norm", "embed/norm"))
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
    hidden = normed = g.state_input()
    if not spec.norms_sums:
        normed = g.layer_norm(hidden, f"{own}.norm1", f"{name}/norm1")
    queries, keys, values = (g.linear(normed, f"{own}.{which}", f"{name}/attention/{which}") for which in "qkv")
    if spec.rope_theta:
        queries, keys = (
            g.rotated(value, f"{name}/attention/{which}") for value, which in ((queries, "q"), (keys, "k"))
        )
    found = g.attention(queries, keys, values, f"{name}/attention/attention")
    found = g.linear(found, f"{own}.o", f"{name}/attention/o")
    after = g.added(hidden, found, f"{own}.scale1", f"{name}/after_attention")
    normed = g.layer_norm(after, f"{own}.norm{1 if spec.norms_sums else 2}", f"{name}/between")
    after = normed if spec.norms_sums else after
    after = g.added(after, g.mlp(normed, own, name), f"{own}.scale2", f"{name}/after_mlp")
    g.state_output(g.layer_norm(after, f"{own}.norm2", f"{name}/norm2") if spec.norms_sums else after)
    return g.model()


def head_graph(checkpoint: EncoderCheckpoint) -> ir.Model:
    """Return the graph hidden -> pooled [batch, hidden], states [batch, tokens, hidden] and, where the model has a
    classifier, logits [batch, labels].
    """
    spec = checkpoint.spec
    g = EncoderWriter("head", "Final norm and pooling.", spec, checkpoint)
    hidden = g.state_input()
    normed = hidden if spec.norms_sums else g.layer_norm(hidden, "model.norm", "head/norm")
    pooled = g.pooled(normed)
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


def bypass_graph(checkpoint: EncoderCheckpoint, policy: SkipPolicy, place: int) -> ir.Model:
    """Return the graph of an exit (the formulas of `dash_export/core/exits.py`): hidden, and before_1 (the answer of
    the exit before) to before_3 as far as there are such, [batch, hidden] -> pooled, logits where the model has a
    classifier, and of a policy with a network damage [batch, 1], that of unit `place`.
    """
    spec, unit, network = checkpoint.spec, policy.units[place], policy.network
    name = unit.bypass
    g = EncoderWriter(name, f"The answer of a picture that leaves before layer {unit.first}.", spec)
    found = g.product(g.exit_read(g.state_input(), name), policy.bypasses[place], name, name)
    answer = found
    if spec.labels:
        sizes = g.constant(f"{name}.sizes", [spec.hidden_size, spec.labels])
        answer, logits = g.node("Split", [found, sizes], f"{name}/parts", 2, axis=-1)
        g.output(logits, "logits", ("batch", spec.labels))
    g.output(answer, POOLED, ("batch", spec.hidden_size))
    if network is not None:
        before = [g.input(f"before_{at}", ("batch", spec.hidden_size)) for at in range(1, min(BEFORE, place + 1) + 1)]
        centre = g.initializer(f"{name}.centre", network["centre"][None])
        own = g.unit_length(answer, f"{name}/unit")
        gaps = [g.gap(own, other, f"{name}/gap_{at}") for at, other in enumerate([centre, *before])]
        moves = g.op("Concat", [*gaps, *(g.op("Mul", [each, each], f"{each.name}/squared") for each in gaps)],
                     f"{name}/moves", axis=1)  # fmt: skip
        known = [half * (1 + BEFORE) + at for half in (0, 1) for at in range(len(gaps))]
        weight = g.initializer(f"{name}.moves.weight", np.ascontiguousarray(network["weight"][place, known, place:]))
        bias = g.initializer(f"{name}.moves.bias", np.ascontiguousarray(network["bias"][place, place:]))
        score = g.op("Add", [g.op("MatMul", [moves, weight], f"{name}/score"), bias], f"{name}/logs")
        most = g.initializer(f"{name}.most", np.array(MOST, np.float32))
        lost = g.op("Exp", [g.op("Min", [score, most], f"{name}/bounded")], f"{name}/lost")
        matrix = g.initializer(f"{name}.per_layer", per_layer(place, policy.units, spec.num_layers))
        each = g.op("MatMul", [lost, matrix], f"{name}/per_layer")
        damage = g.op("ReduceMax", [each, g.constant(f"{name}.axis", [1])], f"{name}/damage", keepdims=1)
        g.output(damage, "damage", ("batch", 1))
    return g.model()


def policy_graph(spec: EncoderSpec, policy: SkipPolicy) -> ir.Model:
    """Return the graph hidden [batch, tokens, hidden], the input of the policy's layer `read`, -> pooled [batch,
    hidden], the first answer, and foreign [batch, 1] float32 (the formula of `dash_export/core/policy.py`): infinite
    for a picture that is foreign, else 0.
    """
    network = policy.network
    assert network is not None
    g = EncoderWriter("policy", f"First answer and guard ({policy.origin}).", spec)
    hidden = g.state_input()
    early = {key: network[f"early.{key}"] for key in ("weight", "bias")}
    g.output(g.product(g.exit_read(hidden, "early"), early, "early", "early"), POOLED, ("batch", spec.hidden_size))
    weights = {name: g.initializer(f"policy.{name}", network[name]) for name in GUARD}
    special, patches = g.apart(g.unit_norm(hidden, "policy/norm"), "policy")
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
    far = g.op("ReduceMean", [g.op("Mul", [kept, kept], "policy/kept_square"), axis], "policy/far", keepdims=1)
    inside = g.length(g.op("Mul", [kept, weights["spread"]], "policy/inside"), "policy/within")
    outside = g.op("Sub", [g.length(centred, "policy/length"), inside], "policy/outside")
    found = g.op("Concat", [far, outside], "policy/distances", axis=1)
    over = g.op("Greater", [found, weights["limit"]], "policy/over")
    beyond = g.op("Cast", [over], "policy/each", to=ir.DataType.FLOAT)
    beyond = g.op("ReduceMax", [beyond, axis], "policy/any", keepdims=1)
    none = g.initializer("policy.none", np.array([0.0], np.float32))
    infinite = g.initializer("policy.infinite", np.array([np.inf], np.float32))
    foreign = g.op("Where", [g.op("Greater", [beyond, none], "policy/beyond"), infinite, none], "policy/foreign")
    g.output(foreign, "foreign", ("batch", 1))
    return g.model()
