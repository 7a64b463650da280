"""A checkpoint's weights in the transformers model of its family (torch)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from dash_export.models.spec import Float32Array

_UPDATE = re.compile(r"model\.layers\.\d+\.update_\d+\.weight")


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
    for name in filter(_UPDATE.fullmatch, weights):
        _add_update(model.model.layers[int(name.split(".")[2])], name.split(".")[3], described, dtype)
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if getattr(described, "tie_word_embeddings", False) else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"these are not the model's weights: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.to(dtype=dtype).eval().requires_grad_(False)


def _add_update(layer: torch.nn.Module, name: str, config: Any, dtype: torch.dtype) -> None:
    """What a pruned unit left to this layer (bypasses.py)."""
    size, eps = config.hidden_size, config.rms_norm_eps
    layer.add_module(name, torch.nn.Linear(size, size, dtype=dtype))

    def updated(module: torch.nn.Module, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(hidden.float(), (size,), eps=eps).to(hidden.dtype)
        update: torch.Tensor = module.get_submodule(name)(normed)
        return hidden + update

    layer.register_forward_hook(updated)


@contextmanager
def instead(module: torch.nn.Module, skip: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """While it lasts, `module` gives `rows` [batch, tokens, size] for the tokens that `skip` [batch, tokens]."""
    hook = module.register_forward_hook(
        lambda _module, _inputs, found: torch.where(skip[..., None], rows.to(found.dtype), found)
    )
    try:
        yield
    finally:
        hook.remove()
