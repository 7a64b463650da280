"""Weights in a bundle as the checkpoint has them: the same values, in no more bytes."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from dash_export import DashRuntime
from dash_export.backends.onnxruntime import ort_maker as cpu_backend
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.building.graph_runs import graph_run
from dash_export.errors import BackendError, BundleError
from dash_export.graphs.lower.surgery import load_graph
from dash_export.graphs.portable import ggml
from dash_export.graphs.portable.stored import fold_conversions
from dash_export.graphs.portable.writer import PAGE, GraphWriter, save_graph
from dash_export.models import open_checkpoint
from tests.models.helpers import random_blocks, tiny_tokenizer, write_gguf
from tests.tiny import random_ids, save_model, tiny_policy

pytestmark = pytest.mark.usefixtures("unmeasured")


def graph_of(kind: str, factors: np.ndarray, blocks: np.ndarray) -> ir.Model:
    g = GraphWriter("graph", "")
    values = [g.initializer("factors", factors), g.initializer("blocks", blocks)]
    (weight,) = g.node(kind, values, "weight", 1, ggml.DOMAIN)
    g.output(g.op("Identity", [weight], "out"), "out", (None, None))
    model = g.model()
    made = ggml.block_function(kind)
    model.functions[made.identifier()] = made
    model.graph.opset_imports[ggml.DOMAIN] = 1
    return model


@pytest.mark.parametrize("kind", ggml.BLOCKS)
def test_functions_give_what_the_gguf_library_gives(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime with the function's nodes, and the weight that a lowering takes: equal bit for bit."""
    packed = random_blocks(kind)
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert np.unique(expected).size > 100
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1] == ggml.BLOCKS[kind].bytes
    model = graph_of(kind, *ggml.split_blocks(kind, packed))
    ir.save(model, tmp_path / "graph.onnx")
    np.testing.assert_array_equal(graph_run(tmp_path / "graph.onnx")({})["out"], expected)
    fold_conversions(model)
    value = model.graph.initializers["weight"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy(), expected)
    assert len(model.graph.initializers) == 1


def test_blocks_that_are_none_are_refused() -> None:
    """Of another shape or type, or with factors that are no numbers."""
    factors, blocks = ggml.split_blocks("Q4_0", random_blocks("Q4_0"))
    wrong = (("Q4_K", factors, blocks), ("Q4_0", factors, blocks[:, 1:]), ("Q4_0", factors.astype(np.float32), blocks))
    for kind, *arrays in wrong:
        with pytest.raises(BundleError, match=r"is no Q4_. of ggml"):
            fold_conversions(graph_of(kind, *arrays))
    model = graph_of("Q4_0", factors, blocks)
    next(iter(model.graph)).op_type = "Q9_9"
    with pytest.raises(BundleError, match="is no Q9_9"):
        fold_conversions(model)
    factors[3] = np.nan
    fold_conversions(model := graph_of("Q4_0", factors, blocks))
    value = model.graph.initializers["weight"].const_value
    assert value is not None
    with pytest.raises(BundleError, match="numbers that are none"):
        value.numpy()


@pytest.mark.parametrize(("kind", "options"), [("Cast", {"to": ir.DataType.FLOAT}), ("Transpose", {"perm": [1, 0]})])
def test_a_row_of_conversions(kind: str, options: dict[str, Any]) -> None:
    """Thousands of them are a forgery: not all are made, for each would wait for the one before it."""
    g = GraphWriter("graph", "")
    value = g.initializer("weight", np.ones((3, 4), np.float32))
    for place in range(3000):
        value = g.op(kind, [value], f"step{place}", **options)
    g.output(value, "step2999", (None, None))
    model = g.model()
    fold_conversions(model)
    assert len(model.graph) == 2999
    (left,) = model.graph.initializers.values()
    assert left.const_value is not None
    assert left.const_value.numpy().sum() == 12
    g = GraphWriter("graph", "")
    value = g.op("Transpose", [g.initializer("weight", np.ones((3, 4), np.float32))], "same", perm=[0, 1])
    g.output(value, "same", (3, 4))
    fold_conversions(model := g.model())
    assert [node.op_type for node in model.graph] == ["Transpose"], "one that is none stays"


def test_a_matrix_that_is_converted_twice() -> None:
    """Each time it would be another of its size, of one in the file."""
    g = GraphWriter("graph", "")
    half = g.initializer("weight", np.ones((3, 4), np.float16))
    both = [g.op("Cast", [half], f"out{place}", to=ir.DataType.FLOAT) for place in range(2)]
    g.output(g.op("Add", both, "out"), "out", (3, 4))
    with pytest.raises(BundleError, match="weight is converted twice"):
        fold_conversions(g.model())


@pytest.mark.parametrize(("length", "message"), [("100", "another size than its shape"), (None, "cannot be read")])
def test_external_data_of_another_size_or_of_no_type(length: str | None, message: str, tmp_path: Path) -> None:
    g, path = GraphWriter("graph", ""), tmp_path / "graph.onnx"
    g.output(g.op("Identity", [g.initializer("weight", np.ones((128, 64), np.float32))], "out"), "out", (128, 64))
    save_graph(g.model(), path)
    load_graph(path)
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    if length is None:
        tensor.data_type = onnx.TensorProto.UNDEFINED
    else:
        next(entry for entry in tensor.external_data if entry.key == "length").value = length
    onnx.save(proto, path)
    with pytest.raises(BundleError, match=message):
        load_graph(path)


def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path) -> None:
    """A bfloat16 folder: engines and portable graphs are those of the same weights in float32."""
    model = save_model(tmp_path / "half").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "full")
    tiny_tokenizer().save(str(tmp_path / "full" / "tokenizer.json"))
    sizes, logits = {}, {}
    for name in ("half", "full"):
        checkpoint = open_checkpoint(tmp_path / name)
        bundle = export(checkpoint, tmp_path / f"{name}.dash", tiny_policy(checkpoint))
        sizes[name] = bundle.path("onnx/embed.data").stat().st_size
        for target in ("portable", "cpu-fp32"):
            kind, _, weights = target.partition("-")
            build(bundle, kind, weights=weights or None)
            session = DashRuntime.load(bundle.root, target).session()
            logits[name, target] = session.score(random_ids(12), keep_logits=True).logits
    assert sizes["half"] * 2 == sizes["full"]
    for target in ("portable", "cpu-fp32"):
        np.testing.assert_array_equal(logits["half", target], logits["full", target])


@pytest.mark.parametrize(
    ("kind", "tied", "family"),
    [("Q4_1", True, "llama"), ("Q6_K", True, "llama"), ("F16", True, "llama"), ("Q8_0", False, "phi3")],
)
def test_a_gguf_file_keeps_its_bytes(
    tmp_path: Path, kind: str, tied: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export is not larger than the file, a tied embedding is there once, and every weight is the file's."""
    options = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": tied, "pad_token_id": 0}
    model = save_model(tmp_path / "model", family, **options)
    half = kind == "F16"
    write_gguf(tmp_path / "model.gguf", model.half() if half else model, quantize=None if half else kind)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    bundle = export(checkpoint, tmp_path / "a.dash")
    files = [
        bundle.path(f"onnx/{name}.data") for name in (*(f"layer_{layer:02d}" for layer in range(6)), "embed", "head")
    ]
    size = sum(path.stat().st_size for path in files if path.exists())
    pages = 2 * PAGE * len(checkpoint.weights)
    assert size - pages < (tmp_path / "model.gguf").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(cpu_backend, "available_memory", lambda: 10 * 256 * checkpoint.spec.vocab_size)
        if half:
            build(bundle, "portable")
        else:
            with pytest.raises(BackendError, match="Use --target cpu --weights fp32"):
                build(bundle, "portable")
    (lookup, *_) = onnx.load(bundle.graph("embed"), load_external_data=False).graph.node
    assert lookup.op_type == "Gather", "ONNX Runtime makes float32 of the rows of a prompt, not of all"
    found = {}
    for name in bundle.manifest.graphs:
        found |= {key: value.const_value for key, value in load_graph(bundle.graph(name)).graph.initializers.items()}
    for name, weight in checkpoint.weights.items():
        held, expected = found["head/weight" if name == "lm_head.weight" else name], checkpoint.read(name)
        assert held is not None
        same = held.numpy().shape == weight.shape and "layers" not in name and name != "lm_head.weight"
        np.testing.assert_array_equal(held.numpy(), expected if same or expected.ndim == 1 else expected.T, name)
    if tied:
        np.testing.assert_array_equal(found["head/weight"].numpy(), checkpoint.read("model.embed_tokens.weight").T)
    build(bundle, "portable")
    build(bundle, "cpu", weights="fp32")
    scores = [
        DashRuntime.load(bundle.root, name).session().score(random_ids(12), keep_logits=True)
        for name in ("portable", "cpu-fp32")
    ]
    one, other = (score.logits for score in scores)
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
