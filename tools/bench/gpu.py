"""Decode on a GPU: every dispatch mode and amount of skipping, interleaved in one process.

    python tools/bench/gpu.py BUNDLE --target h100 [--whole WHOLE]

WHOLE is the same model exported with `--units none` and built for the same target: one engine for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from common import held_out, print_json, timed

from dash_export import DashRuntime
from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.commands.tables import print_table
from dash_export.core.kinds import Setting
from dash_export.measure.candidates import label

TOKENS = 32
ASKED = [Setting("token", trade_off=0.0), Setting("token", skipped=3), Setting("token", skipped=5)]
SETTINGS = {"sync": [Setting("dense"), Setting("static", skipped=4), *ASKED], "overlapped": ASKED, "device": ASKED}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", required=True)
@click.option("--whole", type=click.Path(path_type=Path), help="The same model without units, built alike.")
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--rounds", default=30, show_default=True, help=f"Interleaved passes of {TOKENS} tokens.")
def main(bundle: Path, target: str, whole: Path | None, context: int, rounds: int) -> None:
    """Time decoded tokens of a real text: means (skips come in clusters), and layers run (`profile` has launches)."""
    loaded = DashRuntime.load(bundle, target, dispatch="sync")
    engines = loaded.engines
    assert isinstance(engines, DeviceEngines)
    # All modes run the same engines, which are loaded once.
    runtimes = {mode: DashRuntime(loaded.bundle, loaded.build, engines.device, mode) for mode in SETTINGS}
    runs = {
        f"{mode}: {label(setting)}": _token(runtimes[mode], setting, context)
        for mode, settings in SETTINGS.items()
        for setting in settings
    }
    # A long cache: whether attention reads only what is in use of it.
    full = min(3 * (runtimes["sync"].engines.model.max_positions - TOKENS) // 4, 4000)
    runs[f"sync: dense, {full} tokens cached"] = _token(runtimes["sync"], Setting("dense"), full)
    if whole is not None:
        runs["one engine for all layers"] = _token(DashRuntime.load(whole, target), Setting("dense"), context)
    passes = timed({name: run for name, (run, _) in runs.items()}, rounds, block=1, settle=0)
    times = {name: [seconds / TOKENS for seconds in own] for name, own in passes.items()}
    if runtimes["device"].dispatch != "device":
        for name in [name for name in runs if name.startswith("device")]:
            del runs[name]
        print("No row for 'device': steps cannot be recorded here, see the warning above.")
    shown = []
    base = np.mean(times["sync: dense"])
    rows = {}
    for name, (_, layers) in runs.items():
        middle, slow = (1e3 * float(value) for value in (np.mean(times[name]), np.quantile(times[name], 0.9)))
        ratio = float(np.mean(times[name]) / base)
        shown.append((name, f"{np.mean(layers):.1f}", f"{middle:.3f}", f"{slow:.3f}", f"{ratio:.3f}"))
        rows[name] = {"layers": float(np.mean(layers)), "ms": middle, "slow_ms": slow, "of_dense": ratio}
    heads = ("layers", "ms/token", "slowest tenth of passes", "of dense")
    print_table(f"{bundle.name}, {target}", ("mode",), heads, shown)
    print_json("gpu", {"device": engines.device.name, "target": target, "modes": rows})


def _token(runtime: DashRuntime, setting: Setting, context: int) -> tuple[Callable[[], object], list[int]]:
    ids = held_out(runtime.text.encode, 4096).tolist()
    session = runtime.session_with(setting)
    layers: list[int] = []
    session.prefill(ids[:context])

    def run() -> None:
        session._rewind(context)
        for token in ids[context : context + TOKENS]:
            _, actions = session.decode_one(token)
            layers.append(len(actions) - int(actions.sum()))

    return run, layers


if __name__ == "__main__":
    main()
