"""Several sequences decoded together: time per step, tokens per second in all, and what is left of skipping.

python tools/bench/batch.py BUNDLE
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from common import held_out, print_json, ratios, timed

from dash_export.commands.tables import print_table
from dash_export.runtime import DashRuntime

PROMPT = 256
TOKENS = 32
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "static": {"policy": "static"}, "token": {"policy": "token"}}


class Together:
    """Several sequences, TOKENS steps at a call: skips come in clusters. `ran`: layers that any of them ran, by step,
    and `own`: the mean of each one's own.
    """

    def __init__(self, runtime: DashRuntime, texts: list[list[int]], setting: dict[str, Any]) -> None:
        batch = runtime.batch(len(texts), **setting)
        self._cache, self._texts = batch.rows.cache, texts
        self._cache.reserve(PROMPT + TOKENS)
        for slot, text in enumerate(texts):
            batch.prompts.restart(text[:PROMPT])
            self._cache.take(slot, batch.prompts.cache)
        self._rules = [batch.prompts.rules.rule] * len(texts)
        self._step = batch.engines.step(self._cache, 1, batch=len(texts))
        self._layers = runtime.engines.model.num_layers
        self._sizes = np.array([len(unit.layers) for unit in runtime.engines.units])
        self.ran: list[float] = []
        self.own: list[float] = []

    def __call__(self) -> None:
        for position in range(PROMPT, PROMPT + TOKENS):
            self._cache.lengths[:] = [position] * len(self._texts)
            self._step.decode_batch([text[position] for text in self._texts], self._rules)
            self.own.append(self._layers - float((self._sizes @ self._step.skipped).mean()))
            self.ran.append(self._layers - float(self._sizes @ self._step.skipped.all(axis=1)))


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--sizes", default="1,2,4,8", show_default=True)
@click.option("--skipped", default=4, show_default=True, help="Layers skipped per token (token: on average).")
@click.option("--rounds", default=8, show_default=True)
def main(bundle: Path, target: str, sizes: str, skipped: int, rounds: int) -> None:
    """Dense, static and under the token policy, interleaved."""
    runtime = DashRuntime.load(bundle, target, verify=False)
    counts = [int(size) for size in sizes.split(",")]
    texts = held_out(runtime.text.encode, max(counts) * (PROMPT + TOKENS)).reshape(max(counts), -1).tolist()
    variants = {
        f"{kind} {count}": Together(runtime, texts[:count], own | ({"skipped": skipped} if own else {}))
        for count in counts
        for kind, own in KINDS.items()
    }
    passes = timed(dict(variants), rounds, block=1, settle=0)
    times = {name: [seconds / TOKENS for seconds in own] for name, own in passes.items()}
    heads = ("sequences", "dense ms/step", "tokens/s in all", "of one", "static", "token", "token: own layers", "run")
    rows = []
    for count in counts:
        of_dense = ratios({kind: times[f"{kind} {count}"] for kind in KINDS})
        dense, one, token = times[f"dense {count}"], times[f"dense {counts[0]}"], variants[f"token {count}"]
        row = {
            "sequences": count,
            "dense_ms": round(1e3 * float(np.median(dense)), 3),
            "tokens_per_second": round(count / float(np.median(dense)), 1),
            "of_one": round(count / counts[0] / ratios({"one": one, "all": dense})["all"].value, 3),
        }
        row |= {kind: round(of_dense[kind].value, 4) for kind in ("static", "token")}
        layers = {"layers_each": token.own, "layers_run": token.ran}
        rows.append(row | {name: round(float(np.mean(each)), 2) for name, each in layers.items()})
    title = f"{bundle.name}, {target}, {PROMPT} cached tokens, of time: dense is 1"
    print_table(title, (), heads, (row.values() for row in rows))
    print_json("batch", {"target": target, "skipped": skipped, "rows": rows})


if __name__ == "__main__":
    main()
