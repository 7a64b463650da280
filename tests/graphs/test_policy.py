"""A policy's damage where its numbers are extreme."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.exporting import export
from tests.tiny import random_ids, tiny_checkpoint, tiny_policy


def test_a_huge_score_does_not_overflow(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    policy = tiny_policy(checkpoint)
    assert policy.network is not None
    policy = replace(policy, network=policy.network | {"bias": np.full(2, 1e5, np.float32)})
    path = export(checkpoint, tmp_path / "tiny.dash", policy).root
    build(path, "cpu", weights="fp32")
    runtime = DashRuntime.load(path, "cpu-fp32")
    made = runtime.generate(random_ids(4), 3, policy="token", trade_off=1.0)
    assert not made.actions.any()
    np.testing.assert_allclose(runtime.session().score(random_ids(4)).damage, 1e5, rtol=1e-3)
