"""`profile` of an image encoder: whose time is whose."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dash_export import DashRuntime
from dash_export.backends.host.encoder_pass import EncoderEngines
from dash_export.measure.image_profile import image_profile
from tests.commands.helpers import done, refused
from tests.tiny_encoder import encoder_bundle

SLOW = 0.02


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_bundle(tmp_path_factory.mktemp("profiled"))


def test_a_slow_part_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's engine and the exit of another one take longer: for a picture, and for each of eight an eighth."""
    runtime, sound = DashRuntime.load(root), EncoderEngines._bound
    engines: Any = runtime.encoder().engines
    by_name = {item.segment.name: item for item in engines.segments}
    slow = [by_name["layer_01"].run[0][1], by_name["layers_03-04"].bypass]

    def bound(own: EncoderEngines, engine: Any, *given: Any) -> Any:
        launch, outputs = sound(own, engine, *given)
        return (lambda: (time.sleep(SLOW), launch())) if engine in slow else launch, outputs

    monkeypatch.setattr(EncoderEngines, "_bound", bound)
    found = image_profile(runtime, 3)
    for size, batch in zip((1, 8), found["batches"], strict=True):
        assert batch["size"] == size
        rows = {row["name"]: row for row in batch["segments"]}
        assert set(rows) == {*by_name, "policy"}
        assert {name for name, row in rows.items() if row["exit"]} == {"layer_01", "layer_02", "layers_03-04"}
        least = 1e6 * SLOW / size
        assert rows["layer_01"]["run"]["p50"] > least > rows["layer_01"]["exit"]["p50"]
        assert rows["layers_03-04"]["exit"]["p50"] > least > rows["layers_03-04"]["run"]["p50"]
        assert rows["layer_02"]["run"]["p50"] < least
        assert batch["picture_ms"]["p50"] > least / 1e3
        assert rows["policy"]["run"]["count"] == 3
        assert 0.5 < batch["together"] < 2


def test_the_command(root: Path, tmp_path: Path) -> None:
    given = ("profile", root, "--kinds", "dense", "--repeats", 2)
    shown = done(*given).stdout
    for expected in ("1 at a time: milliseconds a picture", "8 at a time", "layers_03-04", "policy", "exit p50"):
        assert expected in shown
    report = json.loads(done(*given, "--json").stdout)
    assert (report["rounds"], len(report["batches"])) == (2, 2)
    for option in ("--html", "--trace"):
        assert f"{option} is of a causal LM" in refused(*given, option, tmp_path / "x")
    assert "--layers is of a causal LM" in refused(*given, "--layers")
    assert not list(tmp_path.iterdir())
