"""One token, or many, on a device: the counterpart of `decode.BoundStep` where engines run later than they are
launched.

A token is one launch per segment, and one of the policy where a rule uses damage: each is a small graph, so that its
dozens of kernels cost the host one call. The dispatch modes differ in who waits for the policy:

- `sync`: the policy runs in the layers' stream. The host waits for its damage, decides, and launches the rest.
- `overlapped`: while the last layers before the first unit run on the main stream, the policy, which reads the state
  that entered them, runs on a stream of its own. The host waits only for the damage, and launches the first unit before
  the layers ahead of it have ended.
- `device`: as `overlapped`, but recorded once as a graph: a kernel takes all decisions, and every unit is a branch. The
  host fills inputs and limits, launches, and waits once for the end of the token. The kernel knows no `max_layers`
  (which ranks units by damage) and no forced actions: such tokens are launched as in `overlapped`.

In every mode a token whose actions are known beforehand (dense, static) is a graph of its own without decisions: this
is what skipping has to beat. Where nothing can be recorded, engines themselves are launched.

Where logits alone say what follows, a token that is a graph is launched ahead: kernels draw it on the device from the
logits, by the number that the host will draw with, while the host still samples and writes. The host draws each, too:
rarely, by rounding, another one. A step that was launched in vain costs its time, and its cache row is free.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dash_export.backends.cuda.bound import POLICY, BoundEngines
from dash_export.backends.cuda.cuda import BESIDE, MAIN
from dash_export.backends.cuda.cuda_graph import CudaGraph
from dash_export.core.rule import DENSE, DecisionRule, Rule
from dash_export.core.sampling import Draw
from dash_export.core.units import Skips
from dash_export.errors import BackendError

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceCache, DeviceEngines

logger = logging.getLogger(__name__)

GRAPHS = 12
"""How many graphs a step keeps; decoding ahead takes three for a set of known actions, or for a rule."""
DECIDED, ENDED, AHEAD = "decided", "ended", "ended ahead"
"""Events: the policy's damage is there; the token that the host waits for has ended, and so has the one after it."""
Actions = bytes | tuple[tuple[float, ...], ...]
"""What a graph does: the units that it skips, a byte each; or the limits of each sequence by which it decides."""
Tokens = int | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ahead:
    """A step that was launched before its tokens were known: those that the device drew, at these positions. `side`:
    the place of its results.
    """

    actions: Actions
    positions: tuple[int, ...]
    side: int


class DeviceStep(BoundEngines):
    """Steps of one token of each sequence, or of many of one (a prompt). `logits` [batch, 1, vocab] are those of the
    last token; `damage` [units, tokens] is zero where no rule asked for it.

    Sequences decide together: a unit is skipped where every one of them would skip it.
    """

    final_state = None

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int, batch: int = 1) -> None:
        super().__init__(engines, cache, sequence, batch)
        self.damage: npt.NDArray[np.float32] = np.zeros((len(engines.units), batch * sequence), np.float32)
        self.skipped: Skips = np.zeros(self.damage.shape, np.bool_)
        self.logits: npt.NDArray[np.float32] = self._logits.host
        self._graphs = OrderedDict[tuple[bytes | None, int, bool], CudaGraph]()
        self._pieces: dict[tuple[int, bool], CudaGraph] = {}
        self._warm = False
        self._last: Actions | None = None
        self._ahead: Ahead | None = None

    def __del__(self) -> None:
        if getattr(self, "_ahead", None) is not None:  # it still uses contexts and memory, which go now
            self._end_in_vain()

    # --- one step

    def decode(self, token: int, rule: Rule, draw: Draw | None = None) -> None:
        """Decode one token under `rule`. `draw`: how the one after it will be drawn, where that is known."""
        self._advance(token, [rule], [draw])

    def prefill(self, tokens: npt.NDArray[np.int64]) -> None:
        """Prefill tokens [sequence] through every layer."""
        self._advance(tokens, [DENSE])

    def decode_batch(self, tokens: Sequence[int], rules: Sequence[Rule], draws: Sequence[Draw | None] = ()) -> None:
        """Decode one token of every sequence, each under a rule of its own."""
        self._advance(np.array(tokens)[:, None], rules, draws)

    def _advance(self, tokens: Tokens, rules: Sequence[Rule], draws: Sequence[Draw | None] = ()) -> None:
        """Run a step for all sequences. `rules`, `draws`: one for each sequence."""
        with self.engines.turn:
            actions, running, side = self._actions(rules), self._ahead, 0
            if running is not None and self._follows(running, actions):
                side = running.side
            else:
                self._end_in_vain()
                running, actions = None, self._launched(tokens, rules, actions)
            known = [draw for draw in draws if draw is not None]
            follows = len(known) == self.batch and actions == self._last
            ahead = self._launched_ahead(actions, 1 - side, known) if follows else None
            if ahead is None:
                self.device.synchronize(MAIN)
            else:
                self.device.wait_for_event(ENDED)
            if running is not None and not self._drew(tokens, side):
                # After the step that follows what the device drew: it ends before this one does.
                side, ahead, actions = 0, None, self._launched(tokens, rules, actions)
                self.device.synchronize(MAIN)
            self._take_results(actions, side)
            self._last, self._ahead, self._cache.ahead = actions, ahead, ahead
            for index in range(self.batch):
                self._cache.lengths[index] += self.sequence

    def _launched(self, tokens: Tokens, rules: Sequence[Rule], actions: Actions | None) -> Actions | None:
        """Launch a step of known tokens. Return what it does as one graph; None where it was launched in pieces."""
        self._ids.host[:] = tokens
        self._note_positions()
        graph = None if actions is None else self._graph(actions, 0)
        if graph is None:
            self._launch_pieces(rules)
            return None
        graph.launch(MAIN)
        return actions

    def _follows(self, ahead: Ahead, actions: Actions | None) -> bool:
        """Return whether this step is the one launched ahead, but for its tokens: nothing else touched the cache."""
        return (
            self._cache.ahead is ahead
            and ahead.actions == actions
            and ahead.positions == tuple(self._cache.lengths[: self.batch])
        )

    def _drew(self, tokens: Tokens, side: int) -> bool:
        """Return whether the device drew these tokens for a step that was launched ahead and has ended."""
        return bool((self._ids.hosts[1 + side] == tokens).all())

    def _end_in_vain(self) -> None:
        """Wait for a step that was launched ahead and is not wanted: it may still read what is written now."""
        if self._ahead is not None:
            self.device.wait_for_event(AHEAD)  # not for the stream: another thread may be recording it
            self._ahead = None

    def _launched_ahead(self, actions: Actions | None, side: int, draws: Sequence[Draw]) -> Ahead | None:
        """Launch the step after this one, which is under way. Return None where there is no graph of it or no room."""
        positions = tuple(length + 1 for length in self._cache.lengths[: self.batch])
        room = min(self._cache.capacity, self.engines.model.max_positions)
        if actions is None or max(positions) >= room or not self.engines.launches_ahead:
            return None
        graph = self._graph(actions, side, ahead=True)
        if graph is None:
            return None
        self._draws.hosts[side][:] = draws
        self.device.record(MAIN, ENDED)
        graph.launch(MAIN)
        self.device.record(MAIN, AHEAD)
        return Ahead(actions, positions, side)

    def _take_results(self, actions: Actions | None, side: int) -> None:
        """Take the results of a step that was a graph; another one has left them where they belong."""
        self.logits = self._logits.hosts[side]
        if isinstance(actions, bytes):
            self.damage.fill(0.0)
            self.skipped[:] = np.frombuffer(actions, np.bool_)[:, None]
        elif actions is not None:
            self.damage[:] = self._damage.hosts[side][:, 0].T
            self.skipped[:] = self._skipped.hosts[side][:, None]

    def _agreed(self, rules: Sequence[Rule]) -> Skips:
        """Return the units that all rules skip [units, 1]. All tokens of a step do the same."""
        first, *others = (rule.skips(self.damage[:, index : index + 1]) for index, rule in enumerate(rules))
        return np.logical_and.reduce([first, *others]) if others else first

    def _launch_pieces(self, rules: Sequence[Rule]) -> None:
        """Launch a step piece by piece, as in `sync` and `overlapped`."""
        asks, first = self._asks(rules), self.engines.first
        launch = self._launch_piece if self._records_pieces() else self._enqueue_piece
        self._launch_before_units(asks, launch)
        self.damage.fill(0.0)
        if asks:
            self.device.record(self.engines.policy_stream, DECIDED)
            self.device.wait_for_event(DECIDED)
            self.damage[:] = self._damage.host[:, 0].T
        self.skipped[:] = self._agreed(rules)
        for place, part in enumerate(self.parts[first:], first):
            launch(place, part.unit is not None and bool(self.skipped[part.unit, 0]))

    def _record_piece(self, place: int, bypass: bool, stream: str, _graph: CudaGraph) -> None:
        self._enqueue_piece(place, bypass, stream)

    def _enqueue_piece(self, place: int, bypass: bool = False, stream: str = MAIN) -> None:
        """Enqueue a part of a token, with the copies from and to the host that go with it."""
        if place == 0:
            self._upload_inputs()
        self.launch(place, bypass, stream)
        if place == POLICY:
            self.device.copy(stream, self._damage.host, self._damage.memory)
        elif place == len(self.parts) - 1:
            self.device.copy(stream, self._logits.host, self._logits.memory)

    def _launch_piece(self, place: int, bypass: bool = False, stream: str = MAIN) -> None:
        self._pieces[place, bypass].launch(stream)

    def _records_pieces(self) -> bool:
        """Return whether every piece of a token is a graph. Record them the first time."""
        engines = self.engines
        if self._pieces or self.sequence > 1 or not engines.records:
            return bool(self._pieces)
        self._warm_up()
        wanted = [(place, False, MAIN) for place in range(len(self.parts))]
        wanted += [(place, True, MAIN) for place, part in enumerate(self.parts) if part.bypass is not None]
        wanted += [(POLICY, False, engines.policy_stream)] if self._policy is not None else []
        try:
            for place, bypass, stream in wanted:
                record = partial(self._record_piece, place, bypass, stream)
                self._pieces[place, bypass] = self.device.graph(stream, 0, record)
        except BackendError as error:
            self._pieces.clear()
            self._record_nothing(error)
        return bool(self._pieces)

    def _record_nothing(self, error: BackendError) -> None:
        logger.warning("steps are not recorded here (%s): the host launches every kernel, which is slower", error)
        self.engines.records = False

    def _asks(self, rules: Sequence[Rule]) -> bool:
        """Return whether damage matters: not where the rules known beforehand (a dense one) leave no unit to skip."""
        known = [rule for rule in rules if not rule.asks]
        if self._policy is None or len(known) == len(rules):
            return False
        return not known or bool(self._agreed(known).any())

    # --- as a graph

    def _actions(self, rules: Sequence[Rule]) -> Actions | None:
        """Return what a graph would do, of known actions or (`device`) of rules that the kernel knows, else None."""
        engines = self.engines
        if self.sequence > 1 or not engines.records:
            return None
        if not self._asks(rules):
            return self._agreed(rules)[:, 0].tobytes()
        deciding = [rule for rule in rules if isinstance(rule, DecisionRule) and rule.asks and not rule.fewest]
        if engines.dispatch != "device" or len(deciding) < len(rules):
            return None
        return tuple(rule.limits_of(len(engines.units)) for rule in deciding)

    def _graph(self, actions: Actions, side: int, ahead: bool = False) -> CudaGraph | None:
        """Return the recorded step, which leaves its results on `side`, and fill in its limits; None where that is
        impossible: then no more steps of this kind are tried.
        """
        engines = self.engines
        known = actions if isinstance(actions, bytes) else None
        if known is None:
            self._limits.host[:] = actions
        place = (known, side, ahead)
        if place not in self._graphs:
            self._warm_up()
            try:
                made = self.device.graph(
                    MAIN, len(engines.units) if known is None else 0, partial(self._record, known, side, ahead)
                )
            except BackendError as error:
                if ahead:
                    logger.warning("no token is launched ahead here (%s)", error)
                    engines.launches_ahead = False
                elif known is None:
                    logger.warning("dispatch 'device' is not possible here (%s): this is 'overlapped'", error)
                    engines.dispatch = "overlapped"
                else:
                    self._record_nothing(error)
                return None
            self._graphs[place] = made
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(place)
        return self._graphs[place]

    def _warm_up(self) -> None:
        """Launch everything once, into the row that comes next: an engine's first launch cannot be recorded."""
        if self._warm:
            return
        self._upload_inputs()
        for part in self.parts:
            for launch in filter(None, (part.run, part.bypass)):
                launch(MAIN)
        self.device.synchronize(MAIN)
        if self._policy is not None:
            self._policy(self.engines.policy_stream)
            self.device.synchronize(self.engines.policy_stream)
        self._warm = True

    def _record(self, known: bytes | None, side: int, ahead: bool, graph: CudaGraph) -> None:
        """Record a token: one that skips the `known` units or, in `device` dispatch, whatever it decides."""
        if ahead:
            self.device.copy(MAIN, self._draws.memory, self._draws.hosts[side])
            logits, draws, ids = self._logits.memory, self._draws.memory, self._ids.memory
            graph.follow(MAIN, logits, draws, ids, self._positions.memory)
            self.device.copy(MAIN, self._ids.hosts[1 + side], ids)
        else:
            self._upload_inputs()
        results = [self._logits]
        if known is None:
            results += [self._damage, self._skipped]
            self._record_decided(graph)
        else:
            for place, part in enumerate(self.parts):
                self.launch(place, part.unit is not None and bool(known[part.unit]))
        for result in results:
            self.device.copy(MAIN, result.hosts[side], result.memory)

    def _record_decided(self, graph: CudaGraph) -> None:
        self.device.copy(MAIN, self._limits.memory, self._limits.host)
        self._launch_before_units(True, self.launch)
        self.device.record(BESIDE, DECIDED)
        self.device.wait(MAIN, DECIDED)
        graph.decide(MAIN, self._damage.memory, self._limits.memory, self._skipped.memory)
        for place, part in enumerate(self.parts[self.engines.first :], self.engines.first):
            if part.unit is None:
                self.launch(place)
            else:
                run, skip = (partial(self.launch, place, bypass) for bypass in (False, True))
                graph.branch(MAIN, part.unit, run, skip)
