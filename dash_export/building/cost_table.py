"""Cost of every unit, as a build measures it on the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from dash_export.backends.base import Launch, backend_errors
from dash_export.backends.host.cpus import LoadMeter, cpu_name
from dash_export.backends.host.drafting import BoundDrafter
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import Dispatch
from dash_export.bundle.records import POLICY, Build, Manifest
from dash_export.core.dial import CostTable, Mode
from dash_export.core.facts import DecoderFacts
from dash_export.core.passes import ROWS, PassCosts
from dash_export.core.rule import DENSE, Rule, static_rule
from dash_export.core.units import Unit

if TYPE_CHECKING:
    from dash_export.backends.base import Started
    from dash_export.backends.cuda.engines import DeviceCache
    from dash_export.backends.cuda.step import DeviceStep

WARM_UP = 10
PASSES = ((256, 20), (4096, 6))
"""(cached tokens, repeats) of passes of ROWS rows."""
DRAFTS = 3
"""Chained drafts that are timed as one: the first finds the drafter's weights cold, as a pass has run before."""
MOST = 0.99
"""Share of a token that all units together save at most: more is noise, in differences on a busy machine."""
NOT_MEASURED = "not measured"
"""The device in a stand-in cost table: the build has not been measured yet where it runs."""


def uniform_cost(manifest: Manifest) -> CostTable:
    """Return a stand-in until costs are measured: all layers take the same time, and nothing else takes any."""
    cost = tuple(len(unit.layers) / manifest.model.num_layers for unit in manifest.policy.units)
    return CostTable(0, 0.0, {}, {}, cost, NOT_MEASURED)


def measure_passes(bundle: Bundle, build: Build, backend: Started) -> PassCosts | None:
    """Run passes of ROWS rows after PASSES cached tokens, and the drafter, in turns. Return medians over that of one
    row; None for an encoder and on a device, where rows are not passed together.
    """
    model = bundle.manifest.model
    if build.recipe.on_device or not isinstance(model, DecoderFacts):
        return None
    engines: Any = backend.load_build(bundle, build, build.dispatch)
    ids = np.random.default_rng(0).integers(model.vocab_size, size=ROWS[-1])
    known = {max(0, min(context, model.max_positions - ROWS[-1])): repeats for context, repeats in PASSES}
    found, drafts = list[tuple[float, ...]](), list[float]()
    for context, repeats in known.items():
        cache = engines.cache(context + ROWS[-1])
        cache.reserve(context + ROWS[-1])
        for each in (cache.keys, cache.values):
            each.fill(0)  # memory of its own: pages that nobody wrote are all the same one
        steps = [engines.step(cache, rows, teacher_forced=True, mixes=False) for rows in ROWS]
        launches = [partial(step.prefill, ids[: step.sequence]) for step in steps]
        if engines.drafter is not None:
            launches.append(partial(_drafts, BoundDrafter(engines, cache), steps[0].final_state[0, 0], context))

        def timed(launches: Sequence[Launch] = launches, cache: Any = cache, context: int = context) -> Iterator[float]:
            for launch in launches:
                cache.length = context
                yield from _timed([launch])

        times = np.median([[*timed()] for _ in range(1 + repeats)][1:], axis=0)
        found.append(tuple(np.round(times[: len(ROWS)] / times[0], 4).tolist()))
        drafts.append(round(float(times[-1] / times[0]) / DRAFTS, 5) if engines.drafter is not None else 0.0)
    return PassCosts(ROWS, tuple(known), tuple(found), drafts[0])


def _drafts(drafter: BoundDrafter, state: Any, context: int) -> None:
    ask = drafter.asked(state, context)
    for token in range(DRAFTS):
        ask(token)


def measure_cost(bundle: Bundle, build: Build, backend: Started) -> CostTable:
    """Run tokens at the recipe's context, and time every segment and bypass in its place in the token.

    On a device engines run later than they are launched, and a token may be one graph. There whole tokens are timed, in
    every dispatch mode, and differences of tokens are what units save: the table is of the mode that the recipe names,
    or of the fastest where half of what may be skipped is. Figures are medians over interleaved
    repeats. Units of equally many layers share the median of their costs, so that no single noisy measurement decides.
    """
    units, recipe = bundle.manifest.policy.units, build.recipe.cost
    engines: Any = backend.load_build(bundle, build, build.dispatch)
    context, bound, bound_step = engines.timed(recipe.context)
    gated = [name for name, _, bypass in bound if bypass is not None]
    bypasses = dict(zip(gated, (unit.bypass for unit in units), strict=True))
    passes = [
        # Each pass skips every other unit, in turn: so a bypass, too, finds its weights cold (not in the CPU's cache).
        [
            (name, run) if bypass is None or gated.index(name) % 2 != parity else (bypasses[name], bypass)
            for name, run, bypass in bound
        ]
        for parity in (0, 1)
    ]
    times: dict[str, list[float]] = defaultdict(list)
    meter = LoadMeter()
    for repeat in range(WARM_UP + recipe.repeats):
        if repeat == WARM_UP:
            times.clear()
        for one in passes:
            for (name, _), microseconds in zip(one, _timed(launch for _, launch in one), strict=True):
                times[name].append(microseconds)
    medians = {name: round(median(found), 2) for name, found in times.items()}
    asks = medians.pop(POLICY, 0.0)
    runs = {segment.name: medians.pop(segment.name) for segment in build.segments}
    on_device = build.recipe.on_device
    dense, device, dispatch = sum(runs.values()), engines.device.name if on_device else cpu_name(), "sync"
    bypassed, exits = [medians[unit.bypass] for unit in units], tuple[float, ...]()
    if bundle.manifest.model.decides == "input":  # an exit that a picture reaches is asked, also if it goes on
        exits, bypassed = tuple(round(spent / dense, 5) for spent in bypassed), [0.0] * len(units)
    saved = [runs[name] - spent for name, spent in zip(gated, bypassed, strict=True)]
    times_of: dict[str, _Tokens] = {}
    if on_device and bundle.manifest.model.decides == "token":
        times_of = _in_modes(bundle, build, backend, bound_step[1])
        wanted = build.recipe.runtime.dispatch
        fastest = min((mode for mode in times_of if mode != "sync"), key=lambda mode: times_of[mode].half)
        dispatch = wanted if wanted in times_of else fastest
        dense, asks, saved = times_of[dispatch]
    load = meter.load()
    alike: dict[int, list[float]] = defaultdict(list)
    for unit, each in zip(units, saved, strict=True):
        alike[len(unit.layers)].append(each)
    found = [max(median(alike[len(unit.layers)]), 0.0) / dense for unit in units]
    cost = tuple(each / max(1.0, sum(found) / MOST) for each in found)
    modes = {
        mode: Mode(round(max(own.asks, 0.0) / own.dense, 5), round(min(ratio, MOST / (sum(cost) or MOST)), 5))
        for mode, own in times_of.items()
        if mode != dispatch and sum(saved) > 0 and 1e-3 <= (ratio := sum(own.saved) / sum(saved)) <= 1e3
    }
    asks = round(max(asks, 0.0) / dense, 5)
    return CostTable(context, round(dense, 2), runs, medians, cost, device, *load, asks, exits, dispatch, modes)


class _Tokens(NamedTuple):
    """Microseconds: of a dense token, of asking the policy, and saved by skipping each unit alone."""

    dense: float
    asks: float
    saved: list[float]

    @property
    def half(self) -> float:
        """Time of a token that skips half of what may be skipped, by the policy."""
        return self.dense + self.asks - sum(self.saved) / 2


def _in_modes(bundle: Bundle, build: Build, backend: Started, cache: DeviceCache) -> dict[str, _Tokens]:
    """Return the times of whole tokens in each dispatch mode that is possible here."""
    found: dict[str, _Tokens] = {}
    context = cache.length
    for mode in get_args(Dispatch):
        engines: Any = backend.load_build(bundle, build, mode)  # loaded once, whatever the mode
        cache.length = context
        step = engines.step(cache, 1)
        asks, repeats = engines.policy is not None, build.recipe.cost.repeats
        times = _whole_tokens(step, cache, bundle.manifest.policy.units, asks, repeats)
        found.setdefault(engines.dispatch, times)  # not what `device` becomes where it is not possible
    return found


def _whole_tokens(step: DeviceStep, cache: DeviceCache, units: Sequence[Unit], asks: bool, repeats: int) -> _Tokens:
    context = cache.length

    def rule(*places: int) -> Rule:
        return replace(static_rule(places), asks=asks)

    dense, asking, saved = [], [], []
    for place in range(max(1, len(units))):
        rules = [DENSE, rule(), rule(place)] if units else [DENSE, DENSE, DENSE]
        times: list[list[float]] = []
        for _ in range(WARM_UP + repeats):
            times.append([])
            for each in rules:
                cache.length = context
                (spent,) = _timed([partial(step.decode, 1, each)])
                times[-1].append(spent)
        kept = np.array(times[WARM_UP:])
        dense.append(float(np.median(kept[:, 0])))
        asking.append(float(np.median(kept[:, 1] - kept[:, 0])))
        saved.append(float(np.median(kept[:, 1] - kept[:, 2])))
    return _Tokens(median(dense), median(asking), saved[: len(units)])


@backend_errors
def _timed(launches: Iterable[Launch]) -> list[float]:
    """Run the launches and return the microseconds of each, with the host's time before it."""
    stamps = [time.perf_counter()]
    for launch in launches:
        launch()
        stamps.append(time.perf_counter())
    return [1e6 * (end - begin) for begin, end in pairwise(stamps)]
