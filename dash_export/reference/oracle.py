"""The oracle: it defines what skipping means (docs/method.md), in plain PyTorch over the transformers model. Slow and
obvious.

One teacher-forced pass is the whole definition. Where a token skips a unit, the K and V of the unit's layers come from
the bypass, computed from the unit's input; later tokens attend to all K and V. A free-running generation repeats the
pass for each new token.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dash_export.core.policy import SkipPolicy
from dash_export.core.rule import DecisionRule
from dash_export.core.units import DENSE_POSITIONS, layer_actions, unit_skips
from dash_export.models import Checkpoint
from dash_export.models.bypasses import full_bypass
from dash_export.models.torch_model import LayerInputs, embedded, instead, logits_of, torch_model


@dataclass(frozen=True)
class Pass:
    """Result of a pass: logits [tokens, vocab] float32, actions int8 [tokens, layers], damage float32 [tokens, units]
    (0 without a network).
    """

    logits: npt.NDArray[np.float32]
    actions: npt.NDArray[np.int8]
    damage: npt.NDArray[np.float32]


class Oracle:
    """A checkpoint and its skip policy in float32."""

    def __init__(self, checkpoint: Checkpoint, policy: SkipPolicy) -> None:
        self.model = torch_model(checkpoint, torch.float32, attention="eager")
        self.policy = policy
        self.spec, self.eps = checkpoint.spec, checkpoint.spec.rms_norm_eps
        self.size = checkpoint.spec.key_value_size
        self.bypasses = [
            {name: torch.from_numpy(array) for name, array in full_bypass(bypass, unit, checkpoint).items()}
            for unit, bypass in zip(policy.units, policy.bypasses, strict=True)
        ]

    @torch.no_grad()
    def forward(
        self,
        ids: npt.NDArray[np.int64],
        rule: DecisionRule | None = None,
        actions: npt.NDArray[np.int8] | None = None,
        prefix: int = DENSE_POSITIONS,
    ) -> Pass:
        """Run one pass over ids [tokens]: dense, with forced `actions`, or by `rule` after `prefix` tokens."""
        decoder, units = self.model.model, self.policy.units
        hidden = embedded(self.model, torch.from_numpy(ids)[None])
        count, layers = len(ids), len(decoder.layers)
        inputs = LayerInputs(decoder, self.spec, hidden)
        damage = np.zeros((len(units), count), np.float32)
        skipped = np.zeros((len(units), count), np.bool_) if actions is None else unit_skips(actions, units)
        index = 0
        while index < layers:
            if index == self.policy.read and self.policy.network is not None:
                damage = self.damage(hidden[0])
                if rule is not None and actions is None:
                    skipped = rule.skips(damage)
                    skipped[:, : max(prefix, DENSE_POSITIONS)] = False
            unit = next((place for place, unit in enumerate(units) if unit.first == index), None)
            own = range(index, index + 1) if unit is None else units[unit].layers
            skip = torch.zeros(count, dtype=torch.bool) if unit is None else torch.from_numpy(skipped[unit])
            entered = hidden
            update, rows = (hidden * 0, {}) if unit is None else self.bypass(entered, unit)
            with ExitStack() as stack:
                for name, row in rows.items():
                    stack.enter_context(instead(decoder.get_submodule(name), skip[None], row))
                for layer in own:
                    hidden = decoder.layers[layer](hidden, **inputs.of(layer))
            hidden = torch.where(skip[None, :, None], entered + update, hidden)
            index = own.stop
        logits = logits_of(self.model, decoder.norm(hidden)[0], self.spec.traits)
        return Pass(logits.numpy(), layer_actions(skipped, units, layers), damage.T)

    def damage(self, state: torch.Tensor) -> npt.NDArray[np.float32]:
        """Run the policy network: state [tokens, hidden], the input of layer `read` -> damage [units, tokens]."""
        network = self.policy.network
        assert network is not None
        score = self.normed(state) @ torch.tensor(network["weight"]) + torch.tensor(network["bias"])
        return torch.nn.functional.softplus(score).T.numpy()

    def bypass(self, hidden: torch.Tensor, place: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the bypass of unit `place` from its input [..., hidden]: its update, and what replaces the outputs of
        the decoder's modules, by name: K and V [..., kv] before norm and RoPE.
        """
        unit, weight = self.policy.units[place], self.bypasses[place]
        x = hidden if self.spec.traits.norms_after else self.normed(hidden)
        found = x @ weight["weight"] + weight["bias"]
        updates = found.shape[-1] - 2 * self.size * len(unit.layers)
        update = found[..., :updates] if updates else torch.zeros_like(hidden)
        names = [f"layers.{layer}.self_attn.{which}_proj" for layer in unit.layers for which in ("k", "v")]
        return update, dict(zip(names, torch.split(found[..., updates:], self.size, -1), strict=True))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return RMSNorm of unit gain."""
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
