"""Facts of a model: the tables of its positions."""

from dataclasses import fields

import numpy as np
import pytest

from dash_export.core.facts import DecoderFacts, rope_tables
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
