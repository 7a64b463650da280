"""`export`: summaries, defaults, bad input, a full disk, Ctrl-C."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.commands.export import default_output
from dash_export.core.kinds import kinds_of
from dash_export.core.policy import default_units
from dash_export.core.units import Unit
from dash_export.models import open_checkpoint
from tests.commands.helpers import DISK_FULL, dash, done, environment, refused
from tests.forged import tree
from tests.tiny import save_model, tiny_policy

# An export that waits inside its second layer, so that it can be interrupted there.
SLOW_EXPORT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
from dash_export.graphs.portable import portable
original = portable.layer_graph
def slow(checkpoint, layer):
    if layer == 1:
        print("waiting", flush=True)
        time.sleep(30)
    return original(checkpoint, layer)
portable.layer_graph = slow
from dash_export.cli import cli
cli(["export", *sys.argv[1:]], prog_name="dash-export")
"""


def test_summary_and_default_output(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = done("export", model)
    assert "model.dash: 6 layers, 9 graphs" in result.stdout
    assert "Units: 2-3." in result.stdout
    assert "Next: dash-export build model.dash --target cpu" in result.stdout
    train = f"dash-export train {model} -o model.safetensors --skips --effort quick"
    assert result.stdout.endswith(f"for 2 % of perplexity on its own answers): {train}\n")
    assert "export: head" in result.stderr
    assert Bundle.open(tmp_path / "model.dash").manifest.policy.units == default_units(6) == (Unit(2, 3),)


def test_a_name_that_nobody_gave_does_not_cost_another_models_bundle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done("export", model)
    files = tree(tmp_path / "model.dash")
    save_model(tmp_path / "b" / "model", num_hidden_layers=7)
    assert "model.dash is a bundle of another model (llama, " in refused("export", "b/model")
    assert tree(tmp_path / "model.dash") == files
    done("export", "b/model", "-o", "model.dash")
    assert Bundle.open(tmp_path / "model.dash").manifest.model.num_layers == 7


def test_policy_options(model: Path, tmp_path: Path) -> None:
    done("export", model, "-o", tmp_path / "whole.dash", "--units", "none")
    assert kinds_of(Bundle.open(tmp_path / "whole.dash").manifest.policy) == ("dense",)
    chosen = ("--policy", "untrained", "--units", "1,3-4")
    done("export", model, "-o", tmp_path / "p.dash", *chosen)
    facts = Bundle.open(tmp_path / "p.dash").manifest.policy
    assert (facts.units, facts.origin, facts.has_network) == ((Unit(1, 1), Unit(3, 4)), "untrained (seed 0)", True)


def test_trained_policy(model: Path, trained: Path, tmp_path: Path) -> None:
    """The bundle is the one that a program with the policy in its hands would export."""
    result = done("export", model, "-o", tmp_path / "p.dash", "--policy", trained)
    assert "Token policy: untrained (seed 5)" in result.stdout
    bundle = Bundle.open(tmp_path / "p.dash")
    checkpoint = open_checkpoint(model)
    expected = export(checkpoint, tmp_path / "library.dash", tiny_policy(checkpoint, "linear", seed=5))
    assert bundle.manifest == expected.manifest
    facts = bundle.manifest.policy
    assert (facts.bypass, facts.static_order) == ("linear", (1, 0))


def test_a_policy_that_does_not_fit_writes_nothing(trained: Path, tmp_path: Path) -> None:
    deeper = tmp_path / "deeper"
    save_model(deeper, num_hidden_layers=7)
    before = sorted(tmp_path.rglob("*"))
    message = refused("export", deeper, "-o", tmp_path / "p.dash", "--policy", trained)
    assert "this model is a llama of 7 layers" in message
    assert "of 6 layers" in message
    trained.write_bytes(trained.read_bytes()[:-100])
    assert "truncated" in refused("export", deeper, "-o", tmp_path / "p.dash", "--policy", trained)
    assert "truncated" in refused("build", deeper, "-o", tmp_path / "p.dash", "--policy", trained)
    assert "There is no policy file nothing" in refused("export", deeper, "-o", tmp_path / "p.dash", "--policy=nothing")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_output_is_told_before_the_model_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Mock(side_effect=AssertionError("read"))
    monkeypatch.setattr("dash_export.models.open_checkpoint", read)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "link").symlink_to("nowhere")
    for output, said in (
        ("photos", "is not a bundle: it will not be overwritten"),
        ("photos/cat.jpg", "is not a bundle: it will not be overwritten"),
        ("photos/cat.jpg/x.dash", "cat.jpg may not be written in"),
        ("link", "is a link that points nowhere"),
    ):
        assert said in refused("export", model, "-o", tmp_path / output)
    assert not read.called


def test_a_refused_policy_leaves_the_bundle(model: Path, own_bundle: Path, trained: Path) -> None:
    """One that lies in what is replaced, and a damaged one."""
    inside = Path(shutil.copy(trained, own_bundle / "onnx" / "mine.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in own_bundle.rglob("*")}
    assert "lies in what is replaced" in refused("export", model, "-o", own_bundle, "--policy", inside)
    trained.write_bytes(b"")
    refused("export", model, "-o", own_bundle, "--policy", trained)
    assert {path: path.stat().st_mtime_ns for path in own_bundle.rglob("*")} == before


def test_fewer_units_than_a_trained_policy_has(model: Path, trained: Path, tmp_path: Path) -> None:
    """What is left of it says what it did: tests/bundle/test_policy_file.py."""
    narrow = tmp_path / "narrow.dash"
    assert dash("export", model, "-o", narrow, "--policy", trained, "--units", "4").exit_code == 0
    facts = Bundle.open(narrow).manifest.policy
    assert (facts.units, facts.static_order, facts.has_network) == ((Unit(4, 4),), (0,), True)
    said = refused("export", model, "-o", tmp_path / "x.dash", "--policy", trained, "--units", "2,4")
    assert "Layers 2,4 are not whole units. Units of this policy: 2-3,4." in said


def test_pruned(model: Path, trained: Path, tmp_path: Path) -> None:
    """What the option makes; that it is right: tests/models/test_bypasses.py."""
    output, other = tmp_path / "a.dash", tmp_path / "b.dash"
    done("export", model, "-o", output, "--policy", trained, "--prune", "2-3")
    manifest = Bundle.open(output).manifest
    assert (manifest.model.name, manifest.model.num_layers) == ("model-without-2-3", 4)
    assert (manifest.policy.units, manifest.policy.has_network) == ((), False)
    for given in ((), ("--policy", trained, "--units", "4")):
        assert "by a trained --policy" in refused("export", model, "-o", other, *given, "--prune", "2-3", code=2)
    assert "not whole units" in refused("export", model, "-o", other, "--policy", trained, "--prune", "2")
    assert "--prune belongs to a MODEL" in refused("build", output, "--target", "cpu", "--prune", "2-3", code=2)
    assert default_output("org/m", [Unit(2, 3)]) == Path("m-without-2-3.dash")


@pytest.mark.parametrize(
    ("units", "code"),
    [("", 2), ("a", 2), ("1,,2", 2), ("-1", 2), ("1-99999999", 2), ("3-2", 2), ("0-3", 1), ("2,77", 1), ("2-4,3", 1)],
)
def test_what_are_no_units(units: str, code: int, model: Path, tmp_path: Path) -> None:
    said = refused("export", model, "-o", tmp_path / "x.dash", f"--units={units}", code=code)
    assert ("Units are written like" in said) is (code == 2)
    assert not list(tmp_path.iterdir())


def test_no_such_model(tmp_path: Path) -> None:
    assert "no such model" in refused("export", tmp_path / "nothing", "-o", tmp_path / "x.dash")
    assert "no such model" in refused("export", "", "-o", tmp_path / "x.dash"), "not the current folder"
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("export", tmp_path / "empty", "-o", tmp_path / "x.dash")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_disk_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_export.graphs.portable.portable.layer_graph", Mock(side_effect=DISK_FULL))
    message = refused("export", model, "-o", tmp_path / "x.dash")
    assert "The disk is full" in message
    assert str(tmp_path / "x.dash") in message
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_EXPORT, str(model), "-o", str(tmp_path / "x.dash")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "waiting\n"
        assert (tmp_path / "x.dash.unfinished").is_dir()
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=20)
    assert run.returncode == 130
    assert errors.rstrip().endswith("Interrupted")
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())
