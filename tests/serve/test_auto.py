"""Several bundles behind one address: `auto` is answered by the first that has time, or else by the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import httpx
import pytest

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.runtime.decode import BoundStep
from dash_export.serve.app import Server
from dash_export.serve.pace import Pace
from dash_export.serve.scheduler import Scheduler
from tests.listening import listening
from tests.serve.conftest import MakeScheduler


@pytest.fixture
def http(scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Two models, `best` with room for two answers and a pace, on a machine that takes 20 ms a step."""
    sound = BoundStep.decode_batch

    def slow(*given: object) -> None:
        time.sleep(0.02)
        sound(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(BoundStep, "decode_batch", slow)
    served = {
        "best": scheduler(False, rows=2, pace=100.0, alone=Setting("token", trade_off=0.3)),
        "fast": scheduler(False, rows=1),
    }
    with listening(Server(served, drain=5.0).app) as address, httpx.Client(base_url=address, timeout=30) as made:
        yield made


def asked(model: str, tokens: int = 1) -> dict[str, object]:
    return {"model": model, "prompt": [1, 2, 3], "max_tokens": tokens, "stream": tokens > 1}


@contextmanager
def under_way(http: httpx.Client, model: str) -> Iterator[None]:
    """A long answer, whose first tokens have come."""
    with http.stream("POST", "/v1/completions", json=asked(model, 200)) as answer:
        tokens = answer.iter_raw()  # held: without it the answer is closed
        next(tokens)
        yield


def answering(http: httpx.Client) -> str:
    return str(http.post("/v1/completions", json=asked("auto")).json()["model"])


def test_the_first_that_has_room(http: httpx.Client) -> None:
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["best", "fast", "auto"]
    assert answering(http) == "best"
    with under_way(http, "best"):
        assert answering(http) == "best", "a row is free"
        with under_way(http, "best"):
            assert answering(http) == "fast"
            with under_way(http, "fast"):
                waits = answering(http)
    assert waits == "fast", "the last one takes what none has time for"


def test_the_first_that_keeps_its_pace(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "kept", property(lambda _: False))
    assert answering(http) == "best", "nothing is under way: what was measured may be over"
    with under_way(http, "best"):
        assert answering(http) == "fast"


@pytest.mark.parametrize("model", ["", "car"])
def test_other_names(model: str, http: httpx.Client) -> None:
    refused = http.post("/v1/completions", json=asked(model))
    assert refused.status_code == 404
    assert "Known: best, fast, auto." in refused.json()["error"]["message"]


def test_one_model_has_no_auto(tiny_runtime: Callable[..., DashRuntime]) -> None:
    assert Server({"tiny": Scheduler(tiny_runtime())}).names == ["tiny"]


@pytest.mark.parametrize(("dense", "rest"), product((0.01, 0.1), (0.0, 0.04)))
def test_what_is_kept(dense: float, rest: float, tiny_runtime: Callable[..., DashRuntime]) -> None:
    """60 ms, at budgets down to 0.5."""
    pace = Pace(0.06, 0.5, (0, 1), replace(tiny_runtime().cost, cost=(0.3, 0.2)))
    assert pace.kept, "nothing is measured yet"
    pace.measured(1.0, dense, rest)
    assert pace.kept == (0.5 * dense + rest <= 0.06)
