"""What the host does for a token on a device: the runtime's own Python, over a driver whose every call does nothing.

dash-export build smollm2.dash --target cuda && python tools/bench/host.py smollm2.dash
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import onnx
from common import print_json, timed

from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.bundle.bundle import Bundle
from dash_export.commands.tables import print_table
from dash_export.core.rule import DENSE, decision_rule, static_rule
from dash_export.core.sampling import Sampler, Sampling


class Nothing:
    name, records = "nothing", True

    def __init__(self) -> None:
        self.calls = 0
        for name in ("copy", "copy_rows", "kernel", "record", "wait", "wait_for_event", "synchronize"):
            setattr(self, name, self._called)

    def _called(self, *_: Any) -> None:
        self.calls += 1

    def check_room(self, *_: Any) -> None:
        pass

    def memory(self, nbytes: int) -> Any:
        memory = SimpleNamespace(nbytes=nbytes, address=0)
        memory.part = lambda *_: memory
        return memory

    def pinned(self, nbytes: int) -> Any:
        return np.zeros(nbytes, np.uint8)

    def engine(self, path: Path, _stream: str) -> Any:
        graph = onnx.load(path, load_external_data=False).graph
        inputs, outputs = (tuple(value.name for value in values) for values in (graph.input, graph.output))
        return SimpleNamespace(inputs=inputs, outputs=outputs, bind=self._bind)

    def _bind(self, _profile: int, _shapes: Mapping[str, Any], _memory: Mapping[str, Any]) -> Callable[[str], None]:
        def launch(_stream: str) -> None:
            self.calls += 1

        return launch

    def graph(self, _stream: str, _units: int, _step: Callable[[Any], None]) -> Any:
        return SimpleNamespace(launch=self._called)


LIKELIEST = Sampler(Sampling()).draw


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cuda", show_default=True)
@click.option("--rounds", default=200, show_default=True, help="Blocks of eight tokens of each kind.")
def main(bundle: Path, target: str, rounds: int) -> None:
    """Time one decoded token of every dispatch mode, interleaved."""
    opened = Bundle.open(bundle)
    build = opened.load_build(target)
    units = opened.manifest.policy.units
    variants: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}
    asked = decision_rule(units, [1.0 / len(units)] * len(units), 1.0)
    modes: dict[str, tuple[str, Any]] = {
        "dense": ("device", DENSE), "static": ("device", static_rule((0, 1))), "token, device": ("device", asked),
        "dense, ahead": ("device", DENSE), "token, device, ahead": ("device", asked),
        "token, overlapped": ("overlapped", asked), "token, sync": ("sync", asked),
    }  # fmt: skip
    for name, (dispatch, rule) in modes.items():
        device: Any = Nothing()
        engines = DeviceEngines(opened, build, device, dispatch)
        cache = engines.cache(0)
        cache.reserve(1)
        step = engines.step(cache, 1)

        def token(step: Any = step, cache: Any = cache, rule: Any = rule, ahead: bool = "ahead" in name) -> None:
            if not ahead or cache.length > cache.capacity // 2:
                cache.length = 0
            step.decode(0, rule, LIKELIEST if ahead else None)  # 0: what memory of nobody says was drawn

        for _ in range(3):
            token()
        device.calls = 0
        token()
        variants[name], counts[name] = token, device.calls
    times = {name: 1e6 * float(np.median(each)) for name, each in timed(variants, rounds).items()}
    title = f"{bundle.name}, {len(build.segments)} segments, {len(units)} units"
    rows = ((name, f"{times[name]:.1f}", str(counts[name])) for name in variants)
    print_table(title, ("token",), ("host µs", "calls of the driver"), rows)
    print_json("host", {"target": target, "microseconds": times, "calls": counts})


if __name__ == "__main__":
    main()
