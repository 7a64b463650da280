"""Graphs that are lowered on one machine and compiled on another: the bundle is all that is carried there."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda.cuda_maker import GpuBackend
from dash_export.building import build
from dash_export.bundle.bundle import Bundle
from dash_export.errors import BundleError, RecipeError
from tests.backends.cuda.conftest import IDS
from tests.building.conftest import write_recipe
from tests.commands.helpers import done, refused
from tests.standin import installed
from tests.standin.cuda import Card

NOT_THERE = ("onnx", "onnx_ir", "onnxruntime", "torch", "transformers", "gguf", "safetensors", "ml_dtypes")
"""Packages that a device need not have. (Of the stand-in, which runs graphs in ONNX Runtime, they are kept.)"""


@pytest.fixture(scope="module")
def direct(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, lowered and compiled on the machine with the card."""
    folder = tmp_path_factory.mktemp("direct")
    root = Path(shutil.copytree(tiny_root, folder / "tiny.dash"))
    with installed(Card()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuBackend, "run_obstacle", lambda _: "later")
        assert build(root, write_recipe(folder / "mine.toml")).target == "mine"
    return root


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the card, and without what its packages need not have."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in NOT_THERE or name.startswith(
            ("dash_export.graphs", "dash_export.building.engine_")
        ):
            monkeypatch.delitem(sys.modules, name)
    for name in NOT_THERE:
        monkeypatch.setitem(sys.modules, name, None)


def test_the_graphs_are_lowered_where_nothing_compiles_them(own_bundle: Path, made: list[str]) -> None:
    told = done("build", own_bundle, "--target", "h100").stdout
    assert "engines/h100-lowered: 8 graphs lowered, not compiled, " in told
    assert "Verified: 8 engines, lowered graphs" in told
    assert "compiled on their device only, and here it needs a device of compute capability 9.0" in told
    assert told.endswith(
        "Copy the bundle to the device (it does not need onnx/), and run there: "
        "dash-export build own.dash --target h100\n"
    )
    assert not (own_bundle / "engines" / "h100").exists()
    for target in ("h100", "h100-lowered"):
        message = refused("run", own_bundle, "--target", target, "Why?")
        assert (
            "the graphs for 'h100' are lowered, not compiled. Run on the device that they are for: dash-exp" in message
        )
    assert "h100-lowered: 8 engines" in done("inspect", own_bundle, "--verify").stdout
    made.clear()
    assert build(own_bundle, "h100") == build(own_bundle, "h100-lowered")
    assert not made, "it is lowered once"
    shutil.rmtree(own_bundle / "engines" / "portable")
    assert Bundle.open(own_bundle).resolve_target(None) == "cpu-fp32", "the only one that runs"


@pytest.mark.usefixtures("direct", "own", "device")
def test_the_device_compiles_and_measures_them(own: Path, direct: Path, made: list[str]) -> None:
    """By the same command and the recipe's name alone, with engines that are those of a build on the spot."""
    card = Card()
    with installed(card):
        told = done("build", own, "--target", "mine").stdout
        assert "engines/mine: 8 engines" in told
        assert "Next: dash-export run" in told
        known = Bundle.open(own).load_build("mine")
        assert known.cost.segment_us
        assert known.dial
        assert known.device == "a card (compute capability 12.0)"
        found = DashRuntime.load(own, "mine").session().logits(IDS)
        expected = DashRuntime.load(direct, "mine").session().logits(IDS)
        np.testing.assert_array_equal(found, expected)
        assert len(made) == 8
        assert build(own, "mine") == known
        Bundle.open(own).path("engines/mine/policy.engine").write_bytes(b"damaged")
        assert build(own, "mine").files == known.files
        assert made[8:] == ["policy"]


@pytest.mark.usefixtures("own", "device", "unmeasured")
def test_a_kill_while_they_are_compiled(own: Path, made: list[str]) -> None:
    def kill(name: str, *_: object) -> None:
        if name == "layers_02-03":
            raise KeyboardInterrupt

    with installed(Card()):
        with pytest.raises(KeyboardInterrupt):
            build(own, "mine", progress=kill)
        with pytest.raises(BundleError, match="'mine' are lowered, not compiled"):
            DashRuntime.load(own, "mine")
        build(own, "mine")
    assert len(made) == len(set(made)) == 8


@pytest.mark.usefixtures("own", "device", "unmeasured")
@pytest.mark.parametrize("name", ["layer_05.data", "policy.onnx"])
def test_damage_on_the_way(name: str, own: Path) -> None:
    path = own / "engines" / "mine-lowered" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with (
        installed(Card()),
        pytest.raises(BundleError, match=rf"{name} is not the file that was written .* --target mine"),
    ):
        build(own, "mine")
    path.unlink()
    with installed(Card()), pytest.raises(BundleError, match=rf"{name} is missing"):
        build(own, "mine")


@pytest.mark.usefixtures("own", "device", "unmeasured")
def test_of_another_version(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuBackend, "revision", -1)
    with (
        installed(Card()),
        pytest.raises(BundleError, match=r"another version of dash-export\. Install the same version"),
    ):
        build(own, "mine")


@pytest.mark.usefixtures("unmeasured")
def test_an_old_lowering_is_not_taken_where_the_graphs_are(own_bundle: Path, tmp_path: Path, made: list[str]) -> None:
    recipe = tmp_path / "mine.toml"
    build(own_bundle, write_recipe(recipe))
    made.clear()
    with installed(Card()):
        found = build(own_bundle, write_recipe(recipe, 64))
        assert len(made) == 9, "and the references"
        assert found.recipe.engine is not None
        assert found.recipe.engine.kv_capacity == 64


def test_no_recipe_takes_the_name(own_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "my-lowered.toml").write_text("")
    with pytest.raises(RecipeError, match="not end in -lowered"):
        build(own_bundle, str(tmp_path / "my-lowered.toml"))
