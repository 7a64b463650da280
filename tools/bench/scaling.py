"""How cost grows: time per token with the layers that run, with the context and with the model's size; export and build
time and memory with the model's size.

    python tools/bench/scaling.py BUNDLE -o docs/scaling

BUNDLE gives the first two and its tokenizer; the models of other sizes have random weights, are made in a temporary
folder (1 billion weights take 10 GB on disk for a while) and rounded to nearest. Writes PNG and JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import click
import matplotlib
import numpy as np
import numpy.typing as npt
from common import (
    in_fresh_processes,
    interleaved,
    load_both,
    load_engines,
    one_token,
    paired_ratio,
    print_json,
    whole_build,
)
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from dash_export.bundle import Bundle
from dash_export.evaluation.pictures import DPI, STYLE
from dash_export.manifest import Build
from dash_export.models import open_checkpoint
from dash_export.policy import Bypass, no_policy, save_policy, stored_columns
from dash_export.runtime.rules import DENSE, FixedRule

CONTEXTS = (64, 256, 1024, 2048, 4096, 8000)
CONTEXT = 256
OWED = 2
"""Skipped units in which what is owed for them is measured."""
# Billions of weights -> hidden size, layers, heads, K/V heads, inner size, as SmolLM2 and Llama 3.2 have them.
SHAPES = {
    0.1: (576, 30, 9, 3, 1536),
    0.3: (960, 32, 15, 5, 2560),
    1.0: (2048, 16, 32, 8, 8192),
    3.0: (3072, 28, 24, 8, 8192),
}
RECIPE = Path(__file__).parent / "recipes" / "nearest.toml"
COMMAND = """
import sys
from dash_export.cli import cli
from dash_export.evaluation.alone import peak_memory
cli(sys.argv[1:], standalone_mode=False)
print(peak_memory())
"""
console = Console(highlight=False)
if not console.is_terminal:
    console.width = 120


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--sizes", default="0.1,0.3,1.0", show_default=True, help=f"Of {', '.join(map(str, SHAPES))}.")
@click.option("--rounds", default=12, show_default=True, help="Interleaved blocks per point.")
@click.option("--processes", default=4, show_default=True, help="Fresh ones that load a model's engines.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("scaling"), show_default=True)
@click.option("--one", is_flag=True, hidden=True, help="Only the tax and the skipping of BUNDLE, as JSON.")
def main(bundle: Path, target: str, sizes: str, rounds: int, processes: int, output: Path, one: bool) -> None:
    """Every curve in turn."""
    if one:
        print(json.dumps(_layers(bundle, target, rounds, processes)))
        return
    layers, contexts = _layers(bundle, target, rounds, processes), _contexts(bundle, target, rounds)
    models = {float(size): _model(float(size), bundle, rounds, processes) for size in sizes.split(",")}
    result = {"layers": layers, "contexts": contexts, "models": models}
    _tables(result)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with matplotlib.rc_context(STYLE | {"text.parse_math": True}):  # powers of ten
        _figure(result, f"{bundle.name}, {target}").savefig(output.with_suffix(".png"), dpi=DPI)
    print_json("scaling", result)


def _layers(bundle: Path, target: str, rounds: int, processes: int) -> dict[str, Any]:
    """Time per token against layers executed, and against one whole graph."""
    opened = Bundle.open(bundle)
    total, units, counts = opened.manifest.model.num_layers, opened.manifest.policy.units, _skipped_counts(opened)
    with whole_build(opened, target) as whole:
        found = list(in_fresh_processes(layers_once, bundle, target, whole, rounds, processes=processes))
    milliseconds = [1e3 * mean(median(times[index]) for times in found) for index in range(len(counts))]
    owed = [_owed(times[0], *times[len(counts) : -1]) for times in found]
    executed = [total - sum(len(unit.layers) for unit in units[:count]) for count in counts]
    slope, fixed, fit = _line(executed, milliseconds)
    return {
        "executed": executed,
        "ms": _rounded(milliseconds),
        "ms_per_layer": round(slope, 4),
        "ms_fixed": round(fixed, 4),
        "r2": round(fit, 4),
        "tax": round(mean(paired_ratio(times[0], times[-1]) for times in found), 4),
        "owed": round(mean(owed), 4),
        "owed_error": round(stdev(owed) / len(owed) ** 0.5, 4) if len(owed) > 1 else 0.0,
    }


def _skipped_counts(bundle: Bundle) -> list[int]:
    """Of units, the first ones."""
    counts: list[int] = np.unique(np.linspace(0, len(bundle.manifest.policy.units), 7).astype(int)).tolist()
    return counts


def layers_once(bundle: Path, target: str, whole: tuple[Path, Build], rounds: int, number: int) -> list[list[float]]:
    """Seconds per token with ever more units skipped; with OWED of them, as they are and with nothing done for them;
    of one graph. Who is loaded first changes with `number`.
    """
    opened = Bundle.open(bundle)
    layers, graph = load_both(bundle, target, whole, number)
    counts = _skipped_counts(opened)
    rules = [FixedRule(range(count)) for count in (*counts, OWED)]
    steps = [one_token(layers, CONTEXT, rule) for rule in rules]
    steps.append(one_token(layers, CONTEXT, rules[-1], nothing_owed=True))
    return interleaved([*steps, one_token(graph, CONTEXT)], rounds)


def _contexts(bundle: Path, target: str, rounds: int) -> dict[str, Any]:
    """Time per token against cached tokens: caches of just that length, and short ones in the largest cache."""
    opened = Bundle.open(bundle)
    engines = load_engines(opened, opened.load_build(target))
    contexts = [context for context in CONTEXTS if context < opened.manifest.model.max_positions]
    steps = [one_token(engines, context) for context in contexts]
    roomy = engines.cache(contexts[-1])
    roomy.reserve(contexts[-1])
    step = engines.step(roomy, 1)

    def short() -> None:
        roomy.length = contexts[0]
        step.decode(1, DENSE)

    times = interleaved([*steps, short], rounds, block=4)
    milliseconds = [1e3 * median(each) for each in times[:-1]]
    slope, fixed, fit = _line(contexts, milliseconds)
    return {
        "tokens": contexts,
        "ms": _rounded(milliseconds),
        "ms_per_1000_tokens": round(1000 * slope, 4),
        "ms_fixed": round(fixed, 4),
        "r2": round(fit, 4),
        "shortest_in_largest_cache": round(paired_ratio(times[-1], times[0]), 4),
    }


def _model(size: float, like: Path, rounds: int, processes: int) -> dict[str, Any]:
    """Export, build and decode a model of `size` billion random weights."""
    with tempfile.TemporaryDirectory(prefix="dash-export-scaling-", dir=like.parent) as name:
        root = Path(name)
        weights = _random_model(root / "model", SHAPES[size], like)
        _random_bypasses(root / "model", root / "policy.safetensors")
        exported = _timed("export", root / "model", "--policy", root / "policy.safetensors", "-o", root / "m.dash")
        shutil.rmtree(root / "model")
        built = _timed("build", root / "m.dash", "--target", RECIPE)
        command = [sys.executable, __file__, root / "m.dash", "--target", RECIPE.stem, "--one"]
        command += ["--rounds", rounds, "--processes", processes]
        finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        decoded: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        engines = sum(file.stat().st_size for file in (root / "m.dash" / "engines").rglob("*") if file.is_file())
    row = {"weights": weights, "engine_bytes": engines, "export": exported, "build": built, "decode": decoded}
    owed = f"owed {decoded['owed']:.3f} ± {decoded['owed_error']:.3f}"
    console.print(f"{size} billion: {decoded['ms'][0]:.1f} ms/token, tax {decoded['tax']:.3f}, {owed}")
    return row


def _owed(dense: Sequence[float], skipping: Sequence[float], nothing: Sequence[float]) -> float:
    """The bypasses of skipped units, of what these would have taken; seconds per token, round by round."""
    rounds = list(zip(dense, skipping, nothing, strict=True))
    return median(taken - bound for _, taken, bound in rounds) / median(base - bound for base, _, bound in rounds)


def _random_bypasses(model: Path, path: Path) -> None:
    """Linear, as a trained policy has them; no network."""
    spec = open_checkpoint(model).spec
    policy = no_policy(spec.num_layers)
    rng = np.random.default_rng(1)

    def bypass(columns: int) -> Bypass:
        weight = 0.02 * rng.standard_normal((spec.hidden_size, columns), np.float32)
        return Bypass({"weight": weight, "bias": np.zeros(columns, np.float32)})

    bypasses = tuple(bypass(stored_columns(unit, spec)) for unit in policy.units)
    save_policy(path, replace(policy, bypasses=bypasses, origin="random"), spec, {})


def _random_model(folder: Path, shape: tuple[int, ...], like: Path) -> int:
    """A Llama of this shape with random weights, fp16; returns their number."""
    hidden, layers, heads, kv_heads, inner = shape
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("onnx", "engines", "manifest.json", ".*"))
    config = json.loads((folder / "config.json").read_text())
    head_dim = hidden // heads
    config |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim}
    config |= {"num_key_value_heads": kv_heads, "intermediate_size": inner, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def normal(*size: int) -> npt.NDArray[np.float16]:
        return (0.02 * rng.standard_normal(size, np.float32)).astype(np.float16)

    arrays = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden)}
    arrays["model.norm.weight"] = np.ones(hidden, np.float16)
    for layer in range(layers):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        arrays |= {f"model.layers.{layer}.{name}.weight": normal(*size) for name, size in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float16)
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return sum(array.size for array in arrays.values())


def _timed(*command: object) -> dict[str, float]:
    """Seconds and peak memory (MB) of a dash-export command in a process of its own."""
    began = time.perf_counter()
    arguments = [sys.executable, "-c", COMMAND, *map(str, command)]
    finished = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise click.ClickException(finished.stderr.strip().splitlines()[-1])
    peak = int(finished.stdout.split()[-1]) / 1e6
    return {"seconds": round(time.perf_counter() - began, 2), "peak_mb": round(peak, 1)}


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R2 of the least-squares line."""
    slope, fixed = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + fixed)
    return float(slope), float(fixed), float(1 - left.var() / np.var(y))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _tables(result: dict[str, Any]) -> None:
    layers, contexts = result["layers"], result["contexts"]
    for title, head, key, data in (
        ("Layers executed", "layers", "executed", layers),
        ("Cached tokens", "tokens", "tokens", contexts),
    ):
        table = Table(head, "ms/token", title=title)
        for x, y in zip(data[key], data["ms"], strict=True):
            table.add_row(str(x), f"{y:.3f}")
        console.print(table)
    console.print(
        f"{layers['ms_fixed']:.3f} ms + {layers['ms_per_layer']:.4f} ms per layer, R2 {layers['r2']:.4f}; "
        f"owed {layers['owed']:.3f} ± {layers['owed_error']:.3f}; "
        f"{contexts['ms_fixed']:.3f} ms + {contexts['ms_per_1000_tokens']:.3f} ms per 1000 cached tokens, "
        f"R2 {contexts['r2']:.4f}; {contexts['tokens'][0]} tokens in a cache for {contexts['tokens'][-1]} take "
        f"{contexts['shortest_in_largest_cache']:.3f} of their own cache's time."
    )
    heads = ("weights", "engines", "ms/token", "tax", "ms per layer", "owed", "export s", "its MB", "build s", "its MB")
    table = Table(*heads, title="Size")
    for row in result["models"].values():
        table.add_row(
            f"{row['weights'] / 1e6:.0f} M",
            f"{row['engine_bytes'] / 1e6:.0f} MB",
            f"{row['decode']['ms'][0]:.2f}",
            f"{row['decode']['tax']:.3f}",
            f"{row['decode']['ms_per_layer']:.3f}",
            f"{row['decode']['owed']:.3f} ± {row['decode']['owed_error']:.3f}",
            *(f"{row[part][key]:.0f}" for part in ("export", "build") for key in ("seconds", "peak_mb")),
        )
    console.print(table)


def _figure(result: dict[str, Any], title: str) -> Figure:
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    figure.suptitle(f"{title}; below: random weights of other sizes")
    axes = figure.subplots(2, 2)
    layers, contexts, models = result["layers"], result["contexts"], list(result["models"].values())
    for axis, x, data, slope, label in (
        (axes[0, 0], layers["executed"], layers, layers["ms_per_layer"], "layers executed"),
        (axes[0, 1], contexts["tokens"], contexts, contexts["ms_per_1000_tokens"] / 1000, "cached tokens"),
    ):
        axis.plot(x, data["ms"], "o", color="#0072B2")
        ends = np.array([0, max(x)])
        axis.plot(ends, data["ms_fixed"] + slope * ends, color="#999999", label=f"line, R² {data['r2']:.3f}")
        axis.set(xlabel=label, ylabel="ms per token", xlim=(0, None), ylim=(0, None))
        axis.legend(loc="lower right")
    weights = [row["weights"] / 1e6 for row in models]
    tokens, making = axes[1]
    tokens.plot(weights, [row["decode"]["ms"][0] for row in models], "o-", color="#0072B2")
    for row in models:
        place, label = (row["weights"] / 1e6, row["decode"]["ms"][0]), f"{row['decode']['tax']:.2f} of one graph"
        side, shift = ("right", (-8, -2)) if row is models[-1] else ("left", (8, -8))
        tokens.annotate(label, place, shift, textcoords="offset points", ha=side)
    tokens.set(xlabel="weights, millions", ylabel="ms per token, dense", xlim=(0, None), ylim=(0, None))
    for part, colour in (("export", "#009E73"), ("build", "#D55E00")):
        making.loglog(weights, [row[part]["seconds"] for row in models], "o-", color=colour, label=f"{part}, s")
        making.loglog(weights, [row[part]["peak_mb"] for row in models], "s--", color=colour, label=f"{part}, peak MB")
    making.set(xlabel="weights, millions", ylabel="seconds, MB", ylim=(1, 10_000))
    making.xaxis.set_minor_locator(NullLocator())
    making.set_xticks(weights, [f"{each:.0f}" for each in weights])
    making.legend(loc="center", bbox_to_anchor=(0.42, 0.535), ncols=2)
    return figure


if __name__ == "__main__":
    main()
