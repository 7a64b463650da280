"""The dispatcher: engines bound to fixed memory, launched conditionally, one token at a time or many.

`EngineSet` is what sessions share, `BoundStep` that bound to one cache and one number of tokens: every buffer has one
address for its life, hidden states alternate between two buffers, and each KV cache array is bound as past and present
alike, so a write is in place; what a skip graph gives for the cache instead of writing it is written after it. A row
is one token of one sequence: many tokens of one, or one token of each of many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log1p
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_export.bundle import Segment, Stretch
from dash_export.decision import Action
from dash_export.names import POLICY_STATE, new_names, past_names, present_names, short_name
from dash_export.runtime.backends.base import Engine, Launch
from dash_export.runtime.cache import KVCache
from dash_export.runtime.engines import SegmentEngines
from dash_export.runtime.plan import BoundSegment, BoundStretch, ComparingPlan, FixedPlan, Plans
from dash_export.runtime.rules import DENSE, Counts, Damage, Rule

if TYPE_CHECKING:
    from dash_export.runtime.engine_set import EngineSet

SKIPPED = 2
"""Index of the buffer that skip graphs write in a teacher-forced step."""

LINEAR_SCORE = 30.0
"""From here on softplus(x) is x in float32, and exp(x) may overflow."""


def _in_turn(launches: Sequence[Launch]) -> Launch | None:
    if len(launches) < 2:
        return launches[0] if launches else None

    def all_of_them() -> None:
        for launch in launches:
            launch()

    return all_of_them


def _then_copy(launch: Launch, into: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> Launch:
    def launch_and_copy() -> None:
        launch()
        into[...] = found

    return launch_and_copy


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
        shape = (batch, sequence)
        self.sequence, self.batch = sequence, batch
        self._cache = cache
        self._model = model
        self.input_ids = np.zeros(shape, np.int64)
        self.logits = np.zeros((batch, sequence if teacher_forced else 1, model.vocab_size), np.float32)
        # a[l-1], a[l] for every layer l: layer l's engine reads row l.
        self._history = np.zeros((model.num_layers + 1, *shape, 2), np.float32)
        self._damage = np.zeros((model.num_layers, batch * sequence), np.float32)
        self._unread = False
        # What one engine answers is one array: [batch, 1, sequence] about one layer, [batch, sequence, layers] about
        # several. Of one token all of them in the order of layers.
        self._points = engines.decision_points
        answers = self._points.values() if engines.dispatch == "fused" else [(layer,) for layer in engines.gated]
        self._score = np.zeros(batch * sequence * len(engines.gated), np.float32)
        self._answers: dict[int, npt.NDArray[np.float32]] = {}
        self._score_of: dict[int, npt.NDArray[np.float32]] = {}
        for layers in answers:
            start = batch * sequence * len(self._score_of)
            answer = self._score[start : start + batch * sequence * len(layers)].reshape(batch, sequence, len(layers))
            self._score_of |= {layer: answer[..., index] for index, layer in enumerate(layers)}
            self._answers[layers[0]] = answer if len(layers) > 1 else answer.reshape(batch, 1, sequence)
        self._score_bias = engines.score_bias
        # Two buffers in turn; run and skip write the same one, but where rows differ skip has its own and each row
        # takes from the one or the other.
        self._rows_differ = teacher_forced or batch > 1
        self._hidden = [np.zeros((*shape, model.hidden_size), np.float32) for _ in range(3 if self._rows_differ else 2)]
        self._position_ids = np.zeros(shape, np.int64)
        self._write_indices = np.zeros(batch, np.int64)
        self._seqlens_k = np.zeros(batch, np.int32)
        self._total = np.zeros(1, np.int32)
        self._mask = np.zeros((batch, 1, sequence, cache.capacity), np.bool_) if engines.needs_mask else None
        self._inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.input_ids,
            "position_ids": self._position_ids,
            "write_indices": self._write_indices,
            "seqlens_k": self._seqlens_k,
            "total_length": self._total,
            "first_logit": np.array([0 if teacher_forced else sequence - 1], np.int64),
        }
        if self._mask is not None:
            self._inputs["attention_mask"] = self._mask
        decodes = sequence == batch == 1 and not teacher_forced and segments is None
        self.segments = self._bind(segments or engines.segments, engines.stretches if decodes else ())
        # Python floats and ints through flat views: the decode loop makes no array objects.
        self._history_view: Any = self._history.reshape(-1).data
        self._damage_view: Any = self._damage.reshape(-1).data
        self._score_view: Any = self._score.data
        self._score_index = {layer: index for index, layer in enumerate(self._score_of)}
        self.actions = np.zeros((batch * sequence, model.num_layers), np.int8)
        self._actions_view: Any = self.actions.reshape(-1).data
        self._all_run = np.full(self.actions.size, Action.RUN, np.int8).data
        self._reads_history = engines.reads_history
        self._plans = Plans(model.num_layers, self._score_bias, self._points)

    @property
    def damage(self) -> npt.NDArray[np.float32]:
        """Of the last step under a rule that asks, [layers, tokens]: this object's array."""
        if self._unread:
            self._unread = False
            for layer in self._score_bias:
                self._read_scores(layer)
        return self._damage

    def _bind(
        self, segments: Sequence[SegmentEngines[Engine]], stretches: Sequence[tuple[Stretch, Engine]]
    ) -> list[BoundSegment]:
        bound = []
        state = self._hidden[0]
        for index, item in enumerate(segments):
            segment = item.segment
            here, there = self._hidden[index % 2], self._hidden[(index + 1) % 2]
            skipped = {"hidden_out": self._hidden[SKIPPED] if self._rows_differ else there}
            shared = self._shared(segment.layers, here)
            policies = []
            for layer, engine in item.policies.items():
                inputs = {"hidden": state, "actions": self._history[layer - 1], "layer": np.array([layer])}
                policies.append(engine.bind(inputs, self._decision(layer)))
            # What policy engines of their own read: the input of this segment's layer, or of one inside it.
            state = np.zeros_like(here) if POLICY_STATE in item.run.outputs else here
            outputs = shared | self._outputs(segment) | {POLICY_STATE: state}
            bound.append(
                BoundSegment(
                    segment.first if segment.gated else -1,
                    len(segment.layers),
                    item.run.bind(shared, outputs | {"hidden_out": there}),
                    None
                    if item.skip is None
                    else self._bind_skip(item.skip, segment.layers, shared, outputs | skipped),
                    _in_turn(policies),
                    there,
                    self._bind_stretches(index, [item for item in stretches if item[0].first == segment.first]),
                )
            )
        return bound

    def _bind_stretches(self, index: int, stretches: Sequence[tuple[Stretch, Engine]]) -> tuple[BoundStretch, ...]:
        """Those that begin with the segment of this index. Where one of an even number of layers runs it writes what it
        reads: all that reads it leads to the graph's last node, which writes.
        """
        found = []
        for stretch, engine in stretches:
            count = len(stretch.layers)
            here, there = self._hidden[index % 2], self._hidden[(index + count) % 2]
            inputs = self._shared(stretch.layers, here)
            if stretch.skips:
                # Its K and V may be computed when the state has been: neither leads to the other.
                apart = np.zeros_like(there)
                skip = self._bind_skip(engine, stretch.layers, inputs, inputs | {"hidden_out": apart})
                launch = _then_copy(skip, there, apart)
            else:
                launch = engine.bind(inputs, inputs | {"hidden_out": there})
            found.append(BoundStretch(count, stretch.skips, launch))
        return tuple(found)

    def _bind_skip(
        self,
        skip: Engine,
        layers: range,
        inputs: dict[str, npt.NDArray[Any]],
        outputs: dict[str, npt.NDArray[Any]],
    ) -> Launch:
        """With the write of what the engine leaves to be written."""
        names = [[short_name(name) for name in new_names(layer)] for layer in layers]
        if names[0][0] not in skip.outputs:
            return skip.bind(inputs, outputs)
        model, cache, sequence = self._model, self._cache, self.sequence
        new = np.zeros((len(layers), 2, self.batch, sequence, model.num_kv_heads * model.head_dim), np.float32)
        outputs = outputs | {name: new[at, which] for at, pair in enumerate(names) for which, name in enumerate(pair)}
        launch = skip.bind(inputs, outputs)
        rows = new.reshape(*new.shape[:4], model.num_kv_heads, model.head_dim).transpose(2, 3, 0, 1, 4, 5)
        writes = [(cache.rows(layers, index), rows[index]) for index in range(self.batch)]

        def launch_and_write() -> None:
            launch()
            for (into, found), start in zip(writes, cache.lengths, strict=False):
                into[start : start + sequence] = found

        return launch_and_write

    def _shared(self, layers: range, hidden: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
        shared = {**self._inputs, "hidden": hidden, "actions": self._history[max(layers.stop - 1, 0)]}
        for layer in layers:
            arrays = (self._cache.keys[layer][: self.batch], self._cache.values[layer][: self.batch])
            for name, array in zip((*past_names(layer), *present_names(layer)), arrays * 2, strict=True):
                shared[name] = shared[short_name(name)] = array
        return shared

    def _outputs(self, segment: Segment) -> dict[str, npt.NDArray[Any]]:
        outputs: dict[str, npt.NDArray[Any]] = {"logits": self.logits}
        for layer in segment.layers:
            if layer in self._points:
                outputs |= self._decision(self._points[layer][0])
        return outputs

    def _decision(self, layer: int) -> dict[str, npt.NDArray[np.float32]]:
        """Where a policy answers for `layer`, with the damage, or for it and those after it, with their scores."""
        return {"damage": self._damage[layer].reshape(self.batch, -1), "score": self._answers[layer]}

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
        lengths, sequence = self._cache.lengths[: self.batch], self.sequence
        for row, start in enumerate(lengths):
            if sequence == 1:
                self._position_ids[row, 0] = start
            else:
                self._position_ids[row] = np.arange(start, start + sequence)
            self._write_indices[row] = start
            self._seqlens_k[row] = start + sequence - 1
        self._total[0] = max(lengths) + sequence
        if self._mask is not None:
            self._mask[:, 0] = np.arange(self._mask.shape[-1]) <= self._position_ids[..., None]

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
        self._history.fill(0.0)
        self._unread = False
        score, score_bias, skips = self._score_view, self._score_bias, rule.skips
        executed = 0
        for stage in self._plans.stages(self.segments):
            for launch in stage.policies + stage.before:
                launch()
            executed += stage.ran
            mask = 0
            for layer, bit, between in stage.asked:
                executed += between
                if score_bias:
                    biased = score[self._score_index[layer]] + score_bias[layer]
                    damage[layer] = log1p(exp(biased)) if biased < LINEAR_SCORE else biased
                if skips(layer, damage[layer], executed):
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
            self._history.fill(0.0)
        asked, self._unread = (self._score_view, True) if self._score_bias else (self._damage_view, False)
        executed = self._model.num_layers
        for before, choices, answers in plan.stages:
            for launch in before:
                launch()
            # Several layers are decided before any is launched, while what they compare is in the caches.
            mask = 0
            for bit, index, limit in choices:
                if asked[index] < limit:
                    mask |= bit
            launches, skipped = answers[mask]
            executed -= len(skipped)
            for layer in skipped:
                actions[layer] = 1
                if history is not None:
                    history[2 * layer + 1] = history[2 * layer + 2] = 1.0
            for launch in launches:
                launch()
        return executed

    def _read_scores(self, layer: int) -> None:
        if layer in self._score_bias:
            # In float64, as `decode` does it: a tie must not fall differently.
            score = self._score_of[layer].reshape(-1).astype(np.float64)
            self._damage[layer] = np.logaddexp(0.0, score + self._score_bias[layer])

    def prefill(self, tokens: npt.NDArray[np.int64], ask: bool = False) -> None:
        """`sequence` tokens, every layer. `ask`: the tokens' damage is wanted too."""
        self.input_ids[0] = tokens
        self.place()
        self._history.fill(0.0)
        for segment in self.segments:
            if ask and segment.policy is not None:
                segment.policy()
            segment.run()
            if ask:
                self._read_scores(segment.layer)
        self._cache.length += self.sequence

    def teacher_force(self, tokens: npt.NDArray[np.int64], rule: Rule, dense: npt.NDArray[np.bool_]) -> None:
        """`sequence` known tokens in one pass under `rule`, except rows where `dense` is true: what decode would have
        done.
        """
        self.input_ids[0] = tokens
        self._each_row(lambda layer, damage, executed: (rule.decide(layer, damage, executed) == Action.SKIP) & ~dense)
        self._cache.length += self.sequence

    def decode_batch(self, tokens: Sequence[int], rules: Sequence[Rule]) -> int:
        """One token of every sequence, each under a rule of its own; returns the layers that ran for any of them.
        Logits [batch, 1, vocab], damage [layers, batch] and `actions` [batch, layers] are this object's arrays.
        """
        if self.batch == 1:
            return self.decode(tokens[0], rules[0])
        self.input_ids[:, 0] = tokens

        def skipped(layer: int, damage: Damage, executed: Counts) -> npt.NDArray[np.bool_]:
            rows = zip(rules, damage.tolist(), executed.tolist(), strict=True)
            return np.array([rule.skips(layer, own, count) for rule, own, count in rows])

        ran = self._each_row(skipped)
        for row in range(self.batch):
            self._cache.lengths[row] += 1
        return ran

    def _each_row(self, skipped_rows: Callable[[int, Damage, Counts], npt.NDArray[np.bool_]]) -> int:
        """One pass in which every row has an action of its own; returns the layers that ran for any row.

        A gated layer runs for all rows and its skip graph too, unless all agree; each row takes its own. Both write the
        same K and V, so what later tokens read does not depend on who ran.
        """
        self.place()
        self._history.fill(0.0)
        self.actions.fill(Action.RUN)
        history = self._history.reshape(len(self._history), -1, 2)
        rows = len(self.actions)
        executed = np.zeros(rows, np.int64)
        ran = 0
        for segment in self.segments:
            layer = segment.layer
            if segment.policy is not None:
                segment.policy()
            if layer < 0 or segment.skip is None:
                segment.run()
                executed += segment.count
                ran += segment.count
                continue
            self._read_scores(layer)
            skipped = skipped_rows(layer, self._damage[layer], executed)
            self.actions[skipped, layer] = Action.SKIP
            history[layer, :, 1] = history[layer + 1, :, 0] = skipped
            executed += ~skipped
            if not skipped.all():
                segment.run()
                ran += 1
            if skipped.any():
                segment.skip()
                segment.output.reshape(rows, -1)[skipped] = self._hidden[SKIPPED].reshape(rows, -1)[skipped]
        return ran
