"""Polygraphy runners over a bundle (one engine behind its portable graph's names, or whole decode steps), and what they
are fed with: real text, and the states it has where an engine begins. Random numbers, which Polygraphy would take, are
no positions, masks or hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from dash_export.building.graph_runs import Arrays, graph_run, step_inputs, text_ids
from dash_export.bundle import Bundle
from dash_export.decision import Setting
from dash_export.errors import BackendError, BundleError, RequestError
from dash_export.manifest import POLICY, Build, ModelFacts, Segment
from dash_export.names import new_names, past_names, present_names, short_name
from dash_export.polygraphy import polygraphy_errors
from dash_export.runtime import DashRuntime, Session
from dash_export.runtime.backends.base import Engine
from dash_export.runtime.runtime import loaded_files

STEPS = 16
"""Different steps of a text; with more iterations they come again."""
_LENGTHS = ("seqlens_k", "total_length")
"""Inputs that engines have in place of a mask: they follow from the positions."""


@dataclass(frozen=True)
class EngineFacts:
    """An engine's name, that of its portable graph, and its layers (none where it only reads what enters the first)."""

    name: str
    portable: str
    segment: Segment


def find_engine(bundle: Bundle, build: Build, name: str) -> EngineFacts:
    """Find an engine by its name in the build: a segment, a bypass or the policy.

    Raises BundleError that lists the names, or says which segment a layer was merged into.
    """
    policy = bundle.manifest.policy
    known = {segment.name: (segment.name, segment) for segment in build.segments}
    known |= {unit.bypass: (unit.bypass, Segment(unit.first, unit.last, False, False, True)) for unit in policy.units}
    known[POLICY] = POLICY, Segment(policy.read, policy.read - 1, False, False, False)
    if name in known and name in build.engines:
        return EngineFacts(name, *known[name])
    merged = [item.name for item in build.segments if name in (f"layer_{layer:02d}" for layer in item.layers)]
    hint = f"{name} is part of the segment {merged[0]}. " if merged else ""
    raise BundleError(
        f"{bundle.root}: the build for {build.target!r} has no engine {name!r} that has a portable graph. {hint}"
        f"Engines: {', '.join(sorted(known.keys() & build.engines.keys()))}."
    )


class PortableEngine:
    """Runs one engine on the inputs of its portable graph."""

    def __init__(self, engine: Engine, facts: EngineFacts, model: ModelFacts, units: int) -> None:
        """`units`: how many the policy has."""
        self._engine, self._name, self._model, self._units = engine, facts.name, model, units
        layers = facts.segment.layers
        self._portable = {
            short_name(name): name for layer in layers for name in (*past_names(layer), *present_names(layer))
        }
        # What the host writes into a cache: the engine's output -> the cache before and after.
        rows = {
            short_name(new): cache
            for layer in layers
            for new, *cache in zip(new_names(layer), past_names(layer), present_names(layer), strict=True)
        }
        self._rows = {name: cache for name, cache in rows.items() if name in engine.outputs}

    @property
    def inputs(self) -> dict[str, tuple[npt.DTypeLike, tuple[int | None, ...]]]:
        """Name -> type and shape of what `__call__` wants, in the portable form; None where a size is free.

        Raises BackendError when the engine is another one.
        """
        model = self._model
        cache = (np.float32, (1, model.num_kv_heads, None, model.head_dim))
        known: dict[str, tuple[npt.DTypeLike, tuple[int | None, ...]]] = {
            "input_ids": (np.int64, (1, None)),
            "hidden": (np.float32, (1, None, model.hidden_size)),
            "position_ids": (np.int64, (1, None)),
            "write_indices": (np.int64, (1,)),
            "attention_mask": (np.bool_, (1, 1, None, None)),
            "first_logit": (np.int64, (1,)),
            **{name: cache for name in self._portable.values() if name.startswith("past_")},
        }
        names = [self._portable.get(name, name) for name in self._engine.inputs]
        names += [past for past, _ in self._rows.values()]
        names = ["position_ids" if name in _LENGTHS else name for name in names]
        if strange := sorted(set(names) - set(known)):
            raise BackendError(f"{self._name} wants {strange[0]}, which its portable graph does not. Build it again.")
        return {name: known[name] for name in dict.fromkeys(names)}

    def __call__(self, feed: Mapping[str, npt.NDArray[Any]]) -> tuple[Arrays, float]:
        """Portable inputs -> portable outputs and the seconds the engine took, without copies. Raises RequestError for
        positions that are not consecutive or leave the cache.
        """
        memory = {name: np.array(array) for name, array in {**feed, **self._lengths(feed)}.items()}
        outputs: Arrays = {}
        for name in self._engine.outputs:
            portable = self._portable.get(name, name)
            # Past and present share their memory, as in a session: the write is in place.
            past = memory.get(portable.replace("present.", "past_key_values."))
            outputs[name] = np.full(self._shape(name, memory), 0, np.float32) if past is None else past
            memory[portable] = outputs[name]
        launch = self._engine.bind(
            {name: memory[self._portable.get(name, name)] for name in self._engine.inputs}, outputs
        )
        began = time.perf_counter()
        launch()
        for name, (past_name, _) in self._rows.items():
            self._write(memory[name], memory[past_name], int(memory["position_ids"][0, 0]))
        seconds = time.perf_counter() - began
        written = {name: (present, memory[past]) for name, (past, present) in self._rows.items()}
        found = [written.get(name, (self._portable.get(name, name), array)) for name, array in outputs.items()]
        return dict(found), seconds

    def _lengths(self, feed: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Inputs that follow from the positions of a feed."""
        if "position_ids" not in feed:
            return {}
        positions = feed["position_ids"][0]
        start, count = int(positions[0]), len(positions)
        caches = [array.shape[2] for name, array in feed.items() if name.startswith("past_")]
        capacity = min(caches, default=start + count)
        if not np.array_equal(positions, np.arange(start, start + count)) or not 0 <= start <= capacity - count:
            raise RequestError(
                f"position_ids must be consecutive and inside a cache of {capacity} rows; got {start} to "
                f"{int(positions[-1])}. Leave the inputs to the --dash runner, or give real ones with --load-inputs."
            )
        return {name: array for name, array in step_inputs(start, count, 0).items() if name in _LENGTHS}

    def _shape(self, name: str, memory: Arrays) -> tuple[int, ...]:
        """The shape of an output that is no cache."""
        count, model = memory["hidden" if "hidden" in memory else "input_ids"].shape[1], self._model
        first = memory["first_logit"].item() if "first_logit" in memory else 0
        return {
            "hidden_out": (1, count, model.hidden_size),
            "logits": (1, count - first, model.vocab_size),
            "damage": (1, count, self._units),
        }.get(name, (1, count, model.num_kv_heads * model.head_dim))

    def _write(self, rows: npt.NDArray[Any], cache: npt.NDArray[Any], start: int) -> None:
        heads = rows.reshape(1, rows.shape[1], -1, self._model.head_dim)
        cache[:, :, start : start + rows.shape[1]] = heads.swapaxes(1, 2)


class DashEngineRunner(BaseRunner):  # type: ignore[misc]
    """One engine of a build, fed and answering as its portable graph does. `last_inference_time` is the engine's own:
    bound memory, no copies of caches.
    """

    def __init__(self, bundle: str, target: str, engine: str, name: str | None = None) -> None:
        super().__init__(name=name, prefix=f"dash {target} {engine}")
        self._place = bundle, target, engine

    def activate_impl(self) -> None:
        """Verify the build's files and load the engine."""
        with polygraphy_errors():
            self.engine = _load(*self._place)

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        with polygraphy_errors():
            for name, (dtype, shape) in self.engine.inputs.items():
                metadata.add(name, np.dtype(dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """The portable graph's outputs; `damage` more for an engine that holds a policy."""
        with polygraphy_errors():
            outputs, self.inference_time = self.engine(feed_dict)
        return outputs

    def deactivate_impl(self) -> None:
        del self.engine


def _load(root: str, target: str, name: str) -> PortableEngine:
    import onnxruntime as ort

    from dash_export.runtime.backends.onnxruntime import OrtEngine

    bundle = Bundle.open(root)
    build = bundle.load_build(target)
    facts = find_engine(bundle, build, name)
    seal = bundle.verify(loaded_files(bundle, build))
    if build.recipe.engine is not None:
        raise BackendError(
            f"Single engines of GPU targets ({target}) do not run in Polygraphy yet: leave --dash-segment out to run "
            "whole steps, or compare graphs with `dash-export build --verify`."
        )
    # Threads of its own: Polygraphy's ONNX Runtime runner has them too, and a process that holds such a session cannot
    # have the shared pool of the runtime.
    engine = OrtEngine(bundle.path(build.engines[name].file), ort.SessionOptions())
    bundle.check_same(seal)
    return PortableEngine(engine, facts, bundle.manifest.model, len(bundle.manifest.policy.units))


class DashStepRunner(BaseRunner):  # type: ignore[misc]
    """Whole decode steps of the runtime: the first tokens of `input_ids` [1, n] are prefilled densely and not timed,
    the last `tokens` of them decoded one by one under the setting. Every call begins an empty context.
    """

    def __init__(self, bundle: str, target: str, tokens: int = 1, name: str | None = None, **setting: Any) -> None:
        """`setting`: the arguments of `DashRuntime.session`."""
        words = [f"{key}={value}" for key, value in setting.items()]
        super().__init__(name=name, prefix=" ".join(["dash", target, *words]))
        self._place, self._tokens, self._setting = (bundle, target), tokens, setting

    def activate_impl(self) -> None:
        with polygraphy_errors():
            self.session: Session = DashRuntime.load(*self._place).session_with(Setting(**self._setting))

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input_ids", np.dtype(np.int64), (1, None))

    def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[np.int64]]) -> Arrays:
        """logits [1, tokens, vocab] after each decoded token; the time is that of all of them together."""
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


class StepInputs:
    """`input_ids` [1, context + tokens] for whole steps: windows of a text, one per iteration."""

    def __init__(self, bundle: str, tokens: int, context: int, iterations: int) -> None:
        with polygraphy_errors():
            opened = Bundle.open(bundle)
            _check_length(opened, tokens, context)
            ids = text_ids(opened, context + STEPS * tokens)
        starts = [index % STEPS * tokens for index in range(iterations)]
        self._steps = [{"input_ids": ids[None, start : start + context + tokens]} for start in starts]

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> Arrays:
        return dict(self._steps[index])


class EngineInputs:
    """The steps of a text as one engine and its portable graph see them: the same text, one step further per
    iteration, over a cache of one capacity. A dictionary has what any of the two may want.

    States and caches come from the portable graphs of the layers before, run once over the whole text.
    """

    def __init__(self, bundle: str, target: str, engine: str, tokens: int, context: int, iterations: int) -> None:
        self._tokens, self._iterations = tokens, iterations
        with polygraphy_errors():
            opened = Bundle.open(bundle)
            segment = find_engine(opened, opened.load_build(target), engine).segment
            _check_length(opened, tokens, context)
            steps = min(STEPS, iterations, (opened.manifest.model.max_positions - context) // tokens)
            self._starts = range(context, context + tokens * steps, tokens)
            self._length = context + tokens * steps
            self._ids = text_ids(opened, self._length)[None]
            self._states, self._caches = self._walk(opened, segment)

    def _walk(self, bundle: Bundle, segment: Segment) -> tuple[npt.NDArray[np.float32], Arrays]:
        """The hidden states [1, length, hidden] that enter the segment, and the caches of its layers."""
        model, places = bundle.manifest.model, step_inputs(0, self._length, self._length)
        hidden = graph_run(bundle.graph("embed"), own_threads=True)({"input_ids": self._ids})["hidden_out"]
        states = hidden
        caches: Arrays = {}
        empty = np.zeros((1, model.num_kv_heads, self._length, model.head_dim), np.float32)
        for layer in range(segment.last + 1):
            run = graph_run(bundle.graph(f"layer_{layer:02d}"), own_threads=True)
            found = run(places | {"hidden": hidden} | dict.fromkeys(past_names(layer), empty))
            hidden = found["hidden_out"]
            if layer < segment.first:
                states = hidden
            else:
                caches |= dict(zip(past_names(layer), (found[name] for name in present_names(layer)), strict=True))
        return states, caches

    def __len__(self) -> int:
        return self._iterations

    def __getitem__(self, index: int) -> Arrays:
        if not 0 <= index < self._iterations:
            raise IndexError(index)
        start = self._starts[index % len(self._starts)]
        step = slice(start, start + self._tokens)
        caches = {name: array.copy() for name, array in self._caches.items()}
        for array in caches.values():
            array[:, :, start:] = 0
        inputs = step_inputs(start, self._tokens, self._length)
        return inputs | {"input_ids": self._ids[:, step], "hidden": self._states[:, step]} | caches


def _check_length(bundle: Bundle, tokens: int, context: int) -> None:
    """Raises RequestError when the model has not as many positions as a step and its context take."""
    positions = bundle.manifest.model.max_positions
    if tokens < 1 or context < 0 or context + tokens > positions:
        raise RequestError(
            f"--dash-tokens {tokens} after --dash-context {context} cannot be: at least 1 and 0, and together no more "
            f"than the model's {positions} positions."
        )
