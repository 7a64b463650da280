"""What a Jetson says of itself: its release, its power mode, and whether its clocks stand still."""

from __future__ import annotations

import re
from typing import Any

from dash_export.commands import hardware
from dash_export.commands.hardware import LINE, ask, read

# Jetson Linux (L4T) release -> JetPack.
JETPACK = {
    "38.4.0": "7.1",
    "38.2.1": "7.0",
    "38.2.0": "7.0",
    "36.4.7": "6.2.1",
    "36.4.4": "6.2.1",
    "36.4.3": "6.2",
    "36.4.0": "6.1",
    "36.3.0": "6.0",
    "36.2.0": "6.0 DP",
    "35.6.1": "5.1.5",
    "35.6.0": "5.1.4",
    "35.5.0": "5.1.3",
    "35.4.1": "5.1.2",
    "35.3.1": "5.1.1",
    "35.2.1": "5.1",
    "35.1.0": "5.0.2",
}
FAMILIES = {"38": "7.x", "36": "6.x", "35": "5.x", "34": "5.x", "32": "4.x"}
_CLOCK = re.compile(
    r"^(cpu\d{1,3}|GPU|EMC)\b.{0,100}?MinFreq=(\d{1,12}) MaxFreq=(\d{1,12}) CurrentFreq=(\d{1,12})"
    r"(?: FreqOverride=(\d))?",
    re.MULTILINE,
)


def jetson() -> dict[str, Any] | None:
    """A Jetson's model, L4T release, JetPack, power mode and clocks (MHz), each None where it does not tell; None on
    any other machine.
    """
    release = read("etc/nv_tegra_release")
    if not release and "nvidia,tegra" not in read("proc/device-tree/compatible"):
        return None
    model = read("proc/device-tree/model").partition("\n")[0][:LINE]
    l4t = _l4t(release)
    clocks = _clocks()
    return {
        "model": model or "Jetson",
        "l4t": l4t,
        "jetpack": _jetpack(l4t),
        "power_mode": _power_mode(),
        "clocks": clocks,
        "clocks_fixed": all(clock["fixed"] for clock in clocks.values()) if clocks else None,
    }


def _l4t(release: str) -> str | None:
    """ "# R36 (release), REVISION: 4.3, GCID: ..." -> "36.4.3". Containers have no such file, but the package."""
    found = re.search(r"\bR(\d{2,3}) \(release\), REVISION: (\d{1,3}(?:\.\d{1,3}){0,2})", release)
    if found:
        return f"{found[1]}.{found[2]}"
    return _package("nvidia-l4t-core")


def _jetpack(l4t: str | None) -> str | None:
    """By the release; for one newer than this table what the package says, else the family."""
    if l4t is None:
        return None
    return JETPACK.get(l4t) or _package("nvidia-jetpack") or FAMILIES.get(l4t.partition(".")[0])


def _package(name: str) -> str | None:
    """The version of a Debian package without its build: "36.4.3-20250107174145" -> "36.4.3"."""
    answer = ask("dpkg-query", "-W", "-f", "${Version}", name)
    found = re.match(r"\d{1,3}(\.\d{1,3}){1,3}", answer.text)
    return found[0] if found and answer.code == 0 else None


def _power_mode() -> str | None:
    found = re.search(r"NV Power Mode: *(\S{1,40})", ask("nvpmodel", "-q").text)
    return found[1] if found else None


def _clocks() -> dict[str, dict[str, Any]]:
    """Lowest, highest and present MHz of CPU (cpu0), GPU and memory (EMC).

    `jetson_clocks --show` wants root; without it the kernel tells the CPU's and the GPU's.
    """
    clocks = {}
    for name, low, high, now, override in _CLOCK.findall(ask("jetson_clocks", "--show").text):
        if name in ("cpu0", "GPU", "EMC"):
            unit = 1000 if name == "cpu0" else 1_000_000
            # The memory's lowest clock stays where it is when it is fixed: an override is set.
            clocks["CPU" if name == "cpu0" else name] = _clock(low, high, now, unit, override == "1")
    if "GPU" in clocks:
        return clocks
    # 17000000.gpu and 17000000.ga10b on Orin, gpu-gpc-0 on Thor
    folder = hardware.ROOT / "sys/class/devfreq"
    gpus = sorted(path for pattern in ("*.gpu", "*.ga10b", "gpu-gpc-*") for path in folder.glob(pattern))
    places = [("CPU", hardware.ROOT / "sys/devices/system/cpu/cpu0/cpufreq", "scaling_{}_freq", 1000)]
    places += [("GPU", path, "{}_freq", 1_000_000) for path in gpus[:1]]
    for name, path, file, unit in places:
        low, high, now = (read(path / file.format(which)) for which in ("min", "max", "cur"))
        if all(re.fullmatch(r"[0-9]{1,12}", value) for value in (low, high, now)):
            clocks[name] = _clock(low, high, now, unit, False)
    return clocks


def _clock(low: str, high: str, now: str, unit: int, override: bool) -> dict[str, Any]:
    """`unit`: how many of the numbers given make one MHz."""
    lowest, highest, present = (round(int(value) / unit) for value in (low, high, now))
    return {"lowest": lowest, "highest": highest, "now": present, "fixed": override or low == high}
