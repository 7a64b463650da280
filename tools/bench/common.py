"""What the benchmarks share: one whole-model graph to compare with, interleaved timing, one JSON line at the end."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, TypeVar

import onnxruntime

from dash_export import __version__
from dash_export.build_record import Build, EngineRecord, Segment
from dash_export.building.engine_graphs import compose_segment, lower, save_extending
from dash_export.bundle import Bundle
from dash_export.runtime.backends.onnxruntime import create as backend
from dash_export.runtime.cpus import cpu_name, physical_cores
from dash_export.runtime.dispatch import Arrangement, BoundStep
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.rules import DENSE, Rule
from dash_export.runtime.runtime import engines
from dash_export.targets import recipe_from_dict

_T = TypeVar("_T")


@contextmanager
def whole_build(bundle: Bundle, target: str) -> Iterator[tuple[Path, Build]]:
    """(where its files are relative to, the build of) the same layers at the same precisions, lowered as one graph
    without policy: what engines in a row must not lose against. On disk only inside.
    """
    build = bundle.load_build(target)
    segment = Segment.whole(bundle.manifest.model.num_layers)
    recipe = recipe_from_dict(build.recipe, target)
    root = bundle.root.absolute().parent
    with tempfile.TemporaryDirectory(prefix="dash-export-bench-", dir=root) as name:
        folder = Path(name)
        (folder / "rope.data").write_bytes(bundle.path("onnx/rope.data").read_bytes())
        lowered = lower(compose_segment(bundle, segment), recipe, bundle.manifest.policy.layers)
        path = save_extending(lowered, folder / f"{segment.name}.onnx")[0]
        record = EngineRecord(str(path.relative_to(root)), 0, "")
        yield root, replace(build, segments=(segment,), engines={segment.name: record})


def in_fresh_processes(timed_once: Callable[..., _T], *arguments: object, processes: int) -> Iterator[_T]:
    """What `timed_once(*arguments, number)` gives in each of several processes, one after the other: where weights lie
    in memory is worth a per cent or two.
    """
    for number in range(processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            yield pool.submit(timed_once, *arguments, number).result()


def load_engines(bundle: Bundle, build: Build) -> EngineSet:
    """As the runtime loads them."""
    recipe = recipe_from_dict(build.recipe, build.target)
    found = engines(bundle, build, backend(recipe.runtime.threads), recipe, "sync")
    assert isinstance(found, EngineSet)
    return found


def load_both(bundle: Path, target: str, whole: tuple[Path, Build], number: int) -> tuple[EngineSet, EngineSet]:
    """The engines of a build, and `whole_build`'s one graph. Who is loaded first changes with `number`."""
    opened = Bundle.open(bundle)
    facts = opened.manifest
    no_policy = replace(facts.policy, units=(), has_network=False)
    graph = Bundle(whole[0], replace(facts, policy=no_policy))
    builds = [(opened, opened.load_build(target)), (graph, whole[1])]
    loaded = {index: load_engines(*builds[index]) for index in ((0, 1) if number % 2 == 0 else (1, 0))}
    return loaded[0], loaded[1]


def one_token(engines: EngineSet, context: int, rule: Rule = DENSE, nothing_owed: bool = False) -> Callable[[], object]:
    """Decodes one token at a fixed context, again and again. `nothing_owed`: nothing is done for a skipped unit."""
    cache = engines.cache(context)
    cache.reserve(context + 1)
    step = engines.step(cache, 1)
    if nothing_owed:
        owe_nothing(step)

    def token() -> None:
        cache.length = context
        step.decode(1, rule)

    return token


def owe_nothing(step: BoundStep) -> None:
    """A skipped unit is left out, update, K and V and all: the tokens are worthless, their time is the bound."""

    def nothing() -> None:
        pass

    bare = [replace(item, bypass=None if item.bypass is None else nothing) for item in step.segments]
    step.arrangement = Arrangement(bare)


def interleaved(
    runs: Sequence[Callable[[], object]], rounds: int, block: int = 8, settle: int = 2
) -> list[list[float]]:
    """Time `runs` in turn, a block of calls each, in every round in another order, so that nobody always follows the
    same one: seconds per call, one median per block.

    A decoder runs the same engines token after token, so a block's first `settle` calls, which find another variant's
    weights in the caches, are dropped. The first two rounds are warm-up.
    """
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(2 + rounds):
        for index in Random(round_).sample(range(len(runs)), len(runs)):
            sample = []
            for _ in range(settle + block):
                began = time.perf_counter()
                runs[index]()
                sample.append(time.perf_counter() - began)
            if round_ >= 2:
                times[index].append(median(sample[settle:]))
    return times


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of the ratios round by round: what drifts with the machine cancels."""
    return median(x / y for x, y in zip(a, b, strict=True))


def print_json(name: str, result: dict[str, Any]) -> None:
    """One line for machines, with where it ran."""
    machine = {"processor": cpu_name(), "cores": physical_cores(), "python": platform.python_version()}
    versions = {"dash-export": __version__, "onnxruntime": onnxruntime.__version__}
    print(json.dumps({"benchmark": name, **result, "machine": machine | versions}))
