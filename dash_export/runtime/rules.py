"""Where the actions of a token come from. A rule answers one token (`skips`) and many at once (`decide`); a session's
rules may change from token to token (`SessionRules`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, log
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dash_export.decision import DENSE_POSITIONS, Action, Damages, DecisionRule
from dash_export.stretches import TokenTime

Counts = npt.NDArray[np.int64]
Actions = npt.NDArray[np.int8]


class Rule(Protocol):
    """`executed` is how many layers the token has run so far. `asks`: whether damage means anything to it; on a device
    a policy that nobody asks is not run. `settled`: damage [layers, tokens] as it is to be asked with, where layers are
    decided together.
    """

    @property
    def asks(self) -> bool: ...

    def settled(self, damage: Damages) -> Damages: ...

    def skips(self, layer: int, damage: float, executed: int) -> bool: ...

    def decide(self, layer: int, damage: Damages, executed: Counts) -> Actions: ...


class _KnownRule:
    """Whatever the damage."""

    def settled(self, damage: Damages) -> Damages:
        return damage


class FixedRule(_KnownRule):
    """Actions known beforehand: `dense` (no layer), `static` (a set of layers)."""

    asks = False

    def __init__(self, skipped: Iterable[int] = ()) -> None:
        self.skipped = frozenset(skipped)

    def skips(self, layer: int, damage: float, executed: int) -> bool:  # noqa: ARG002
        return layer in self.skipped

    def decide(self, layer: int, damage: Damages, executed: Counts) -> Actions:  # noqa: ARG002
        return np.full(executed.shape, Action.SKIP if layer in self.skipped else Action.RUN, np.int8)


class ForcedRule(_KnownRule):
    """Actions given per token and layer, int8 [tokens, layers]: for comparing with the oracle, damage and all."""

    asks = True

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    def skips(self, layer: int, damage: float, executed: int) -> bool:  # noqa: ARG002
        return bool(self._actions[0, layer] == Action.SKIP)

    def decide(self, layer: int, damage: Damages, executed: Counts) -> Actions:  # noqa: ARG002
        return self._actions[:, layer]


DENSE = FixedRule()


class SessionRules:
    """The rule of every token of one session; here it is always the same one.

    The session tells what happens. Whatever it remembers is one session's, so every session needs an object of its own.
    """

    reads_prompts = False
    """Whether `read` wants the damage of prompts."""
    foreseeable = True
    """Whether a teacher-forced pass can know the rule of a token before the tokens ahead of it are decided."""

    def __init__(self, rule: Rule = DENSE) -> None:
        self.rule = rule

    def at(self, position: int, count: int) -> Rule:  # noqa: ARG002
        """The rule of `count` tokens from `position` on."""
        return self.rule

    def read(self, position: int, damage: Damages) -> None:
        """A prompt's tokens from `position` on ran densely: their damage [tokens, layers]."""

    def decoded(self, actions: Actions) -> None:
        """A token was decoded with these actions [layers]."""

    def rewind(self, length: int) -> None:
        """Tokens from position `length` on are forgotten."""


class RandomRules(SessionRules):
    """Each gated layer is skipped with one probability, drawn anew at every position: what a policy must beat.

    The draws follow from seed and position alone, so that decode and a teacher-forced pass agree.
    """

    def __init__(self, num_layers: int, gated: Iterable[int], probability: float, seed: int) -> None:
        super().__init__()
        self._limits = np.zeros(num_layers)
        self._limits[list(gated)] = probability
        self._seed = seed

    def at(self, position: int, count: int) -> Rule:
        draws = [
            np.random.Generator(np.random.Philox(key=[self._seed, where])).random(len(self._limits))
            for where in range(position, position + count)
        ]
        skipped = np.array(draws) < self._limits
        if count == 1:
            return FixedRule(np.flatnonzero(skipped[0]).tolist())
        return ForcedRule(np.where(skipped, Action.SKIP, Action.RUN).astype(np.int8))


class SequenceRules(SessionRules):
    """One set of layers per prompt: the token policy's damage, averaged over the prompt, decides once for all that
    follows.

    The conversation's prompt tokens are pooled, answers and the first positions (which are never skipped, so that
    their damage means nothing) left out. Without any, nothing is skipped.
    """

    reads_prompts = True

    def __init__(self, rule: DecisionRule) -> None:
        super().__init__()
        self._decision = rule
        self._pool: list[tuple[int, Damages]] = []

    def read(self, position: int, damage: Damages) -> None:
        first = max(position, DENSE_POSITIONS)
        self._pool.append((first, damage[first - position :]))
        self._choose()

    def rewind(self, length: int) -> None:
        self._pool = [(first, damage[: max(0, length - first)]) for first, damage in self._pool]
        self._choose()

    def _choose(self) -> None:
        self._pool = [part for part in self._pool if len(part[1])]
        if not self._pool:
            self.rule = DENSE
            return
        mean = np.concatenate([damage for _, damage in self._pool]).mean(axis=0, dtype=np.float64)
        skipped: list[int] = []
        for layer, damage in enumerate(self._decision.settled(mean[:, None])[:, 0].tolist()):
            if self._decision.skips(layer, damage, layer - len(skipped)):
                skipped.append(layer)
        self.rule = FixedRule(skipped)


HOLD_GAIN = 0.5
"""How much the logarithm of the trade-off moves per dense token time that was spent too much or too little: settles
within some tens of tokens, and moves a few per cent per token."""
HOLD_RANGE = 16.0
"""The trade-off stays within this factor of the calibrated one, whatever the text."""


class HeldRules(SessionRules):
    """A token policy whose running mean time is held at the budget: integral feedback on the trade-off's logarithm.

    Time is that of the cost table, as a fraction of dense, so that the same text gets the same actions in a new
    conversation; what an answer took that was rewound stays counted. The integral of (time - budget) is bounded by
    HOLD_RANGE: what cannot be reached is not piled up.
    """

    foreseeable = False

    def __init__(self, rule: DecisionRule, token_time: TokenTime, budget: float) -> None:
        super().__init__(rule)
        self._calibrated = rule
        self._token_time = token_time
        self._budget = budget
        self._log_scale = 0.0

    def decoded(self, actions: Actions) -> None:
        time = self._token_time.of(np.flatnonzero(actions).tolist())
        bound = log(HOLD_RANGE)
        self._log_scale = min(bound, max(-bound, self._log_scale + HOLD_GAIN * (time - self._budget)))
        self.rule = self._calibrated.scaled(exp(self._log_scale))

    def rewind(self, length: int) -> None:
        if length == 0:
            self._log_scale = 0.0
            self.rule = self._calibrated
