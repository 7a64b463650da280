"""`doctor --card` on the stand-in: every step in every GPU recipe; what is wrong is found and named."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dash_export.backends.cuda import launch_costs
from dash_export.backends.cuda.cuda import Cuda
from dash_export.backends.cuda.cuda_graph import CudaGraph
from dash_export.backends.cuda.step import DeviceStep
from dash_export.building import build, card_check, pipeline
from dash_export.building.cost_table import uniform_cost
from dash_export.building.references import REFERENCES
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import load_recipe, recipe_names
from dash_export.bundle.records import Verification
from dash_export.files.resources import resource_folder
from tests.building.test_references import BREAKS, break_engine
from tests.commands.helpers import dash, refused
from tests.standin import installed
from tests.standin.cuda import Card
from tests.tiny_encoder import encoder_bundle

STEPS = [step.name for step in card_check.STEPS]
QUICK = {"jetson-orin-nano", "rtx", "cuda", "K and V swapped", "a bypass that swaps K and V", "another policy"}


def param(name: str) -> Any:
    """Each takes some seconds; `QUICK` are of all kinds."""
    return pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)


RECIPES = [param(name) for name in recipe_names() if load_recipe(name).on_device]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of its own; builds measure nothing, and little is timed."""
    monkeypatch.chdir(tmp_path)
    for module, name, few in (
        (launch_costs, "REPEATS", 2),
        (launch_costs, "KERNELS", 2),
        (launch_costs, "_COPIED", 1 << 10),
        (card_check, "ROUNDS", 1),
        (card_check, "TOKENS", 4),
    ):
        monkeypatch.setattr(module, name, few)
    monkeypatch.setattr(pipeline, "calibrate_dial", lambda *_: ())
    monkeypatch.setattr(
        pipeline, "measure_cost", lambda bundle, *_: replace(uniform_cost(bundle.manifest), device="a card")
    )


@pytest.fixture
def card() -> Iterator[Card]:
    with installed(card := Card()):
        yield card


@pytest.fixture
def built(own: Path, card: Card) -> Path:  # noqa: ARG001  # it is installed
    """Compiled on the card, and not compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compare_engines", lambda *_: Verification("nowhere", {}))
        build(own, "mine")
    return own


def checked(root: Path, *options: str) -> tuple[int, list[dict[str, Any]], str, dict[str, Any]]:
    """Exit code; the steps; what was printed in one line; all of the report."""
    result = dash("doctor", "--card", root, *options)
    assert result.exit_code in (0, 1), result.output
    (written,) = Path().glob("*-card.json")
    found = json.loads(written.read_text())
    html = written.with_suffix(".html").read_text()
    assert "<script" not in html
    assert all(step["name"] in html for step in found["steps"])
    return result.exit_code, found["steps"], " ".join(result.stdout.split()), found


@pytest.mark.parametrize("name", RECIPES)
def test_a_sound_card(name: str, tiny_root: Path, card: Card, tmp_path: Path) -> None:
    """In every shipped recipe, but for the card's capability and a small cache."""
    text = (resource_folder("engines") / f"{name}.toml").read_text()
    for key, value in (
        ("capabilities", '["12.0"]'),
        ("kv_capacity", "96"),
        ("prefill_chunk", "16"),
        ("rounding", '"nearest"'),
    ):
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    (tmp_path / "mine.toml").write_text(f"{text}\n[cost]\ncontext = 8\n")
    root = Path(shutil.copytree(tiny_root, tmp_path / "own.dash", ignore=shutil.ignore_patterns("engines")))
    code, steps, told, found = checked(root, "--target", "mine.toml")
    assert code == 0, told
    assert [step["name"] for step in steps] == STEPS
    assert "WRONG" not in told
    facts = found["facts"]
    modes = (
        ("sync", "overlapped", "device") if load_recipe(name).backend != "onnxruntime_cuda" else ("sync", "overlapped")
    )
    assert {(row["mode"], row["tokens"]) for row in facts["times"]} == {
        (mode, tokens) for mode in modes for tokens in ("dense", "static", "token")
    }
    assert all(0 < row["device_ms"] < row["host_ms"] for row in facts["times"])
    layers = {row["tokens"]: row["layers"] for row in facts["times"]}
    assert layers["dense"] == 6 > layers["static"]
    assert set(facts["errors"]) >= {"layers_02-03", "bypass_04-04", "policy"}
    assert facts["memory"]["cache"] > 0
    assert card.calls["cudaEventElapsedTime"] > 0


@pytest.mark.parametrize("what", map(param, BREAKS))
@pytest.mark.usefixtures("card")
def test_a_broken_engine_is_named(what: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a build that is there; nothing after it is tried."""
    with monkeypatch.context() as patch:
        break_engine(what, patch)
        patch.setattr(pipeline, "compare_engines", lambda *_: Verification("nowhere", {}))
        build(own, "mine")
    code, steps, told, _ = checked(own)
    assert (code, steps[-1]["name"]) == (1, "engines")
    name, _, kind = BREAKS[what]
    assert re.search(rf"WRONG The engine {name} is off on a card .*: its ({kind}) by \d", told)


@pytest.mark.usefixtures("card")
def test_a_build_that_the_check_makes_is_compared(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_engine("a wrong scale", monkeypatch)
    code, steps, told, _ = checked(own)
    assert (code, steps[-1]["name"]) == (1, "build")
    assert "WRONG The engine layers_02-03 is off on a card" in told


def test_stale_lengths(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceStep, "_note_positions", lambda _: None)
    code, steps, told, _ = checked(built)
    assert (code, steps[-1]["name"]) == (1, "engines")
    assert "together their logits are off by" in told


def test_a_graph_that_skips_other_units(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = CudaGraph.branch
    monkeypatch.setattr(
        CudaGraph, "branch", lambda graph, stream, unit, run, skip: sound(graph, stream, unit, skip, run)
    )
    code, steps, told, _ = checked(built)
    assert (code, steps[-1]["name"]) == (1, "dispatch modes")
    assert re.search(r"WRONG Dispatch 'device' is wrong: of token, likeliest tokens, number \d", told)


def test_memory_that_is_kept(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, sound = list[Any](), DeviceStep.__init__

    def leaking(step: DeviceStep, engines: Any, *rest: Any) -> None:
        kept.append(engines.device.memory(32 << 20))
        sound(step, engines, *rest)

    slow = card_check._modes, card_check._time
    monkeypatch.setattr(card_check, "STEPS", [step for step in card_check.STEPS if step.run not in slow])
    monkeypatch.setattr(DeviceStep, "__init__", leaking)
    code, steps, told, _ = checked(built)
    assert (code, steps[-1]["name"]) == (1, "memory")
    assert "A conversation that has ended keeps 67.1 MB" in told
    kept.clear()


def test_what_nobody_expected_is_in_the_report(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "engine", lambda *_: 1 / 0)
    code, steps, told, _ = checked(built)
    assert (code, steps[-1]["name"]) == (1, "engines")
    assert "WRONG ZeroDivisionError: division by zero" in told
    assert "in <lambda>" in steps[-1]["trace"]
    assert "in &lt;lambda&gt;" in Path("own-mine-card.html").read_text()


def test_a_damaged_copy_and_one_without_references(built: Path) -> None:
    place = built / "engines" / "mine-lowered" / REFERENCES
    kept = place.read_bytes()
    place.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    code, steps, told, _ = checked(built)
    assert (code, [step["name"] for step in steps]) == (1, ["copy"])
    assert REFERENCES in told
    shutil.rmtree(place.parent)  # as if a build were carried alone
    code, steps, told, _ = checked(built)
    assert (code, steps[-1]["name"]) == (1, "engines")
    assert "has no references for 'mine'. On a machine with ONNX Runtime run dash-export build" in told


def test_without_a_card(own: Path) -> None:
    code, steps, told, found = checked(own)
    assert (code, steps[-1]["name"]) == (1, "driver and packages")
    assert "WRONG it needs a device of compute capability 12.0" in told
    assert found["machine"]["packages"]["numpy"]


def test_which_target(own: Path, tiny_root: Path) -> None:
    assert "has no build for a GPU: give the one to check" in refused("doctor", "--card", tiny_root)
    assert "'cpu' is a target without a card" in refused("doctor", "--card", own, "--target", "cpu")
    assert Bundle.open(own).targets() == ["mine-lowered"]
    assert not list(Path().glob("*-card.*"))


def test_an_encoder_is_compared_otherwise(tmp_path: Path) -> None:
    root = encoder_bundle(tmp_path)
    assert "--card checks causal LMs. Compare it on the card: dash-export run" in refused(
        "doctor", "--card", root, "--target", "jetson-orin-nano"
    )
