"""What is trained: one damage network and one compensation per gated layer, stacked, as a torch module."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from dash_export.skip_policy import HISTORY, Compensation, SkipPolicy

FIRST_SCORE = -2.5
"""softplus(-2.5) = 0.08 nats, about what skipping one compensated layer costs."""


class SkipModules(nn.Module):
    """The weights of a `SkipPolicy` as parameters (float32), with its two functions over rows of tokens.

    `row` is a gated layer's place in `gated`; states are RMSNorm(h) of unit gain, [..., hidden].
    """

    def __init__(self, policy: SkipPolicy) -> None:
        super().__init__()
        self.gated = policy.gated
        self.reads = policy.reads
        self.kind = policy.compensation.kind
        self.network = nn.ParameterDict(_parameters(policy.network or {}))
        self.compensation = nn.ParameterDict(_parameters(policy.compensation.weights))

    def damage(self, row: int, state: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """The formula of `skip_policy`: state [..., hidden], history [..., 2] -> damage [...] in nats."""
        weight = self.network
        score = state.float() @ weight["state"][row] + weight["bias"][row]
        if "actions" in weight:
            score = score + history @ weight["actions"][row]
        score = score.relu() @ weight["out"][row] + weight["out_bias"][row] if "out" in weight else score[..., 0]
        return nn.functional.softplus(score)

    def compensate(self, row: int, hidden: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What is added for a skipped layer: hidden and its normed state [..., hidden] -> [..., hidden]."""
        weight = self.compensation
        if self.kind == "none":
            return torch.zeros_like(hidden)
        if self.kind == "scale":
            return hidden * weight["factor"][row].to(hidden.dtype)  # type: ignore[no-any-return]
        down, up = weight["down"][row].to(state.dtype), weight["up"][row].to(state.dtype)
        return state @ down @ up  # type: ignore[no-any-return]

    def to_policy(self, origin: str) -> SkipPolicy:
        """The weights as numpy arrays (copies)."""
        return SkipPolicy(
            self.gated,
            _arrays(self.network) or None,
            Compensation(self.kind, _arrays(self.compensation)),
            origin,
            reads=self.reads,
        )


def initial_network(gated: int, hidden: int, width: int, history: bool, seed: int) -> dict[str, np.ndarray]:
    """A network that begins by predicting a small damage everywhere; width 0 is linear."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    if width == 0:
        network = {"state": normal(gated, hidden, 1, scale=0.1 * hidden**-0.5), "bias": _full(FIRST_SCORE, gated, 1)}
    else:
        network = {
            "state": normal(gated, hidden, width, scale=hidden**-0.5),
            "bias": _full(0.5, gated, width),
            "out": normal(gated, width, scale=0.5 * width**-0.5),
            "out_bias": _full(FIRST_SCORE, gated),
        }
    return network | ({"actions": np.zeros((gated, HISTORY, max(width, 1)), np.float32)} if history else {})


def _full(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.float32)


def _parameters(arrays: Mapping[str, np.ndarray]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}


def _arrays(parameters: nn.ParameterDict) -> dict[str, np.ndarray]:
    return {name: value.detach().float().cpu().numpy().copy() for name, value in parameters.items()}
