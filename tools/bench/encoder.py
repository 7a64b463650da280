"""A dense picture through the engines of builds, and through one whole graph in the same libraries, in turns.

python tools/bench/encoder.py BUNDLE --targets portable,openvino,openvino-bf16
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from common import print_json

from dash_export import DashRuntime
from dash_export.backends.onnxruntime.ort_engine import OrtBackend
from dash_export.backends.openvino.ov_engine import OvDevice
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import POOLED
from dash_export.commands.tables import print_table
from dash_export.graphs.lower.surgery import absorb, load_graph
from dash_export.graphs.portable.writer import GraphWriter, save_graph
from dash_export.measure.timing import in_turns


def whole_graph(bundle: Bundle, path: Path) -> Path:
    g, outputs = GraphWriter("whole", f"All of {bundle.manifest.model.name}"), dict[str, ir.Value]()
    for name in ("embed", *(f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)), "head"):
        state = {"hidden": outputs["hidden_out"]} if outputs else {}
        outputs = absorb(g, load_graph(bundle.graph(name)), state)
        if "hidden_out" in outputs:
            outputs["hidden_out"].name = f"{name}/hidden_out"
    g.graph.outputs.extend(outputs.values())
    return save_graph(g.model(), path)[0]


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--targets", default="portable,openvino,openvino-bf16", show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=15, show_default=True)
def main(bundle: Path, targets: str, batch: int, threads: int, rounds: int) -> None:
    """Time each build, and the whole graph with the backend and the precision of each."""
    variants: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = whole_graph(Bundle.open(bundle), Path(folder) / "whole.onnx")
        for target in targets.split(","):
            runtime = DashRuntime.load(bundle, target, threads=threads)
            encoder = runtime.encoder()
            size = encoder.engines.model.image_size
            pixels = np.random.default_rng(0).standard_normal((batch, 3, *size)).astype(np.float32)
            exact = encoder.encode(pixels)
            assert exact.states is not None  # it is dense
            variants[target] = partial(encoder.encode, pixels)
            outputs = {POOLED: np.empty_like(exact.pooled), "states": np.empty_like(exact.states)}
            if exact.probabilities is not None:
                outputs["logits"] = np.empty_like(exact.probabilities)
            on_openvino = runtime.recipe.backend == "openvino"
            loader = (
                OvDevice(runtime.recipe, threads, encoder.engines.model.tokens) if on_openvino else OrtBackend(threads)
            )
            variants[f"{target}, one graph"] = loader.load(whole).bind({"pixel_values": pixels}, outputs)
    found = np.zeros((2, rounds, len(variants)))
    for number, index in in_turns(len(variants), rounds):
        began = time.perf_counter(), time.process_time()
        list(variants.values())[index]()
        found[:, number, index] = time.perf_counter() - began[0], time.process_time() - began[1]
    clock, processor = 1e3 * np.median(found, axis=1)
    ratios = np.median(found[1] / found[1][:, :1], axis=0)
    # Pairs of one round: a build, and its graph in one.
    apart = np.median(found[1] / found[1][:, [index | 1 for index in range(len(variants))]], axis=0)
    rows = [
        (name, *(round(float(figure), 3) for figure in figures))
        for name, *figures in zip(variants, clock, processor, ratios, apart, strict=True)
    ]
    heads = ("clock ms", "processor ms", "of the first", "of one graph")
    print_table(f"{bundle.name}, dense, batch {batch}, {threads} threads", ("engines",), heads, rows)
    print_json("encoder", {"batch": batch, "threads": threads, "rounds": rounds, "rows": rows})


if __name__ == "__main__":
    main()
