"""Trade-offs that save as much on the tokens judged as was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import floor
from pathlib import Path

import pytest

from dash_export import DashRuntime
from dash_export.decision import DialPoint, Setting
from dash_export.evaluation.evaluate import Request, evaluate
from dash_export.evaluation.matching import PASSES, TOLERANCE, matched
from dash_export.evaluation.results import Result
from dash_export.evaluation.settings import plan
from tests.evaluation.test_text import TEXT

LAYERS = 30
DENSE = Setting("dense")


class Made:
    """A build with a dial, and a text on which a trade-off saves what `share` says, of 12 layers and half the time."""

    def __init__(self, share: Callable[[float], float]) -> None:
        points = [DialPoint(value, LAYERS - 12 * value / (1 + value), 1 - 0.5 * value / (1 + value), 0.0)
                  for value in (0.0, 0.1, 0.3, 1.0, 3.0, 30.0)]  # fmt: skip
        self.dial = tuple(points)
        self.share = share
        self.passes = 0

    def measure(self, settings: Sequence[Setting]) -> list[Result]:
        self.passes += 1
        assert settings[0] == DENSE
        return [self.result(setting, setting.trade_off or 0.0) for setting in settings]

    def result(self, setting: Setting, trade_off: float) -> Result:
        share = self.share(trade_off)
        return Result("", setting, 10, LAYERS - 12 * share, 1 - 0.5 * share, 1)


@pytest.mark.parametrize("scale", [0.1, 0.8, 1.0, 1.2, 9.0])
@pytest.mark.parametrize("power", [0.7, 1.0, 3.0])
@pytest.mark.parametrize(("asked", "wanted"), [({"budget": 0.9}, 0.1), ({"skipped": 4.0}, 4.0)])
def test_as_much_is_saved(scale: float, power: float, asked: dict[str, float], wanted: float) -> None:
    made = Made(lambda value: (scale * value) ** power / (1 + (scale * value) ** power))
    first = [made.result(DENSE, 0.0)]
    first += [made.result(Setting(kind, **asked), 0.25 if asked.get("budget") else 0.5) for kind in ("static", "token")]
    found = matched(made, first, made.measure)  # type: ignore[arg-type]
    assert found[:2] == first[:2], "only what has a trade-off is moved"
    assert found[2].setting.kind == "token"
    assert found[2].setting.given == ("trade_off", *asked)
    saved = 1 - found[2].time if "budget" in asked else LAYERS - found[2].layers
    assert saved == pytest.approx(wanted, rel=TOLERANCE)
    assert made.passes < PASSES


def test_what_cannot_be_met_comes_near() -> None:
    """In steps of a quarter 0.35 of a half lies between 0.25 and 0.5; and where nothing is ever skipped, nothing is."""
    made = Made(lambda value: floor(4 * value / (1 + value)) / 4)
    (_, found) = matched(  # type: ignore[arg-type]
        made, [made.result(DENSE, 0.0), made.result(Setting("token", budget=0.825), 0.0)], made.measure
    )
    assert found.time == pytest.approx(0.875)
    assert made.passes == PASSES - 1
    still = Made(lambda _: 0.0)
    (_, found) = matched(  # type: ignore[arg-type]
        still, [still.result(DENSE, 0.0), still.result(Setting("token", budget=0.9), 0.0)], still.measure
    )
    assert found.time == 1.0


def test_where_nothing_can_be_skipped_nothing_is_tried() -> None:
    """Choices of one token each, say."""
    made = Made(lambda _: 0.0)
    results = [replace(made.result(setting, 0.0), tokens=0) for setting in (DENSE, Setting("token", budget=0.9))]
    assert matched(made, results, made.measure) == results  # type: ignore[arg-type]
    assert made.passes == 0


def test_on_a_text(runtime: DashRuntime, tmp_path: Path) -> None:
    """Other than the dial's: what is skipped there is what was asked for."""
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    settings, refused = plan(runtime, ("static", "token"), "skipped", (1.0,))
    assert not refused
    asked, found = (
        evaluate(runtime, settings, Request((path,), limit=2, window=96, prefix=8, matched=flag))[0].results
        for flag in (False, True)
    )
    assert found[:2] == asked[:2]
    assert abs(6 - asked[2].layers - 1.0) > TOLERANCE, "the dial's text skips otherwise, or this shows nothing"
    assert 6 - found[2].layers == pytest.approx(1.0, rel=TOLERANCE)
