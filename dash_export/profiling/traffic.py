"""Bytes a token moves: the weights of the engines that ran and the cache rows they read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action
from dash_export.manifest import ModelFacts
from dash_export.runtime import DashRuntime
from dash_export.runtime.engines import policies_by_segment
from dash_export.targets import BITS, QUANTISED, WeightsRecipe

_CACHE_ITEM = 4
"""The KV cache is float32."""


@dataclass(frozen=True)
class EngineBytes:
    """Bytes each engine reads for one token, by segment; `skip` and `policy` 0 where there is no such engine."""

    run: npt.NDArray[np.int64]
    skip: npt.NDArray[np.int64]
    policy: npt.NDArray[np.int64]
    layers: npt.NDArray[np.int64]
    """The gated layer of a segment, -1 for one that always runs."""
    counts: npt.NDArray[np.int64]
    """Layers in a segment."""
    row: int
    """Bytes of one layer's K and V row."""

    def moved(self, actions: npt.NDArray[np.int8], position: int) -> tuple[int, int]:
        """Of one token at `position` under `actions` [layers]: bytes of engines, bytes of the cache (rows 0 to
        `position` for a layer that runs, the one row that is written for a skipped one).
        """
        skipped = (self.layers >= 0) & (actions[self.layers] == Action.SKIP)
        engines = np.where(skipped, self.skip, self.run) + self.policy
        rows = np.where(skipped, 1, self.counts * (position + 2))
        return int(engines.sum()), int(rows.sum()) * self.row


def embedding_bytes(weights: WeightsRecipe, model: ModelFacts) -> int:
    """What the embedding table takes on disk: of it one row is read for a token."""
    bits = float(BITS[weights.embedding])
    if weights.embedding in QUANTISED:
        # A float32 scale per block, and a zero point of the weights' own width.
        bits += (32 + (0 if weights.symmetric else bits)) / weights.block_size
    return int(model.vocab_size * model.hidden_size * bits / 8)


def engine_bytes(runtime: DashRuntime) -> EngineBytes:
    """From the build's engine records. Of an embedding table one row is read."""
    build, model = runtime.build, runtime.engines.model
    fused = runtime.dispatch == "fused"

    def size(name: str) -> int:
        record = build.engines.get(f"{name}.policy") if fused else None
        return (record or build.engines[name]).bytes

    asked = runtime.bundle.manifest.policy.decision_points if runtime.dispatch == "sync" else {}
    policy = [sum(engines.values()) for engines in policies_by_segment(build, asked, size)]
    run, skip = [], []
    for segment in build.segments:
        table = embedding_bytes(runtime.recipe.weights, model) if segment.embed else 0
        run.append(max(0, size(segment.name) - table))
        skip.append(size(f"skip_{segment.first:02d}") if segment.gated else 0)
    return EngineBytes(
        np.array(run, np.int64),
        np.array(skip, np.int64),
        np.array(policy, np.int64),
        np.array([segment.first if segment.gated else -1 for segment in build.segments], np.int64),
        np.array([len(segment.layers) for segment in build.segments], np.int64),
        2 * model.num_kv_heads * model.head_dim * _CACHE_ITEM,
    )
