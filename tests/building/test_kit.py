"""The build kit: what a machine without the target's GPU writes, and what its script does on the other one."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from dash_export.building.kit import write_kit
from dash_export.bundle.bundle import Bundle
from dash_export.errors import BackendError, BundleError, OutputError
from dash_export.files import replacing
from dash_export.files.resources import resource_folder
from tests.commands.helpers import DISK_FULL, dash, environment, refused


@pytest.fixture(scope="module")
def kit(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    return write_kit(Bundle.open(tiny_root), "h100", {}, "no GPU here", folder)


@pytest.fixture
def own(kit: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(kit, tmp_path / "own"))


def run(kit: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(kit / "build.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(PYTHONPATH=""), check=False
    )


def test_no_gpu_writes_a_kit_and_says_why(own_bundle: Path) -> None:
    result = dash("build", own_bundle, "--target", "h100")
    assert result.exit_code == 0
    assert "Engines for h100 cannot be compiled on this machine" in result.stderr
    folder = own_bundle.with_name("own-h100-kit")
    assert f"python3 {folder.name}/build.py" in result.stdout
    assert (folder / "own.dash" / "manifest.json").is_file()
    assert not (folder / "own.dash" / "engines").exists()
    assert not (own_bundle / "engines" / "h100").exists()


def test_the_kit_verifies_itself(kit: Path) -> None:
    done = run(kit, "--check")
    assert done.returncode == 0, done.stderr
    assert "files are whole. Target: h100." in done.stdout
    record = json.loads((kit / "kit.json").read_text())
    names = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert names == {item["name"] for item in record["files"]} | {"kit.json", "tiny.dash/manifest.json"}
    assert record["verification"]["engines"]["layers_02-03"]["hidden_out"] < 1e-3


@pytest.mark.parametrize("name", ["tiny.dash/onnx/layer_03.data", "lib/dash_export/cli.py", "build.py"])
def test_a_damaged_kit_is_refused(name: str, own: Path) -> None:
    (own / name).write_bytes((own / name).read_bytes() + b"\n#")
    done = run(own, "--check")
    assert done.returncode == 1
    assert f"the first: {name}. Copy the kit again." in done.stderr


@pytest.mark.parametrize("content", ["", "[]", '{"files": [{}]}', '{"files": []}'])
def test_a_damaged_record(content: str, own: Path) -> None:
    (own / "kit.json").write_text(content or (own / "kit.json").read_text().replace('"build"', '"train"'))
    done = run(own)
    assert done.returncode == 1
    assert "Copy the kit again" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_runs_the_build_and_reports(tiny_root: Path, tmp_path: Path) -> None:
    """A kit for a target that this machine can build after all: its own package, its own bundle, a report."""
    kit = write_kit(Bundle.open(tiny_root), "cuda", {}, "as a test", tmp_path / "kit")
    done = run(kit)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((kit / "report.json").read_text())
    assert report["done"]
    assert report["build"]["target"] == "cuda"
    assert {"layers_02-03", "bypass_02-03", "policy"} <= set(report["build"]["engines"])
    assert report["machine"]["system"]["python"]
    Bundle.open(kit / "tiny.dash").load_build("cuda")


def test_a_build_that_fails_is_reported(own: Path) -> None:
    done = run(own)
    assert done.returncode == 1
    report = json.loads((own / "report.json").read_text())
    assert not report["done"]
    assert "cannot be compiled on this machine" in report["log"]
    assert not list(own.glob("*kit*/")), "a kit in the kit"


def test_missing_packages_are_named(own: Path) -> None:
    text = (own / "requirements.txt").read_text() + "no-such-package>=1\njinja2>=99.1\n"
    (own / "requirements.txt").write_text(text)
    record = json.loads((own / "kit.json").read_text())
    record["files"] = [item for item in record["files"] if item["name"] != "requirements.txt"]
    del record["sha256"]
    record["sha256"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    (own / "kit.json").write_text(json.dumps(record))
    done = run(own)
    assert done.returncode == 1
    assert "Missing: no-such-package>=1, jinja2>=99.1. Run in " in done.stderr
    assert ".venv/bin/python -m pip install -r requirements.txt && .venv/bin/python build.py" in done.stderr


def test_own_recipe_and_precision_travel(tiny_root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    text = (Path(__file__).parents[2] / "engines" / "l4.toml").read_text()
    recipe.write_text(text.replace('"8.9"', '"9.9"'))
    (tmp_path / "kit").mkdir()  # an empty folder is filled
    kit = write_kit(Bundle.open(tiny_root), str(recipe), {"weights": "int8"}, "", tmp_path / "kit")
    record = json.loads((kit / "kit.json").read_text())
    assert record["command"] == ["build", "./tiny.dash", "--target", "recipes/mine.toml", "--weights", "int8"]
    assert record["target"] == "mine-int8"
    assert (kit / "recipes" / "mine.toml").is_file()


def test_a_kit_is_not_made_of_what_it_replaces(kit: Path, own: Path) -> None:
    """A kill in the midst of that would leave no bundle to begin again with."""
    (own / "recipes").mkdir()
    recipe = shutil.copy(Path(__file__).parents[2] / "engines" / "l4.toml", own / "recipes")
    before = sorted(own.rglob("*"))
    for bundle, target in ((own / "tiny.dash", "h100"), (kit / "tiny.dash", str(recipe))):
        with pytest.raises(OutputError, match="is read, and lies in what is replaced"):
            write_kit(Bundle.open(bundle), target, {}, "", own)
    assert sorted(own.rglob("*")) == before


def test_a_kit_left_half_replaced(own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill another target's kit, whose plan differs, can be made there; and what somebody put in stays."""
    kit = write_kit(Bundle.open(own_bundle), "h100", {}, "", tmp_path / "kit")
    (kit / own_bundle.name / "engines/h100").mkdir(parents=True)
    (kit / own_bundle.name / "engines/h100/mine").write_text("mine")
    finish = replacing._finish
    monkeypatch.setattr(replacing, "_finish", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_kit(Bundle.open(own_bundle), "l4", {}, "", kit)
    monkeypatch.setattr(replacing, "_finish", finish)
    assert not kit.exists()
    write_kit(Bundle.open(own_bundle), "h100", {}, "", kit)
    assert (kit / own_bundle.name / "engines/h100/mine").read_text() == "mine"
    Bundle.open(kit / own_bundle.name).verify(Bundle.open(own_bundle).manifest.files)


@pytest.mark.parametrize("name", ["lib", "kit.json"])
def test_a_bundle_called_as_a_part_of_the_kit(name: str, own_bundle: Path, tmp_path: Path) -> None:
    bundle = own_bundle.rename(tmp_path / name)
    with pytest.raises(BackendError, match="rename the bundle"):
        write_kit(Bundle.open(bundle), "h100", {}, "", tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_something_else_is_not_overwritten(own_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    for _ in range(2):  # the second time with a file that something else calls so too
        with pytest.raises(BundleError, match="is not a build kit"):
            write_kit(Bundle.open(own_bundle), "h100", {}, "", tmp_path / "precious")
        (tmp_path / "precious" / "kit.json").write_text("{}")
    with pytest.raises(OutputError, match="would lie inside the bundle"):
        write_kit(Bundle.open(own_bundle), "h100", {}, "", own_bundle / "onnx" / "kit")
    message = refused("build", own_bundle, "--target", "h100", "--kit", tmp_path / "precious")
    assert "is not a build kit" in message


def test_what_somebody_put_into_a_kit_stays(own_bundle: Path, tmp_path: Path) -> None:
    kit = write_kit(Bundle.open(own_bundle), "h100", {}, "", tmp_path / "kit")
    (kit / "recipes" / "h100").mkdir(parents=True)
    for name in ("recipes/h100/notes.txt", "lib/notes.txt", "mine"):
        (kit / name).write_text("mine")
    write_kit(Bundle.open(own_bundle), "h100", {}, "", kit)
    assert (kit / "lib" / "notes.txt").read_text() == "mine"
    assert (kit / "recipes" / "h100" / "notes.txt").read_text() == "mine"
    other = own_bundle.rename(own_bundle.with_name("mine"))
    with pytest.raises(BundleError, match="is not a bundle"):
        write_kit(Bundle.open(other), "h100", {}, "", kit)
    assert (kit / "mine").read_text() == "mine"


def test_a_recipe_that_somebody_put_into_a_kit_stays(own_bundle: Path, tmp_path: Path) -> None:
    """The kit's own is replaced by another of its name."""
    recipe, bundle = tmp_path / "mine.toml", Bundle.open(own_bundle)
    text = (resource_folder("engines") / "h100.toml").read_text()
    recipe.write_text(text)
    kit = write_kit(bundle, str(recipe), {}, "", tmp_path / "kit")
    for changed in (text + "# more\n", text):
        recipe.write_text(changed)
        write_kit(bundle, str(recipe), {}, "", kit)
        assert (kit / "recipes" / "mine.toml").read_text() == changed
    (kit / "recipes" / "mine.toml").write_text("tuned")
    with pytest.raises(BundleError, match=r"mine\.toml is no recipe of this kit's"):
        write_kit(bundle, str(recipe), {}, "", kit)
    assert (kit / "recipes" / "mine.toml").read_text() == "tuned"


def test_what_happens_meanwhile(own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished kit leaves nothing; what appears in its place is kept."""

    def appear(*_args: object) -> None:
        (tmp_path / "kit").mkdir()
        (tmp_path / "kit" / "build.py").write_text("mine")

    monkeypatch.setattr("dash_export.building.kit._copy_package", Mock(side_effect=DISK_FULL))
    assert "disk is full" in refused("build", own_bundle, "--target", "h100", "--kit", tmp_path / "kit")
    assert not list(tmp_path.glob("kit*"))
    monkeypatch.setattr("dash_export.building.kit._copy_package", appear)
    with pytest.raises(BundleError, match="is not a build kit"):
        write_kit(Bundle.open(own_bundle), "h100", {}, "", tmp_path / "kit")
    assert (tmp_path / "kit" / "build.py").read_text() == "mine"
