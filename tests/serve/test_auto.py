"""Several bundles behind one address: `auto` is answered by the first that has time, or else by the last."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import httpx
import pytest

from dash_export.core.kinds import Setting
from dash_export.errors import PolicyError
from dash_export.serve.app import Server
from dash_export.serve.scheduler import Request, Scheduler
from tests.listening import listening
from tests.serve.conftest import MakeScheduler, slow_down


@pytest.fixture
def http(scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Two models, `best` with room for two answers and a pace, on a machine that takes 20 ms a step."""
    slow_down(0.02, monkeypatch)
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
    with http.stream("POST", "/v1/completions", json=asked(model, 100)) as answer:
        tokens = answer.iter_raw()  # held: without it the answer is closed
        next(tokens)
        yield


def answering(http: httpx.Client) -> str:
    return str(http.post("/v1/completions", json=asked("auto")).json()["model"])


def test_the_first_that_has_room(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["best", "fast", "auto"]
    assert http.get("/v1/models/fast").json() == listed[1]
    assert http.get("/v1/models/slow").json()["error"]["code"] == "model_not_found"
    assert answering(http) == "best"
    with under_way(http, "best"):
        assert answering(http) == "best", "a row is free"
        with under_way(http, "best"):
            assert answering(http) == "fast"
            with under_way(http, "fast"):
                waits = answering(http)
    assert waits == "fast", "the last one takes what none has time for"


@pytest.mark.parametrize(("seconds", "name"), [(49.0, "best"), (51.0, "fast")])
def test_the_first_that_keeps_its_pace(
    seconds: float, name: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of both bundles fits into the pace of 100 seconds, or does not, whichever of them decodes."""
    monkeypatch.setattr(Scheduler, "seconds_with", lambda *_: seconds)
    assert answering(http) == "best", "nothing is under way: what was measured may be over"
    for busy in ("best", "fast"):
        with under_way(http, busy):
            assert answering(http) == name


def test_seconds_of_a_step(scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured; and the most that they would be with more rows."""
    slow_down(0.02, monkeypatch)
    one = scheduler(rows=4)
    assert one.seconds_with(1) == 0, "nothing was measured"
    answers = [one.stream(Request([1, 2, 3], 200)) for _ in range(2)]
    for answer in answers:
        for _ in range(3):
            next(answer)
    now = one.seconds_with(0)
    assert now >= 0.02, "from the first step on"
    assert one.seconds_with(2) == pytest.approx(2 * now, rel=0.4)


def test_a_setting_goes_where_it_can_be_had(scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"best": scheduler(False, rows=1), "fast": scheduler(False, rows=1)}
    monkeypatch.setattr(Server, "_has_time", lambda _, name: name == "fast")
    monkeypatch.setattr(served["fast"], "runtime", Mock(rules=Mock(side_effect=PolicyError)))
    server = Server(served)
    assert server.scheduler("auto")[0] == "fast"
    assert server.scheduler("auto", Setting("token", budget=0.9))[0] == "best"


@pytest.mark.parametrize("model", ["", "car"])
def test_other_names(model: str, http: httpx.Client) -> None:
    refused = http.post("/v1/completions", json=asked(model))
    assert refused.status_code == 404
    assert "Known: best, fast, auto." in refused.json()["error"]["message"]
