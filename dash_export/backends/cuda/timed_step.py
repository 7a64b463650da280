"""A step that says how long the device took, by events of its own: what the host's clock sees is launches and waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

from dash_export.backends.cuda.cuda import MAIN
from dash_export.backends.cuda.cuda_graph import CudaGraph
from dash_export.backends.cuda.step import Actions, DeviceStep, Tokens
from dash_export.core.rule import Rule

BEGUN, DONE = "step begun", "step done"


class TimedStep(DeviceStep):
    """A step of tokens that are not launched ahead. Set as `DeviceEngines.step_kind` before a session is made.

    `began`: when the host began to launch it (`perf_counter_ns`).
    """

    began = 0

    def _launched(self, tokens: Tokens, rules: Sequence[Rule], actions: Actions | None) -> Actions | None:
        self.began = perf_counter_ns()
        self.device.stamp(MAIN, BEGUN)
        found = super()._launched(tokens, rules, actions)
        self.device.stamp(MAIN, DONE)
        return found

    @property
    def device_us(self) -> float:
        """Microseconds of the device's time from the first work of the last step to the end of all."""
        self.device.synchronize(MAIN)
        return self.device.between(BEGUN, DONE)


class PiecesStep(TimedStep):
    """A step that is launched piece by piece in every mode, dense tokens too, with the times of each piece.

    `launched`: when the host began and ended to launch the piece of that place (a segment's, or POLICY).
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.launched: dict[int, tuple[int, int]] = {}

    def _actions(self, _rules: Sequence[Rule]) -> None:
        return None

    def _launched(self, tokens: Tokens, rules: Sequence[Rule], actions: Actions | None) -> Actions | None:
        self.launched.clear()
        return super()._launched(tokens, rules, actions)

    def _record_piece(self, place: int, bypass: bool, stream: str, _graph: CudaGraph) -> None:
        super()._enqueue_piece(place, bypass, stream)  # without events: they are around its launch

    def _launch_piece(self, place: int, bypass: bool = False, stream: str = MAIN) -> None:
        self._stamped(super()._launch_piece, place, bypass, stream)

    def _enqueue_piece(self, place: int, bypass: bool = False, stream: str = MAIN) -> None:
        self._stamped(super()._enqueue_piece, place, bypass, stream)

    def _stamped(self, launch: Callable[[int, bool, str], None], place: int, bypass: bool, stream: str) -> None:
        began = perf_counter_ns()
        self.device.stamp(stream, f"{place} begun")
        launch(place, bypass, stream)
        self.device.stamp(stream, f"{place} done")
        self.launched[place] = began, perf_counter_ns()

    def ran(self, place: int) -> tuple[int, int]:
        """Return when the device began and ended a piece of the last step, as `perf_counter_ns` would say it if the
        device had begun the step when the host did.
        """
        begun, done = (1e3 * self.device.between(BEGUN, f"{place} {end}") for end in ("begun", "done"))
        return self.began + int(begun), self.began + int(done)
