"""Facts of a model: the tables of its positions, what it says of itself, shapes of its policies."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from dash_export.core.facts import DecoderFacts, EncoderFacts, TextFacts, rope_tables
from dash_export.models import Checkpoint


@pytest.mark.parametrize("windows", [(), (0.5, 0.25)])
def test_tables(tiny_model: Checkpoint, windows: tuple[float, ...]) -> None:
    facts = {item.name: getattr(tiny_model.spec, item.name) for item in fields(DecoderFacts)}
    facts |= {"rope_frequencies": (1.0, 0.1, 1e-3), "rope_scale": 1.5, "window_frequencies": windows}
    tables = rope_tables(DecoderFacts(**facts), 100_000)
    assert set(tables) == {
        f"{rope}.{of}" for rope in ("rope", "rope.window")[: 1 + bool(windows)] for of in ("cos", "sin")
    }
    assert tables["rope.cos"].shape == (100_000, 3)
    np.testing.assert_allclose(tables["rope.cos"][99_999], 1.5 * np.cos([99_999, 9_999.9, 99.999]), atol=2e-7)
    np.testing.assert_allclose(tables["rope.sin"][3], 1.5 * np.sin([3, 0.3, 3e-3]), atol=2e-7)
    if windows:
        np.testing.assert_allclose(tables["rope.window.sin"][3], np.sin([1.5, 0.75]), atol=2e-7)


def encoder(kind: type[EncoderFacts] = EncoderFacts, **own: Any) -> EncoderFacts:
    sizes = {"hidden_size": 32, "num_layers": 5, "num_heads": 2, "head_dim": 16, "parameters": 1}
    pictures = {"image_size": (28, 42), "patch_size": 14, "special": 1, "norm_eps": 1e-6}
    return kind(**{"name": "x", "model_type": "x"} | sizes | pictures | own)


@pytest.mark.parametrize(("labels", "said"), [(0, "42 x 28 pixels, no classes"), (3, "42 x 28 pixels, 3 classes")])
def test_sizes_of_an_image_encoder(labels: int, said: str) -> None:
    assert encoder(labels=labels).sizes()["pictures"] == said


@pytest.mark.parametrize(("special", "parts"), [(0, 1), (1, 2), (5, 2)])
def test_a_guard_has_one_part_more_than_an_exit(special: int, parts: int) -> None:
    """An exit reads the class token, where there is one, and the mean of the patches; the guard their spread, too."""
    shapes = encoder(special=special).network_shapes(2, {"components": (9, 4)})
    assert shapes["early.weight"] == (parts * 32, 32)
    assert shapes["mean"] == ((parts + 1) * 32,)
    assert shapes["components"] == ((parts + 1) * 32, 4)


@pytest.mark.parametrize("ids", [[[0, 7]], [[-1, 2]], [[1, 2, 3, 4, 5]], [1, 2], [[0.5, 1.0]]])
def test_what_is_no_text(ids: list[Any]) -> None:
    facts = encoder(TextFacts, image_size=(), patch_size=0, vocab_size=7, max_positions=4)
    assert not facts.input_fault(np.array([[6, 0, 1]]))
    assert "token ids below 7 [n, length]" in facts.input_fault(np.array(ids))
