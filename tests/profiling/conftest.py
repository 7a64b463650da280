"""A short profile of the tiny bundle, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.evaluation.settings import entrants
from dash_export.evaluation.text import windows
from dash_export.profiling.measure import Lane, measure

TEXT = "The layers of a decoder are not equally needed, and some of them hardly at all. " * 20
CONTEXT, TOKENS, ROUNDS, TRACED = 12, 6, 4, 3


@pytest.fixture(scope="session")
def lanes(tiny_runtime: Callable[..., DashRuntime]) -> list[Lane]:
    """Dense, a static set and the token policy; and the portable build."""
    runtime, portable = tiny_runtime(), tiny_runtime("portable")
    settings = [Setting("dense"), Setting("static", skip=(2, 3)), Setting("token", skipped=1.5)]
    found = [Lane(entrant) for entrant in entrants(runtime, settings, [("other", portable)])]
    measure(found, windows(runtime, TEXT, "text", 2, CONTEXT + 2 + TOKENS), TOKENS, ROUNDS, TRACED)
    return found
