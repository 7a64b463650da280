"""The loop of an encoder: who leaves where, and with which answer."""

import numpy as np
import pytest
import torch

from dash_export import DashRuntime
from dash_export.core.rule import ForcedRule
from dash_export.errors import PolicyError
from dash_export.models import EncoderCheckpoint, open_model
from dash_export.runtime.encoder import Encoder
from dash_export.train.image_exits import answered, exit_read
from tests.tiny_encoder import UNITS, encoder_bundle, encoder_policy, random_pixels


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[DashRuntime, EncoderCheckpoint]:
    root = encoder_bundle(tmp_path_factory.mktemp("encoder"), "dinov3")
    checkpoint = open_model(root.parent / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    return DashRuntime.load(root, "portable"), checkpoint


def forced(runtime: DashRuntime, skipped: np.ndarray) -> Encoder:
    encoder = runtime.encoder()
    encoder.rule = ForcedRule(skipped)
    return encoder


def states(checkpoint: EncoderCheckpoint, pixels: np.ndarray) -> list[np.ndarray]:
    """The states of transformers' own model that enter each layer, and the one after the last."""
    import transformers

    model = transformers.AutoModel.from_pretrained(checkpoint.source).eval()
    with torch.no_grad():
        pictures = torch.from_numpy(pixels)
        found, rotary = [model.embeddings(pictures)], model.rope_embeddings(pictures)
        for layer in model.model.layer:
            found.append(layer(found[-1], position_embeddings=rotary))
        return [state.numpy() for state in (*found, model.norm(found[-1]))]


def answers(checkpoint: EncoderCheckpoint, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each exit answers, and last the whole model, [exits + 1, n, hidden], and damage [exits, n], by the formulas
    of the contract.
    """
    spec, policy = checkpoint.spec, encoder_policy(checkpoint)
    assert policy.network is not None
    found, network = states(checkpoint, pixels), policy.network
    reads = {layer: exit_read(state, spec.special, spec.norm_eps) for layer, state in enumerate(found)}
    damage, exits = answered(network, policy.bypasses, reads, reads[policy.read], UNITS, spec.num_layers)
    return np.array([*exits, found[-1][:, 0]]), damage


CHOICES = np.array(
    [[False, True, False, False, True], [False, True, True, False, True], [False, True, True, True, True]]
)
"""Skips of five pictures: dense, and those that leave at the exits 0, 1, 2 and 0."""
LEFT = [3, 0, 1, 2, 0]


def test_leaves_at_the_right_place(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, checkpoint = loaded
    pixels = random_pixels(5)
    found = forced(runtime, CHOICES).encode(pixels)
    expected, damage = answers(checkpoint, pixels)
    np.testing.assert_allclose(found.pooled, expected[LEFT, range(5)], atol=1e-4)
    assert found.actions.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 1, 1, 1, 1],
    ]
    asked = np.arange(3)[:, None] <= LEFT  # an exit behind the one that was taken is not asked
    np.testing.assert_allclose(found.damage.T, np.where(asked, damage, 0), rtol=1e-3)


def test_a_regrouped_batch_equals_its_pictures_alone(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, _ = loaded
    pixels = random_pixels(5)
    together = forced(runtime, CHOICES).encode(pixels)
    for place in range(5):
        alone = forced(runtime, CHOICES[:, place : place + 1]).encode(pixels[place : place + 1])
        np.testing.assert_allclose(together.pooled[place], alone.pooled[0], atol=1e-5)
        np.testing.assert_allclose(together.damage[place], alone.damage[0], rtol=1e-3)


def test_pictures_that_left_are_computed_no_further(
    loaded: tuple[DashRuntime, EncoderCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, _ = loaded
    encoder, counts = forced(runtime, CHOICES), []
    run = encoder.engines._run

    def counted(engines: object, state: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        counts.append((count, *{len(array) for array in state.values()}))
        return run(engines, state, count)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder.engines, "_run", counted)
    encoder.encode(random_pixels(5))
    assert counts[-4:] == [(3, 3), (2, 2), (1, 1), (1, 1)]  # layers 1, 2 and 3-4, and the head
    counts.clear()
    forced(runtime, np.ones((3, 5), bool)).encode(random_pixels(5))
    assert {count for count, _ in counts} == {5}
    assert len(counts) == len(runtime.build.segments) - 4


def test_the_policy_decides_at_each_exit(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, checkpoint = loaded
    pixels = random_pixels(16)
    expected, damage = answers(checkpoint, pixels)
    dense, asked = runtime.encoder().encode(pixels), runtime.encoder("token", trade_off=0.0).encode(pixels)
    for asked_of_dense in (dense.damage, dense.guarded, dense.actions):
        assert not asked_of_dense.any()
    assert dense.states is not None
    np.testing.assert_allclose(asked.damage.T, damage, rtol=1e-3)
    np.testing.assert_allclose(asked.pooled, expected[3], atol=1e-4)
    cost = np.array(runtime.cost.cost)[:, None]
    trade_off = float(np.median((damage / cost).min(axis=0)))
    found = runtime.encoder("token", trade_off=trade_off).encode(pixels)
    assert found.states is None, "some left"
    leaves = np.vstack([damage < trade_off * cost, np.ones(16, bool)])
    at = leaves.argmax(axis=0)
    assert len(set(at.tolist())) > 1
    for place, unit in enumerate(UNITS):
        np.testing.assert_array_equal(found.actions[:, unit.first] == 1, at <= place)
    np.testing.assert_allclose(found.pooled, expected[at, range(16)], atol=1e-4)


def test_no_picture_runs_more_layers_than_allowed(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, _ = loaded
    pixels = random_pixels(4)
    for most, run in ((1, 1), (2, 2), (4, 3), (5, 5)):
        found = runtime.encoder("token", trade_off=0.0, max_layers=most).encode(pixels)
        assert (found.actions == 0).sum(axis=1).tolist() == [run] * 4


def test_a_static_policy_asks_one_exit(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, checkpoint = loaded
    pixels = random_pixels(3)
    found = runtime.encoder("static", skip=(2, 3, 4)).encode(pixels)
    np.testing.assert_allclose(found.pooled, answers(checkpoint, pixels)[0][1], atol=1e-4)
    assert not found.damage.any()
    assert runtime.encoder("static", skipped=2).encode(pixels).actions.tolist() == [[0, 0, 0, 1, 1]] * 3
    with pytest.raises(PolicyError, match="give 1-4"):
        runtime.encoder("static", skip=(1,))
