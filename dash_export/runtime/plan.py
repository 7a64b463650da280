"""A rule worked out ahead for the decode loop.

Between engines the caches are cold, and there Python costs several times what it costs in a loop. So a rule that
decodes more than one token is turned into what the loop does with it: launches one after the other, or comparisons and
what they choose. That was worth 1.2 % of a dense int4 token of SmolLM2-135M, and half a per cent under a policy.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action, DecisionRule
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.rules import Actions, FixedRule, Rule
from dash_export.stretches import LONGEST_STRETCH, Part, cover, lengths

_INFINITY = 0x7F800000
"""Of a float32, in bits."""


@dataclass(frozen=True)
class BoundStretch:
    """One launch for this segment and those after it, `count` in all, where all of them run or (`skips`) are
    skipped.
    """

    count: int
    skips: bool
    launch: Launch


@dataclass(frozen=True)
class BoundSegment:
    """One segment's launches. `layer` is the gated layer, or -1 for a segment that always runs `count` layers.
    `stretches` begin with it.
    """

    layer: int
    count: int
    run: Launch
    skip: Launch | None
    policy: Launch | None
    output: npt.NDArray[np.float32]
    stretches: tuple[BoundStretch, ...] = ()


Answer = tuple[tuple[Launch, ...], tuple[int, ...]]
"""What is launched, and the layers that are skipped."""


class Answers(dict[int, Answer]):
    """Mask of skipped layers -> what follows: of segments that are decided at once.

    Masks come by the hundred, and one in seven is new after 500 tokens (4 of 14 layers skipped). Nothing is to be
    worked out between engines: so the segments are cut into blocks, each no longer than a stretch and begun where one
    that runs begins, whose every mask is known.
    """

    KEPT = 1024

    def __init__(self, segments: Sequence[BoundSegment]) -> None:
        """The bits of a mask mean the gated layers among them, from the lowest on."""
        super().__init__()
        blocks: list[list[BoundSegment]] = []
        for segment in segments:
            full = blocks and sum(other.skip is not None for other in blocks[-1]) == LONGEST_STRETCH
            if not blocks or full or any(not stretch.skips for stretch in segment.stretches):
                blocks.append([])
            blocks[-1].append(segment)
        self._tables = [_table(block) for block in blocks]

    def __missing__(self, mask: int) -> Answer:
        launches: tuple[Launch, ...] = ()
        skipped: tuple[int, ...] = ()
        rest = mask
        for table in self._tables:
            more, layers = table[rest % len(table)]
            launches, skipped, rest = launches + more, skipped + layers, rest // len(table)
        if len(self) >= self.KEPT:
            del self[next(iter(self))]
        self[mask] = launches, skipped
        return launches, skipped


def _table(segments: Sequence[BoundSegment]) -> list[Answer]:
    """By mask."""
    layers = [segment.layer for segment in segments]
    gated = [segment.layer for segment in segments if segment.skip is not None]
    stretches = {
        (segment.layer, stretch.skips, stretch.count): stretch.launch
        for segment in segments
        for stretch in segment.stretches
    }
    known = lengths(stretches)

    def launch(part: Part) -> Launch:
        segment = segments[part.index]
        alone = segment.skip if part.skips else segment.run
        found = stretches.get((segment.layer, part.skips, part.count), alone)
        assert found is not None
        return found

    answers = []
    for mask in range(1 << len(gated)):
        skipped = tuple(layer for bit, layer in enumerate(gated) if mask >> bit & 1)
        answers.append((tuple(launch(part) for part in cover(layers, skipped, known)), skipped))
    return answers


@dataclass(frozen=True)
class Stage:
    """A decision point: the policies that are engines of their own, what always runs before anything is decided, and
    what follows from all that is decided then. `asked`: a gated layer, its bit in a mask, and how many layers always
    run between the one before and it; `after` the last one. `ran`: layers that `before` runs.
    """

    policies: tuple[Launch, ...]
    before: tuple[Launch, ...]
    ran: int
    asked: tuple[tuple[int, int, int], ...]
    after: int
    answers: Answers


@dataclass(frozen=True)
class FixedPlan:
    """What a token launches, and the actions [layers] that this means."""

    launches: tuple[Launch, ...]
    actions: Actions
    executed: int


Choice = tuple[int, int, float]
"""A layer's bit in a mask, where its score (of a linear policy, else its damage) stands, and the limit below which it
is skipped."""
Stake = tuple[int, float, float]
"""Where a layer's score (else its damage) stands, its limit in nats, and what its score lacks."""
Breaking = tuple[int, float, dict[int, Stake]]
"""A stretch's layers as a mask, what breaking it must save, and by a layer's bit of what that is the sum."""


class ComparingStage(NamedTuple):
    """What is launched before the scores are there; what is compared then, all of it at once, while it is in the
    caches; which stretches are broken only where that pays; and what follows from it.
    """

    before: tuple[Launch, ...]
    choices: tuple[Choice, ...]
    breaking: tuple[Breaking, ...]
    answers: Answers


@dataclass(frozen=True)
class ComparingPlan:
    """A rule that is a limit per layer, stage by stage."""

    stages: tuple[ComparingStage, ...]


Plan = FixedPlan | ComparingPlan


class Plans:
    """The plans of one step, of the rules it saw last. The first token of a rule that decides is decoded
    without: a held budget has another one for every token.
    """

    KEPT = 256

    def __init__(self, num_layers: int, score_bias: Mapping[int, float], points: Mapping[int, Sequence[int]]) -> None:
        """`points`: the layers that are decided together. Scores stand in their order, damages by layer."""
        self._num_layers, self._score_bias = num_layers, score_bias
        decided = [layer for layers in points.values() for layer in layers]
        self._index = {layer: place for place, layer in enumerate(decided)} if score_bias else range(num_layers)
        self._firsts = {layers[0] for layers in points.values()}
        # With what they are of, so that no other object gets its id.
        self._stages: dict[int, tuple[object, tuple[Stage, ...]]] = {}
        self._known: dict[tuple[Hashable, int], tuple[object, object, Plan | None]] = {}

    def stages(self, segments: Sequence[BoundSegment]) -> tuple[Stage, ...]:
        """What a token is made of, whatever decides."""
        known = self._stages.get(id(segments))
        if known is None:
            known = self._stages[id(segments)] = segments, self._staged(segments)
            if len(self._stages) > self.KEPT:
                del self._stages[next(iter(self._stages))]
        return known[1]

    def _staged(self, segments: Sequence[BoundSegment]) -> tuple[Stage, ...]:
        groups: list[list[BoundSegment]] = [[]]
        for segment in segments:
            if segment.layer in self._firsts or segment.policy is not None:
                groups.append([])
            groups[-1].append(segment)
        stages = []
        for group in groups:
            first = next((at for at, segment in enumerate(group) if segment.skip is not None), len(group))
            before, those = group[:first], group[first:]
            asked: list[tuple[int, int, int]] = []
            between = 0
            for segment in those:
                if segment.skip is None:
                    between += segment.count
                else:
                    asked.append((segment.layer, 1 << len(asked), between))
                    between = 0
            stages.append(
                Stage(
                    tuple(segment.policy for segment in group[:1] if segment.policy is not None),
                    tuple(segment.run for segment in before),
                    sum(segment.count for segment in before),
                    tuple(asked),
                    between,
                    Answers(those),
                )
            )
        return tuple(stages)

    def plan(self, rule: Rule, segments: Sequence[BoundSegment]) -> Plan | None:
        """None where the rule has to be asked."""
        key = (rule.skipped if isinstance(rule, FixedRule) else id(rule), id(segments))
        known = self._known.get(key)
        if known is not None and known[2] is not None:
            return known[2]
        made = self._make(rule, segments) if known is not None or isinstance(rule, FixedRule) else None
        self._known[key] = (rule, segments, made)
        if len(self._known) > self.KEPT:
            del self._known[next(iter(self._known))]
        return made

    def _make(self, rule: Rule, segments: Sequence[BoundSegment]) -> Plan | None:
        stages = self.stages(segments)
        if isinstance(rule, FixedRule):
            return self._fixed(rule, stages)
        # As long as no ceiling can be reached; a layer's is above the number of layers before it.
        if not isinstance(rule, DecisionRule) or any(
            ceiling <= layer for layer, ceiling in enumerate(rule.ceilings) if rule.gated[layer]
        ):
            return None
        limits = dict(enumerate(rule.limits)) | score_limits(rule.limits, self._score_bias)
        return ComparingPlan(
            tuple(
                ComparingStage(
                    stage.policies + stage.before,
                    tuple((bit, self._index[layer], limits[layer]) for layer, bit, _ in stage.asked),
                    self._breaking(rule, {layer: bit for layer, bit, _ in stage.asked}),
                    stage.answers,
                )
                for stage in stages
            )
        )

    def _breaking(self, rule: DecisionRule, bits: Mapping[int, int]) -> tuple[Breaking, ...]:
        """Of the rule's stretches among these layers."""
        bias = self._score_bias
        return tuple(
            (
                sum(bits[layer] for layer in layers),
                price,
                {bits[layer]: (self._index[layer], rule.limits[layer], bias.get(layer, 0.0)) for layer in layers},
            )
            for layers, price in rule.breaking
            if layers[0] in bits
        )

    def _fixed(self, rule: FixedRule, stages: Sequence[Stage]) -> FixedPlan:
        """Nobody is asked, so policies are not run."""
        launches: list[Launch] = []
        actions = np.full(self._num_layers, Action.RUN, np.int8)
        for stage in stages:
            found, skipped = stage.answers[sum(bit for layer, bit, _ in stage.asked if layer in rule.skipped)]
            launches += [*stage.before, *found]
            actions[list(skipped)] = Action.SKIP
        return FixedPlan(tuple(launches), actions, self._num_layers - int((actions == Action.SKIP).sum()))


def score_limits(limits: Sequence[float], bias: Mapping[int, float]) -> dict[int, float]:
    """Per biased layer the lowest score whose damage is not below the limit: softplus(score + bias), in float64 and
    rounded to float32, as a teacher-forced pass has it, so that the two never decide a tie differently.
    """
    layers = list(bias)
    wanted, offsets = np.array([limits[layer] for layer in layers]), np.array([bias[layer] for layer in layers])
    # float32 numbers in ascending order have ascending bits, if negative ones are counted down.
    low, high = np.full(len(layers), -_INFINITY), np.full(len(layers), _INFINITY)
    while (low < high).any():
        middle = (low + high) >> 1
        damage = np.logaddexp(0.0, _float32(middle).astype(np.float64) + offsets).astype(np.float32)
        below = damage.astype(np.float64) < wanted
        low, high = np.where(below & (low < high), middle + 1, low), np.where(below, high, middle)
    return dict(zip(layers, _float32(low).tolist(), strict=True))


def _float32(order: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    bits = np.where(order >= 0, order, (1 << 31) - order)
    return bits.astype(np.uint32).view(np.float32)
