"""A rule worked out ahead for the decode loop.

Between engines the caches are cold, and there Python costs several times what it costs in a loop. So a rule that
decodes more than one token is turned into what the loop does with it: launches one after the other, or comparisons and
what they choose. That was worth 1.2 % of a dense int4 token of SmolLM2-135M, and half a per cent under a policy.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action, DecisionRule
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.rules import Actions, FixedRule, Rule
from dash_export.stretches import cover, lengths

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


@dataclass(frozen=True)
class FixedPlan:
    """What a token launches, and the actions [layers] that this means."""

    launches: tuple[Launch, ...]
    actions: Actions
    executed: int


Choice = tuple[int, int, float]
"""A bit of its own in a mask, where a layer's score (of a linear policy, else its damage) stands, and the limit below
which the layer is skipped."""


class Answers(dict[int, tuple[tuple[Launch, ...], tuple[int, ...]]]):
    """Mask of skipped layers -> what is launched, and those layers: of the segments that one state decides about."""

    KEPT = 1024

    def __init__(self, segments: Sequence[BoundSegment], layers: Sequence[int]) -> None:
        """`layers`: those that the bits of a mask mean, from the lowest on."""
        super().__init__()
        self._segments, self._layers = segments, layers

    def __missing__(self, mask: int) -> tuple[tuple[Launch, ...], tuple[int, ...]]:
        skipped = tuple(layer for bit, layer in enumerate(self._layers) if mask >> bit & 1)
        if len(self) >= self.KEPT:
            del self[next(iter(self))]
        self[mask] = answer = (launches(self._segments, skipped), skipped)
        return answer


@dataclass(frozen=True)
class ComparingPlan:
    """By decision point: what is launched before its scores are there (`sync` dispatch's policies too), what is
    compared then, all of it at once, while it is in the caches, and what follows from it.
    """

    stages: tuple[tuple[tuple[Launch, ...], tuple[Choice, ...], Answers], ...]


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
        self._known: dict[tuple[Hashable, int], tuple[object, object, Plan | None]] = {}

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
        if isinstance(rule, FixedRule):
            skipped = [segment.layer for segment in segments if segment.layer in rule.skipped]
            actions = np.full(self._num_layers, Action.RUN, np.int8)
            actions[skipped] = Action.SKIP
            return FixedPlan(launches(segments, skipped), actions, self._num_layers - len(skipped))
        # As long as no ceiling can be reached; a layer's is above the number of layers before it.
        if not isinstance(rule, DecisionRule) or any(
            ceiling <= layer for layer, ceiling in enumerate(rule.ceilings) if rule.gated[layer]
        ):
            return None
        limits = dict(enumerate(rule.limits)) | score_limits(rule.limits, self._score_bias)
        decided: list[tuple[list[Launch], list[BoundSegment]]] = [([], [])]
        for segment in segments:
            if segment.layer in self._firsts or segment.policy is not None:
                decided.append(([], []))
            before, those = decided[-1]
            if segment.policy is not None:
                before.append(segment.policy)
            if those or segment.skip is not None:
                those.append(segment)
            else:
                before.append(segment.run)
        stages = []
        for before, those in decided:
            layers = [segment.layer for segment in those if segment.layer >= 0]
            choices = ((1 << bit, self._index[layer], limits[layer]) for bit, layer in enumerate(layers))
            stages.append((tuple(before), tuple(choices), Answers(those, layers)))
        return ComparingPlan(tuple(stages))


def launches(segments: Sequence[BoundSegment], skipped: Collection[int]) -> tuple[Launch, ...]:
    """What a token that skips these layers launches."""
    stretches = {
        (segment.layer, stretch.skips, stretch.count): stretch.launch
        for segment in segments
        for stretch in segment.stretches
    }
    found = []
    for part in cover([segment.layer for segment in segments], skipped, lengths(stretches)):
        segment = segments[part.index]
        launch = stretches.get((segment.layer, part.skips, part.count), segment.skip if part.skips else segment.run)
        assert launch is not None
        found.append(launch)
    return tuple(found)


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
