"""Requests that come bit by bit, at the same moments, for one bundle, for another, and for `auto`: who answers, how
fast.

    python tools/bench/auto.py BEST FASTEST [--every 3] [--pace 50]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
from common import held_out, print_json
from serve import PROMPT, Stream, milliseconds, stream
from started_server import serving

from dash_export.commands.tables import print_table
from dash_export.runtime import DashRuntime


def bit_by_bit(address: str, model: str, prompts: Sequence[str], gaps: Sequence[float]) -> list[Stream]:
    """Ask for an answer to each prompt, a gap of seconds after the one before, whoever still waits."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = []
        for prompt, gap in zip(prompts, gaps, strict=True):
            time.sleep(gap)
            asked.append(pool.submit(stream, address, prompt, {"model": model}))
        return [one.result() for one in asked]


@click.command()
@click.argument("best", type=click.Path(exists=True, path_type=Path))
@click.argument("fastest", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--every", default=3.0, show_default=True, help="Mean seconds from a request to the next.")
@click.option("--requests", default=40, show_default=True)
@click.option("--pace", default=50.0, show_default=True, help="Milliseconds that a token may take.")
def main(best: Path, fastest: Path, target: str, every: float, requests: int, pace: float) -> None:
    text = DashRuntime.load(best, target, verify=False).text
    prompts = [text.decode(ids) for ids in held_out(text.encode, requests * PROMPT).reshape(requests, PROMPT).tolist()]
    gaps = np.random.default_rng(0).exponential(every, requests).tolist()
    variants = {best.stem: [best], fastest.stem: [fastest], "auto": [best, fastest]}
    rows = []
    for model, bundles in variants.items():
        kept = ["--pace", str(pace)] if best in bundles else []  # the fastest one may have no policy
        with serving(bundles, target, *kept) as (address, _):
            stream(address, prompts[0], {"model": bundles[0].stem})
            found = bit_by_bit(address, model, prompts, gaps)
        steps = [step for one in found for step in one.steps]
        first = [one.first for one in found]
        paced = [1e3 * float(np.mean(one.steps)) <= pace for one in found if one.steps]
        rows.append((
            model, round(float(np.mean([one.model == best.stem for one in found])), 2),
            milliseconds(first, 0.5), milliseconds(first, 0.95), milliseconds(steps, 0.5), milliseconds(steps, 0.95),
            round(float(np.mean(paced)), 2),
        ))  # fmt: skip
    heads = ("answered by the best", "first token ms", "p95", "token ms", "p95", "answers that kept the pace")
    print_table(f"{requests} requests, one every {every:g} s, pace {pace:g} ms", ("model",), heads, rows)
    print_json("auto", {"every": every, "pace_ms": pace, "rows": rows})


if __name__ == "__main__":
    main()
