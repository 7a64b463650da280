"""Cache of prompt prefixes: the K and V of the last prompts, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Sequence

from dash_export.backends.host.cache import KVCache, whole_tiles
from dash_export.core.sampling import TokenIds
from dash_export.runtime.session import Session


class Prefixes:
    """KV caches of the last prompts, by token ids, least recently used first: `most_bytes` in all. For one thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._kept = most_bytes, OrderedDict[tuple[int, ...], KVCache]()
        self.nbytes = 0

    def keep(self, tokens: Sequence[int], source: KVCache, row: int) -> None:
        """Keep a copy of row `row` of `source`, the K and V of `tokens`. The least recently used prompts make room."""
        key = tuple(tokens[: source.lengths[row]])
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        if len(key) < 2 or len(key) * source.position_nbytes > self._most:
            return
        for known in [known for known in self._kept if key[: len(known)] == known]:  # prefixes of the new prompt
            self._drop(known)
        cache = source.alone(row)
        self._kept[key] = cache
        self.nbytes += cache.nbytes
        while self.nbytes > self._most and self._kept:
            self._drop(next(iter(self._kept)))

    def restore(self, session: Session, ids: Sequence[int] | TokenIds) -> int:
        """Make `session` hold the longest known prefix of the prompt `ids`, its own or a kept one, cut as by
        `Session.rewind_to`. Return the prefix's length in tokens.
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
            session.load_prefix(best[:length], self._kept[best])
        return length

    def _drop(self, key: tuple[int, ...]) -> None:
        self.nbytes -= self._kept.pop(key).nbytes
