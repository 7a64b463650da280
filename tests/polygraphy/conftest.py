"""One thread pool for runners in the tests' own process."""

from typing import Any

import pytest


@pytest.fixture
def shared_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process cannot have both kinds, and other tests have the runtime's."""
    from dash_export.backends.base import reference_engine
    from dash_export.building import graph_runs
    from dash_export.polygraphy import runners

    def run(path: Any, own_threads: bool) -> Any:
        assert own_threads
        return graph_runs.graph_run(path)

    monkeypatch.setattr(runners, "reference_engine", lambda path, own_threads: reference_engine(path, not own_threads))
    monkeypatch.setattr(runners, "graph_run", run)
