"""The protocol: lanes (a build at a setting) decode the same known tokens in turn, every other token with a probe on.

A round is one window of text: prefill to the context, some tokens to settle, then the timed ones. Rounds come in pairs
on the same window, and the second has the probe on the tokens that went bare in the first: every token is seen both
ways, so the probe's own cost is told from pairs that did the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Action, Skips, Unit, layer_actions
from dash_export.errors import RequestError
from dash_export.evaluation.settings import Entrant
from dash_export.profiling.probe import Probe, Stamps
from dash_export.runtime import DashRuntime, Session
from dash_export.runtime.decode import BoundStep
from dash_export.runtime.sampling import Sampler, Sampling
from dash_export.runtime.text import TextStream

TokenIds = npt.NDArray[np.int64]
SETTLE = 2
"""First tokens of a block, not timed: they find another lane's weights in the caches."""


@dataclass(frozen=True)
class TokenStamps:
    """One probed token: when its step began, when decode had returned and when the next token was chosen (ns), what lay
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


@dataclass
class Recording:
    """What a lane did. `first` ns [rounds]: from the prompt to its first token. `wall` ns [rounds, tokens]; `actions`
    int8 [windows, SETTLE + tokens, layers]; `decoded` the known tokens of the first window; `probed` (round, token) ->
    stamps.
    """

    first: npt.NDArray[np.int64]
    wall: npt.NDArray[np.int64]
    actions: npt.NDArray[np.int8]
    decoded: list[int]
    probed: dict[tuple[int, int], TokenStamps] = field(default_factory=dict)

    @property
    def bare(self) -> npt.NDArray[np.bool_]:
        """Which tokens had no probe, [rounds, tokens]."""
        bare = np.ones(self.wall.shape, np.bool_)
        for where in self.probed:
            bare[where] = False
        return bare

    @property
    def layers(self) -> npt.NDArray[np.int64]:
        """Layers run, [windows, tokens]."""
        ran: npt.NDArray[np.int64] = (self.actions[:, SETTLE:] == Action.RUN).sum(axis=-1)
        return ran


@dataclass
class Lane:
    """An entrant and what it did."""

    entrant: Entrant
    recording: Recording = field(init=False)
    trace: list[TokenStamps] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session: Session = self.entrant.session()
        self._probe: Probe | None = None

    @property
    def runtime(self) -> DashRuntime:
        return self.entrant.runtime

    @property
    def units(self) -> Sequence[Unit]:
        return self.runtime.bundle.manifest.policy.units

    def probe(self, step: BoundStep) -> Probe:
        """The step's: made once, for what a step has worked out for timed launches."""
        if self._probe is None or self._probe.step is not step:
            self._probe = Probe(step)
        return self._probe

    def actions(self, skipped: Skips) -> npt.NDArray[np.int8]:
        """skipped [units, tokens] -> [tokens, layers]."""
        return layer_actions(skipped, self.units, self.runtime.engines.model.num_layers)


def measure(
    lanes: Sequence[Lane],
    parts: Sequence[TokenIds],
    tokens: int,
    rounds: int,
    traced: int,
    progress: Progress = no_progress,
) -> None:
    """Fills every lane's recording, and its trace with `traced` tokens in a row.

    `parts`: windows of equal length, a context, SETTLE tokens and the `tokens` timed ones.
    """
    total = len(lanes) * (len(parts) + rounds)
    for lane in lanes:
        layers = lane.runtime.engines.model.num_layers
        lane.recording = Recording(
            np.zeros(rounds, np.int64),
            np.zeros((rounds, tokens), np.int64),
            np.zeros((len(parts), SETTLE + tokens, layers), np.int8),
            parts[0][-SETTLE - tokens :].tolist(),
        )
    # Every window once, for warm engines and bindings.
    for window, part in enumerate(parts):
        for index, lane in enumerate(lanes):
            block = _Block(lane, part, tokens)
            for at in range(SETTLE + tokens):
                lane.recording.actions[window, at] = block.decode(at, probed=False)[1]
            progress("warm-up", window * len(lanes) + index + 1, total)
    for number in range(rounds):
        part = parts[number // 2 % len(parts)]
        # In another order every round: nobody always follows the same one.
        for turn, lane in enumerate(Random(number).sample(lanes, len(lanes))):
            _round(lane, part, tokens, number)
            progress("decoding", len(lanes) * (len(parts) + number) + turn + 1, total)
    for lane in lanes:
        block = _Block(lane, parts[0], tokens)
        for at in range(SETTLE + min(traced, tokens)):
            block.decode(at, probed=at >= SETTLE)
        lane.trace = block.stamps


def _round(lane: Lane, part: TokenIds, tokens: int, number: int) -> None:
    recording = lane.recording
    block = _Block(lane, part, tokens)
    recording.first[number] = block.first
    for at in range(SETTLE):
        block.decode(at, probed=False)
    for at in range(tokens):
        probed = (at + number) % 2 == 1
        recording.wall[number, at] = block.decode(SETTLE + at, probed)[0]
        if probed:
            recording.probed[number, at] = block.stamps[-1]


class _Block:
    """One window under one lane: prefilled when it is made, then decoded token by token."""

    def __init__(self, lane: Lane, part: TokenIds, tokens: int) -> None:
        self._lane = lane
        self._session = session = lane.session
        self._ids = part.tolist()
        self._start = len(part) - SETTLE - tokens
        session.reset()
        self._sampler, self._text = Sampler(Sampling()), TextStream(session.text.tokenizer)
        began = perf_counter_ns()
        logits = session.prefill(part[: self._start])
        self._text.push(self._sampler(logits, session.tokens))
        self.first = perf_counter_ns() - began
        step = session.decode_step(SETTLE + tokens)
        if not isinstance(step, BoundStep):
            raise RequestError(
                "profile times launches that have ended when they return: CPU targets. Of a GPU target "
                "`polygraphy run --dash` and tools/bench/gpu.py time whole steps."
            )
        self._step = step
        self._probe = lane.probe(step)
        self.stamps: list[TokenStamps] = []

    def decode(self, at: int, probed: bool) -> tuple[int, npt.NDArray[np.int8]]:
        """The `at`-th token of the block: nanoseconds from its step's begin to the next token's choice, and its actions
        [layers]. What the session would choose is chosen, and then the known token is taken instead.
        """
        session, step = self._session, self._step
        token, position = self._ids[self._start + at], self._start + at
        began = perf_counter_ns()
        if probed:
            with self._probe.on(session.rule) as rule:
                step.decode(token, rule)
        else:
            step.decode(token, session.rule)
        session.rules.decoded(step.skipped)
        session.tokens.append(token)
        decoded = perf_counter_ns()
        self._text.push(self._sampler(step.logits[0, 0], session.tokens))
        ended = perf_counter_ns()
        if probed:
            damage, skipped = step.damage[:, 0].copy(), step.skipped[:, 0].copy()
            stamps = self._probe.take()
            self.stamps.append(TokenStamps(token, position, began, decoded, ended, stamps, damage, skipped))
        return ended - began, self._lane.actions(step.skipped)[0]
