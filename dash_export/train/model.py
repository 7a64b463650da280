"""The model that a policy is trained in, and the policy's trained tensors (torch).

`GatedModel` is the transition of the MDP: the frozen model with per-token actions, in one teacher-forced batched pass,
with the contract of the oracle (reference/oracle.py), in the training dtype and differentiable. Every layer sees every
token; of one that skips a unit only the K and V of the bypass. `SkipModules` are the damage network and the bypasses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dash_export.core.policy import SkipPolicy
from dash_export.core.units import Unit
from dash_export.files.artifacts import Progress, no_progress
from dash_export.models import Checkpoint, DecoderSpec
from dash_export.models.spec import Float32Array, layer_weight
from dash_export.models.torch_model import LayerInputs, bypass_input, embedded, instead, torch_model, unit_normed

BITS, BYPASS_BITS = 4, 8
"""Bits of a weight of the model and of a bypass, as engines for a CPU have them."""
KEPT = 2 << 30
"""Bytes of activations that a backward pass on a CPU may keep: as many windows go through it at once."""
FIRST_SCORE = -1.5
"""softplus(-1.5) = 0.2 nats, about what skipping a unit costs."""

Decide = Callable[[torch.Tensor], torch.Tensor]
"""damage [batch, tokens, units] -> skip [batch, tokens, units] bool."""
Soften = Callable[[torch.Tensor], torch.Tensor]
"""damage [batch, tokens, units] -> degree of skipping in (0, 1), in the same shape, differentiable."""


class Head(NamedTuple):
    """The map from final states to logits: a matrix [vocab, hidden], scaled, and `cap` as in `Traits.logits_cap`."""

    weight: torch.Tensor
    cap: float = 0.0


class SkipModules(nn.Module):
    """The weights of a `SkipPolicy` as parameters (float32), and its network and bypasses as functions of rows of
    tokens [..., hidden]. Every bypass has weights.
    """

    def __init__(self, policy: SkipPolicy) -> None:
        super().__init__()
        self.units = policy.units
        self.read = policy.read
        self.network = _parameters(policy.network or {})
        self.bypasses = nn.ModuleList(map(_parameters, policy.bypasses))

    def damage(self, state: torch.Tensor) -> torch.Tensor:
        """Return damage [..., units] in nats of `state`, the normed input of layer `read`; 0 without a network."""
        if not self.network:
            return torch.zeros(*state.shape[:-1], len(self.units), device=state.device)
        return nn.functional.softplus(state.float() @ self.network["weight"] + self.network["bias"])

    def bypass(self, place: int, state: torch.Tensor) -> torch.Tensor:
        """Return the columns [..., columns] of unit `place`'s bypass, in the dtype of `state` (`bypass_input`)."""
        weight, bias = (self.bypasses[place].get_parameter(name).to(state.dtype) for name in ("weight", "bias"))
        return state @ weight + bias

    def cost(self, spec: DecoderSpec) -> torch.Tensor:
        """Return the fraction of a token's time that skipping each unit saves, [units], by bytes (`saved`)."""
        own = [saved(spec, len(unit.layers)) for unit in self.units]
        return torch.tensor(own, device=next(self.parameters()).device)

    def to_policy(self) -> SkipPolicy:
        bypasses = tuple(map(_arrays, self.bypasses))
        return SkipPolicy(self.units, self.read, _arrays(self.network) or None, bypasses)


def initial_network(units: int, hidden: int) -> dict[str, Float32Array]:
    """Return a network that begins by predicting the same damage everywhere."""
    return {"weight": np.zeros((hidden, units), np.float32), "bias": np.full(units, FIRST_SCORE, np.float32)}


def _parameters(arrays: Mapping[str, np.ndarray]) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.tensor(array)) for name, array in arrays.items()})


def _arrays(part: nn.Module) -> dict[str, Float32Array]:
    return {name: value.detach().float().cpu().numpy().copy() for name, value in part.named_parameters()}


@dataclass(frozen=True)
class Rollout:
    """Result of a pass. `final`: normed last states, and `state`: what the network read [batch, tokens, hidden].
    `skipped` bool, and `taken` float32, the same with the gradient of their softened form [batch, tokens, units].
    """

    final: torch.Tensor
    state: torch.Tensor
    skipped: torch.Tensor
    taken: torch.Tensor


class GatedModel:
    """A frozen checkpoint on one device, in one dtype. `head` has all tokens, `common` those that losses compare.
    `recomputes`: layers are run again in the backward pass, to fit in the memory of a GPU.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress = no_progress
    ) -> None:
        self.model = torch_model(checkpoint, dtype, progress=progress).to(device=device)
        self.device = device
        self.dtype = dtype
        self.spec = checkpoint.spec
        traits, weight = checkpoint.spec.traits, self.model.lm_head.weight
        self.head = Head(weight if traits.logits_scale == 1 else weight * traits.logits_scale, traits.logits_cap)
        self.common = self.head
        self.recomputes = device.type == "cuda"

    def learn_on(self, tokens: torch.Tensor) -> None:
        """Let losses compare the logits of these tokens [n] only: `common` becomes their part of the head."""
        self.common = self.head._replace(weight=self.head.weight[tokens.to(self.device)].contiguous())

    def dense(self, ids: torch.Tensor) -> torch.Tensor:
        """Run a dense pass: ids [batch, tokens] -> normed last hidden states [batch, tokens, hidden]."""
        final: torch.Tensor = self.model.model(ids, use_cache=False).last_hidden_state
        return final

    def dense_layers(self, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Run a dense pass over ids [batch, tokens]; yield (layer, its input, its output [batch, tokens, hidden])."""
        hidden, inputs = self._embedded(ids)
        for index in range(self.spec.num_layers):
            before, hidden = hidden, self._layer(index, hidden, inputs)
            yield index, before, hidden

    def keys_values(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return K and V of a layer before norm and RoPE, side by side [..., 2 * kv], from the layer's input."""
        layer = self.model.model.layers[index]
        normed = hidden if self.spec.traits.norms_after else layer.input_layernorm(hidden)
        return torch.cat([layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)], -1)

    def rollout(
        self, ids: torch.Tensor, modules: SkipModules, decide: Decide, dense: torch.Tensor, soften: Soften | None = None
    ) -> Rollout:
        """Run one pass over ids [batch, tokens]; tokens where `dense` [batch, tokens] is true run every layer.

        Gradients flow as torch's mode says. With `soften`, decisions have the gradient of their softened form
        (straight-through).
        """
        hidden, inputs = self._embedded(ids)
        hidden = self._layers(range(modules.read), hidden, inputs)
        # Decisions give gradients to the network, but not to the base model's hidden states, which are its input.
        state = unit_normed(hidden, self.spec).detach()
        damage = modules.damage(state)
        skipped = decide(damage.detach()) & ~dense[..., None]
        taken = skipped.float()
        if soften is not None:
            soft = soften(damage)
            taken = taken + (soft - soft.detach()) * ~dense[..., None]
        at = modules.read
        for place, unit in enumerate(modules.units):
            hidden = self._layers(range(at, unit.first), hidden, inputs)
            at = unit.first
            if soften is not None or bool(skipped[..., place].any()):
                columns = modules.bypass(place, bypass_input(hidden, self.spec))
                hidden = self._unit(unit, hidden, inputs, columns, skipped[..., place], taken[..., place])
                at = unit.last + 1
        final = self.model.model.norm(self._layers(range(at, self.spec.num_layers), hidden, inputs))
        return Rollout(final, state, skipped, taken)

    def _embedded(self, ids: torch.Tensor) -> tuple[torch.Tensor, LayerInputs]:
        """Return the input of layer 0, and the other inputs of all layers."""
        hidden = embedded(self.model, ids)
        return hidden, LayerInputs(self.model.model, self.spec, hidden)

    def _layers(self, layers: range, hidden: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        for index in layers:
            hidden = self._layer(index, hidden, inputs)
        return hidden

    def _unit(
        self,
        unit: Unit,
        hidden: torch.Tensor,
        inputs: LayerInputs,
        columns: torch.Tensor,
        skip: torch.Tensor,
        taken: torch.Tensor,
    ) -> torch.Tensor:
        """Return a unit's output: from `columns` of its bypass for the tokens that `skip` it, from its layers for the
        others. The gradient of the decision flows through `taken` [batch, tokens].
        """
        others = len(unit.layers) - 1
        sizes = [self.spec.hidden_size, *[self.spec.key_value_size] * (2 * others)]
        update, *rows = torch.split(columns, sizes, -1)
        ran = self._layer(unit.first, hidden, inputs)  # its K and V equal the bypass's: both project h
        for index, key, value in zip(unit.layers[1:], rows[::2], rows[1::2], strict=True):
            ran = self._layer(index, ran, inputs, skip, (key, value))
        bypassed = hidden + update
        chosen: torch.Tensor = torch.where(skip[..., None], bypassed, ran)
        if not taken.requires_grad:
            return chosen
        return chosen + (taken - taken.detach())[..., None].to(chosen.dtype) * (bypassed - ran).detach()

    def _layer(
        self,
        index: int,
        hidden: torch.Tensor,
        inputs: LayerInputs,
        skip: torch.Tensor | None = None,
        rows: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Run one layer; for the tokens that `skip`, `rows` take the place of its K and V."""
        layer = self.model.model.layers[index]

        def run(hidden: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
            with ExitStack() as stack:
                for projection, own in zip((layer.self_attn.k_proj, layer.self_attn.v_proj), rows, strict=False):
                    assert skip is not None
                    stack.enter_context(instead(projection, skip, own))
                ran: torch.Tensor = layer(hidden, **inputs.of(index))
            return ran

        if self.recomputes and any(given.requires_grad for given in (hidden, *rows)):
            again: torch.Tensor = checkpoint(run, hidden, *rows, use_reentrant=False)
            return again
        return run(hidden, *rows)


def below(limits: torch.Tensor) -> Decide:
    """Return the rule of `core/rule.py`: skip where damage < limit, in nats; limits [..., units]."""
    return lambda damage: damage < limits


def always(units: int, places: Sequence[int]) -> Decide:
    """Return the rule to skip the units at `places`, out of `units` units, at every token."""
    mask = torch.zeros(units, dtype=torch.bool)
    mask[list(places)] = True
    return lambda damage: mask.to(damage.device).expand(damage.shape)


def saved(spec: DecoderSpec, layers: int) -> float:
    """Return the fraction of a token's time that skipping a unit of `layers` layers saves, as estimated before any
    engine is built; below 0 where the bypass is larger. Decode is bound by memory traffic, so this is a fraction of
    bytes: (layers * a layer's - the bypass's) / (all layers' + the head's). The cost table of a build measures it.
    """
    layer = layer_size(spec)
    bypass = spec.hidden_size * (spec.hidden_size + 2 * spec.key_value_size * layers)
    token = spec.num_layers * layer + spec.vocab_size * spec.hidden_size
    return (layers * layer * BITS - bypass * BYPASS_BITS) / (token * BITS)


def rows_at_once(spec: DecoderSpec, window: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many windows go through a backward pass at once. On a GPU all do: layers are run again there."""
    return 1 << 30 if device.type == "cuda" else max(1, int(KEPT // activations(spec, window, dtype)))


def activations(spec: DecoderSpec, tokens: int, dtype: torch.dtype) -> float:
    """Return about the bytes that all layers keep of `tokens` tokens for the backward pass."""
    return (
        tokens * spec.num_layers * (16 * spec.hidden_size + 10 * spec.intermediate_size) * torch.finfo(dtype).bits / 8
    )


def layer_size(spec: DecoderSpec) -> int:
    return sum(prod(shape) for name, shape in spec.weight_shapes().items() if name.startswith(layer_weight(0)))
