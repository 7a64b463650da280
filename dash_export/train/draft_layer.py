"""The drafter in training (torch): `core/drafter.py` says what it computes.

All places of a sequence draft at once. A chain of drafts is forced to the true tokens, so its states are those that it
would have where its drafts are right. The layer is the family's own, with an attention function of ours: to the true K
and V of the places before the chain, and to the chain's own of one place each.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from dash_export.core.drafter import EMBEDDING, LAYER, NORM, STATE
from dash_export.models import DecoderSpec
from dash_export.models.spec import Float32Array
from dash_export.models.torch_model import copied_layer, embedded, unit_normed
from dash_export.train.model import GatedModel

_ATTENTION = "dash_export_drafter"


@dataclass
class _Rows:
    """What the layer attends to: true K and V [batch, kv heads, tokens, head], `hidden` where not, bool [places,
    tokens], and the chain's own K and V of each depth so far.
    """

    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor
    own: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


class DraftLayer(nn.Module):
    """The weights of a `Drafter` as parameters (float32), named as there but for the norms' offset of a family."""

    def __init__(self, gated: GatedModel) -> None:
        super().__init__()
        decoder, hidden = gated.model.model, gated.spec.hidden_size
        self.spec: DecoderSpec = gated.spec
        self.state, self.embedding = (nn.Linear(hidden, hidden, bias=False, device=gated.device) for _ in range(2))
        self.layer = copied_layer(gated.model, gated.spec, _ATTENTION)
        self.norm = nn.Parameter(decoder.norm.weight.float() + gated.spec.norm_offset)
        self._model = [gated.model]  # in a list: it is no part of this module

    def inputs(self, ids: torch.Tensor) -> torch.Tensor:
        """Return normed embeddings [..., hidden] float32 of ids, as the drafter reads them."""
        return unit_normed(embedded(self._model[0], ids).float(), self.spec)

    def chain(
        self, ids: torch.Tensor, states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, depth: int
    ) -> list[torch.Tensor]:
        """Return for each depth d the estimates of the states of places 1 + d on, [batch, tokens - 1 - d, hidden]: what
        is known of a place is its text, and the model's states up to 1 + d places before. The arguments are those of
        Written, in batches.
        """
        count, window = ids.shape[1] - 1, self.spec.traits.window(self.spec.num_layers - 1)
        places = torch.arange(count, device=ids.device)
        rows, found = _Rows(keys[:, :, :-1], values[:, :, :-1], places[:, None] < places), list[torch.Tensor]()
        self.layer.self_attn.rows = rows
        embeddings, state = self.inputs(ids), states[:, :-1].float()
        kind = ["sliding_attention" if window else "full_attention"] if self.spec.traits.window_rope else []
        for d in range(min(depth, count)):
            at = places[: count - d] + 1 + d
            rows.hidden = places[: count - d, None] < places
            if window:
                rows.hidden = rows.hidden | (at[:, None] - places >= window)
            h = self.state(state[:, : count - d]) + self.embedding(embeddings[:, 1 + d :])
            rotary = self._model[0].model.rotary_emb(h.float(), at[None], *kind)
            h = self.layer(h.float(), attention_mask=None, position_embeddings=rotary)
            state = unit_normed(h.float(), self.spec) * self.norm
            found.append(state)
        return found

    @torch.no_grad()
    def scale_branches(self, share: float) -> None:
        """Scale what attention and MLP add to the state."""
        offset, last = 0.0, ("self_attn.o_proj", "mlp.down_proj")
        if self.spec.post_norms or self.spec.traits.norms_after:
            offset, last = self.spec.norm_offset, ("post_attention_layernorm", "post_feedforward_layernorm")
        for name in last:
            for parameter in self.layer.get_submodule(name).parameters():
                parameter.copy_((parameter + offset) * share - offset)

    def weights(self) -> dict[str, Float32Array]:
        """Return the weights by the names of the contract."""
        found = {STATE: self.state.weight, EMBEDDING: self.embedding.weight, NORM: self.norm}
        offset = self.spec.norm_offset
        for name, value in self.layer.named_parameters():
            found[LAYER + name] = value + offset if name.endswith("norm.weight") else value
        return {name: np.array(value.detach().float().cpu(), np.float32) for name, value in found.items()}


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: object, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend from query [batch, heads, places, head] to the module's `rows`, and to key and value [batch, kv heads,
    places, head], which join the chain. Returns [batch, places, heads, head], as transformers expects.
    """
    rows: _Rows = module.rows
    rows.own.append((key, value))
    batch, heads, count, size = query.shape
    kv, tokens = key.shape[1], rows.keys.shape[2]
    query = query.reshape(batch, kv, -1, count, size)
    true = query.flatten(2, 3) @ rows.keys.to(query.dtype).transpose(-1, -2)
    own = [(query * key[:, :, None, :count]).sum(-1, keepdim=True) for key, _ in rows.own]
    scores = torch.cat([true.view(*query.shape[:-1], tokens), *own], -1).float() * (
        options.get("scaling") or size**-0.5
    )
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    hidden = nn.functional.pad(rows.hidden, (0, len(rows.own)))
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(query.dtype)
    found = (shares[..., :tokens].flatten(2, 3) @ rows.values.to(query.dtype)).view(query.shape)
    for place, (_, value) in enumerate(rows.own, tokens):
        found = found + shares[..., place, None] * value[:, :, None, :count]
    return found.reshape(batch, heads, count, size).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)
