"""Models of several sizes: bytes of their bundle and engines, time and peak memory of export, build and run.

    python tools/bench/sizes.py MODEL.gguf 1 3 8 --folder /where/there/is/room

A number stands for a Llama 3 of so many billion random weights in Q4_K. Each step is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
from common import print_json
from tokenizers import pre_tokenizers

from dash_export.commands.tables import print_table

VOCABULARY = 128_256
SHAPES = {  # hidden, inner, layers, heads, KV heads, tied
    "1": (2048, 8192, 16, 32, 8, True),
    "3": (3072, 8192, 28, 24, 8, True),
    "8": (4096, 14_336, 32, 32, 8, False),
}
BLOCKS = {"Q4_K": (144, slice(0, 4)), "Q6_K": (210, slice(208, 210))}
"""Bytes of 256 weights, and where the float16 factors are in them."""

STEP = """
import runpy, sys, time
from pathlib import Path
began = time.perf_counter()
sys.argv = ["dash-export", *sys.argv[1:]]
try:
    runpy.run_module("dash_export", run_name="__main__")
except SystemExit as ended:
    if ended.code:
        raise
finally:
    status = Path("/proc/self/status").read_text()
    print("TOOK", time.perf_counter() - began, int(status.partition("VmHWM:")[2].split()[0]) / 1e6, file=sys.stderr)
"""


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--folder", type=click.Path(exists=True, path_type=Path), help="For the files, which are deleted after.")
@click.option("--target", default="cpu-gguf", show_default=True)
def main(models: tuple[str, ...], folder: Path | None, target: str) -> None:
    """Export, build and run each."""
    rows = {}
    for model in models:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            rows[model] = measured(model, Path(work), target)
    heads = ("file GB", "graphs GB", "engines GB", "export s", "GB", "build s", "GB", "run ms/token", "GB")
    shown = []
    for model, row in rows.items():
        steps = (f"{value:.1f}" for step in ("export", "build") for value in row[step])
        sizes = (f"{row[name]:.2f}" for name in ("file_gb", "graphs_gb", "engines_gb"))
        shown.append((Path(model).stem, *sizes, *steps, f"{row['ms']:.0f}", f"{row['run'][1]:.1f}"))
    print_table(f"sizes, {target}", ("model",), heads, shown)
    print_json("sizes", {"target": target, "rows": rows})


def measured(model: str, work: Path, target: str) -> dict[str, Any]:
    source = random_model(model, work / f"{model}b.gguf") if model in SHAPES else Path(model)
    bundle = work / "a.dash"
    row: dict[str, Any] = {"file_gb": source.stat().st_size / 1e9}
    row["export"], _ = step("export", source, "-o", bundle)
    row["graphs_gb"] = size(bundle / "onnx")
    if model in SHAPES:
        source.unlink()  # there may be no room for more
    row["build"], _ = step("build", bundle, "--target", target)
    row["engines_gb"] = size(bundle / "engines")
    asked = ("--raw", "--max-tokens", 24, "--policy", "dense", "--target", target, "--json")
    row["run"], told = step("run", bundle, "Once upon a time", *asked)
    row["ms"] = 1e3 / json.loads(told)["statistics"]["tokens_per_second"]
    return row


def step(*command: object) -> tuple[tuple[float, float], str]:
    """(seconds, GB at most), and what it printed."""
    run = subprocess.run([sys.executable, "-c", STEP, *map(str, command)], capture_output=True, text=True)
    if run.returncode:
        raise click.ClickException(f"{command[0]} failed: {run.stderr[-2000:]}")
    _, seconds, memory = run.stderr.splitlines()[-1].split()
    click.echo(f"{' '.join(map(str, command[:2]))}: {float(seconds):.1f} s, {float(memory):.2f} GB", err=True)
    return (float(seconds), float(memory)), run.stdout


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def random_model(name: str, path: Path) -> Path:
    hidden, inner, layers, heads, kv_heads, tied = SHAPES[name]
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": layers, "context_length": 8192, "embedding_length": hidden, "feed_forward_length": inner}
    sizes |= {"attention.head_count": heads, "attention.head_count_kv": kv_heads, "vocab_size": VOCABULARY}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 500_000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<|end|>"]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [1] * (len(tokens) - 1) + [3])
    writer.add_array("tokenizer.ggml.merges", ["h e"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", len(tokens) - 1)
    kv = hidden // heads * kv_heads
    matrices = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    matrices |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    matrices |= {"ffn_down": (hidden, inner)}
    tables = ["token_embd"] if tied else ["token_embd", "output"]
    every = [(f"{table}.weight", "Q6_K", (VOCABULARY, hidden)) for table in tables]
    every += [
        (f"blk.{layer}.{matrix}.weight", "Q4_K", shape) for layer in range(layers) for matrix, shape in matrices.items()
    ]
    data = {shape: random_blocks(kind, *shape) for _, kind, shape in every}
    for tensor, kind, shape in every:
        writer.add_tensor(tensor, data[shape], raw_dtype=gguf.GGMLQuantizationType[kind])
    norms = [f"blk.{layer}.{norm}.weight" for layer in range(layers) for norm in ("attn_norm", "ffn_norm")]
    for norm in [*norms, "output_norm.weight"]:
        writer.add_tensor(norm, np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    rng, (width, factors) = np.random.default_rng(rows), BLOCKS[kind]
    blocks = rng.integers(0, 256, (64, columns // 256, width), np.uint8)
    # A code times a part's scale is about 7 * 30 in Q4_K and 16 * 60 in Q6_K.
    scale = columns**-0.5 / (200 if kind == "Q4_K" else 1000)
    pair = np.array([scale, 7 * scale] if kind == "Q4_K" else [scale], np.float16)
    if kind == "Q4_K":  # as in a trained model, codes are about zero: a part's least weight is 7 of its scales
        blocks[..., 8:12], blocks[..., 12:16] = blocks[..., 4:8], 17 * (blocks[..., 12:16] & 15)
    blocks[..., factors] = np.frombuffer(pair.tobytes(), np.uint8)
    return np.tile(blocks.reshape(64, -1), (rows // 64, 1))


if __name__ == "__main__":
    main()
