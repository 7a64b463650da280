"""The transition of the MDP: the frozen model with per-token actions, in one teacher-forced batched pass (torch).

The same contract as the oracle, over batches, in the training dtype and differentiable. Every layer sees every token:
one that skips a unit only gives it the K and V of its bypass, and leaves it with the bypass's hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from dash_export.decision import Unit
from dash_export.models import Checkpoint
from dash_export.policy import key_value_size
from dash_export.torch_model import torch_model
from dash_export.train.corpus import Batch
from dash_export.train.skip_modules import SkipModules

Decide = Callable[[torch.Tensor], torch.Tensor]
"""damage [batch, tokens, units] -> skip [batch, tokens, units] bool."""
Soften = Callable[[torch.Tensor], torch.Tensor]
"""damage [batch, tokens, units] -> how much of a skip each is, in (0, 1), differentiable."""
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rollout:
    """final: normed last hidden states [batch, tokens, hidden]. Per unit, [batch, tokens, units]: skipped bool; taken
    float32, the same with the gradient of its softened form; damage float32.
    """

    final: torch.Tensor
    skipped: torch.Tensor
    taken: torch.Tensor
    damage: torch.Tensor


class GatedModel:
    """A frozen checkpoint on one device, in one dtype. `recomputes`: what a layer keeps for the backward pass is its
    input only, which a GPU's memory needs.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        weights = {name: weight.read_rows(0, weight.shape[0]) for name, weight in checkpoint.weights.items()}
        self.model = torch_model(checkpoint.config, weights, dtype).to(device=device)
        self.device = device
        self.dtype = dtype
        self.spec = checkpoint.spec
        self.head = self.model.lm_head.weight
        self.recomputes = device.type == "cuda"

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
        hidden, rotary = self._embedded(ids)
        for index in range(self.spec.num_layers):
            before, hidden = hidden, self._layer(index, hidden, rotary)
            yield index, before, hidden

    def keys_values(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What enters a layer -> its K and V before norm and RoPE, side by side [..., 2 * kv]."""
        layer = self.model.model.layers[index]
        normed = layer.input_layernorm(hidden)
        return torch.cat([layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)], -1)

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
            hidden, rotary = self._embedded(ids)
            hidden = self._layers(range(modules.read), hidden, rotary)
            with torch.set_grad_enabled(outer):
                # The network learns from decisions, the base's hidden states do not: they are its input as they are.
                damage = modules.damage(self.normed(hidden).detach())
            skipped = decide(damage.detach()) & ~dense[..., None]
            taken = skipped.float()
            if soften is not None:
                soft = soften(damage)
                taken = taken + (soft - soft.detach()) * ~dense[..., None]
            at = modules.read
            for place, unit in enumerate(modules.units):
                hidden = self._layers(range(at, unit.first), hidden, rotary)
                if soften is not None or bool(skipped[..., place].any()):
                    columns = modules.bypass(place, self.normed(hidden))
                    hidden = self._unit(unit, hidden, rotary, columns, skipped[..., place], taken[..., place])
                    at = unit.last + 1
                else:
                    at = unit.first
            final = self.model.model.norm(self._layers(range(at, self.spec.num_layers), hidden, rotary))
        return Rollout(final, skipped, taken, damage)

    def _embedded(self, ids: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
        """What enters layer 0, and (cos, sin) of positions from 0 on."""
        hidden = self.model.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return hidden, self.model.model.rotary_emb(hidden, positions)

    def _layers(self, layers: range, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        for index in layers:
            hidden = self._layer(index, hidden, rotary)
        return hidden

    def _unit(
        self,
        unit: Unit,
        hidden: torch.Tensor,
        rotary: Rotary,
        columns: torch.Tensor,
        skip: torch.Tensor,
        taken: torch.Tensor,
    ) -> torch.Tensor:
        """What leaves a unit: `columns` of its bypass [batch, tokens, columns] for the rows that `skip` it, whose
        gradient to the decision is that of `taken` [batch, tokens].
        """
        others = len(unit.layers) - 1
        sizes = [self.spec.hidden_size, *[key_value_size(self.spec)] * (2 * others)]
        update, *rows = torch.split(columns, sizes, -1)
        ran = self._layer(unit.first, hidden, rotary)  # its K and V are the bypass's: the same projections of h
        for index, key, value in zip(unit.layers[1:], rows[::2], rows[1::2], strict=True):
            ran = self._layer(index, ran, rotary, skip, (key, value))
        bypassed = hidden + update
        chosen: torch.Tensor = torch.where(skip[..., None], bypassed, ran)
        if not taken.requires_grad:
            return chosen
        return chosen + (taken - taken.detach())[..., None].to(chosen.dtype) * (bypassed - ran).detach()

    def _layer(
        self,
        index: int,
        hidden: torch.Tensor,
        rotary: Rotary,
        skip: torch.Tensor | None = None,
        rows: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """One layer, with K and V given in `rows` for the tokens that `skip`."""
        if self.recomputes and any(given.requires_grad for given in (hidden, *rows)):
            ran: torch.Tensor = checkpoint(self._run, index, hidden, rotary, skip, *rows, use_reentrant=False)
            return ran
        return self._run(index, hidden, rotary, skip, *rows)

    def _run(
        self, index: int, hidden: torch.Tensor, rotary: Rotary, skip: torch.Tensor | None, *rows: torch.Tensor
    ) -> torch.Tensor:
        layer = self.model.model.layers[index]
        with ExitStack() as stack:
            if skip is not None:
                for projection, own in zip((layer.self_attn.k_proj, layer.self_attn.v_proj), rows, strict=True):
                    stack.enter_context(_instead(projection, skip, own))
            ran: torch.Tensor = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return ran


def below(limits: torch.Tensor) -> Decide:
    """The rule of `decision.py`: skip where damage < limit, in nats; limits [..., units]."""
    return lambda damage: damage < limits


def always(units: int, places: Sequence[int]) -> Decide:
    """Of so many units, skip these."""
    mask = torch.zeros(units, dtype=torch.bool)
    mask[list(places)] = True
    return lambda damage: mask.to(damage.device).expand(damage.shape)


@contextmanager
def _instead(projection: torch.nn.Module, skip: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """While it lasts, `projection` gives `rows` for the tokens that `skip`."""
    hook = projection.register_forward_hook(
        lambda _module, _inputs, found: torch.where(skip[..., None], rows.to(found.dtype), found)
    )
    try:
        yield
    finally:
        hook.remove()
