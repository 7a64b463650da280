"""Score a text as decode under the policy would see it; read a prompt, with the results of each of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from dash_export.backends.host.cache import pass_length
from dash_export.core.divergence import nll
from dash_export.core.rule import DENSE, ForcedRule
from dash_export.core.sampling import TokenIds
from dash_export.core.units import DENSE_POSITIONS, Actions, unit_skips
from dash_export.errors import PolicyError, RequestError
from dash_export.runtime.results import Score, check_room

if TYPE_CHECKING:
    from dash_export.backends.cuda.step import DeviceStep
    from dash_export.backends.host.decode import BoundStep
    from dash_export.runtime.session import Session

ROWS = 128
"""Most tokens of a pass, which keeps the logits of all: 128 of a 50k vocabulary are 25 MB."""


def score(session: Session, tokens: TokenIds, prefix: int, actions: Actions | None, keep_logits: bool) -> Score:
    """Do `Session.score` for checked token ids [n]."""
    mixes = session.engines.mixes
    if prefix < 1:
        raise RequestError(f"prefix must be at least 1, not {prefix}.")
    shape = (len(tokens), session.engines.model.num_layers)
    forced = None
    if actions is not None:
        if np.shape(actions) != shape or not np.isin(actions, (0, 1)).all():
            raise PolicyError(f"actions must be {list(shape)}, tokens and layers, each 0 (run) or 1 (skip).")
        forced = unit_skips(np.asarray(actions, np.int8), session.engines.units)
    check_room(len(tokens), 0, session.engines.model.max_positions)
    session.reset()
    session.reserve(len(tokens))
    prompt = max(prefix, DENSE_POSITIONS) if forced is None else 0
    chunk = min(session.chunk, ROWS) if mixes else 1
    parts, logits = [], []
    try:
        for start in range(0, len(tokens), chunk):
            part, following = tokens[start : start + chunk], tokens[start + 1 : start + 1 + chunk]
            rule = session.rules.calibrated if forced is None else ForcedRule(forced[:, start : start + chunk])
            dense = np.arange(start, start + len(part)) < prompt
            step = session.bound(len(part), mixes)
            if mixes:
                cast("BoundStep", step).teacher_force(part, rule, dense)
            else:
                step.decode(int(part[0]), DENSE if dense[0] else rule)
            session.tokens.extend(part.tolist())
            likelihoods = (-nll(step.logits[0], following)).astype(np.float32)
            greedy = step.logits[0, : len(following)].argmax(axis=-1) == following
            parts.append((likelihoods, greedy, session.actions_of(step), step.damage.T.copy()))
            if keep_logits:
                logits.append(step.logits[0].copy())
    finally:
        session.reset()  # the cache holds K and V of skips: no prompt may continue on them as if they were dense
    likelihoods, greedy, taken, damages = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Score(likelihoods, greedy, taken, damages, np.concatenate(logits) if keep_logits else None)


def read_length(session: Session, left: int) -> int:
    """Return how many tokens of a prompt `read` takes at a time, of `left`."""
    return pass_length(left, min(session.chunk, ROWS)) if session.engines.mixes else 1


def read(session: Session, tokens: TokenIds) -> BoundStep | DeviceStep:
    """Prefill tokens [n], n by `read_length`, as a session does, densely and in one pass. Return the step, whose logits
    [1, n, vocab] and final states [1, n, hidden] are those of all tokens, and valid until the next one.
    """
    session.reserve(len(tokens))
    step = session.bound(len(tokens), session.engines.mixes)
    step.prefill(tokens)
    session.tokens.extend(tokens.tolist())
    session.state = None if step.final_state is None else step.final_state[0, -1]
    return step
