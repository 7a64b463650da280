"""Polygraphy runners over a bundle: one engine behind its portable graph's names, or a whole decode step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from dash_export.bundle import Bundle
from dash_export.decision import Setting
from dash_export.errors import BackendError, RequestError
from dash_export.graph_runs import Arrays
from dash_export.polygraphy.engines import PortableEngine, find_engine
from dash_export.polygraphy.errors import told_by_polygraphy
from dash_export.runtime import DashRuntime, Session
from dash_export.runtime.backends.base import Engine
from dash_export.runtime.runtime import loaded_files
from dash_export.targets import recipe_from_dict


class DashEngineRunner(BaseRunner):  # type: ignore[misc]
    """One engine of a build, fed and answering as its portable graph does. `last_inference_time` is the engine's own:
    bound memory, no copies of caches.
    """

    def __init__(self, bundle: str, target: str, engine: str, name: str | None = None) -> None:
        super().__init__(name=name, prefix=f"dash {target} {engine}")
        self._place = bundle, target, engine

    def activate_impl(self) -> None:
        """Verify the build's files and load the engine."""
        with told_by_polygraphy():
            self.engine = _load(*self._place)

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        with told_by_polygraphy():
            for name, (dtype, shape) in self.engine.inputs.items():
                metadata.add(name, np.dtype(dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """The portable graph's outputs; `damage` more for an engine that holds a policy."""
        with told_by_polygraphy():
            outputs, self.inference_time = self.engine(feed_dict)
        return outputs

    def deactivate_impl(self) -> None:
        del self.engine


class DashStepRunner(BaseRunner):  # type: ignore[misc]
    """Whole decode steps of the runtime: the first tokens of `input_ids` [1, n] are prefilled densely and not timed,
    the last `tokens` of them decoded one by one under the setting. Every call begins an empty context.
    """

    def __init__(self, bundle: str, target: str, tokens: int = 1, name: str | None = None, **setting: Any) -> None:
        """`setting`: the arguments of `DashRuntime.session`."""
        words = [f"{key}={value}" for key, value in setting.items()]
        super().__init__(name=name, prefix=" ".join(["dash", target, *words]))
        self._place = bundle, target
        self._tokens = tokens
        self._setting = setting

    def activate_impl(self) -> None:
        with told_by_polygraphy():
            self.session: Session = DashRuntime.load(*self._place).session_with(Setting(**self._setting))

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input_ids", np.dtype(np.int64), (1, None))

    def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[np.int64]]) -> Arrays:
        """logits [1, tokens, vocab] after each decoded token; the time is that of all of them together."""
        ids = feed_dict["input_ids"][0]
        with told_by_polygraphy():
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


def _load(bundle: str, target: str, name: str) -> PortableEngine:
    opened = Bundle.open(bundle)
    build = opened.load_build(target)
    facts = find_engine(opened, build, name)
    opened.verify(loaded_files(opened, build))
    recipe = recipe_from_dict(build.recipe, f"the recipe recorded in the build for {target}")
    if recipe.engine is not None:
        raise BackendError(
            f"Single engines of GPU targets ({target}) do not run in Polygraphy yet: leave --dash-segment out to run "
            "whole steps, or compare graphs with `dash-export build --verify`."
        )
    engine = _own_threads(opened.path(build.engines[name].file))
    return PortableEngine(engine, facts, opened.manifest.model, len(opened.manifest.policy.units))


def _own_threads(path: Path) -> Engine:
    """An engine with a pool of its own: Polygraphy's ONNX Runtime runner has one too, and a process that holds such a
    session cannot have the shared pool of the runtime.
    """
    import onnxruntime as ort

    from dash_export.runtime.backends.onnxruntime import OrtEngine

    return OrtEngine(path, ort.SessionOptions())
