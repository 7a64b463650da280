"""An engine that fails while it runs: an error that names it, and a session that goes on from before the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dash_export import DashRuntime
from dash_export.backends.base import Launch
from dash_export.backends.onnxruntime import ort_engine as backend
from dash_export.errors import BackendError
from tests.runtime.test_batch import alone, answers
from tests.tiny import random_ids

Fail = Callable[[str], tuple[DashRuntime, ort.RunOptions]]
SettingOf = Callable[[str], dict[str, Any]]
FIRST, SECOND = random_ids(12, seed=1), random_ids(9, seed=2)


@pytest.fixture
def failing(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Fail:
    """`failing(engine)`: a runtime in which its runs fail, really and inside ONNX Runtime, while the options have
    `terminate` set.
    """

    def failing(name: str) -> tuple[DashRuntime, ort.RunOptions]:
        bind, options = backend.OrtEngine.bind, ort.RunOptions()

        def own(engine: backend.OrtEngine, inputs: Any, outputs: Any) -> Launch:
            with pytest.MonkeyPatch.context() as patch:
                if engine._name == name:
                    patch.setattr(backend, "_RUN_OPTIONS", options)
                return bind(engine, inputs, outputs)

        monkeypatch.setattr(backend.OrtEngine, "bind", own)
        return DashRuntime.load(tiny_root, "cpu-fp32"), options

    return failing


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("dense", "layers_00-01.onnx"),
        ("dense", "layer_05.onnx"),
        ("static", "bypass_02-03.onnx"),
        ("token", "layers_02-03.onnx"),
    ],
)
def test_a_session_goes_on(kind: str, engine: str, failing: Fail, setting_of: SettingOf) -> None:
    """Wherever it fails, nothing is lost."""
    runtime, options = failing(engine)
    setting = setting_of(kind)
    for taken in (1, 3):
        live = runtime.session(**setting)
        stream = live.stream(FIRST, 40)
        made = [next(stream).token for _ in range(taken)]
        options.terminate = True
        with pytest.raises(BackendError, match=rf"engine {engine} in ONNX Runtime \d.* failed .*build the target"):
            made.extend(response.token for response in stream)  # a rule may skip this engine for a token or two
        options.terminate = False
        assert live.tokens == [*FIRST, *made[:-1]]
        assert live.context_left == 512 - len(live.tokens)
        other = runtime.session(**setting)
        np.testing.assert_array_equal(made, other.generate(FIRST, len(made)).tokens)
        np.testing.assert_array_equal(live.generate(SECOND, 6).tokens, other.generate(SECOND, 6).tokens)


@pytest.mark.parametrize("engine", ["layers_00-01.onnx", "mixed_02-03.onnx", "layer_05.onnx"])
def test_a_prompt_and_a_score_that_fail(engine: str, failing: Fail) -> None:
    runtime, options = failing(engine)
    live = runtime.session(trade_off=1e3)
    options.terminate = True
    for ask in (live.score,) if engine.startswith("mixed") else (live.score, live.prefill, live.generate):
        with pytest.raises(BackendError, match=engine):
            ask(FIRST)
        assert (live.tokens, live.context_left) == ([], 512)
    options.terminate = False
    np.testing.assert_array_equal(live.generate(FIRST, 5).tokens, runtime.generate(FIRST, 5, trade_off=1e3).tokens)


def test_a_step_of_a_batch_that_fails_ends_all(failing: Fail) -> None:
    runtime, options = failing("layer_04.onnx")
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
    assert answers(batch, [FIRST, SECOND], 9) == alone(runtime, [FIRST, SECOND], 9)


def test_what_a_rule_raises_stays_as_it_is(runtime: DashRuntime) -> None:
    class Asked:
        asks = True

        def skips(self, _: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runtime.session_under(Asked()).generate(FIRST, 5)
