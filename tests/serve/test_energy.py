import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dash_export.serve import energy


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the kernel's, and no card."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "HWMON", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


def test_processors(machine: Path) -> None:
    write(machine / "intel-rapl:0", name="package-0", energy_uj="2500000")
    write(machine / "intel-rapl:0:0", name="core", energy_uj="1000000")  # a part of the package
    write(machine / "intel-rapl:1", name="package-1")  # which this user may not read
    assert list(energy.energy()) == [("package-0", 2.5)]
    assert list(energy.power()) == []


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts millijoules. A card without a counter, or no driver, gives nothing."""

    class NVMLError(Exception):
        pass

    def consumed(card: str) -> int:
        if card == "old":
            raise NVMLError
        return 1500

    cards = ["new", "old"]
    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=cards.__getitem__, nvmlDeviceGetTotalEnergyConsumption=consumed,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert list(energy.energy()) == [("gpu-0", 1.5)]
    monkeypatch.setattr(library, "nvmlInit", lambda: consumed("old"))
    assert list(energy.energy()) == []


def test_the_real_library_says_no_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml")
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert list(energy.energy()) == []
    else:
        assert all(joules >= 0 for _, joules in energy.energy())


def test_sensors_of_a_jetson(machine: Path) -> None:
    rails = {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1500"}
    rails |= {"in2_label": "VDD_CPU_GPU_CV", "in2_input": "5000"}  # its current cannot be read
    write(machine / "hwmon3", name="ina3221", **rails)
    write(machine / "hwmon4", name="another", in1_label="x", in1_input="1", curr1_input="1")
    assert list(energy.power()) == [("VDD_IN", 7.5)]
