"""Drafts on the host: the embedding and the drafter (`core/drafter.py`), bound to the cache of one sequence."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import backend_errors
from dash_export.backends.host.cache import KVCache
from dash_export.backends.host.decode import EngineSet, Floats
from dash_export.bundle.layout import past_names, present_names, short_name
from dash_export.core.drafts import Ask


class BoundDrafter:
    """The drafter bound to one sequence of a cache, and to be bound again where the cache's arrays move."""

    def __init__(self, engines: EngineSet, cache: KVCache, row: int = 0) -> None:
        """Bind the engines, which must have a drafter, to sequence `row`."""
        assert engines.drafter is not None
        last, hidden = engines.model.num_layers - 1, engines.model.hidden_size
        self._input_ids, self._position = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)
        self._seqlens_k, self._total = np.zeros(1, np.int32), np.zeros(1, np.int32)
        self._mask = np.zeros((1, 1, 1, cache.capacity), np.bool_) if engines.needs_mask else None
        self._draft, self._chance = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32)
        self._states = [np.zeros((1, 1, hidden), np.float32) for _ in range(2)]
        embedding = np.zeros((1, 1, hidden), np.float32)
        arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": self._input_ids,
            "hidden_out": embedding,
            "embedding": embedding,
            "position_ids": self._position,
            "write_indices": self._position[0],
            "seqlens_k": self._seqlens_k,
            "total_length": self._total,
            "draft": self._draft,
            "chance": self._chance,
            **engines.rope(cache.capacity),
        }
        if self._mask is not None:
            arrays["attention_mask"] = self._mask
        pair = [each[last][row : row + 1] for each in (cache.keys, cache.values)]
        for name, array in zip((*past_names(last), *present_names(last)), pair * 2, strict=True):
            arrays[name] = arrays[short_name(name)] = array
        ((_, embed),) = engines.segments[0].run
        self._embed = embed.bind(arrays, arrays)
        self._runs = [
            engines.drafter.bind(arrays | {"state": before}, arrays | {"state_out": after})
            for before, after in (self._states, self._states[::-1])
        ]

    def asked(self, state: Floats, position: int) -> Ask:
        """Return what drafts, one token at a time: called with a token, it returns the draft after it and the chance
        that this is accepted. `state` [hidden]: the normed final state of the token before the first. `position`: that
        of the first, so as many rows are cached; its K and V, and those of drafts, go into the last layer's rows from
        there on, which must be within the capacity.
        """
        self._states[0][:] = state
        places = count()
        return lambda token: self._drafted(token, position, next(places))

    @backend_errors
    def _drafted(self, token: int, position: int, place: int) -> tuple[int, float]:
        self._input_ids[0, 0] = token
        self._position[0, 0] = self._seqlens_k[0] = position + place
        self._total[0] = position + place + 1
        if self._mask is not None:
            self._mask[..., : position + place + 1] = True
            self._mask[..., position + place + 1 :] = False
        for launch in (self._embed, self._runs[place % 2]):
            launch()
        return int(self._draft[0, 0]), float(self._chance[0, 0])
