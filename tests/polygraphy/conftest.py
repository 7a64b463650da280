"""One thread pool for runners in the tests' own process."""

from typing import Any

import pytest


@pytest.fixture
def shared_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process cannot have both kinds, and other tests have the runtime's."""
    from dash_export.backends.onnxruntime import ort_engine
    from dash_export.building import graph_runs
    from dash_export.polygraphy import runners

    def run(path: Any, own_threads: bool) -> Any:
        assert own_threads
        return graph_runs.graph_run(path)

    sound = ort_engine.OrtEngine
    monkeypatch.setattr(ort_engine, "OrtEngine", lambda path, _: sound(path, ort_engine.session_options()))
    monkeypatch.setattr(runners, "graph_run", run)
