"""The one home of every default of training."""

from __future__ import annotations

from dataclasses import dataclass

RANK = 128
"""Of a low-rank compensation where nothing else is said, or as many as the model's hidden size."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a policy is trained. Steps are batches of `windows` windows of `window` tokens.

    `rank`: of the low-rank compensation, 0 for that of the policy that training goes on from, else `RANK`; `width`:
    hidden units of the damage network, 0 for a linear one; `history`: whether it reads the last two actions; `decide`:
    about `each` layer one layer ahead, or about all of them at `once`, from the state before the first; empty is as the
    policy that training goes on from, else `each`. `trade_offs`: the range of the dial that training covers, in nats
    per dense token time. `again`: the share of the tuning's learning rates when it goes on from a trained policy.
    `own_prompts` continuations of the model's own, of up to `own_tokens` tokens, join the corpus. `held_out`: share of
    every text that is only evaluated on. `precision` of the frozen model, bfloat16 or float32; empty is what is faster.
    """

    seed: int = 0
    window: int = 256
    windows: int = 4
    compensation: str = "low_rank"
    rank: int = 0
    width: int = 0
    history: bool = False
    decide: str = ""
    fit_steps: int = 40
    warm_up_steps: int = 50
    regression_steps: int = 120
    tuning_steps: int = 400
    network_rate: float = 3e-3
    compensation_rate: float = 1e-3
    refinement_rate: float = 5e-4
    trade_offs: tuple[float, float] = (0.25, 1.5)
    again: float = 0.5
    own_prompts: int = 160
    own_tokens: int = 192
    held_out: float = 0.08
    precision: str = ""
