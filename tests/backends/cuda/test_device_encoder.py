"""Encoders on the stand-in for a card, against the same ones on the CPU."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda.device_encoder import BATCH, DeviceEncoder
from dash_export.backends.maker import plan_segments
from dash_export.building import build
from dash_export.building.engine_graphs import engine_graphs, lower_graph
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import POLICY
from dash_export.core.rule import DENSE, ForcedRule, decision_rule
from dash_export.core.units import Damages
from dash_export.models import EncoderCheckpoint, open_model
from dash_export.runtime.encoder import Encoded
from tests.backends.cuda.conftest import built
from tests.standin import installed
from tests.standin.cuda import Card
from tests.tiny_encoder import UNITS, encoder_bundle, encoder_policy, random_pixels, save_encoder
from tests.tiny_texts import text_bundle

MakeRuntime = Callable[..., DashRuntime]
TARGETS = {
    "trt10": ("tensorrt", "trt10", "fp32"),
    "portable": ("tensorrt", "portable", "fp32"),
    "rtx": ("tensorrt_rtx", "portable", "fp32"),
    "trt10-fp16": ("tensorrt", "trt10", "fp16"),
    "portable-bf16": ("tensorrt", "portable", "bf16"),
}
TOLERANCES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.08}
FAMILIES = ("dinov2-registers-classes", "dinov3", "siglip", "clip-projection")


def device_encoder(folder: Path, family: str, targets: tuple[str, ...]) -> Path:
    """A tiny encoder built for `portable` on the CPU, and for some targets on the stand-in."""
    root = encoder_bundle(folder, family)
    with installed(Card()):
        for name in targets:
            backend, dialect, own = TARGETS[name]
            profiles = 1 if backend == "tensorrt_rtx" else 2
            built(root, folder / f"on-{name}.toml", backend, dialect, 1, profiles, own, own)
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(device_encoder(tmp_path_factory.mktemp("encoder"), "dinov2-swiglu-classes", tuple(TARGETS)))


@pytest.fixture(scope="module")
def host(bundle: Bundle) -> DashRuntime:
    return DashRuntime.load(bundle.root, "portable")


@pytest.fixture
def on_device(bundle: Bundle, card: Card) -> Iterator[MakeRuntime]:
    """`on_device("trt10", first="main")`."""

    def make(target: str, first: str | int = "main") -> DashRuntime:
        card.run_in_order_of(first)
        runtime = DashRuntime.load(bundle.root, f"on-{target}")
        engines = runtime.encoder().engines
        assert isinstance(engines, DeviceEncoder)
        card.devices.append(engines.device)
        return runtime

    return make


def leaving(count: int, seed: int = 3) -> ForcedRule:
    """Pictures that leave at different exits, or at none."""
    first = np.random.default_rng(seed).integers(0, len(UNITS) + 1, count)
    return ForcedRule(np.arange(len(UNITS))[:, None] >= first)


def same(found: Encoded, wanted: Encoded, tolerance: float) -> None:
    np.testing.assert_array_equal(found.actions, wanted.actions)
    np.testing.assert_array_equal(found.guarded, wanted.guarded)
    for name in ("pooled", "probabilities", "states"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, atol=tolerance)
    inside = np.isfinite(wanted.damage)
    np.testing.assert_allclose(found.damage[inside], wanted.damage[inside], atol=tolerance)


@pytest.mark.parametrize(("target", "tolerance"), [(name, TOLERANCES[own]) for name, (*_, own) in TARGETS.items()])
def test_pictures_leave_where_they_do_on_the_host(
    on_device: MakeRuntime, host: DashRuntime, target: str, tolerance: float
) -> None:
    runtime, pixels = on_device(target), random_pixels(7)
    for rule in (leaving(7), leaving(7, 4), DENSE):
        found, wanted = (each.encoder().under(rule).encode(pixels) for each in (runtime, host))
        same(found, wanted, tolerance)
        alone = runtime.encoder().under(ForcedRule(np.zeros((3, 1), bool))).encode(pixels[:1])
        np.testing.assert_allclose(alone.pooled, host.encoder().encode(pixels[:1]).pooled, atol=tolerance)


def test_the_policy_decides_as_on_the_host(on_device: MakeRuntime, host: DashRuntime) -> None:
    pixels = random_pixels(12)
    damage = host.encoder().under(ForcedRule(np.zeros((3, 12), bool))).encode(pixels).damage
    rule = decision_rule(UNITS, (0.2, 0.2, 0.4), float(np.median(damage[:, 1]) / 0.2))
    wanted = host.encoder().under(rule).encode(pixels)
    assert len(np.unique(wanted.actions.sum(axis=1))) > 1
    same(on_device("trt10").encoder().under(rule).encode(pixels), wanted, 1e-4)


def test_more_than_a_batch(on_device: MakeRuntime, host: DashRuntime) -> None:
    count = 2 * BATCH + 3
    runtime, pixels = on_device("portable"), random_pixels(count)
    for rule in (leaving(count), DENSE):
        found, wanted = (each.encoder().under(rule).encode(pixels) for each in (runtime, host))
        same(found, wanted, 1e-4)


@pytest.mark.parametrize("first", ["main", 0, 1])
def test_memory_is_used_again(on_device: MakeRuntime, card: Card, host: DashRuntime, first: str | int) -> None:
    runtime, pixels = on_device("trt10", first), random_pixels(5)
    encoder = runtime.encoder().under(leaving(5))
    encoder.encode(pixels)
    before = card.calls["cudaMalloc"], card.calls["cudaHostAlloc"]
    for seed in range(3):
        pixels = random_pixels(5, seed=seed)
        same(encoder.encode(pixels), host.encoder().under(leaving(5)).encode(pixels), 1e-4)
    assert (card.calls["cudaMalloc"], card.calls["cudaHostAlloc"]) == before
    runtime.encoder().encode(random_pixels(5))
    before = card.calls["cudaMalloc"], card.calls["cudaHostAlloc"]
    same(runtime.encoder().encode(random_pixels(6)), host.encoder().encode(random_pixels(6)), 1e-4)
    assert (card.calls["cudaMalloc"], card.calls["cudaHostAlloc"]) == before


def test_a_foreign_picture_is_exactly_dense(tmp_path: Path, card: Card) -> None:
    save_encoder(tmp_path / "model")
    checkpoint = open_model(tmp_path / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    policy = encoder_policy(checkpoint)
    network = dict(policy.network or {}) | {"limit": np.full(2, -1e9, np.float32)}
    bundle = export(checkpoint, tmp_path / "a.dash", replace(policy, network=network))
    built(bundle.root, tmp_path / "own.toml", "tensorrt", "trt10", 1, 2, "fp16", "fp16")
    card.run_in_order_of("main")
    runtime = DashRuntime.load(bundle.root, "own")
    card.devices.append(runtime.encoder().engines.device)  # type: ignore[attr-defined]
    found = runtime.encoder(policy="token", trade_off=1e9).encode(random_pixels(3))
    assert found.guarded.all()
    assert not found.actions.any()
    np.testing.assert_array_equal(found.pooled, runtime.encoder().encode(random_pixels(3)).pooled)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_the_older_dialect(tmp_path: Path, card: Card, family: str) -> None:
    root = device_encoder(tmp_path, family, ("trt10",))
    card.run_in_order_of("main")
    runtime = DashRuntime.load(root, "on-trt10")
    card.devices.append(runtime.encoder().engines.device)  # type: ignore[attr-defined]
    pixels, host = random_pixels(3), DashRuntime.load(root, "portable")
    for rule in (leaving(3), DENSE):
        found, wanted = (each.encoder().under(rule).encode(pixels) for each in (runtime, host))
        same(found, wanted, 1e-4)


def test_texts(tmp_path: Path, card: Card) -> None:
    root = text_bundle(tmp_path)
    with installed(card):
        built(root, tmp_path / "own.toml", "tensorrt", "trt10", 1, 2, "fp32", "fp32")
    card.run_in_order_of("main")
    runtime, host = DashRuntime.load(root, "own"), DashRuntime.load(root, "portable")
    card.devices.append(runtime.encoder().engines.device)  # type: ignore[attr-defined]
    texts = ["one", "two words", "and three of them"]
    np.testing.assert_allclose(runtime.encoder()(texts).pooled, host.encoder()(texts).pooled, atol=1e-4)


def test_a_build_on_the_device_is_measured(bundle: Bundle, card: Card, tmp_path: Path) -> None:
    root = Path(shutil.copytree(bundle.root, tmp_path / "measured.dash"))
    card.run_in_order_of("main")
    made = build(root, str(bundle.root.parent / "on-portable.toml"), measure=True)
    assert (made.cost.dispatch, made.cost.device) == ("sync", made.device)
    assert set(made.cost.segment_us) == {segment.name for segment in made.segments}
    assert all(spent > 0 for spent in made.cost.segment_us.values())


def test_lowered_graphs_are_compared(bundle: Bundle, tmp_path: Path) -> None:
    """Where there is no card, `build` lowers for another machine."""
    root = Path(shutil.copytree(bundle.root, tmp_path / "lowered.dash"))
    made = build(root, "jetson-orin-nano")
    assert made.target == "jetson-orin-nano-lowered"
    assert made.verification is not None
    assert set(made.verification.engines) == set(made.engines)
    assert max(error for each in made.verification.engines.values() for error in each.values()) < 0.02


def test_threads_take_turns(on_device: MakeRuntime, card: Card, host: DashRuntime) -> None:
    """While one waits for a decision another enqueues nothing: it would take memory that is still to be read."""
    encoder, pixels, begun = on_device("portable").encoder(), random_pixels(2), Event()

    class Waiting(ForcedRule):
        def leaves(self, place: int, damage: Damages) -> npt.NDArray[np.bool_]:
            if not begun.is_set():
                begun.set()
                enqueued.append(len(card.ran))
                time.sleep(0.5)
                enqueued.append(len(card.ran))
            return super().leaves(place, damage)

    enqueued = list[int]()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(encoder.under(Waiting(np.zeros((3, 2), bool))).encode, pixels)
        assert begun.wait(10)
        second = threads.submit(encoder.under(leaving(2)).encode, pixels)
        same(second.result(), host.encoder().under(leaving(2)).encode(pixels), 1e-4)
        np.testing.assert_allclose(first.result().pooled, host.encoder().encode(pixels).pooled, atol=1e-4)
    assert enqueued[0] == enqueued[1]


def test_what_stays_float32(bundle: Bundle) -> None:
    """Norms everywhere, and all of exits and policy: the stand-in, which computes in float32, would not show it."""
    recipe, policy = bundle.recipe("jetson-orin-nano"), bundle.manifest.policy
    for graph in engine_graphs(bundle, plan_segments(5, policy.units, (policy.read,)), True):
        model = lower_graph(bundle, graph, recipe)
        exact = graph.name == POLICY or graph.name.startswith("bypass")
        products = [node for node in model.graph if node.op_type == "MatMul"]
        assert {value.dtype for node in products for value in node.inputs if value is not None} <= {
            ir.DataType.FLOAT if exact else ir.DataType.FLOAT16
        }
        norms = [node for node in model.graph if node.op_type in ("LayerNormalization", "Softmax")]
        assert all(value.dtype == ir.DataType.FLOAT for node in norms for value in node.inputs if value is not None)
        assert products or graph.name in ("embed", "head")
        assert {value.name: value.dtype for value in model.graph.inputs}.get("hidden", ir.DataType.FLOAT16) == (
            ir.DataType.FLOAT16
        )
