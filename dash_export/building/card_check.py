"""The check of the card on which a bundle is to run, in steps: each needs what the ones before it found to be right.

Beside what runs engines it needs numpy alone. The first thing that is wrong ends it.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from dash_export.backends.base import load_backend
from dash_export.backends.cuda.cuda import Cuda
from dash_export.backends.cuda.launch_costs import probe
from dash_export.backends.cuda.timed_step import TimedStep
from dash_export.backends.maker import backend_of
from dash_export.building.cost_table import NOT_MEASURED
from dash_export.building.pipeline import build
from dash_export.building.references import TOGETHER, Arrays, compare_engines, find_references, read_references
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import LOWERED
from dash_export.bundle.records import Build
from dash_export.bundle.signing import check_trusted
from dash_export.core.rule import DENSE, DecisionRule, Rule, static_rule
from dash_export.core.sampling import Sampling
from dash_export.errors import BackendError, BundleError, DashError
from dash_export.files.artifacts import Progress, no_progress
from dash_export.runtime import DashRuntime
from dash_export.runtime.runtime import DISPATCH_MODES

PROMPT, TOKENS, ROUNDS = 8, 32, 10
"""Tokens of a prompt, and of an answer; rounds that are timed, after one that warms up."""
LOST = 16 << 20
"""Bytes that a conversation may keep for good, at most: drivers allocate in blocks."""


@dataclass
class CardCheck:
    """What the steps know. `given`: the target, a name or a file; `machine`: what `doctor` says of it; `facts`:
    figures for the report.
    """

    bundle: Bundle
    given: str
    machine: dict[str, Any]
    progress: Progress = no_progress
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    runtimes: dict[str, DashRuntime] = field(default_factory=dict)
    """By dispatch mode; all run the same engines."""

    @property
    def target(self) -> str:
        return self.bundle.recipe(self.given).name

    @property
    def builds(self) -> dict[str, Build]:
        """The build, and that of the lowered graphs it is compiled from, as far as they are there."""
        names = {self.target, f"{self.target}{LOWERED}"} & {*self.bundle.targets()}
        return {name: self.bundle.load_build(name) for name in sorted(names)}

    @property
    def references(self) -> Arrays:
        place = find_references(self.bundle, self.target)
        assert place is not None
        return read_references(place)

    @property
    def device(self) -> Any:
        return self.runtimes["sync"].engines.device  # type: ignore[union-attr]

    def rules(self) -> dict[str, Rule]:
        """Return how tokens are decoded: dense, half of the units skipped, and as the policy decides at limits by which
        it skips half of the references' tokens.
        """
        policy, found = self.bundle.manifest.policy, dict[str, Rule](dense=DENSE)
        if policy.units:
            order = policy.static_order or range(len(policy.units))
            found["static"] = static_rule(order[: -(-len(order) // 2)])
        if policy.has_network:
            found["token"] = DecisionRule(tuple(self.references["limits"].tolist()))
        return found


class Step(NamedTuple):
    """A step. `run` returns what it found in words, and raises an error where that is wrong."""

    name: str
    expected: str
    run: Callable[[CardCheck], str]


@dataclass(frozen=True)
class Outcome:
    """What a step found, or what was `wrong`, with a traceback where this program did not expect it."""

    name: str
    expected: str
    found: str
    wrong: str = ""
    trace: str = ""


def card_target(bundle: Bundle, target: str | None) -> str:
    """Return the GPU target to check: the given one, or the only one of the bundle. Raises BundleError, and
    BackendError for a target without a card and for an encoder.
    """
    found = [target] if target else bundle.targets()
    names = {name.removesuffix(LOWERED) for name in found if target or bundle.load_build(name).recipe.on_device}
    if len(names) != 1:
        said = f"has builds for several cards ({', '.join(sorted(names))})" if names else "has no build for a GPU"
        raise BundleError(f"{bundle.root} {said}: give the one to check, like --target jetson-orin-nano.")
    (name,) = names
    if bundle.manifest.model.decides == "input":
        raise BackendError(
            f"{bundle.root} is an encoder's, and --card checks causal LMs. Compare it on the card: dash-export run "
            f"{bundle.root} DIR -o card.npz --policy dense --target {name}, and the same with --target portable."
        )
    if not bundle.recipe(name).on_device:
        raise BackendError(f"{name!r} is a target without a card: `dash-export build --verify` checks its engines.")
    return name


def check_card(check: CardCheck) -> Iterator[Outcome]:
    """Run all steps and yield the outcome of each; the last one may be wrong."""
    kept = _Kept(check.warnings)
    logging.getLogger("dash_export").addHandler(kept)
    try:
        for name, expected, run in STEPS:
            try:
                yield Outcome(name, expected, run(check))
            except DashError as error:
                yield Outcome(name, expected, "", str(error))
                return
            except Exception as error:  # of a driver, a compiler, a library: whoever sees it sends it to us
                yield Outcome(name, expected, "", f"{type(error).__name__}: {error}", traceback.format_exc())
                return
    finally:
        logging.getLogger("dash_export").removeHandler(kept)


class _Kept(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.append(record.getMessage())


def _copy(check: CardCheck) -> str:
    check_trusted(check.bundle)
    files = [*check.bundle.files, *(record for build in check.builds.values() for record in build.files)]
    check.bundle.verify(files)
    built = ", ".join(check.builds) or "nothing yet"
    return f"{len(files)} files, {sum(record.bytes for record in files) / 1e6:.0f} MB; built: {built}"


def _driver(check: CardCheck) -> str:
    if problems := check.machine["problems"]:
        raise BackendError(" ".join(f"{each['problem']} Fix: {each['fix']}." for each in problems))
    maker = backend_of(check.bundle.recipe(check.given))
    maker.require_runtime()
    version = maker.version()
    if (reason := maker.refused_version(version)) is not None:
        raise BackendError(reason)
    device = check.machine["cuda"]["devices"][0]
    return (
        f"{device['name']}, compute capability {device['capability']}, {device['memory'] / 1e9:.1f} GB; the driver "
        f"speaks CUDA {device['driver']}; {maker.recipe.backend} {version}"
    )


def _probe(check: CardCheck) -> str:
    found = check.facts["probe"] = probe(Cuda())
    if wrong := found.get("wrong"):
        raise BackendError(f"A graph decides wrongly ({'; '.join(wrong)}). Take dispatch 'overlapped', and tell us.")
    missing = "".join(f"; not recorded: {name} ({why})" for name, why in found.get("not_recorded", {}).items())
    return (
        f"a launch {found['launch_us']:.2f} µs, with its end {found['wait_us']:.1f} µs; copying on the card "
        f"{found['bytes_per_second'] / 1e9:.0f} GB/s; dispatch {found['dispatch']!r} pays{missing}"
    )


def _build(check: CardCheck) -> str:
    known = check.builds.get(check.target)
    if known is None or known.cost.device == NOT_MEASURED:
        known = build(check.bundle, check.given, measure=known is not None, progress=check.progress)
    check.facts["build"] = {
        "version": known.backend_version, "device": known.device, "seconds": known.seconds, "cost": asdict(known.cost)
    }  # fmt: skip
    nbytes = sum(engine.bytes for engine in known.engines.values())
    return (
        f"{len(known.engines)} engines, {nbytes / 1e6:.0f} MB, by {known.backend} {known.backend_version}; "
        f"dispatch {known.dispatch!r}"
    )


def _engines(check: CardCheck) -> str:
    place = find_references(check.bundle, check.target)
    if place is None:
        raise BundleError(
            f"{check.bundle.root} has no references for {check.target!r}. On a machine with ONNX Runtime run "
            f"{check.bundle.build_command(check.target)} --verify, and copy the bundle again."
        )
    own = check.builds[check.target]
    backend = load_backend(own.backend, own.recipe.runtime.threads)
    assert isinstance(backend, Cuda)
    check.facts["free"] = [backend.room()[0]]
    for mode in DISPATCH_MODES:
        check.runtimes[mode] = DashRuntime(check.bundle, own, backend, mode)
    check.facts["free"].append(backend.room()[0])
    found = compare_engines(check.runtimes["sync"], place, check.progress)
    check.facts["errors"] = found.engines
    errors = {name: max(own.values()) for name, own in found.engines.items() if name != TOGETHER}
    worst = max(errors, key=errors.__getitem__)
    together = found.engines[TOGETHER]
    return (
        f"{len(errors)} engines agree, the farthest is {worst} ({errors[worst]:.3g}); together {together['nats']:.2g} "
        f"nats, {together['decisions']:.1%} other decisions"
    )


def _modes(check: CardCheck) -> str:
    """The prompt goes in token by token: TensorRT-RTX may change kernels of other lengths at any time, and with them
    the rounding. The tokens that the device draws ahead are those that the host draws, so answers may be compared.
    """
    *before, last = check.references["ids"][:PROMPT].tolist()
    count = min(TOKENS, check.runtimes["sync"].engines.model.max_positions - PROMPT)
    expected: dict[str, Any] = {}
    for mode, runtime in check.runtimes.items():
        for name, rule in check.rules().items():
            for how in (Sampling(ignore_eos=True), Sampling(0.8, seed=1, ignore_eos=True)):
                session = runtime.session_under(rule)
                for token in before:
                    session.decode_one(token, DENSE)
                steps = [*session.stream([last], count, how)]
                told = [(step.token, tuple(step.actions.tolist())) for step in steps]
                key = f"{name}, {'drawn' if how.temperature else 'likeliest'}"
                first = expected.setdefault(key, told)
                if told != first:
                    place = next(at for at, pair in enumerate(zip(told, first, strict=True)) if pair[0] != pair[1])
                    raise BackendError(
                        f"Dispatch {mode!r} is wrong: of {key} tokens, number {place + 1} is {told[place][0]} and with "
                        f"'sync' {first[place][0]}, or layers differ. Take dispatch 'sync', and tell us."
                    )
    used = {mode: runtime.dispatch for mode, runtime in check.runtimes.items()}
    check.facts["dispatch"] = used
    others = [f"; {mode!r} is not possible here: it was {use!r}" for mode, use in used.items() if mode != use]
    return f"{count} tokens each of {', '.join(check.rules())}, likeliest and drawn: the same{''.join(others)}"


def _time(check: CardCheck) -> str:
    rules, own = check.rules(), check.builds[check.target]
    context = min(own.recipe.cost.context, check.runtimes["sync"].engines.model.max_positions - TOKENS)
    ids = np.resize(check.references["ids"], context + TOKENS)
    rows: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    sessions = {}
    for mode, runtime in check.runtimes.items():
        if runtime.dispatch == mode:
            runtime.engines.step_kind = TimedStep  # type: ignore[union-attr]
            sessions[mode] = runtime.session()
    for number in range(1 + ROUNDS):
        for mode, session in sessions.items():
            for name, rule in rules.items():
                session.restart(ids[:context])
                step: Any = session.bound(1)
                for token in ids[context:].tolist():
                    began = perf_counter()
                    _, actions = session.decode_one(token, rule)
                    host = 1e3 * (perf_counter() - began)
                    if number:
                        figures = step.device_us / 1e3, host, int((actions == 0).sum())
                        rows.setdefault((mode, name), []).append(figures)
        check.progress("timing tokens", number + 1, 1 + ROUNDS)
    times = check.facts["times"] = list[dict[str, Any]]()
    for (mode, name), each in rows.items():
        device, host, layers = np.array(each).T
        times.append(
            {
                "mode": mode, "tokens": name, "layers": float(layers.mean()), "device_ms": float(np.median(device)),
                "slow_ms": float(np.quantile(device, 0.9)), "host_ms": float(np.median(host)),
            }
        )  # fmt: skip
    fastest = {name: min((row for row in times if row["tokens"] == name), key=itemgetter("host_ms")) for name in rules}
    assert own.recipe.engine is not None
    read = sum(own.engines[segment.name].bytes for segment in own.segments) / own.recipe.engine.profiles
    least = check.facts["least_ms"] = 1e3 * read / check.facts["probe"]["bytes_per_second"]
    shares = ", ".join(
        f"{name} {row['host_ms']:.3f} ms ({row['host_ms'] / fastest['dense']['host_ms']:.2f} of dense, {row['mode']}, "
        f"on the device {row['device_ms']:.3f})"
        for name, row in fastest.items()
    )
    return f"at {context} cached tokens, the fastest mode of each: {shares}; reading the weights takes {least:.3f} ms"


def _memory(check: CardCheck) -> str:
    device, runtime = check.device, check.runtimes["sync"]
    own, known = check.builds[check.target], check.references
    prompt, left = known["ids"][: int(known["prompt"])], list[int]()
    for _ in range(2):
        session = runtime.session()
        session.prefill(prompt)
        session.decode_one(int(prompt[0]))
        cache = session.cache.nbytes
        del session
        gc.collect()
        left.append(device.room()[0])
    before, loaded = check.facts["free"]
    files = sum(engine.bytes for engine in own.engines.values())
    check.facts["memory"] = {"engines": before - loaded, "files": files, "cache": cache, "free": left[-1]}
    if left[0] - left[1] > LOST:
        raise BackendError(
            f"A conversation that has ended keeps {(left[0] - left[1]) / 1e6:.1f} MB of {device.name}: tell us."
        )
    return (
        f"engines {(before - loaded) / 1e6:.0f} MB (files {files / 1e6:.0f} MB), a conversation's cache "
        f"{cache / 1e6:.1f} MB; {left[-1] / 1e6:.0f} MB are free"
    )


STEPS = (
    Step("copy", "every file is as it was written (SHA-256)", _copy),
    Step(
        "driver and packages", "a card of the target's compute capability, its driver, and what runs engines", _driver
    ),
    Step("probe", "launches take microseconds, and graphs decide rightly", _probe),
    Step("build", "every engine is compiled, and agrees with its references", _build),
    Step("engines", "each engine gives the references' states, keys, values, damages and logits", _engines),
    Step("dispatch modes", "all give the same tokens and skip the same layers", _modes),
    Step("time", "a token takes little more than reading the weights; skipping saves its share", _time),
    Step("memory", "engines take what their files do; a conversation that ends gives all back", _memory),
)
