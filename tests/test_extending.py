"""A family, a policy kind and a backend: each is one file (here, this one) and one line in one registry, and runs end
to end without a change anywhere else.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dash_export import DashRuntime
from dash_export.backends.base import BACKENDS, Launch, Registered
from dash_export.backends.host.decode import EngineSet
from dash_export.backends.onnxruntime.ort_engine import session_options
from dash_export.backends.onnxruntime.ort_maker import CpuBackend
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build
from dash_export.core.kinds import KINDS, Served, SessionRules, Setting
from dash_export.core.policy import PolicyFacts
from dash_export.core.rule import static_rule
from dash_export.models import DecoderSpec, config
from tests.commands.helpers import done
from tests.tiny import random_ids, save_model


def toy_decoder(given: config.Config) -> DecoderSpec:
    return config.gated_decoder(given, max_positions=128)


def test_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "FAMILIES", (*config.FAMILIES, "toy"))
    monkeypatch.setitem(sys.modules, "dash_export.models.families.toy", SimpleNamespace(decoder=toy_decoder))  # type: ignore[arg-type]
    save_model(tmp_path / "model")
    done("build", tmp_path / "model", "-o", tmp_path / "llama.dash", "--target", "cpu-fp32", "--policy", "untrained")
    described = tmp_path / "model" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"model_type": "toy"}))
    done("build", tmp_path / "model", "-o", tmp_path / "toy.dash", "--target", "cpu-fp32", "--policy", "untrained")
    llama, toy = (DashRuntime.load(tmp_path / f"{name}.dash", "cpu-fp32") for name in ("llama", "toy"))
    assert toy.engines.model.model_type == "toy"
    ids = random_ids(toy.engines.model.vocab_size, 12)
    np.testing.assert_array_equal(toy.session().logits(ids), llama.session().logits(ids))


class LastUnits:
    """A policy kind: it skips the last units, as many as are asked for."""

    takes = ("skipped",)

    def serves(self, policy: PolicyFacts) -> bool:
        return bool(policy.units)

    def rules(self, setting: Setting, served: Served) -> SessionRules:
        units = len(served.policy.units)
        return SessionRules(static_rule(range(units - int(setting.skipped or 0), units)))


def test_a_policy_kind(tiny_root: Path, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "last", LastUnits())
    session = runtime.session("last", skipped=1)
    session.prefill([1, 2, 3])
    _, actions = session.decode_one(4)
    assert np.flatnonzero(actions).tolist() == [*runtime.engines.units[-1].layers]
    run = ("run", tiny_root, "hi", "--target", runtime.build.target, "--max-tokens", "4")
    assert "5.0 of 6 layers" in done(*run, "--policy", "last", "--skipped", "1").output
    assert "last" in done("inspect", tiny_root).stdout


class PlainEngine:
    """ONNX Runtime's own `run`: it copies all inputs and outputs."""

    def __init__(self, path: Path) -> None:
        self._session = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = (
            tuple(item.name for item in items) for items in (self._session.get_inputs(), self._session.get_outputs())
        )

    def bind(self, inputs: Mapping[str, np.ndarray[Any, Any]], outputs: Mapping[str, np.ndarray[Any, Any]]) -> Launch:
        def launch() -> None:
            found = self._session.run(self.outputs, {name: inputs[name] for name in self.inputs})
            for name, array in zip(self.outputs, found, strict=True):
                outputs[name][...] = array

        return launch


class PlainBackend:
    def load(self, path: Path) -> PlainEngine:
        return PlainEngine(path)

    def load_build(self, bundle: Bundle, build: Build, _dispatch: str) -> EngineSet:
        return EngineSet(bundle, build, self)


class PlainMaker(CpuBackend):
    """Its engines are the portable graphs."""

    def faults(self) -> Iterator[str]:
        if self.recipe.dialect != "portable":
            yield "it takes the dialect 'portable'."

    def start(self) -> None:
        """Start nothing: each session has threads of its own."""


def start(_name: str, _threads: int) -> PlainBackend:
    return PlainBackend()


def test_a_backend(
    own_bundle: Path, tmp_path: Path, tiny_runtime: Callable[..., DashRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (f"{__name__}:{name}" for name in ("start", "PlainMaker"))
    monkeypatch.setitem(BACKENDS, "plain", Registered("onnxruntime", "cpu", *parts))
    recipe = tmp_path / "toy.toml"
    shown = (
        'backend = "plain"\ndialect = "%s"\n[weights]\nlayers = "fp32"\nqkv = "fp32"\nungated = "fp32"\nhead = "fp32"\n'
    )
    recipe.write_text(shown % "portable" + 'embedding = "fp32"\nbypass = "fp32"\n')
    done("build", own_bundle, "--target", recipe)
    made = DashRuntime.load(own_bundle, "toy")
    ids = random_ids(made.engines.model.vocab_size, 12)
    exact = tiny_runtime("portable").session().logits(ids)
    np.testing.assert_allclose(made.session().logits(ids), exact, atol=1e-4)
    assert made.generate(ids, 8, skipped=1.0).actions.any()
