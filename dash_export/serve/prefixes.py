"""Prompts that were computed before: the K and V of the last ones, so many bytes of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dash_export.runtime.cache import KVCache, whole_tiles
from dash_export.runtime.results import TokenIds
from dash_export.runtime.session import Session


class Prefixes:
    """Prompts of the last requests, least recently used first. For one thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._kept = most_bytes, OrderedDict[tuple[int, ...], KVCache]()
        self.nbytes = 0

    def keep(self, tokens: Sequence[int], source: KVCache, row: int) -> None:
        """Keep row `row` of `source`, the K and V of these tokens."""
        key = tuple(tokens[: source.lengths[row]])
        if len(key) < 2 or len(key) * source.position_nbytes > self._most:
            return
        for known in [known for known in self._kept if key[: len(known)] == known]:  # what this one begins with
            self._drop(known)
        cache = source.alone(row)
        self._kept[key] = cache
        self.nbytes += cache.nbytes
        while self.nbytes > self._most and self._kept:
            self._drop(next(iter(self._kept)))

    def restore(self, session: Session, ids: Sequence[int] | TokenIds) -> int:
        """Make `session` hold as much as is known of a prompt and `Session.rewind_to` would keep; returns how many
        tokens that are.
        """
        session.rewind_to(ids)
        best, length = None, len(session.tokens)
        for known in self._kept:
            same = next((at for at, (one, other) in enumerate(zip(known, ids, strict=False)) if one != other), None)
            common = whole_tiles(min(len(known) if same is None else same, len(ids) - 2))
            if common > length:
                best, length = known, common
        if best is not None:
            self._kept.move_to_end(best)
            session.adopt(best[:length], self._kept[best])
        return length

    def _drop(self, key: tuple[int, ...]) -> None:
        self.nbytes -= self._kept.pop(key).nbytes
