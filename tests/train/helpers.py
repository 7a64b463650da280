"""Made-up windows of the tiny model's tokens, and short trainings of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export.core.policy import SkipPolicy
from dash_export.train import TrainingSettings
from dash_export.train.corpus import Batch
from tests.tiny import random_ids


def batch(seed: int) -> Batch:
    """Four windows of 32 tokens, of which the first two are dense."""
    ids = torch.from_numpy(random_ids(4 * 32, seed=seed).reshape(4, 32))
    dense = (torch.arange(32) < 2).expand(4, 32)
    return Batch(ids, dense, ~dense)


SETTINGS = TrainingSettings(
    window=32, windows=4, search_steps=3, search_every=2, fit_steps=3, warm_up_steps=2, regression_steps=6,
    tuning_steps=6, trade_offs=(0.5, 8.0), own_prompts=4, own_tokens=24, judged_batches=2,
    precision="bfloat16",
)  # fmt: skip


class StopError(Exception):
    """A kill, as far as the files on disk can tell."""


def same(one: SkipPolicy, other: SkipPolicy) -> bool:
    left, right = one.weights(), other.weights()
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


Learn = Callable[..., SkipPolicy]
Trained = tuple[Path, SkipPolicy]


def card_of(policy: Path) -> dict[str, Any]:
    return json.loads(policy.with_suffix(".json").read_text())  # type: ignore[no-any-return]
