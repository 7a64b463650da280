"""A checkpoint's weights in the transformers model of its family (torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from dash_export.models.spec import Float32Array


def torch_model(
    config: Mapping[str, Any], weights: Mapping[str, Float32Array], dtype: torch.dtype, attention: str = "sdpa"
) -> Any:
    """The causal LM of a Hugging Face `config` with `weights` by their names there, frozen, on the CPU.

    Raises ValueError when the weights are not those of the model.
    """
    described = transformers.AutoConfig.for_model(**dict(config))
    described._attn_implementation = attention
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(described, dtype=dtype)
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if getattr(described, "tie_word_embeddings", False) else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"these are not the model's weights: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.to(dtype=dtype).eval().requires_grad_(False)
