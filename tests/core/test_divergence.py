"""KL and negative log-likelihood against float64 written out."""

import numpy as np
import pytest

from dash_export.core.divergence import DenseRows, nll
from dash_export.errors import BackendError
from tests.tiny import log_softmax


@pytest.mark.parametrize(("rows", "scale"), [(1, 1.0), (16, 4.0), (45, 30.0)])
def test_against_float64(rows: int, scale: float) -> None:
    rng = np.random.default_rng(rows)
    dense = (scale * rng.standard_normal((rows, 500))).astype(np.float32)
    other = (dense + rng.standard_normal((rows, 500)) + 100).astype(np.float32)  # a shift of all logits changes nothing
    p, q = log_softmax(dense), log_softmax(other)
    np.testing.assert_allclose(DenseRows(dense).kl(other), (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    tokens = rng.integers(0, 500, rows)
    # The last row of a window has no follower.
    np.testing.assert_allclose(nll(other, tokens[1:]), -q[np.arange(rows - 1), tokens[1:]], rtol=1e-5, atol=1e-4)


def test_what_is_no_number_is_no_divergence() -> None:
    """max(0.0, nan) is 0.0: the best there is."""
    logits = np.zeros((20, 8), np.float32)
    broken = logits.copy()
    broken[17, 3] = np.nan
    with pytest.raises(BackendError, match="not numbers"):
        DenseRows(broken)
    with pytest.raises(BackendError, match="not numbers"):
        DenseRows(logits).kl(broken)
