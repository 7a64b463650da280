"""Where each trade-off lands on the calibration text: layers, time on this target and divergence, per policy kind.

Needs the cost table and no training: a policy trained once is calibrated anew by every build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.build_record import Build
from dash_export.bundle import Bundle
from dash_export.calibration import text_windows
from dash_export.decision import DENSE_POSITIONS, DIALLED_KINDS, Action, DialPoint, Setting, decision_rule
from dash_export.divergence import DenseRows
from dash_export.errors import BundleError
from dash_export.resources import resource_folder
from dash_export.runtime import DashRuntime
from dash_export.runtime.backends.base import Backend
from dash_export.runtime.device.base import Device
from dash_export.stretches import TokenTime, breaking

WINDOWS = 8
TOKENS = 128
PREFIX = 32
"""Dense tokens at the beginning of a window: the prompt, from which `sequence` decides. What follows is measured."""
SHARES = (0.03, 0.08, 0.15, 0.24, 0.36, 0.55, 0.8, 0.97)
"""Trade-offs are placed where the damage of a dense pass skips these shares of the gated layers; beside them dense and
all."""
_PLACED = 1.01
"""Within this factor."""
_LARGEST = 1e9
"""Trade-off at which a build in which skipping never pays is given up on, and how far below the last one others lie."""


@dataclass
class _Sums:
    """Over the measured tokens of one setting: how many, layers skipped, time as fractions of dense, nats."""

    tokens: int = 0
    skipped: int = 0
    time: float = 0.0
    kl: float = 0.0


def calibrate_dial(
    bundle: Bundle, build: Build, backend: Backend | Device, progress: Progress = no_progress
) -> dict[str, tuple[DialPoint, ...]]:
    """A table per kind, from dense to everything skipped, each setting run for real under its own decisions.

    KL is measured against the dense mode of the same build.
    """
    runtime = DashRuntime(bundle, build, backend)
    windows = _calibration_windows(runtime)
    num_layers, token_time = bundle.manifest.model.num_layers, TokenTime(build)
    settings = [
        Setting(kind, trade_off=trade_off)
        for kind, trade_offs in _trade_offs(runtime, windows).items()
        for trade_off in trade_offs
    ]
    sums = {setting: _Sums() for setting in settings}
    for done, window in enumerate(windows, 1):
        _measure(runtime, window, sums, token_time)
        progress("calibrating the dial", done, len(windows))
    dial = {kind: [DialPoint(0.0, float(num_layers), 1.0, 0.0)] for kind in DIALLED_KINDS}
    for setting, total in sums.items():
        assert setting.trade_off is not None
        dial[setting.kind].append(_point(setting.trade_off, total, num_layers))
    return {kind: tuple(points) for kind, points in dial.items()}


def _trade_offs(runtime: DashRuntime, windows: list[npt.NDArray[np.int64]]) -> dict[str, list[float]]:
    """Per kind rising trade-offs, from the damage of dense passes; the last one skips everything gated."""
    gated, build = list(runtime.bundle.manifest.policy.gated), runtime.build
    # The network must be asked although nothing is skipped.
    session = runtime.session("token", trade_off=0.0)
    damages = [session.score(window).damage.astype(np.float64) for window in windows]
    per_token = np.concatenate([damage[DENSE_POSITIONS:] for damage in damages]).T
    per_prompt = np.array([damage[DENSE_POSITIONS : _prompt(len(damage))].mean(axis=0) for damage in damages]).T

    def share(damage: npt.NDArray[np.float64], trade_off: float) -> float:
        """Of the gated layers, that is skipped at damage [layers, tokens]."""
        rule = decision_rule(len(damage), gated, build.cost.cost, trade_off, breaking=breaking(build))
        return float((rule.settled(damage)[gated] < np.array(rule.limits)[gated, None]).mean())

    costs = np.array([max(build.cost.cost[layer], 1e-9) for layer in gated])[:, None]
    # Past the largest ratio everything gated is skipped, whatever the feedback of skipping does to damage, and where a
    # stretch is expensive to break, a few times past it.
    last = 4.0 * float((per_token[gated] / costs).max()) + 1.0
    while share(per_token, last) < 1 and last < _LARGEST:
        last *= 4.0
    found = {}
    for kind, damage in (("sequence", per_prompt), ("token", per_token)):
        grid = [last]
        for wanted in SHARES:
            low, high = last / _LARGEST, last
            while high > low * _PLACED:
                middle = float(np.sqrt(low * high))
                low, high = (low, middle) if share(damage, middle) >= wanted else (middle, high)
            grid.append(high)
        found[kind] = sorted({float(f"{trade_off:.6g}") for trade_off in grid})
    return found


def _measure(
    runtime: DashRuntime, window: npt.NDArray[np.int64], sums: Mapping[Setting, _Sums], token_time: TokenTime
) -> None:
    prompt = _prompt(len(window))
    dense = runtime.session("dense").score(window, prompt, keep_logits=True)
    assert dense.logits is not None
    reference = DenseRows(dense.logits[prompt:])
    for setting, total in sums.items():
        score = runtime.session_with(setting).score(window, prompt, keep_logits=True)
        assert score.logits is not None
        total.tokens += len(window) - prompt
        total.skipped += int((score.actions[prompt:] == Action.SKIP).sum())
        total.time += token_time.total(score.actions[prompt:])
        total.kl += float(reference.kl(score.logits[prompt:]).sum())


def _point(trade_off: float, total: _Sums, num_layers: int) -> DialPoint:
    layers, time, kl = (amount / total.tokens for amount in (total.skipped, total.time, total.kl))
    return DialPoint(trade_off, round(num_layers - layers, 4), round(time, 5), round(max(0.0, kl), 6))


def _prompt(length: int) -> int:
    """PREFIX, or less where a model's context is hardly longer."""
    return min(PREFIX, length // 2)


def _calibration_windows(runtime: DashRuntime) -> list[npt.NDArray[np.int64]]:
    path = resource_folder("calibration") / "prose.txt"
    if not path.is_file():
        raise BundleError(f"The calibration text {path} is missing: install dash-export again.")
    return text_windows(runtime, path.read_text(encoding="utf-8"), WINDOWS * TOKENS, TOKENS)
