"""A tiny model's GPU engines on a stand-in for a card: at float32, where rounding hides nothing, and as recipes are."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime, Sampling
from dash_export.backends.cuda.cuda_maker import GpuBackend
from dash_export.building import build
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build
from dash_export.core.rule import DecisionRule, Rule, decision_rule
from tests.standin import installed
from tests.standin.cuda import Card
from tests.tiny import TINY_UNITS

RECIPE = """
backend = "{backend}"
dialect = "{dialect}"
[engine]
capabilities = ["12.0"]
activations = "{own}"
kv_capacity = 96
sequences = {sequences}
profiles = {profiles}
[weights]
layers = "{layers}"
qkv = "{own}"
ungated = "{own}"
head = "{layers}"
embedding = "{own}"
bypass = "{own}"
block_size = 64
symmetric = true
[runtime]
dispatch = "overlapped"
prefill_chunk = 16
[cost]
repeats = 5
"""
BUILDS = {"trt10": ("tensorrt", "trt10"), "portable": ("tensorrt", "portable"), "rtx": ("tensorrt_rtx", "portable")}
"""Target -> its backend and dialect."""
TOGETHER = {f"{name}-together": BUILDS[name] for name in ("trt10", "portable")}
"""The same for four sequences, one dialect with a profile for all shapes."""
ON_ORT = {"ort": ("onnxruntime_cuda", "trt10")}
"""By ONNX Runtime's CUDA provider, which cannot be recorded."""
HALVES = {"trt10-fp16": ("trt10", 2, "fp16", "int4"), "portable-bf16": ("portable", 1, "bf16", "bf16")}
"""Of 16 bits, as the shipped recipes are, for four sequences: dialect, profiles, activations, layers."""
DISPATCH = ("sync", "overlapped", "device")
ORDERS = ("main", "beside", *range(int(os.environ.get("DASH_EXPORT_ORDERS", "2"))))
"""Which stream runs ahead, or seeds of chance; the environment may ask for more."""
TOLERANCE = 1e-4
SAMPLED = [
    Sampling(0.7, seed=1),
    Sampling(1.0, top_k=9, seed=2),
    Sampling(1.0, top_p=0.5, seed=3),
    Sampling(0.8, min_p=0.4, seed=4),
    Sampling(0.5, top_k=30, top_p=0.8, min_p=0.01, seed=5),
]
IDS = np.random.default_rng(5).integers(0, 300, 60).astype(np.int64)


@pytest.fixture(scope="session")
def device_bundle(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Built for `cpu-fp32` and all of BUILDS, TOGETHER, ON_ORT and HALVES."""
    folder = tmp_path_factory.mktemp("device")
    root = Path(shutil.copytree(tiny_root, folder / "tiny.dash"))
    with installed(Card()):
        for name, (backend, dialect) in (BUILDS | TOGETHER | ON_ORT).items():
            together = (4, 1 if dialect == "portable" else 2) if name in TOGETHER else ()
            built(root, folder / f"{name}.toml", backend, dialect, *together)
        for name, (dialect, *rest) in HALVES.items():
            built(root, folder / f"{name}.toml", "tensorrt", dialect, 4, *rest)
    return Bundle.open(root)


def built(
    root: Path,
    path: Path,
    backend: str = "tensorrt",
    dialect: str = "trt10",
    sequences: int = 1,
    profiles: int = 2,
    own: str = "fp32",
    layers: str = "fp32",
) -> Build:
    """By a recipe that is written to `path`; nothing is measured."""
    given = {"backend": backend, "dialect": dialect, "sequences": sequences, "profiles": profiles}
    path.write_text(RECIPE.format(**given, own=own, layers=layers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuBackend, "run_obstacle", lambda _: "later")
        return build(root, str(path))


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    with installed(card):
        yield card
    card.devices.clear()  # their memory is freed by this card, so neither would ever go


@dataclass(frozen=True)
class OnCard:
    runtime: DashRuntime
    card: Card


MakeOnCard = Callable[..., OnCard]


@pytest.fixture
def on_card(device_bundle: Bundle, card: Card) -> MakeOnCard:
    """`on_card(target="trt10", dispatch="overlapped", first="main")`. There is one card: who made it last chose its
    order.
    """

    def make(target: str = "trt10", dispatch: str = "overlapped", first: str | int = "main") -> OnCard:
        card.run_in_order_of(first)
        runtime = DashRuntime.load(device_bundle.root, target, dispatch=dispatch)
        card.devices.append(runtime.engines.device)  # type: ignore[union-attr]
        return OnCard(runtime, card)

    return make


def decoded(runtime: DashRuntime, rule: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits and actions of 25 tokens decoded one by one after a prompt of 20."""
    session = runtime.session_under(rule)
    session.prefill(IDS[:20])
    steps = [session.decode_one(int(token)) for token in IDS[20:45]]
    return np.array([logits for logits, _ in steps]), np.array([actions for _, actions in steps])


@dataclass(frozen=True)
class Host:
    """The same model on the CPU, which other tests compare with the oracle, and what it gives under `rule`."""

    runtime: DashRuntime

    @cached_property
    def ratio(self) -> float:
        return float(np.median(self.runtime.session().score(IDS).damage[2:] / (0.2, 0.1)))

    def limited(self, max_layers: int | None = None) -> DecisionRule:
        return decision_rule(TINY_UNITS, (0.2, 0.1), self.ratio, max_layers, 6)

    @cached_property
    def rule(self) -> DecisionRule:
        return self.limited()

    @cached_property
    def decoded(self) -> tuple[np.ndarray, np.ndarray]:
        return decoded(self.runtime, self.rule)

    def differs(self, made: OnCard, rule: Rule | None = None) -> bool:
        """Whether decode on a device gives other logits or actions, under `self.rule` or another."""
        expected, actions = self.decoded if rule is None else decoded(self.runtime, rule)
        found, taken = decoded(made.runtime, rule or self.rule)
        return bool((taken != actions).any() or not np.abs(found - expected).max() < TOLERANCE)


@pytest.fixture(scope="session")
def host(device_bundle: Bundle) -> Host:
    return Host(DashRuntime.load(device_bundle.root, "cpu-fp32"))
