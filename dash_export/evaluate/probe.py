"""Stamps around everything that a decoded token launches and asks: lanes (a build at a setting) decode the same known
tokens in turn.

A round is one window of text: prefill to the context, some tokens to settle, then the timed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Damages, Skips, Unit, layer_actions
from dash_export.errors import RequestError
from dash_export.evaluate.candidates import Candidate
from dash_export.evaluate.timing import in_turns
from dash_export.runtime import DashRuntime, Session
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.decode import BoundSegment, BoundStep
from dash_export.runtime.sampling import Sampler, Sampling
from dash_export.runtime.text import TextStream

TokenIds = npt.NDArray[np.int64]
Stamps = npt.NDArray[np.int64]
SETTLE = 2
"""First tokens of a block, not timed: they find another lane's weights in the caches."""


class What(IntEnum):
    """What a stamp is of: an engine that runs a segment, a bypass, or the host asking the rule about the token."""

    RUN = 0
    BYPASS = 1
    DECISION = 2


class Probe:
    """Stamps around what a step does from now on. The decode loop itself is untouched: the step's launches are wrapped
    ones, which run the same engines on the same memory, and it is given this object for its rule: the session's, timed.
    """

    def __init__(self, step: BoundStep, session: Session) -> None:
        self.step, self._session = step, session
        # Four plain numbers a stamp in one flat list: nothing for the garbage collector to follow.
        self._flat: list[int] = []
        step.segments = [self._wrapped(index, item) for index, item in enumerate(step.segments)]

    @property
    def asks(self) -> bool:
        return self._session.rule.asks

    def skips(self, damage: Damages) -> Skips:
        began = perf_counter_ns()
        skipped = self._session.rule.skips(damage)
        self._flat.extend((-1, What.DECISION, began, perf_counter_ns()))
        return skipped

    def take(self) -> Stamps:
        """The stamps since the last time, in the order in which they began, int64 [stamps, 4]: segment (of a decision
        -1), What, begin and end in nanoseconds of `time.perf_counter_ns`.
        """
        found = np.array(self._flat, np.int64).reshape(-1, 4)
        self._flat.clear()
        return found

    def _wrapped(self, index: int, segment: BoundSegment) -> BoundSegment:
        bypass = None if segment.bypass is None else _stamped(segment.bypass, index, What.BYPASS, self._flat.extend)
        return replace(segment, run=_stamped(segment.run, index, What.RUN, self._flat.extend), bypass=bypass)


def _stamped(launch: Launch, segment: int, what: What, push: Callable[[tuple[int, int, int, int]], None]) -> Launch:
    def stamped() -> None:
        began = perf_counter_ns()
        launch()
        push((segment, what, began, perf_counter_ns()))

    return stamped


@dataclass(frozen=True)
class TokenStamps:
    """One token: when its step began, when decode had returned and when the next token was chosen (ns), what lay
    between, and what the policy said: damage float32 [units], skipped bool [units].
    """

    token: int
    position: int
    began: int
    decoded: int
    ended: int
    stamps: Stamps
    damage: npt.NDArray[np.float32]
    skipped: npt.NDArray[np.bool_]

    @property
    def parts(self) -> tuple[int, ...]:
        """Nanoseconds of the stamps by What, of sampling, and of the gaps: measured between stamps, not what is left of
        the wall time.
        """
        _, what, began, ended = self.stamps.T
        gaps = (began[1:] - ended[:-1]).sum() + (began[0] - self.began) + (self.decoded - ended[-1])
        return (*((ended - began)[what == each].sum() for each in What), self.ended - self.decoded, gaps)


@dataclass
class Lane:
    """A candidate and what it did: `first` ns from the prompt to its first token, a round each; `rounds` of tokens."""

    candidate: Candidate
    first: list[int] = field(default_factory=list)
    rounds: list[list[TokenStamps]] = field(default_factory=list)

    @property
    def runtime(self) -> DashRuntime:
        return self.candidate.runtime

    @property
    def units(self) -> Sequence[Unit]:
        return self.runtime.bundle.manifest.policy.units

    @property
    def tokens(self) -> list[TokenStamps]:
        """Of all rounds."""
        return [token for round_ in self.rounds for token in round_]

    @property
    def wall(self) -> npt.NDArray[np.float64]:
        """Nanoseconds [rounds, tokens]."""
        return np.array([[token.ended - token.began for token in round_] for round_ in self.rounds], np.float64)

    def actions(self, tokens: Sequence[TokenStamps]) -> npt.NDArray[np.int8]:
        """[tokens, layers]."""
        skipped = np.array([token.skipped for token in tokens], np.bool_).T
        return layer_actions(skipped, self.units, self.runtime.engines.model.num_layers)


def measure(
    lanes: Sequence[Lane], parts: Sequence[TokenIds], tokens: int, rounds: int, progress: Progress = no_progress
) -> None:
    """Fill every lane's rounds. `parts`: windows of equal length, a context, SETTLE tokens and the `tokens` timed ones.
    The first round is for warm engines and bindings, and is forgotten.
    """
    sessions = [lane.candidate.session() for lane in lanes]
    probes: dict[int, Probe] = {}
    for number, index in in_turns(len(lanes), 1 + rounds, progress, "decoding"):
        session, ids = sessions[index], parts[number % len(parts)]
        start = len(ids) - SETTLE - tokens
        session.reset()
        sampler, text = Sampler(Sampling()), TextStream(session.text.tokenizer)
        began = perf_counter_ns()
        text.push(sampler(session.prefill(ids[:start]), session.tokens))
        first = perf_counter_ns() - began
        step = session.decode_step(SETTLE + tokens)
        if not isinstance(step, BoundStep):
            raise RequestError(
                "profile times launches that have ended when they return: CPU targets. Of a GPU target "
                "`polygraphy run --dash` and tools/bench/gpu.py time whole steps."
            )
        if index not in probes or probes[index].step is not step:
            probes[index] = Probe(step, session)
        stamped = []
        for position, token in enumerate(ids[start:].tolist(), start):
            began = perf_counter_ns()
            step.decode(token, probes[index])
            session.rules.decoded(step.skipped)
            session.tokens.append(token)
            decoded = perf_counter_ns()
            # What the session would choose is chosen, and then the known token is taken instead.
            text.push(sampler(step.logits[0, 0], session.tokens))
            ended, stamps = perf_counter_ns(), probes[index].take()
            damage, skipped = step.damage[:, 0].copy(), step.skipped[:, 0].copy()
            stamped.append(TokenStamps(token, position, began, decoded, ended, stamps, damage, skipped))
        if number:
            lanes[index].first.append(first)
            lanes[index].rounds.append(stamped[SETTLE:])
