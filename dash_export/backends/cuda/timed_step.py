"""A step that says how long the device took, by events of its own: what the host's clock sees is launches and waits."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns

from dash_export.backends.cuda.cuda import MAIN
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
