"""What a build really makes."""

import pytest

from dash_export.artifacts import ArtifactStore


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The artifacts that were really made, by name."""
    names: list[str] = []
    sound = ArtifactStore.make

    def make(store: ArtifactStore, name: str, key: str, *given: object) -> object:
        names.append(name)
        return sound(store, name, key, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ArtifactStore, "make", make)
    return names
