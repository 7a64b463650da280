"""Made-up windows of the tiny model's tokens."""

import torch

from dash_export.train.corpus import Batch
from tests.tiny import random_ids


def batch(seed: int) -> Batch:
    """Four windows of 32 tokens, of which the first two are dense."""
    ids = torch.from_numpy(random_ids(4 * 32, seed=seed).reshape(4, 32))
    dense = (torch.arange(32) < 2).expand(4, 32)
    return Batch(ids, dense, ~dense)
