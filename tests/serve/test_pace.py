"""A pace that is kept: less is run as more ask, and more again when they have gone."""

import time
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.decode import BoundStep
from dash_export.core.dial import CostTable
from dash_export.core.kinds import Setting
from dash_export.errors import PolicyError, RequestError
from dash_export.runtime.results import Response, Statistics
from dash_export.runtime.session import Session
from dash_export.serve.pace import Pace
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import Request
from tests.serve.conftest import MakeScheduler, slow_down
from tests.tiny import random_ids

COST = (0.2, 0.1, 0.15)
ORDER = (1, 0, 2)


@pytest.fixture
def table(runtime: DashRuntime) -> CostTable:
    return replace(runtime.cost, cost=COST)


@pytest.mark.parametrize(
    ("dense", "rest", "granted", "skipped"),
    [
        (0.05, 0.0, 1.0, set()),
        (0.06, 0.0, 1.0, set()),
        (0.062, 0.0, 0.9677, {1}),
        (0.05, 0.015, 0.9, {1}),
        (0.08, 0.0, 0.75, {1, 0}),
        (0.5, 0.0, 0.6, {1, 0}),
        (0.05, 0.5, 0.6, {1, 0}),
    ],
)
@pytest.mark.parametrize("ran", [1.0, 0.7])
def test_what_is_granted(
    ran: float, dense: float, rest: float, granted: float, skipped: set[int], table: CostTable
) -> None:
    """From any of its own settings it finds the same."""
    pace = Pace(0.06, 0.6, ORDER, table)
    for _ in range(40):
        pace.measured(ran, dense * ran, rest)
    assert pace.granted == pytest.approx(granted, abs=1e-4)
    assert set(np.flatnonzero(pace.together().rule.skips(np.zeros((3, 1), np.float32))[:, 0])) == skipped


def test_it_comes_back(table: CostTable) -> None:
    pace = Pace(0.06, 0.6, ORDER, table)
    for dense, limit in ((0.09, 0.68), (0.03, 1.0)):
        for _ in range(25):
            pace.measured(pace.granted, dense * pace.granted, 0.0)
        assert pace.granted == pytest.approx(limit, abs=0.02)


@pytest.mark.parametrize(("seconds", "least"), [(0.0, 0.8), (float("nan"), 0.8), (0.1, 0.0), (0.1, 1.1)])
def test_what_is_no_pace(seconds: float, least: float, table: CostTable) -> None:
    with pytest.raises(RequestError, match="A pace has"):
        Pace(seconds, least, ORDER, table)


def test_under_load(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch, scheduler: MakeScheduler) -> None:
    """A machine that takes 4 ms for a row and a layer's share of it: what four rows skip is what keeps their pace;
    those that say how much they skip are not touched.
    """
    # The second unit alone saves too little for four rows, whatever this machine measured.
    monkeypatch.setattr(runtime, "build", replace(runtime.build, cost=replace(runtime.cost, cost=(0.34, 0.1))))
    sound = BoundStep.decode_batch

    def slow(self: BoundStep, tokens: list[int], *given: Any) -> None:
        sound(self, tokens, *given)
        time.sleep(0.004 * len(tokens) * float(runtime.cost.token_time(self.skipped.all(axis=1)[:, None])[0]))

    monkeypatch.setattr(BoundStep, "decode_batch", slow)
    made = scheduler(rows=4, alone=Setting("token", trade_off=0.3), pace=0.014, least=0.05)
    assert made.pace is not None
    own = Request(random_ids(5), 20, setting=Setting("dense"))
    expected = [step.token for step in runtime.session_with(Setting("dense")).stream(own.prompt, own.max_tokens)]
    assert [step.token for step in made.stream(own)] == expected
    assert made.pace.granted == 1.0
    request = Request(random_ids(5), 120)
    *_, last = made.stream(request)
    assert last.statistics.layers_per_token > 4.5, "alone there is time for nearly all"
    ended: SimpleQueue[Statistics] = SimpleQueue()

    def tell(response: Response) -> None:
        if response.finish_reason is not None:
            ended.put(response.statistics)

    for _ in range(4):  # at once: none may decode alone for long
        made.submit(request, tell)
    assert all(ended.get().layers_per_token < 5 for _ in range(4))


def test_with_time_for_all_nothing_is_skipped(scheduler: MakeScheduler) -> None:
    made = scheduler(rows=2, alone=Setting("token", trade_off=0.3), pace=100.0)
    *_, last = made.stream(Request(random_ids(5), 60))
    assert last.statistics.layers_per_token == 6


def test_a_prompt_that_nobody_waits_for_is_in_no_pace(
    scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(0.005, monkeypatch)
    prefill, measured, rests = Session.prefill, Pace.measured, list[float]()
    monkeypatch.setattr(Session, "prefill", lambda *given: (time.sleep(0.05), prefill(*given))[1])
    monkeypatch.setattr(Pace, "measured", lambda pace, *given: (rests.append(given[-1]), measured(pace, *given))[1])
    made = scheduler(rows=2, alone=Setting("token", trade_off=0.3), pace=100.0)
    list(made.stream(Request(random_ids(60), 5)))
    assert max(rests) < 0.04
    running = made.stream(Request(random_ids(4, seed=1), 100, setting=Setting("dense")))
    next(running), next(running)  # its prompt's pass is over, which short prompts could still have joined
    list(made.stream(Request(random_ids(60, seed=2), 5)))
    assert max(rests) > 0.05, "a row waited for this one"
    running.close()


def test_it_needs_a_policy(runtime: DashRuntime) -> None:
    with pytest.raises(PolicyError, match=r"A pace needs a trained policy, .* here\. Give a --budget\."):
        Scheduler(runtime, pace=0.01, alone=Setting("dense"))


def test_a_policy_whose_recommended_setting_is_dense_will_do(
    scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DashRuntime, "recommended", Setting("dense"))
    made = scheduler(rows=2, pace=1e-6, least=0.7)
    *_, last = made.stream(Request(random_ids(8, seed=1), 30))
    assert last.statistics.layers_per_token < 6
