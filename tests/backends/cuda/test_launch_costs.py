"""What `doctor --probe` finds of a card."""

import json
import re
from pathlib import Path

import cuda.bindings.runtime as rt
import pytest

from dash_export.backends.cuda import kernels, launch_costs
from dash_export.backends.cuda.cuda import BESIDE, Cuda
from tests.commands.helpers import dash, refused
from tests.standin.cuda import Card


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_costs, "REPEATS", 3)
    monkeypatch.setattr(launch_costs, "_COPIED", 1 << 10)


def test_everything_is_tried(card: Card) -> None:
    found = json.loads(dash("doctor", "--probe", "--json").stdout)["probe"]
    assert list(found["token_us"]) == ["overlapped", "dense", "device", "device, all skipped"]
    assert "wrong" not in found
    assert min(found["launch_us"], found["wait_us"], found["bytes_per_second"], *found["token_us"].values()) > 0
    assert len(card.recorded) == 5, "two pieces, and three whole tokens"
    assert "dispatch '" in dash("doctor", "--probe").stdout


def test_the_host_waits_for_the_policy_of_an_overlapped_token(card: Card) -> None:
    card.devices.append(Cuda())
    launch_costs.probe(card.devices[0])
    decided = [call for call in card.log if call[2] == "decided"]
    assert decided == [(BESIDE, "record", "decided"), ("host", "wait", "decided")] * launch_costs.REPEATS


def test_a_card_without_decisions(card: Card) -> None:
    card.version = 13_000
    card.failing["cudaGraphAddNode"] = rt.cudaError_t.cudaErrorNotSupported
    found = json.loads(dash("doctor", "--probe", "--json").stdout)["probe"]
    assert "adding a branch" in found["not_recorded"]["device"]
    assert found["dispatch"] == "overlapped"
    assert "adding a branch" in " ".join(dash("doctor", "--probe").stdout.split())


def test_a_card_that_decides_wrongly(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.ptx"
    wrong.write_text(re.sub(r"setp\.(lt|leu|geu|gt)\.f64", "setp.eq.f64", kernels.PTX.read_text()))
    monkeypatch.setattr(kernels, "PTX", wrong)
    result = dash("doctor", "--probe")
    assert result.exit_code == 1
    assert "device, all skipped: decided [False" in " ".join(result.stdout.split())
    assert card.recorded


def test_without_a_card() -> None:
    assert "no device" in refused("doctor", "--probe") or "NVIDIA driver" in refused("doctor", "--probe")
