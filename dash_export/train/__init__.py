"""Training of policies: units, network and bypasses (torch). This file, without torch, has settings and defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

KINDS = ("token", "static")
EFFORTS: dict[str, dict[str, Any]] = {
    "quick": {
        "search_steps": 0, "fit_steps": 24, "warm_up_steps": 12, "regression_steps": 40, "tuning_steps": 24,
        "own_prompts": 48, "own_tokens": 96, "judged_batches": 2,
    },
    "default": {},
    "long": {"tuning_steps": 1500, "own_prompts": 800},
}  # fmt: skip
"""Effort -> what is not as by default."""
PRECISIONS = ("bfloat16", "float32")
"""Names of torch's dtypes."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training. Steps are batches of `windows` windows of `window` tokens.

    `search_steps`: steps that fit the bypasses of candidate units, whose first layers are `search_every` layers apart;
    0: units by a rule. `fit_steps`: of the chosen units; `warm_up_steps`: first steps of the regression, which skip at
    random only. `trade_offs`: range of the dial, in nats per dense token time. `again`: factor on the tuning's learning
    rates after a trained policy. `own_prompts`: prompts that the model answers, each turn in up to `own_tokens` tokens.
    `held_out`: share of every text that is only judged on, by `judged_batches` batches. `precision` of the frozen
    model; None: bfloat16 where the device is fast in it.
    """

    seed: int = 0
    window: int = 256
    windows: int = 4
    search_steps: int = 16
    search_every: int = 1
    fit_steps: int = 40
    warm_up_steps: int = 30
    regression_steps: int = 120
    tuning_steps: int = 500
    network_rate: float = 3e-3
    bypass_rate: float = 4.5e-4
    refinement_rate: float = 2.5e-4
    trade_offs: tuple[float, float] = (0.4, 2.2)
    again: float = 0.5
    own_prompts: int = 320
    own_tokens: int = 192
    held_out: float = 0.08
    judged_batches: int = 8
    precision: str | None = None

    @classmethod
    def of(cls, effort: str) -> TrainingSettings:
        return replace(cls(), **EFFORTS[effort])

    def shortened(self) -> TrainingSettings:
        """Return the settings of a training that is as short in its other stages as in the tuning, to try it out: no
        stage takes more steps; candidates are as far apart as the search is shorter than by default; half as many
        windows are in a step, and half as many batches are judged, as there are steps; four prompts a step are
        continued, by 16 tokens a step.
        """
        most, half = self.tuning_steps, (self.tuning_steps + 1) // 2
        stages = ("search_steps", "fit_steps", "warm_up_steps", "regression_steps")
        return replace(
            self,
            **{name: min(getattr(self, name), most) for name in stages},
            search_every=max(self.search_every, TrainingSettings.search_steps // most),
            windows=min(self.windows, half),
            judged_batches=min(self.judged_batches, half),
            own_prompts=min(self.own_prompts, 4 * most),
            own_tokens=min(self.own_tokens, 16 * most),
        )


@dataclass(frozen=True)
class DrafterSettings:
    """Settings of a drafter's training.

    `tokens`: of the text that the model writes, `rows` texts at once: prompts of up to `prompt_tokens`, answers of up
    to `answer_tokens`. `held_out`: share of the texts that are only judged on. `vocabulary`: tokens that can be
    drafted, of which losses compare the `compared` most frequent ones, to be fast.
    `epochs` go over the text in batches of `batch_tokens`; the first steps, a share of `first_alone`, learn first
    drafts alone, the others chains of `depth`. `map_rate`, `layer_rate`: learning rates of the maps, and of layer and
    norm. `likeliest`: tokens of the model that the loss compares. `precision` is that of TrainingSettings.
    """

    seed: int = 0
    tokens: int = 300_000
    rows: int = 64
    prompt_tokens: int = 96
    answer_tokens: int = 256
    held_out: float = 0.05
    vocabulary: int = 12_288
    compared: int = 8192
    epochs: int = 3
    batch_tokens: int = 1280
    first_alone: float = 0.4
    depth: int = 3
    warm_up_steps: int = 20
    map_rate: float = 2e-4
    layer_rate: float = 3e-4
    likeliest: int = 24
    precision: str | None = None

    @classmethod
    def of(cls, effort: str) -> DrafterSettings:
        return replace(cls(), **DRAFTER_EFFORTS[effort])


DRAFTER_EFFORTS: dict[str, dict[str, Any]] = {"quick": {}, "long": {"tokens": 4_000_000}}
