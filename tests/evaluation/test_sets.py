"""Static sets of units: each alone, and growing ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.evaluation.sets import essential, greedy_sets, measure_sets
from dash_export.evaluation.text import windows
from tests.evaluation.test_text import TEXT, log_softmax
from tests.tiny import TINY_UNITS


def test_damage_of_sets_against_plain_numpy(runtime: DashRuntime) -> None:
    parts = windows(runtime, TEXT, "t", 2, 128)
    results = measure_sets(runtime, [TINY_UNITS[:1], TINY_UNITS[::-1]], parts)
    assert [result.setting.skip for result in results] == [None, (2, 3), (2, 3, 4)]
    for result in results:
        kl, nll = [], []
        for part in parts:
            sessions = (runtime.session("static", skip=skip) for skip in ((), result.setting.skip or ()))
            p, q = (log_softmax(session.logits(part))[2:-1] for session in sessions)
            kl.append((np.exp(p) * (p - q)).sum(-1))
            nll.append(-q[np.arange(len(q)), part[3:]])
        assert result.kl.value == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
        assert result.perplexity.value == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert 0 < results[1].kl.value < results[2].kl.value


def test_greedy_sets_grow(runtime: DashRuntime) -> None:
    parts = windows(runtime, TEXT, "t", 1, 128)
    singles = measure_sets(runtime, [(unit,) for unit in TINY_UNITS], parts)[1:]
    small, whole = greedy_sets(runtime, singles, 9, parts)
    assert small == min(singles, key=lambda result: result.kl.value)
    assert whole.setting.skip == (2, 3, 4)
    assert greedy_sets(runtime, singles, 0, parts) == []
    assert greedy_sets(runtime, singles, 1, parts) == [small]


def test_essential(runtime: DashRuntime) -> None:
    (one,) = measure_sets(runtime, [], windows(runtime, TEXT, "t", 1, 48))
    results = [replace(one, kl=replace(one.kl, value=kl)) for kl in (9.0, 0.1, 0.2, 0.3, 1.3)]
    assert essential(results) == [results[0], results[4]]
    assert essential([]) == []
