"""References: what a text gives in the portable graphs, and the comparison of a device's engines with it.

A machine with ONNX Runtime makes the file (`reference_walk.py`), and a build carries it. The device needs numpy only.
Each engine is given the state that the portable graphs had there, so its error is its own: the first engine that is
off is the one that is wrong. In the end all run together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import LOWERED
from dash_export.bundle.recipe import Precision, Recipe
from dash_export.bundle.records import DRAFTER, POLICY, Segment, Verification
from dash_export.core.units import Unit, layer_actions
from dash_export.errors import BackendError, BundleError
from dash_export.files.artifacts import Progress, no_progress, open_regular

if TYPE_CHECKING:
    from dash_export.runtime import DashRuntime

REFERENCES = "references.npz"
"""File in a build's folder. T tokens; places 1, 2, ... are what enters the second segment, the third, ...

`ids` [T]; `prompt`: how many of them are; `skips` [units, T]; `state.1` ... float16 [T, hidden], times `scales`;
`damage` [T, units] is what the policy says, `limits` [units] below what it skips; `rows` [T, layers, 2, n]: keys and
values times `probe` [kv width, n]; `top`, `logits` [T - prompt + 1, 64]: the likeliest tokens after the prompt and each
token that follows, and their logits; `logsum`: of all logits.
"""
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.05, "int8": 0.06, "fp8": 0.35, "int4": 0.35}
"""Allowed error of a segment's update of the hidden state (or of logits, new K/V rows, damage) by its coarsest weights:
root mean square, relative to the portable graph's. SmolLM2's worst: fp16 0.0099, int8 0.037, fp8 0.16, int4 0.17."""
SMALLEST_UPDATE = 0.05
"""An update that is a smaller share of the state is judged as if it were this large: it drowns in the state's own
16-bit rounding, since a few channels of a few tokens are a thousand times larger than the rest."""
TOGETHER = "all together"

Floats = npt.NDArray[np.float32]
Pairs = list[tuple[Floats, Floats, Floats]]
"""(expected, found, the state that both were added to and that is subtracted) of each step."""
Arrays = dict[str, npt.NDArray[Any]]


def tolerance(recipe: Recipe, name: str, segment: Segment, gated: tuple[int, ...]) -> float:
    """Return the tolerance for the coarsest weights in a segment's engine `name`. `gated`: the layers of all units."""
    weights = recipe.weights
    used: list[Precision] = [weights.bypass]
    if name not in (POLICY, DRAFTER) and not name.startswith("bypass"):
        used = [weights.head] * segment.head + [weights.embedding] + [weights.bypass] * segment.gated
        for layer in segment.layers:
            used += [weights.layers, weights.qkv] if layer in gated else [weights.ungated]
    return max(TOLERANCE[precision] for precision in used)


def relative(pairs: Sequence[tuple[npt.NDArray[np.floating], ...]]) -> float:
    """Return the root mean square of the differences over that of the expected values; inf where it is not finite."""

    def rms(arrays: Sequence[npt.NDArray[np.floating]]) -> float:
        return float(np.sqrt(np.mean(np.concatenate([array.ravel() for array in arrays]).astype(np.float64) ** 2)))

    expected, found, bases = zip(*pairs, strict=True)
    scale = max(rms(expected), rms(bases) * SMALLEST_UPDATE, 1e-12)
    error = rms([other - one for one, other in zip(expected, found, strict=True)]) / scale
    return round(error, 6) if np.isfinite(error) else float("inf")


def find_references(bundle: Bundle, target: str) -> Path | None:
    """Return the file of references of a build, or of the lowered graphs that it was compiled from."""
    places = (bundle.path(f"engines/{name}/{REFERENCES}") for name in (target, f"{target}{LOWERED}"))
    return next((place for place in places if place.is_file()), None)


def read_references(path: Path) -> Arrays:
    """Return the arrays of a file of references. Raises BundleError for a damaged one."""
    try:
        with open_regular(path) as file, np.load(file) as arrays:
            if sum(item.file_size for item in arrays.zip.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise many kinds; the file may be from outside
        raise BundleError(f"{path} is damaged ({error}). Delete it and build again.") from error


def compare_engines(runtime: DashRuntime, path: Path, progress: Progress = no_progress) -> Verification:
    """Compare every engine of a loaded build with the references at `path`, and then all together. Raises BackendError
    that names the first engine that is off, and BundleError where the references are of another bundle.
    """
    bundle, engines, known = runtime.bundle, runtime.engines, read_references(path)
    assert isinstance(engines, DeviceEngines)
    try:
        pairs = _alone(engines, known)
        errors = {name: {kind: relative(found) for kind, found in own.items()} for name, own in pairs.items()}
        together = _together(runtime, known)
    except (KeyError, ValueError, IndexError, TypeError) as fault:
        raise BundleError(f"{path} is not of this bundle ({fault}). Delete it and build again.") from fault
    allowed = dict(_allowed(bundle, runtime.recipe, engines))
    for name, limit in allowed.items():
        for kind, error in errors.get(name, {}).items():
            if not error <= limit:
                raise BackendError(
                    f"The engine {name} is off on {engines.device.name}: its {kind} by {error:.3g} of the portable "
                    f"graph's (relative root mean square, allowed {limit:g}); the engines before it agree. Do not use "
                    "this build. Build again; if that does not help, tell us, with this message."
                )
    if not together["logits"] <= 2 * max(allowed.values()):
        raise BackendError(
            f"Each engine agrees on {engines.device.name} with its portable graph, but together their logits are off "
            f"by {together['logits']:.3g} (allowed {2 * max(allowed.values()):g}): what joins them is wrong. Do not "
            "use this build, and tell us, with this message."
        )
    progress("comparing engines with the references", 1, 1)
    where = f"on {engines.device.name}, with states and logits of the portable graphs"
    return Verification(where, {**{name: errors[name] for name in allowed if name in errors}, TOGETHER: together})


def _allowed(bundle: Bundle, recipe: Recipe, engines: DeviceEngines) -> Iterator[tuple[str, float]]:
    """Yield every engine and its tolerance, a bypass before its unit, which reads the keys that it leaves."""
    gated = bundle.manifest.policy.layers
    for place, loaded in enumerate(engines.segments):
        own = loaded.segment
        names = [*([Unit(own.first, own.last).bypass] if own.gated else []), own.name]
        names += [POLICY] if engines.policy is not None and place == engines.first - 1 else []
        yield from ((name, tolerance(recipe, name, own, gated)) for name in names)


def _alone(engines: DeviceEngines, known: Arrays) -> dict[str, dict[str, Pairs]]:
    """Run every engine on the state that it had in the portable graphs. Return pairs by engine and kind of output."""
    from dash_export.backends.cuda.alone import LoneEngines

    pairs: dict[str, dict[str, Pairs]] = defaultdict(lambda: defaultdict(list))
    ids, skips, prompt = known["ids"], known["skips"], int(known["prompt"])
    ids = ids[: engines.model.max_positions]  # a small cache
    cache, zero = engines.cache(len(ids)), np.zeros(1, np.float32)
    cache.reserve(len(ids))
    steps: dict[int, LoneEngines] = {}
    with engines.turn:
        while (start := cache.lengths[0]) < len(ids):
            count = min(prompt - start, engines.rows_at_once(len(ids))) if start < prompt else 1
            step = steps[count] = steps.get(count) or LoneEngines(engines, cache, count)
            now = slice(start, start + count)
            step.begin(ids[now])
            for place, loaded in enumerate(engines.segments):
                own = loaded.segment
                skipped = loaded.unit is not None and count == 1 and bool(skips[loaded.unit, start])
                into = pairs[Unit(own.first, own.last).bypass if skipped else own.name]
                state = None if place == 0 else _state(known, place, now)
                found = step.run(place, skipped, state)
                if place + 1 < len(engines.segments):
                    base = zero if state is None else state
                    into["hidden_out"].append((_state(known, place + 1, now) - base, found - base, base))
                elif now.stop >= prompt:
                    into["logits"].append((*_likeliest(known, found, [now.stop - prompt]), zero))
                for layer in own.layers:
                    for which, rows in enumerate(step.rows(layer)):
                        expected = known["rows"][now, layer, which]
                        into[("keys", "values")[which]].append((expected, rows @ known["probe"], zero))
                if engines.policy is not None and place == engines.first - 1 and count == 1:
                    pairs[POLICY]["damage"].append((known["damage"][start], step.damage(), zero))
            cache.lengths[0] += count
    return pairs


def _together(runtime: DashRuntime, known: Arrays) -> dict[str, float]:
    """Decode the text as a session does, with the references' actions forced. Return the relative error of the log
    probabilities of the likeliest tokens, the divergence of these (nats), and the share of other decisions.
    """
    prompt, skips, layers = int(known["prompt"]), known["skips"], runtime.bundle.manifest.model.num_layers
    ids = known["ids"][: runtime.engines.model.max_positions]
    skips = skips[:, : len(ids)]
    actions = layer_actions(skips, runtime.bundle.manifest.policy.units, layers)
    score = runtime.session().score(ids, actions=actions, keep_logits=True)
    assert score.logits is not None
    rows = [*range(len(ids) - prompt + 1)]
    expected, found = _likeliest(known, score.logits[prompt - 1 :], rows)
    p, q = (array[:, :-1].astype(np.float64) - array[:, -1:] for array in (expected, found))
    spread = p - p.mean(axis=-1, keepdims=True)
    differ = np.zeros(1, np.bool_)
    if (
        runtime.bundle.manifest.policy.has_network and len(ids) > prompt + 2
    ):  # what the two after the prompt do is given
        differ = (score.damage[prompt + 2 :] < known["limits"]) != skips[:, prompt + 2 :].T
    return {
        "logits": relative([(spread, spread + q - p, np.zeros(1, np.float32))]),
        "nats": round(max(float((np.exp(p) * (p - q)).sum(axis=-1).mean()), 0.0), 6),
        "decisions": round(float(differ.mean()), 6),
    }


def _state(known: Arrays, place: int, tokens: slice) -> Floats:
    state: Floats = known[f"state.{place}"][tokens].astype(np.float32) * known["scales"][place]
    return state


def _likeliest(known: Arrays, logits: Floats, rows: list[int]) -> tuple[Floats, Floats]:
    """Return the logits of the likeliest tokens and the sum of all, expected and found: [rows, 65] each."""
    largest = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)) + largest
    found = np.hstack([np.take_along_axis(logits, known["top"][rows], axis=-1), total])
    return np.hstack([known["logits"][rows], known["logsum"][rows, None]]), found
