"""References: engines that are broken on purpose, and which one is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from dash_export.backends.cuda.alone import _bf16
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.tensorrt.trt_maker import RtxBackend
from dash_export.building import build, pipeline
from dash_export.building.cost_table import uniform_cost
from dash_export.building.exporting import export
from dash_export.building.references import REFERENCES, TOGETHER, read_references
from dash_export.bundle.bundle import Bundle
from dash_export.core.policy import no_policy
from dash_export.errors import BackendError, BundleError
from dash_export.models import Checkpoint
from tests.building.conftest import write_recipe
from tests.commands.helpers import done
from tests.standin import installed
from tests.standin.cuda import Card
from tests.tiny import TINY_UNITS

Change = Callable[[onnx.GraphProto], None]


@pytest.fixture(autouse=True)
def compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "measure_cost", lambda bundle, *_: uniform_cost(bundle.manifest))
    monkeypatch.setattr(pipeline, "calibrate_dial", lambda *_: ())


def test_sound_engines_agree(own: Path) -> None:
    with installed(Card()):
        told = done("build", own, "--target", "mine").stdout
    assert "Verified: 8 engines, on a card (compute capability 12.0), with states and logits of the" in told
    kept = Bundle.open(own).load_build("mine")
    assert kept.verification is not None
    assert kept.verification.engines.keys() == {*kept.engines, TOGETHER}
    assert set(kept.verification.engines["layers_02-03"]) == {"hidden_out", "keys", "values"}
    assert set(kept.verification.engines["bypass_02-03"]) == {"hidden_out", "keys", "values"}
    assert kept.verification.engines[TOGETHER]["decisions"] == 0


def test_what_the_references_are(carried: Path, tiny_runtime: Any) -> None:
    """Of an engine of float32 on the CPU, under the same actions; every unit is skipped and run by some token."""
    known = read_references(carried / "engines" / "mine-lowered" / REFERENCES)
    prompt, skips = int(known["prompt"]), known["skips"]
    assert not skips[:, :prompt].any()
    assert all(0.2 < share < 0.8 for share in skips[:, prompt:].mean(axis=1))
    actions = np.zeros((len(known["ids"]), 6), np.int8)
    actions[:, 2:4], actions[:, 4] = skips[0][:, None], skips[1]
    logits = tiny_runtime().session().logits(known["ids"], actions=actions)[prompt - 1 :]
    np.testing.assert_allclose(np.take_along_axis(logits, known["top"], -1), known["logits"], atol=0.02)
    assert (logits.argmax(-1) == known["top"][:, 0]).mean() > 0.9
    np.testing.assert_allclose(np.log(np.exp(logits).sum(-1)), known["logsum"], atol=0.02)


def scaled(name: str, factor: float) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        (found,) = (item for item in graph.initializer if item.name.startswith(name))
        array = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), found.name))

    return change


def swapped(one: str, other: str) -> Change:

    def change(graph: onnx.GraphProto) -> None:
        names = {one: other, other: one}
        for node in graph.node:
            for values in (node.input, node.output):
                values[:] = [names.get(value, value) for value in values]

    return change


LAYER = "model.layers.{}.{}.weight/float16"
BREAKS: dict[str, tuple[str, Change, str]] = {
    "a wrong scale": ("layers_02-03", scaled(LAYER.format(3, "mlp.down_proj"), 1.2), "hidden_out"),
    "a wrong embedding": ("layer_00", scaled(LAYER.format(0, "self_attn.k_proj"), 1.1), "hidden_out|keys"),
    "K and V swapped": ("layer_01", swapped("new.1.key", "new.1.value"), "hidden_out|keys"),
    "another layer's weights": (
        "layers_02-03",
        swapped(LAYER.format(2, "mlp.up_proj"), LAYER.format(3, "mlp.up_proj")),
        "hidden_out",
    ),
    "a bypass that swaps K and V": ("bypass_02-03", swapped("new.3.key", "new.3.value"), "keys"),
    "another bypass": ("bypass_04-04", scaled("bypass_04-04.weight/float16", -1.0), "hidden_out"),
    "no mask": ("layer_04", scaled("attention.masked", 0.0), "hidden_out"),
    "turned the other way": ("layers_02-03", scaled("rope.sin.96", -1.0), "hidden_out|keys"),
    "another policy": ("policy", scaled("policy/rows", -1.0), "damage"),
    "another head": ("layer_05", scaled("head/weight", 1.1), "logits"),
}


def break_engine(what: str, patch: pytest.MonkeyPatch) -> None:
    """Let the engine of that name be compiled of another graph."""
    name, change, _ = BREAKS[what]
    sound = RtxBackend.compile

    def compile(maker: RtxBackend, graph: Path, folder: Path, out: Path) -> list[Path]:
        if graph.stem == name:
            model = onnx.load(graph)
            change(model.graph)
            graph = out.with_name(f"{name}.onnx")
            onnx.save(model, graph)
        return sound(maker, graph, folder, out)

    patch.setattr(RtxBackend, "compile", compile)


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_engine_is_named(what: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, kind = BREAKS[what]
    break_engine(what, monkeypatch)
    with installed(Card()):
        with pytest.raises(BackendError, match=rf"The engine {name} is off on a card .*: its ({kind}) by \d"):
            build(own, "mine")
        assert "mine" not in Bundle.open(own).targets()


def test_what_joins_sound_engines(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = DeviceStep._agreed
    monkeypatch.setattr(DeviceStep, "_agreed", lambda step, rules: ~sound(step, rules))
    with (
        installed(Card()),
        pytest.raises(BackendError, match=r"Each engine agrees .* together their logits are off by"),
    ):
        build(own, "mine")


def test_damaged_or_of_another_bundle(own: Path) -> None:
    path = own / "engines" / "mine-lowered" / REFERENCES
    arrays = read_references(path)
    for change in ({"ids": arrays["ids"].reshape(2, -1)}, {"rows": arrays["rows"][:, :4]}):
        np.savez(path, **arrays | change)  # type: ignore[arg-type]
        with installed(Card()):
            made = pytest.MonkeyPatch()
            made.setattr(Bundle, "verify", lambda *_: {})  # who forges them forges their hash, too
            with made.context(), pytest.raises(BundleError, match="is not of this bundle"):
                build(own, "mine")
            made.undo()
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="it is compressed"):
        read_references(path)


@pytest.mark.parametrize("network", [True, False])
def test_a_small_cache_holds_less_of_the_text(
    network: bool, own_bundle: Path, tiny_model: Checkpoint, tmp_path: Path
) -> None:
    """And a machine that has everything makes the references itself. Without a policy units take turns."""
    if not network:
        export(tiny_model, own_bundle, no_policy(6, TINY_UNITS))
    recipe = write_recipe(tmp_path / "mine.toml", 40)
    with installed(Card()):
        made = build(own_bundle, recipe)
    assert made.verification is not None
    assert made.verification.engines.keys() == {*made.engines, TOGETHER}
    shutil.rmtree(own_bundle / "onnx")
    with installed(Card()):
        assert build(own_bundle, recipe, measure=True).verification == made.verification


def test_bfloat16_is_rounded_as_elsewhere() -> None:
    numbers = (np.random.default_rng(0).standard_normal(4096) * 10.0 ** np.arange(4096 // 128).repeat(128)).astype("f4")
    np.testing.assert_array_equal(_bf16(numbers), numbers.astype(ml_dtypes.bfloat16).view(np.uint16))
