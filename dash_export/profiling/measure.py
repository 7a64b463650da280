"""The protocol: lanes (a bundle at a setting) decode the same known tokens in turn, every other token with a probe on.

A round is one window of text: prefill to the context, two tokens to settle, then the timed ones. Rounds come in pairs
on the same window, and the second has the probe on the tokens that went bare in the first: every token is seen both
ways, so the probe's own cost is told from pairs that did the same work.

Pairs also alternate between copies of the engines: where weights happen to lie in memory is worth a per cent or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Action, Setting
from dash_export.errors import RequestError
from dash_export.evaluation.timing import SETTLE
from dash_export.profiling.probe import Probe, Stamps
from dash_export.runtime import DashRuntime, Session
from dash_export.runtime.dispatch import BoundStep
from dash_export.runtime.rules import DENSE, FixedRule, Rule, SessionRules
from dash_export.runtime.sampling import Sampler, Sampling
from dash_export.runtime.text import TextStream

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenStamps:
    """One probed token: when its step began, when decode had returned and when the next token was chosen (ns), the
    launches between (in a trace the decisions too), and what the policy said, damage float32 [layers].
    """

    token: int
    position: int
    began: int
    decoded: int
    ended: int
    stamps: Stamps
    actions: npt.NDArray[np.int8]
    damage: npt.NDArray[np.float32]


@dataclass
class Recording:
    """What a lane did. `first` ns [rounds]: from the prompt to its first token. `wall` ns and `executed` (layers run)
    [rounds, tokens]; `actions` int8 [windows, SETTLE + tokens, layers]; `copies` of the engines that pairs of rounds
    took in turn; `decoded` the known tokens of the first window; `probed` (round, token) -> stamps.
    """

    first: npt.NDArray[np.int64]
    wall: npt.NDArray[np.int64]
    executed: npt.NDArray[np.int64]
    actions: npt.NDArray[np.int8]
    copies: int
    decoded: list[int]
    probed: dict[tuple[int, int], TokenStamps] = field(default_factory=dict)

    @property
    def bare(self) -> npt.NDArray[np.bool_]:
        """Which tokens had no probe, [rounds, tokens]."""
        bare = np.ones(self.wall.shape, np.bool_)
        for where in self.probed:
            bare[where] = False
        return bare

    def copy(self, number: int) -> npt.NDArray[np.bool_]:
        """The rounds [rounds] that took this copy of the engines."""
        rounds: npt.NDArray[np.bool_] = np.arange(len(self.wall)) // 2 % self.copies == number
        return rounds


@dataclass
class Lane:
    """A bundle at a setting. With `replays`, this lane repeats what another lane decided, through engines that hold no
    policy: the difference is what the policy costs where it is fused into engines. `runtimes` hold copies of the same
    engines, with a session each.
    """

    name: str
    setting: Setting
    runtimes: Sequence[DashRuntime]
    sessions: Sequence[Session]
    replays: Lane | None = None
    recording: Recording = field(init=False)
    trace: list[TokenStamps] = field(default_factory=list)
    _probes: dict[BoundStep, Probe] = field(default_factory=dict)

    @property
    def runtime(self) -> DashRuntime:
        """The first copy, for the facts that all share."""
        return self.runtimes[0]

    def probe(self, step: BoundStep) -> Probe:
        """One for each step: what a step has worked out for timed launches is worked out once."""
        if step not in self._probes:
            self._probes[step] = Probe(step)
        return self._probes[step]


class Replay(SessionRules):
    """Actions known per token, from `start` on."""

    def __init__(self) -> None:
        super().__init__()
        self._start = 0
        self._rules: list[FixedRule] = []

    def load(self, start: int, actions: npt.NDArray[np.int8]) -> None:
        """actions int8 [tokens, layers], of the tokens from position `start` on."""
        self._start = start
        self._rules = [FixedRule(np.flatnonzero(row == Action.SKIP).tolist()) for row in actions]

    def at(self, position: int, count: int) -> Rule:  # noqa: ARG002
        return self._rules[position - self._start] if position >= self._start else DENSE


def replay_of(lane: Lane, plain: Sequence[DashRuntime]) -> Lane:
    """The lane that repeats `lane` through the engines of `plain`, copy by copy."""
    return Lane(lane.name, lane.setting, plain, [runtime.session_under(Replay()) for runtime in plain], lane)


def measure(
    lanes: Sequence[Lane],
    parts: Sequence[TokenIds],
    tokens: int,
    rounds: int,
    traced: int,
    progress: Progress = no_progress,
) -> None:
    """Fills every lane's recording, and its trace with `traced` tokens in a row. A replaying lane comes after its
    original.

    `parts`: windows of equal length, a context, SETTLE tokens and the `tokens` timed ones.
    """
    copies = len(lanes[0].sessions)
    warming = max(len(parts), copies)
    total = len(lanes) * (warming + rounds)
    for lane in lanes:
        layers = lane.runtime.engines.model.num_layers
        lane.recording = Recording(
            np.zeros(rounds, np.int64),
            np.zeros((rounds, tokens), np.int64),
            np.zeros((rounds, tokens), np.int64),
            np.zeros((len(parts), SETTLE + tokens, layers), np.int8),
            copies,
            parts[0][-SETTLE - tokens :].tolist(),
        )
    # Every window and copy once, for warm engines and bindings; it also tells the actions that the replaying lanes
    # repeat.
    for number in range(warming):
        window = number % len(parts)
        for index, lane in enumerate(lanes):
            block = _Block(lane, number % copies, parts[window], tokens, window)
            lane.recording.actions[window] = [block.decode(at, probed=False)[2] for at in range(SETTLE + tokens)]
            progress("warm-up", number * len(lanes) + index + 1, total)
    for number in range(rounds):
        window = number // 2 % len(parts)
        # In another order every round: nobody always follows the same one.
        for turn, lane in enumerate(Random(number).sample(lanes, len(lanes))):
            _round(lane, parts[window], tokens, number, window)
            progress("decoding", len(lanes) * (warming + number) + turn + 1, total)
    for lane in lanes:
        block = _Block(lane, 0, parts[0], tokens, 0)
        for at in range(SETTLE + min(traced, tokens)):
            block.decode(at, probed=at >= SETTLE, decisions=True)
        lane.trace = block.stamps


def _round(lane: Lane, part: TokenIds, tokens: int, number: int, window: int) -> None:
    recording = lane.recording
    block = _Block(lane, number // 2 % recording.copies, part, tokens, window)
    recording.first[number] = block.first
    for at in range(SETTLE):
        block.decode(at, probed=False)
    for at in range(tokens):
        probed = (at + number) % 2 == 1
        recording.wall[number, at], recording.executed[number, at], _ = block.decode(SETTLE + at, probed)
        if probed:
            recording.probed[number, at] = block.stamps[-1]


class _Block:
    """One window under one lane: prefilled when it is made, then decoded token by token."""

    def __init__(self, lane: Lane, copy: int, part: TokenIds, tokens: int, window: int) -> None:
        self._session = session = lane.sessions[copy]
        self._ids = part.tolist()
        self._start = len(part) - SETTLE - tokens
        session.reset()
        if lane.replays is not None:
            assert isinstance(session.rules, Replay)
            session.rules.load(self._start, lane.replays.recording.actions[window])
        self._sampler, self._text = Sampler(Sampling()), TextStream(session.text.tokenizer)
        began = perf_counter_ns()
        logits = session.prefill(part[: self._start])
        self._text.push(self._sampler(logits, session.tokens))
        self.first = perf_counter_ns() - began
        self._step = session.decode_step(SETTLE + tokens)
        if not isinstance(self._step, BoundStep):
            raise RequestError(
                "profile times launches that have ended when they return: CPU targets. Of a GPU target "
                "`polygraphy run --dash` and tools/bench/gpu.py time whole steps."
            )
        self._probe = lane.probe(self._step)
        self.stamps: list[TokenStamps] = []

    def decode(self, at: int, probed: bool, decisions: bool = False) -> tuple[int, int, npt.NDArray[np.int8]]:
        """The `at`-th token of the block: nanoseconds from its step's begin to the next token's choice, layers run,
        actions. What the session would choose is chosen, and then the known token is taken instead.
        """
        session, step = self._session, self._step
        token, position = self._ids[self._start + at], self._start + at
        began = perf_counter_ns()
        if probed:
            with self._probe.on(session.rule, decisions) as rule:
                executed = step.decode(token, rule)
        else:
            executed = step.decode(token, session.rule)
        session.rules.decoded(step.actions[0])
        session.tokens.append(token)
        decoded = perf_counter_ns()
        self._text.push(self._sampler(step.logits[0, 0], session.tokens))
        ended = perf_counter_ns()
        actions = step.actions[0].copy()
        if probed:
            damage = step.damage[:, 0].copy()
            self.stamps.append(TokenStamps(token, position, began, decoded, ended, self._probe.take(), actions, damage))
        return ended - began, executed, actions
