"""Training of policies: units, network and bypasses (torch). This file, without torch, has settings and defaults."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("token", "static")
PRECISIONS = ("bfloat16", "float32")
"""Names of torch's dtypes."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training. Steps are batches of `windows` windows of `window` tokens; no stage takes more steps
    than the tuning.

    `search_steps`: steps that fit the bypasses of candidate units; `fit_steps`: steps that fit those of the chosen
    units; `warm_up_steps`: first steps of the regression, which skip at random only. `trade_offs`: the range of the
    dial that training covers, in nats per dense token time. `again`: factor on the tuning's learning rates when it
    goes on from a trained policy. `own_prompts`: number of the model's own continuations, of up to `own_tokens` tokens,
    that join the corpus. `held_out`: share of every text that is only evaluated on. `precision` of the frozen model:
    bfloat16 or float32.
    """

    seed: int = 0
    window: int = 256
    windows: int = 4
    search_steps: int = 16
    fit_steps: int = 40
    warm_up_steps: int = 30
    regression_steps: int = 120
    tuning_steps: int = 500
    network_rate: float = 3e-3
    bypass_rate: float = 4.5e-4
    refinement_rate: float = 2.5e-4
    trade_offs: tuple[float, float] = (0.4, 2.2)
    again: float = 0.5
    own_prompts: int = 160
    own_tokens: int = 192
    held_out: float = 0.08
    precision: str = PRECISIONS[0]
