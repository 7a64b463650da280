"""A scheduler's prompts, pass by pass. What is known of one is not computed again, unless something is wanted of it."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from dash_export.backends.host.cache import KVCache, whole_tiles
from dash_export.core.sampling import Logits, TokenIds, most_likely
from dash_export.runtime.results import Turn
from dash_export.runtime.scoring import read, read_length
from dash_export.runtime.session import Session
from dash_export.serve.tickets import Ticket


class Prefixes:
    """Cache of the K and V of the last prompts, by token ids: `most_bytes` in all. For one thread."""

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
        """Make `session` hold the longest known prefix of the prompt `ids`, in whole tiles; return its length."""
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


def begin(ticket: Ticket, session: Session, prefixes: Prefixes) -> Turn:
    """Return the turn of a ticket, whose prompt `session` will hold; it holds what `ticket.known` says."""
    asked = ticket.request
    after = int(ticket.ids[-1]) if asked.continues else None
    turn = ticket.turn = Turn(session.text, asked.sampling, ticket.max_tokens, len(ticket.ids), ticket.guide, after)
    if asked.reading is None:
        ticket.known = prefixes.restore(session, ticket.ids)
    else:
        session.reset()
    return turn


def next_part(ticket: Ticket, session: Session) -> TokenIds:
    """Return the tokens of the prompt's next pass."""
    done = len(session.tokens)
    left = len(ticket.ids) - done
    size = session.next_pass_length(left) if ticket.request.reading is None else read_length(session, left)
    return ticket.ids[done : done + size]


def prefill(ticket: Ticket, session: Session, part: TokenIds) -> Logits:
    """Prefill a part, note in the ticket what is wanted of it, and return the logits [vocab] after its last token."""
    reading, done = ticket.request.reading, len(session.tokens)
    if reading is None:
        return session.prefill(part)
    step = read(session, part)
    rows: Logits = step.logits[0]
    if reading.logprobs is not None:
        following = ticket.ids[done + 1 : done + 1 + len(part)].tolist()
        pairs = zip(rows, following, strict=False)  # nothing follows the last one
        ticket.likely += [most_likely(row, token, reading.logprobs) for row, token in pairs]
    if reading.pooling is not None:
        assert step.final_state is not None
        states = step.final_state[0].astype(np.float64)
        ticket.state = states[-1] if reading.pooling == "last" else ticket.state + states.sum(axis=0) / len(ticket.ids)
    last: Logits = rows[-1]
    return last
