"""An engine that fails while it runs: an error that names it, and a session that goes on from before the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dash_export import DashRuntime
from dash_export.errors import BackendError
from dash_export.runtime.backends import onnxruntime as backend
from dash_export.runtime.backends.base import Launch
from tests.tiny import random_ids

Fail = Callable[[str], ort.RunOptions]
FIRST, SECOND = random_ids(12, seed=1), random_ids(9, seed=2)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """`stop(engine)`: its runs fail, really and inside ONNX Runtime, while what this gives has `terminate` set."""

    def stop(name: str) -> ort.RunOptions:
        bind, options = backend.OrtEngine.bind, ort.RunOptions()

        def own(engine: backend.OrtEngine, inputs: Any, outputs: Any) -> Launch:
            with pytest.MonkeyPatch.context() as patch:
                if engine._name == name:
                    patch.setattr(backend, "_RUN_OPTIONS", options)
                return bind(engine, inputs, outputs)

        monkeypatch.setattr(backend.OrtEngine, "bind", own)
        return options

    return stop


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("dense", "layers_00-01.onnx"),
        ("dense", "layer_05.onnx"),
        ("static", "bypass_02-03.onnx"),
        ("token", "layers_02-03.onnx"),
        ("token", "bypass_04-04.onnx"),
    ],
)
def test_a_session_goes_on(
    kind: str, engine: str, tiny_root: Path, stop: Fail, setting_of: Callable[[str], dict[str, Any]]
) -> None:
    """Wherever it fails, nothing is lost."""
    options = stop(engine)
    runtime = DashRuntime.load(tiny_root, "cpu-fp32")
    setting = setting_of(kind)
    for failing in range(1, 5):
        live = runtime.session(**setting)
        stream, made = live.stream(FIRST, 40), []
        for _ in range(failing):
            made.append(next(stream).token)
        options.terminate = True
        with pytest.raises(BackendError, match=rf"engine {engine} in ONNX Runtime \d.* failed .*build the target"):
            made.extend(response.token for response in stream)  # a rule may skip this engine for a token or two
        options.terminate = False
        assert live.tokens == [*FIRST, *made[:-1]]
        assert live.context_left == 512 - len(live.tokens)
        again = live.generate(SECOND, 6)
        other = runtime.session(**setting)
        whole = other.generate(FIRST, len(made)).tokens
        np.testing.assert_array_equal(made, whole)
        np.testing.assert_array_equal(again.tokens, other.generate(SECOND, 6).tokens)


def test_a_prompt_that_fails(tiny_root: Path, stop: Fail) -> None:
    options = stop("layer_04.onnx")
    runtime = DashRuntime.load(tiny_root, "cpu-fp32")
    live = runtime.session()
    options.terminate = True
    for ask in (live.prefill, live.score, live.generate):
        with pytest.raises(BackendError, match="layer_04"):
            ask(FIRST)
        assert (live.tokens, live.context_left) == ([], 512)
    options.terminate = False
    np.testing.assert_array_equal(live.generate(FIRST, 5).tokens, runtime.generate(FIRST, 5).tokens)


@pytest.mark.parametrize("engine", ["layers_00-01.onnx", "mixed_02-03.onnx", "layer_05.onnx"])
def test_a_score_that_fails(engine: str, tiny_root: Path, stop: Fail) -> None:
    options = stop(engine)
    live = DashRuntime.load(tiny_root, "cpu-fp32").session(trade_off=1e3)
    options.terminate = True
    with pytest.raises(BackendError, match=engine):
        live.score(FIRST)
    assert live.tokens == []


def test_a_step_of_a_batch_that_fails_ends_all(tiny_root: Path, stop: Fail) -> None:
    options = stop("layer_04.onnx")
    runtime = DashRuntime.load(tiny_root, "cpu-fp32")
    batch = runtime.batch(2)
    stream = batch.stream([FIRST, SECOND], 9)
    for _ in range(4):
        next(stream)
    options.terminate = True
    with pytest.raises(BackendError, match="layer_04"):
        list(stream)
    # In the prefill of one prompt it is that one's.
    assert [response.finish_reason for _, response in batch.stream([FIRST, SECOND], 9)] == ["error"] * 2
    options.terminate = False
    tokens: list[list[int]] = [[], []]
    for index, response in batch.stream([FIRST, SECOND], 9):
        tokens[index].append(response.token)
    assert tokens == [runtime.generate(prompt, 9).tokens.tolist() for prompt in (FIRST, SECOND)]


def test_what_a_rule_raises_stays_as_it_is(tiny_root: Path) -> None:
    class Asked:
        asks = True

        def skips(self, _: Any) -> Any:
            raise ZeroDivisionError

    live = DashRuntime.load(tiny_root, "cpu-fp32").session_under(Asked())
    with pytest.raises(ZeroDivisionError):
        live.generate(FIRST, 5)
