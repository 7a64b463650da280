"""Bytes a token moves: the weights of the engines that ran and the cache rows they read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action
from dash_export.manifest import ModelFacts
from dash_export.runtime import DashRuntime
from dash_export.targets import BITS, QUANTISED, WeightsRecipe

_CACHE_ITEM = 4
"""The KV cache is float32."""


@dataclass(frozen=True)
class EngineBytes:
    """Bytes each engine reads for one token, by segment; `bypass` 0 for what always runs. `first` and `counts` of its
    layers; `row`: bytes of one layer's K and V row.
    """

    run: npt.NDArray[np.int64]
    bypass: npt.NDArray[np.int64]
    gated: npt.NDArray[np.bool_]
    first: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    row: int

    def moved(self, actions: npt.NDArray[np.int8], position: int) -> tuple[int, int]:
        """Of one token at `position` under `actions` [layers]: bytes of engines, bytes of the cache (rows 0 to
        `position` for a layer that runs, the one row that is written for a skipped one).
        """
        # The head alone begins where the layers end.
        skipped = self.gated & (actions[np.minimum(self.first, len(actions) - 1)] == Action.SKIP)
        engines = np.where(skipped, self.bypass, self.run)
        rows = self.counts * np.where(skipped, 1, position + 2)
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
    bypasses = iter(runtime.bundle.manifest.policy.units)
    run, bypass = [], []
    for segment in build.segments:
        table = embedding_bytes(runtime.recipe.weights, model) if segment.embed else 0
        names = [segment.name] if segment.name in build.engines else segment.graphs
        run.append(max(0, sum(build.engines[name].bytes for name in names) - table))
        bypass.append(build.engines[next(bypasses).bypass].bytes if segment.gated else 0)
    return EngineBytes(
        np.array(run, np.int64),
        np.array(bypass, np.int64),
        np.array([segment.gated for segment in build.segments], np.bool_),
        np.array([segment.first for segment in build.segments], np.int64),
        np.array([len(segment.layers) for segment in build.segments], np.int64),
        2 * model.num_kv_heads * model.head_dim * _CACHE_ITEM,
    )
