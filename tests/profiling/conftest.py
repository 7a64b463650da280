"""A short profile of the tiny bundle, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.evaluation.text import windows
from dash_export.profiling.measure import Lane, measure, replay_of

TEXT = "The layers of a decoder are not equally needed, and some of them hardly at all. " * 20
CONTEXT, TOKENS, ROUNDS, TRACED = 12, 6, 4, 3


@pytest.fixture(scope="session")
def lanes(tiny_runtime: Callable[..., DashRuntime]) -> list[Lane]:
    """Dense, the token policy in engines of its own, the token policy fused, and the replay of that."""
    plain, fused, sync = (tiny_runtime(dispatch=dispatch) for dispatch in ("plain", "fused", "sync"))
    token = Setting("token", skipped=1.5)
    found = [
        Lane("tiny", Setting("dense"), [plain], [plain.session("dense")]),
        Lane("tiny", token, [sync], [sync.session_with(token)]),
        Lane("tiny", token, [fused], [fused.session_with(token)]),
    ]
    found.append(replay_of(found[-1], [plain]))
    parts = windows(plain, TEXT, "text", 2, CONTEXT + 2 + TOKENS)
    measure(found, parts, TOKENS, ROUNDS, TRACED)
    return found
