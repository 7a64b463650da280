"""`inspect`: tables and JSON, without onnx."""

import json
from pathlib import Path

from tests import forged
from tests.commands.helpers import dash, done, python, refused

WITHOUT_ONNX = """
import sys
sys.modules["onnx"] = sys.modules["onnx_ir"] = sys.modules["onnxruntime"] = None
from dash_export.cli import cli
cli(["inspect", sys.argv[1]], prog_name="dash-export")
"""


def test_tables(tiny_root: Path) -> None:
    result = done("inspect", tiny_root, "--verify")
    for expected in (
        "model (llama)", "2-3,4 (3 layers)", "by what enters layer 1", "untrained (seed 0)", "linear",
        "Target cpu-fp32", "Target portable", "layers_00-01", "Dial of the token policy", "Units: skipping one saves",
        "bypass µs", "dense, static, token", "4, 2-3", "is what was written", "fp32; head fp32",
    ):  # fmt: skip
        assert expected in result.stdout, expected


def test_json(tiny_root: Path) -> None:
    """The records themselves, as they lie on disk."""
    facts = json.loads(dash("inspect", tiny_root, "--json").stdout)
    assert facts["manifest"]["model"]["num_layers"] == 6
    assert facts["manifest"]["policy"]["units"] == [{"first": 2, "last": 3}, {"first": 4, "last": 4}]
    build = facts["builds"]["cpu-fp32"]
    assert [segment["gated"] for segment in build["segments"]] == [False, False, True, True, False]
    assert build == json.loads((tiny_root / "engines" / "cpu-fp32" / "build.json").read_text())
    assert all(build["cost"]["segment_us"].values())


def test_one_target(tiny_root: Path) -> None:
    assert "Target portable" not in dash("inspect", tiny_root, "--target", "cpu-fp32").stdout
    for target in ("cpu", ""):
        assert "does not exist" in refused("inspect", tiny_root, "--target", target)


def test_builds_of_an_earlier_export(own_bundle: Path) -> None:
    """They are named, and the rest is shown."""
    forged.edit(own_bundle / "manifest.json", lambda data: data.update(key="0" * 32))
    shown = done("inspect", own_bundle)
    assert "engines for 'cpu-fp32' were built from an earlier export" in shown.stdout
    assert "--target cpu-fp32" in shown.stdout
    assert "earlier export" in refused("inspect", own_bundle, "--target", "cpu-fp32")


def test_costs_of_a_busy_machine_say_so(own_bundle: Path) -> None:
    """Nor does a unit that takes no time stop it."""
    record = own_bundle / "engines" / "cpu-fp32" / "build.json"
    forged.edit(record, lambda data: data["cost"].update(others=0.9, stolen=0.0))
    forged.edit(record, lambda data: data["cost"]["segment_us"].update({"layers_02-03": 0.0}))
    assert "while 0.9 processors worked for others" in dash("inspect", own_bundle, "--target", "cpu-fp32").stdout
    forged.edit(record, lambda data: data["cost"].update(others=0.1))
    assert "worked for others" not in dash("inspect", own_bundle, "--target", "cpu-fp32").stdout


def test_json_commands_no_terminal(own_bundle: Path) -> None:
    """Facts of a backend are a stranger's words: control characters stay escaped."""
    forged.edit(own_bundle / "engines" / "cpu-fp32" / "build.json", lambda data: data["details"].update(x="\x9b31m"))
    shown = dash("inspect", own_bundle, "--json").stdout
    assert shown.isascii()
    assert json.loads(shown)["builds"]["cpu-fp32"]["details"]["x"] == "\x9b31m"


def test_needs_no_onnx(tiny_root: Path) -> None:
    ran = python(WITHOUT_ONNX, tiny_root)
    assert ran.returncode == 0, ran.stderr
    assert "Portable graphs" in ran.stdout


def test_changed_files(own_bundle: Path) -> None:
    """Names are not markup."""
    forged.replace_text(own_bundle / "manifest.json", '"name": "model"', '"name": "[/red]model[bold]"')
    assert "[/red]model[bold]" in dash("inspect", own_bundle).stdout
    forged.replace_text(own_bundle / "config.json", "llama", "LLAMA")
    assert "hash mismatch" in refused("inspect", own_bundle, "--verify")
    forged.replace_text(own_bundle / "engines/cpu-fp32/build.json", '"layers": "fp32"', '"layer": "fp32"')
    assert "unknown 'layer'" in refused("inspect", own_bundle)
