"""`build`: from a bundle, from a model, targets listed, errors before work."""

import re
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import EXPORT
from dash_export.bundle.policy_file import save_policy
from dash_export.bundle.records import DRAFTER
from dash_export.files.outputs import MARK, REPLACED, work_of
from dash_export.models import open_checkpoint
from tests.commands.helpers import DISK_FULL, dash, done, refused
from tests.tiny import TINY_UNITS, drafter_only

NEAREST = ("--rounding", "nearest")
"""Without a calibration, which takes seconds."""


def test_bundle(own_bundle: Path) -> None:
    result = done("build", own_bundle, "--weights", "int8", "--head", "fp32")
    assert "own.dash/engines/cpu-int8-head-fp32:" in result.stdout
    assert "ms/token at 256 cached tokens" in result.stdout
    assert "Units: skipping one saves so much of a token" in result.stdout
    assert re.search(r"2-3 +2 +\d+ +\d+ +\d+% +\d+\.\d\d %", result.stdout)
    assert f"Next: dash-export run {own_bundle} --target cpu-int8-head-fp32" in result.stdout
    assert Bundle.open(own_bundle).load_build("cpu-int8-head-fp32").recipe.weights.layers == "int8"


def test_a_bundle_without_graphs_and_builds_is_no_model(own_bundle: Path, tmp_path: Path) -> None:
    for folder in ("onnx", "engines"):
        shutil.rmtree(own_bundle / folder)
    assert "without portable graphs" in refused("build", own_bundle.rename(tmp_path / "plain"), "--target", "portable")


def test_a_bundle_whose_replacement_was_killed(own_bundle: Path, tmp_path: Path) -> None:
    """Nothing has its name until the next command finishes the replacement, whatever the name ends in."""
    work = own_bundle.rename(work_of(tmp_path / "plain"))
    (work / REPLACED).mkdir()
    (work / MARK).write_text(EXPORT)
    assert "portable graphs, used as they are" in done("build", tmp_path / "plain", "--target", "portable").stdout
    assert not work.exists()


def test_model(model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model, tmp_path / "model"))
    (model / "manifest.json").write_text('{"name": "of another program"}')
    result = done("build", model, "--target", "portable", "-o", tmp_path / "m.dash", "--units", "2-3,4")
    assert "portable graphs, used as they are" in result.stdout
    assert Bundle.open(tmp_path / "m.dash").manifest.policy.units == TINY_UNITS
    train = "dash-export train {} -o {}.safetensors --skips --effort quick\n"
    assert result.stdout.endswith(train.format(model, "model"))
    again = done("build", tmp_path / "m.dash", "--target", "portable").stdout
    assert again.endswith(train.format("MODEL", "NAME")), "a bundle does not know what it was made of"


def test_model_with_a_trained_policy(model: Path, trained: Path, tmp_path: Path) -> None:
    result = done("build", model, "--target", "portable", "-o", tmp_path / "m.dash", "--policy", trained)
    assert "Dial of the token policy: budget 1.0 (dense) down to" in result.stdout
    assert "calibrating the dial" in result.stderr
    assert "dash-export train" not in result.stdout
    assert Bundle.open(tmp_path / "m.dash").manifest.policy.bypass == "linear"


def test_model_with_a_drafter_alone(model: Path, tmp_path: Path) -> None:
    """No unit is in its policy. `inspect` shows who made it, and what a draft and rows of a pass take."""
    checkpoint, path = open_checkpoint(model), tmp_path / "p.safetensors"
    save_policy(path, drafter_only(checkpoint), checkpoint.spec, {})
    given = ("build", model, "--weights", "fp32", "-o", tmp_path / "m.dash", "--policy", path, "--verify")
    assert "Verified: 3 engines" in done(*given).stdout
    bundle = Bundle.open(tmp_path / "m.dash")
    assert bundle.manifest.policy.units == ()
    made = bundle.load_build("cpu-fp32")
    assert [segment.name for segment in made.segments] == ["embed", "layers_00-05"]
    assert made.engines.keys() == {"embed", "layers_00-05", DRAFTER}
    shown = done("inspect", bundle.root).stdout
    assert "random (seed 0)" in shown
    assert "Passes of several rows: time over that of one decoded token" in shown
    assert "of a decoded token." in shown
    assert "16 rows" in shown


@pytest.mark.parametrize("option", [("-o", "x.dash"), ("--units", "2"), ("--policy", "untrained")])
def test_export_options_are_for_models(option: tuple[str, str], tiny_root: Path) -> None:
    assert "is a bundle" in refused("build", tiny_root, *option, code=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "tpu"), "cpu"),
        (("--weights", "fp16"), "on a CPU"),
        (("--weights", "fp8"), "on a CPU"),
        (("--target", "portable", "--head", "int8"), "fp32"),
    ],
)
def test_what_cannot_be_built_is_told_before_the_export(
    options: tuple[str, ...], said: str, model: Path, tmp_path: Path
) -> None:
    assert said in refused("build", model, *options, "-o", tmp_path / "x.dash")
    assert not list(tmp_path.iterdir())


def test_refused(own_bundle: Path, tmp_path: Path) -> None:
    assert "Nothing can be measured here: it needs a device" in refused(
        "build", own_bundle, "--target", "h100", "--measure"
    )
    (tmp_path / "odd.toml").write_text("[weights]\nlayer = 'int4'\n")
    assert "'layer'" in refused("build", own_bundle, "--target", tmp_path / "odd.toml")
    assert not (own_bundle / "engines" / "odd").exists()
    assert "There is no bundle" in refused("build", tmp_path / "none.dash")


def test_disk_full(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_export.graphs.lower.surgery.save_graph", Mock(side_effect=DISK_FULL))
    message = refused("build", own_bundle, *NEAREST)
    assert "The disk is full" in message
    assert str(own_bundle) in message
    shutil.rmtree(own_bundle / "engines" / "cpu-fp32")
    assert "is unfinished" in refused("inspect", own_bundle, "--target", "cpu-nearest")


def test_an_error_does_not_wait_for_the_rest(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = []

    def slow(*_args: object) -> None:
        began.append(time.perf_counter())
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr("dash_export.graphs.lower.surgery.save_graph", slow)
    assert dash("build", own_bundle, *NEAREST).exit_code == 130
    assert len(began) <= 4
