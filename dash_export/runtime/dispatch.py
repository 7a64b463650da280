"""The dispatcher: engines bound to fixed memory, launched conditionally, one token at a time or many.

`EngineSet` is what sessions share, `BoundStep` that bound to one cache and one number of tokens (`memory.py`). A row is
one token of one sequence: many tokens of one, or one token of each of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log1p
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action, Damages
from dash_export.runtime.backends.base import Engine, Launch, backend_errors
from dash_export.runtime.cache import KVCache
from dash_export.runtime.engines import SegmentEngines
from dash_export.runtime.memory import SKIPPED, StepMemory
from dash_export.runtime.plan import ComparingPlan, FixedPlan, Plans, Stake
from dash_export.runtime.rules import DENSE, Actions, Counts, Rule

if TYPE_CHECKING:
    from dash_export.runtime.engine_set import EngineSet

LINEAR_SCORE = 30.0
"""From here on softplus(x) is x in float32, and exp(x) may overflow."""


def _softplus(score: float) -> float:
    return log1p(exp(score)) if score < LINEAR_SCORE else score


class _RowRules:
    """One rule per row."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules

    def settled(self, damage: Damages) -> Damages:
        rows = [damage[:, row : row + 1] for row in range(len(self._rules))]
        found = [rule.settled(row) for rule, row in zip(self._rules, rows, strict=True)]
        return damage if all(one is row for one, row in zip(found, rows, strict=True)) else np.hstack(found)

    def decide(self, layer: int, damage: Damages, executed: Counts) -> Actions:
        rows = zip(self._rules, damage.tolist(), executed.tolist(), strict=True)
        return np.array([rule.skips(layer, own, count) for rule, own, count in rows], np.int8)


class BoundStep:
    """Engines bound to memory for steps of `sequence` tokens of each of the cache's first `batch` sequences. Stretches
    of layers are for the decoding of one.
    """

    def __init__(
        self,
        engines: EngineSet,
        cache: KVCache,
        sequence: int,
        teacher_forced: bool = False,
        batch: int = 1,
        segments: Sequence[SegmentEngines[Engine]] | None = None,
    ) -> None:
        """`teacher_forced` steps give the logits of all their tokens, others those of the last one. `segments`: other
        ones than those of the layers.
        """
        model = engines.model
        self.sequence, self.batch = sequence, batch
        self._cache = cache
        self._model = model
        self._memory = memory = StepMemory(engines, cache, sequence, batch, teacher_forced)
        self.input_ids, self.logits = memory.input_ids, memory.logits
        self._unread = False
        self._score_bias = engines.score_bias
        decodes = sequence == batch == 1 and not teacher_forced and segments is None
        self.segments = memory.bind(segments or engines.segments, engines.stretches if decodes else ())
        # Python floats and ints through flat views: the decode loop makes no array objects.
        self._history_view: Any = memory.history.reshape(-1).data
        self._damage_view: Any = memory.damage.reshape(-1).data
        self._score_view: Any = memory.score.data
        self._score_index = {layer: index for index, layer in enumerate(memory.score_of)}
        self.actions = np.zeros((batch * sequence, model.num_layers), np.int8)
        self._actions_view: Any = self.actions.reshape(-1).data
        self._all_run = np.full(self.actions.size, Action.RUN, np.int8).data
        self._reads_history = engines.reads_history
        self._decided = {layers[0]: layers for layers in engines.decision_points.values()}
        self._plans = Plans(model.num_layers, self._score_bias, engines.decision_points)

    @property
    def damage(self) -> npt.NDArray[np.float32]:
        """Of the last step under a rule that asks, [layers, tokens]: this object's array."""
        if self._unread:
            self._unread = False
            for layer in self._score_bias:
                self._read_scores(layer)
        return self._memory.damage

    def launches(self) -> list[tuple[Launch, Launch | None]]:
        """Per segment what runs it and what skips it, to be timed one by one after `place`."""
        return [(segment.run, segment.skip) for segment in self.segments]

    def dense_launches(self) -> tuple[Launch, ...]:
        """What a token takes that skips nothing, to be timed one by one after `place`."""
        plan = self._plans.plan(DENSE, self.segments)
        assert isinstance(plan, FixedPlan)
        return plan.launches

    def place(self) -> None:
        """Say where the new tokens go: the rows after the cached ones."""
        self._memory.place()

    @backend_errors
    def decode(self, token: int, rule: Rule) -> int:
        """One token under `rule`; returns the layers it ran. Logits, damage and `actions` are this object's arrays."""
        self.input_ids[0, 0] = token
        self.place()
        plan = self._plans.plan(rule, self.segments)
        if plan is None:
            executed = self._decode_asking(rule)
        elif isinstance(plan, FixedPlan):
            self.actions[0] = plan.actions
            for launch in plan.launches:
                launch()
            executed = plan.executed
        else:
            executed = self._decode_comparing(plan)
        self._cache.length += 1
        return executed

    def _decode_asking(self, rule: Rule) -> int:
        self.actions.fill(Action.RUN)
        history, damage, actions = self._history_view, self._damage_view, self.actions[0]
        self._memory.history.fill(0.0)
        self._unread = False
        score, score_bias, skips = self._score_view, self._score_bias, rule.skips
        executed = 0
        for stage in self._plans.stages(self.segments):
            for launch in stage.policies + stage.before:
                launch()
            executed += stage.ran
            mask = 0
            for layer, _, _ in stage.asked if score_bias else ():
                damage[layer] = _softplus(score[self._score_index[layer]] + score_bias[layer])
            settled = rule.settled(self._memory.damage).reshape(-1).data if stage.asked else damage
            for layer, bit, between in stage.asked:
                executed += between
                if skips(layer, settled[layer], executed):
                    history[2 * layer + 1] = history[2 * layer + 2] = 1.0
                    actions[layer] = Action.SKIP
                    mask |= bit
                else:
                    executed += 1
            executed += stage.after
            for launch in stage.answers[mask][0]:
                launch()
        return executed

    def _decode_comparing(self, plan: ComparingPlan) -> int:
        """`_decode_asking` with a rule that is a limit per layer."""
        actions = self._actions_view
        actions[:] = self._all_run
        history = self._history_view if self._reads_history else None
        if history is not None:
            self._memory.history.fill(0.0)
        asked, self._unread = (self._score_view, True) if self._score_bias else (self._damage_view, False)
        executed = self._model.num_layers
        for before, choices, breaking, answers in plan.stages:
            for launch in before:
                launch()
            # Several layers are decided before any is launched, while what they compare is in the caches.
            mask = 0
            for bit, index, limit in choices:
                if asked[index] < limit:
                    mask |= bit
            for layers, price, stakes in breaking:
                taken = mask & layers
                if taken and not self._pays(taken, price, stakes, asked):
                    mask ^= taken
            launches, skipped = answers[mask]
            executed -= len(skipped)
            for layer in skipped:
                actions[layer] = 1
                if history is not None:
                    history[2 * layer + 1] = history[2 * layer + 2] = 1.0
            for launch in launches:
                launch()
        return executed

    def _pays(self, taken: int, price: float, stakes: Mapping[int, Stake], asked: Any) -> bool:
        """Whether skipping the layers `taken` of a stretch pays for breaking it: `DecisionRule.settled`, but for the
        rounding of a damage.
        """
        saved = 0.0
        while taken:
            bit = taken & -taken
            taken ^= bit
            index, limit, bias = stakes[bit]
            saved += limit - (_softplus(asked[index] + bias) if self._score_bias else asked[index])
            if saved > price:
                return True
        return False

    def _read_scores(self, layer: int) -> None:
        if layer in self._score_bias:
            # In float64, as `decode` does it: a tie must not fall differently.
            score = self._memory.score_of[layer].reshape(-1).astype(np.float64)
            self._memory.damage[layer] = np.logaddexp(0.0, score + self._score_bias[layer])

    @backend_errors
    def prefill(self, tokens: npt.NDArray[np.int64], ask: bool = False) -> None:
        """`sequence` tokens, every layer. `ask`: the tokens' damage is wanted too."""
        self.input_ids[0] = tokens
        self.place()
        self._memory.history.fill(0.0)
        for segment in self.segments:
            for launch in (segment.policy if ask else None, segment.run):
                if launch is not None:
                    launch()
            if ask:
                self._read_scores(segment.layer)
        self._cache.length += self.sequence

    def teacher_force(self, tokens: npt.NDArray[np.int64], rule: Rule, dense: npt.NDArray[np.bool_]) -> None:
        """`sequence` known tokens in one pass under `rule`, except rows where `dense` is true: what decode would have
        done.
        """
        self.input_ids[0] = tokens
        self._each_row(rule, dense)
        self._cache.length += self.sequence

    def decode_batch(self, tokens: Sequence[int], rules: Sequence[Rule]) -> int:
        """One token of every sequence, each under a rule of its own; returns the layers that ran for any of them.
        Logits [batch, 1, vocab], damage [layers, batch] and `actions` [batch, layers] are this object's arrays.
        """
        if self.batch == 1:
            return self.decode(tokens[0], rules[0])
        self.input_ids[:, 0] = tokens
        ran = self._each_row(_RowRules(rules), np.zeros(self.batch, np.bool_))
        for row in range(self.batch):
            self._cache.lengths[row] += 1
        return ran

    @backend_errors
    def _each_row(self, rule: Rule | _RowRules, dense: npt.NDArray[np.bool_]) -> int:
        """One pass in which every row has an action of its own, or is `dense`; returns the layers that ran for any row.

        A gated layer runs for all rows and its skip graph too, unless all agree; each row takes its own. Both write the
        same K and V, so what later tokens read does not depend on who ran.
        """
        self.place()
        self._memory.history.fill(0.0)
        self.actions.fill(Action.RUN)
        history = self._memory.history.reshape(len(self._memory.history), -1, 2)
        rows = len(self.actions)
        executed = np.zeros(rows, np.int64)
        ran = 0
        settled: Damages = self._memory.damage
        for segment in self.segments:
            layer = segment.layer
            # By one name, which `backend_errors` reads.
            if (launch := segment.policy) is not None:
                launch()
            launch = segment.run
            if layer < 0 or segment.skip is None:
                launch()
                executed += segment.count
                ran += segment.count
                continue
            if layer in self._decided:
                for other in self._decided[layer]:
                    self._read_scores(other)
                settled = rule.settled(self._memory.damage)
            skipped = (rule.decide(layer, settled[layer], executed) == Action.SKIP) & ~dense
            self.actions[skipped, layer] = Action.SKIP
            history[layer, :, 1] = history[layer + 1, :, 0] = skipped
            executed += ~skipped
            if not skipped.all():
                launch()
                ran += 1
            if skipped.any():
                launch = segment.skip
                launch()
                segment.output.reshape(rows, -1)[skipped] = self._memory.hidden[SKIPPED].reshape(rows, -1)[skipped]
        return ran
