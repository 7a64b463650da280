"""Units side by side made one: how a training goes on from a policy with larger units, which are fewer engines.

A larger unit's bypass is the ridge regression of closed_form.py on what the smaller ones' bypasses do one after the
other. That is tuned already, and all but linear in the unit's input (Qwen2.5-Coder-0.5B, units of two layers made units
of four: 0.2 % of the variance is left). Its damage is fitted, before softplus, to the sum of theirs.
"""

from collections.abc import Iterable, Sequence

import torch

from dash_export.core.policy import SkipPolicy, Weights
from dash_export.core.units import Unit
from dash_export.models.torch_model import bypass_input, unit_normed
from dash_export.train.closed_form import solved, with_ones
from dash_export.train.corpus import Batch
from dash_export.train.model import GatedModel, SkipModules


@torch.no_grad()
def merged(
    model: GatedModel, policy: SkipPolicy, units: Sequence[Unit], batches: Iterable[Batch]
) -> tuple[Weights, ...]:
    """Return the weights of the network (none where the policy has none) and of the bypasses of `units`, each of which
    is one of the policy's units or several side by side.
    """
    modules, sums = SkipModules(policy).to(model.device), dict[Unit | None, tuple[torch.Tensor, torch.Tensor]]()
    parts = [[place for place, own in enumerate(policy.units) if own.first in unit.layers] for unit in units]
    firsts = {unit.first: (unit, own) for unit, own in zip(units, parts, strict=True) if len(own) > 1}

    def add(unit: Unit | None, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = with_ones(x.double()), y.double()
        xx, xy = sums.get(unit, (0, 0))
        sums[unit] = (xx + x.T @ x, xy + x.T @ y)

    for batch in batches:
        for layer, entering, _ in model.dense_layers(batch.ids):
            rows = entering[batch.counted]
            if layer == modules.read and modules.network:
                state = unit_normed(rows, model.spec)
                damage = modules.damage(state)
                damage = torch.stack([damage[:, own].sum(-1) for own in parts], -1).clamp_min(1e-6)  # 0 has no inverse
                add(None, state, damage + torch.log(-torch.expm1(-damage)))  # the inverse of softplus
            if layer in firsts:
                add(firsts[layer][0], bypass_input(rows, model.spec), _chained(model, modules, firsts[layer][1], rows))
            if layer == max(firsts):
                break
    network = dict(solved(*sums[None])) if None in sums else {}
    for place, own in enumerate(parts):
        for name, fitted in network.items():
            if len(own) == 1:
                fitted[..., place] = (policy.network or {})[name][..., own[0]]
    bypasses = (
        policy.bypasses[own[0]] if len(own) == 1 else solved(*sums[unit])
        for unit, own in zip(units, parts, strict=True)
    )
    return (network, *bypasses)


def _chained(model: GatedModel, modules: SkipModules, places: Sequence[int], entering: torch.Tensor) -> torch.Tensor:
    """Return the columns of a bypass (`core/policy.py`) that does what those of these units do one after the other."""
    hidden, total, rows = entering, torch.zeros_like(entering, dtype=torch.float32), list[torch.Tensor]()
    for place in places:
        if place != places[0]:
            rows.append(model.keys_values(modules.units[place].first, hidden))
        update, own = modules.bypass(place, bypass_input(hidden, model.spec)).tensor_split([entering.shape[-1]], -1)
        hidden, total = hidden + update, total + update
        rows.append(own)
    return torch.cat([total, *rows], -1)
