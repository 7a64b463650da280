"""The transition of the MDP: the frozen model with per-token actions, in one teacher-forced batched pass (torch).

The same contract as the oracle, over batches, in the training dtype and differentiable. Every layer sees every token's
hidden state, so a skipped token's K and V come from its own input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dash_export.decision import decision_points
from dash_export.models import Checkpoint
from dash_export.policy.corpus import Batch
from dash_export.policy.skip_modules import SkipModules
from dash_export.skip_policy import HISTORY
from dash_export.torch_model import torch_model

Decide = Callable[[int, torch.Tensor], torch.Tensor]
"""(row of the gated layer, damage [batch, tokens]) -> skip [batch, tokens] bool."""
Soften = Callable[[torch.Tensor], torch.Tensor]
"""damage [batch, tokens] -> how much of a skip it is, in (0, 1), differentiable."""


@dataclass(frozen=True)
class Rollout:
    """final: normed last hidden states [batch, tokens, hidden]. Per gated layer, [batch, tokens, gated]: skipped bool;
    taken float32, the same with the gradient of its softened form; damage float32.
    """

    final: torch.Tensor
    skipped: torch.Tensor
    taken: torch.Tensor
    damage: torch.Tensor


class GatedModel:
    """A frozen checkpoint on one device, in one dtype."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        weights = {name: weight.read_rows(0, weight.shape[0]) for name, weight in checkpoint.weights.items()}
        self.model = torch_model(checkpoint.config, weights, dtype).to(device=device)
        self.device = device
        self.dtype = dtype
        self.spec = checkpoint.spec
        self.head = self.model.lm_head.weight

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """RMSNorm of unit gain, computed in float32, in the dtype of `hidden`."""
        return torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.spec.rms_norm_eps).to(
            hidden.dtype
        )

    def tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch's ids, dense and counted, where the model is."""
        ids, dense, counted = (torch.from_numpy(own).to(self.device) for own in (batch.ids, batch.dense, batch.counted))
        return ids, dense, counted

    def dense(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, tokens] -> normed last hidden states."""
        final: torch.Tensor = self.model.model(ids, use_cache=False).last_hidden_state
        return final

    def dense_layers(self, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """ids [batch, tokens] -> (layer, its input, its output [batch, tokens, hidden]), layer by layer."""
        decoder = self.model.model
        hidden = decoder.embed_tokens(ids)
        rotary = self.rotary(hidden)
        for index, layer in enumerate(decoder.layers):
            before, hidden = hidden, layer(hidden, attention_mask=None, position_embeddings=rotary)
            yield index, before, hidden

    def rollout(
        self,
        ids: torch.Tensor,
        modules: SkipModules,
        decide: Decide,
        dense: torch.Tensor,
        *,
        network_grad: bool = False,
        soften: Soften | None = None,
    ) -> Rollout:
        """One pass over ids [batch, tokens]; rows where `dense` [batch, tokens] is true run every layer.

        With `network_grad` only the damage has a gradient, to the network's weights: the pass itself keeps no graph.
        With `soften` decisions have the gradient of their softened form (straight-through). Otherwise gradients flow as
        torch's mode says.
        """
        outer = torch.is_grad_enabled()
        with torch.set_grad_enabled(outer and not network_grad):
            hidden = self.model.model.embed_tokens(ids)
            rotary = self.rotary(hidden)
            history = torch.zeros(*ids.shape, HISTORY, device=ids.device)
            points = decision_points(modules.gated, modules.reads)
            state = hidden
            decisions: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
            rows = {layer: row for row, layer in enumerate(modules.gated)}
            for index, layer in enumerate(self.model.model.layers):
                row = rows.get(index)
                entered = hidden
                ran = layer(hidden, attention_mask=None, position_embeddings=rotary)
                if row is None:
                    hidden = ran
                    history = _shift(history, torch.zeros_like(dense))
                    state = entered if index in points else state
                    continue
                with torch.set_grad_enabled(outer):
                    damage = self._damage(modules, row, state, history)
                skip = decide(row, damage.detach()) & ~dense
                taken = skip.float()
                if soften is not None:
                    soft = soften(damage)
                    taken = (taken + soft - soft.detach()) * ~dense
                    update = hidden + modules.compensate(row, hidden, self.normed(hidden)) - ran
                    hidden = ran + taken[..., None].to(ran.dtype) * update
                elif skip.any():
                    skipped = hidden + modules.compensate(row, hidden, self.normed(hidden))
                    hidden = torch.where(skip[..., None], skipped, ran)
                else:
                    hidden = ran
                history = _shift(history, skip)
                state = entered if index in points else state
                decisions.append((skip, taken, damage))
            final = self.model.model.norm(hidden)
        skips, takens, damages = (torch.stack(column, -1) for column in zip(*decisions, strict=True))
        return Rollout(final, skips, takens, damages)

    def rotary(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of positions from 0 on."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        tables: tuple[torch.Tensor, torch.Tensor] = self.model.model.rotary_emb(hidden, positions)
        return tables

    def _damage(self, modules: SkipModules, row: int, state: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        if not modules.network:
            return torch.zeros(state.shape[:-1], device=state.device)
        # The network learns from decisions, the base's hidden states do not: they are its input as they are.
        return modules.damage(row, self.normed(state).detach(), history)


def below(limit: torch.Tensor | float) -> Decide:
    """The rule of `decision.py` where every layer costs alike: skip where damage < limit, in nats."""
    return lambda _, damage: damage < limit


def _shift(history: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    return torch.stack([history[..., 1], skip.float()], -1)
