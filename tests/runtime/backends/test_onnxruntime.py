"""ONNX Runtime on a CPU: how its sessions are made."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.runtime.backends import onnxruntime as backend
from tests.tiny import random_ids


@pytest.mark.parametrize("given", [None, "0"])
def test_loading_leaves_the_environment_as_it_is(
    given: str | None, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(backend._NO_FLASH, raising=False)
    if given is not None:
        monkeypatch.setenv(backend._NO_FLASH, given)
    DashRuntime.load(tiny_root, "cpu-fp32")
    assert os.environ.get(backend._NO_FLASH) == given


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("0", "0")])
def test_whole_scores_are_asked_for(given: str | None, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_WHOLE_SCORES", True)
    monkeypatch.delenv(backend._NO_FLASH, raising=False)
    if given is not None:
        monkeypatch.setenv(backend._NO_FLASH, given)
    with backend._whole_scores():
        assert os.environ[backend._NO_FLASH] == seen


@pytest.mark.parametrize("tokens", [1, 40])
def test_whole_scores_and_tiles_agree(tokens: int, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for whole in (True, False):
        monkeypatch.setattr(backend, "_WHOLE_SCORES", whole)
        session = DashRuntime.load(tiny_root, "cpu-fp32").session()
        session.prefill(random_ids(30, seed=1))
        results.append(session.prefill(random_ids(tokens, seed=2)))
    np.testing.assert_allclose(*results, atol=2e-5)
