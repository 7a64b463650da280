"""The loop of an encoder: what is skipped, and for whom."""

import numpy as np
import pytest
import torch

from dash_export import DashRuntime
from dash_export.core.rule import ForcedRule
from dash_export.models import EncoderCheckpoint, open_model
from dash_export.runtime.encoder import Encoder
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


def expected(checkpoint: EncoderCheckpoint, pixels: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """The pooled vectors of transformers' own model, whose layers are left out or replaced as the contract says."""
    import transformers

    spec, policy = checkpoint.spec, encoder_policy(checkpoint)
    model = transformers.AutoModel.from_pretrained(checkpoint.source).eval()
    rows = []
    with torch.no_grad():
        for place, one in enumerate(torch.from_numpy(pixels)):
            state = model.embeddings(one[None])
            rotary, layer = model.rope_embeddings(one[None]), 0
            while layer < spec.num_layers:
                unit = next((at for at, unit in enumerate(UNITS) if unit.first == layer), None)
                if unit is None or not skipped[unit, place]:
                    state = model.model.layer[layer](state, position_embeddings=rotary)
                    layer += 1
                    continue
                normed = torch.nn.functional.layer_norm(state, state.shape[-1:], eps=spec.norm_eps)
                own = {name: torch.from_numpy(array) for name, array in policy.bypasses[unit].items()}
                special = normed[:, : spec.special] @ own["special.weight"] + own["special.bias"]
                patches = normed[:, spec.special :] @ own["weight"] + own["bias"]
                state = state + torch.cat([special, patches], 1)
                layer = UNITS[unit].last + 1
            rows.append(model.norm(state)[0, 0].numpy())
    return np.array(rows)


CHOICES = np.array([[False, True, False, True, True], [False, False, True, True, True]])


def test_equals_the_contract(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, checkpoint = loaded
    pixels = random_pixels(5)
    found = forced(runtime, CHOICES).encode(pixels)
    np.testing.assert_allclose(found.pooled, expected(checkpoint, pixels, CHOICES), atol=1e-4)
    assert found.actions.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
    ]


def test_a_regrouped_batch_equals_its_pictures_alone(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, _ = loaded
    pixels = random_pixels(5)
    together = forced(runtime, CHOICES).encode(pixels)
    for place in range(5):
        alone = forced(runtime, CHOICES[:, place : place + 1]).encode(pixels[place : place + 1])
        np.testing.assert_allclose(together.pooled[place], alone.pooled[0], atol=1e-5)
        np.testing.assert_allclose(together.states[place], alone.states[0], atol=1e-5)


def test_the_policy_decides_for_each_picture(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    runtime, _ = loaded
    pixels = random_pixels(8)
    damage = runtime.encoder("token", trade_off=0.0).encode(pixels).damage
    cost = np.array(runtime.cost.cost)
    assert len({tuple(row) for row in damage.round(6).tolist()}) == 8
    middle = float(np.median(damage / cost))
    found = runtime.encoder("token", trade_off=middle).encode(pixels)
    skipped = damage < middle * cost
    assert 0 < skipped.sum() < skipped.size
    for place, unit in enumerate(UNITS):
        np.testing.assert_array_equal(found.actions[:, unit.first] == 1, skipped[:, place])
    dense = runtime.encoder().encode(pixels)
    same = ~skipped.any(1)
    np.testing.assert_allclose(found.pooled[same], dense.pooled[same], atol=1e-5)


def test_dense_asks_nobody(loaded: tuple[DashRuntime, EncoderCheckpoint]) -> None:
    found = loaded[0].encoder().encode(random_pixels(2))
    assert not found.damage.any()
    assert not found.guarded.any()
    assert not found.actions.any()
