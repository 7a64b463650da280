"""Several sequences decoded together: time per step, tokens per second in all, and what is left of skipping.

    python tools/bench/batch.py BUNDLE

Every sequence continues a passage of its own (calibration/heldout.txt), known tokens after a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from common import interleaved, paired_ratio, print_json
from rich.console import Console
from rich.table import Table

from dash_export.resources import resource_folder
from dash_export.runtime import DashRuntime

TEXT = resource_folder("calibration") / "heldout.txt"
PROMPT = 256
TOKENS = 64


class Together:
    """`size` sequences, a step at a time, over the same tokens again and again."""

    def __init__(self, runtime: DashRuntime, texts: list[list[int]], setting: dict[str, Any]) -> None:
        batch = runtime.batch(len(texts), **setting)
        self.size = len(texts)
        self._cache, self._texts = batch._cache, texts
        self._cache.reserve(PROMPT + TOKENS)
        for slot, text in enumerate(texts):
            batch.prompts.restart(text[:PROMPT])
            batch.prompts.copy_cache(self._cache, slot)
        self._rules = [batch.prompts.rule] * self.size
        self._step = batch.engines.step(self._cache, 1, batch=self.size)
        self._count = 0
        self._layers = runtime.engines.model.num_layers
        self._sizes = np.array([len(unit.layers) for unit in runtime.engines.units])
        self.ran: list[float] = []
        self.own: list[float] = []

    def __call__(self) -> None:
        position = PROMPT + self._count % TOKENS
        self._cache.lengths[:] = [position] * self.size
        self._step.decode_batch([text[position] for text in self._texts], self._rules)
        ran = self._layers - self._sizes @ self._step.skipped
        self.own.append(float(ran.mean()))
        self.ran.append(self._layers - float(self._sizes @ self._step.skipped.all(axis=1)))
        self._count += 1


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--sizes", default="1,2,4,8", show_default=True)
@click.option("--skipped", default=4, show_default=True, help="Layers skipped per token (token: on average).")
@click.option("--rounds", default=12, show_default=True)
def main(bundle: Path, target: str, sizes: str, skipped: int, rounds: int) -> None:
    """Dense, static and under the token policy, interleaved."""
    runtime = DashRuntime.load(bundle, target, verify=False)
    counts = [int(size) for size in sizes.split(",")]
    ids = runtime.text.encode(TEXT.read_text(encoding="utf-8"))
    stride = (len(ids) - PROMPT - TOKENS) // max(counts)
    texts = [ids[start : start + PROMPT + TOKENS] for start in range(0, stride * max(counts), stride)]
    settings: list[dict[str, Any]] = [{}, {"policy": "static", "skipped": skipped}, {"skipped": skipped}]
    variants = [Together(runtime, texts[:count], setting) for count in counts for setting in settings]
    runs: list[Callable[[], object]] = list(variants)
    times = interleaved(runs, rounds)
    title = f"{bundle.name}, {target}, {PROMPT} cached tokens, of time: dense is 1"
    heads = ("sequences", "dense ms/step", "tokens/s in all", "of one", "static", "token", "token: own layers", "run")
    table = Table(*heads, title=title)
    rows = []
    for index, count in enumerate(counts):
        dense, static, token = times[3 * index : 3 * index + 3]
        variant = variants[3 * index + 2]
        rows.append(
            {
                "sequences": count,
                "dense_ms": round(1e3 * median(dense), 3),
                "tokens_per_second": round(count / median(dense), 1),
                "of_one": round(count / paired_ratio(dense, times[0]), 3),
                "static": round(paired_ratio(static, dense), 4),
                "token": round(paired_ratio(token, dense), 4),
                "layers_each": round(float(np.mean(variant.own)), 2),
                "layers_run": round(float(np.mean(variant.ran)), 2),
            }
        )
        table.add_row(*(str(value) for value in rows[-1].values()))
    Console().print(table)
    print_json("batch", {"target": target, "skipped": skipped, "rows": rows})


if __name__ == "__main__":
    main()
