"""`doctor --card` on the stand-in: every step in every GPU recipe that it can build; what is wrong is found and named."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from dash_export.backends.cuda import kernels, launch_costs
from dash_export.backends.cuda.cuda_graph import CudaGraph
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.tensorrt.trt_maker import RtxBackend
from dash_export.building import build, card_check, pipeline
from dash_export.building.cost_table import uniform_cost
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import recipe_names
from dash_export.bundle.records import Verification
from dash_export.files.resources import resource_folder
from tests.building.test_references import BREAKS
from tests.commands.helpers import dash, done, refused
from tests.standin import installed
from tests.standin.cuda import Card

STEPS = [step.name for step in card_check.STEPS]
RECIPES = ["a100", "h100", "jetson-agx-orin", "jetson-orin-nano", "jetson-thor", "l4", "rtx"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of its own; nothing that takes long is timed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_costs, "REPEATS", 3)
    monkeypatch.setattr(launch_costs, "_COPIED", 1 << 10)
    monkeypatch.setattr(card_check, "ROUNDS", 2)
    monkeypatch.setattr(card_check, "TOKENS", 6)
    monkeypatch.setattr(pipeline, "calibrate_dial", lambda *_: ())
    monkeypatch.setattr(pipeline, "measure_cost", measured)


def measured(bundle: Bundle, *_: Any) -> Any:
    from dataclasses import replace

    return replace(uniform_cost(bundle.manifest), device="a card", context=20)


@pytest.fixture
def card() -> Iterator[Card]:
    card = Card()
    with installed(card):
        yield card


def report(folder: Path, target: str) -> dict[str, Any]:
    return json.loads((folder / f"own-{target}-card.json").read_text())  # type: ignore[no-any-return]


def test_a_sound_card(own: Path, card: Card, tmp_path: Path) -> None:
    """From the copied bundle to a verdict; and again, with the build that is there."""
    told = done("doctor", "--card", own).stdout
    assert [each[1] for each in re.finditer(r"^\d/8 (.*)$", told, re.M)] == STEPS
    assert "WRONG" not in told
    print(told)
    print(json.dumps(report(tmp_path, "mine"), indent=1)[:6000])
