"""Energy and power as the machine's own counters and sensors measure them; nothing where there are none, or where this
user may not read them.
"""

from collections.abc import Iterator
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
HWMON = Path("/sys/class/hwmon")


def energy() -> Iterator[tuple[str, float]]:
    """Yield (zone, joules so far): of processors (Linux powercap), and of NVIDIA cards since their driver was loaded
    (NVML, from Volta on).
    """
    for folder in sorted(POWERCAP.glob("intel-rapl:[0-9]")):  # not their parts, and AMD's too
        try:
            yield (folder / "name").read_text().strip(), int((folder / "energy_uj").read_text()) / 1e6
        except (OSError, ValueError):
            continue
    try:
        import pynvml  # here: the package `nvidia-ml-py` is only wanted beside a card
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            yield f"gpu-{index}", pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3
    except pynvml.NVMLError:  # no driver, or a card without a counter
        return


def power() -> Iterator[tuple[str, float]]:
    """Yield (rail, watts now) of a Jetson's INA3221 sensors, which have no counter of energy. One rail is the whole
    board's (VDD_IN), others are parts of it.
    """
    for label in sorted(HWMON.glob("*/in[123]_label")):
        folder, channel = label.parent, label.name[2]
        try:
            if (folder / "name").read_text().strip() == "ina3221":
                volts, amperes = (int((folder / f"{kind}{channel}_input").read_text()) / 1e3 for kind in ("in", "curr"))
                yield label.read_text().strip(), volts * amperes
        except (OSError, ValueError):
            continue
