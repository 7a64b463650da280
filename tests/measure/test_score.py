"""Divergence and perplexity against plain numpy over the runtime's own logits."""

from collections.abc import Callable

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.measure.candidates import candidates
from dash_export.measure.score import score
from dash_export.measure.texts import windows
from dash_export.text.chats import Continuation
from tests.tiny import TEXT, log_softmax

SETTINGS = (Setting("dense"), Setting("static", skipped=2), Setting("token", skipped=1.5))
PREFIX, WINDOW = 10, 48


def test_every_figure(runtime: DashRuntime, tiny_runtime: Callable[..., DashRuntime]) -> None:
    """And another build, whose reference is the dense of the first."""
    parts = windows(runtime, TEXT, "t", 2, WINDOW, PREFIX)
    compared = candidates(runtime, SETTINGS, [("other", tiny_runtime("portable"))])
    *results, other = score([Continuation(part, PREFIX) for part in parts], compared)
    assert (results[0].figures["kl"].value, results[0].figures["top1"].value, results[0].layers) == (0.0, 1.0, 6.0)
    for setting, result in zip(SETTINGS, results, strict=True):
        kl, nll, dense_nll, same, skipped = [], [], [], [], []
        for part in parts:
            forced = runtime.session_with(setting).score(part, PREFIX, keep_logits=True)
            p, q = (log_softmax(x)[PREFIX:-1] for x in (runtime.session("dense").logits(part), forced.logits))
            kl.append((np.exp(p) * (p - q)).sum(-1))
            nll.append(-q[np.arange(len(q)), part[PREFIX + 1 :]])
            dense_nll.append(-p[np.arange(len(p)), part[PREFIX + 1 :]])
            same.append(p.argmax(-1) == q.argmax(-1))
            skipped.append(forced.actions[PREFIX:-1].sum(1))
        figures = {name: own.value for name, own in result.figures.items()}
        assert figures["kl"] == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
        assert figures["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
        assert figures["perplexity_ratio"] == pytest.approx(np.exp(np.mean(nll) - np.mean(dense_nll)), rel=1e-4)
        assert figures["top1"] == np.mean(same)
        assert result.layers == pytest.approx(6 - np.mean(skipped))
        assert (result.items, result.tokens) == (2, 2 * (WINDOW - 1 - PREFIX))
        assert result.figures["kl"].low <= figures["kl"] <= result.figures["kl"].high
    assert results[1].time == pytest.approx(1 - sum(runtime.cost.cost))
    assert results[1].figures["kl"].value > 0
    assert (other.build, other.time) == ("other", 1.0)
    assert other.figures["kl"].value == pytest.approx(0, abs=1e-6)
    assert other.figures["perplexity_ratio"].value == pytest.approx(1, abs=1e-4)
