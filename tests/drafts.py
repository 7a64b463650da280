"""Drafts as `core/drafter.py` defines them, slow and obvious: transformers' own last layer with other weights, over the
K and V that the model has. Written without the graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import transformers

from dash_export.core.drafter import EMBEDDING, LAYER, NORM, STATE, Drafter
from dash_export.models import Checkpoint
from dash_export.models.torch_model import LayerInputs, embedded, logits_of, torch_model


class Draft(NamedTuple):
    token: int
    chance: float
    state: np.ndarray


@torch.no_grad()
def expected_drafts(checkpoint: Checkpoint, drafter: Drafter, ids: np.ndarray, count: int) -> list[Draft]:
    """Drafts after `ids`, of which the model has run all but the last."""
    spec, model = checkpoint.spec, torch_model(checkpoint, torch.float32, attention="eager")
    last, weights = spec.num_layers - 1, {name: torch.from_numpy(array) for name, array in drafter.weights.items()}
    cache = transformers.DynamicCache()
    given = {"past_key_values": cache, "use_cache": True}
    state = model.model(torch.from_numpy(ids[None, :-1]), **given).last_hidden_state[:, -1:]

    layer = model.model.layers[last]
    layer._forward_hooks.clear()  # updates of pruned units
    own = {name.removeprefix(LAYER): array for name, array in weights.items() if name.startswith(LAYER)}
    offsets = {name: spec.norm_offset if name.endswith("norm.weight") else 0 for name in own}
    layer.load_state_dict({name: array - offsets[name] for name, array in own.items()}, strict=False)
    assert not own.keys() - layer.state_dict().keys()
    token, found = int(ids[-1]), []
    rows = model.lm_head.weight[torch.from_numpy(drafter.tokens)].half().float()
    for length in range(len(ids), len(ids) + count):
        assert cache.layers[last].keys.shape[2] == length - 1
        embedding = embedded(model, torch.tensor([[token]]))
        hidden = state @ weights[STATE].T + normed(embedding, spec.rms_norm_eps) @ weights[EMBEDDING].T
        inputs = LayerInputs(model.model, spec, torch.zeros(1, length, spec.hidden_size)).of(last)
        mask, (cos, sin) = inputs["attention_mask"], inputs["position_embeddings"]
        hidden = layer(
            hidden,
            attention_mask=None if mask is None else mask[:, :, -1:],
            position_embeddings=(cos[:, -1:], sin[:, -1:]),
            past_key_values=cache,
        )
        state = normed(hidden, spec.rms_norm_eps) * weights[NORM]
        model.lm_head.weight = torch.nn.Parameter(rows)
        logits = logits_of(model, state[0, 0], spec.traits).double()
        place = int(logits.argmax())
        odds = logits[place] - torch.cat([logits[:place], logits[place + 1 :]]).logsumexp(0)
        token = int(drafter.tokens[place])
        chance = float(torch.sigmoid(drafter.slope * odds + drafter.offset))
        found.append(Draft(token, chance, state[0, 0].numpy()))
    return found


def normed(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
