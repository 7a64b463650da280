"""Polygraphy runners over a bundle (one engine behind its portable graph's names, or whole decode steps), and their
inputs: real text, and the hidden states that the text has where an engine begins. Polygraphy's own random numbers are
not valid positions, masks or hidden states.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from dash_export.backends.base import reference_engine
from dash_export.backends.cuda.alone import LoneEngines
from dash_export.backends.cuda.bound import POLICY as POLICY_PLACE
from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.building.graph_runs import Arrays, graph_run, step_inputs, text_ids
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import FINAL_STATE, new_names, past_names, present_names, short_name
from dash_export.bundle.records import POLICY, Build, Segment
from dash_export.bundle.signing import check_trusted
from dash_export.core.facts import DecoderFacts
from dash_export.core.kinds import Setting
from dash_export.errors import BundleError, RequestError
from dash_export.polygraphy import polygraphy_errors
from dash_export.runtime import DashRuntime, Session
from dash_export.runtime.runtime import loaded_files

STEPS = 16
"""Number of different steps of a text; more iterations repeat these."""


def find_engine(bundle: Bundle, build: Build, name: str) -> Segment:
    """Return the layers of an engine of the build: of a segment, of a bypass, or for the policy none, at its `read`.

    Raises BundleError that lists the names, or says which segment a layer was merged into.
    """
    policy = bundle.manifest.policy
    known = {segment.name: segment for segment in build.segments}
    known |= {unit.bypass: Segment(unit.first, unit.last, False, False, True) for unit in policy.units}
    known[POLICY] = Segment(policy.read, policy.read - 1, False, False, False)
    if name in known and name in build.engines:
        return known[name]
    merged = [item.name for item in build.segments if name in (f"layer_{layer:02d}" for layer in item.layers)]
    hint = f"{name} is part of the segment {merged[0]}. " if merged else ""
    raise BundleError(
        f"{bundle.root}: the build for {build.target!r} has no engine {name!r} that has a portable graph. {hint}"
        f"Engines: {', '.join(sorted(known.keys() & build.engines.keys()))}."
    )


class DashEngineRunner(BaseRunner):  # type: ignore[misc]
    """One engine of a build, with the inputs and outputs of its portable graph, and `damage` where it holds a policy.
    Inputs that follow from positions (lengths, masks) need not be given. `last_inference_time` is the engine's own (on
    a GPU between two events of the device): its memory is bound before, and caches are not copied.
    """

    def __init__(self, bundle: str, target: str, engine: str, name: str | None = None) -> None:
        super().__init__(name=name, prefix=f"dash {target} {engine}")
        self._place = bundle, target, engine

    def activate_impl(self) -> None:
        """Verify the build's files and load the engine."""
        root, target, name = self._place
        with polygraphy_errors():
            self.bundle = Bundle.open(root)
            build = self.bundle.load_build(target)
            check_trusted(self.bundle)
            segment = find_engine(self.bundle, build, name)
            self.layers = segment.layers
            self.engine: Any = None
            if build.recipe.on_device:
                self.engine = EngineOnDevice(DashRuntime.load(root, target), name, segment)
                return
            seal = self.bundle.verify(loaded_files(self.bundle, build))
            # Threads of its own: Polygraphy's ONNX Runtime runner has them too, and a process that holds such a session
            # cannot have the shared pool of the runtime.
            path = self.bundle.path(build.engines[name].file)
            self.engine = reference_engine(path, own_threads=True)
            self.bundle.check_same(seal)

    def get_input_metadata_impl(self) -> TensorMetadata:
        model, metadata = self.bundle.manifest.decoder, TensorMetadata()
        if "input_ids" in self.engine.inputs:
            metadata.add("input_ids", np.dtype(np.int64), (1, None))
        else:
            metadata.add("hidden", np.dtype(np.float32), (1, None, model.hidden_size))
        if self.layers:
            metadata.add("position_ids", np.dtype(np.int64), (1, None))
        for layer in self.layers:
            for name in past_names(layer):
                metadata.add(name, np.dtype(np.float32), (1, model.num_kv_heads, None, model.head_dim))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run the engine. Raises RequestError for positions that are not consecutive or leave the cache."""
        arrays = {name: np.array(array) for name, array in feed_dict.items()}
        model, units = self.bundle.manifest.decoder, len(self.bundle.manifest.policy.units)
        count = arrays["input_ids" if "input_ids" in arrays else "hidden"].shape[1]
        arrays["hidden_out"] = np.zeros((1, count, model.hidden_size), np.float32)
        arrays["logits"] = np.zeros((1, 1, model.vocab_size), np.float32)
        arrays[FINAL_STATE] = np.zeros((1, 1, model.hidden_size), np.float32)
        arrays["damage"] = np.zeros((1, count, units), np.float32)
        with polygraphy_errors():
            if self.layers:
                arrays |= _places(model, arrays["position_ids"][0], arrays[past_names(self.layers[0])[0]].shape[2])
            if isinstance(self.engine, EngineOnDevice):
                found, self.inference_time = self.engine.infer(arrays)
                return found
            written = []
            for layer in self.layers:
                for past, present, new in zip(past_names(layer), present_names(layer), new_names(layer), strict=True):
                    # Past and present share their memory, as in a session: the write is in place.
                    cache = arrays[present] = arrays[short_name(past)] = arrays[short_name(present)] = arrays[past]
                    rows = arrays[short_name(new)] = np.zeros((1, count, cache.shape[1] * cache.shape[3]), np.float32)
                    if short_name(new) in self.engine.outputs:  # the engine leaves the writing to the host
                        rows = rows.reshape(1, count, -1, model.head_dim).swapaxes(1, 2)
                        start = int(arrays["position_ids"][0, 0])
                        written.append((cache[:, :, start : start + count], rows))
            launch = self.engine.bind(arrays, arrays)
        began = time.perf_counter()
        launch()
        for place, rows in written:
            place[:] = rows
        self.inference_time = time.perf_counter() - began
        given = ("hidden_out", "logits", FINAL_STATE, "damage")
        names: list[str] = [name for name in given if name in self.engine.outputs]
        names += [name for layer in self.layers for name in present_names(layer)]
        return {name: arrays[name] for name in names}

    def deactivate_impl(self) -> None:
        del self.engine


class EngineOnDevice:
    """One engine of a loaded GPU build, for arrays of the host. Whatever its numbers are, these are float32."""

    def __init__(self, runtime: DashRuntime, name: str, segment: Segment) -> None:
        engines = runtime.engines
        assert isinstance(engines, DeviceEngines)
        self._engines, self._name, self._layers = engines, name, segment.layers
        ranges = [(own.segment.first, own.segment.last) for own in engines.segments]
        self._place = POLICY_PLACE if name == POLICY else ranges.index((segment.first, segment.last))
        self._bypass = name.startswith("bypass")
        self.inputs = ("input_ids",) if segment.embed else ("hidden",)
        self._cache = engines.cache(0)
        self._steps: dict[int, LoneEngines] = {}

    def infer(self, given: Arrays) -> tuple[Arrays, float]:
        """Return the outputs of the portable graph, and the seconds that the device took. Raises RequestError for more
        tokens than a launch takes, ContextLengthError for more than the cache holds.
        """
        cache, (entry,) = self._cache, self.inputs
        tokens, count = given[entry][0], given[entry].shape[1]
        start = int(given["position_ids"][0, 0]) if self._layers else 0
        most = 1 if self._bypass or self._name == POLICY else self._engines.rows_at_once(0)
        if count > most:
            raise RequestError(f"{self._name} of this build takes {most} tokens at most, not {count}: --dash-tokens.")
        cache.reserve(start + count)
        step = self._steps[count] = self._steps.get(count) or LoneEngines(self._engines, cache, count)
        cache.lengths[0] = start
        for layer in self._layers if start else ():
            step.fill(layer, *(given[name][0, :, :start] for name in past_names(layer)))
        embeds = entry == "input_ids"
        step.begin(tokens if embeds else np.zeros(count, np.int64))
        if self._name == POLICY:
            return {"damage": step.damage(tokens)[None, None]}, 1e-6 * step.device_us
        result = step.run(self._place, self._bypass, None if embeds else tokens)
        seconds = 1e-6 * step.device_us
        is_last = self._place + 1 == len(self._engines.segments)
        found: Arrays = {"logits" if is_last else "hidden_out": result[None]}
        for layer in self._layers:
            for past, present, rows in zip(past_names(layer), present_names(layer), step.rows(layer), strict=True):
                found[present] = given[past].copy()
                heads = rows.reshape(count, found[present].shape[1], -1).swapaxes(0, 1)
                found[present][0, :, start : start + count] = heads
        return found, seconds


def _places(model: DecoderFacts, positions: npt.NDArray[np.int64], capacity: int) -> Arrays:
    start, count = int(positions[0]), len(positions)
    if not np.array_equal(positions, np.arange(start, start + count)) or not 0 <= start <= capacity - count:
        raise RequestError(
            f"position_ids must be consecutive and inside a cache of {capacity} rows; got {start} to "
            f"{int(positions[-1])}. Leave the inputs to the --dash runner, or give real ones with --load-inputs."
        )
    return step_inputs(model, start, count, capacity)


class DashStepRunner(BaseRunner):  # type: ignore[misc]
    """Whole decode steps of the runtime: the first tokens of `input_ids` [1, n] are prefilled densely and not timed,
    the last `tokens` are decoded one by one under the setting. Every call starts with an empty context.
    """

    def __init__(self, bundle: str, target: str, tokens: int = 1, name: str | None = None, **setting: Any) -> None:
        """`setting`: the arguments of `DashRuntime.session`; a budget is not held, as in `profile`."""
        words = [f"{key}={value}" for key, value in setting.items()]
        super().__init__(name=name, prefix=" ".join(["dash", target, *words]))
        self._place, self._tokens, self._setting = (bundle, target), tokens, setting

    def activate_impl(self) -> None:
        with polygraphy_errors():
            setting = Setting(**{"hold": False, **self._setting})
            self.session: Session = DashRuntime.load(*self._place).session_with(setting)

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input_ids", np.dtype(np.int64), (1, None))

    def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[np.int64]]) -> Arrays:
        """Return logits [1, tokens, vocab] after each decoded token; the time is that of all these tokens together."""
        ids = feed_dict["input_ids"][0]
        with polygraphy_errors():
            if len(ids) < self._tokens:
                raise RequestError(f"input_ids has {len(ids)} tokens, fewer than the {self._tokens} to decode.")
            self.session.reset()
            if len(ids) > self._tokens:
                self.session.prefill(ids[: -self._tokens])
            tokens = ids[-self._tokens :].tolist()
            began = time.perf_counter()
            logits = [self.session.decode_one(token)[0] for token in tokens]
            self.inference_time = time.perf_counter() - began
        return {"logits": np.stack(logits)[None]}

    def deactivate_impl(self) -> None:
        del self.session


def token_feeds(root: str, tokens: int, context: int, iterations: int) -> list[Arrays]:
    """Return `input_ids` [1, context + tokens] for whole steps: windows of a text, one per iteration."""
    with polygraphy_errors():
        bundle = _open(root, tokens, context)
        ids = text_ids(bundle, context + STEPS * tokens)
    starts = [index % STEPS * tokens for index in range(iterations)]
    return [{"input_ids": ids[None, start : start + context + tokens]} for start in starts]


def engine_feeds(root: str, target: str, engine: str, tokens: int, context: int, iterations: int) -> list[Arrays]:
    """Return the inputs of one engine and its portable graph for steps of a text: the same text, one step further per
    iteration, over a cache of constant capacity. Each dictionary has the inputs of both.
    """
    with polygraphy_errors():
        bundle = _open(root, tokens, context)
        segment = find_engine(bundle, bundle.load_build(target), engine)
        steps = min(STEPS, iterations, (bundle.manifest.decoder.max_positions - context) // tokens)
        length = context + tokens * steps
        ids = text_ids(bundle, length)[None]
        states, full = _states(bundle, segment, ids)
    feeds: list[Arrays] = []
    for start in range(context, length, tokens):
        step = slice(start, start + tokens)
        caches = {name: np.where(np.arange(length)[:, None] < start, cache, 0) for name, cache in full.items()}
        own: Arrays = {"input_ids": ids[:, step], "hidden": states[:, step]}
        feeds.append(step_inputs(bundle.manifest.decoder, start, tokens, length) | own | caches)
    return [feeds[index % steps] for index in range(iterations)]


def _states(bundle: Bundle, segment: Segment, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], Arrays]:
    """Return the states [1, length, hidden] that enter a segment, and its layers' KV caches, by portable graphs."""
    model, length, caches = bundle.manifest.decoder, ids.shape[1], Arrays()
    places = step_inputs(model, 0, length, length)
    empty = np.zeros((1, model.num_kv_heads, length, model.head_dim), np.float32)
    hidden = states = graph_run(bundle.graph("embed"), own_threads=True)({"input_ids": ids})["hidden_out"]
    for layer in range(segment.last + 1):
        run = graph_run(bundle.graph(f"layer_{layer:02d}"), own_threads=True)
        found = run(places | {"hidden": hidden} | dict.fromkeys(past_names(layer), empty))
        hidden = found["hidden_out"]
        if layer < segment.first:
            states = hidden
        else:
            caches |= dict(zip(past_names(layer), (found[name] for name in present_names(layer)), strict=True))
    return states, caches


def _open(root: str, tokens: int, context: int) -> Bundle:
    """Open a bundle. Raises RequestError when its model has fewer positions than a step and its context take."""
    bundle = Bundle.open(root)
    positions = bundle.manifest.decoder.max_positions
    if tokens < 1 or context < 0 or context + tokens > positions:
        raise RequestError(
            f"--dash-tokens {tokens} after --dash-context {context} cannot be: at least 1 and 0, and together no more "
            f"than the model's {positions} positions."
        )
    return bundle
