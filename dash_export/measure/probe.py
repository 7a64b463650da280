"""Timestamps around every engine and decision of a decoded token. Candidates decode the same known tokens in turn. A
round is one window of text: prefill to the context, some tokens to settle, then the timed ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dash_export.backends.cuda.bound import POLICY
from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.cuda.timed_step import PiecesStep
from dash_export.backends.host.decode import BoundStep
from dash_export.core.rule import skips_for
from dash_export.core.sampling import Sampler, Sampling, TokenIds
from dash_export.core.units import Damages, Skips, layer_actions
from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure.candidates import Candidate
from dash_export.measure.timing import FOUND, in_turns
from dash_export.runtime import Session
from dash_export.text.tokenizer import TextStream

DECISION, SAMPLING, WHOLE = -3, -2, -1
"""Places of a token's other stamps, after the stamps of its segments."""


class Probe:
    """Timer of a decode step on a CPU: it wraps the step's launches, and replaces the session's rule to time decisions.
    The decode loop itself is unchanged: the wrapped launches run the same engines on the same memory.
    """

    def __init__(self, step: BoundStep, session: Session) -> None:
        self.step = step
        # Begin and end of each, as plain numbers in one flat list: nothing for the garbage collector to follow.
        self.stamps = [0] * 2 * (len(step.segments) + 3)
        self.decide = self._timed(len(step.segments), lambda state: skips_for(session.rules.rule, state))
        step.segments = [
            replace(item, run=self._timed(index, item.run), bypass=item.bypass and self._timed(index, item.bypass))
            for index, item in enumerate(step.segments)
        ]

    def decode(self, token: int) -> None:
        self.step.decode(token, self)  # type: ignore[arg-type]  # a rule with `decide` needs no more

    def _timed(self, place: int, work: Callable[..., Any]) -> Callable[..., Any]:
        stamps, here = self.stamps, slice(2 * place, 2 * place + 2)

        def timed(*arguments: Any) -> Any:
            began = perf_counter_ns()
            found = work(*arguments)
            stamps[here] = began, perf_counter_ns()
            return found

        return timed


class DeviceProbe:
    """Timer of a decode step on a device, whose events say when engines ran. As a rule it times decisions."""

    def __init__(self, step: PiecesStep, session: Session) -> None:
        self.step, self._session = step, session
        self.stamps = [0] * 2 * (len(step.parts) + 3)

    @property
    def asks(self) -> bool:
        return bool(self._session.rules.rule.asks)

    def skips(self, damage: Damages) -> Skips:
        began = perf_counter_ns()
        found = self._session.rules.rule.skips(damage)
        place = 2 * len(self.step.parts)
        self.stamps[place : place + 2] = began, perf_counter_ns()
        return found

    def decode(self, token: int) -> None:
        self.step.decode(token, self)

    def read(self) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
        """Fill in the stamps of the engines that the last token ran. Return `launches` and `policy` of the token."""
        step, count = self.step, len(self.step.parts)
        launches = np.zeros((count + 1, 2), np.int64)
        for place, when in step.launched.items():
            launches[place] = when
        self.stamps[: 2 * count] = [when for place in range(count) for when in step.ran(place)]
        return launches, step.ran(POLICY) if POLICY in step.launched else (0, 0)


@dataclass
class Lane:
    """A candidate and the stamps of its timed tokens of all `rounds`.

    `ids` and `positions` [tokens]; `stamps` int64 [tokens, segments + 3, 2], begin and end (ns): of the engine that ran
    or bypassed each segment, of the decision, of sampling, and of the whole token; `skipped` bool and `damage` float32
    [tokens, units]. On a device the engines' stamps are of its own clock; `launches` [tokens, segments + 1, 2]: when
    the host launched each, the policy last (0 where it did not); `policy` [tokens, 2]: when that ran.
    """

    candidate: Candidate
    rounds: int
    ids: TokenIds
    positions: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    skipped: npt.NDArray[np.bool_]
    damage: npt.NDArray[np.float32]
    launches: npt.NDArray[np.int64] | None = None
    policy: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Compute `gated` bool [segments]; `bypassed` bool [tokens, segments]; `took`, the nanoseconds of each stamp,
        [tokens, segments + 3]; `wall`, those of whole tokens, [rounds, tokens of a round]; `actions` [tokens, layers].
        """
        runtime = self.candidate.runtime
        self.segments, self.units = runtime.build.segments, runtime.bundle.manifest.policy.units
        self.gated = np.array([segment.gated for segment in self.segments])
        self.bypassed = np.zeros((len(self.ids), len(self.segments)), np.bool_)
        self.bypassed[:, self.gated] = self.skipped
        self.took: npt.NDArray[np.int64] = self.stamps[..., 1] - self.stamps[..., 0]
        self.wall = self.took[:, WHOLE].reshape(self.rounds, -1)
        self.actions = layer_actions(self.skipped.T, self.units, runtime.engines.model.num_layers)


def measure(
    candidates: Sequence[Candidate],
    parts: Sequence[TokenIds],
    tokens: int,
    rounds: int,
    progress: Progress = no_progress,
) -> list[Lane]:
    """Return a lane per candidate. `parts`: windows of equal length: a context, FOUND tokens, then the `tokens` timed
    ones. The first round is warm-up, and dropped. On a device tokens are launched piece by piece.
    """
    on_device = [engines for one in candidates if isinstance(engines := one.runtime.engines, DeviceEngines)]
    for engines in on_device:
        engines.step_kind = PiecesStep
    try:
        rows = _decoded(candidates, parts, tokens, rounds, progress)
    finally:
        for engines in on_device:
            engines.step_kind = DeviceStep
    return [
        Lane(candidate, rounds, *(np.array(column) for column in zip(*row, strict=True)))
        for candidate, row in zip(candidates, rows, strict=True)
    ]


def _decoded(
    candidates: Sequence[Candidate], parts: Sequence[TokenIds], tokens: int, rounds: int, progress: Progress
) -> list[list[tuple[Any, ...]]]:
    sessions = [candidate.session() for candidate in candidates]
    probes: dict[int, Probe | DeviceProbe] = {}
    rows: list[list[tuple[Any, ...]]] = [[] for _ in candidates]
    for number, index in in_turns(len(candidates), 1 + rounds, progress, "decoding"):
        session, ids = sessions[index], parts[number % len(parts)]
        start = len(ids) - FOUND - tokens
        session.reset()
        sampler, text = Sampler(Sampling()), TextStream(session.text.tokenizer)
        text.push(sampler(session.prefill(ids[:start]), session.tokens))
        session.reserve(FOUND + tokens)
        step = session.bound(1)
        if index not in probes or probes[index].step is not step:
            made = Probe(step, session) if isinstance(step, BoundStep) else DeviceProbe(cast(PiecesStep, step), session)
            probes[index] = made
        probe, found = probes[index], []
        for position, token in enumerate(ids[start:].tolist(), start):
            began = perf_counter_ns()
            probe.decode(token)
            session.rules.decoded(step.skipped)
            session.tokens.append(token)
            decoded = perf_counter_ns()
            # Sampling costs its time, as in a session, but the next token is the known one.
            text.push(sampler(step.logits[0, 0], session.tokens))
            ended = perf_counter_ns()
            probe.stamps[-4:] = decoded, ended, began, ended
            others = probe.read() if isinstance(probe, DeviceProbe) else ()
            stamps = np.array(probe.stamps, np.int64).reshape(-1, 2)
            found.append((token, position, stamps, step.skipped[:, 0].copy(), step.damage[:, 0].copy(), *others))
        if number:
            rows[index] += found[FOUND:]
    return rows
