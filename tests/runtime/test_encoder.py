"""Pictures in, vectors out."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.core.input_table import Picture, held_out_text
from dash_export.core.policy import SkipPolicy
from dash_export.core.rule import DecisionRule, State
from dash_export.errors import BundleError, PolicyError, RequestError
from dash_export.models import EncoderCheckpoint, open_model
from tests.tiny_encoder import UNITS, encoder_bundle, encoder_policy, random_pixels, save_encoder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> DashRuntime:
    return DashRuntime.load(encoder_bundle(tmp_path_factory.mktemp("classes"), "vit-classes"), "portable")


def with_policy(root: Path, **changes: object) -> DashRuntime:
    """A tiny encoder whose random policy is changed."""
    save_encoder(root / "model")
    checkpoint = open_model(root / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    policy: SkipPolicy = replace(encoder_policy(checkpoint), **changes)  # type: ignore[arg-type]
    build(export(checkpoint, root / "a.dash", policy), "portable")
    return DashRuntime.load(root / "a.dash", "portable")


def test_classes(classifier: DashRuntime) -> None:
    found = classifier.encoder().encode(random_pixels(3))
    assert found.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)
    assert len(found) == 3
    assert found.pooled.shape == (3, 32)
    assert found.states is not None
    assert found.states.shape == (3, 10, 32)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((0, 3, 42, 42)), np.zeros((1, 3, 28, 28)), np.zeros((3, 42, 42)), np.full((1, 3, 42, 42), np.nan)],
)
def test_wrong_pixels(classifier: DashRuntime, pixels: np.ndarray) -> None:
    with pytest.raises(RequestError, match=r"finite numbers \[n, 3, 42, 42\]"):
        classifier.encoder().encode(pixels)


def test_a_stream_reads_one_ahead(classifier: DashRuntime) -> None:
    """And no more."""
    read, pixels = list[int](), np.zeros((42, 42, 3), np.uint8)
    frames = (read.append(at) or pixels for at in range(4))
    for number, _ in enumerate(classifier.encoder().stream(frames)):
        until = time.monotonic() + 5
        while len(read) < min(4, number + 2) and time.monotonic() < until:
            time.sleep(0.01)
        assert len(read) == min(4, number + 2)


def test_an_encoder_writes_no_text(classifier: DashRuntime) -> None:
    uses = (classifier.session, classifier.batch, lambda: classifier.text, lambda: classifier.engines)
    for use in uses:
        with pytest.raises(BundleError, match="is an encoder: it takes pictures"):
            use()


def test_a_causal_lm_takes_no_pictures(runtime: DashRuntime) -> None:
    with pytest.raises(BundleError, match="is a causal LM"):
        runtime.encoder()


class Never:
    """A policy of one's own."""

    def begin(self, *_: object) -> None: ...

    def skips(self, state: State) -> np.ndarray:
        return np.zeros(state.damage.shape, bool)


def test_a_policy_of_the_users_is_refused(classifier: DashRuntime) -> None:
    with pytest.raises(PolicyError, match="an encoder takes dense, static and token"):
        classifier.encoder(f"{__name__}:Never")


def test_the_guard_holds_whatever_the_rule_says(tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    checkpoint = open_model(tmp_path / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    network = dict(encoder_policy(checkpoint).network or {}) | {"limit": np.full(2, -1e9, np.float32)}
    runtime = with_policy(tmp_path, network=network)
    pixels = random_pixels(3)
    dense = runtime.encoder().encode(pixels)
    for setting in ({"policy": "token", "trade_off": 1e9}, {"policy": "token", "max_layers": 2}):
        found = runtime.encoder(**setting).encode(pixels)  # type: ignore[arg-type]
        assert found.guarded.all()
        assert not found.actions.any()
        assert np.isinf(found.damage).all()
        np.testing.assert_array_equal(found.pooled, dense.pooled)


def test_a_budget_is_read_off_the_held_out_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [
        Picture(tuple(rng.random(len(UNITS)).tolist()), tuple(sorted(rng.random(len(UNITS)).tolist(), reverse=True)))
        for _ in range(40)
    ]
    runtime = with_policy(tmp_path, answers=held_out_text(pictures))
    dial = runtime.build.dial
    assert dial[0].kl == 0
    assert dial[0].layers == 5
    assert dial[-1].layers == 1
    assert [point.time for point in dial] == sorted((point.time for point in dial), reverse=True)
    damage = np.array([one.damage for one in pictures]).T
    point = dial[len(dial) // 2]
    skipped = damage < point.trade_off * np.array(runtime.cost.cost)[:, None]
    left = np.vstack([skipped, np.ones(len(pictures), bool)]).argmax(axis=0)
    lost = [(*one.divergence, 0.0)[at] for one, at in zip(pictures, left, strict=True)]
    assert point.kl == pytest.approx(np.mean(lost), abs=1e-5)
    assert point.layers == pytest.approx(np.mean(np.array([1, 2, 3, 5])[left]), abs=1e-3)
    # By layers: in so small a model asking the exits takes longer than what they save.
    rule = runtime.encoder(skipped=5 - point.layers).rule
    assert isinstance(rule, DecisionRule)
    np.testing.assert_allclose(rule.limits, point.trade_off * np.array(runtime.cost.cost), rtol=1e-4)
