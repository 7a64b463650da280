"""Measure what a GPU recipe's precisions cost in quality, on a CPU: the portable graphs, weights rounded as the
engines'.

    python tools/bench/gpu_precisions.py BUNDLE --target h100
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from common import held_out, print_json

from dash_export.backends.maker import backend_of
from dash_export.backends.onnxruntime.ort_engine import OrtBackend, OrtEngine
from dash_export.building.calibrate import calibrate_matrices
from dash_export.building.engine_graphs import write_whole
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import Recipe, load_recipe, with_weights
from dash_export.commands.tables import print_table
from dash_export.core.divergence import DenseRows, nll
from dash_export.files.artifacts import ArtifactStore, no_progress
from dash_export.graphs.lower.surgery import constant_value, load_graph
from dash_export.graphs.lower.trt_quantize import quantize_weights
from dash_export.graphs.portable.writer import constant
from dash_export.measure.intervals import interval
from dash_export.runtime import DashRuntime

WINDOW = 256


class Replaced(OrtBackend):
    """A backend that takes what lies in `folder` in the place of graphs of the same name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0)
        self._folder = folder

    def load(self, path: Path) -> OrtEngine:
        own = self._folder / path.name
        return super().load(own if own.exists() else path)


def round_graphs(bundle: Bundle, recipe: Recipe, folder: Path) -> None:
    known: dict[str, Any] = {}
    if recipe.weights.calibrates:
        known = dict(calibrate_matrices(bundle, recipe, ArtifactStore(folder / "layers"), "", no_progress))
    names = [f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)]
    for name in (*names, "head"):
        model = load_graph(bundle.graph(name))
        quantize_weights(model.graph, recipe.weights, bundle.manifest.policy.layers, known.get)
        fold_weights(model.graph)
        write_whole(model, folder / bundle.graph(name).name)


def fold_weights(graph: ir.Graph) -> None:
    """Rounded weights as floats: ONNX Runtime would make them anew at every token."""
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        stored, scales = (constant_value(value) for value in node.inputs[:2])
        if stored is not None and scales is not None and stored.ndim == 2:
            spread = np.repeat(scales, node.attributes.get_int("block_size", 1), axis=0) if scales.ndim == 2 else scales
            weight = constant(graph, f"{node.name}/float", stored.astype(np.float32) * spread)
            node.outputs[0].replace_all_uses_with(weight)
            graph.remove(node, safe=True)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="h100", show_default=True)
@click.option(
    "--weights", "asked", multiple=True, default=("int8", "fp8", "int4"), show_default=True,
    help="`recipe`: as the recipe has them.",
)  # fmt: skip
@click.option("--windows", default=12, show_default=True, help=f"Windows of {WINDOW} tokens.")
def main(bundle: Path, target: str, asked: tuple[str, ...], windows: int) -> None:
    """KL and perplexity of dense mode against float32, on held-out prose."""
    opened = Bundle.open(bundle)
    own = backend_of(load_recipe("portable"))
    build = replace(
        opened.load_build(opened.resolve_target(None)), recipe=own.recipe, segments=own.segments(opened.manifest),
        engines=own.ready_engines(opened) or {}, files=(),
    )  # fmt: skip

    def logits(folder: Path) -> list[npt.NDArray[np.float32]]:
        session = DashRuntime(opened, build, Replaced(folder)).session("dense")
        found = (session.score(ids, keep_logits=True).logits for ids in texts)
        return [each for each in found if each is not None]

    texts = held_out(DashRuntime(opened, build, OrtBackend(0)).text.encode, windows * WINDOW).reshape(windows, WINDOW)
    with tempfile.TemporaryDirectory() as empty:
        exact = logits(Path(empty))
    rows, result, recipe = [], {}, load_recipe(target)
    plain = np.array([nll(each, ids[1:]).mean() for each, ids in zip(exact, texts, strict=True)])
    for weights in asked:
        with tempfile.TemporaryDirectory() as folder:
            round_graphs(opened, recipe if weights == "recipe" else with_weights(recipe, weights), Path(folder))
            found = logits(Path(folder))
        kl = interval([DenseRows(one).kl(other).mean() for one, other in zip(exact, found, strict=True)])
        nats = np.array([nll(each, ids[1:]).mean() for each, ids in zip(found, texts, strict=True)])
        over = interval(nats - plain, transform=np.exp)
        percent = [100 * (each - 1) for each in (over.value, over.low, over.high)]
        rows.append((weights, f"{kl.value:.4f}", "{:+.1f} % ({:+.1f} to {:+.1f})".format(*percent)))
        result[weights] = {"kl": kl.value, "perplexity_percent": percent}
    print_table(f"{bundle.name}, weights of {target}, {windows} windows", ("weights",), ("KL", "perplexity"), rows)
    print_json("gpu_precisions", {"target": target, "perplexity": float(np.exp(plain.mean())), "weights": result})


if __name__ == "__main__":
    main()
