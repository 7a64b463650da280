"""Made-up windows of the tiny model's tokens."""

from __future__ import annotations

import numpy as np

from dash_export.train.corpus import Batch
from tests.tiny import random_ids


def batch(seed: int) -> Batch:
    """Four windows of 32 tokens, of which the first two are dense."""
    ids = random_ids(4 * 32, seed=seed).reshape(4, 32)
    dense = np.broadcast_to(np.arange(32) < 2, ids.shape)
    return Batch(ids, dense.copy(), ~dense)
