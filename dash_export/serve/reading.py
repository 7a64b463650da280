"""A scheduler's prompts, pass by pass. What is known of one is not computed again, unless something is wanted of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dash_export.core.sampling import Logits, TokenIds, most_likely
from dash_export.runtime.results import Turn
from dash_export.runtime.scoring import read, read_length
from dash_export.serve.prefixes import Prefixes
from dash_export.serve.tickets import Ticket

if TYPE_CHECKING:
    from dash_export.runtime.session import Session


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
