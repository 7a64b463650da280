"""One setting in a process of its own, as an application has it: nothing else's weights are in the caches, and memory
is its own. That process, `main`, reads an `Order` as JSON and writes an `Alone`.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dash_export.artifacts import content_key
from dash_export.decision import Setting
from dash_export.errors import BackendError, BundleError
from dash_export.evaluation.settings import Entrant
from dash_export.runtime import DashRuntime

SETTLE = 32
"""First decoded tokens, not timed: a policy that skips comes late to some of its engines."""
BLOCK = 8
_PROCESS = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from dash_export.evaluation.alone import main
main()
"""
"""Run with -I, and the path of here: with -m Python would look for each module in the current folder first."""


@dataclass(frozen=True)
class Order:
    """A build, a setting, and known tokens: the first `context` are a prompt, the others are decoded one by one.
    `build`: the key of the one whose quality is judged; another may take its place meanwhile.
    """

    root: str
    target: str
    build: str
    setting: dict[str, Any]
    ids: list[int]
    context: int


@dataclass(frozen=True)
class Alone:
    """Seconds per token (median of blocks) and mean layers run, past the first `SETTLE` of more tokens; the time that
    the cost table predicts for them; and the most memory that was resident.
    """

    seconds: float
    layers: float
    predicted: float
    peak_memory: int


def run_alone(entrant: Entrant, ids: list[int], context: int) -> Alone | None:
    """The figures of one entrant over these tokens; None where its process was killed (memory may have ended). Raises
    BackendError.
    """
    runtime = entrant.runtime
    setting, key = asdict(entrant.setting), _key(runtime)
    order = Order(str(runtime.bundle.root), runtime.build.target, key, setting, ids, context)
    command = [sys.executable, "-I", "-c", _PROCESS, json.dumps(sys.path)]
    done = subprocess.run(command, input=json.dumps(asdict(order)), capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BackendError(
            f"The process that runs {order.target} alone failed: {said[-1] if said else done.returncode}."
        )
    return Alone(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The process of one order."""
    order = Order(**json.load(sys.stdin))
    runtime = DashRuntime.load(order.root, order.target, verify=False)
    if _key(runtime) != order.build:
        raise BundleError(f"{order.root} was replaced while it was measured: leave it alone, and measure again")
    entrant = Entrant(runtime, Setting(**order.setting))
    session = entrant.session()
    session.prefill(order.ids[: order.context])
    seconds, taken = [], []
    for token in order.ids[order.context :]:
        began = time.perf_counter()
        actions = session.decode_one(token)[1]
        seconds.append(time.perf_counter() - began)
        taken.append(actions)
    settle = SETTLE if len(taken) > SETTLE else 0
    entrant.took(np.array(taken[settle:]))
    blocks = np.array_split(seconds[settle:], max(1, (len(seconds) - settle) // BLOCK))
    middle = float(np.median([block.mean() for block in blocks]))
    print(json.dumps(asdict(Alone(middle, entrant.layers, entrant.time, peak_memory()))))


def _key(runtime: DashRuntime) -> str:
    """Changes with the export, the engines, the costs and the dial."""
    return content_key(asdict(runtime.build))


def peak_memory() -> int:
    """Bytes this process had resident at most."""
    try:
        # On Linux getrusage begins with what the parent had when it forked.
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
