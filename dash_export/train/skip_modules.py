"""What is trained: one damage network and one bypass per unit, as a torch module."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from dash_export.errors import PolicyError
from dash_export.models.spec import DecoderSpec, Float32Array
from dash_export.policy import Bypass, SkipPolicy
from dash_export.train.cost import saved

FIRST_SCORE = -1.5
"""softplus(-1.5) = 0.2 nats, about what skipping a unit costs."""


class SkipModules(nn.Module):
    """The weights of a `SkipPolicy` as parameters (float32), with its two functions over rows of tokens. Raises
    PolicyError for bypasses without weights, of which there is nothing to train.

    States are RMSNorm(h) of unit gain, [..., hidden].
    """

    def __init__(self, policy: SkipPolicy) -> None:
        super().__init__()
        if not all(bypass.weights for bypass in policy.bypasses):
            raise PolicyError("A bypass of this policy has no weights, so there is nothing to train or to judge.")
        self.units = policy.units
        self.read = policy.read
        self.network = nn.ParameterDict(_parameters(policy.network or {}))
        self.bypasses = nn.ModuleList(nn.ParameterDict(_parameters(bypass.weights)) for bypass in policy.bypasses)

    def damage(self, state: torch.Tensor) -> torch.Tensor:
        """What enters layer `read`, normed -> damage [..., units] in nats; without a network 0."""
        if not self.network:
            return torch.zeros(*state.shape[:-1], len(self.units), device=state.device)
        return nn.functional.softplus(state.float() @ self.network["weight"] + self.network["bias"])

    def bypass(self, place: int, state: torch.Tensor) -> torch.Tensor:
        """The columns of a unit's bypass, as `skip_policy` orders them: what enters the unit, normed -> [..., columns]
        in the dtype of `state`.
        """
        weight = {name: value.to(state.dtype) for name, value in self.bypasses[place].named_parameters()}
        return state @ weight["weight"] + weight["bias"]

    def cost(self, spec: DecoderSpec) -> torch.Tensor:
        """What skipping each unit saves [units], by bytes."""
        own = [saved(spec, len(unit.layers)) for unit in self.units]
        return torch.tensor(own, device=next(self.parameters()).device)

    def to_policy(self) -> SkipPolicy:
        """The weights as numpy arrays (copies)."""
        bypasses = tuple(Bypass(_arrays(bypass)) for bypass in self.bypasses)
        return SkipPolicy(self.units, self.read, _arrays(self.network) or None, bypasses)


def initial_network(units: int, hidden: int) -> dict[str, Float32Array]:
    """A network that begins by predicting the same damage everywhere."""
    return {"weight": np.zeros((hidden, units), np.float32), "bias": np.full(units, FIRST_SCORE, np.float32)}


def _parameters(arrays: Mapping[str, np.ndarray]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}


def _arrays(part: nn.Module) -> dict[str, Float32Array]:
    return {name: value.detach().float().cpu().numpy().copy() for name, value in part.named_parameters()}
