"""The `ort` dialect: portable graphs rewritten into what ONNX Runtime runs best on a CPU. Each pass finds its nodes by
operator and data flow, so a merged segment is just a longer graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dash_export.errors import BackendError
from dash_export.graphs.ort_quantize import CONTRIB, quantize_weights
from dash_export.graphs.rounded import Roundings, scaled, to_nearest, weight_precision
from dash_export.graphs.surgery import (
    add_constant,
    constant_value,
    drop_unused,
    drop_unused_inputs,
    hand_over,
    only_user,
    replace,
    transpose_tables,
)
from dash_export.names import new_names, short_name
from dash_export.targets import Precision, Recipe, WeightsRecipe

PACK_ORDER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""GroupQueryAttention takes packed projections in this order."""
ROTARY_MULTIPLE = 16
"""GroupQueryAttention rotates only heads whose size is a multiple of this."""


def lower(model: ir.Model, recipe: Recipe, gated: Collection[int], roundings: Roundings = to_nearest) -> ir.Model:
    """A portable segment, bypass or policy graph -> the `ort` dialect, in place.

    Attention becomes GroupQueryAttention (inputs `seqlens_k` [batch] int32 and `total_length` [1] int32
    replace mask, positions and write indices), the cache writes of a bypass outputs, Add + RMSNormalization one
    node, projections that read the same value one matrix, weights are quantised, as `roundings` says where it has one
    for a matrix.
    """
    graph = model.graph
    graph.opset_imports[CONTRIB] = 1
    folded = _fold_scale(graph)
    _pack_projections(graph, recipe.weights, gated)
    _group_query_attention(graph)
    _new_rows(graph)
    _silu(graph)
    _fuse_skip_norms(graph)
    transpose_tables(graph)
    quantize_weights(graph, recipe.weights, gated, scaled(roundings, folded))
    drop_unused_inputs(graph)
    drop_unused(graph)
    for value in (*graph.inputs, *graph.outputs):
        value.name = short_name(str(value.name))
    return model


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _expect(value: ir.Value | None, op_type: str) -> ir.Node:
    node = _producer(value, op_type)
    if node is None:
        raise BackendError(
            f"The portable graph is not what this version writes (expected {op_type} before {value}): "
            "export the model again."
        )
    return node


def _fold_scale(graph: ir.Graph) -> dict[str, float]:
    """Queries come out of their projection (or their norm) scaled already. ONNX Runtime's product of one row with many
    is twice as fast where it has no factor to apply. Returns the factor of every projection changed.
    """
    folded = {}
    for node in graph:
        if node.op_type != "Attention":
            continue
        query, _, norm = _heads(_expect(node.inputs[0], "RotaryEmbedding").inputs[0])
        scale = node.attributes["scale"].as_float()
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        last = query.producer()
        if norm is not None:
            _scale_constant(graph, norm, scale)
            continue
        if last is not None and last.op_type == "Add":
            _scale_constant(graph, last, scale)
            assert last.inputs[0] is not None
            last = last.inputs[0].producer()
        assert last is not None
        _scale_constant(graph, last, scale)
        folded[str(last.name)] = scale
    return folded


def _scale_constant(graph: ir.Graph, node: ir.Node, scale: float) -> None:
    """Multiply a node's second input, which is constant."""
    old = node.inputs[1]
    array = constant_value(old)
    assert old is not None
    assert array is not None
    node.replace_input_with(1, add_constant(graph, f"{old.name}.scaled", array * array.dtype.type(scale)))


def _pack_projections(graph: ir.Graph, recipe: WeightsRecipe, gated: Collection[int]) -> None:
    """MatMuls (with their biases) that read one value at one precision become one wide MatMul and a Split: wide
    matrices stream faster.
    """
    readers: dict[tuple[ir.Value, Precision], list[ir.Node]] = defaultdict(list)
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if (
            node.op_type == "MatMul"
            and source is not None
            and constant_value(node.inputs[1]) is not None
            and str(node.name).endswith(PACK_ORDER)
        ):
            readers[source, weight_precision(str(node.name), recipe, gated)].append(node)
    for (source, _), nodes in readers.items():
        if len(nodes) > 1:
            _pack(graph, source, sorted(nodes, key=lambda node: PACK_ORDER.index(str(node.name).rsplit("/", 1)[1])))


def _pack(graph: ir.Graph, source: ir.Value, nodes: Sequence[ir.Node]) -> None:
    matrices = [constant_value(node.inputs[1]) for node in nodes]
    biases = [_bias_of(node) for node in nodes]
    name = "+".join([str(nodes[0].name), *(str(node.name).rsplit("/", 1)[1] for node in nodes[1:])])
    widths = [matrix.shape[1] for matrix in matrices if matrix is not None]
    sizes = np.array(widths)
    weight = add_constant(
        graph, f"{name}.weight", np.concatenate([matrix for matrix in matrices if matrix is not None], axis=1)
    )
    last = ir.node("MatMul", [source, weight], name=name)
    last.outputs[0].name = name
    new = [last]
    if any(bias is not None for bias in biases):
        packed = np.concatenate([_bias_array(bias, width) for bias, width in zip(biases, widths, strict=True)])
        last = ir.node("Add", [last.outputs[0], add_constant(graph, f"{name}.bias", packed)], name=f"{name}/bias")
        last.outputs[0].name = f"{name}/bias"
        new.append(last)
    split = ir.node(
        "Split",
        [last.outputs[0], add_constant(graph, f"{name}.sizes", sizes)],
        {"axis": -1},
        num_outputs=len(nodes),
        name=f"{name}/split",
    )
    graph.insert_before(next(node for node in graph if node in nodes), [*new, split])
    for node, bias, part in zip(nodes, biases, split.outputs, strict=True):
        end = bias if bias is not None else node
        hand_over(end.outputs[0], part)
        graph.remove([node] if bias is None else [node, bias], safe=True)


def _bias_array(bias: ir.Node | None, width: int) -> npt.NDArray[np.float32]:
    array = constant_value(bias.inputs[1]) if bias is not None else None
    return np.zeros(width, np.float32) if array is None else array.astype(np.float32)


def _bias_of(node: ir.Node) -> ir.Node | None:
    user = only_user(node)
    return user if user is not None and user.op_type == "Add" and str(user.name) == f"{node.name}/bias" else None


def _group_query_attention(graph: ir.Graph) -> None:
    nodes = [node for node in graph if node.op_type == "Attention"]
    if not nodes:
        return
    lengths = _input(graph, "seqlens_k", ("batch",))
    total = _input(graph, "total_length", (1,))
    for node in nodes:
        _one_attention(graph, node, lengths, total)


def _one_attention(graph: ir.Graph, attention: ir.Node, lengths: ir.Value, total: ir.Value) -> None:
    q_rotary = _expect(attention.inputs[0], "RotaryEmbedding")
    write_key, write_value = (_expect(attention.inputs[index], "TensorScatter") for index in (1, 2))
    k_rotary = _expect(write_key.inputs[1], "RotaryEmbedding")
    query, query_gone, q_norm = _heads(q_rotary.inputs[0])
    key, key_gone, k_norm = _heads(k_rotary.inputs[0])
    value, value_gone, _ = _heads(write_value.inputs[1])
    merge = only_user(only_user(attention))
    assert merge is not None
    head_dim, heads = _shape_constant(query_gone)
    kv_heads = _shape_constant(key_gone)[1]
    split = _producer(query, "Split")
    rotates = head_dim % ROTARY_MULTIPLE == 0
    # One packed matrix fed all three: hand it over whole.
    packed = split is not None and q_norm is None and rotates and list(split.outputs)[:3] == [query, key, value]
    whole = _undivided(graph, split, 3) if packed and split is not None else None
    if q_norm is not None and k_norm is not None:
        query, key = (_merged_heads(graph, norm, merge.inputs[1], merge) for norm in (q_norm, k_norm))
        query_gone, key_gone = query_gone[:1], key_gone[:1]
    if not rotates:
        query, key = _rotated(graph, q_rotary, query, heads, merge), _rotated(graph, k_rotary, key, kv_heads, merge)
    inputs: list[ir.Value | None] = [query, key, value] if whole is None else [whole, None, None]
    inputs += [write_key.inputs[0], write_value.inputs[0], lengths, total, *(q_rotary.inputs[1:3] if rotates else ())]
    attributes: dict[str, object] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "do_rotary": int(rotates),
        "scale": attention.attributes["scale"].as_float(),
    }
    new = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3, name=attention.name)
    graph.insert_before(merge, new)
    for before, after in zip((merge, write_key, write_value), new.outputs, strict=True):
        hand_over(before.outputs[0], after)
    transpose = _expect(merge.inputs[0], "Transpose")
    gone = [
        merge,
        transpose,
        attention,
        q_rotary,
        write_key,
        k_rotary,
        write_value,
        *query_gone,
        *key_gone,
        *value_gone,
    ]
    graph.remove(gone + ([split] if whole is not None and split is not None else []), safe=True)


def _undivided(graph: ir.Graph, split: ir.Node, parts: int) -> ir.Value:
    """The first `parts` outputs of a Split as one value; what else it gave comes from a new Split."""
    source, sizes = split.inputs[0], constant_value(split.inputs[1])
    assert source is not None
    assert sizes is not None
    rest = list(split.outputs)[parts:]
    if not rest:
        return source
    constant = add_constant(graph, f"{split.name}.rest", np.array([sizes[:parts].sum(), *sizes[parts:]]))
    new = ir.node("Split", [source, constant], {"axis": -1}, num_outputs=1 + len(rest), name=f"{split.name}/rest")
    new.outputs[0].name = f"{split.name}/first"
    graph.insert_before(split, new)
    for before, after in zip(rest, new.outputs[1:], strict=True):
        hand_over(before, after)
    return new.outputs[0]


def _new_rows(graph: ir.Graph) -> None:
    """A cache write that nothing attends to, as in a bypass, becomes an output: the new rows [batch, sequence,
    kv_heads * head_dim], which the host writes where they go: fewer nodes, and no turned heads.
    """
    for node in list(graph):
        if node.op_type != "TensorScatter":
            continue
        rotary = _producer(node.inputs[1], "RotaryEmbedding")
        rows, gone, norm = _heads((rotary or node).inputs[0 if rotary is not None else 1])
        head_dim, heads = _shape_constant(gone)
        if norm is not None:
            merged = add_constant(graph, f"{norm.name}.merged", np.array([0, 0, heads * head_dim]))
            rows, gone = _merged_heads(graph, norm, merged, node), gone[:1]
        if rotary is not None:
            rows, gone = _rotated(graph, rotary, rows, heads, node), [rotary, *gone]
        cache, (present,) = str(node.outputs[0].name).split("."), node.outputs
        index = graph.outputs.index(present)
        graph.outputs[index] = rows
        rows.name = new_names(int(cache[1]))[("key", "value").index(cache[2])]
        rows.shape, rows.type = ir.Shape(["batch", "sequence", heads * head_dim]), present.type
        graph.remove([node, *gone], safe=True)


def _merged_heads(graph: ir.Graph, norm: ir.Node, shape: ir.Value | None, before: ir.Node) -> ir.Value:
    """The per-head norm stays a node of its own (the CPU kernel has none); its heads side by side again, as the kernel
    takes them.
    """
    node = ir.node("Reshape", [norm.outputs[0], shape], name=f"{norm.name}/merge_heads")
    node.outputs[0].name = node.name
    graph.insert_before(before, node)
    return node.outputs[0]


def _rotated(graph: ir.Graph, rotary: ir.Node, value: ir.Value, heads: int, before: ir.Node) -> ir.Value:
    """RoPE on [batch, sequence, heads * head_dim]."""
    node = ir.node(
        "RotaryEmbedding", [value, *rotary.inputs[1:]], {"num_heads": heads}, name=f"{rotary.name}/heads_merged"
    )
    node.outputs[0].name = node.name
    graph.insert_before(before, node)
    return node.outputs[0]


def _heads(value: ir.Value | None) -> tuple[ir.Value, list[ir.Node], ir.Node | None]:
    """Walk back over Transpose, the per-head norm and Reshape to the projection. Returns (projection, nodes passed,
    norm).
    """
    passed = [_expect(value, "Transpose")]
    norm = _producer(passed[-1].inputs[0], "RMSNormalization")
    if norm is not None:
        passed.append(norm)
    passed.append(_expect(passed[-1].inputs[0], "Reshape"))
    projection = passed[-1].inputs[0]
    assert projection is not None
    return projection, passed, norm


def _shape_constant(passed: Sequence[ir.Node]) -> tuple[int, int]:
    shape = constant_value(passed[-1].inputs[1])
    assert shape is not None
    return int(shape[3]), int(shape[2])


def _silu(graph: ir.Graph) -> None:
    for node in list(graph):
        sigmoid = next(
            (found for found in (_producer(value, "Sigmoid") for value in node.inputs) if found is not None), None
        )
        if node.op_type == "Mul" and sigmoid is not None and sigmoid.inputs[0] in node.inputs:
            replace(
                graph, node, ir.node("QuickGelu", [sigmoid.inputs[0]], {"alpha": 1.0}, domain=CONTRIB, name=node.name)
            )
            graph.remove(sigmoid, safe=True)


def _fuse_skip_norms(graph: ir.Graph) -> None:
    """Add -> RMSNormalization with the model's own gain becomes one node that also gives the sum."""
    for node in list(graph):
        added = _producer(node.inputs[0], "Add") if node.op_type == "RMSNormalization" else None
        if added is None or constant_value(added.inputs[1]) is not None:
            continue
        inputs = [added.inputs[0], added.inputs[1], node.inputs[1]]
        new = ir.node(
            "SkipSimplifiedLayerNormalization",
            inputs,
            {"epsilon": node.attributes["epsilon"].as_float()},
            domain=CONTRIB,
            num_outputs=4,
            name=node.name,
        )
        graph.insert_before(added, new)
        hand_over(node.outputs[0], new.outputs[0])
        hand_over(added.outputs[0], new.outputs[3])
        for unused in new.outputs[1:3]:
            unused.name = ""
        graph.remove([node, added], safe=True)


def _input(graph: ir.Graph, name: str, shape: Sequence[int | str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.append(value)
    return value
